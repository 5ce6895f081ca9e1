# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks at the configuration and the host and says what is wrong."""
