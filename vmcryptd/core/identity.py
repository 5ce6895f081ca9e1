# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the device and the mapping of each volume. Pure.

A path can lead to another disk than before: udev's links lead to the disk probed last, and kernel names follow the
order of discovery. An open volume is identified by its mapping, the devices below that and its UUID, not by links.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from vmcryptd.core.errors import WrongUuidError
from vmcryptd.core.model import BlockDevice, Observation, Settings, Storage, VolumeSpec

_PIECE = "CRYPT-SUBDEV-"  # cryptsetup's mappings beneath a volume during a rotation
_OWN = ("CRYPT-INTEGRITY-", _PIECE)  # mappings between a volume's mapping and its device


class Identity(NamedTuple):
    """A volume's device on this host now."""

    spec: VolumeSpec  # with the real device, if the configured path leads elsewhere
    device: str = ""  # kernel name of its device, or its path if that is a file; empty if none
    mapping: BlockDevice | None = None
    taken_by: str = ""  # the other device that has its mapping name
    rivals: tuple[str, ...] = ()  # kernel names of several possible devices


def known_uuid(spec: VolumeSpec, observation: Observation) -> str:
    """The UUID of the volume's header: the configured one, else as read, else as last seen. Empty if unknown."""
    return (
        spec.known_uuid
        or observation.uuids.get(spec.name)
        or observation.remembered.uuids.get(spec.name, "")
    )


def owners(settings: Settings, observation: Observation) -> dict[str, list[str]]:
    """Header UUID → the configured volumes that are known to have it."""
    found: dict[str, list[str]] = {}
    for name, spec in settings.volumes.items():
        if uuid := known_uuid(spec, observation):
            found.setdefault(uuid, []).append(name)
    return found


def find(settings: Settings, observation: Observation) -> dict[str, Identity]:
    """The identity of every configured volume."""
    storage = observation.storage
    search = _Search(settings, observation)
    places = {name: _device(spec, storage) for name, spec in settings.volumes.items()}
    found: dict[str, Identity] = {}
    # First by path, then by name or UUID alone.
    for name, spec in settings.volumes.items():
        if mapping := search.by_device(spec, places[name]):
            is_there = search.is_made_of(mapping, places[name])
            found[name] = (
                Identity(spec, places[name], mapping)
                if is_there
                else _moved(spec, places[name], mapping, storage)
            )
    for name, spec in settings.volumes.items():
        if name in found:
            continue
        if mapping := search.by_uuid(spec, is_away=not places[name]):
            found[name] = _moved(spec, places[name], mapping, storage)
        else:
            found[name] = _locked(spec, places[name], search.taken_by(name), storage)
    return {name: found[name] for name in settings.volumes}


def check_header(spec: VolumeSpec, uuid: str, settings: Settings, observation: Observation) -> None:
    """Check whether a header may be the volume's. Raises WrongUuidError.

    The old name of a renamed volume may be known for the same header: it is not another volume's.
    """
    if wanted := spec.known_uuid:
        if uuid != wanted:
            raise WrongUuidError(
                f"volume {spec.name}: the LUKS header on {spec.device} has the UUID {uuid}, the configuration says "
                f"{wanted}; is it the right device? If so, correct `uuid`"
            )
        return
    known, remembered = known_uuid(spec, observation), observation.remembered.uuids
    if uuid == known:
        return
    others = [*owners(settings, observation).get(uuid, ())]
    if known:
        others += [name for name, seen in remembered.items() if seen == uuid and name not in others]
    if others:
        raise WrongUuidError(
            f"volume {spec.name}: the LUKS header on {spec.device} was last seen as volume {others[0]} (UUID {uuid}); "
            f"have the disks changed places? Name them by `UUID=` in `device`; if it is the right one, add "
            f'uuid = "{uuid}" to [volume.{spec.name}]'
        )


def _moved(spec: VolumeSpec, place: str, mapping: BlockDevice, storage: Storage) -> Identity:
    """Whether it is open on another device than its path leads to."""
    below = [
        name
        for name in _data_devices(mapping, storage.devices)
        if name in storage.devices and not storage.devices[name].dm_uuid.startswith(_OWN)
    ]
    if not below:
        return Identity(spec, place, mapping)
    return Identity(replace(spec, device=f"/dev/{below[0]}"), below[0], mapping)


def _locked(spec: VolumeSpec, place: str, taken_by: str, storage: Storage) -> Identity:
    candidates = _topmost(storage.claims.get(spec.device_path, ()), storage.devices)
    if len(candidates) > 1:
        return Identity(spec, taken_by=taken_by, rivals=candidates)
    if candidates and candidates[0] != place:
        # The link leads to a member of its device: a path of a multipath device, a disk of a mirror.
        return Identity(
            replace(spec, device=f"/dev/{candidates[0]}"), candidates[0], None, taken_by
        )
    return Identity(spec, place, None, taken_by)


def _topmost(names: Iterable[str], devices: Mapping[str, BlockDevice]) -> tuple[str, ...]:
    """The devices that are no members of another: a mirror's disk and a multipath device's path look like the whole."""
    present = [name for name in names if name in devices]
    parts: set[str] = set()
    for name in present:
        beneath = _beneath(name, devices)
        held = {lower for upper in (name, *beneath) for lower in _members(upper, devices)}
        parts |= beneath
        parts.update(other for other in present if _whole_disk(other, devices) in held)
    return tuple(sorted(name for name in present if name not in parts))


