# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest in 512 bytes: packaging/image/guest.S, its counters and its libvirt domain."""

import enum
import functools
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).resolve().parents[2] / "packaging/image/guest.S"
SECTOR = 512
# Boot sector and counters; libvirt and QEMU want nothing rounder.
DISK_SIZE = 1 << 20


class Variant(enum.Enum):
    POLITE = None
    DEAF = "DEAF"
    ONCE = "ONCE"


@functools.cache
def boot_sector(variant: Variant = Variant.POLITE) -> bytes:
    symbols = ["--defsym", f"{variant.value}=1"] if variant.value else []
    with tempfile.TemporaryDirectory() as name:
        object_file, binary = Path(name, "guest.o"), Path(name, "guest.bin")
        subprocess.run(["as", *symbols, "-o", object_file, SOURCE], check=True)
        subprocess.run(
            ["ld", "-Ttext=0x7c00", "--oformat=binary", "-o", binary, object_file], check=True
        )
        return binary.read_bytes()


def disk_image(variant: Variant = Variant.POLITE) -> bytes:
    """The start of a disk that boots the guest and has never been booted."""
    return boot_sector(variant) + bytes(2 * SECTOR)


@dataclass(frozen=True)
class Counters:
    starts: int
    clean_stops: int


def counters(disk: bytes) -> Counters:
    """The counters in the first three sectors of a guest's disk."""
    starts, clean_stops = (struct.unpack_from("<I", disk, n * SECTOR)[0] for n in (1, 2))
    return Counters(starts, clean_stops)


def read_counters(disk: Path) -> Counters:
    with disk.open("rb") as file:
        return counters(file.read(3 * SECTOR))


def domain_xml(name: str, *disks: str, kind: Literal["block", "raw", "qcow2"] = "block") -> str:
    """A domain that boots the first of these disks: block devices, or files in a format."""
    source, file_type, file_format = {
        "block": ("dev", "block", "raw"),
        "raw": ("file", "file", "raw"),
        "qcow2": ("file", "file", "qcow2"),
    }[kind]
    elements = "".join(
        f"""
    <disk type='{file_type}' device='disk'>
      <driver name='qemu' type='{file_format}'/>
      <source {source}='{disk}'/>
      <target dev='vd{letter}' bus='virtio'/>
    </disk>"""
        for letter, disk in zip("abcdefgh", disks, strict=False)
    )
    return f"""<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>{elements}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
