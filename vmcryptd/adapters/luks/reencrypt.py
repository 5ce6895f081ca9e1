# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reencrypts open volumes with cryptsetup, in a transient unit.

While it works, a part of the mapping is suspended and a guest's writes to it wait. If it were killed with the daemon,
that part would stay suspended. So it is no child of the daemon, and survives its crash and restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from vmcryptd.adapters.luks.failures import failure
from vmcryptd.adapters.luks.removal import Removal
from vmcryptd.core.errors import StorageError, VmcryptdError
from vmcryptd.core.model import Infinity, VolumeSpec
from vmcryptd.core.ports import Key, OnProgress
from vmcryptd.posix.pidfd import exit_of
from vmcryptd.posix.run import Completed, run

log = logging.getLogger(__name__)

# The size of the hotzone, which cryptsetup rewrites in one go: it is suspended meanwhile, and finished before
# cryptsetup obeys a signal to stop.
HOTZONE = 16 << 20  # bytes
LOOK_S = 0.5
KILLED_S = 5.0  # for the kernel to release the device
SIGNALLED = 255  # systemd-run's exit status when a signal ended its unit
STOP_S = 90  # for systemd, when the host shuts down
TAIL = 4096  # bytes of its messages: more than the longest line
MOST = 64 * 1024  # bytes of its messages, which are a line a second for days

SANDBOX = (
    # As in vmcryptd.service: keys are in its memory.
    "LimitCORE=0", "CoredumpFilter=0", "MemorySwapMax=0", "KeyringMode=private", "UMask=0077",
    # If the OOM killer took it, a guest's disk would never answer again.
    "OOMScoreAdjust=-900",
    f"TimeoutStopSec={STOP_S}", "Slice=system.slice", "Environment=LANG=C.UTF-8",
)  # fmt: skip


class CryptsetupReencryption:
    """The port `Reencryption` on this host."""

    def __init__(
        self,
        runtime: Path = Path("/run/vmcryptd"),
        cgroups: Path = Path("/sys/fs/cgroup/system.slice"),
    ) -> None:
        self.runtime = runtime  # in memory, for root only
        self.cgroups = cgroups
        self.removal = Removal()

    async def rotate(
        self, volume: VolumeSpec, mapping: str, key: Key, slot: int | None, on_progress: OnProgress
    ) -> None:
        messages = self._messages(volume)
        messages.unlink(missing_ok=True)
        reader = key.reader()
        with contextlib.ExitStack() as held:
            held.callback(os.close, reader)

            def first(progress: float) -> None:
                held.close()  # the key was read long ago
                on_progress(progress)

            argv = [
                "systemd-run", "--quiet", "--collect", "--wait", "--service-type=exec",
                f"--unit={unit(volume.name)}",
                f"--description=New Volume Key for {volume.name}",
                *(f"--property={one}" for one in SANDBOX),
                f"--property=StandardOutput=append:{messages}",
                "--property=StandardError=inherit",
                "--",
                "cryptsetup", "reencrypt", "--batch-mode", f"--active-name={mapping}",
                # In this process's /proc, so that the path is gone once it closes the descriptor.
                f"--key-file=/proc/{os.getpid()}/fd/{reader}",
                *(["--resume-only"] if slot is None else [f"--key-slot={slot}"]),
                *([f"--header={volume.header}"] if volume.header else []),
                f"--hotzone-size={HOTZONE}", "--progress-json", "--progress-frequency=1",
            ]  # fmt: skip
            async with _reporting(messages, first):
                done = await run(argv, timeout_s=Infinity)
        # Without D-Bus, systemd-run cannot wait for the end.
        await self._followed(volume, on_progress)
        said = _tail(messages)
        if done.code == SIGNALLED:
            await _release_hotzone(mapping)
        if done.code != 0 and not is_interrupted(said):
            said = complaints(said) or done.err
            error = failure("reencrypt", Completed(done.code, err=said), volume)
            raise _advised(error, volume.name) if type(error) is StorageError else error

    def is_running(self, volume: VolumeSpec) -> bool:
        return bool(self._processes(volume))

    def is_torn(self, mapping: str) -> bool:
        return bool(self.removal.left_behind(mapping))

    async def follow(self, volume: VolumeSpec, mapping: str, on_progress: OnProgress) -> None:
        await self._followed(volume, on_progress)
        said = _tail(self._messages(volume))
        if not complaints(said) and progress(said) != 1.0:
            await _release_hotzone(mapping)  # it was killed: it reports every other end

    async def _followed(self, volume: VolumeSpec, on_progress: OnProgress) -> None:
        async with _reporting(self._messages(volume), on_progress):
            await _ended(self._processes(volume), Infinity)

    async def stop(self, volume: VolumeSpec, grace_s: float) -> None:
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILLED_S)):
            processes = self._processes(volume)
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            if await _ended(processes, patience_s):
                return
        raise StorageError(
            f"volume {volume.name}: cryptsetup does not end, it hangs in the kernel; "
            "see the kernel's messages for the disk (`journalctl -k`)"
        )

    def _messages(self, volume: VolumeSpec) -> Path:
        return self.runtime / f"reencrypt-{volume.name}"

    def _processes(self, volume: VolumeSpec) -> list[int]:
        try:
            listed = (self.cgroups / unit(volume.name) / "cgroup.procs").read_text()
        except OSError:
            return []
        return [int(line) for line in listed.split()]


