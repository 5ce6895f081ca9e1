# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of faults in the virtual machine have found, as small as it gets."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from pathlib import Path

import pytest

from tests.unit.test_prompt import Person, Token
from vmcryptd.adapters.luks.mappings import Cryptsetup
from vmcryptd.core import graph, luks_header, planner
from vmcryptd.core.errors import BusyError, NotLuksError
from vmcryptd.core.goals import SHUTDOWN, Goal
from vmcryptd.core.model import (
    BlockDevice,
    Content,
    Infinity,
    Mount,
    Observation,
    Settings,
    Storage,
    VolumeSpec,
)
from vmcryptd.engine.prompt import Prompt
from vmcryptd.posix.run import run


def test_a_shorter_key_cache_holds_for_keys_that_are_held_already() -> None:
    async def scene() -> None:
        person = Person()
        prompt = Prompt(person, lambda: None, person.on_waiting)
        prompt.cache(Infinity)
        long, short = Token(), Token()
        prompt.offer(long, "key")
        prompt.drop_unneeded()
        prompt.cache(3600)
        prompt.offer(short, "key")
        prompt.drop_unneeded()
        assert (long.closed, short.closed) == (0, 0)
        prompt.cache(0)
        assert (long.closed, short.closed) == (1, 1)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("target", "users"), [("/srv/vm", None), ("/mnt", "mounted at /mnt; stop")]
)
def test_a_lock_does_not_unmount_a_mount_of_another_program(target: str, users: str | None) -> None:
    spec = VolumeSpec("a", "/dev/sda", content=Content.FILESYSTEM, mount="/srv/vm")
    devices = {
        "sda": BlockDevice("sda", "8:0"),
        "dm-0": BlockDevice("dm-0", "9:0", ("sda",), "a", f"CRYPT-LUKS2-{1:032x}-a"),
    }
    storage = Storage(
        devices, {"/dev/sda": "sda", spec.mapper_path: "dm-0"}, mounts=(Mount("9:0", target),)
    )
    seen = graph.build(Settings(volumes={"a": spec}), Observation(storage=storage))
    if users is None:
        assert [str(step.id) for step in planner.plan(seen, Goal.parse("lock:a")).steps] == [
            "unmount:a",
            "lock:a",
        ]
        return
    for goal in ("lock:a", "lock-all"):
        with pytest.raises(BusyError, match=users):
            planner.plan(seen, Goal.parse(goal))
    assert [str(step.id) for step in planner.plan(seen, SHUTDOWN).steps] == ["unmount:a", "lock:a"]


def test_a_child_that_may_need_much_memory_is_the_first_to_die() -> None:
    """Not the daemon, whose OOMScoreAdjust= it would inherit; and above all no guest."""
    script = "until grep -qx 1000 /proc/$$/oom_score_adj; do sleep 0.01; done"
    done = asyncio.run(run(["sh", "-c", script], timeout_s=10, expendable=True))
    assert done.code == 0


def test_a_device_without_a_header_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """Errors are kept, for as long as the volume has failed; what was read of the device is not."""
    device = tmp_path / "device"
    device.write_bytes(bytes(luks_header.WHOLE_SIZE))
    crypt, errors = Cryptsetup(), []

    async def scene() -> None:
        for _ in range(3):
            try:
                await crypt.header(VolumeSpec("a", f"{device}"))
            except NotLuksError as error:
                errors.append(error)

    gc.disable()
    tracemalloc.start()
    try:
        asyncio.run(scene())
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert len(errors) == 3
    assert held < luks_header.WHOLE_SIZE / 4
