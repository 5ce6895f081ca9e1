# SPDX-License-Identifier: LGPL-2.1-or-later
"""Headers and key files that come late, from the kernel's news to cryptsetup; only the mapping is left out."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests import lib
from vmcryptd.adapters.keysources.sources import SystemKeys
from vmcryptd.adapters.luks.key_slots import CryptsetupSlots
from vmcryptd.adapters.luks.mappings import Cryptsetup
from vmcryptd.adapters.sim.host import Simulation
from vmcryptd.adapters.storage.blocks import SysfsBlocks
from vmcryptd.core.errors import WrongKeyError
from vmcryptd.core.model import VolumeSpec
from vmcryptd.core.ports import Key
from vmcryptd.engine.engine import Engine

pytestmark = pytest.mark.skipif(
    not shutil.which("cryptsetup"), reason="cryptsetup is not installed"
)

QUICK = ("--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")


class WithoutMappings(Cryptsetup):
    """Tests the key on the header, and notes the volume instead of mapping it."""

    def __init__(self) -> None:
        super().__init__()
        # A set: what has no mapping is opened again with each boot.
        self.opened: set[str] = set()

    async def open(self, volume: VolumeSpec, key: Key, slot: int | None = None) -> None:
        if not await CryptsetupSlots().fits(volume, slot or 0, key):
            raise WrongKeyError(f"volume {volume.name}: the key fits no key slot")
        self.opened.add(volume.name)


@pytest.mark.skipif(os.geteuid() != 0, reason="udev's news are root's")
def test_each_is_opened_when_its_file_appears(tmp_path: Path) -> None:
    stick, keys = tmp_path / "stick", tmp_path / "keys"
    good, ready = tmp_path / "good.key", tmp_path / "header"
    good.write_text("alpha")
    good.chmod(0o600)
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as device:
            device.truncate(20 << 20)
    with ready.open("wb") as header:
        header.truncate(16 << 20)
    for place in (["--header", f"{ready}", f"{tmp_path}/a"], [f"{tmp_path}/b"]):
        subprocess.run(
            ["cryptsetup", "luksFormat", "-q", *QUICK, f"--key-file={good}", *place], check=True
        )
    simulation = Simulation.parse(
        f'[volume.a]\ndevice = "{tmp_path}/a"\nheader = "{stick}/header"\nkeys = ["file:{good}"]\n'
        f'timeout = "10ms"\n[volume.b]\ndevice = "{tmp_path}/b"\nkeys = ["file:{keys}/b"]\n'
    )
    crypt = WithoutMappings()

    async def go() -> None:
        blocks = SysfsBlocks()
        ports = replace(
            simulation.ports(), blocks=blocks, crypt=crypt, keys=SystemKeys(credentials=None)
        )
        engine = Engine(simulation.settings, ports)
        engine.start()

        async def until(*opened: str) -> None:
            async with asyncio.timeout(lib.PATIENCE_S):
                while engine.jobs or crypt.opened != set(opened):
                    await asyncio.sleep(0.01)

        try:
            engine.boot()
            await until()
            views = {view.name: view for view in engine.volume_views()}
            assert (str(views["a"].state), str(views["b"].state)) == ("missing", "failed")
            assert "did not appear within 0.01 s" in views["a"].error
            assert f"the key file {keys}/b is not there" in views["b"].error
            keys.mkdir()
            shutil.copy(good, keys / "b")
            await until("b")
            stick.mkdir()
            ready.rename(stick / "header")
            await until("b", "a")
        finally:
            engine.close()
            blocks.close()

    asyncio.run(go())
