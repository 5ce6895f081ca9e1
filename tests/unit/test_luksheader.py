# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUKS headers from bytes: sound, damaged, hostile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcryptd.core import luks_header
from vmcryptd.core.errors import DamagedHeaderError, NotLuksError
from vmcryptd.core.model import KeySlot, Token

UUID = "0b7d6a2e-94a5-4c1e-a5a7-6b7c3b3a1f00"
ARGON = {"type": "argon2id", "time": 4, "memory": 65536, "cpus": 2, "salt": ""}
PBKDF = {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": ""}
SLOTS = {
    "1": {"type": "luks2", "kdf": PBKDF},
    "0": {"type": "luks2", "kdf": ARGON},
    "7": {"type": "reencrypt", "mode": "encrypt"},
}


def copy(
    offset: int = 0,
    size: int = 0x4000,
    sequence: int = 3,
    uuid: str = UUID,
    metadata: object = None,
    algorithm: bytes = b"sha256",
) -> bytes:
    magic = luks_header.SECOND_MAGIC if offset else luks_header.MAGIC
    head = luks_header.BINARY.pack(
        magic, 2, size, sequence, b"", algorithm, b"salt", uuid.encode(), b"", offset
    )
    text = json.dumps({"keyslots": SLOTS} if metadata is None else metadata).encode()
    data = bytearray((head.ljust(4096, b"\0") + text).ljust(size, b"\0"))
    data[448:480] = hashlib.sha256(data).digest()
    return bytes(data)


def luks1() -> bytearray:
    head = luks_header.LUKS1.pack(
        luks_header.MAGIC,
        1,
        b"aes",
        b"xts-plain64",
        b"sha512",
        4096,
        64,
        b"",
        b"",
        9,
        UUID.encode(),
    )
    slot = luks_header.LUKS1_SLOT
    on = slot.pack(luks_header.LUKS1_ACTIVE, 1234, b"", 8, 4000)
    off = slot.pack(luks_header.LUKS1_INACTIVE, 0, b"", 8, 4000)
    return bytearray(head + off + on + off * 6)


def test_a_slot_that_is_made_anew_is_another_one() -> None:
    kdf = {**PBKDF, "salt": "c2FsdA=="}
    slots = {"0": {"type": "luks2", "kdf": PBKDF}, "1": {"type": "luks2", "kdf": kdf}}
    header = luks_header.parse(copy(metadata={"keyslots": slots}))
    assert [slot.salt for slot in header.slots] == ["", "c2FsdA=="]
    assert not header.is_reencrypting


def test_luks2() -> None:
    header = luks_header.parse(copy() + copy(0x4000))
    assert (header.version, header.uuid, header.is_reencrypting) == (2, UUID, True)
    assert header.slots == (
        KeySlot(0, "argon2id", memory_kib=65536, threads=2, iterations=4),
        KeySlot(1, "pbkdf2", iterations=1000),
    )
    assert header.memory_kib == 65536


def test_tokens() -> None:
    metadata = {
        "keyslots": {"0": {"type": "luks2", "kdf": ARGON, "priority": 2}},
        "tokens": {
            "3": {"type": "clevis", "keyslots": ["2"], "jwe": {}},
            "0": {"type": "systemd-tpm2", "keyslots": ["1"], "tpm2-pin": True},
            "1": {"type": "systemd-fido2", "keyslots": ["0"], "fido2-clientPin-required": False},
            "2": {"type": "systemd-pkcs11", "keyslots": []},
            "x": {"type": "clevis", "keyslots": ["2"]},
            "5": {"type": 5, "keyslots": ["2"]},
            "6": {"type": "clevis", "keyslots": "2"},
            "7": {"type": "clevis", "keyslots": ["-1"]},
            "8": None,
        },
    }
    header = luks_header.parse(copy(metadata=metadata))
    assert header.tokens == (
        Token(0, "systemd-tpm2", (1,), needs_pin=True),
        Token(1, "systemd-fido2", (0,)),
        Token(2, "systemd-pkcs11", (), needs_pin=True),
        Token(3, "clevis", (2,)),
    )
    assert [slot.priority for slot in header.slots] == [2]
    assert luks_header.parse(copy(metadata={"keyslots": SLOTS, "tokens": []})).tokens == ()


def test_what_a_slot_costs() -> None:
    cheap, dear = luks_header.parse(copy()).slots[::-1]
    assert cheap.cost < dear.cost
    assert KeySlot(0, "pbkdf2", iterations=2_000_000).cost > dear.cost


def test_luks1() -> None:
    header = luks_header.parse(bytes(luks1()))
    assert (header.version, header.uuid) == (1, UUID)
    assert header.slots == (KeySlot(1, "pbkdf2", iterations=1234),)


@pytest.mark.parametrize(
    "size", [luks_header.SIZES[0], luks_header.SIZES[3], luks_header.SIZES[-1]]
)
def test_second_copy_stands_in(size: int) -> None:
    both = bytearray(copy(size=size) + copy(size, size=size))
    both[5000] ^= 1
    assert luks_header.parse(bytes(both)).uuid == UUID
    both[:4096] = bytes(4096)
    assert luks_header.parse(bytes(both)).uuid == UUID


def test_the_copy_written_last_counts() -> None:
    other = UUID.replace("0b", "1c")
    assert luks_header.parse(copy(sequence=4) + copy(0x4000, uuid=other)).uuid == UUID
    assert luks_header.parse(copy() + copy(0x4000, sequence=4, uuid=other)).uuid == other


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(copy()[:5000], id="cut short"),
        pytest.param(luks_header.MAGIC, id="magic only"),
        pytest.param(luks_header.MAGIC + b"\0\1", id="LUKS1 magic only"),
        pytest.param(bytes(luks1()[:300]), id="LUKS1 cut short"),
        pytest.param(copy(algorithm=b"crc32"), id="unknown checksum"),
        pytest.param(copy(uuid="not a uuid"), id="malformed UUID"),
        pytest.param(copy(metadata=[]), id="metadata is no object"),
        pytest.param(copy(metadata={}), id="no key slots"),
        pytest.param(copy(metadata={"keyslots": {"x": {}}}), id="slot's number"),
        pytest.param(copy(metadata={"keyslots": {"9" * 900: {}}}), id="huge slot number"),
        pytest.param(copy(metadata={"keyslots": {"1": 5}}), id="slot is no object"),
        pytest.param(
            copy(metadata={"keyslots": {"1": {"type": "luks2", "kdf": {**ARGON, "memory": -1}}}}),
            id="negative memory",
        ),
        pytest.param(
            copy(metadata={"keyslots": {"1": {"type": "luks2", "kdf": {"type": 5}}}}),
            id="key derivation without a name",
        ),
    ],
)
def test_damaged(data: bytes) -> None:
    with pytest.raises(DamagedHeaderError):
        luks_header.parse(data)


