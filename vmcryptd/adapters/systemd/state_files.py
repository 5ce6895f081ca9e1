# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps state that survives the daemon in files. Any broken file causes a warning only."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vmcryptd.core.errors import DeadlineError
from vmcryptd.core.keystores import Making
from vmcryptd.core.model import Content, Lock, VolumeSpec
from vmcryptd.core.ports import Reason
from vmcryptd.posix.file_writer import FileWriter, store
from vmcryptd.posix.files import read_bounded, write_atomically
from vmcryptd.posix.threads import DaemonThreads

KEPT_S = 10.0  # for what is to be on the disk
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger(__name__)


class StateFiles:
    """The port `Memory` in files: goals until the host goes down, observations permanently."""

    def __init__(
        self, runtime: Path = Path("/run/vmcryptd"), state: Path = Path("/var/lib/vmcryptd")
    ) -> None:
        self._runtime = runtime
        self._state = state
        self._goals = runtime / "goals.json"
        self._sources = runtime / "sources.json"
        self._open = runtime / "open.json"
        self._reasons = runtime / "reasons.json"
        self._seen = state / "seen.json"
        self._fitted = state / "fitted.json"
        self._backups = state / "backups.json"
        self._making = state / "making.json"
        self._once = state / "once.json"
        # /run is in memory, and what is kept there is there at once. A disk may take its time.
        self._writer = FileWriter()
        self._threads = DaemonThreads()

    def goals(self) -> tuple[str, ...]:
        return tuple(filter(_is_text, _strings(_load(self._goals).get("goals"))))

    def keep_goals(self, goals: Iterable[str]) -> None:
        _store(self._goals, {"goals": list(goals)})

    def sources(self) -> dict[str, str]:
        return _texts(_load(self._sources).get("sources"))

    def keep_sources(self, sources: dict[str, str]) -> None:
        _store(self._sources, {"sources": sources}, mode=0o600)

    def reasons(self) -> dict[str, Reason]:
        table = _table(_load(self._reasons).get("reasons"))
        entries = {of: _strings(entry) for of, entry in table.items()}
        return {
            of: Reason(*entry)
            for of, entry in entries.items()
            if len(entry) == len(Reason._fields) and all(map(_is_text, entry))
        }

    def keep_reasons(self, reasons: Mapping[str, Reason]) -> None:
        # For root only: programs say whatever they like of their failures.
        _store(self._reasons, {"reasons": dict(reasons)}, mode=0o600)

    def open_volumes(self) -> dict[str, VolumeSpec]:
        found = {}
        for name, entry in _table(_load(self._open).get("volumes")).items():
            texts = _texts(entry)
            try:
                found[name] = VolumeSpec(
                    name,
                    texts["device"],
                    uuid=texts["uuid"],
                    lock=Lock(texts["lock"]),
                    content=Content(texts["content"]),
                    mount=texts.get("mount"),
                    vg=texts.get("vg"),
                    header=texts.get("header"),
                )
            except (KeyError, ValueError) as error:
                log.warning("%s: an entry is not understood and left out: %r", self._open, error)
        return found

    def keep_open(self, volumes: Mapping[str, VolumeSpec]) -> None:
        keys = ("device", "uuid", "lock", "content", "mount", "vg", "header")
        table = {name: {key: getattr(spec, key) for key in keys} for name, spec in volumes.items()}
        _store(self._open, {"volumes": table})

    def seen(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        content = _load(self._seen)
        paths = {path: _strings(names) for path, names in _table(content.get("paths")).items()}
        return paths, _texts(content.get("uuids"))

    def keep_seen(self, paths: dict[str, tuple[str, ...]], uuids: dict[str, str]) -> None:
        self._store_on_disk(self._seen, {"paths": paths, "uuids": uuids})

    def fitted(self) -> dict[str, dict[str, int]]:
        volumes = _table(_load(self._fitted).get("volumes"))
        return {
            volume: {source: slot for source, slot in _table(slots).items() if type(slot) is int}
            for volume, slots in volumes.items()
        }

    def keep_fitted(self, slots: dict[str, dict[str, int]]) -> None:
        # For root only: the arguments of a fetcher may hold a token.
        self._store_on_disk(self._fitted, {"volumes": slots}, mode=0o600)

    def publish(self, volumes: dict[str, bool]) -> None:
        """`volumes` lists the mappings for the shutdown hook, `guest-content/NAME` marks those that udev ignores."""
        marks = self._runtime / "guest-content"
        listed = "".join(f"{name}\n" for name in sorted(volumes)).encode()
        try:
            marks.mkdir(mode=0o755, parents=True, exist_ok=True)
            for name, holds_guest_disk in volumes.items():
                if holds_guest_disk:
                    (marks / name).touch()
            for mark in marks.iterdir():
                if not volumes.get(mark.name):
                    mark.unlink()
        except OSError as error:
            log.warning("%s cannot be written: %s", marks, error)
        try:
            write_atomically(self._runtime / "volumes", listed)
        except OSError as error:
            log.warning("%s/volumes cannot be written: %s", self._runtime, error)

    def due_once(self) -> tuple[str, ...]:
        content = _load(self._once)
        due = _strings(content.get("due"))
        if content.get("boot") == _boot_id():
            return due
        return tuple(dict.fromkeys((*due, *_strings(content.get("marked")))))

    def keep_once(self, marked: Iterable[str], due: Iterable[str]) -> None:
        content = {"boot": _boot_id(), "marked": sorted(marked), "due": sorted(due)}
        self._store_on_disk(self._once, content)

    def backups_due(self) -> dict[str, str]:
        return _texts(_load(self._backups).get("due"))

    def keep_backups_due(self, volumes: dict[str, str]) -> None:
        self._store_on_disk(self._backups, {"due": volumes})

    def making(self) -> tuple[Making, ...]:
        found = []
        for name, entry in _table(_load(self._making).get("keystores")).items():
            texts = _texts(entry)
            if {"place", "uuid"} <= texts.keys():
                is_file = _table(entry).get("is_file") is True
                found.append(Making(name, texts["place"], texts["uuid"], is_file))
        return tuple(found)

    def keep_making(self, keystores: Iterable[Making]) -> None:
        entries = {
            one.name: {"place": one.place, "uuid": one.uuid, "is_file": one.is_file}
            for one in keystores
        }
        self._store_on_disk(self._making, {"keystores": entries})

    async def kept(self) -> None:
        wait = functools.partial(self._writer.wait, KEPT_S)
        try:
            in_time = await self._threads.call(2 * KEPT_S, wait)
        except DeadlineError:
            in_time = False
        if not in_time:
            log.warning("%s: what is kept there was not written within %g s", self._state, KEPT_S)

    def _store_on_disk(self, path: Path, content: dict[str, Any], mode: int = 0o644) -> None:
        self._writer.write(path, _text(content), mode)


def _boot_id() -> str:
    """A new one at each boot of the host: random(4)."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _load(path: Path) -> dict[str, Any]:
    try:
        return _table(json.loads(read_bounded(path)))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read and is taken as empty: %s", path, error)
        return {}


def _store(path: Path, content: dict[str, Any], mode: int = 0o644) -> None:
    store(path, _text(content), mode)


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> dict[str, str]:
    return {name: text for name, text in _table(value).items() if _is_text(text)}


def _is_text(value: object) -> bool:
    """Whether it is text that can be shown and sent over the bus."""
    return isinstance(value, str) and value.isprintable()


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(item for item in value if isinstance(item, str))
