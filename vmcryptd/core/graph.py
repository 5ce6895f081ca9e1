# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the dependency graph of volumes, pools and guests from configuration and observation. Pure.

Dependencies come from sysfs and the domain XML. Those hidden by a locked lower layer come from the configuration
(`vg`, `mount`, `after`), and else from what was observed while it was open.
"""

from __future__ import annotations

import graphlib
import itertools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from vmcryptd.core import gcpause, identity
from vmcryptd.core.errors import GraphError
from vmcryptd.core.model import (
    BlockDevice,
    Content,
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
    Storage,
    Virtualisation,
    VolumeSpec,
)

_BY_CRYPT_UUID = re.compile(r"dm-uuid-(?:part\d+-)?CRYPT-[^-]+-[0-9a-f]{32}-(?P<name>.+)")


class VolumeNode(NamedTuple):
    """A configured volume, its device, and its mapping if there is one."""

    spec: VolumeSpec
    stands_on: tuple[str, ...] = ()  # volumes its device lies on: must stay open beneath it
    opens_after: tuple[
        str, ...
    ] = ()  # volumes that must be open to open it (its key file, `after`)
    keys_in: tuple[
        str, ...
    ] = ()  # of these, the ones that only hold a key of it: another key opens it, too
    device: str = (
        ""  # kernel name of its device, or its path if that is a file; empty while not there
    )
    absent: str = ""  # the missing path: of its device, else of its detached header
    mapping: str = ""  # dm name of its mapping (ours, or one made by hand), empty while locked
    suspended: bool = False
    taken_by: str = ""  # the other device that has its mapping name
    rivals: tuple[str, ...] = ()  # the devices with its tag, if there are several
    is_active: bool = False  # content = "lvm": its group is active
    mounts: tuple[str, ...] = ()  # where its mapping is mounted now, deepest last
    uuid: str = ""

    @property
    def is_misnamed(self) -> bool:
        """Whether guests cannot find its mapping, because another program gave it another name."""
        is_for_guests = self.spec.is_configured and self.spec.content is Content.GUEST
        return is_for_guests and self.mapping not in ("", self.spec.name)

    @property
    def trouble(self) -> str:
        """The present problem and what to do; empty if there is none."""
        name = self.spec.name
        if self.rivals:
            devices = " and ".join(f"/dev/{rival}" for rival in self.rivals)
            return (
                f"volume {name}: {self.spec.device} is on {devices}, so one of these is a copy, and it is not "
                "opened: detach the copy, or name the right one by another path in `device`"
            )
        if not self.spec.is_configured:
            return (
                f"volume {name}: it is no longer configured, and stays open until it is closed: put its table back "
                f"and `vmcryptctl reload`, or `vmcryptctl lock {name}`"
            )
        if self.is_misnamed:
            return (
                f"volume {name}: it is open as {self.mapping}, so its guests do not find /dev/mapper/{name}; "
                f"close what uses it, and `dmsetup rename {self.mapping} {name}`"
            )
        return ""

    @property
    def is_open(self) -> bool:
        return bool(self.mapping)

    @property
    def is_usable(self) -> bool:
        """Open, and its key not wiped."""
        return self.is_open and not self.suspended

    @property
    def still_needs(self) -> tuple[str, ...]:
        """The volumes that it still needs: one that only opens it is not needed once it is open."""
        return self.stands_on if self.is_usable else self.needs

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.stands_on, *self.opens_after)))


class PoolNode(NamedTuple):
    """A libvirt storage pool that lies on volumes."""

    pool: Pool
    needs: tuple[str, ...] = ()


class GuestDisk(NamedTuple):
    """A disk that a guest writes.

    `identity` is equal for all paths of one disk: a kernel name, or a file's path without links.
    """

    path: str
    identity: str
    is_shareable: bool = False  # marked as shareable in the domain XML


class GuestNode(NamedTuple):
    """A libvirt domain, or a configured guest that libvirt does not know (`domain` is None)."""

    spec: GuestSpec
    domain: Domain | None = None
    needs: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    disks: tuple[GuestDisk, ...] = ()

    @property
    def is_running(self) -> bool:
        # One that has crashed and is kept (libvirt's `on_crash` "preserve") has its process and its disks.
        return self.state not in (GuestState.OFF, GuestState.UNDEFINED)

    @property
    def trouble(self) -> str:
        """If it died or cannot run on: what happened, and what to do; else empty."""
        return self.domain.trouble if self.domain else ""

    @property
    def is_up(self) -> bool:
        """Whether it runs. A start by libvirt's autostart does not count before its end: it may fail."""
        return self.is_running and self.state is not GuestState.STARTING

    @property
    def state(self) -> GuestState:
        return self.domain.state if self.domain else GuestState.UNDEFINED

    @property
    def is_ours(self) -> bool:
        """Whether boot starts and shutdown stops it; libvirt alone manages the others."""
        return bool(self.needs) or self.spec.configured

    @property
    def starts_at_boot(self) -> bool:
        match self.spec.start:
            case Start.ALWAYS:
                return True
            case Start.NEVER:
                return False
        return self.domain is not None and (self.domain.autostart or self.domain.autostart_once)


