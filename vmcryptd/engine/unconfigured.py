# SPDX-License-Identifier: LGPL-2.1-or-later
"""Volumes that have left the configuration: what is open stays ours until it is closed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from vmcryptd.core.graph import Graph, VolumeNode
from vmcryptd.core.model import KeySource, Settings, SourceKind, Storage, Unlock, VolumeSpec
from vmcryptd.core.ports import Memory


class Unconfigured:
    """Such volumes that are open, or that a step begun earlier is opening."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._left: dict[str, VolumeSpec] = {}
        self._kept: Mapping[str, VolumeSpec] = {}  # open volumes, as kept for the next daemon
        self.opening: set[str] = set()  # volumes with a step under way

    def start(self) -> None:
        """Take over what an earlier daemon had open."""
        self._kept = self._memory.open_volumes()
        self._left = {name: _left(spec, spec.uuid or "") for name, spec in self._kept.items()}

    def configure(self, settings: Settings, before: Graph, uuids: Mapping[str, str]) -> None:
        """Some volumes may leave, and some come back. `uuids`: as read from headers, also since the graph was built."""
        left = {
            name: _left(node.spec, uuids.get(name) or node.uuid)
            for name, node in before.volumes.items()
        }
        self._left = {
            name: spec for name, spec in (self._left | left).items() if name not in settings.volumes
        }

    def added_to(self, settings: Settings, storage: Storage) -> Settings:
        """The configuration, and what has left it and seems to be open."""
        if not self._left:
            return settings
        uuids = {uuid for device in storage.devices.values() if (uuid := device.luks_uuid)}
        open_ = {name: spec for name, spec in self._left.items() if spec.uuid in uuids}
        return replace(settings, volumes={**settings.volumes, **open_}) if open_ else settings

    def drop_closed(self, graph: Graph) -> bool:
        """Forget what is closed, or is a configured volume's mapping by now. Returns whether there was any."""
        before, volumes = len(self._left), graph.volumes
        self._left = {
            name: spec
            for name, spec in self._left.items()
            if name in self.opening or (name in volumes and volumes[name].is_open)
        }
        return len(self._left) < before

    def keep(self, volumes: Iterable[VolumeNode]) -> None:
        """Have the next daemon know what is open now."""
        kept = {
            node.spec.name: replace(node.spec, uuid=node.uuid) for node in volumes if node.is_open
        }
        if kept != self._kept:
            self._kept = kept
            self._memory.keep_open(kept)


def _left(spec: VolumeSpec, uuid: str) -> VolumeSpec:
    """It is closed as its table said, and only opened again (when it is suspended) by a person."""
    return replace(
        spec,
        uuid=uuid or spec.uuid,
        keys=(KeySource(SourceKind.PROMPT),),
        unlock=Unlock.MANUAL,
        after=(),
        is_configured=False,
    )
