# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keystores made with the real cryptsetup, but for the mapping, which only virtual machines have."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lib import Host, handed_in
from vmcryptd.adapters.luks import format as formatting
from vmcryptd.adapters.luks.format import CryptsetupFormatting
from vmcryptd.config import files, schema
from vmcryptd.config.tables import Tables
from vmcryptd.core import keystores
from vmcryptd.core.errors import (
    BusyError,
    CancelledError,
    ConfigError,
    OptionError,
    StorageError,
    VmcryptdError,
)
from vmcryptd.core.keystores import Making
from vmcryptd.engine.engine import Engine
from vmcryptd.posix import run as runner

PASSPHRASE = "canary-keystore-77aa"
CRYPTSETUP, WIPEFS = shutil.which("cryptsetup"), shutil.which("wipefs")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not CRYPTSETUP or not WIPEFS, reason="needs root and cryptsetup"
)

# A mapping is a file here. The maker of the file system checks that it exists, and may fail or hang.
STAND_IN = """#!/bin/sh
echo "${{0##*/}} $*" >>{place}/log
case ${{0##*/}} in
mkfs.ext4)
    if [ -e {place}/hang ]; then : >{place}/hanging; sleep 600; fi
    [ -e "$4" ] && [ ! -e {place}/no-mkfs ] && exit 0
    echo "no file system today" >&2
    exit 1 ;;
esac
action=$1
shift
case $action in
luksFormat) exec {cryptsetup} luksFormat --pbkdf=pbkdf2 --pbkdf-force-iterations=1000 "$@" ;;
luksUUID) exec {cryptsetup} luksUUID "$@" ;;
open)
    {cryptsetup} open --test-passphrase "$@" || exit
    for name; do :; done
    : >{place}/mapper/"$name" ;;
esac
"""


