# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python3 -m vmcryptd` is the daemon."""

from vmcryptd.daemon import main

main()
