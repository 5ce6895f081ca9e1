# SPDX-License-Identifier: LGPL-2.1-or-later
"""cryptsetup's reencryption as the daemon starts it, hears of it, and ends it; what runs is something else here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import lib
from vmcryptd.adapters.luks import mappings, reencrypt
from vmcryptd.adapters.luks.reencrypt import CryptsetupReencryption, complaints, progress, unit
from vmcryptd.adapters.luks.removal import Removal
from vmcryptd.core.errors import BusyError, StorageError, WrongKeyError
from vmcryptd.core.model import Infinity, VolumeSpec
from vmcryptd.posix.run import Completed

MAIL = VolumeSpec("ma+il", "/dev/vg/mail")
LINE = '{"device":"/dev/vdb","device_bytes":"%s","device_size":"200","speed":"5","eta_ms":"5","time_ms":"5"}\n'


@pytest.mark.parametrize(
    ("said", "done"),
    [
        ("", None),
        (LINE % 50, 0.25),
        (LINE % 50 + LINE % 100, 0.5),
        (LINE % 50 + LINE[:30], 0.25),  # it is just being written
        (LINE % 50 + "Device is too small.\n", 0.25),
        (LINE % 201, None),
        (LINE % "many", None),
        ('{"device_bytes":"0","device_size":"0"}\n', None),
        ('{"device_bytes":null,"device_size":"1"}\n["1"]\n{}\n{\n', None),
    ],
)
def test_progress(said: str, done: float | None) -> None:
    assert progress(said) == done


def test_what_is_no_progress_is_a_complaint() -> None:
    assert complaints(f"{LINE % 1}Device is too small.\n\n{LINE % 2}") == "Device is too small."


def test_the_name_of_a_unit() -> None:
    assert unit("cr_mail-1.a") == "vmcryptd-reencrypt-cr_mail-1.a.service"
    assert unit("a+b") == r"vmcryptd-reencrypt-a\x2bb.service"


Runs = Callable[[list[str]], Coroutine[Any, Any, Completed]]


class Site:
    """A runtime directory, and a control group that lists what a test puts into it."""

    def __init__(self, place: Path) -> None:
        self.adapter = CryptsetupReencryption(place / "run", place / "cgroups")
        self.messages = place / "run/reencrypt-ma+il"
        self.messages.parent.mkdir()
        self._group = place / "cgroups" / unit("ma+il") / "cgroup.procs"
        self._group.parent.mkdir(parents=True)
        self.reported: list[float] = []

    def lists(self, *processes: int) -> None:
        self._group.write_text("".join(f"{process}\n" for process in processes))

    async def rotate(self, slot: int | None = 3) -> None:
        key = lib.key("canary")
        try:
            await self.adapter.rotate(MAIL, "mapped", key, slot, self.reported.append)
        finally:
            key.close()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@contextlib.contextmanager
def running(*, deaf: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends on SIGTERM, if it is not deaf."""
    heard = "SIG_IGN" if deaf else "SIG_DFL"
    code = f"import signal; signal.signal(15, signal.{heard}); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_how_it_is_started(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    keys: list[str] = []
    looked = asyncio.Event()

    def on_progress(done: float) -> None:
        site.reported.append(done)
        looked.set()

    async def scene() -> None:
        before = lib.descriptors()

        async def run(argv: list[str], timeout_s: float) -> Completed:
            [path] = [word.removeprefix("--key-file=") for word in argv if "key-file" in word]
            keys.append(Path(path).read_text())
            commands.append(argv)
            assert timeout_s == Infinity
            site.messages.write_text(LINE % 150)
            await looked.wait()
            # From now on only the caller holds the key.
            assert not os.path.exists(path)
            return Completed(0)

        monkeypatch.setattr(reencrypt, "run", run)
        key = lib.key("canary")
        await site.adapter.rotate(MAIL, "mapped", key, 3, on_progress)
        looked.clear()
        header = VolumeSpec("ma+il", "/dev/vg/mail", header="/etc/header")
        await site.adapter.rotate(header, "mapped", key, None, on_progress)
        key.close()
        assert lib.descriptors().keys() == before.keys()

    asyncio.run(scene())
    assert keys == ["canary", "canary"]
    assert set(site.reported) == {0.75}
    first, second = commands
    assert first[: first.index("--")][0] == "systemd-run"
    assert r"--unit=vmcryptd-reencrypt-ma\x2bil.service" in first
    assert f"--property=StandardOutput=append:{site.messages}" in first
    assert first[first.index("--") + 1 :][:4] == [
        "cryptsetup", "reencrypt", "--batch-mode", "--active-name=mapped",
    ]  # fmt: skip
    assert "--key-slot=3" in first
    assert "--resume-only" not in first
    assert {"--resume-only", "--header=/etc/header"} <= set(second)
    assert not any("canary" in word for word in first + second)


