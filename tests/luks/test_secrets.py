# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that has handled a key in every way has nothing of it in its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scan_memory import found_in

CANARY = b"canary-" + os.urandom(12).hex().encode()

USER = """
import asyncio, os, subprocess, sys
from vmcryptd.adapters.luks.mappings import Cryptsetup
from vmcryptd.adapters.keysources.sources import SystemKeys
from vmcryptd.core.errors import VmcryptdError
from vmcryptd.core.model import KeySource, SourceKind, Token, VolumeSpec

path = sys.argv[1]
volume = VolumeSpec("cr_test", path)

async def use(key):
    try:
        await Cryptsetup().open(volume, key)  # refused: it is no LUKS device; the child has read it or not
    except VmcryptdError:
        pass
    try:
        await Cryptsetup().open_by_token(volume, Token(0, "systemd-tpm2", (0,)), key, "")  # as a PIN
    except VmcryptdError:
        pass
    reader = key.reader()
    subprocess.run(["cat"], stdin=reader, stdout=subprocess.DEVNULL, check=True)
    os.close(reader)
    key.close()

async def main():
    keys = SystemKeys(credentials=os.path.dirname(path), timeout_s=10)
    sources = [(SourceKind.FILE, path), (SourceKind.CREDENTIAL, os.path.basename(path)),
               (SourceKind.EXEC, f"/bin/cat {path}")]
    for _ in range(20):
        for kind, argument in sources:
            await use(await keys.fetch(KeySource(kind, argument), volume))
        await use(await keys.receive(os.open(path, os.O_RDONLY)))
        reader, writer = os.pipe()
        child = subprocess.Popen(["cat", path], stdout=writer)
        os.close(writer)
        await use(await keys.receive(reader))
        child.wait()
    print("done", flush=True)
    sys.stdin.readline()

kept = b"known-" + b"content" if len(sys.argv) > 2 else None
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads another process's memory")
def test_nothing_stays_in_memory(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(CANARY)
    key.chmod(0o600)
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(key), "control"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert found_in(process.pid, b"known-content"), "the search itself does not work"
        assert not found_in(process.pid, CANARY)
        process.communicate(b"\n")
        assert process.returncode == 0