def _beneath(name: str, devices: Mapping[str, BlockDevice]) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        device = devices.get(todo.pop())
        fresh = set(device.below) - found if device else set()
        found |= fresh
        todo += fresh
    return found - {name}


def _members(name: str, devices: Mapping[str, BlockDevice]) -> tuple[str, ...]:
    """The devices below a device; none for a partition, because its disk has others."""
    if name not in devices or _whole_disk(name, devices):
        return ()
    return devices[name].below


def _whole_disk(name: str, devices: Mapping[str, BlockDevice]) -> str:
    """The disk of a partition that the kernel made, else an empty string."""
    below = devices[name].below
    is_partition = len(below) == 1 and name != below[0] and name.startswith(below[0])
    return below[0] if is_partition else ""


def _device(spec: VolumeSpec, storage: Storage) -> str:
    path = spec.device_path
    if path in storage.files:
        return storage.real.get(path, path)
    return storage.links.get(path, "")


class _Search:
    """Finds the open mapping of each volume; each mapping belongs to one volume at most."""

    def __init__(self, settings: Settings, observation: Observation) -> None:
        self._observation = observation
        self._owners = owners(settings, observation)
        self._adopted: set[str] = set()
        self._by_name: dict[str, BlockDevice] = {}
        self._by_uuid: dict[str, list[BlockDevice]] = {}
        self._by_lower: dict[str, list[BlockDevice]] = {}
        self._torn: dict[str, list[BlockDevice]] = {}  # without a device, left by a killed rotation
        # File → loop devices on it, which cryptsetup makes.
        self._loops: dict[str, list[str]] = {}
        devices = observation.storage.devices
        for device in devices.values():
            if device.backing_file:
                self._loops.setdefault(device.backing_file, []).append(device.name)
            if device.dm_name:
                self._by_name[device.dm_name] = device
            if uuid := device.luks_uuid:
                self._by_uuid.setdefault(uuid, []).append(device)
                lowers = list(_data_devices(device, devices))
                for lower in lowers:
                    self._by_lower.setdefault(lower, []).append(device)
                if all(lower in devices and _is_torn(devices[lower]) for lower in lowers):
                    self._torn.setdefault(uuid, []).append(device)

    def by_device(self, spec: VolumeSpec, place: str) -> BlockDevice | None:
        """A mapping on the volume's device, with any name.

        UUIDs alone would confuse a volume with its snapshot or clone. A different UUID excludes a mapping: a kernel
        name may lead to another volume's disk.
        """
        if not place:
            return None
        named = self._by_name.get(spec.name)
        if spec.has_tag and named is not None and self._is_known(spec, named):
            return self._adopt([named], spec)  # an open copy may have taken over the link
        found = self._made_of(place)
        found += self._torn.get(known_uuid(spec, self._observation), ())
        return self._adopt([one for one in found if self._may_be(spec, one)], spec)

    def is_made_of(self, mapping: BlockDevice, place: str) -> bool:
        # After a killed rotation it has no device below that could identify it.
        return mapping in self._made_of(place) or mapping in self._torn.get(mapping.luks_uuid, ())

    def _made_of(self, place: str) -> list[BlockDevice]:
        lowers = self._loops.get(place, []) if place.startswith("/") else [place]
        return [mapping for lower in lowers for mapping in self._by_lower.get(lower, ())]

    def by_uuid(self, spec: VolumeSpec, *, is_away: bool) -> BlockDevice | None:
        """A mapping by its UUID, for a path that leads nowhere, or to another disk by now."""
        uuid, named = known_uuid(spec, self._observation), self._by_name.get(spec.name)
        found = [] if named is None or not self._is_known(spec, named) else [named]
        if is_away or spec.has_tag:
            found += self._by_uuid.get(uuid, []) if uuid else []
        if is_away and not uuid and named is not None and named.luks_uuid:
            found = [named]  # nothing contradicts it
        return self._adopt(found, spec)

    def taken_by(self, name: str) -> str:
        named = self._by_name.get(name)
        return (named.dm_uuid or named.name) if named else ""

    def _adopt(self, candidates: list[BlockDevice], spec: VolumeSpec) -> BlockDevice | None:
        free = [device for device in candidates if device.name not in self._adopted]
        if not free:
            return None
        chosen = next((device for device in free if device.dm_name == spec.name), free[0])
        self._adopted.add(chosen.name)
        return chosen

    def _is_known(self, spec: VolumeSpec, mapping: BlockDevice) -> bool:
        uuid = known_uuid(spec, self._observation)
        return bool(uuid) and mapping.luks_uuid == uuid

    def _may_be(self, spec: VolumeSpec, mapping: BlockDevice) -> bool:
        uuid = known_uuid(spec, self._observation)
        if spec.uuid or not uuid or mapping.luks_uuid == uuid:
            return not spec.uuid or mapping.luks_uuid == spec.uuid
        return not self._owners.get(mapping.luks_uuid)


def _data_devices(mapping: BlockDevice, devices: Mapping[str, BlockDevice]) -> Iterator[str]:
    """The devices below a LUKS mapping, without cryptsetup's own mappings for integrity or reencryption."""
    for name in mapping.below:
        yield name
        lower = devices.get(name)
        if lower is not None and lower.dm_uuid.startswith(_OWN):
            yield from _data_devices(lower, devices)


def _is_torn(device: BlockDevice) -> bool:
    return device.dm_uuid.startswith(_PIECE) and not device.below