def unit(name: str) -> str:
    """The name of a volume's unit. A unit's name may not hold the "+" that a volume's may."""
    escaped = name.replace("+", r"\x2b")
    return f"vmcryptd-reencrypt-{escaped}.service"


def progress(said: str) -> float | None:
    """The latest progress in the messages, 0 to 1."""
    for line in reversed(said.splitlines()):
        try:
            values: Any = json.loads(line) if line.startswith("{") else None
            done, whole = int(values["device_bytes"]), int(values["device_size"])
        except (ValueError, TypeError, KeyError):
            continue  # an error's text, or a line that was cut
        if 0 <= done <= whole and whole:
            return done / whole
    return None


def complaints(said: str) -> str:
    """The messages other than progress lines and the ends of such lines."""
    lines = said.splitlines()
    return "\n".join(
        line for line in lines if line and not line.startswith("{") and line[-1] != "}"
    )


def is_interrupted(said: str) -> bool:
    """Whether cryptsetup reports that it stopped where it can resume."""
    return "Reencryption interrupted" in said


def _advised(error: StorageError, name: str) -> StorageError:
    return StorageError(
        f"{error}; nothing is lost, but what uses volume {name} may get errors until it was closed: stop that, then "
        f"`vmcryptctl lock {name}` and `vmcryptctl unlock {name}`; `vmcryptctl key rotate {name}` goes on after that"
    )


async def _release_hotzone(mapping: str) -> None:
    """Make processes that wait for the hotzone get an error; otherwise they wait for ever.

    cryptsetup does this itself when it fails, but not when it is killed (reencrypt_teardown_fatal). The hotzone is
    recovered from the header when the volume is next opened.
    """
    piece = f"{mapping}-hotzone-forward"
    try:
        done = await run(["dmsetup", "wipe_table", "--", piece], timeout_s=KILLED_S)
    except VmcryptdError as error:
        log.warning("%s", error)
        return
    if done.code == 0:
        log.warning(
            "volume %s: cryptsetup was killed; reads and writes that wait for it get an error",
            mapping,
        )


def _tail(messages: Path) -> str:
    try:
        with messages.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            said = file.read(TAIL).decode("utf-8", "replace")
            if size > MOST and not complaints(said):
                file.truncate(0)  # it is appended to
    except OSError:
        return ""
    return said


@contextlib.asynccontextmanager
async def _reporting(messages: Path, on_progress: OnProgress) -> AsyncIterator[None]:
    """Report the progress as cryptsetup writes it into a file in memory, which never blocks it."""

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if (done := progress(_tail(messages))) is not None:
                on_progress(done)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()


async def _ended(processes: Iterable[int], timeout_s: float) -> bool:
    """Wait until processes that are no children of ours have ended. False when that took too long."""
    endings = []
    try:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                endings.append(exit_of(process))
        if not endings:
            return True
        timeout = None if timeout_s == Infinity else timeout_s
        _, running = await asyncio.wait(endings, timeout=timeout)
        return not running
    finally:
        for ending in endings:
            ending.cancel()