@dataclass(frozen=True)
class Graph:
    """All nodes, and the reverse edges."""

    volumes: Mapping[str, VolumeNode] = field(default_factory=dict)
    pools: Mapping[str, PoolNode] = field(default_factory=dict)
    guests: Mapping[str, GuestNode] = field(default_factory=dict)
    standing_on: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # volume → volumes on it
    opened_after: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # volume → volumes that need it to open: those of a keystore above all
    pools_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guests_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guests_in: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # pool → guests with a disk in it
    lies_on: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # guests' and pools' paths → volumes
    carriers: Mapping[str, str] = field(
        default_factory=dict
    )  # device or file that carries a volume's LUKS data, also layers below → that volume
    writers: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # identity of a disk → guests that write it and do not share it
    libvirt_reachable: bool = False
    libvirt_error: str = ""

    def beneath(
        self, names: Iterable[str], known: Container[str] = (), *, still: bool = False
    ) -> list[str]:
        """The named volumes and all that they need, lowest first, without `known` ones and all that these need.

        `still`: without volumes that only open others (keystores) which are already open.
        """
        found: dict[str, None] = {}
        stack = [(name, False) for name in reversed(list(names))]
        while stack:
            name, expanded = stack.pop()
            if expanded:
                found[name] = None
            elif name not in found and name not in known:
                node = self.volumes[name]
                lowers = node.still_needs if still else node.needs
                stack.append((name, True))
                stack.extend((lower, False) for lower in lowers if lower not in found)
        return list(found)

    def bearing(self, names: Iterable[str]) -> set[str]:
        """The named volumes and all that must be beneath them; not the ones that only hold their keys."""
        found: set[str] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name not in found and name in self.volumes:
                found.add(name)
                node = self.volumes[name]
                left += [lower for lower in node.needs if lower not in node.keys_in]
        return found

    def is_explained(self, name: str) -> bool:
        """Whether a missing device or header is expected, because a volume beneath it is locked."""
        node = self.volumes[name]
        beneath = node.needs if node.device else node.stands_on
        return any(not self.volumes[lower].is_open for lower in beneath)

    def users(self, name: str) -> list[str]:
        """The users of an open volume, in words: running guests, open volumes on it."""
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
    """All paths that `build` needs in `Observation.storage`."""
    paths: set[str] = set()
    for volume in settings.volumes.values():
        paths.update(_volume_paths(volume))
        if volume.mount:
            paths.update((volume.mount, _parent(volume.mount)))
    for pool in virtualisation.pools.values():
        paths.update(_pool_paths(pool))
        paths.update(pool.volumes.values())
    for domain in virtualisation.domains.values():
        paths.update(path for s in domain.sources if (path := virtualisation.path_of(s)))
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


def _pool_paths(pool: Pool) -> Iterator[str]:
    yield from (path for path in (pool.path, *pool.devices) if path)
    if pool.vg:
        yield f"/dev/{pool.vg}"


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


