# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reencryption of open volumes, by cryptsetup in a unit of its own.

While it works, a part of the mapping is suspended and what a guest writes there waits. Were it killed with the
daemon, that part would never come back: so it is no child of the daemon, and outlives its crash and its restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmcryptd.adapters.luks.failures import failure
from vmcryptd.adapters.luks.removal import Removal
from vmcryptd.core.errors import StorageError, VmcryptdError
from vmcryptd.core.model import Infinity, VolumeSpec
from vmcryptd.core.ports import Key, Told
from vmcryptd.posix.pidfd import exit_of
from vmcryptd.posix.run import Completed, run

log = logging.getLogger(__name__)

# The piece that cryptsetup rewrites at once: so much is suspended, and done before it obeys a signal to stop.
HOTZONE = 16 << 20  # bytes
LOOK_S = 0.5
KILLED_S = 5.0  # for the kernel to release the device
SIGNALLED = 255  # as systemd-run says it of its unit
STOP_S = 90  # for systemd, when the host shuts down
TAIL = 4096  # bytes of its messages: more than the longest line
MOST = 64 * 1024  # bytes of its messages, which are a line a second for days

SANDBOX = (
    # As vmcryptd.service: keys are in its memory.
    "LimitCORE=0", "CoredumpFilter=0", "MemorySwapMax=0", "KeyringMode=private", "UMask=0077",
    # Killed for memory, it would leave a guest with a disk that never answers.
    "OOMScoreAdjust=-900",
    f"TimeoutStopSec={STOP_S}", "Slice=system.slice", "Environment=LANG=C.UTF-8",
)  # fmt: skip


@dataclass(frozen=True)
class CryptsetupReencryption:
    """The port `Reencryption` on this host."""

    runtime: Path = Path("/run/vmcryptd")  # in memory, and root's alone
    cgroups: Path = Path("/sys/fs/cgroup/system.slice")
    removal: Removal = field(default_factory=Removal)

    async def rotate(
        self, volume: VolumeSpec, mapping: str, key: Key, slot: int | None, told: Told
    ) -> None:
        messages = self._messages(volume)
        messages.unlink(missing_ok=True)
        reader = key.reader()
        with contextlib.ExitStack() as held:
            held.callback(os.close, reader)

            def first(progress: float) -> None:
                held.close()  # the key was read long ago
                told(progress)

            argv = [
                "systemd-run", "--quiet", "--collect", "--wait", "--service-type=exec",
                f"--unit={unit(volume.name)}",
                f"--description=New Volume Key for {volume.name}",
                *(f"--property={one}" for one in SANDBOX),
                f"--property=StandardOutput=append:{messages}",
                "--property=StandardError=inherit",
                "--",
                "cryptsetup", "reencrypt", "--batch-mode", f"--active-name={mapping}",
                # Of this process, so that the path is gone once it closes the descriptor.
                f"--key-file=/proc/{os.getpid()}/fd/{reader}",
                *(["--resume-only"] if slot is None else [f"--key-slot={slot}"]),
                *([f"--header={volume.header}"] if volume.header else []),
                f"--hotzone-size={HOTZONE}", "--progress-json", "--progress-frequency=1",
            ]  # fmt: skip
            async with _telling(messages, first):
                done = await run(argv, timeout_s=Infinity)
        # Without D-Bus, systemd-run does not wait to the end.
        await self._followed(volume, told)
        said = _tail(messages)
        if done.code == SIGNALLED:
            await _let_go(mapping)
        if done.code != 0 and not is_interrupted(said):
            said = complaints(said) or done.err
            error = failure("reencrypt", Completed(done.code, err=said), volume)
            raise _advised(error, volume.name) if type(error) is StorageError else error

    def is_running(self, volume: VolumeSpec) -> bool:
        return bool(self._processes(volume))

    def is_torn(self, mapping: str) -> bool:
        return bool(self.removal.left_behind(mapping))

    async def follow(self, volume: VolumeSpec, mapping: str, told: Told) -> None:
        await self._followed(volume, told)
        said = _tail(self._messages(volume))
        if not complaints(said) and progress(said) != 1.0:
            await _let_go(mapping)  # it was killed: whatever else happens to it, it says so

    async def _followed(self, volume: VolumeSpec, told: Told) -> None:
        async with _telling(self._messages(volume), told):
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
    """The unit that works on a volume; of what is in a volume's name, "+" may not be in a unit's."""
    escaped = name.replace("+", r"\x2b")
    return f"vmcryptd-reencrypt-{escaped}.service"


def progress(said: str) -> float | None:
    """How much is done, 0 to 1, by the latest of the messages that says so."""
    for line in reversed(said.splitlines()):
        try:
            values: Any = json.loads(line) if line.startswith("{") else None
            done, whole = int(values["device_bytes"]), int(values["device_size"])
        except (ValueError, TypeError, KeyError):
            continue  # an error's text, or cut off
        if 0 <= done <= whole and whole:
            return done / whole
    return None


def complaints(said: str) -> str:
    """The messages that are not about progress, nor the end of a line that is."""
    lines = said.splitlines()
    return "\n".join(
        line for line in lines if line and not line.startswith("{") and line[-1] != "}"
    )


def is_interrupted(said: str) -> bool:
    """Whether it says that it was stopped at a point from which it can go on."""
    return "Reencryption interrupted" in said


def _advised(error: StorageError, name: str) -> StorageError:
    return StorageError(
        f"{error}. Nothing is lost, but what uses {name} may get errors until it was closed: stop that, then "
        f"`vmcryptctl lock {name}` and `vmcryptctl unlock {name}`; `vmcryptctl key rotate {name}` goes on after that"
    )


async def _let_go(mapping: str) -> None:
    """Let processes that wait for the piece under work get an error; else they wait for ever.

    cryptsetup does this itself when it fails, but not when it is killed (reencrypt_teardown_fatal). The piece is
    recovered from the header when the volume is opened the next time.
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
async def _telling(messages: Path, told: Told) -> AsyncIterator[None]:
    """Tell the progress as it is written: into memory, where it waits for nobody."""

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if (done := progress(_tail(messages))) is not None:
                told(done)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()


async def _ended(processes: Iterable[int], timeout_s: float) -> bool:
    """Wait until they have ended; they are not ours. False when that took too long."""
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
