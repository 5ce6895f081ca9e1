# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses the public part of LUKS headers. Pure.

After "LUKS2 On-Disk Format Specification" 1.1, sections 2.1 and 3 (cryptsetup's LUKS2-docs),
and "LUKS1 On-Disk Format Specification" 1.2.3. A header may come from an
attacker: for any content the only errors raised are NotLuksError and DamagedHeaderError.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from vmcryptd.core.errors import DamagedHeaderError, NotLuksError
from vmcryptd.core.model import Header, KeySlot, Token
from vmcryptd.core.text import escaped

USUAL_SIZE = 32 * 1024  # both copies of a LUKS2 header with the default JSON area; enough for LUKS1
WHOLE_SIZE = 8 * 1024 * 1024  # both copies of the largest

MAGIC = b"LUKS\xba\xbe"
SECOND_MAGIC = b"SKUL\xba\xbe"
SIZES = tuple(0x4000 << n for n in range(9))  # 16 KiB … 4 MiB: also where a second copy can be

# magic, version, header size, sequence id, label, checksum algorithm, salt, uuid, subsystem, offset
BINARY = struct.Struct(">6sHQQ48s32s64s40s48sQ")
BINARY_SIZE = 4096
CHECKSUM = slice(448, 512)
CHECKSUMS = {"sha1", "sha224", "sha256", "sha384", "sha512", "sha3_256", "sha3_512", "blake2b"}

# magic, version, cipher, mode, hash, payload offset, key bytes, digest, salt, iterations, uuid
LUKS1 = struct.Struct(">6sH32s32s32sII20s32sI40s")
LUKS1_SLOT = struct.Struct(">II32sII")  # active, iterations, salt, key material's offset, stripes
LUKS1_SLOTS = 8
LUKS1_ACTIVE, LUKS1_INACTIVE = 0x00AC71F3, 0x0000DEAD

LARGEST = 2**32 - 1

REENCRYPT = "reencrypt"  # the type of the key slot that holds the progress of a reencryption

# systemd-cryptenroll's marks of tokens that need a PIN; a PKCS#11 token always does.
PIN_FLAGS = {"systemd-tpm2": "tpm2-pin", "systemd-fido2": "fido2-clientPin-required"}
PIN_ALWAYS = {"systemd-pkcs11"}


def parse(data: bytes) -> Header:
    """The header at the start of a device. Raises NotLuksError, DamagedHeaderError.

    `data` is its first USUAL_SIZE bytes; if that raises, parse the first WHOLE_SIZE bytes.
    """
    found = False
    sound: list[tuple[int, Header]] = []
    if data[:6] == MAGIC:
        found = True
        if data[6:8] == b"\0\1":
            return _luks1(data)
        sound += _luks2(data, 0)
    for offset in SIZES:
        if data[offset : offset + 6] == SECOND_MAGIC:
            found = True
            sound += _luks2(data, offset)
            break
    if sound:
        return max(sound, key=lambda copy: copy[0])[1]  # the newer copy
    if found:
        raise DamagedHeaderError("there is a LUKS header, but no copy of it is intact")
    raise NotLuksError("there is no LUKS header")


def header(uuid: str, metadata: object) -> Header:
    """A LUKS2 header from its metadata, as `cryptsetup luksDump --dump-json-metadata` prints it too.

    Raises DamagedHeaderError.
    """
    slots = metadata.get("keyslots", {}) if isinstance(metadata, dict) else {}
    is_reencrypting = isinstance(slots, dict) and any(
        isinstance(slot, dict) and slot.get("type") == REENCRYPT for slot in slots.values()
    )
    data_reencrypted = (
        is_reencrypting and isinstance(metadata, dict) and _old_digest(metadata) is not None
    )
    return Header(2, uuid, _slots(metadata), _tokens(metadata), is_reencrypting, data_reencrypted)


def rotation_finished(data: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """Finish the header of a reencryption whose data is all under the new volume key, as cryptsetup would.

    cryptsetup (2.8 as well, reencrypt_teardown_ok) wipes the key slots of the old volume key first, and at last writes
    that it has finished. After a crash in between it cannot open the volume, because that needs both keys. The rest of
    the work needs no key.

    `data` starts with both copies of the header's metadata. Returns the new copies, and the areas of the old volume
    key's key slots: offset and size in bytes. Raises DamagedHeaderError for any other header.
    """
    copies = [(*found, offset) for offset in (0, *SIZES) if (found := _copy(data, offset))]
    if not copies:
        raise DamagedHeaderError("no copy of its header is intact")
    sequence, _, metadata, source = max(copies, key=lambda copy: copy[0])
    old = _old_digest(metadata)
    if old is None:
        raise DamagedHeaderError("its data is not all under the new volume key")
    try:
        areas = _drop_old(metadata, old)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DamagedHeaderError("the metadata of its header is malformed") from None
    text = json.dumps(metadata, separators=(",", ":")).encode()
    _, version, size, _, *fields, _ = BINARY.unpack_from(data, source)
    if len(text) >= size - BINARY_SIZE:
        raise DamagedHeaderError("the metadata of its header is too long")
    written = b""
    for offset, magic in ((0, MAGIC), (size, SECOND_MAGIC)):
        copy = bytearray(size)
        BINARY.pack_into(copy, 0, magic, version, size, sequence + 1, *fields, offset)
        copy[BINARY_SIZE : BINARY_SIZE + len(text)] = text
        checksum = _checksum(copy, fields[1])
        copy[CHECKSUM.start : CHECKSUM.start + len(checksum)] = checksum
        written += copy
    return written, areas


def _drop_old(metadata: dict[str, Any], old: str) -> list[tuple[int, int]]:
    """Remove the reencryption and its old volume key from the metadata. Returns as `rotation_finished`."""
    slots, digests = metadata["keyslots"], metadata["digests"]
    gone = {n for n in slots if n in digests[old]["keyslots"] or slots[n]["type"] == REENCRYPT}
    removed = [slot for n in gone if (slot := slots.pop(n))["type"] != REENCRYPT]
    segments = {n: one for n, one in metadata["segments"].items() if not _is_backup(one)}
    metadata["segments"] = segments
    for number, digest in list(digests.items()):
        digest["keyslots"] = [n for n in digest["keyslots"] if n not in gone]
        digest["segments"] = [n for n in digest["segments"] if n in segments]
        if not digest["keyslots"] and not digest["segments"]:
            del digests[number]
    for number, token in list(metadata["tokens"].items()):
        if gone.intersection(token["keyslots"]):
            token["keyslots"] = [n for n in token["keyslots"] if n not in gone]
            if not token["keyslots"]:
                del metadata["tokens"][number]
    requirements = metadata["config"]["requirements"]
    requirements["mandatory"] = [
        one for one in requirements["mandatory"] if not one.startswith("online-reencrypt")
    ]
    if not requirements["mandatory"]:
        del metadata["config"]["requirements"]
    return [(int(slot["area"]["offset"]), int(slot["area"]["size"])) for slot in removed]


def _old_digest(metadata: dict[str, Any]) -> str | None:
    """The digest of the old volume key, if a reencryption has moved all data but is not marked as finished."""
    try:
        segments, digests = metadata["segments"], metadata["digests"]
        [reencryption] = [
            slot for slot in metadata["keyslots"].values() if slot["type"] == REENCRYPT
        ]
        [(number, moved)] = [(n, one) for n, one in segments.items() if not _is_backup(one)]
        [final], [previous] = (
            [n for n, one in segments.items() if flag in one.get("flags", ())]
            for flag in ("backup-final", "backup-previous")
        )
        [new], [old] = (
            [n for n, digest in digests.items() if one in digest["segments"]]
            for one in (final, previous)
        )
        data_reencrypted = (
            reencryption["mode"] == "reencrypt"
            and new != old
            and number in digests[new]["segments"]
            and "flags" not in moved  # no hotzone is being moved
            and {**moved, "flags": ["backup-final"]} == segments[final]
            and any(n in metadata["keyslots"] for n in digests[new]["keyslots"])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return old if data_reencrypted else None


def _is_backup(segment: dict[str, Any]) -> bool:
    return any(flag.startswith("backup-") for flag in segment.get("flags", ()))


def _slots(metadata: object) -> tuple[KeySlot, ...]:
    keyslots = metadata.get("keyslots") if isinstance(metadata, dict) else None
    if not isinstance(keyslots, dict):
        raise DamagedHeaderError("the LUKS2 metadata has no key slots object")
    unbound = _unbound(metadata)
    found = [
        slot
        for number, value in keyslots.items()
        if number not in unbound
        for slot in _luks2_slot(number, value)
    ]
    return tuple(sorted(found, key=lambda slot: slot.number))


def _tokens(metadata: object) -> tuple[Token, ...]:
    """The tokens in LUKS2 metadata. Unknown ones are left out: passphrases work without them."""
    found = metadata.get("tokens") if isinstance(metadata, dict) else None
    read = [_token(*item) for item in found.items()] if isinstance(found, dict) else []
    return tuple(sorted((token for token in read if token), key=lambda token: token.number))


def _luks1(data: bytes) -> Header:
    if len(data) < LUKS1.size + LUKS1_SLOTS * LUKS1_SLOT.size:
        raise DamagedHeaderError("the LUKS1 header is cut short")
    fields = LUKS1.unpack_from(data)
    active = []
    for number in range(LUKS1_SLOTS):
        state, iterations, salt, *_ = LUKS1_SLOT.unpack_from(
            data, LUKS1.size + number * LUKS1_SLOT.size
        )
        if state == LUKS1_ACTIVE:
            active.append(KeySlot(number, "pbkdf2", iterations=iterations, salt=salt.hex()))
        elif state != LUKS1_INACTIVE:
            raise DamagedHeaderError(f"key slot {number} of the LUKS1 header is neither on nor off")
    return Header(1, _uuid(fields[10]), tuple(active))


def _luks2(data: bytes, offset: int) -> Iterator[tuple[int, Header]]:
    """The copy at an offset with its sequence id, or None if it is damaged."""
    if (copy := _copy(data, offset)) is None:
        return
    sequence, uuid, metadata = copy
    try:
        yield sequence, header(_uuid(uuid), metadata)
    except (RecursionError, DamagedHeaderError):
        return


def _copy(data: bytes, offset: int) -> tuple[int, bytes, Any] | None:
    """Sequence id, UUID and metadata of the copy at an offset, if it is intact."""
    if len(data) < offset + BINARY_SIZE:
        return None
    _, version, size, sequence, _, algorithm, _, uuid, _, own = BINARY.unpack_from(data, offset)
    if version != 2 or size not in SIZES or own != offset or len(data) < offset + size:
        return None
    if offset not in (0, size):
        return None
    copy = data[offset : offset + size]
    digest = _checksum(copy, algorithm)
    if not digest or copy[CHECKSUM][: len(digest)] != digest:
        return None
    try:
        return sequence, uuid, json.loads(copy[BINARY_SIZE:].split(b"\0", 1)[0])
    except (ValueError, RecursionError):
        return None


def _checksum(copy: bytes | bytearray, algorithm: bytes) -> bytes:
    """The checksum of one copy; empty if its algorithm is unknown."""
    name = _text(algorithm).replace("-", "_")
    if name not in CHECKSUMS:
        return b""
    import hashlib  # OpenSSL takes a while, and no header is read before the daemon is ready

    digest = hashlib.new(name, usedforsecurity=False)
    digest.update(copy[: CHECKSUM.start] + bytes(64) + copy[CHECKSUM.stop :])
    return digest.digest()


def _luks2_slot(number: str, value: Any) -> Iterator[KeySlot]:
    """One slot; None for slots without a key derivation, which reencryption uses."""
    if not _is_number(number) or not isinstance(value, dict):
        raise DamagedHeaderError("a key slot in the LUKS2 metadata is malformed")
    kdf = value.get("kdf")
    if value.get("type") != "luks2" or not isinstance(kdf, dict):
        return
    kind, priority = kdf.get("type"), value.get("priority", 1)
    if priority not in (0, 1, 2) or isinstance(priority, bool):
        priority = 1  # as cryptsetup does
    salt = str(kdf.get("salt", ""))
    if kind == "pbkdf2":
        yield KeySlot(
            int(number),
            "pbkdf2",
            iterations=_number(kdf, "iterations"),
            priority=priority,
            salt=salt,
        )
    elif kind in ("argon2i", "argon2id"):
        yield KeySlot(
            int(number),
            kind,
            memory_kib=_number(kdf, "memory"),
            threads=_number(kdf, "cpus"),
            iterations=_number(kdf, "time"),
            priority=priority,
            salt=salt,
        )
    elif isinstance(kind, str) and kind:
        yield KeySlot(int(number), escaped(kind, 32), priority=priority, salt=salt)
    else:
        raise DamagedHeaderError(f"key slot {number} has no key derivation")


def _unbound(metadata: object) -> set[str]:
    """The slots whose key opens no segment (`cryptsetup luksAddKey --unbound`), so they cannot open the volume."""
    digests = metadata.get("digests") if isinstance(metadata, dict) else None
    found: set[str] = set()
    for digest in digests.values() if isinstance(digests, dict) else ():
        if isinstance(digest, dict) and digest.get("segments") == []:
            slots = digest.get("keyslots")
            found.update(str(slot) for slot in (slots if isinstance(slots, list) else ()))
    return found


def _token(number: str, value: Any) -> Token | None:
    if not _is_number(number) or not isinstance(value, dict):
        return None
    kind, slots = value.get("type"), value.get("keyslots")
    if not isinstance(kind, str) or not isinstance(slots, list):
        return None
    if not all(isinstance(slot, str) and _is_number(slot) for slot in slots):
        return None
    needs_pin = kind in PIN_ALWAYS or value.get(PIN_FLAGS.get(kind, "")) is True
    return Token(int(number), kind, tuple(map(int, slots)), needs_pin)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 4


def _number(kdf: dict[str, Any], key: str) -> int:
    value = kdf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
        raise DamagedHeaderError(f"a key derivation's {key} is not a positive number")
    return value


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "replace")


def _uuid(field: bytes) -> str:
    text = _text(field).lower()
    if len(text) != 36 or not set(text) <= set("0123456789abcdef-"):
        raise DamagedHeaderError("the LUKS header's UUID is malformed")
    return text
