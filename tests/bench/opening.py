# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opening and closing volumes by the daemon, by systemd-cryptsetup, and by cryptsetup alone."""

import hashlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.machine import (
    BENCH,
    CONFIG,
    KEY,
    KEYSTORE,
    Daemon,
    Samples,
    activate,
    available_mib,
    children_cpu_s,
    cpu_s,
    device,
    expect_mapped,
    quiet,
    seconds,
    sh,
)

PASSPHRASE = "benchmark-8-volumes"
KEYSTORE_KEY = BENCH / "random"
MOUNT = "/run/vmcryptd-keystore/keystore"
# What a person's passphrase gets (64 MiB, four passes: cryptsetup's two seconds on an emulated
# machine), the same with as many lanes as cores, and what a key of full entropy needs.
SLOW_MIB = 64
ARGON2ID = f"--pbkdf argon2id --pbkdf-memory {SLOW_MIB * 1024} --pbkdf-force-iterations 4"
SLOW = f"{ARGON2ID} --pbkdf-parallel 1"
LANES = f"{ARGON2ID} --pbkdf-parallel {os.cpu_count()}"
FAST = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
# A header's two copies and its key slots: what `lay` has to copy.
HEADER_MIB = 1
OPEN_KEYSTORE = f"cryptsetup open --disable-external-tokens --key-file {KEY} {KEYSTORE} keystore"
MOUNT_KEYSTORE = f"mount /dev/mapper/keystore {MOUNT}"


@dataclass(frozen=True)
class Kind:
    """Volumes that are opened in one way; NAME stands for the mapping's name."""

    name: str
    keys: str  # the daemon's, as the configuration has them
    crypttab: str  # the peer's key and options; empty: it is not measured
    alone: str  # the options of `cryptsetup open`
    has_keystore: bool = False

    def mapping(self, number: int) -> str:
        return f"{self.name}{number}"


def _by_passphrase(name: str) -> Kind:
    alone = f"--disable-external-tokens --key-file={KEY}"
    return Kind(name, keys='["prompt"]', crypttab=f"{KEY} luks,noauto", alone=alone)


KINDS = (
    _by_passphrase("slow"),
    _by_passphrase("lanes"),
    # What "slow" opens by the passphrase has one more key slot each, for a key in the keystore.
    Kind(
        "kept",
        keys=f'["file:{MOUNT}/NAME.key", "prompt"]',
        crypttab="",
        alone=f"--disable-external-tokens --key-slot=1 --key-file={MOUNT}/NAME.key",
        has_keystore=True,
    ),
    Kind("tpm", keys='["tpm2"]', crypttab="- luks,noauto,tpm2-device=auto", alone="--token-only"),
    _by_passphrase("fast"),
)
KIND = {kind.name: kind for kind in KINDS}
SLOW_KINDS = ("slow", "lanes")


# --- preparing ---


def make_headers(largest: int) -> None:
    """One header of each kind is made; the volumes get copies, which cost no key derivation."""
    KEY.write_text(PASSPHRASE)
    KEYSTORE_KEY.write_bytes(os.urandom(64))
    for path in (KEY, KEYSTORE_KEY):
        path.chmod(0o400)
    first = device(0)
    activate([first, KEYSTORE])
    luks_format = f"cryptsetup luksFormat --batch-mode --type luks2 --key-file {KEY}"
    copy = f"dd if={first} bs=1M count={HEADER_MIB} status=none of={BENCH}/header-"
    sh(f"{luks_format} {FAST} {first} && {copy}fast")
    sh(f"{luks_format} {LANES} {first} && {copy}lanes")
    sh(f"{luks_format} {SLOW} {first} && {copy}slow")
    add = f"cryptsetup luksAddKey --batch-mode --key-file {KEY} {FAST} {first} {KEYSTORE_KEY}"
    sh(f"{add} && {copy}kept")
    _lay("slow", [first])
    sh(f"systemd-cryptenroll --unlock-key-file={KEY} --tpm2-device=auto {first} && {copy}tpm")
    mapping = "/dev/mapper/keystore"
    sh(f"{luks_format} {SLOW} {KEYSTORE}")
    sh(f"{OPEN_KEYSTORE} && mkfs.ext4 -q -m 0 {mapping} && mkdir -p {MOUNT} && {MOUNT_KEYSTORE}")
    for n in range(largest):
        sh(f"install -m 600 {KEYSTORE_KEY} {MOUNT}/{KIND['kept'].mapping(n)}.key")
    _close_keystore()


def prepare(kind: Kind, count: int) -> None:
    """As many volumes of the kind, and both sides configured for them."""
    devices = [device(n) for n in range(count)]
    activate([*devices, *([KEYSTORE] if kind.has_keystore else [])])
    _lay(kind.name, devices)
    configure(kind, count)
    if kind.crypttab:
        _write_crypttab(kind, count)


def _lay(kind: str, devices: list[str]) -> None:
    """Volumes with the header of a kind, each with a UUID of its own."""
    header = (BENCH / f"header-{kind}").read_bytes()
    for path in devices:
        with open(path, "r+b") as file:
            file.write(_renamed(header, str(uuid.uuid4())))
    sh("sync; udevadm settle")


