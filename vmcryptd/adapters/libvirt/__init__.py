# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains and storage pools, through libvirt."""
