# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tokens in LUKS2 headers that systemd-cryptenroll writes: TPM2, FIDO2, PKCS#11."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict

from vmcryptd.core.errors import KeyUnavailableError
from vmcryptd.core.model import Header, KeySource, SourceKind, Token, VolumeSpec
from vmcryptd.core.ports import Crypt, Key
from vmcryptd.engine.derivation import Derivations
from vmcryptd.engine.inventory import Inventory

# As many volumes are opened by a TPM at once. The kernel gives each opener of /dev/tpmrm0 the chip as if it were alone
# (drivers/char/tpm/tpm2-space.c), but all of them share the chip's sessions, which can run out.
TPM_SHARERS = 8


class Tokens:
    """Opens volumes by their tokens: by a TPM side by side, by sticks one of a kind at a time, with a PIN one by one.

    A host rarely has a second stick. A TPM locks itself after wrong PINs, so each has its outcome before the next.
    """

    def __init__(self, crypt: Crypt, inventory: Inventory, derivations: Derivations) -> None:
        self._crypt = crypt
        self._inventory = inventory
        self._derivations = derivations
        self._tpm = asyncio.Semaphore(TPM_SHARERS)
        self._sticks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._pins = asyncio.Lock()

    def of(self, spec: VolumeSpec, header: Header, source: KeySource) -> list[Token]:
        """Those that the source means. Raises KeyUnavailableError if there are none."""
        kind = source.kind.token_kind
        if found := [token for token in header.tokens if token.kind == kind and token.slots]:
            return found
        if header.version == 1:
            raise KeyUnavailableError(
                "a LUKS1 header has no tokens: `cryptsetup convert` makes it LUKS2"
            )
        raise KeyUnavailableError(
            f"the header has no {kind} token: `systemd-cryptenroll --{source.kind}-…` makes one"
        )

    async def open(self, spec: VolumeSpec, header: Header, token: Token, pin: Key | None) -> None:
        """Make or resume the mapping.

        Raises WrongPinError, also if one is needed and not given, and KeyUnavailableError.
        """
        slots = [slot for slot in header.slots if slot.number in token.slots]
        is_tpm = token.kind == SourceKind.TPM2.token_kind
        device = self._tpm if is_tpm else self._sticks[token.kind]
        pins = self._pins if is_tpm and pin is not None else contextlib.nullcontext()
        async with pins, device, self._derivations.room_for_token(spec, slots):
            self._inventory.check_alone(spec)
            node = self._inventory.graph.volumes[spec.name]
            suspended = node.mapping if node.is_open and node.suspended else ""
            await self._crypt.open_by_token(spec, token, pin, suspended)


def question(volume: str, token: Token, wrong: bool) -> str:
    """A question of its own: a PIN is no passphrase, and is never tried as one."""
    before = "That PIN was wrong. " if wrong else ""
    return f"{before}PIN of {token.title} of volume {volume}:"