def test_a_slot_that_is_not_understood_is_one_slot() -> None:
    slots = {
        "0": {"type": "luks2", "kdf": {"type": "scr\nypt"}},
        "1": {"type": "luks2", "kdf": PBKDF, "priority": 7},
        "2": {"type": "luks9"},
    }
    unknown, usual = luks_header.parse(copy(metadata={"keyslots": slots})).slots
    assert unknown.caveat == "has the key derivation scr\\nypt, which is not known here"
    assert (usual.number, usual.priority, usual.caveat) == (1, 1, "")


@pytest.mark.parametrize(
    ("slot", "caveat"),
    [
        (KeySlot(0, "argon2id", 1024**2, iterations=20), ""),
        (KeySlot(0, "pbkdf2", iterations=20_000_000), ""),
        (KeySlot(0, "argon2id", 3 * 1024**2, 4, 4), "claims 3072 MiB of memory and 4 iterations"),
        (KeySlot(0, "argon2id", 64, 4, 2**31), "claims 0 MiB of memory and 2147483648 iterations"),
        (KeySlot(0, "pbkdf2", iterations=2**31), "claims 2147483648 iterations"),
    ],
)
def test_what_a_slot_claims(slot: KeySlot, caveat: str) -> None:
    assert slot.caveat == caveat


def test_damaged_luks1_slot() -> None:
    data = luks1()
    struct.pack_into(">I", data, luks_header.LUKS1.size, 7)
    with pytest.raises(DamagedHeaderError):
        luks_header.parse(bytes(data))


def test_deep_json() -> None:
    data = bytearray(copy(size=0x10000))
    data[4096:] = (b"[" * 60000).ljust(0x10000 - 4096, b"\0")
    data[448:512] = bytes(64)
    data[448:480] = hashlib.sha256(data).digest()
    with pytest.raises(DamagedHeaderError):
        luks_header.parse(bytes(data))


@pytest.mark.parametrize("data", [b"", bytes(65536), b"\x53\xef" * 20000])
def test_not_luks(data: bytes) -> None:
    with pytest.raises(NotLuksError) as caught:
        luks_header.parse(data)
    assert not isinstance(caught.value, DamagedHeaderError)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_on_the_disk(data: st.DataObject) -> None:
    raw = bytearray(
        data.draw(st.sampled_from([copy(), copy() + copy(0x4000), bytes(luks1()), b""]))
    )
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, min(len(raw), 6000)))
        noise = data.draw(st.binary(max_size=40))
        raw[at : at + len(noise)] = noise
    if len(raw) > 512 and data.draw(st.booleans()):  # with a checksum that is right again
        raw[448:512] = bytes(64)
        raw[448:480] = hashlib.sha256(raw[:0x4000]).digest()
    with contextlib.suppress(NotLuksError):
        luks_header.parse(bytes(raw))
    with contextlib.suppress(DamagedHeaderError):
        luks_header.rotation_finished(bytes(raw))


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["keyslots", "0", "kdf", "type", "memory", "x"]), x)))  # fmt: skip
def test_whatever_the_metadata_says(metadata: object) -> None:
    with contextlib.suppress(DamagedHeaderError):
        luks_header.header("0", metadata)


