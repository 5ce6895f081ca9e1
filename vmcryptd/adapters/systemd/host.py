# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd around the daemon, the administrator's hook, and what outlives a restart."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vmcryptd.core.errors import VmcryptdError
from vmcryptd.posix.run import run

try:
    from systemd import daemon as _systemd
except ImportError:  # a checkout without python3-systemd: the simulator and most tests
    _systemd = None

log = logging.getLogger(__name__)

TARGET = "vmcryptd.target"
HOOK_S = 60.0
SYSTEMCTL_S = 15.0


class SystemdHost:
    """The port `Host` on this host."""

    def __init__(self) -> None:
        self._status = ""
        self._hooks: set[asyncio.Task[None]] = set()

    def status(self, text: str) -> None:
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            notify(f"STATUS={line}")

    async def reach_target(self, reached: bool) -> None:
        verb = "start" if reached else "stop"
        try:
            done = await run(["systemctl", "--no-block", verb, TARGET], timeout_s=SYSTEMCTL_S)
        except VmcryptdError as error:
            log.warning("Cannot %s %s: %s", verb, TARGET, error)
            return
        if done.code != 0:
            log.warning("Cannot %s %s: %s", verb, TARGET, done.complaint)

    async def run_hook(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        hook = asyncio.create_task(_run_hook(tuple(argv), dict(environment)))
        self._hooks.add(hook)  # the loop itself keeps tasks weakly
        hook.add_done_callback(self._hooks.discard)


class StateFiles:
    """The port `Memory` in files: goals for as long as the host is up, what was seen for good."""

    def __init__(
        self, runtime: Path = Path("/run/vmcryptd"), state: Path = Path("/var/lib/vmcryptd")
    ) -> None:
        self._runtime = runtime
        self._goals = runtime / "goals.json"
        self._sources = runtime / "sources.json"
        self._seen = state / "seen.json"
        self._fitted = state / "fitted.json"
        self._backups = state / "backups.json"

    def goals(self) -> tuple[str, ...]:
        return _strings(_load(self._goals).get("goals"))

    def keep_goals(self, goals: Iterable[str]) -> None:
        _store(self._goals, {"goals": list(goals)})

    def sources(self) -> dict[str, str]:
        return _texts(_load(self._sources).get("sources"))

    def keep_sources(self, sources: dict[str, str]) -> None:
        _store(self._sources, {"sources": sources}, mode=0o600)

    def seen(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        content = _load(self._seen)
        paths = {path: _strings(names) for path, names in _table(content.get("paths")).items()}
        return paths, _texts(content.get("uuids"))

    def keep_seen(self, paths: dict[str, tuple[str, ...]], uuids: dict[str, str]) -> None:
        _store(self._seen, {"paths": paths, "uuids": uuids})

    def fitted(self) -> dict[str, dict[str, int]]:
        volumes = _table(_load(self._fitted).get("volumes"))
        return {
            volume: {source: slot for source, slot in _table(slots).items() if type(slot) is int}
            for volume, slots in volumes.items()
        }

    def keep_fitted(self, slots: dict[str, dict[str, int]]) -> None:
        # Not for everybody: the arguments of a fetcher may tell more than they should.
        _store(self._fitted, {"volumes": slots}, mode=0o600)

    def publish(self, volumes: dict[str, bool]) -> None:
        """`volumes` lists the mappings for the shutdown hook, `guest-content/NAME` marks those udev leaves alone."""
        marks = self._runtime / "guest-content"
        try:
            marks.mkdir(mode=0o755, parents=True, exist_ok=True)
            for name, holds_guest_disk in volumes.items():
                if holds_guest_disk:
                    (marks / name).touch()
            for mark in marks.iterdir():
                if not volumes.get(mark.name):
                    mark.unlink()
            (self._runtime / "volumes").write_text(
                "".join(f"{name}\n" for name in sorted(volumes)), encoding="utf-8"
            )
        except OSError as error:
            log.warning("%s cannot be written: %s", self._runtime, error)

    def backups_due(self) -> dict[str, str]:
        return _texts(_load(self._backups).get("due"))

    def keep_backups_due(self, volumes: dict[str, str]) -> None:
        _store(self._backups, {"due": volumes})


def notify(message: str) -> None:
    """Tell systemd, if it is there to be told: sd_notify(3)."""
    if _systemd is not None:
        _systemd.notify(message)


def ready() -> None:
    notify("READY=1")


def stopping() -> None:
    notify("STOPPING=1")


def alive() -> None:
    notify("WATCHDOG=1")


def extend_timeout(seconds: float) -> None:
    """A start or stop that goes on may take so much longer from now."""
    notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")


def watchdog_interval_s() -> float | None:
    """How often to say `alive`: half of what systemd allows. None when it does not watch."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2_000_000
    except (KeyError, ValueError):
        return None


class _Prefixed(logging.Formatter):
    """Lines as the journal reads them from standard error: sd-daemon(3), the level in front."""

    def format(self, record: logging.LogRecord) -> str:
        level = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def log_to_journal(level: int = logging.INFO) -> None:
    """Log to standard error, with levels if that is the journal.

    python-systemd's own handler would say no more, and takes a tenth of a start to import.
    """
    handler = logging.StreamHandler()
    if _stderr_is_journal():
        handler.setFormatter(_Prefixed("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _stderr_is_journal() -> bool:
    # systemd.exec(5), $JOURNAL_STREAM: compare, since the variable is inherited by what redirects.
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


async def _run_hook(argv: tuple[str, ...], environment: dict[str, str]) -> None:
    if not argv:
        return
    try:
        done = await run(argv, timeout_s=HOOK_S, environment=environment, stderr_to_journal=True)
    except VmcryptdError as error:
        log.warning("The command %s failed: %s", argv[0], error)
        return
    if done.code != 0:
        log.warning("The command %s failed: %s", argv[0], done.reason)


def _load(path: Path) -> dict[str, Any]:
    try:
        return _table(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read and is taken as empty: %s", path, error)
        return {}


def _store(path: Path, content: dict[str, Any], mode: int = 0o644) -> None:
    text = json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
    try:
        if path.exists() and path.read_bytes() == text:
            return
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A full or read-only disk must not stop anything: only the next start will know less.
        log.warning("%s cannot be written: %s", path, error)


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> dict[str, str]:
    return {name: text for name, text in _table(value).items() if isinstance(text, str)}


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(item for item in value if isinstance(item, str))
