# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who needs whom: configuration and observation in, a graph of volumes, pools and guests out. Pure.

Dependencies come from sysfs and the domain XML. What cannot be seen while a lower layer is locked comes from the
configuration (`vg`, `mount`, `after`), and then from what was seen at an earlier opening.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from vmcryptd.errors import GraphError
from vmcryptd.model import (
    BlockDevice,
    Domain,
    GuestSpec,
    GuestState,
    Observation,
    Pool,
    Remembered,
    Settings,
    SourceKind,
    SourceType,
    Start,
    Virtualisation,
    VolumeSpec,
)


@dataclass(frozen=True)
class VolumeNode:
    """A configured volume, where it lies, and its mapping if there is one."""

    spec: VolumeSpec
    stands_on: tuple[str, ...] = ()  # volumes its device lies on: must stay open beneath it
    opens_after: tuple[
        str, ...
    ] = ()  # volumes that must be open to open it (its key file, `after`)
    device: str = ""  # kernel name of its device, empty while that is not there
    mapping: str = ""  # dm name of its mapping (ours, or one made by hand), empty while locked
    suspended: bool = False
    taken_by: str = ""  # what holds its mapping name although it is not this volume
    is_active: bool = False  # content = "lvm": its group is active
    mounts: tuple[str, ...] = ()  # where its mapping is mounted now, deepest last
    uuid: str = ""

    @property
    def is_open(self) -> bool:
        return bool(self.mapping)

    @property
    def is_usable(self) -> bool:
        """Open, and its key not wiped."""
        return self.is_open and not self.suspended

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.stands_on, *self.opens_after)))


@dataclass(frozen=True)
class PoolNode:
    """A libvirt storage pool that lies on volumes."""

    pool: Pool
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuestNode:
    """A libvirt domain, or a configured guest that libvirt does not know (`domain` is None)."""

    spec: GuestSpec
    domain: Domain | None = None
    needs: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()

    @property
    def is_running(self) -> bool:
        return self.state not in (GuestState.OFF, GuestState.CRASHED, GuestState.UNDEFINED)

    @property
    def state(self) -> GuestState:
        return self.domain.state if self.domain else GuestState.UNDEFINED

    @property
    def is_ours(self) -> bool:
        """Whether boot and shutdown care for it; the others are libvirt's own business."""
        return bool(self.needs) or self.spec.configured

    @property
    def starts_at_boot(self) -> bool:
        match self.spec.start:
            case Start.ALWAYS:
                return True
            case Start.NEVER:
                return False
        return self.domain is not None and self.domain.autostart


@dataclass(frozen=True)
class Graph:
    """All nodes, and the edges backwards."""

    volumes: Mapping[str, VolumeNode] = field(default_factory=dict)
    pools: Mapping[str, PoolNode] = field(default_factory=dict)
    guests: Mapping[str, GuestNode] = field(default_factory=dict)
    standing_on: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # volume → volumes on it
    pools_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guests_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guests_in: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # pool → guests with a disk in it
    lies_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # guests' paths → volumes
    libvirt_reachable: bool = False

    def beneath(self, names: Iterable[str]) -> list[str]:
        """The named volumes and all they need, lowest first."""
        found: dict[str, None] = {}
        stack = [(name, False) for name in reversed(list(names))]
        while stack:
            name, expanded = stack.pop()
            if expanded:
                found[name] = None
            elif name not in found:
                stack.append((name, True))
                stack.extend(
                    (lower, False) for lower in self.volumes[name].needs if lower not in found
                )
        return list(found)

    def is_explained(self, name: str) -> bool:
        """Whether a missing device is no surprise, because a volume beneath it is locked."""
        return any(not self.volumes[lower].is_open for lower in self.volumes[name].stands_on)

    def users(self, name: str) -> list[str]:
        """Who uses an open volume, in words: running guests, open volumes on it."""
        guests = [
            f"guest {guest}"
            for guest in self.guests_on.get(name, ())
            if self.guests[guest].is_running
        ]
        volumes = [
            f"volume {other}"
            for other in self.standing_on.get(name, ())
            if self.volumes[other].is_open
        ]
        return guests + volumes


def wanted_paths(
    settings: Settings, virtualisation: Virtualisation, chains: Mapping[str, tuple[str, ...]]
) -> set[str]:
    """Every path that `build` will want looked up in `Observation.storage`."""
    paths: set[str] = set()
    for volume in settings.volumes.values():
        paths.update(_volume_paths(volume))
    for pool in virtualisation.pools.values():
        paths.update(path for path in (pool.path, *pool.devices) if path)
        paths.update(pool.volumes.values())
    for domain in virtualisation.domains.values():
        paths.update(source.path for source in domain.sources if source.path)
    for chain in chains.values():
        paths.update(chain)
    return paths


def _volume_paths(volume: VolumeSpec) -> Iterator[str]:
    yield volume.device_path
    if volume.header:
        yield volume.header
    for source in volume.keys:
        if source.kind is SourceKind.FILE:
            yield source.argument


