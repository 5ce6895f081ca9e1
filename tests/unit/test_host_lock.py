# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lock of a host: one holder at a time, freed by its death, and a daemon that waits for its turn."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from vmcryptd import daemon
from vmcryptd.core.errors import BusyError, ConfigError, StorageError
from vmcryptd.core.model import Settings
from vmcryptd.posix.host_lock import DAEMON, Holder, HostLock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lock"


def test_one_holder_at_a_time(path: Path) -> None:
    first, second = HostLock(path), HostLock(path)
    assert first.holder() is None
    assert first.try_hold(DAEMON)
    assert not second.try_hold("vmcryptctl panic")
    assert second.holder() == Holder(DAEMON, os.getpid())
    first.release()
    assert second.try_hold("vmcryptctl panic")
    assert str(first.holder()) == f"vmcryptctl panic (pid {os.getpid()})"
    assert path.stat().st_mode & 0o777 == 0o600


def test_waiting_for_it(path: Path) -> None:
    first, second = HostLock(path), HostLock(path)
    assert first.try_hold(DAEMON)

    async def test() -> None:
        waiting = asyncio.create_task(second.hold("vmcryptctl shutdown", 60))
        await asyncio.sleep(0)
        first.release()
        await waiting
        assert second.holder() == Holder("vmcryptctl shutdown", os.getpid())
        with pytest.raises(BusyError, match="vmcryptctl shutdown .pid .* holds"):
            await first.hold(DAEMON, 0.01)

    asyncio.run(test())


@pytest.mark.parametrize(
    "text", [b"", b"vmcryptd", b"vmcryptd 0\n", b"\x1b[2J 1\n", b"vmcryptd 1\n" * 99]
)
def test_what_no_holder_wrote(text: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(text)
    assert HostLock(path).holder() is None
    assert HostLock(path).try_hold(DAEMON)


def test_a_link_is_no_lock(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="lock cannot be opened"):
        HostLock(path).try_hold(DAEMON)
    assert not (tmp_path / "elsewhere").exists()


def test_a_second_daemon_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = HostLock(path)
    assert first.try_hold(DAEMON)
    monkeypatch.setattr(daemon, "_lock", HostLock(path))

    async def test() -> None:
        with pytest.raises(BusyError, match=f"pid {os.getpid()}. runs already"):
            await daemon._hold_alone(asyncio.Event())

    asyncio.run(test())


def test_a_daemon_waits_for_a_shutdown_in_another_process(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = HostLock(path)
    assert first.try_hold("vmcryptctl shutdown")
    monkeypatch.setattr(daemon, "_lock", HostLock(path))

    async def test() -> None:
        starting = asyncio.create_task(daemon._hold_alone(asyncio.Event()))
        await asyncio.sleep(0)
        assert not starting.done()
        first.release()
        assert await starting is True
        assert first.holder() == Holder(DAEMON, os.getpid())

    asyncio.run(test())


def test_a_daemon_that_waits_can_be_stopped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = HostLock(path)
    assert first.try_hold("vmcryptctl shutdown")
    monkeypatch.setattr(daemon, "_lock", HostLock(path))

    async def test() -> None:
        stop = asyncio.Event()
        starting = asyncio.create_task(daemon._hold_alone(stop))
        await asyncio.sleep(0)
        stop.set()
        assert await starting is False

    asyncio.run(test())


def test_the_last_valid_settings_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo, an upgrade, a daemon that is down: the volumes are closed all the same."""
    kept = tmp_path / "settings.json"
    file = tmp_path / "vmcryptd.toml"
    monkeypatch.setattr(daemon.configuration, "VALIDATED", kept)
    load = daemon.configuration.load
    monkeypatch.setattr(
        daemon.configuration, "load", lambda validated: load(tmp_path, validated=validated)
    )
    file.write_text("[volume.a]\ndevise = 1\n")
    with pytest.raises(ConfigError, match="devise"):
        daemon._last_valid_settings()
    file.write_text('[volume.a]\ndevice = "/dev/vg/a"\n')
    valid = daemon._last_valid_settings()
    assert list(valid.volumes) == ["a"]
    file.write_text("[volume.a]\ndevise = 1\n")
    kept.write_text(kept.read_text().replace('"version": "', '"version": "0.'))
    assert daemon._last_valid_settings() == valid
    assert isinstance(valid, Settings)
