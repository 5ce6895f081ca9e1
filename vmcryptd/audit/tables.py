# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds entries of fstab(5) and crypttab(5) by which systemd opens or mounts our volumes at boot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from vmcryptd.core.graph import Graph, VolumeNode
from vmcryptd.core.model import BlockDevice, Content, Storage, VolumeSpec
from vmcryptd.core.text import octal_unescaped

FSTAB, CRYPTTAB = "/etc/fstab", "/etc/crypttab"
BEFORE = "x-systemd.before=vmcryptd-guests.service"
# Debian's option and systemd's: the initramfs opens the volume, regardless of the other options.
_INITRAMFS = {"initramfs", "x-initrd.attach"}


class Entry(NamedTuple):
    """One line of such a table."""

    file: str
    line: int
    fields: tuple[str, ...]  # as written
    what: str  # fstab: the device or folder; crypttab: the device. Without escapes and quotes
    where: str  # fstab: the mount point; crypttab: the name of the mapping
    options: frozenset[str]

    @property
    def place(self) -> str:
        return f"line {self.line} of {self.file}"

    def with_options(self, *more: str) -> str:
        """The line with these options added, and without their opposites."""
        unwanted = {"auto", "defaults", "none", "-", *more}
        kept = [one for one in self._options_field.split(",") if one and one not in unwanted]
        fields = [*self.fields, *("none" for _ in range(3 - len(self.fields)))]
        fields[3:4] = [",".join((*kept, *more))]
        return " ".join(fields)

    @property
    def _options_field(self) -> str:
        return self.fields[3] if len(self.fields) > 3 else ""


class Fault(NamedTuple):
    """The harm that an entry does to a volume, and the line to write instead."""

    volume: str
    is_error: bool
    text: str
    advice: str


def entries(file: str, lines: Iterable[str]) -> tuple[Entry, ...]:
    found = []
    for number, line in enumerate(lines, 1):
        fields = tuple(line.split())
        if len(fields) < 2 or fields[0].startswith("#"):
            continue
        plain = [octal_unescaped(field) for field in fields]
        options = frozenset(plain[3].split(",")) if len(plain) > 3 else frozenset()
        what, where = plain[:2] if file == FSTAB else plain[1::-1]
        found.append(Entry(file, number, fields, what.replace('"', ""), where, options))
    return tuple(found)


def paths(table: Iterable[Entry]) -> Iterator[str]:
    """The devices of the entries, to be looked up."""
    for entry in table:
        yield device_path(entry.what)


def device_path(what: str) -> str:
    return VolumeSpec("", what).device_path


def faults(table: Iterable[Entry], graph: Graph, storage: Storage) -> Iterator[Fault]:
    """Every entry that harms a volume. `storage` has looked up the `paths`."""
    for entry in table:
        if entry.file == CRYPTTAB:
            yield from _crypttab(entry, graph.volumes, storage)
        else:
            yield from _fstab(entry, graph.volumes, storage)


def _crypttab(entry: Entry, volumes: Mapping[str, VolumeNode], storage: Storage) -> Iterator[Fault]:
    if "noauto" in entry.options and not entry.options & _INITRAMFS:
        return
    path = device_path(entry.what)
    device = storage.links.get(path)
    for name, node in volumes.items():
        is_same = path == node.spec.device_path or bool(device and device == node.device)
        if is_same:
            text = f"{entry.place} has systemd open it at boot, too: its key is asked for twice"
            if "nofail" not in entry.options:
                text += ", and boot waits for that answer"
        elif entry.where == name:
            text = f"{entry.place} opens {entry.what} at boot under the name of this volume"
        else:
            continue
        if entry.options & _INITRAMFS:
            advice = "take that line out, then run `update-initramfs -u` or `dracut -f`"
        else:
            advice = f"take that line out, or write: {entry.with_options('noauto')}"
        yield Fault(name, True, text, advice)


def _fstab(entry: Entry, volumes: Mapping[str, VolumeNode], storage: Storage) -> Iterator[Fault]:
    node = _volume_of(entry, volumes, storage)
    if node is None:
        return
    spec = node.spec
    mounts = "swaps on it" if entry.fields[2:3] == ("swap",) else f"mounts {entry.what}"
    is_its_mount = spec.mount is not None and entry.where.rstrip("/") == spec.mount
    advice = "take that line out"
    if is_its_mount:
        advice += ": vmcryptd mounts it"
    if spec.content is not Content.GUEST:
        advice += f"; or write: {entry.with_options('noauto', BEFORE)}"
    if "noauto" in entry.options:
        if spec.content is not Content.GUEST and BEFORE not in entry.options:
            text = (
                f"{entry.place} lacks {BEFORE}: at shutdown it is unmounted while guests still run"
            )
            yield Fault(spec.name, False, text, advice)
        return
    if spec.content is Content.GUEST:
        text = f"{entry.place} has the host itself use the guest's disk ({entry.what}), which destroys it"
    elif "nofail" not in entry.options:
        text = (
            f"{entry.place} {mounts} at boot, before it is open: after 90 seconds boot fails, "
            "into the emergency shell"
        )
    elif BEFORE in entry.options:
        text = f"{entry.place} {mounts} at boot, before it is open: vmcryptd waits for that, and boot for both"
    else:
        text = f"{entry.place} lacks {BEFORE}: at shutdown it is unmounted while guests still run"
        yield Fault(spec.name, False, text, advice)
        return
    yield Fault(spec.name, True, text, advice)


def _volume_of(
    entry: Entry, volumes: Mapping[str, VolumeNode], storage: Storage
) -> VolumeNode | None:
    """The volume that has to be open before this can be mounted; the uppermost of several layers."""
    path, target = device_path(entry.what), entry.where.rstrip("/")
    mapped = {node.mapping: node for node in volumes.values() if node.mapping}
    for device in _stack(storage.links.get(path, ""), storage.devices):
        if node := mapped.get(device.dm_name):
            return node
    for node in volumes.values():
        spec = node.spec
        if path in (spec.mapper_path, spec.device_path):
            return node
        if node.device and storage.links.get(path) == node.device:
            return node
        group = spec.vg and spec.vg.replace("-", "--")
        if group and path.startswith((f"/dev/{spec.vg}/", f"/dev/mapper/{group}-")):
            return node
        if spec.mount and (target == spec.mount or f"{path}/".startswith(f"{spec.mount}/")):
            return node
    return None


def _stack(name: str, devices: Mapping[str, BlockDevice]) -> Iterator[BlockDevice]:
    """A device and the devices below it, topmost first."""
    seen: set[str] = set()
    left = [name]
    while left:
        name = left.pop(0)
        if name not in seen and name in devices:
            seen.add(name)
            yield devices[name]
            left += devices[name].below
