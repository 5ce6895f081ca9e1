# SPDX-License-Identifier: LGPL-2.1-or-later
"""A new file for a keystore: whole before it has a name, and never made by the event loop itself."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vmcryptd.adapters.luks.format import CryptsetupFormatting
from vmcryptd.core.errors import StorageError


def test_its_file_system_may_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question to it waits in a thread."""
    main, asked = threading.main_thread(), []

    def beside(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            if str(tmp_path) in map(str, arguments) or str(path) in map(str, arguments):
                assert threading.current_thread() is not main
                asked.append(name)
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    path = tmp_path / "keystore"
    for name in ("open", "link", "unlink"):
        beside(name)

    async def test() -> None:
        formatting = CryptsetupFormatting()
        fd = await formatting.new_file(str(path), 1 << 20)
        assert not path.exists()
        await formatting.name_file(fd, str(path))
        assert path.stat().st_size == 1 << 20
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(StorageError, match="is there already"):
            await formatting.name_file(fd, str(path))
        os.close(fd)

    asyncio.run(test())
    assert {"open", "link"} <= set(asked)


def test_nothing_is_left_of_one_that_nobody_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, allocate = threading.Event(), threading.Event(), os.posix_fallocate

    def slow(*arguments: int) -> None:
        begun.set()
        go_on.wait(60)
        allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", slow)
    before = os.listdir("/proc/self/fd")

    others = set(threading.enumerate())

    async def test() -> None:
        making = asyncio.create_task(CryptsetupFormatting().new_file(str(tmp_path / "k"), 4096))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        making.cancel()
        await asyncio.wait({making})
        go_on.set()
        while set(threading.enumerate()) - others:
            await asyncio.sleep(0.001)

    asyncio.run(test())
    assert os.listdir("/proc/self/fd") == before
    assert os.listdir(tmp_path) == []
