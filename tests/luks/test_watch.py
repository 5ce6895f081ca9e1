# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own news of mounts arrive, coalesced."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from vmcryptd.adapters.storage.blocks import SysfsBlocks


def test_mounts_are_noticed(tmp_path: Path) -> None:
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()

    async def go() -> list[int]:
        calls = 0
        counts = []

        def changed() -> None:
            nonlocal calls
            calls += 1

        async def noticed(*argv: str) -> None:
            nonlocal calls
            await asyncio.to_thread(subprocess.run, argv, check=True, stderr=subprocess.DEVNULL)
            async with asyncio.timeout(60):
                while not calls:
                    await asyncio.sleep(0.01)
            counts.append(calls)
            calls = 0

        blocks = SysfsBlocks()
        blocks.watch(changed)
        try:
            for place in places:
                await noticed("mount", "-t", "tmpfs", "none", str(place))
            await noticed("umount", *map(str, places))
        finally:
            blocks.close()
        return counts

    try:
        assert asyncio.run(go())[:2] == [1, 1]
    except subprocess.CalledProcessError:
        pytest.skip("mounting is not allowed here")
