# SPDX-License-Identifier: LGPL-2.1-or-later
"""D-Bus: the connection, the objects, the client."""
