# SPDX-License-Identifier: LGPL-2.1-or-later
"""State files are written atomically, and a broken file causes a warning only."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from pathlib import Path

import pytest

from vmcryptd.adapters.systemd import state_files
from vmcryptd.adapters.systemd.state_files import StateFiles
from vmcryptd.core.model import Content, Lock, VolumeSpec
from vmcryptd.posix import file_writer


def test_kept(tmp_path: Path) -> None:
    files = StateFiles(tmp_path / "run", tmp_path / "lib")
    assert (files.goals(), files.seen()) == ((), ({}, {}))
    for _ in range(2):
        files.keep_goals(("boot", "unlock:a"))
        files.keep_sources({"a": "exec:/bin/fetch --token x"})
        files.keep_seen({"/srv/x": ("a", "b")}, {"a": "u"})
    asyncio.run(files.kept())
    again = StateFiles(tmp_path / "run", tmp_path / "lib")
    assert again.goals() == ("boot", "unlock:a")
    assert again.sources() == {"a": "exec:/bin/fetch --token x"}
    assert (tmp_path / "run/sources.json").stat().st_mode & 0o077 == 0
    assert again.seen() == ({"/srv/x": ("a", "b")}, {"a": "u"})
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["seen.json"]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", DEEP, '{"goals": 5}', '{"goals": ["a\\nb", 5]}', '{"sources": {"a": "\\ud800"}}',
     '{"paths": {"x": 5}}', '{"paths": {"x": [["a"]]}}', "\xff"],
)  # fmt: skip
def test_broken(tmp_path: Path, text: str) -> None:
    for name in ("goals.json", "seen.json", "sources.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    files = StateFiles(tmp_path, tmp_path)
    assert (files.goals(), files.sources()) == ((), {})
    paths, uuids = files.seen()
    assert (list(paths.values()), uuids) in (([], {}), ([()], {}))


@pytest.mark.timeout(60)
def test_neither_a_fifo_nor_an_endless_file_holds_up_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("goals.json", "seen.json", "sources.json", "fitted.json", "backups.json", "volumes")
    for name in names:
        os.mkfifo(tmp_path / name)
    files = StateFiles(tmp_path, tmp_path)
    assert (files.goals(), files.sources(), files.fitted(), files.backups_due()) == ((), {}, {}, {})
    assert files.seen() == ({}, {})
    assert caplog.text.count("it is no regular file") == 5
    files.keep_goals(["boot"])
    files.publish({"cr_a": True})
    assert (files.goals(), (tmp_path / "volumes").read_text()) == (("boot",), "cr_a\n")
    with (tmp_path / "goals.json").open("wb") as file:
        file.truncate(1 << 40)
    assert files.goals() == ()


def test_the_shutdown_hook_has_its_list_whatever_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "guest-content").touch()
    StateFiles(tmp_path, tmp_path).publish({"cr_b": True, "cr_a": False})
    assert (tmp_path / "volumes").read_text() == "cr_a\ncr_b\n"


def test_guests_to_be_started_at_the_next_boot_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot_id = tmp_path / "boot_id"
    monkeypatch.setattr(state_files, "BOOT_ID", boot_id)
    files = StateFiles(tmp_path, tmp_path)
    boot_id.write_text("first\n")
    assert files.due_once() == ()
    files.keep_once(["a", "b"], [])
    asyncio.run(files.kept())
    assert files.due_once() == ()
    boot_id.write_text("second\n")
    assert files.due_once() == ("a", "b")
    files.keep_once(["c"], ["b"])  # libvirt has forgotten a and b, and a runs
    asyncio.run(files.kept())
    assert files.due_once() == ("b",)
    boot_id.write_text("third\n")
    assert files.due_once() == ("b", "c")
    (tmp_path / "once.json").write_text('{"due": 5, "marked": "x"}')
    assert files.due_once() == ()


def test_slots_that_fitted(tmp_path: Path) -> None:
    files = StateFiles(tmp_path, tmp_path)
    assert files.fitted() == {}
    files.keep_fitted({"a": {"exec:/bin/fetch --token x": 1}})
    asyncio.run(files.kept())
    assert StateFiles(tmp_path, tmp_path).fitted() == {"a": {"exec:/bin/fetch --token x": 1}}
    path = tmp_path / "fitted.json"
    assert path.stat().st_mode & 0o077 == 0  # arguments of fetchers may hold tokens
    path.write_text('{"volumes": {"a": {"prompt": true, "key": "1", "file:/k": 2}, "b": 3}}')
    assert files.fitted() == {"a": {"file:/k": 2}, "b": {}}


def test_open_volumes(tmp_path: Path) -> None:
    files = StateFiles(tmp_path, tmp_path)
    assert files.open_volumes() == {}
    whole = VolumeSpec(
        "a",
        "/dev/a",
        uuid="u-u",
        lock=Lock.MANUAL,
        content=Content.FILESYSTEM,
        mount="/srv",
        header="/h",
    )
    files.keep_open({"a": whole, "b": VolumeSpec("b", "UUID=x", uuid="x", vg="v")})
    assert StateFiles(tmp_path, tmp_path).open_volumes() == {
        "a": whole, "b": VolumeSpec("b", "UUID=x", uuid="x", vg="v"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "entry",
    ["5", "{}", '{"device": "/dev/a"}', '{"device": 5, "uuid": "u", "lock": "x", "content": "x"}'],
)
def test_an_open_volume_that_is_not_understood(tmp_path: Path, entry: str) -> None:
    sound = '{"device": "/dev/b", "uuid": "u", "lock": "guest", "content": "lvm"}'
    (tmp_path / "open.json").write_text(f'{{"volumes": {{"a": {entry}, "b": {sound}}}}}')
    assert list(StateFiles(tmp_path, tmp_path).open_volumes()) == ["b"]


def test_unwritable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        StateFiles(tmp_path / "file", tmp_path / "file").keep_goals(["boot"])
    assert "cannot be written" in caplog.text


def test_a_disk_that_does_not_answer_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call returns though nothing is written; when the disk answers, the latest is what is there."""
    answers, asked = threading.Event(), threading.Event()
    written: list[tuple[str, bytes]] = []

    def slowly(path: Path, content: bytes, mode: int) -> None:
        asked.set()
        assert answers.wait(60)
        written.append((path.name, content))
        right(path, content, mode)

    right = file_writer.write_atomically
    monkeypatch.setattr(file_writer, "write_atomically", slowly)
    monkeypatch.setattr(state_files, "KEPT_S", 0.01)
    run, lib = tmp_path / "run", tmp_path / "lib"
    files = StateFiles(run, lib)
    files.keep_seen({}, {"a": "first"})
    assert asked.wait(60)
    for uuid in ("second", "third"):
        files.keep_seen({}, {"a": uuid})
        files.keep_fitted({"a": {uuid: 1}})
    asyncio.run(files.kept())
    assert f"{lib}: what is kept there was not written" in caplog.text
    answers.set()
    monkeypatch.setattr(state_files, "KEPT_S", 60)
    asyncio.run(files.kept())
    assert [name for name, _ in written] == ["seen.json", "seen.json", "fitted.json"]
    again = StateFiles(run, lib)
    assert (again.seen(), again.fitted()) == (({}, {"a": "third"}), {"a": {"third": 1}})


def test_what_cannot_be_written_does_not_hold_up_what_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "seen.json").mkdir()
    files = StateFiles(tmp_path, tmp_path)
    files.keep_seen({}, {"a": "u"})
    files.keep_fitted({"a": {"prompt": 1}})
    asyncio.run(files.kept())
    assert "seen.json cannot be written" in caplog.text
    assert StateFiles(tmp_path, tmp_path).fitted() == {"a": {"prompt": 1}}
