# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a locked volume to its mapping: device, header, then an attempt with all it has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vmcryptd.core.errors import AmbiguousDeviceError, BusyError, DeviceMissingError
from vmcryptd.core.model import Header, Unlock, VolumeSpec, VolumeState
from vmcryptd.core.ports import Crypt, Keys
from vmcryptd.core.states import Activities
from vmcryptd.engine.attempt import Attempt
from vmcryptd.engine.derivation import Derivations
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.key_management import KeySlots
from vmcryptd.engine.opening import Opening, Openings, Phase
from vmcryptd.engine.prompt import Answer, Prompt
from vmcryptd.engine.tokens import Tokens


class Opener:
    """Opens one volume at a time per caller; what it needs beneath is open already."""

    def __init__(
        self,
        crypt: Crypt,
        keys: Keys,
        inventory: Inventory,
        activities: Activities,
        prompt: Prompt,
        openings: Openings,
        derivations: Derivations,
        key_slots: KeySlots,
    ) -> None:
        self._crypt = crypt
        self._keys = keys
        self._prompt = prompt
        self._inventory = inventory
        self._activities = activities
        self._derivations = derivations
        self._key_slots = key_slots
        self._tokens = Tokens(crypt, inventory, derivations)
        self._openings = openings

    async def open(self, name: str, may_ask: Callable[[], bool]) -> str:
        """Make the mapping. Returns the key source that fitted. Raises VmcryptdError."""
        opening = self._openings.of(name)
        opening.seen = self._inventory.sight(name)
        await self._wait_for_device(self._inventory.graph.volumes[name].spec, opening)
        opening.seen = self._inventory.sight(name)
        self._prompt.fetching(name)
        return await self._open(name, lambda attempt: attempt.run(may_ask)) or ""

    async def open_by(self, name: str, answer: Answer) -> str | None:
        """The same with one answer and nothing else. Returns None if it does not fit."""
        return await self._open(name, lambda attempt: attempt.by_answer(answer))

    async def _open(
        self, name: str, attempt: Callable[[Attempt], Awaitable[str | None]]
    ) -> str | None:
        spec = self._inventory.graph.volumes[name].spec
        self._openings.of(name).phase = Phase.TRYING
        self._activities.volumes[name].doing = VolumeState.UNLOCKING
        self._inventory.changes.notify()
        header = await self._crypt.header(spec)
        self._inventory.accept_header(name, header)
        if self._is_usable(name):
            return ""  # another program was faster
        if taken_by := self._inventory.graph.volumes[name].taken_by:
            raise BusyError(
                f"volume {name}: the mapping name {name} is taken by something else ({taken_by}); "
                f"`dmsetup info {name}` tells more, remove or rename it"
            )
        if header.data_reencrypted:
            header = await self._key_slots.finish_rotation(spec, header)
        try:
            return await attempt(self._attempt(spec, header))
        except BusyError:
            # Another program may have been faster.
            self._inventory.observe()
            if self._is_usable(name):
                return ""
            raise

    def _attempt(self, spec: VolumeSpec, header: Header) -> Attempt:
        return Attempt(
            spec,
            header,
            self._crypt,
            self._keys,
            self._prompt,
            self._inventory,
            self._derivations,
            self._tokens,
            self._activities.volumes[spec.name],
            self._openings.of(spec.name),
        )

    def _is_usable(self, name: str) -> bool:
        node = self._inventory.graph.volumes.get(name)
        return node is not None and node.is_usable

    async def _wait_for_device(self, spec: VolumeSpec, opening: Opening) -> None:
        def is_there() -> bool:
            node = self._inventory.graph.volumes[spec.name]
            if node.rivals:
                raise AmbiguousDeviceError(node.trouble)
            return not node.absent or node.is_open

        if is_there():
            return
        opening.phase = Phase.ABSENT
        if await self._inventory.changes.until(is_there, spec.timeout_s):
            return
        then = f"once it is there: `vmcryptctl unlock {spec.name}`"
        if spec.unlock is Unlock.BOOT:
            then = "the volume is opened when it appears"
        key, place = "device", spec.device
        if self._inventory.graph.volumes[spec.name].absent == spec.header:
            key, place = "header", spec.header
        raise DeviceMissingError(
            f"volume {spec.name}: its {key} {place} did not appear within {spec.timeout_s:g} s; "
            f"check the disk and `{key}` in the configuration; {then}"
        )