class _Places:
    """Answers one question: on which volumes does a path lie?"""

    def __init__(self, settings: Settings, observation: Observation) -> None:
        self._observation = observation
        self._storage = observation.storage
        self._volumes = settings.volumes
        self._groups = {v.vg: name for name, v in settings.volumes.items() if v.vg}
        self._mounts = {
            tuple(v.mount.split("/")): name for name, v in settings.volumes.items() if v.mount
        }
        self._by_number = {
            device.number: device for device in self._storage.devices.values() if device.number
        }
        self._mapping_of: dict[str, str] = {}  # kernel name of an open mapping → volume
        self._beneath: dict[str, tuple[str, ...]] = {}

    def mapped(self, volume: str, device: BlockDevice) -> None:
        """Tell that this device is the open mapping of the volume."""
        self._mapping_of[device.name] = volume

    def of_path(self, path: str) -> tuple[str, ...]:
        """The nearest volumes beneath a device or file path."""
        if link := self._storage.links.get(path):
            return self.of_device(link)
        real = self._storage.real.get(path, path)
        if configured := self._by_name(real):
            return (configured,)
        if number := self._storage.files.get(path):
            device = self._by_number.get(number)
            seen = self.of_device(device.name) if device else ()
        else:
            seen = self._observation.remembered.paths.get(path, ())
        chain = self._observation.chains.get(path, ())
        below = [volume for member in chain for volume in self.of_path(member)]
        return tuple(name for name in dict.fromkeys((*seen, *below)) if name in self._volumes)

    def of_device(self, name: str) -> tuple[str, ...]:
        """The volume whose mapping the device is, else the nearest ones that it is made of."""
        if name in self._mapping_of:
            return (self._mapping_of[name],)
        if name in self._beneath:
            return self._beneath[name]
        self._beneath[name] = ()  # also ends the walk, should sysfs ever show a circle
        device = self._storage.devices.get(name)
        found: dict[str, None] = {}
        if device is not None:
            for lower in device.below:
                found.update(dict.fromkeys(self.of_device(lower)))
            if device.backing_file:
                found.update(dict.fromkeys(self.of_path(device.backing_file)))
        self._beneath[name] = tuple(found)
        return self._beneath[name]

    def of_group(self, vg: str) -> tuple[str, ...]:
        if vg in self._groups:
            return (self._groups[vg],)
        found: dict[str, None] = {}
        for device in self._storage.devices.values():
            if device.vg == vg:
                found.update(dict.fromkeys(self.of_device(device.name)))
        return tuple(found)

    def _by_name(self, path: str) -> str | None:
        """What the configuration says of a path that cannot be looked up: mapping, group, or mount."""
        parts = tuple(path.split("/"))
        if parts[:3] == ("", "dev", "mapper") and len(parts) == 4:
            if parts[3] in self._volumes:
                return parts[3]
            group = parts[3].replace("--", "\0").partition("-")[0].replace("\0", "-")
            return self._groups.get(group)
        if parts[:2] == ("", "dev"):
            return self._groups.get(parts[2]) if len(parts) == 4 else None
        for size in range(len(parts), 1, -1):
            if parts[:size] in self._mounts:
                return self._mounts[parts[:size]]
        return None


def build(settings: Settings, observation: Observation) -> Graph:
    """Build the graph. Raises GraphError for a cycle, naming its path."""
    try:
        return _build(settings, observation)
    except GraphError:
        if not observation.remembered.paths:
            raise
        # What was true once may contradict what is true now; what is true now must not be refused for it.
        return _build(
            settings,
            replace(observation, remembered=Remembered(uuids=observation.remembered.uuids)),
        )


