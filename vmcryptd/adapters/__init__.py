# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ports' implementations on a real host, one package for each outside service."""
