# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's domain and pool XML → values of the model. Pure: no libvirt, no I/O.

Formats: https://libvirt.org/formatdomain.html, https://libvirt.org/formatstorage.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple
from xml.etree import ElementTree

from vmcryptd.adapters.libvirt import names
from vmcryptd.core.model import DiskSource, SourceType

AGENT_CHANNEL = "org.qemu.guest_agent.0"

# Every other element that names a host path counts, so that nothing that libvirt adds is missed. These
# elements do not: they hold no path, or one inside the guest. <loader> is left out because firmware
# comes with the host's packages; <mirror> because a guest does not need a copy in progress.
NO_PATHS = {
    *("name", "title", "description", "metadata", "seclabel", "resource", "cpu", "genid", "uuid"),
    *("cmdline", "init", "initarg", "initdir", "initenv", "loader", "mirror", "alias"),
}
# The kernel makes these files; nothing is stored there.
KERNEL = ("/dev/pts/", "/proc/", "/sys/")
ARGUMENTS = ("arg", "env")  # of <qemu:commandline> and its relatives
# The default place of an emulated TPM's state.
TPM_STATE = "/var/lib/libvirt/swtpm"


class Contents(NamedTuple):
    """The content of one or more descriptions of the same domain.

    `formats` holds the image format that the description names for a source. libvirt takes a source
    without one for raw, and so must we: a guest can write a qcow2 header, with a backing file of
    its choice, onto its raw disk (CVE-2024-32498 is the same mistake elsewhere).
    """

    sources: tuple[DiskSource, ...] = ()
    formats: Mapping[DiskSource, str] = MappingProxyType({})
    agent_connected: bool = False


class PoolPlace(NamedTuple):
    """Where a storage pool lies on this host; all empty for pools that come over the network."""

    path: str = ""
    devices: tuple[str, ...] = ()
    vg: str = ""


def domain(*texts: str) -> Contents:
    """The inactive and the live description of a domain, merged: first mention first.

    A source other than a disk is shareable: a log or a socket may serve several guests.
    """
    merged: dict[tuple[str, ...], tuple[DiskSource, str]] = {}
    agent = False
    for text in texts:
        root = ElementTree.fromstring(text)
        agent = agent or _agent_connected(root)
        for source, image_format in _domain_sources(root):
            key = (source.path, source.pool, source.volume)
            known, known_format = merged.get(key, (source, image_format))
            merged[key] = (
                known._replace(
                    writable=known.writable or source.writable,
                    shareable=known.shareable and source.shareable,
                ),
                known_format or image_format,
            )
    return Contents(
        sources=tuple(source for source, _ in merged.values()),
        formats={source: name for source, name in merged.values() if name},
        agent_connected=agent,
    )


def pool(text: str) -> PoolPlace:
    root = ElementTree.fromstring(text)
    kind = root.get("type", "")
    devices = tuple(
        path for device in root.findall("source/device") if (path := device.get("path", ""))
    )
    match kind:
        case "dir":
            return PoolPlace(path=_text(root, "target/path"))
        case "fs":
            return PoolPlace(path=_text(root, "target/path"), devices=devices)
        case "logical":
            # <source><name> may be absent: the group is then named like the pool
            # (libvirt, src/conf/storage_conf.c, VIR_STORAGE_POOL_SOURCE_NAME default).
            name = _text(root, "source/name") or _text(root, "name")
            return PoolPlace(devices=devices, vg=name)
        case "disk" | "zfs":
            return PoolPlace(devices=devices)
    return PoolPlace()


def _domain_sources(root: ElementTree.Element) -> Iterator[tuple[DiskSource, str]]:
    found = list(_storage(root))
    yield from found
    known = {source.path for source, _ in found}
    for path in _named_paths(root):
        if path not in known:
            known.add(path)
            yield DiskSource(SourceType.FILE, path=path, shareable=True), ""


