# SPDX-License-Identifier: LGPL-2.1-or-later
"""The outside world, one module for each part of it."""
