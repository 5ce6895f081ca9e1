# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUKS headers, key slots and mappings, through cryptsetup."""
