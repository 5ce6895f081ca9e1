# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl keystore init` with the real cryptsetup, but for the mapping, which only virtual machines have."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bus.test_service import Daemon, start
from vmcryptd.cli import keystore, main
from vmcryptd.config import files, schema
from vmcryptd.posix import run as runner

__all__ = ["start"]  # a fixture

PASSPHRASE = "canary-keystore-77aa"
CRYPTSETUP, WIPEFS = shutil.which("cryptsetup"), shutil.which("wipefs")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not CRYPTSETUP or not WIPEFS, reason="needs root and cryptsetup"
)

# A mapping is a file here. Whoever makes a file system sees that it is there, and may fail.
STAND_IN = """#!/bin/sh
echo "${{0##*/}} $*" >>{place}/log
case ${{0##*/}} in
mkfs.ext4)
    [ -e "$4" ] && [ ! -e {place}/no-mkfs ] && exit 0
    echo "no file system today" >&2
    exit 1 ;;
esac
action=$1
shift
case $action in
luksFormat) exec {cryptsetup} luksFormat --pbkdf=pbkdf2 --pbkdf-force-iterations=1000 "$@" ;;
open)
    {cryptsetup} open --test-passphrase "$@" || exit
    for name; do :; done
    : >{place}/mapper/"$name" ;;
close)
    for name; do :; done
    rm {place}/busy 2>/dev/null && exit 5
    rm {place}/mapper/"$name" ;;
esac
"""


