# SPDX-License-Identifier: LGPL-2.1-or-later
"""Values and decisions: what the configuration says, what was observed, what is to be done. No I/O."""