def _build(settings: Settings, observation: Observation) -> Graph:
    places = _Places(settings, observation)
    mappings = _mappings(settings, observation)
    for name, (device, _) in mappings.items():
        if device is not None:
            places.mapped(name, device)
    above: dict[str, list[BlockDevice]] = {}
    for device in observation.storage.devices.values():
        for lower in device.below:
            above.setdefault(lower, []).append(device)
    mounted: dict[str, list[str]] = {}
    for mount in observation.storage.mounts:
        mounted.setdefault(mount.number, []).append(mount.target)

    volumes = {}
    for name, spec in settings.volumes.items():
        mapping, taken_by = mappings[name]
        stands_on = dict.fromkeys(places.of_path(spec.device_path))
        if name in stands_on:
            raise GraphError(
                f"volume {name}: its device {spec.device_path} lies on the volume itself: {name} → {name}"
            )
        opens_after: dict[str, None] = {}
        for key_path in list(_volume_paths(spec))[1:]:
            opens_after.update(dict.fromkeys(places.of_path(key_path)))
        opens_after.update(dict.fromkeys(spec.after))
        volumes[name] = VolumeNode(
            spec=spec,
            stands_on=tuple(stands_on),
            opens_after=tuple(lower for lower in opens_after if lower not in stands_on),
            device=observation.storage.links.get(spec.device_path, ""),
            mapping=mapping.dm_name if mapping else "",
            suspended=mapping.suspended if mapping else False,
            taken_by=taken_by,
            is_active=mapping is not None
            and (
                name in observation.activated
                or any(device.vg for device in above.get(mapping.name, ()))
            ),
            mounts=tuple(sorted(mounted.get(mapping.number, ()), key=len))
            if mapping and mapping.number
            else (),
            uuid=_uuid(spec, observation) or (mapping.luks_uuid if mapping else ""),
        )
    _check_cycles({name: node.needs for name, node in volumes.items()}, "volume")

    pools = {}
    for name, pool in observation.virtualisation.pools.items():
        found = dict.fromkeys(
            volume for path in (pool.path, *pool.devices) if path for volume in places.of_path(path)
        )
        if pool.vg:
            found.update(dict.fromkeys(places.of_group(pool.vg)))
        pools[name] = PoolNode(pool, tuple(found))

    guests = {}
    lies_on: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys((*observation.virtualisation.domains, *settings.guests)):
        domain = observation.virtualisation.domains.get(name)
        needs: dict[str, None] = {}
        used: dict[str, None] = {}
        for source in domain.sources if domain else ():
            if source.type is not SourceType.POOL:
                lies_on[source.path] = places.of_path(source.path)
                needs.update(dict.fromkeys(lies_on[source.path]))
            elif source.pool in pools:
                used[source.pool] = None
                needs.update(dict.fromkeys(pools[source.pool].needs))
                if path := pools[source.pool].pool.volumes.get(source.volume):
                    needs.update(dict.fromkeys(places.of_path(path)))
        needs.update(dict.fromkeys(settings.guest(name).needs))
        guests[name] = GuestNode(settings.guest(name), domain, tuple(needs), tuple(used))
    _check_cycles({name: node.spec.after for name, node in guests.items()}, "guest")

    return Graph(
        volumes=volumes,
        pools=pools,
        guests=guests,
        standing_on=_backwards({name: node.stands_on for name, node in volumes.items()}),
        pools_on=_backwards({name: node.needs for name, node in pools.items()}),
        guests_on=_backwards({name: node.needs for name, node in guests.items()}),
        guests_in=_backwards({name: node.pools for name, node in guests.items()}),
        lies_on=lies_on,
        libvirt_reachable=observation.virtualisation.reachable,
    )


def _uuid(spec: VolumeSpec, observation: Observation) -> str:
    return (
        spec.uuid
        or observation.uuids.get(spec.name)
        or observation.remembered.uuids.get(spec.name, "")
    )


def _mappings(
    settings: Settings, observation: Observation
) -> dict[str, tuple[BlockDevice | None, str]]:
    """For each volume its open mapping, and what else holds its mapping name.

    A mapping is a volume's when it is LUKS and made of the volume's device, whatever its name. The header's UUID
    decides where the device cannot be looked up: UUIDs alone would confuse a volume with its snapshot or clone.
    """
    by_uuid: dict[str, list[BlockDevice]] = {}
    by_lower: dict[str, list[BlockDevice]] = {}
    by_name: dict[str, BlockDevice] = {}
    for device in observation.storage.devices.values():
        if device.dm_name:
            by_name[device.dm_name] = device
        if uuid := device.luks_uuid:
            by_uuid.setdefault(uuid, []).append(device)
            for lower in device.below:
                by_lower.setdefault(lower, []).append(device)
    found: dict[str, tuple[BlockDevice | None, str]] = {}
    for name, spec in settings.volumes.items():
        kernel_name = observation.storage.links.get(spec.device_path)
        uuid = _uuid(spec, observation)
        if kernel_name is not None:
            candidates = by_lower.get(kernel_name, [])
            if spec.uuid:
                candidates = [device for device in candidates if device.luks_uuid == spec.uuid]
        else:
            candidates = by_uuid.get(uuid, [])
        named = by_name.get(name)
        if named is not None and named in candidates:
            found[name] = (named, "")
        elif candidates:
            found[name] = (candidates[0], "")
        elif named is not None and named.luks_uuid and kernel_name is None and not uuid:
            found[name] = (named, "")  # nothing contradicts it
        else:
            found[name] = (None, (named.dm_uuid or named.name) if named else "")
    return found


def _backwards(edges: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for name, others in edges.items():
        for other in others:
            found.setdefault(other, []).append(name)
    return {name: tuple(others) for name, others in found.items()}


def _check_cycles(edges: Mapping[str, Iterable[str]], what: str) -> None:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        # CycleError.args[1] lists each node before the one that needs it.
        path = " → ".join(reversed(error.args[1]))
        raise GraphError(
            f"the {what}s need each other in a circle: {path}; take one of these out of `after`"
        ) from None
