# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real cryptsetup on plain files; what needs device-mapper is tested in the virtual machine."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmcryptd.adapters.keysources.sources import SystemKeys
from vmcryptd.adapters.luks import mappings
from vmcryptd.adapters.luks.key_slots import CryptsetupSlots
from vmcryptd.adapters.luks.mappings import Cryptsetup, _slot, open_failure, token_failure
from vmcryptd.core import luks_header, slot_order
from vmcryptd.core.errors import (
    BusyError,
    DamagedHeaderError,
    DeviceMissingError,
    DeviceUnreadableError,
    KeyUnavailableError,
    NotLuksError,
    NotYetError,
    OutOfMemoryError,
    StorageError,
    VmcryptdError,
    WrongKeyError,
    WrongPinError,
)
from vmcryptd.core.model import Header, KeySource, SourceKind, Token, VolumeSpec
from vmcryptd.core.ports import Key
from vmcryptd.posix.run import Completed

pytestmark = pytest.mark.skipif(
    not shutil.which("cryptsetup"), reason="cryptsetup is not installed"
)

UUID = "7e1b6c1e-5a57-4a0e-9a4a-8d2d3c1d0a01"
QUICK = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
ARGON = [
    *("--pbkdf", "argon2id", "--pbkdf-memory", "32768"),
    *("--pbkdf-parallel", "2", "--pbkdf-force-iterations", "4"),
]


def cryptsetup(*arguments: str) -> None:
    subprocess.run(["cryptsetup", "--batch-mode", *arguments], check=True)


