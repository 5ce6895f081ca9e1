# SPDX-License-Identifier: LGPL-2.1-or-later
"""A change of any file of the configuration is noticed, however it was made."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vmcryptd import daemon
from vmcryptd.config import files
from vmcryptd.core.model import DaemonSpec, Settings
from vmcryptd.posix import file_watch
from vmcryptd.posix.file_watch import FileWatch

PATIENCE_S = 30.0
Texts = Mapping[str, str] | None

CHANGES: dict[str, Callable[[Path], object]] = {
    "written": lambda etc: (etc / "vmcryptd.toml").write_text("# 2"),
    "replaced": lambda etc: ((etc / "new").write_text("# 2"), (etc / "new").rename(etc / "vmcryptd.toml")),
    "removed": lambda etc: (etc / "vmcryptd.toml").unlink(),
    "a drop-in": lambda etc: (etc / "conf.d/b.toml").write_text("# 2"),
    "a drop-in moved away": lambda etc: (etc / "conf.d/a.toml").rename(etc / "a"),
    "what a link leads to": lambda etc: (etc.parent / "target").write_text("# 2"),
    "a link": lambda etc: ((etc / "conf.d/l.toml").unlink(), (etc / "conf.d/l.toml").symlink_to("/none")),
    "another folder in the place": lambda etc: (
        (etc / "conf.d").rename(etc / "old"),
        (etc / "conf.d").mkdir(),
        (etc / "conf.d/c.toml").write_text("# 2"),
    ),
    "all of it": lambda etc: etc.rename(etc.parent / "old"),
}  # fmt: skip


class Looks:
    """The configuration below a directory, watched."""

    def __init__(self, etc: Path) -> None:
        self.found: list[Texts] = []
        self._news = asyncio.Event()
        self.source = daemon.Source(etc, lambda: files.read(etc), files.settings)
        self.source.load()
        self.source.taken_over()
        self.watch = FileWatch(self.source.watched, self.source.texts, self._looked)
        self.watch.start()

    def _looked(self, texts: Texts) -> None:
        self.found.append(texts)
        self._news.set()

    async def until(self, differs: bool) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not self.found or self.source.differs(self.found[-1]) is not differs:
                self._news.clear()
                await self._news.wait()


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    etc = tmp_path / "etc"
    (etc / "conf.d").mkdir(parents=True)
    (tmp_path / "target").write_text("# 1")
    (etc / "vmcryptd.toml").write_text("# 1")
    (etc / "conf.d" / "a.toml").write_text("# 1")
    (etc / "conf.d" / "l.toml").symlink_to(tmp_path / "target")
    return etc


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(etc: Path, change: str) -> None:
    async def scene() -> None:
        before = len(os.listdir("/proc/self/fd"))
        looks = Looks(etc)
        await looks.until(False)
        CHANGES[change](etc)
        await looks.until(True)
        async with asyncio.timeout(PATIENCE_S):
            while looks.watch._looking is not None:  # a thread that still looks holds the instance
                await asyncio.sleep(0.001)
        looks.watch.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(scene())


def test_a_directory_that_is_made_later(tmp_path: Path) -> None:
    async def scene() -> None:
        looks = Looks(tmp_path / "etc")
        await looks.until(False)
        (tmp_path / "etc" / "conf.d").mkdir(parents=True)
        (tmp_path / "etc" / "conf.d" / "a.toml").write_text("# 1")
        await looks.until(True)
        looks.source.load()
        looks.source.taken_over()
        (tmp_path / "etc" / "conf.d" / "a.toml").write_text("# 2")
        await looks.until(True)
        looks.watch.close()

    asyncio.run(scene())


def test_a_change_that_is_taken_back_and_one_before_the_first_look(etc: Path) -> None:
    async def scene() -> None:
        looks = Looks(etc)
        (etc / "vmcryptd.toml").write_text("# 2")
        await looks.until(True)
        (etc / "vmcryptd.toml").write_text("# 1")
        await looks.until(False)
        looks.watch.close()

    asyncio.run(scene())


def test_the_loop_goes_on_while_the_configuration_is_read_again(tmp_path: Path) -> None:
    turned = threading.Event()

    def turn() -> None:
        assert turned.wait(PATIENCE_S), "the loop stood still"
        turned.clear()

    def read() -> dict[str, str]:
        turn()
        return {}

    def parse(texts: Mapping[str, str]) -> Settings:
        turn()
        return Settings()

    source = daemon.Source(tmp_path, read, parse)

    async def scene() -> None:
        loading = asyncio.create_task(source.load_again())
        while not loading.done():
            turned.set()
            await asyncio.sleep(0.001)
        assert loading.result() == Settings()

    asyncio.run(scene())


def test_an_older_text_is_not_taken_over(tmp_path: Path) -> None:
    """The daemon reads the files itself when it has made a keystore, which may be in the middle of a reload."""
    texts, begun, parsed = {"x": "old"}, threading.Event(), threading.Event()

    def parse(given: Mapping[str, str]) -> Settings:
        if given["x"] == "old":
            begun.set()
            parsed.wait(PATIENCE_S)
        return Settings(DaemonSpec(libvirt_uri=given["x"]))

    source = daemon.Source(tmp_path, lambda: dict(texts), parse)

    async def scene() -> None:
        loading = asyncio.create_task(source.load_again())
        async with asyncio.timeout(PATIENCE_S):
            while not begun.is_set():
                await asyncio.sleep(0.001)
        texts["x"] = "new"
        source.load()
        source.taken_over()
        parsed.set()
        assert (await loading).daemon.libvirt_uri == "new"
        source.taken_over()
        assert not source.differs(texts)

    asyncio.run(scene())


def test_without_inotify_there_is_one_look(
    etc: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(file_watch.Inotify, "open", none_left)

    async def scene() -> None:
        looks = Looks(etc)
        (etc / "vmcryptd.toml").write_text("# 2")
        await looks.until(True)
        (etc / "vmcryptd.toml").write_text("# 1")
        looks.watch.look_again()  # as a reload does
        await looks.until(False)
        looks.watch.close()

    asyncio.run(scene())
    assert "changed files are not noticed" in caplog.text


def test_other_files_are_nobodys_business(etc: Path) -> None:
    async def scene() -> None:
        looks = Looks(etc)
        await looks.until(False)
        (etc / "keys").mkdir()
        (etc / "keys" / "imap").write_text("x")
        (etc / "conf.d" / "README").write_text("x")
        (etc / "vmcryptd.toml").write_text("# 2")
        await looks.until(True)
        assert [looks.source.differs(texts) for texts in looks.found[:-1]].count(True) == 0
        looks.watch.close()

    asyncio.run(scene())