def test_how_it_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ""
    code = 0
    let_go: list[list[str]] = []

    async def run(argv: list[str], timeout_s: float) -> Completed:
        if argv[0] == "dmsetup":
            let_go.append(argv)
            return Completed(0)
        site.messages.write_text(said)
        return Completed(code, err="Failed to start")

    monkeypatch.setattr(reencrypt, "run", run)
    asyncio.run(site.rotate())
    code, said = 1, f"{LINE % 7}\nReencryption interrupted.\n"
    asyncio.run(site.rotate())  # stopped on request
    code, said = 1, "No usable keyslot is available.\n"
    with pytest.raises(WrongKeyError):
        asyncio.run(site.rotate())
    code, said = 1, f"{LINE % 7}Failed to write hotzone area.\n"
    with pytest.raises(StorageError, match=r"`cryptsetup reencrypt` .* Failed to write hotzone"):
        asyncio.run(site.rotate())
    code, said = 1, ""
    with pytest.raises(StorageError, match="Failed to start"):
        asyncio.run(site.rotate())
    assert not let_go
    # Killed, it leaves processes waiting for the hotzone.
    code, said = 255, LINE % 7
    with pytest.raises(StorageError, match="`vmcryptctl lock ma.il` and `vmcryptctl unlock ma.il`"):
        asyncio.run(site.rotate())
    assert let_go == [["dmsetup", "wipe_table", "--", "mapped-hotzone-forward"]]
    for said, count in (
        (f"{LINE % 7}Reencryption interrupted.\n", 1),
        (LINE % 200, 1),
        (LINE % 7, 2),
    ):
        site.messages.write_text(said)
        asyncio.run(site.adapter.follow(MAIL, "mapped", site.reported.append))
        assert len(let_go) == count


def test_it_is_found_followed_and_stopped(site: Site) -> None:
    async def scene(process: int) -> None:
        before = lib.descriptors()
        assert not site.adapter.is_running(MAIL)
        await site.adapter.follow(MAIL, "mapped", site.reported.append)
        await site.adapter.stop(MAIL, 0)
        site.lists(process)
        assert site.adapter.is_running(MAIL)
        site.messages.write_text(LINE % 20)
        looked = asyncio.Event()

        def on_progress(done: float) -> None:
            site.reported.append(done)
            looked.set()

        following = asyncio.create_task(site.adapter.follow(MAIL, "mapped", on_progress))
        await looked.wait()
        assert not following.done()
        await site.adapter.stop(MAIL, Infinity)
        await following
        assert site.reported[0] == 0.1
        assert lib.descriptors().keys() == before.keys()

    with running() as process:
        asyncio.run(scene(process.pid))
        assert process.wait() == -15


def test_what_does_not_stop_is_killed(site: Site) -> None:
    with running(deaf=True) as process:
        site.lists(process.pid)
        asyncio.run(site.adapter.stop(MAIL, 0.01))
        assert process.wait() == -9


def test_what_it_says_for_days_takes_no_room(site: Site) -> None:
    site.messages.write_text(LINE % 10 * 1000)
    assert progress(reencrypt._tail(site.messages)) == 0.05
    assert site.messages.stat().st_size == 0


def show_mappings(place: Path, *names: str) -> None:
    """As sysfs shows them; what has a further word in its name is cryptsetup's own."""
    for number, name in enumerate(names):
        directory = place / f"dm-{number}/dm"
        directory.mkdir(parents=True)
        (directory / "name").write_text(f"{name}\n")
        kind = "SUBDEV" if "-" in name else "LUKS2"
        (directory / "uuid").write_text(f"CRYPT-{kind}-1-{name}\n")


def test_what_a_killed_rotation_left_is_removed_with_its_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_mappings(
        tmp_path, "mapped", "mapped-hotzone-forward", "mapped-overlay",
        "other-overlay", "mine", "mine-overlay",
    )  # fmt: skip
    # Such a name, but an ordinary volume.
    (tmp_path / "dm-5/dm/uuid").write_text("CRYPT-LUKS2-1-mine-overlay\n")
    commands: list[str] = []
    code = 0

    async def run(argv: list[str], timeout_s: float) -> Completed:
        commands.append(" ".join(argv))
        return Completed(0 if argv[0] == "cryptsetup" else code)

    monkeypatch.setattr(mappings, "run", run)
    asyncio.run(mappings.Cryptsetup(Removal(tmp_path)).close("mapped"))
    assert commands == [
        "cryptsetup close --batch-mode -- mapped",
        "dmsetup remove --retry -- mapped-overlay",
        "dmsetup remove --retry -- mapped-hotzone-forward",
    ]
    commands.clear()
    asyncio.run(mappings.Cryptsetup(Removal(tmp_path)).close("mine"))
    assert commands == ["cryptsetup close --batch-mode -- mine"]
    code = 1
    with pytest.raises(BusyError, match="mapped-overlay, which a killed key rotation left"):
        asyncio.run(mappings.Cryptsetup(Removal(tmp_path)).close("mapped"))


def test_every_key_of_a_half_rotated_mapping_is_wiped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In panic, when it cannot be closed: it has two parts, and if it was killed, the keys are in a device below."""
    tables = {
        "mapped": "0 200 linear 253:3 0\n",
        "mapped-overlay": "0 50 crypt aes :64:logon:x-d0 0 8:0 64\n50 10 crypt aes :64:logon:x-d0 50 253:2 50\n"
        "60 140 crypt aes :64:logon:x-d1 60 8:0 124\n",
    }
    messages: list[list[str]] = []
    show_mappings(tmp_path, *tables, "other-overlay")

    async def run(argv: list[str], timeout_s: float) -> Completed:
        if argv[1] == "message":
            messages.append(argv[3:])
        return Completed(0, tables[argv[-1]] if argv[1] == "table" else "")

    monkeypatch.setattr(mappings, "run", run)
    asyncio.run(mappings.Cryptsetup(Removal(tmp_path)).wipe("mapped"))
    assert messages == [
        ["mapped-overlay", start, "key", "wipe"] for start in ("0", "50", "60")
    ]  # fmt: skip

    async def fail(argv: list[str], timeout_s: float) -> Completed:
        return Completed(1, err="there is no memory")

    monkeypatch.setattr(mappings, "run", fail)
    with pytest.raises(
        StorageError, match="volume mapped: the key cannot be wiped: there is no memory"
    ):
        asyncio.run(mappings.Cryptsetup(Removal(tmp_path)).wipe("mapped"))
