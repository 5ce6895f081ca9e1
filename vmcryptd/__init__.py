# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmcryptd opens the encrypted volumes of a KVM host, then starts the guests that live on them."""

__version__ = "0.1.0"
