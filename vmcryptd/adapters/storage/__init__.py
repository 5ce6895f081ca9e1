# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block devices, volume groups and mounts."""