def secret(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("luks")
    right = str(secret(place, "right", b"with a newline\n"))
    more = str(secret(place, "more", os.urandom(64)))
    secret(place, "wrong", b"with a newline")
    for name, size in (("two", 20), ("one", 4), ("data", 1), ("detached", 16), ("big", 24)):
        with (place / name).open("wb") as file:
            file.truncate(size << 20)
    luks2 = ["luksFormat", "--type", "luks2", *QUICK, "--uuid", UUID]
    cryptsetup(*luks2, str(place / "two"), right)
    cryptsetup("luksAddKey", *ARGON, "--key-file", right, str(place / "two"), more)
    cryptsetup(
        "luksFormat", "--type", "luks1", *QUICK[2:], "--uuid", UUID, str(place / "one"), right
    )
    cryptsetup(*luks2, "--header", str(place / "detached"), str(place / "data"), right)
    areas = ["--luks2-metadata-size", "1m", "--luks2-keyslots-size", "8m"]
    cryptsetup(*luks2, *areas, str(place / "big"), right)
    return place


def volume(place: Path, name: str) -> VolumeSpec:
    return VolumeSpec("cr_test", str(place / name))


def header(spec: VolumeSpec) -> Header:
    return asyncio.run(Cryptsetup().header(spec))


async def attempt(spec: VolumeSpec, file: Path, slot: int | None = None) -> None:
    """What `open` does, but for the mapping."""
    key: Key = await SystemKeys(credentials=None).fetch(KeySource(SourceKind.FILE, str(file)), spec)
    argv = [
        "cryptsetup",
        "open",
        "--test-passphrase",
        "--type",
        "luks",
        "--batch-mode",
        "--key-file",
        "-",
    ]
    argv += [
        "--disable-external-tokens",
        *_slot(slot),
        *(["--header", spec.header] if spec.header else []),
    ]
    try:
        await Cryptsetup()._with_key([*argv, "--", spec.device_path], key, spec)
    finally:
        key.close()


def test_headers(place: Path) -> None:
    two = header(volume(place, "two"))
    assert (two.version, two.uuid, two.memory_kib) == (2, UUID, 32768)
    assert [(s.kdf, s.threads, s.iterations) for s in two.slots] == [
        ("pbkdf2", 1, 1000),
        ("argon2id", 2, 4),
    ]
    one = header(volume(place, "one"))
    assert (one.version, one.uuid) == (1, UUID)
    assert [slot.kdf for slot in one.slots] == ["pbkdf2"]
    detached = replace(volume(place, "data"), header=str(place / "detached"))
    assert header(detached).uuid == UUID
    assert header(volume(place, "big")).slots == two.slots[:1]


def test_damaged_first_copy(place: Path, tmp_path: Path) -> None:
    data = bytearray((place / "two").read_bytes())
    data[100:4096] = bytes(3996)
    (tmp_path / "two").write_bytes(data)
    assert header(volume(tmp_path, "two")) == header(volume(place, "two"))
    data[0x4000 + 100 : 0x5000] = bytes(0x1000 - 100)
    (tmp_path / "two").write_bytes(data)
    with pytest.raises(DamagedHeaderError, match="luksHeaderRestore"):
        header(volume(tmp_path, "two"))


def test_no_header(place: Path) -> None:
    with pytest.raises(NotLuksError, match="is no LUKS device"):
        header(volume(place, "data"))
    with pytest.raises(DeviceMissingError, match="No such file"):
        header(volume(place, "none"))
    with pytest.raises(DeviceMissingError, match="Is a directory"):
        header(VolumeSpec("cr_test", str(place)))


@pytest.mark.parametrize("name", ["one", "two", "big"])
def test_keys(place: Path, name: str) -> None:
    asyncio.run(attempt(volume(place, name), place / "right"))
    with pytest.raises(
        WrongKeyError, match="volume cr_test: the key fits no key slot; try another"
    ):
        asyncio.run(attempt(volume(place, name), place / "wrong"))


def test_one_slot(place: Path) -> None:
    two = volume(place, "two")
    asyncio.run(attempt(two, place / "right", 0))
    for file, slot in (("right", 1), ("more", 0), ("right", 5)):
        with pytest.raises(WrongKeyError):
            asyncio.run(attempt(two, place / file, slot))
    asyncio.run(attempt(two, place / "more", 1))
    assert len({slot.salt for slot in header(two).slots}) == 2


def test_detached_header(place: Path) -> None:
    spec = replace(volume(place, "data"), header=str(place / "detached"))
    asyncio.run(attempt(spec, place / "right"))
    with pytest.raises(WrongKeyError, match="key list cr_test"):
        asyncio.run(attempt(spec, place / "wrong"))


def test_other_failures(place: Path) -> None:
    with pytest.raises(NotLuksError):
        asyncio.run(attempt(volume(place, "data"), place / "right"))
    with pytest.raises(DeviceMissingError, match="lsblk"):
        asyncio.run(attempt(volume(place, "none"), place / "right"))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (1, StorageError),
        (2, WrongKeyError),
        (3, OutOfMemoryError),
        (-9, OutOfMemoryError),
        (137, OutOfMemoryError),
        (4, DeviceUnreadableError),
        (5, BusyError),
        (-11, StorageError),
    ],
)
def test_exit_statuses(code: int, error: type[VmcryptdError]) -> None:
    found = open_failure(Completed(code, err="Said so.\n"), VolumeSpec("cr_test", "/dev/x"))
    assert type(found) is error
    assert "cr_test" in str(found)
    assert "\n" not in str(found)


TOKENS = {
    "systemd-tpm2": {
        "tpm2-blob": "AAAA", "tpm2-pcrs": [7], "tpm2-pcr-bank": "sha256",
        "tpm2-primary-alg": "ecc", "tpm2-policy-hash": "00", "tpm2-pin": False,
    },
    "systemd-fido2": {
        "fido2-credential": "AAAA", "fido2-salt": "AAAA", "fido2-clientPin-required": True,
    },
    "nobodys": {},
}  # fmt: skip


