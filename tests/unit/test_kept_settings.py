# SPDX-License-Identifier: LGPL-2.1-or-later
"""The settings that are kept for the next start come back as they were, field by field."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from vmcryptd import daemon
from vmcryptd.config import files
from vmcryptd.config.decoding import decoded
from vmcryptd.core.model import (
    DaemonSpec,
    GuestSpec,
    KeySource,
    Settings,
    SourceKind,
    Unlock,
    VolumeSpec,
)

SPECS = (DaemonSpec, VolumeSpec, GuestSpec, KeySource)
BASE: dict[type, Any] = {
    DaemonSpec: DaemonSpec(),
    VolumeSpec: VolumeSpec("a", "/dev/a"),
    GuestSpec: GuestSpec("g"),
    KeySource: KeySource(SourceKind.FILE, "/k"),
}


def others(kind: Any, value: object) -> Iterator[object]:
    """Every other member of an enum, and something else of any other type."""
    inner = get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        yield from (member for member in kind if member is not value)
    elif is_dataclass(kind):
        yield replace(BASE[kind], kind=SourceKind.EXEC)  # type: ignore[arg-type]
    elif get_origin(kind) is tuple:
        for one in others(inner[0], None):
            yield (one, one)
    elif kind is bool:
        yield not value
    elif kind is float:
        yield from (1.5, 7.0, float("inf"))
    elif kind is str or inner == (str, type(None)):
        yield 'x "ü"\n'
    else:
        raise AssertionError(f"{kind} is new: say what another value of it is")


CASES = [
    pytest.param(cls, field.name, other, id=f"{cls.__name__}.{field.name}-{number}")
    for cls in SPECS
    for field in fields(cls)
    for number, other in enumerate(
        others(get_type_hints(cls)[field.name], getattr(BASE[cls], field.name))
    )
]


def exactly(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down: a StrEnum equals its string."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one) and not isinstance(one, type):
        return all(exactly(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(exactly, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("cls", "name", "value"), CASES)
def test_each_field(cls: type, name: str, value: object) -> None:
    spec = replace(BASE[cls], **{name: value})
    again = decoded(cls, json.loads(json.dumps(asdict(spec))))
    assert exactly(again, spec)


def test_all_of_it() -> None:
    settings = Settings(
        DaemonSpec(on_waiting=("/bin/x",)),
        {"a": VolumeSpec("a", "/dev/a", unlock=Unlock.GUEST)},
        {"g": GuestSpec("g")},
    )
    again = decoded(Settings, json.loads(json.dumps(asdict(settings))))
    assert again == settings
    assert again.volumes["a"].unlock is Unlock.GUEST


def test_a_type_that_is_new() -> None:
    class Colour(StrEnum):
        RED = "red"

    globals()["Colour"] = Colour

    @dataclass(frozen=True)
    class Thing:
        colour: Colour
        more: Mapping[str, Colour]

    again = decoded(Thing, {"colour": "red", "more": {"x": "red"}, "from a newer one": 1})
    assert again.colour is Colour.RED
    assert again.more["x"] is Colour.RED

    @dataclass(frozen=True)
    class Odd:
        what: set[str]

    with pytest.raises(NotImplementedError):
        decoded(Odd, {"what": []})


@pytest.mark.parametrize(
    "raw",
    [
        {"name": 5, "device": "/dev/a"},
        {"name": "a"},
        {"name": "a", "device": "/dev/a", "unlock": "never"},
        {"name": "a", "device": "/dev/a", "discard": "yes"},
        {"name": "a", "device": "/dev/a", "timeout_s": True},
        {"name": "a", "device": "/dev/a", "after": "b"},
        {"name": "a", "device": "/dev/a", "keys": [{"kind": "smoke"}]},
        ["a"],
    ],
)
def test_what_does_not_fit_is_refused(raw: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        decoded(VolumeSpec, raw)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("broken", ["fifo", "deep", "endless", "types", "names"])
def test_a_broken_file_is_written_anew(tmp_path: Path, broken: str) -> None:
    kept = tmp_path / "settings.json"
    texts = {"vmcryptd.toml": '[volume.a]\ndevice = "/dev/a"\nunlock = "guest"\n'}
    match broken:
        case "fifo":
            os.mkfifo(kept)
        case "deep":
            kept.write_text("[" * 100_000)
        case "endless":
            with kept.open("wb") as file:
                file.truncate(1 << 40)
        case "types":
            kept.write_text(json.dumps({"version": [], "texts": 5, "settings": None}))
        case "names":
            files.keep(kept, texts, files.settings(texts))
            content = json.loads(kept.read_text())
            content["settings"]["volumes"]["a"]["unlock"] = "never"
            kept.write_text(json.dumps(content))
    found = files.settings(texts, kept)
    files.keep(kept, texts, found)
    assert found.volumes["a"].unlock is Unlock.GUEST
    assert files.last_valid(kept) == found


def test_two_reloads_do_not_write_at_once() -> None:
    """Both would write the same temporary file, and one could give its name to what the other has half written."""
    at_it: list[None] = []
    overlapped: list[bool] = []
    begun, go_on, both = threading.Event(), threading.Event(), threading.Semaphore(0)

    def keep(texts: Mapping[str, str], settings: Settings) -> None:
        at_it.append(None)
        overlapped.append(len(at_it) > 1)
        begun.set()
        go_on.wait(60)
        at_it.pop()
        both.release()

    async def test() -> None:
        source = daemon.Source(Path("/etc/vmcryptd"), dict, lambda texts: Settings(), keep)
        source.keep_beside()
        await asyncio.to_thread(begun.wait, 60)
        begun.clear()
        source.keep_beside()
        waits = asyncio.to_thread(begun.wait, 0.1)  # for the second, which must not come
        assert not await waits
        go_on.set()
        for _ in range(2):
            assert await asyncio.to_thread(both.acquire, timeout=60)

    asyncio.run(test())
    assert overlapped == [False, False]
