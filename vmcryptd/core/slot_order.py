# SPDX-License-Identifier: LGPL-2.1-or-later
"""Orders the slots of a LUKS header for trying a key. Pure.

cryptsetup tries them by number: a cheap slot after an Argon2id one costs both.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmcryptd.core.model import Header, KeySlot

# Only these tokens open the slots that they enrolled: such a key is never typed, nor in a file.
# "systemd-recovery" is not among them: a recovery key is typed.
MACHINES = frozenset({"systemd-tpm2", "systemd-fido2", "systemd-pkcs11", "clevis"})

# Volume, number and salt of key slots that a key did not fit: a new slot of the same number has another salt.
Tried = set[tuple[str, int, str]]


def order(header: Header, fitted: int | None) -> tuple[KeySlot, ...]:
    """The slots that a passphrase or key file may fit, the most likely and cheapest first.

    Those with a caveat come last, regardless of their priority. `fitted` is the slot that the key last opened. Empty
    when only cryptsetup itself can try.
    """
    if header.is_reencrypting:
        return ()
    bound = bound_slots(header)
    typed = [slot for slot in header.slots if slot.number not in bound] or list(header.slots)
    # Slots of priority 0 are to be used only when named. If there are no others, they are tried.
    named = [slot for slot in typed if slot.priority > 0] or typed
    last = [slot for slot in header.slots if slot.number == fitted]
    rest = sorted(
        named, key=lambda slot: (bool(slot.caveat), -slot.priority, slot.cost, slot.number)
    )
    return tuple(dict.fromkeys((*last, *rest)))


def bound_slots(header: Header) -> frozenset[int]:
    """The slots of tokens, whose keys no person knows."""
    machines = _slots(header, (t.kind for t in header.tokens if t.kind in MACHINES))
    others = _slots(header, (t.kind for t in header.tokens if t.kind not in MACHINES))
    return machines - others


def _slots(header: Header, kinds: Iterable[str]) -> frozenset[int]:
    wanted = set(kinds)
    return frozenset(n for token in header.tokens if token.kind in wanted for n in token.slots)