def test_tokens(place: Path, tmp_path: Path) -> None:
    """Without their devices: what cryptsetup and its plugins say then is understood."""
    shutil.copy(place / "two", tmp_path / "two")
    spec = volume(tmp_path, "two")
    for kind, content in TOKENS.items():
        file = tmp_path / "token.json"
        file.write_text(json.dumps({"type": kind, "keyslots": ["0"], **content}))
        cryptsetup("token", "import", "--json-file", str(file), spec.device)
    tokens = header(spec).tokens
    assert [(t.kind, t.slots, t.needs_pin) for t in tokens] == [
        ("systemd-tpm2", (0,), False),
        ("systemd-fido2", (0,), True),
        ("nobodys", (0,), False),
    ]
    pin = asyncio.run(
        SystemKeys(credentials=None).fetch(KeySource(SourceKind.FILE, str(place / "more")), spec)
    )
    try:
        for token in tokens:
            with pytest.raises(KeyUnavailableError, match=f"{token.number} does not open it: "):
                asyncio.run(by_token(spec, token, pin))
    finally:
        pin.close()
    with pytest.raises(KeyUnavailableError, match="no plugin for nobodys"):
        asyncio.run(by_token(spec, tokens[2], None))


async def by_token(spec: VolumeSpec, token: Token, pin: Key | None) -> None:
    argv = ["cryptsetup", "open", "--batch-mode", "--verbose", "--test-passphrase"]
    argv += ["--token-only", f"--token-id={token.number}", "--", spec.device]
    await Cryptsetup()._with_pin(argv, pin, spec, token)


@pytest.mark.parametrize(
    ("has_pin", "out", "err", "error", "text"),
    [
        (False, "Token 1 requires PIN.\n", "Nothing to read on input.\n", WrongPinError, "wants"),
        (True, "Token 1 requires PIN.\nNo token could be unlocked with this PIN.\n", "",
         WrongPinError, "does not take this PIN"),
        (True, "Token 1 requires PIN.\n",
         "Failed to unseal: tpm:session(1):the authorization HMAC check failed and DA counter incremented\n",
         WrongPinError, "does not take this PIN"),
        (True, "Token 1 requires PIN.\n",  # systemd 257, of a TPM
         "Failed to unseal secret using TPM2: State not recoverable\n",
         WrongPinError, "does not take this PIN"),
        (False, "No usable token is available.\n",  # one that was cleared
         "Failed to unseal secret using TPM2: State not recoverable\n",
         KeyUnavailableError, "State not recoverable"),
        (True, "Token 1 requires PIN.\n", "tpm:warn(2.0): the TPM is in DA lockout mode\n",
         KeyUnavailableError, "locked itself"),
        (True, "Token 1 requires PIN.\nToken 1 requires additional missing resource.\n", "",
         NotYetError, "is not there"),
        (False, "Token 1 cannot unlock assigned keyslot(s) (wrong keyslot passphrase).\n", "",
         KeyUnavailableError, "enroll it again"),
        (False, "No usable token is available.\n",
         "Current policy digest does not match stored policy digest, cancelling TPM2 authentication attempt.\n",
         KeyUnavailableError, "Current policy digest does not match"),
        (False, "No usable token is available.\n", "", KeyUnavailableError, "systemd-cryptsetup"),
        (False, "", "", KeyUnavailableError, "exit status 1"),
        (False, "", "Device cr_test already exists.\n", StorageError, "already exists"),
    ],
)  # fmt: skip
def test_what_a_token_lacks(
    has_pin: bool, out: str, err: str, error: type[VmcryptdError], text: str
) -> None:
    spec, token = VolumeSpec("cr_test", "/dev/x"), Token(1, "systemd-tpm2")
    found = token_failure(Completed(1, out, err), spec, token, has_pin=has_pin)
    assert type(found) is error
    assert text in str(found)


def test_a_token_that_meets_a_mapping_that_is_there() -> None:
    done = Completed(5, err="Device cr_test already exists.\n")
    token = Token(1, "systemd-tpm2")
    found = token_failure(done, VolumeSpec("cr_test", "/dev/x"), token, has_pin=False)
    assert isinstance(found, BusyError)


def test_closing_what_is_not_open() -> None:
    asyncio.run(Cryptsetup().close("vmcryptd-no-such-mapping"))