class Place:
    """Directories of this test's own, and what was run in them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.configuration = path / "etc"
        self.file = path / "keys.luks"
        self.key = path / "key"
        self.key.write_text(PASSPHRASE)
        for name in ("bin", "mapper", "etc"):
            (path / name).mkdir()
        for name in ("cryptsetup", "mkfs.ext4"):
            program = path / "bin" / name
            program.write_text(STAND_IN.format(place=path, cryptsetup=CRYPTSETUP))
            program.chmod(0o755)

    @property
    def table(self) -> Path:
        return self.configuration / "conf.d/keys.toml"

    @property
    def log(self) -> str:
        log = self.path / "log"
        return log.read_text() if log.exists() else ""

    async def init(self, *arguments: str) -> int:
        argv = ["keystore", "init", "keys", *arguments, "--key-file", str(self.key)]
        return await asyncio.to_thread(main.main, argv)

    def is_untouched(self) -> bool:
        """Nothing is left of an attempt."""
        left = [*(self.path / "mapper").iterdir(), *self.configuration.rglob("*.toml")]
        left += self.configuration.rglob(".*")
        return not left and not self.file.exists()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place(tmp_path)
    monkeypatch.setattr(runner, "DIRECTORIES", (str(tmp_path / "bin"), *runner.DIRECTORIES))
    monkeypatch.setattr(files, "DIRECTORY", place.configuration)
    monkeypatch.setattr(keystore, "MAPPINGS", tmp_path / "mapper")
    # The tests' own directory is below /tmp.
    monkeypatch.setattr(keystore, "SWEPT", ("/run", f"{tmp_path}/swept"))
    yield place
    assert "canary" not in place.log


HOST = '[volume.mail]\ndevice = "/dev/vg/mail"\n'
Scene = Callable[[Daemon], Any]


def played(start: Any, run: Any, scene: Scene) -> None:
    async def test() -> None:
        async with start(HOST) as daemon:
            await scene(daemon)

    run(test())


def test_in_a_file(start: Any, run: Any, place: Place, capfd: Any) -> None:
    async def scene(daemon: Daemon) -> None:
        assert await place.init("--file", str(place.file), "--size", "24M") == 0

    played(start, run, scene)
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
        ["cryptsetup", "luksFormat"], ["cryptsetup", "open"], ["mkfs.ext4", "-q"], ["cryptsetup", "close"],
    ]  # fmt: skip
    assert list((place.path / "mapper").iterdir()) == []
    assert place.table.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in place.table.parent.iterdir()] == ["keys.toml"]
    assert "vmcryptctl key add VOLUME --keystore keys" in capfd.readouterr().err


def test_the_passphrase_is_the_whole_file(start: Any, run: Any, place: Place) -> None:
    place.key.write_text(PASSPHRASE + "\n")

    async def scene(daemon: Daemon) -> None:
        assert await place.init("--file", str(place.file)) == 0

    played(start, run, scene)
    argv = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(place.file)]
    for passphrase, code in ((PASSPHRASE + "\n", 0), (PASSPHRASE, 2)):
        assert subprocess.run(argv, input=passphrase.encode(), check=False).returncode == code


@pytest.mark.parametrize("fault", ["mkfs", "reload", "configuration"])
def test_what_fails_leaves_nothing(
    fault: str, start: Any, run: Any, place: Place, capfd: Any
) -> None:
    async def scene(daemon: Daemon) -> None:
        if fault == "mkfs":
            (place.path / "no-mkfs").touch()
        elif fault == "reload":
            daemon.sim.write_text("[")
        else:
            place.table.with_name(f".{place.table.name}.new").mkdir(parents=True)
        code = await place.init("--file", str(place.file))
        assert code == (1 if fault == "mkfs" else 2)

    played(start, run, scene)
    if fault == "configuration":
        place.table.with_name(f".{place.table.name}.new").rmdir()
    assert place.is_untouched()
    said = {
        "mkfs": "no file system today",
        "reload": "not valid TOML",
        "configuration": "cannot be written",
    }
    assert said[fault] in capfd.readouterr().err


def test_udev_looks_at_the_new_file_system(start: Any, run: Any, place: Place) -> None:
    """For a moment, in which the mapping cannot be closed."""
    (place.path / "busy").touch()

    async def scene(daemon: Daemon) -> None:
        assert await place.init("--file", str(place.file)) == 0

    played(start, run, scene)
    assert not (place.path / "busy").exists()
    assert list((place.path / "mapper").iterdir()) == []


def test_what_cannot_be_made_is_told_before_anybody_types(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def changing() -> None:
        raise AssertionError("a connection is made, and then somebody is asked")

    monkeypatch.setattr(keystore, "changing", changing)
    place.file.write_text("precious")
    for arguments, text in (
        (("--file", str(place.file)), f"{place.file} is there already"),
        (("--device", str(place.key)), f"{place.key} is no block device"),
    ):
        assert asyncio.run(place.init(*arguments)) == 1
        assert text in capfd.readouterr().err


def test_nothing_is_overwritten(start: Any, run: Any, place: Place) -> None:
    async def scene(daemon: Daemon) -> None:
        place.file.write_text("precious")
        assert await place.init("--file", str(place.file)) == 1
        assert place.file.read_text() == "precious"
        place.file.unlink()
        place.file.symlink_to(place.path / "target")
        assert await place.init("--file", str(place.file)) == 1
        place.file.unlink()
        (place.path / "mapper/keys").touch()
        assert await place.init("--file", str(place.file)) == 1
        (place.path / "mapper/keys").unlink()
        (place.configuration / "vmcryptd.toml").write_text('[volume.keys]\ndevice = "/dev/x"\n')
        assert await place.init("--file", str(place.file)) == 2
        (place.configuration / "vmcryptd.toml").unlink()
        assert await place.init("--file", "/nowhere/keys") == 1
        assert place.is_untouched()
        assert await place.init("--file", str(place.file)) == 0
        before = place.file.read_bytes(), place.table.read_text()
        assert await place.init("--file", str(place.file)) == 2
        assert (place.file.read_bytes(), place.table.read_text()) == before

    played(start, run, scene)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--file", "keys"],
        ["--file", "/x/../y"],
        ["--file", "/x", "--device", "/dev/x"],
        ["--file", "/x", "--size", "19M"],
        ["--file", "/x", "--size", "much"],
        ["--device", "/dev/x", "--size", "32M"],
        ["--file", "/x", "--mount", "keys"],
    ],
)
def test_usage(arguments: list[str], place: Place) -> None:
    assert asyncio.run(place.init(*arguments)) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--file", "/var/lib/vmcryptd/keys.luks"],
        ["--file", "/run/keys.luks"],
        ["--file", "/tmp/keys.luks"],
        ["--file", "LINK/keys.luks"],
        ["--file", "/srv/keys.luks", "--mount", "/run/vmcryptd/keys"],
        ["--device", "/dev/vg/keys", "--mount", "/var/tmp/keys"],
    ],
)
def test_keys_are_put_nowhere_that_is_swept(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "link").symlink_to("/var/lib/vmcryptd")
    # The tests' own directory is below /tmp.
    kept = tuple(name for name in keystore.SWEPT if name != "/tmp" or "/tmp/keys.luks" in arguments)
    monkeypatch.setattr(keystore, "SWEPT", kept)
    arguments = [text.replace("LINK", f"{tmp_path}/link") for text in arguments]
    assert main.main(["keystore", "init", "keys", *arguments]) == 2
    assert "do not stay" in capfd.readouterr().err


def test_without_a_daemon_nothing_is_made(place: Place) -> None:
    assert asyncio.run(place.init("--file", str(place.file))) == 5
    assert place.is_untouched()


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


def test_on_a_device(start: Any, run: Any, place: Place, device: str) -> None:
    async def scene(daemon: Daemon) -> None:
        assert await place.init("--device", device, "--mount", "/run/somewhere") == 0

    played(start, run, scene)
    table = tomllib.loads(place.table.read_text())["volume"]["keys"]
    assert (table["device"], table["mount"]) == (device, "/run/somewhere")
    subprocess.run(["cryptsetup", "isLuks", device], check=True)


def test_a_device_that_is_not_empty_is_left_alone(
    start: Any, run: Any, place: Place, device: str, capfd: Any
) -> None:
    subprocess.run(["mkswap", device], check=True, stdout=subprocess.DEVNULL)
    before = Path(device).read_bytes()

    async def scene(daemon: Daemon) -> None:
        assert await place.init("--device", device) == 1
        assert await place.init("--device", str(place.key)) == 1
        assert await place.init("--device", "/dev/null") == 1

    played(start, run, scene)
    assert Path(device).read_bytes() == before
    assert place.is_untouched()
    assert f"{device} is not empty (" in capfd.readouterr().err


def test_a_device_is_empty_again_when_it_fails(
    start: Any, run: Any, place: Place, device: str
) -> None:
    (place.path / "no-mkfs").touch()

    async def scene(daemon: Daemon) -> None:
        assert await place.init("--device", device) == 1
        (place.path / "no-mkfs").unlink()
        assert await place.init("--device", device) == 0

    played(start, run, scene)
