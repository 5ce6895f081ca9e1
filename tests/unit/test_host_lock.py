# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lock of a host: one holder at a time, freed by its death, and a daemon that waits for its turn."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from tests.lib import Host
from vmcryptd import daemon
from vmcryptd.core.errors import BusyError, ConfigError, StorageError
from vmcryptd.core.model import VolumeSpec
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


A = '[volume.a]\ndevice = "/dev/vg/a"\n'
UUID = "00000000-0000-0000-0000-000000000001"
TYPO = "[volume.a]\ndevise = 1\n"
# It is found out only when the volumes are put in order.
CIRCLE = f'{A}after = ["b"]\n[volume.b]\ndevice = "/dev/vg/b"\nafter = ["a"]\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host whose daemon is down, with a volume open that it has opened; the configuration is `tmp_path`'s."""
    monkeypatch.setattr(daemon.configuration, "VALIDATED", tmp_path / "settings.json")
    load = daemon.configuration.load
    monkeypatch.setattr(
        daemon.configuration, "load", lambda validated: load(tmp_path, validated=validated)
    )
    host = Host.parse(f'{A}uuid = "{UUID}"\n[sim.volume.a]\nopen = true\n')
    monkeypatch.setattr(daemon, "real_ports", lambda settings: host.ports())
    return host


def write(folder: Path, text: str) -> None:
    (folder / "vmcryptd.toml").write_text(text)


def run_daemon(folder: Path) -> None:
    """Have the daemon run with these files."""
    kept, texts = folder / "settings.json", daemon.configuration.read(folder)
    daemon.configuration.keep(kept, texts, daemon.configuration.settings(texts, kept))


def volumes_here() -> list[str]:
    async def scene() -> list[str]:
        with contextlib.ExitStack() as stack:
            engine, _ = daemon._engine_here(stack)
            engine.close()
            return list(engine.graph.volumes)

    return asyncio.run(scene())


@pytest.mark.parametrize("mistake", [TYPO, CIRCLE])
def test_the_last_valid_settings_count(here: Host, tmp_path: Path, mistake: str) -> None:
    """A typo, an upgrade, a daemon that is down: the volumes are closed all the same."""
    write(tmp_path, A)
    run_daemon(tmp_path)
    write(tmp_path, mistake)
    assert volumes_here() == ["a"]
    kept = tmp_path / "settings.json"
    kept.write_text(kept.read_text().replace('"version": "', '"version": "0.'))
    assert volumes_here() == ["a"]


@pytest.mark.parametrize("mistake", [TYPO, CIRCLE])
def test_without_valid_settings_what_is_open_counts(
    here: Host, tmp_path: Path, mistake: str
) -> None:
    write(tmp_path, mistake)
    with pytest.raises(ConfigError, match="devise|circle"):
        volumes_here()  # nothing is known to be open
    here.keep_open({"a": VolumeSpec("a", "/dev/vg/a", uuid=UUID)})
    assert volumes_here() == ["a"]