class _Places:
    """Finds the volumes that a path lies on."""

    def __init__(self, settings: Settings, observation: Observation) -> None:
        self._observation = observation
        self._storage = observation.storage
        self._volumes = settings.volumes
        self._groups = {v.vg: name for name, v in settings.volumes.items() if v.vg}
        real = observation.storage.real
        self._mounts = {
            tuple(path.split("/")): name
            for name, v in settings.volumes.items()
            if v.mount
            for path in (v.mount, real.get(v.mount, v.mount))
        }
        self._by_number = {
            device.number: device for device in self._storage.devices.values() if device.number
        }
        self._mapping_of: dict[str, str] = {}  # kernel name of an open mapping → volume
        self._beneath: dict[str, tuple[str, ...]] = {}
        self._of_paths: dict[str, tuple[str, ...]] = {}

    def mapped(self, volume: str, device: BlockDevice) -> None:
        """Note that this device is the open mapping of the volume."""
        self._mapping_of[device.name] = volume

    def of_path(self, path: str) -> tuple[str, ...]:
        """The nearest volumes beneath a device or file path."""
        if path not in self._of_paths:
            self._of_paths[path] = ()  # ends the recursion: images can name each other in a circle
            self._of_paths[path] = self._look_up(path)
        return self._of_paths[path]

    def of_directory(self, path: str) -> tuple[str, ...]:
        """The same for a mount point, which exists as an empty directory while nothing is mounted on it."""
        return self.of_path(path) or self._remembered(path)

    def _look_up(self, path: str) -> tuple[str, ...]:
        found = list(self._of_itself(path))
        for member in self._observation.chains.get(path, ()):
            found += self.of_path(member)
        return tuple(dict.fromkeys(found))

    def _of_itself(self, path: str) -> Iterable[str]:
        """The same without the backing files of an image at this path."""
        if link := self._storage.links.get(path):
            return self.of_device(link)
        configured = self._by_name(self._storage.real.get(path, path))
        remembered = self._remembered(path)
        found = [] if configured is None else [configured]
        if number := self._storage.files.get(path):
            # Another file system may be mounted below the configured one.
            device = self._by_number.get(number)
            found += self.of_device(device.name) if device else ()
        elif configured is None or configured in remembered:
            found += remembered
        return found

    def _remembered(self, path: str) -> tuple[str, ...]:
        names = self._observation.remembered.paths.get(path, ())
        return tuple(name for name in names if name in self._volumes)

    def of_device(self, name: str) -> tuple[str, ...]:
        """The volume whose mapping this device is, else the nearest volumes below it."""
        if name in self._mapping_of:
            return (self._mapping_of[name],)
        if name in self._beneath:
            return self._beneath[name]
        self._beneath[name] = ()  # also ends the recursion if sysfs shows a circle
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
        return tuple(found) or self._remembered(f"/dev/{vg}")

    def _by_name(self, path: str) -> str | None:
        """The volumes of a path that does not exist yet, by the names in it: mapping, group, or mount."""
        parts = tuple(path.split("/"))
        if dm_name := _dm_name(parts):
            if volume := self._volume_of(dm_name):
                return volume
            group = dm_name.replace("--", "\0").partition("-")[0].replace("\0", "-")
            return self._groups.get(group)
        if parts[:2] == ("", "dev"):
            return self._groups.get(parts[2]) if len(parts) == 4 else None
        for size in range(len(parts), 1, -1):
            if parts[:size] in self._mounts:
                return self._mounts[parts[:size]]
        return None

    def _volume_of(self, dm_name: str) -> str | None:
        """The volume with this mapping name, or with a partition of this name in kpartx's form."""
        # kpartx puts a separator after a name that ends in a digit.
        disk = dm_name.rstrip("0123456789")
        names = (dm_name, disk, disk.removesuffix("p"), disk.removesuffix("-part"))
        return next((name for name in names if name in self._volumes), None)


def _dm_name(parts: tuple[str, ...]) -> str:
    """The device-mapper name in a path of udev's or device-mapper's; empty for other paths.

    Besides /dev/mapper/NAME, udev's rules link dm-name-NAME and dm-uuid-UUID in /dev/disk/by-id, and for partitions
    dm-uuid-partN-UUID (multipath-tools, kpartx.rules). cryptsetup's UUIDs end in the mapping's name.
    """
    if parts[:3] == ("", "dev", "mapper") and len(parts) == 4:
        return parts[3]
    if parts[:4] != ("", "dev", "disk", "by-id") or len(parts) != 5:
        return ""
    if parts[4].startswith("dm-name-"):
        return parts[4].removeprefix("dm-name-")
    if match := _BY_CRYPT_UUID.match(parts[4]):
        return match["name"]
    return ""


