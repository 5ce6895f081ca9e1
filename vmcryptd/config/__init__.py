# SPDX-License-Identifier: LGPL-2.1-or-later
"""From TOML files to Settings."""
