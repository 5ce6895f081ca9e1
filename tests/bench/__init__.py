# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vmcryptd costs, side by side with what else does the same: `python -m tests.bench`."""
