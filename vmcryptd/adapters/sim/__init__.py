# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated host behind the same ports."""