@gcpause.paused
def build(settings: Settings, observation: Observation) -> Graph:
    """Build the graph. Raises GraphError for a cycle, naming its path."""
    try:
        return _build(settings, observation)
    except GraphError:
        if not observation.remembered.paths:
            raise
        # Old observations may contradict the present ones; they must not cause an error.
        return _build(
            settings,
            observation._replace(remembered=Remembered(uuids=observation.remembered.uuids)),
        )


def _build(settings: Settings, observation: Observation) -> Graph:
    places = _Places(settings, observation)
    identities = identity.find(settings, observation)
    for name, who in identities.items():
        if who.mapping is not None:
            places.mapped(name, who.mapping)
    above: dict[str, list[BlockDevice]] = {}
    for device in observation.storage.devices.values():
        for lower in device.below:
            above.setdefault(lower, []).append(device)
    mounted: dict[str, list[str]] = {}
    for mount in observation.storage.mounts:
        mounted.setdefault(mount.number, []).append(mount.target)

    volumes = {}
    for name, configured in settings.volumes.items():
        spec, lies_at, mapping, taken_by, rivals = identities[name]
        if spec is configured:
            stands_on = dict.fromkeys(places.of_path(spec.device_path))
        else:
            stands_on = dict.fromkeys(places.of_device(lies_at))
        if name in stands_on:
            raise GraphError(
                f"volume {name}: its device {spec.device_path} lies on the volume itself: {name} → {name}; "
                f"correct {_table('volume', spec)} device"
            )
        if spec.mount:
            # A mount below its mount point must be mounted later, and unmounted earlier.
            stands_on.update(dict.fromkeys(places.of_path(_parent(spec.mount))))
            stands_on.pop(name, None)
        must: dict[str, None] = dict.fromkeys(spec.after)
        if spec.header:
            must.update(dict.fromkeys(places.of_path(spec.header)))
        opens_after: dict[str, None] = {}
        for key_path in list(_volume_paths(spec))[1:]:
            opens_after.update(dict.fromkeys(places.of_path(key_path)))
        opens_after.update(must)
        volumes[name] = VolumeNode(
            spec=spec,
            stands_on=tuple(stands_on),
            opens_after=tuple(lower for lower in opens_after if lower not in stands_on),
            keys_in=tuple(
                lower for lower in opens_after if lower not in must and lower not in stands_on
            ),
            device=lies_at,
            absent=_absent(spec, lies_at, observation.storage),
            mapping=mapping.dm_name if mapping else "",
            suspended=mapping.suspended if mapping else False,
            taken_by=taken_by,
            rivals=rivals,
            is_active=mapping is not None
            and (
                name in observation.activated
                or any(device.vg for device in above.get(mapping.name, ()))
            ),
            mounts=_mounts(spec, mounted.get(mapping.number, ()), observation.storage)
            if mapping and mapping.number
            else (),
            uuid=(mapping.luks_uuid if mapping else "")
            or identity.known_uuid(configured, observation),
        )
    _check_cycles(
        {name: node.needs for name, node in volumes.items()},
        "volume",
        lambda upper, lower: _why(places, volumes[upper], lower),
    )

    lies_on: dict[str, tuple[str, ...]] = {}
    pools = {}
    for name, pool in observation.virtualisation.pools.items():
        for path in _pool_paths(pool):
            if path == pool.path:
                lies_on[path] = places.of_directory(path)
            elif path == f"/dev/{pool.vg}":
                lies_on[path] = places.of_group(pool.vg)
            else:
                lies_on[path] = places.of_path(path)
        found = dict.fromkeys(volume for path in _pool_paths(pool) for volume in lies_on[path])
        pools[name] = PoolNode(pool, tuple(found))

    guests = {}
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
                if target := pools[source.pool].pool.path_of(source.volume):
                    lies_on[target] = places.of_path(target)
                    needs.update(dict.fromkeys(lies_on[target]))
        needs.update(dict.fromkeys(settings.guest(name).needs))
        disks = tuple(_disks(domain, observation)) if domain else ()
        guests[name] = GuestNode(settings.guest(name), domain, tuple(needs), tuple(used), disks)
    _check_cycles(
        {name: node.spec.after for name, node in guests.items()},
        "guest",
        lambda upper, lower: f"{_table('guest', guests[upper].spec)} after",
    )

    return Graph(
        volumes=volumes,
        pools=pools,
        guests=guests,
        standing_on=_backwards({name: node.stands_on for name, node in volumes.items()}),
        opened_after=_backwards({name: node.opens_after for name, node in volumes.items()}),
        pools_on=_backwards({name: node.needs for name, node in pools.items()}),
        guests_on=_backwards({name: node.needs for name, node in guests.items()}),
        guests_in=_backwards({name: node.pools for name, node in guests.items()}),
        lies_on=lies_on,
        carriers=_carriers(volumes, observation.storage),
        writers=_backwards(
            {
                name: [disk.identity for disk in node.disks if not disk.is_shareable]
                for name, node in guests.items()
            }
        ),
        libvirt_reachable=observation.virtualisation.reachable,
        libvirt_error=observation.virtualisation.error,
    )