def _renamed(header: bytes, name: str) -> bytes:
    """With another UUID, as `cryptsetup luksUUID` does it, which would take a minute for all.

    The LUKS2 On-Disk Format Specification, "Binary Header": two copies, each with its checksum.
    """
    changed = bytearray(header)
    size = int.from_bytes(header[8:16], "big")
    for start in (0, size):
        changed[start + 168 : start + 208] = name.encode().ljust(40, b"\0")
        changed[start + 448 : start + 512] = bytes(64)
        checksum = hashlib.sha256(changed[start : start + size]).digest()
        changed[start + 448 : start + 480] = checksum
    return bytes(changed)


def configure(kind: Kind, count: int) -> None:
    tables = [
        f'[volume.{kind.mapping(n)}]\ndevice = "{device(n)}"\n'
        f"keys = {kind.keys.replace('NAME', kind.mapping(n))}\n"
        for n in range(count)
    ]
    if kind.has_keystore:
        tables.append(
            f'[volume.keystore]\ndevice = "{KEYSTORE}"\nkeys = ["prompt"]\n'
            f'content = "filesystem"\nmount = "{MOUNT}"\nlock = "boot"\n'
        )
    CONFIG.write_text("\n".join(tables))


def _write_crypttab(kind: Kind, count: int) -> None:
    """The peer's own way at boot, at its best: all units at once, the key from a file in memory.

    With a passphrase each unit asks, or finds the answer of another in the keyring, and goes on
    only then; a key file saves all of that and derives the same keys. `noauto` because it is not
    the boot that is measured.
    """
    lines = [f"{kind.name}peer{n} {device(n)} {kind.crypttab}\n" for n in range(count)]
    Path("/etc/crypttab").write_text("".join(lines))
    sh("systemctl daemon-reload")


def _close_keystore() -> None:
    sh(f"umount {MOUNT}; udevadm settle; cryptsetup close keystore")


# --- measuring ---


def ours(daemon: Daemon, kind: Kind, count: int, out: Samples) -> None:
    daemon.start()
    pid = daemon.pid
    before, before_children = cpu_s(pid), children_cpu_s(pid)
    by_passphrase = '"prompt"' in kind.keys
    opened_s = daemon.unlock_all() if by_passphrase else daemon.call("UnlockAll")
    after, after_children = cpu_s(pid), children_cpu_s(pid)
    expect_mapped(kind.name, count)
    quiet()
    expect_mapped("keystore", 0)  # open only as long as needed
    closed_s = daemon.call("LockAll")
    expect_mapped(kind.name, 0)
    quiet()
    out["open"].append(opened_s)
    out["close"].append(closed_s)
    if count > 1 and kind.keys == '["prompt"]':
        one_before = cpu_s(pid)
        daemon.unlock(kind.mapping(0))
        one = cpu_s(pid) - one_before
        quiet()
        daemon.call("LockAll")
        out["cpu"].append((after - before - one) / (count - 1))
        out["child_cpu"].append((after_children - before_children) / count)
    daemon.stop()


def peer(kind: Kind, count: int, out: Samples) -> None:
    # The daemon is stopped meanwhile: where systemd opens volumes no other program watches it.
    units = " ".join(f"systemd-cryptsetup@{kind.name}peer{n}.service" for n in range(count))
    out["peer_open"].append(seconds(f"exec systemctl start {units}"))
    expect_mapped(kind.name, count)
    quiet()
    out["peer_close"].append(seconds(f"exec systemctl stop {units}"))
    expect_mapped(kind.name, 0)
    quiet()


def floor(kind: Kind, count: int, out: Samples) -> None:
    """cryptsetup alone, all at once, as far as half of the memory is enough for the derivations.

    Under our names, so that the udev rule holds for it as well.
    """
    names = [kind.mapping(n) for n in range(count)]
    arguments = [
        f"{kind.alone.replace('NAME', name)} {device(n)} {name}" for n, name in enumerate(names)
    ]
    words = len(arguments[0].split())
    listed = BENCH / "arguments"
    listed.write_text("\n".join(arguments))
    at_once = count if kind.name not in SLOW_KINDS else min(count, available_mib() // 2 // SLOW_MIB)
    opening = f"xargs -a {listed} -P {at_once} -n {words} cryptsetup open --type luks"
    before = f"{OPEN_KEYSTORE} && {MOUNT_KEYSTORE} && " if kind.has_keystore else ""
    out["floor_open"].append(seconds(f"{before}exec {opening}"))
    expect_mapped(kind.name, count)
    if kind.has_keystore:
        _close_keystore()
    quiet()
    closing = f"printf '%s\\n' {' '.join(names)} | xargs -P {count} -n 1 cryptsetup close"
    out["floor_close"].append(seconds(closing))
    expect_mapped(kind.name, 0)
    quiet()


def measure(daemon: Daemon, kind: Kind, count: int, rounds: int) -> Samples:
    """All sides in turn. Empty samples are of what is not measured of this kind."""
    out: Samples = {
        f"{who}{what}": [] for who in ("", "peer_", "floor_") for what in ("open", "close")
    }
    out |= {"cpu": [], "child_cpu": []}
    prepare(kind, count)
    sides: list[Callable[[], None]] = [lambda: ours(daemon, kind, count, out)]
    if kind.crypttab:
        sides.append(lambda: peer(kind, count, out))
    sides.append(lambda: floor(kind, count, out))
    for number in range(rounds):
        shift = number % len(sides)
        for side in sides[shift:] + sides[:shift]:
            side()
    return out
