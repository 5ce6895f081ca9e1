# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chains of disk images, from what qemu-img says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vmcryptd.adapters.libvirt import images
from vmcryptd.core.errors import DeadlineError, StorageError
from vmcryptd.core.model import DiskSource, SourceType
from vmcryptd.posix import run as process
from vmcryptd.posix.run import OUTPUT_LIMIT, CommandError, Completed


def answered(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, dict[str, Any]]
) -> list[list[str]]:
    asked: list[list[str]] = []

    async def run(argv: list[str], *, timeout_s: float, output_limit: int) -> Completed:
        asked.append(argv)
        answer = answers.get(argv[-1])
        return Completed(1) if answer is None else Completed(0, json.dumps(answer))

    monkeypatch.setattr(images, "run", run)
    return asked


def chain(path: str, image_format: str) -> list[str]:
    return [source.path for source in asyncio.run(images.chain(path, image_format))]


def test_follows_names_relative_to_the_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answered(
        monkeypatch,
        {
            "/vm/a.qcow2": {"backing-filename": "b.qcow2", "backing-filename-format": "qcow2"},
            "/vm/b.qcow2": {
                "backing-filename": "/dev/vg/base",
                "full-backing-filename": "/dev/vg/base",
                "backing-filename-format": "raw",
            },
        },
    )
    assert asyncio.run(images.chain("/vm/a.qcow2", "qcow2")) == (
        DiskSource(SourceType.FILE, path="/vm/b.qcow2", writable=False),
        DiskSource(SourceType.BLOCK, path="/dev/vg/base", writable=False),
    )
    assert [argv[-1] for argv in asked] == ["/vm/a.qcow2", "/vm/b.qcow2"]
    assert all("--force-share" in argv for argv in asked)


@pytest.mark.parametrize("image_format", ["raw", ""])
def test_never_looks_into_what_the_guest_wrote(
    monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    asked = answered(monkeypatch, {"/raw": {"backing-filename": "/etc/shadow"}})
    assert chain("/raw", image_format) == []
    assert asked == []


def test_a_layer_without_a_format_ends_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answered(
        monkeypatch, {"/a": {"backing-filename": "/b"}, "/b": {"backing-filename": "/c"}}
    )
    assert chain("/a", "qcow2") == ["/b"]
    assert len(asked) == 1


def test_a_layer_that_is_locked_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, {"/a": {"backing-filename": "/b", "backing-filename-format": "qcow2"}})
    assert chain("/a", "qcow2") == ["/b"]


JSON_NAMES = [
    ('{"driver":"qcow2","file":{"driver":"file","filename":"/b"}}', ["/b", "/c"]),
    ('{"driver":"qcow2","file.driver":"file","file.filename":"/b"}', ["/b", "/c"]),
    ('{"driver":"raw","offset":0,"file":{"driver":"host_device","filename":"/dev/b"}}', ["/dev/b"]),
    ('{"driver":"throttle","file":{"driver":"qcow2","file":{"driver":"file","filename":"/b"}}}',
     ["/b", "/c"]),
    ('{"driver":"quorum","children":[{"driver":"qcow2","file":{"driver":"file","filename":"/b"}}]}',
     ["/b", "/c"]),
    ('{"driver":"vvfat","dir":"/srv/fat"}', ["/srv/fat"]),
    ('{"driver":"nbd","server":{"type":"unix","path":"/srv/nbd"}}', ["/srv/nbd"]),
    ("[" * 100_000, []),
    ("{}", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), JSON_NAMES)
def test_names_in_json(monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]) -> None:
    answered(
        monkeypatch,
        {
            "/a": {"backing-filename": f"json:{name}"},
            "/b": {"backing-filename": "/c", "backing-filename-format": "raw"},
        },
    )
    assert chain("/a", "qcow2") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fat:rw:/srv/fat", ["/srv/fat"]),
        ("fat:floppy:label=x:/srv/fat", ["/srv/fat"]),
        ("file:/srv/b", ["/srv/b"]),
        ("rbd:pool/image:id=x:conf=/srv/ceph.conf", ["/srv/ceph.conf"]),
        ("nbd:unix:/srv/socket:exportname=x", ["/srv/socket"]),
    ],
)
def test_names_with_a_protocol(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]
) -> None:
    answered(monkeypatch, {"/a": {"backing-filename": name, "backing-filename-format": "raw"}})
    assert chain("/a", "qcow2") == expected


def test_an_image_with_many_snapshots_keeps_its_chain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the real runner, which keeps less of most programs' output than this is."""
    snapshot = {
        "icount": 0,
        "vm-clock-nsec": 0,
        "name": "daily",
        "date-sec": 1764288000,
        "date-nsec": 0,
        "vm-clock-sec": 0,
        "id": "1",
        "vm-state-size": 0,
    }
    info = {
        "virtual-size": 1 << 30,
        "filename": "/a",
        "snapshots": [snapshot] * 300,
        "backing-filename": "/b",
        "backing-filename-format": "raw",
    }
    answer, program = tmp_path / "answer", tmp_path / "qemu-img"
    answer.write_text(json.dumps(info, indent=4))
    assert answer.stat().st_size > OUTPUT_LIMIT
    program.write_text(f"#!/bin/sh\nexec cat {answer}\n")
    program.chmod(0o755)
    monkeypatch.setattr(process, "DIRECTORIES", (str(tmp_path),))
    assert chain("/a", "qcow2") == ["/b"]


def test_more_than_can_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(argv: list[str], **_: object) -> Completed:
        return Completed(0, "{", is_cut=True)

    monkeypatch.setattr(images, "run", run)
    with pytest.raises(StorageError, match="delete snapshots"):
        chain("/a", "qcow2")


def test_a_chain_that_libvirt_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {
        f"/{i}": {"backing-filename": f"/{i + 1}", "backing-filename-format": "qcow2"}
        for i in range(300)
    }
    answered(monkeypatch, layers)
    with pytest.raises(StorageError, match="the backing chain of /0 has more than 200 layers"):
        chain("/0", "qcow2")
    assert len(chain("/100", "qcow2")) == 200


@pytest.mark.parametrize("name", ["nbd://host/x", "json:{}", "rbd:pool/image", 7, None])
def test_what_is_not_on_this_host(monkeypatch: pytest.MonkeyPatch, name: object) -> None:
    answered(monkeypatch, {"/a": {"backing-filename": name, "backing-filename-format": "qcow2"}})
    assert chain("/a", "qcow2") == []


def test_circles_and_data_files(monkeypatch: pytest.MonkeyPatch) -> None:
    answered(
        monkeypatch,
        {
            "/a": {
                "backing-filename": "/b",
                "backing-filename-format": "qcow2",
                "format-specific": {"type": "qcow2", "data": {"data-file": "file:/data"}},
            },
            "/b": {"backing-filename": "/a", "backing-filename-format": "qcow2"},
        },
    )
    assert chain("/a", "qcow2") == ["/data", "/b"]


def test_without_qemu_img(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(argv: list[str], **_: object) -> Completed:
        raise CommandError(f"the program {argv[0]} is not installed or not executable; install it")

    monkeypatch.setattr(images, "run", run)
    assert chain("/a", "qcow2") == []


def test_a_silent_disk_is_no_disk_without_a_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run(argv: list[str], **_: object) -> Completed:
        raise DeadlineError("no answer")

    monkeypatch.setattr(images, "run", run)
    with pytest.raises(DeadlineError):
        chain("/a", "qcow2")