def _disks(domain: Domain, observation: Observation) -> Iterator[GuestDisk]:
    storage = observation.storage
    for source in domain.sources:
        if source.writable:
            path = observation.virtualisation.path_of(source)
            if identity := storage.links.get(path) or storage.real.get(path, path):
                yield GuestDisk(path, identity, source.shareable)


def _carriers(volumes: Mapping[str, VolumeNode], storage: Storage) -> dict[str, str]:
    """Device → the volume it carries; for a volume's own device that volume, not one above it."""
    found = {
        place: name
        for name, node in volumes.items()
        for place in (node.device, *node.rivals)
        if place
    }
    left = list(found)
    for place in left:
        device = storage.devices.get(place)
        for lower in (*device.below, device.backing_file) if device else ():
            lower = storage.links.get(lower) or storage.real.get(lower, lower)
            if lower and lower not in found:
                found[lower] = found[place]
                left.append(lower)
    return found


def _mounts(spec: VolumeSpec, targets: Iterable[str], storage: Storage) -> tuple[str, ...]:
    """The mount points, in their configured form if symbolic links lead there: the kernel shows the real path."""
    real = storage.real.get(spec.mount or "")
    found = (spec.mount if spec.mount and target == real else target for target in targets)
    return tuple(sorted(found, key=len))


def _absent(spec: VolumeSpec, device: str, storage: Storage) -> str:
    if not device:
        return spec.device_path
    return spec.header if spec.header and not storage.has(spec.header) else ""


def _backwards(edges: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for name, others in edges.items():
        for other in others:
            found.setdefault(other, []).append(name)
    return {name: tuple(others) for name, others in found.items()}


def _table(kind: str, spec: VolumeSpec | GuestSpec) -> str:
    """A table, with file and line if known."""
    return f"{spec.origin}: [{kind}.{spec.name}]" if spec.origin else f"[{kind}.{spec.name}]"


def _why(places: _Places, node: VolumeNode, lower: str) -> str:
    """The key of a volume's table that makes it need another volume."""
    spec, key = node.spec, "mount"
    if lower in spec.after:
        key = "after"
    elif lower in node.keys_in:
        key = "keys"
    elif lower in places.of_path(spec.device_path):
        key = "device"
    elif spec.header and lower in places.of_path(spec.header):
        key = "header"
    return f"{_table('volume', spec)} {key}"


def _check_cycles(
    edges: Mapping[str, Iterable[str]], what: str, reason: Callable[[str, str], str]
) -> None:
    """Raises GraphError for a cycle; `reason` returns the source of a dependency."""
    try:
        graphlib.TopologicalSorter({n: lower for n, lower in edges.items() if lower}).prepare()
    except graphlib.CycleError as error:
        # CycleError.args[1] lists each node before the one that needs it.
        circle = list(reversed(error.args[1]))
        places = ", ".join(dict.fromkeys(reason(*pair) for pair in itertools.pairwise(circle)))
        raise GraphError(
            f"the {what}s need each other in a circle: {' → '.join(circle)}; "
            f"take it apart in one of these: {places}"
        ) from None
