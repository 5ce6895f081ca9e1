# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mechanics of the operating system, without policy."""
