# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private system bus, and a fake polkit on it; VMCRYPTD_BUS_LIBRARY says how we speak."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver

with warnings.catch_warnings():
    # dbus_next imports gi where there is one, and what Python 3.13 deprecates.
    warnings.simplefilter("ignore")
    from vmcryptd.bus import transport

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def run() -> Run:
    """Run a coroutine in a loop of its own, for half a minute at most."""

    def within(coroutine: Coroutine[Any, Any, Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(240):
                return await coroutine

        return asyncio.run(bounded())

    return within


@pytest.fixture(scope="session")
def bus_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A dbus-daemon of our own; ready when it has printed its address."""
    # Another user connects too, so the socket cannot be below pytest's private directory.
    with tempfile.TemporaryDirectory(prefix="vmcryptd-bus-") as folder:
        os.chmod(folder, 0o755)
        config = Path(folder, "bus.conf")
        config.write_text(CONFIG.format(socket=Path(folder, "socket")))
        daemon = subprocess.Popen(
            ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert daemon.stdout is not None
        address = daemon.stdout.readline().strip()
        assert address, "dbus-daemon did not start"
        yield address
        daemon.terminate()
        daemon.wait(10)
        daemon.stdout.close()


@pytest.fixture(scope="session", autouse=True)
def _forkserver() -> Iterator[None]:
    with forkserver.serving():
        yield


@pytest.fixture(autouse=True)
def _on_the_private_bus(bus_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus_address)


@pytest.fixture
def polkitd(bus_address: str) -> Iterator[None]:
    """python-dbusmock's polkitd: refuses everything until a test allows it."""
    # Debian's: from PyPI it would have to be compiled against D-Bus and GObject.
    mock = subprocess.Popen(
        ["/usr/bin/python3", "-m", "dbusmock", "--system", "--template", "polkitd"],
        env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": bus_address},
        stdout=subprocess.DEVNULL,
    )
    try:
        asyncio.run(_owned("org.freedesktop.PolicyKit1", bus_address))
        yield
    finally:
        mock.terminate()
        mock.wait(10)


async def _owned(name: str, address: str) -> None:
    connection = await transport.connect(address)
    appeared = asyncio.Event()

    def changed(signal: transport.Signal) -> None:
        if signal.body[2]:
            appeared.set()

    await connection.match(changed, sender=transport.DRIVER, member="NameOwnerChanged", arg0=name)
    body = [name]
    driver = transport.DRIVER, transport.DRIVER_PATH, transport.DRIVER
    if not (await connection.call(*driver, "NameHasOwner", "s", body, timeout_s=60))[0]:
        async with asyncio.timeout(120):
            await appeared.wait()
    await connection.disconnect()
