# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys that Clevis has bound to a Tang server, a TPM, or several of these.

LUKS2 uses only `clevis decrypt`: `clevis luks pass` also tries the key on every slot in turn, with all the memory
that the slots ask for.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from vmcryptd.adapters.keysources.fetch import filled, run_into
from vmcryptd.core.errors import DeadlineError, KeyUnavailableError, NotYetError
from vmcryptd.core.model import Header, VolumeSpec
from vmcryptd.posix.memfd import MemfdKey
from vmcryptd.posix.run import CommandError, run

LIST_TIMEOUT_S = 60.0  # shell scripts, many of them, on a host that is just booting
# The parts of a JWE in their order (RFC 7516, section 7.1).
PARTS = ("protected", "encrypted_key", "iv", "ciphertext", "tag")


async def bindings(volume: VolumeSpec, header: Header) -> tuple[int, ...]:
    """The key slots that Clevis has bound. Raises KeyUnavailableError."""
    place = volume.header_path
    if header.version == 1:
        try:
            done = await run(["clevis", "luks", "list", "-d", place], timeout_s=LIST_TIMEOUT_S)
        except (CommandError, DeadlineError) as error:
            raise KeyUnavailableError(str(error)) from None
        # One line each, as `0: tang '{"url":"http://…"}'`.
        found = tuple(int(number) for number in re.findall(r"^(\d+):", done.out, re.MULTILINE))
    else:
        found = tuple(n for t in header.tokens if t.kind == "clevis" for n in t.slots)
    if not found:
        raise KeyUnavailableError(
            f"the header has no Clevis binding: `clevis luks bind -d {place} tang …` makes one"
        )
    return found


async def fetch(volume: VolumeSpec, header: Header, slot: int, timeout_s: float) -> MemfdKey:
    """The key of a slot. Raises KeyUnavailableError, NotYetError."""
    place = volume.header_path
    if header.version == 1:
        return await _output(["clevis", "luks", "pass", "-d", place, "-s", str(slot)], timeout_s)
    number = next(t.number for t in header.tokens if t.kind == "clevis" and slot in t.slots)
    jwe = MemfdKey()  # not secret: a memfd is a file that a child can read and that removes itself
    try:
        os.write(jwe.fileno(), (await _binding(place, number)).encode())
        reader = jwe.reader()
        try:
            return await _output(["clevis", "decrypt"], timeout_s, reader)
        finally:
            os.close(reader)
    finally:
        jwe.close()


async def _binding(place: str, token: int) -> str:
    """The JWE in a token, in the one line that `clevis decrypt` reads."""
    argv = ["cryptsetup", "token", "export", f"--token-id={token}", "--", place]
    try:
        done = await run(argv, timeout_s=LIST_TIMEOUT_S)
    except (CommandError, DeadlineError) as error:
        raise KeyUnavailableError(str(error)) from None
    try:
        jwe: dict[str, Any] = json.loads(done.out)["jwe"]
        parts = [jwe.get(part, "") for part in PARTS]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        why = done.complaint if done.code else "it is malformed"
        raise KeyUnavailableError(f"the Clevis token {token} cannot be read: {why}") from None
    return ".".join(parts)


async def _output(argv: list[str], timeout_s: float, stdin: int | None = None) -> MemfdKey:
    what = f"the output of {' '.join(argv[:2])}"
    with filled(what, KeyUnavailableError, NotYetError) as key:
        # curl, as clevis calls it, has no deadline of its own.
        done = await run_into(key, argv, timeout_s=timeout_s, stdin=stdin)
        if done.code != 0:
            raise NotYetError(f"Clevis got no key: {done.complaint}")
    return key
