# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events of the audit log: a fixed id and fields that the journal keeps beside the sentence. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmcryptd.core.errors import VmcryptdError
from vmcryptd.core.requester import REQUESTER, Requester


class Event(NamedTuple):
    """One kind of event."""

    name: str
    message_id: str  # journalctl MESSAGE_ID=…; never to be changed (sd-id128(3))


UNLOCK = Event("unlock", "01c79d4a433d4feb88e9f95c845c4497")
LOCK = Event("lock", "02b6145d21f0466a942110ed8a711081")
WRONG_KEY = Event("wrong-key", "2496be369c064dd9a9b1e707c712cd2e")
REFUSED = Event("refused", "e5e27448b25c45e3bf134641d29bb745")
FAILED = Event("failed", "5e027390f1ae43f38e7df130d537376a")
WAITING = Event("waiting", "67bdfccdf4ef4c7e892619b0b5a8c250")
PANIC = Event("panic", "8addac95dfa24ba5ace9428784a57e19")
KEY_ADDED = Event("key-added", "0b4bc0352af045dcb6e23e488d9246d0")
KEY_CHANGED = Event("key-changed", "3ba2e1b4c19e48f09c94dc2c9354556b")
KEY_REMOVED = Event("key-removed", "09f80ae3cc9d4f55aa8f10096140b798")
KEY_ROTATED = Event("key-rotated", "6141610a5e0b4d63bf28f34496834804")
HEADER_BACKED_UP = Event("header-backed-up", "6181bd88a68d4bde870f19436f62a495")
KEYSTORE_MADE = Event("volume-created", "80c1ef7de031461b813ab2df09fddbbf")

SUCCESS = "success"

Fields = tuple[tuple[str, str], ...]


def fields(
    event: Event,
    *,
    volume: str | Sequence[str] = (),
    guest: str = "",
    uuid: str = "",
    source: str = "",
    error: VmcryptdError | None = None,
    requester: Requester | None = None,
) -> dict[str, Fields]:
    """The `extra` of a log call. `requester`: the user who asked, if that is not the running task's.

    No argument of a program is among them: that may be a token.
    """
    asked = REQUESTER.get() if requester is None else requester
    volumes = [volume] if isinstance(volume, str) else volume
    kind, colon, argument = source.partition(":")
    if kind == "exec" and colon:
        source = f"exec:{argument.split(maxsplit=1)[0]}" if argument.split() else kind
    found = [
        ("MESSAGE_ID", event.message_id),
        ("VMCRYPTD_EVENT", event.name),
        *(("VMCRYPTD_VOLUME", name) for name in volumes),
        ("VMCRYPTD_GUEST", guest),
        ("VMCRYPTD_LUKS_UUID", uuid),
        ("VMCRYPTD_SOURCE", source),
        ("VMCRYPTD_UID", "" if asked.uid < 0 else str(asked.uid)),
        ("VMCRYPTD_WAY", _way(source, asked)),
        ("VMCRYPTD_RESULT", SUCCESS if error is None else error.name),
    ]
    return {"fields": tuple((name, value) for name, value in found if value)}


def _way(source: str, asked: Requester) -> str:
    """A password agent does not say who has typed. While the daemon lives, the command line comes over the bus."""
    if source == "prompt":
        return "agent"
    if asked.uid < 0:
        return "vmcryptd"
    return "command-line" if asked.is_here else "bus"
