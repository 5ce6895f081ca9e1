# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chains of disk images, from what qemu-img says."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from vmcryptd.adapters.libvirt import images
from vmcryptd.core.errors import DeadlineError
from vmcryptd.core.model import DiskSource, SourceType
from vmcryptd.posix.run import CommandError, Completed


def told(monkeypatch: pytest.MonkeyPatch, answers: dict[str, dict[str, Any]]) -> list[list[str]]:
    asked: list[list[str]] = []

    async def run(argv: list[str], *, timeout_s: float) -> Completed:
        asked.append(argv)
        answer = answers.get(argv[-1])
        return Completed(1) if answer is None else Completed(0, json.dumps(answer))

    monkeypatch.setattr(images, "run", run)
    return asked


def chain(path: str, image_format: str) -> list[str]:
    return [source.path for source in asyncio.run(images.chain(path, image_format))]


def test_follows_names_relative_to_the_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = told(
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
    asked = told(monkeypatch, {"/raw": {"backing-filename": "/etc/shadow"}})
    assert chain("/raw", image_format) == []
    assert asked == []


def test_a_layer_without_a_format_ends_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = told(monkeypatch, {"/a": {"backing-filename": "/b"}, "/b": {"backing-filename": "/c"}})
    assert chain("/a", "qcow2") == ["/b"]
    assert len(asked) == 1


def test_a_layer_that_is_locked_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, {"/a": {"backing-filename": "/b", "backing-filename-format": "qcow2"}})
    assert chain("/a", "qcow2") == ["/b"]


@pytest.mark.parametrize("name", ["nbd://host/x", "json:{}", "rbd:pool/image", 7, None])
def test_what_is_not_on_this_host(monkeypatch: pytest.MonkeyPatch, name: object) -> None:
    told(monkeypatch, {"/a": {"backing-filename": name, "backing-filename-format": "qcow2"}})
    assert chain("/a", "qcow2") == []


def test_circles_and_data_files(monkeypatch: pytest.MonkeyPatch) -> None:
    told(
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
    async def run(argv: list[str], *, timeout_s: float) -> Completed:
        raise CommandError(f"The program {argv[0]} is not installed or not executable: install it")

    monkeypatch.setattr(images, "run", run)
    assert chain("/a", "qcow2") == []


def test_a_disk_that_does_not_answer_is_told_from_one_without_a_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run(argv: list[str], *, timeout_s: float) -> Completed:
        raise DeadlineError("no answer")

    monkeypatch.setattr(images, "run", run)
    with pytest.raises(DeadlineError):
        chain("/a", "qcow2")
