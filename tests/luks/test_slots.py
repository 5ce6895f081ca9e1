# SPDX-License-Identifier: LGPL-2.1-or-later
"""Key slots of real LUKS headers on plain files, by the real cryptsetup; no key ever stands in an argument."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import lib
from vmcryptd.adapters import slots as adapter
from vmcryptd.adapters.crypt import Cryptsetup
from vmcryptd.adapters.keys import SystemKeys
from vmcryptd.adapters.sim import Simulation
from vmcryptd.adapters.slots import CryptsetupSlots
from vmcryptd.engine import Engine
from vmcryptd.errors import WrongKeyError
from vmcryptd.keyslots import KeySlots

pytestmark = pytest.mark.skipif(
    not shutil.which("cryptsetup"), reason="cryptsetup is not installed"
)

FIRST, SECOND, THIRD, WRONG = (f"canary-{name}-\n4e0a" for name in ("one", "two", "three", "wrong"))
CHEAP = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]


def cryptsetup(*arguments: str, key: str = "") -> str:
    done = subprocess.run(
        ["cryptsetup", "--batch-mode", *arguments],
        input=key.encode(), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return done.stdout.decode()


def file(place: Path, name: str, content: str = "", size: int = 0) -> str:
    path = place / name
    path.write_text(content)
    if size:
        os.truncate(path, size)
    return str(path)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passphrases each, by slots 0 and 1."""
    place = tmp_path_factory.mktemp("headers")
    second = file(place, "second", SECOND)
    for kind, size in (("luks1", 3), ("luks2", 18)):
        path = file(place, kind, size=size << 20)
        cheap = CHEAP if kind == "luks2" else CHEAP[2:]
        cryptsetup("luksFormat", "--type", kind, *cheap, "--key-file=-", path, key=FIRST)
        cryptsetup("luksAddKey", *cheap, "--key-file=-", path, second, key=FIRST)
    return place


class Real:
    """The engine's key slots on a real header, and what was run for them."""

    def __init__(self, path: Path, more: str = "") -> None:
        self.path = path
        simulation = Simulation.parse(f'[volume.mail]\ndevice = "{path}"\n{more}')
        ports = replace(
            simulation.ports(),
            crypt=Cryptsetup(),
            slots=CryptsetupSlots(),
            keys=SystemKeys(credentials=None),
        )
        self.engine = Engine(simulation.settings, ports)

    def do(self, action: Callable[[KeySlots], Awaitable[Any]]) -> Any:
        async def scene() -> Any:
            before = lib.descriptors()
            try:
                return await action(self.engine.key_slots)
            finally:
                assert lib.descriptors().keys() == before.keys()

        async def played() -> Any:
            self.engine.start()
            try:
                return await scene()
            finally:
                self.engine.close()

        return asyncio.run(played())

    def slots(self) -> list[int]:
        return [slot["slot"] for slot in self.do(lambda keys: keys.listed("mail"))["slots"]]

    def slot_of(self, passphrase: str) -> int | None:
        try:
            found: int = self.do(lambda keys: keys.test("mail", lib.handed_in(passphrase)))
        except WrongKeyError:
            return None
        return found


@pytest.fixture(params=["luks1", "luks2"])
def real(request: pytest.FixtureRequest, templates: Path, tmp_path: Path) -> Real:
    return Real(Path(shutil.copy(templates / request.param, tmp_path / "disk")))


@pytest.fixture
def luks2(templates: Path, tmp_path: Path) -> Real:
    return Real(Path(shutil.copy(templates / "luks2", tmp_path / "disk")))


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """All that is run; none of it shows a key."""
    ran: list[list[str]] = []
    run = adapter.run

    async def recorded(argv: Any, **more: Any) -> Any:
        ran.append(list(argv))
        done = await run(argv, **more)
        assert "canary" not in done.out + done.err
        return done

    monkeypatch.setattr(adapter, "run", recorded)
    yield ran
    assert "canary" not in str(ran)


def test_which_slot_a_key_opens(real: Real) -> None:
    assert real.slot_of(FIRST) == 0
    assert real.slot_of(SECOND) == 1
    assert real.slot_of(WRONG) is None


def test_what_is_listed(real: Real) -> None:
    listed = real.do(lambda keys: keys.listed("mail"))
    assert [(slot["kdf"], slot["iterations"]) for slot in listed["slots"]] == [("pbkdf2", 1000)] * 2
    assert {slot["opened_by"] for slot in listed["slots"]} == {"random key"}


def test_a_key_that_opens_no_data_is_no_way_in(luks2: Real, tmp_path: Path) -> None:
    third = file(tmp_path, "third", THIRD)
    unbound = ["--unbound", "--key-size=256", *CHEAP]
    cryptsetup("luksAddKey", *unbound, str(luks2.path), third)
    assert "2: luks2 (unbound)" in cryptsetup("luksDump", str(luks2.path))
    assert luks2.slots() == [0, 1]
    assert luks2.slot_of(THIRD) is None


def test_tokens_are_listed(luks2: Real) -> None:
    text = '{"type": "clevis", "keyslots": ["1"]}'
    cryptsetup("token", "import", "--token-id=3", "--json-file=-", str(luks2.path), key=text)
    listed = luks2.do(lambda keys: keys.listed("mail"))
    assert [slot["opened_by"] for slot in listed["slots"]] == ["random key", "clevis"]
    assert listed["tokens"] == [{"token": 3, "kind": "clevis", "slots": [1], "needs_pin": False}]