def _storage(root: ElementTree.Element) -> Iterator[tuple[DiskSource, str]]:
    """The places of the guest's data, each with its format where one is named."""
    for disk in root.iterfind("devices/disk"):
        yield from _disk(disk)
    for filesystem in root.iterfind("devices/filesystem"):
        writable = filesystem.find("readonly") is None
        # Shareable: unlike a disk, a directory is meant to be used by several guests.
        for source in _located(filesystem.find("source"), writable=writable, shareable=True):
            yield source, ""
    for nvram in root.iterfind("os/nvram"):
        for source in _located(nvram.find("source")):
            yield source, nvram.get("format", "")
        if path := (nvram.text or "").strip():
            yield _by_path(path), nvram.get("format", "")
    for backend in root.iterfind("devices/tpm/backend[@type='emulator']"):
        place = backend.find("source")  # since libvirt 10.9
        uuid = _text(root, "uuid")
        path = f"{TPM_STATE}/{uuid}" if uuid else ""
        if path := path if place is None else place.get("path", ""):
            yield DiskSource(SourceType.FILE, path=path), ""


def _named_paths(root: ElementTree.Element) -> Iterator[str]:
    """Every host path that the description names, those of disks included."""
    left = [(root, "")]
    while left:
        element, within = left.pop()
        tag = element.tag.rpartition("}")[2]
        # A target is in the guest: an LXC guest's mount point, a device's name. A lease's is not.
        if tag in NO_PATHS or (tag == "target" and within != "lease"):
            continue
        texts = list(element.attrib.values())
        if tag != "entry":  # its text may be content: of an SMBIOS table, say
            texts.append((element.text or "").strip())
        in_text = names.paths_in_option if tag in ARGUMENTS else names.paths
        for path in (path for text in texts for path in in_text(text)):
            if not path.startswith(KERNEL):
                yield path
        left += [(child, tag) for child in reversed(element)]


def _disk(disk: ElementTree.Element) -> Iterator[tuple[DiskSource, str]]:
    if disk.get("type") == "vhostvdpa":  # <source dev=…> is a character device there
        return
    writable = disk.find("readonly") is None and disk.get("device") != "cdrom"
    shareable = disk.find("shareable") is not None
    driver = disk.find("driver")
    top = disk.find("source")
    for source in _located(top, writable=writable, shareable=shareable):
        yield source, "" if driver is None else driver.get("type", "")
    yield from _data_store(top, writable)
    # <mirror> is left out on purpose: the guest does not need a copy in progress.
    layer = disk.find("backingStore")
    while layer is not None:
        below = layer.find("source")
        image_format = layer.find("format")
        for source in _located(below, writable=False):
            yield source, "" if image_format is None else image_format.get("type", "")
        yield from _data_store(below, False)
        layer = layer.find("backingStore")


def _data_store(
    source: ElementTree.Element | None, writable: bool
) -> Iterator[tuple[DiskSource, str]]:
    """The data file of a qcow2 image that keeps its data elsewhere (since libvirt 10.10)."""
    if source is None:
        return
    for store in source.iterfind("dataStore"):
        for found in _located(store.find("source"), writable=writable):
            yield found, "raw"


def _located(
    source: ElementTree.Element | None, writable: bool = True, shareable: bool = False
) -> Iterator[DiskSource]:
    """The attribute decides, not the surrounding type: each type has its own attributes."""
    if source is None:  # an empty drive
        return
    place: DiskSource | None = None
    if path := source.get("dev", ""):
        place = DiskSource(SourceType.BLOCK, path=path)
    elif path := source.get("file", "") or source.get("dir", ""):
        place = DiskSource(SourceType.FILE, path=path)
    elif (pool_name := source.get("pool", "")) and (volume := source.get("volume", "")):
        place = DiskSource(SourceType.POOL, pool=pool_name, volume=volume)
    if place is not None and (place.pool or place.path.startswith("/")):
        yield place._replace(writable=writable, shareable=shareable)


def _by_path(path: str) -> DiskSource:
    kind = SourceType.BLOCK if path.startswith("/dev/") else SourceType.FILE
    return DiskSource(kind, path=path)


def _agent_connected(root: ElementTree.Element) -> bool:
    return any(
        target.get("name") == AGENT_CHANNEL and target.get("state") == "connected"
        for target in root.iterfind("devices/channel/target")
    )


def _text(root: ElementTree.Element, path: str) -> str:
    return (root.findtext(path) or "").strip()