class Place:
    """Directories of this test's own, and what was run in them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.configuration = path / "etc"
        self.file = path / "keys.luks"
        for name in ("bin", "mapper", "etc"):
            (path / name).mkdir()
        for name in ("cryptsetup", "mkfs.ext4"):
            program = path / "bin" / name
            program.write_text(STAND_IN.format(place=path, cryptsetup=CRYPTSETUP))
            program.chmod(0o755)
        self.host = StandIn.parse('[volume.mail]\ndevice = "/dev/vg/mail"\n')
        self.host.place = path

    @property
    def table(self) -> Path:
        return self.configuration / "conf.d/keys.toml"

    @property
    def log(self) -> str:
        log = self.path / "log"
        return log.read_text() if log.exists() else ""

    def engine(self) -> Engine:
        ports = replace(
            self.host.ports(),
            formatting=CryptsetupFormatting(),
            tables=Tables(self.configuration),
        )
        engine = Engine(self.host.settings, ports)
        engine.start()
        return engine

    async def create(self, passphrase: str = PASSPHRASE, **options: Any) -> None:
        engine = self.engine()
        try:
            job = await engine.keystores.create("keys", handed_in(passphrase), options)
            await engine.scheduler.wait(job)
        finally:
            engine.close()
            await engine.background_done()

    def is_untouched(self) -> bool:
        """Nothing is left of an attempt."""
        left = [*(self.path / "mapper").iterdir(), *self.configuration.rglob("*.toml")]
        left += self.configuration.rglob(".*")
        return not left and not self.file.exists() and not self.host.making()


class StandIn(Host):
    """Closes the mappings that are files."""

    place: Path

    async def close(self, mapping: str) -> None:
        (self.place / "mapper" / mapping).unlink(missing_ok=True)
        await super().close(mapping)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place(tmp_path)
    monkeypatch.setattr(runner, "DIRECTORIES", (str(tmp_path / "bin"), *runner.DIRECTORIES))
    monkeypatch.setattr(formatting, "MAPPINGS", str(tmp_path / "mapper"))
    # The tests' own directory is below /tmp.
    monkeypatch.setattr(keystores, "SWEPT", ("/run", f"{tmp_path}/swept"))
    yield place
    assert "canary" not in place.log


def refused(kind: type[VmcryptdError], text: str, attempt: Coroutine[Any, Any, None]) -> None:
    with pytest.raises(kind, match=text):
        asyncio.run(attempt)


def test_in_a_file(place: Place) -> None:
    asyncio.run(place.create(file=str(place.file), size=24 << 20))
    assert (place.file.stat().st_size, place.file.stat().st_mode & 0o777) == (24 << 20, 0o600)
    assert place.file.stat().st_blocks * 512 >= 24 << 20  # no disk that is full can take them
    [spec] = schema.parse(files.read(place.configuration)).volumes.values()
    assert (spec.name, spec.device, spec.mount) == (
        "keys",
        str(place.file),
        "/run/vmcryptd-keystore/keys",
    )
    assert (str(spec.content), str(spec.lock), spec.asks) == ("filesystem", "boot", True)
    uuid = subprocess.run(
        ["cryptsetup", "luksUUID", str(place.file)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    assert spec.uuid == uuid
    assert [line.split()[:2] for line in place.log.splitlines()] == [
        ["cryptsetup", "luksFormat"], ["cryptsetup", "open"], ["mkfs.ext4", "-q"],
    ]  # fmt: skip
    assert list((place.path / "mapper").iterdir()) == []
    assert place.table.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in place.table.parent.iterdir()] == ["keys.toml"]
    assert not place.host.making()


def test_the_passphrase_is_all_that_the_descriptor_gives(place: Place) -> None:
    asyncio.run(place.create(PASSPHRASE + "\n", file=str(place.file)))
    argv = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(place.file)]
    for passphrase, code in ((PASSPHRASE + "\n", 0), (PASSPHRASE, 2)):
        assert subprocess.run(argv, input=passphrase.encode(), check=False).returncode == code


@pytest.mark.parametrize("fault", ["mkfs", "configuration", "reload", "taken"])
def test_what_fails_leaves_nothing(fault: str, place: Place) -> None:
    async def attempt() -> None:
        engine = place.engine()
        if fault == "reload":

            async def refuse() -> None:
                raise ConfigError("the whole is refused")

            engine.keystores.read_again = refuse
        job = await engine.keystores.create(
            "keys", handed_in(PASSPHRASE), {"file": str(place.file)}
        )
        if fault == "taken":
            place.file.write_text("precious")
        try:
            await engine.scheduler.wait(job)
        finally:
            engine.close()
            await engine.background_done()

    new = place.table.with_name(f".{place.table.name}.new")
    if fault == "mkfs":
        (place.path / "no-mkfs").touch()
    elif fault == "configuration":
        new.mkdir(parents=True)
    kind, text = {
        "mkfs": (StorageError, "no file system today"),
        "configuration": (ConfigError, "cannot be written"),
        "reload": (ConfigError, "the whole is refused"),
        "taken": (StorageError, "is there already; nothing is overwritten"),
    }[fault]
    refused(kind, text, attempt())
    if fault == "configuration":
        new.rmdir()
    elif fault == "taken":
        assert place.file.read_text() == "precious"
        place.file.unlink()
    assert place.is_untouched()


@pytest.mark.parametrize("down", ["panic", "shutdown", "lock_all"])
def test_nothing_is_made_once_everything_goes_down(down: str, place: Place) -> None:
    async def attempt() -> None:
        (place.path / "hang").touch()
        engine = place.engine()
        job = await engine.keystores.create(
            "keys", handed_in(PASSPHRASE), {"file": str(place.file)}
        )
        while not (place.path / "hanging").exists():
            await asyncio.sleep(0.01)
        await getattr(engine, down)()
        assert not engine.jobs
        assert place.is_untouched()
        try:
            await engine.scheduler.wait(job)
        finally:
            engine.close()
            await engine.background_done()

    refused(CancelledError, "keystore keys was not made", attempt())


def test_a_daemon_that_is_killed_leaves_nothing_behind(place: Place) -> None:
    """Whatever was written when it died, the next one takes back, and nothing else."""

    async def died_with(made: Callable[[str], object]) -> Engine:
        await place.create(file=str(place.file))
        uuid = tomllib.loads(place.table.read_text())["volume"]["keys"]["uuid"]
        made(uuid)
        place.host.keep_making([Making("keys", str(place.file), uuid, True)])
        engine = place.engine()
        await engine.background_done()
        engine.close()
        return engine

    # The file had its name, and the table was not written.
    asyncio.run(died_with(lambda uuid: place.table.unlink()))
    assert place.is_untouched()

    # The table was written: it was finished.
    asyncio.run(died_with(lambda uuid: None))
    assert place.file.exists()
    assert place.table.exists()
    assert not place.host.making()

    # Another file has the name by now.
    def replaced(uuid: str) -> None:
        place.table.unlink()
        place.file.unlink()
        place.file.write_text("precious")

    place.table.unlink()
    place.file.unlink()
    asyncio.run(died_with(replaced))
    assert place.file.read_text() == "precious"
    assert not place.host.making()


def test_nothing_is_overwritten(place: Place) -> None:
    file = str(place.file)
    place.file.write_text("precious")
    refused(StorageError, "is there already", place.create(file=file))
    assert place.file.read_text() == "precious"
    place.file.unlink()
    place.file.symlink_to(place.path / "target")
    refused(StorageError, "is there already", place.create(file=file))
    place.file.unlink()
    (place.path / "mapper/keys").touch()
    refused(BusyError, "volume keys: a mapping has this name already", place.create(file=file))
    (place.path / "mapper/keys").unlink()
    (place.configuration / "vmcryptd.toml").write_text('[volume.keys]\ndevice = "/dev/x"\n')
    refused(ConfigError, "keys", place.create(file=file))
    (place.configuration / "vmcryptd.toml").unlink()
    refused(StorageError, "cannot be made", place.create(file="/nowhere/keys"))
    assert place.is_untouched()
    asyncio.run(place.create(file=file))
    before = place.file.read_bytes(), place.table.read_text()
    refused(ConfigError, "is there already", place.create(file=file))
    assert (place.file.read_bytes(), place.table.read_text()) == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"file": "keys"},
        {"file": "/x/../y"},
        {"file": "/x", "device": "/dev/x"},
        {"file": "/x", "size": 19 << 20},
        {"file": "/x", "size": 1 << 60},
        {"file": "/x", "size": "32M"},
        {"device": "/dev/x", "size": 32 << 20},
        {"file": "/x", "mount": "keys"},
        {"file": "/x", "cipher": "null"},
        {"file": "/x\n"},
        {"file": "/var/lib/vmcryptd/keys.luks"},
        {"file": "/run/keys.luks"},
        {"file": "/tmp/keys.luks"},
        {"file": "/srv/keys.luks", "mount": "/run/vmcryptd/keys"},
        {"device": "/dev/vg/keys", "mount": "/var/tmp/keys"},
    ],
)
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="keystore keys: "):
        keystores.wanted("keys", options, "uuid")


def test_a_link_does_not_lead_where_files_are_swept(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("/var/lib/vmcryptd")
    monkeypatch.setattr(keystores, "SWEPT", ("/var/lib/vmcryptd",))
    attempt = place.create(file=f"{tmp_path}/link/keys.luks")
    refused(OptionError, "/var/lib/vmcryptd do not stay", attempt)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """An empty block device."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 32 << 20)
    argv = ["losetup", "--find", "--show", str(image)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no loop device can be had here")
    yield done.stdout.strip()
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_on_a_device(place: Place, device: str) -> None:
    asyncio.run(place.create(device=device, mount="/run/somewhere"))
    table = tomllib.loads(place.table.read_text())["volume"]["keys"]
    assert (table["device"], table["mount"]) == (device, "/run/somewhere")
    subprocess.run(["cryptsetup", "isLuks", device], check=True)


def test_a_device_that_is_not_empty_is_left_alone(place: Place, device: str) -> None:
    subprocess.run(["mkswap", device], check=True, stdout=subprocess.DEVNULL)
    before = Path(device).read_bytes()
    refused(StorageError, f"{device} is not empty", place.create(device=device))
    refused(StorageError, "is no block device", place.create(device="/dev/null"))
    assert Path(device).read_bytes() == before
    assert place.is_untouched()


def test_a_device_is_empty_again_when_it_fails(place: Place, device: str) -> None:
    (place.path / "no-mkfs").touch()
    refused(StorageError, "no file system today", place.create(device=device))
    (place.path / "no-mkfs").unlink()
    asyncio.run(place.create(device=device))
