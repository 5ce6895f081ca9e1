# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is closed at once is removed by few children; what is not plain is left to cryptsetup."""

from __future__ import annotations

import asyncio
import gc
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vmcryptd.adapters.luks import removal
from vmcryptd.adapters.luks.removal import Removal
from vmcryptd.core.errors import DeadlineError
from vmcryptd.posix.run import Completed

LUKS = "CRYPT-LUKS2-0123456789abcdef0123456789abcdef"


class Kernel:
    """Device-mapper devices in a tree like sysfs, and a dmsetup that removes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[list[str]] = []
        self.busy: set[str] = set()
        self.hung: set[str] = set()

    def add(self, name: str, *, uuid: str = "", suspended: str = "0", below: str = "") -> None:
        path = self.root / f"dm-{name}"
        (path / "dm").mkdir(parents=True)
        (path / "slaves").mkdir()
        (path / "dm/name").write_text(f"{name}\n")
        (path / "dm/uuid").write_text(f"{uuid or f'{LUKS}-{name}'}\n")
        (path / "dm/suspended").write_text(f"{suspended}\n")
        if below:
            (path / f"slaves/dm-{below}").symlink_to(self.root / f"dm-{below}")

    async def dmsetup(self, argv: Sequence[str], **_: Any) -> Completed:
        assert argv[:3] == ["dmsetup", "remove", "--"]
        self.calls.append(list(argv[3:]))
        await asyncio.sleep(0)
        for name in argv[3:]:
            if name in self.hung:
                raise DeadlineError("dmsetup did not end")
            if name in self.busy:
                return Completed(1, err="Device or resource busy\nCommand failed.\n")
            shutil.rmtree(self.root / f"dm-{name}")
        return Completed(0)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path)
    monkeypatch.setattr(removal, "run", kernel.dmsetup)
    monkeypatch.setattr(removal.os, "cpu_count", lambda: 2)
    return kernel


def attempts(kernel: Kernel, *names: str) -> list[Any]:
    async def work() -> list[Any]:
        one = Removal(kernel.root)
        return await asyncio.gather(*map(one.attempt, names), return_exceptions=True)

    return asyncio.run(work())


def test_as_many_children_as_cores(kernel: Kernel) -> None:
    names = [f"cr_{n}" for n in range(5)]
    for name in names:
        kernel.add(name)
    assert attempts(kernel, *names) == [True] * 5
    assert kernel.calls == [["cr_0", "cr_2", "cr_4"], ["cr_1", "cr_3"]]
    assert not list(kernel.root.iterdir())


def test_one_in_use_is_left_to_cryptsetup(kernel: Kernel) -> None:
    for name in ("a", "b", "c"):
        kernel.add(name)
    kernel.busy.add("a")
    # Not c either: dmsetup ends at the first that it cannot remove.
    assert attempts(kernel, "a", "b", "c") == [False, True, False]


@pytest.mark.parametrize(
    "device",
    [
        {"uuid": "LVM-abc"},
        {"uuid": "CRYPT-PLAIN-odd"},
        {"suspended": "1"},
        {"below": "odd_dif"},
        {"below": "odd-hotzone-forward"},
    ],
)
def test_what_is_not_plain_is_left_to_cryptsetup(kernel: Kernel, device: dict[str, str]) -> None:
    if "below" in device:
        kernel.add(device["below"], uuid="CRYPT-SUBDEV-x")
    kernel.add("odd", **device)
    assert attempts(kernel, "odd") == [False]
    assert kernel.calls == []


def test_on_another_mapping(kernel: Kernel) -> None:
    kernel.add("outer")
    kernel.add("inner", below="outer")
    assert attempts(kernel, "inner") == [True]


def test_one_that_is_gone_is_asked_of_cryptsetup(kernel: Kernel) -> None:
    assert attempts(kernel, "none") == [False]
    assert kernel.calls == []


def test_one_that_hangs(kernel: Kernel) -> None:
    for name in ("a", "b"):
        kernel.add(name)
    kernel.hung.add("b")
    assert [type(one) for one in attempts(kernel, "a", "b")] == [DeadlineError] * 2
    assert not (kernel.root / "dm-a").exists()


def test_who_is_called_off_takes_nobody_with_him(kernel: Kernel) -> None:
    for name in ("a", "b"):
        kernel.add(name)

    async def work() -> bool:
        one = Removal(kernel.root)
        first, second = (asyncio.create_task(one.attempt(name)) for name in ("a", "b"))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(work())
    assert not list(kernel.root.iterdir())


def test_an_error_that_nobody_waits_for(kernel: Kernel) -> None:
    kernel.add("a")
    kernel.hung.add("a")
    forgotten: list[object] = []

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: forgotten.append(what))
        caller = asyncio.create_task(Removal(kernel.root).attempt("a"))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait({caller, *asyncio.all_tasks()} - {asyncio.current_task()})
        gc.collect()

    asyncio.run(work())
    assert forgotten == []