def test_memory(tmp_path: Path) -> None:
    assert Cryptsetup().available_memory_kib() > 1000
    assert Cryptsetup(meminfo=tmp_path / "none").available_memory_kib() == 0


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the metadata in both copies of a LUKS2 header, and the checksums with it."""
    size = luks_header.SIZES[0]
    with path.open("r+b") as file:
        for offset in (0, size):
            file.seek(offset)
            copy = bytearray(file.read(size))
            text, _, _ = copy[luks_header.BINARY_SIZE :].partition(b"\0")
            metadata = json.loads(text)
            change(metadata)
            text = bytearray(json.dumps(metadata).encode())
            copy[luks_header.BINARY_SIZE :] = text.ljust(size - luks_header.BINARY_SIZE, b"\0")
            copy[luks_header.CHECKSUM] = bytes(64)
            copy[luks_header.CHECKSUM] = hashlib.sha256(copy).digest().ljust(64, b"\0")
            file.seek(offset)
            file.write(copy)


async def fits(volume: VolumeSpec, slot: int, secret: Path) -> bool:
    key = await SystemKeys().fetch(KeySource(SourceKind.FILE, f"{secret}"), volume)
    try:
        return await CryptsetupSlots().fits(volume, slot, key)
    finally:
        key.close()


def test_one_slot_with_an_unknown_derivation(tmp_path: Path) -> None:
    """cryptsetup itself opens nothing any more by such a header, unless a slot is named."""
    device = tmp_path / "device"
    alpha, beta = secret(tmp_path, "alpha", b"alpha"), secret(tmp_path, "beta", b"beta")
    os.truncate(os.open(device, os.O_CREAT | os.O_RDWR, 0o600), 20 * 1024 * 1024)
    cryptsetup("luksFormat", "--type", "luks2", *QUICK, f"{device}", f"{alpha}")
    cryptsetup("luksAddKey", *QUICK, "--key-file", f"{alpha}", f"{device}", f"{beta}")
    rewritten(device, lambda metadata: metadata["keyslots"]["0"]["kdf"].update(type="scrypt"))
    volume = VolumeSpec("cr_test", f"{device}")
    header = asyncio.run(Cryptsetup().header(volume))
    assert [slot.number for slot in slot_order.order(header, None)] == [1, 0]
    assert header.slots[0].caveat == "has the key derivation scrypt, which is not known here"
    assert asyncio.run(fits(volume, 1, beta))
    assert not asyncio.run(fits(volume, 1, alpha))
    with pytest.raises(StorageError):
        asyncio.run(fits(volume, 0, alpha))


def test_a_disk_that_does_not_answer_keeps_none_from_the_others(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when more reads of it hang than there are threads for everything else."""
    dead = tmp_path / "dead"
    released = threading.Event()
    reading: list[str] = []
    real = mappings.read_header

    def read(path: str) -> Header:
        reading.append(path)
        if path == f"{dead}":
            released.wait()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(mappings, "read_header", read)
    monkeypatch.setattr(mappings, "HEADER_TIMEOUT_S", 0.05)

    async def go() -> None:
        crypt = Cryptsetup()
        answered = asyncio.Event()
        crypt.watch(answered.set)
        bad, good = VolumeSpec("bad", f"{dead}"), VolumeSpec("good", f"{place / 'two'}")
        for _ in range(40):
            with pytest.raises(DeviceUnreadableError, match=f"volume bad: {dead} has not answered"):
                await crypt.header(bad)
        monkeypatch.setattr(mappings, "HEADER_TIMEOUT_S", 60.0)
        assert (await crypt.header(good)).version == 2
        assert (crypt.silent(), reading.count(f"{dead}")) == ({f"{dead}"}, 1)
        released.set()
        await answered.wait()
        assert crypt.silent() == frozenset()
        with pytest.raises(DeviceUnreadableError, match="cannot be read: Input/output error"):
            await crypt.header(bad)

    asyncio.run(go())