# --- a reencryption of which only the end is missing; what becomes of a whole one cryptsetup says (tests/luks) ---


def moved(path: str = "", value: object = None) -> dict[str, Any]:
    """The metadata, with another value at a path."""
    segment = {"type": "crypt", "offset": "16777216", "size": "dynamic"}
    metadata: dict[str, Any] = {
        "keyslots": {
            "0": {"type": "luks2", "kdf": PBKDF, "area": {"offset": "32768", "size": "4096"}},
            "1": {"type": "luks2", "kdf": PBKDF, "area": {"offset": "36864", "size": "4096"}},
            "2": {"type": "reencrypt", "mode": "reencrypt"},
        },
        "segments": {
            "0": segment,
            "1": {**segment, "flags": ["backup-previous"]},
            "2": {**segment, "flags": ["backup-final"]},
        },
        "digests": {
            "0": {"keyslots": ["0"], "segments": ["1"]},
            "1": {"keyslots": ["1"], "segments": ["0", "2"]},
            "2": {"keyslots": ["2"], "segments": []},
        },
        "tokens": {},
        "config": {"requirements": {"mandatory": ["online-reencrypt-v2", "another"]}},
    }
    if path:
        *above, last = path.split("/")
        place = metadata
        for key in above:
            place = place[key]
        place[last] = value
    return metadata


def test_what_only_lacks_its_end() -> None:
    assert luks_header.header(UUID, moved()).data_reencrypted
    for size in (0x4000, 0x8000):
        both = [copy(at, size, metadata=moved()) for at in (0, size)]
        # One of the copies is enough.
        for sound in (both, [bytes(size), both[1]], [both[0], bytes(size)]):
            written, areas = luks_header.rotation_finished(b"".join(sound))
            assert (len(written), areas) == (2 * size, [(32768, 4096)])
            found = [luks_header.parse(written), luks_header.parse(bytes(size) + written[size:])]
            assert [[slot.number for slot in header.slots] for header in found] == [[1], [1]]
            assert not any(header.is_reencrypting for header in found)
            metadata = json.loads(written[4096:size].split(b"\0", 1)[0])
            assert metadata["config"] == {"requirements": {"mandatory": ["another"]}}
            assert metadata["digests"] == {"1": {"keyslots": ["1"], "segments": ["0"]}}
            assert luks_header.BINARY.unpack_from(written)[3] == 4


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param("keyslots/2/mode", "encrypt", id="encrypts for the first time"),
        pytest.param("keyslots/3", {"type": "reencrypt", "mode": "reencrypt"}, id="two of them"),
        pytest.param("segments/0/flags", ["in-reencryption"], id="a piece is being moved"),
        pytest.param("segments/0/size", "4096", id="not all of it"),
        pytest.param("segments/3", {"type": "crypt", "offset": "1", "size": "1"}, id="two parts"),
        pytest.param("digests/1/segments", ["2"], id="under the old key"),
        pytest.param("digests/1/keyslots", [], id="nothing opens the new key"),
        pytest.param("digests/0/segments", ["0", "1", "2"], id="one key only"),
        pytest.param("digests/0/segments", [], id="no old key"),
        pytest.param("segments", [], id="malformed"),
        pytest.param("digests/1", None, id="malformed digest"),
    ],
)
def test_what_lacks_more_than_its_end(path: str, value: object) -> None:
    metadata = moved(path, value)
    found = luks_header.header(UUID, metadata)
    assert (found.is_reencrypting, found.data_reencrypted) == (True, False)
    with pytest.raises(DamagedHeaderError, match="is not all under the new volume key"):
        luks_header.rotation_finished(copy(metadata=metadata))


@pytest.mark.parametrize(
    ("path", "value"), [("tokens", None), ("config", {}), ("keyslots/0/area", {"offset": "x"})]
)
def test_what_only_lacks_its_end_and_is_malformed(path: str, value: object) -> None:
    metadata = moved(path, value)
    with pytest.raises(DamagedHeaderError, match="malformed"):
        luks_header.rotation_finished(copy(metadata=metadata))
    with pytest.raises(DamagedHeaderError, match="intact"):
        luks_header.rotation_finished(bytes(0x8000))
