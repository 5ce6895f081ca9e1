# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reaches goals through the ports."""
