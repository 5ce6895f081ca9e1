# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's own test driver: real library, real events, guests made of nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vmcryptd.adapters.libvirt.domains import Libvirt
from vmcryptd.core.model import Virtualisation

DEFAULT = "test:///default"
TIMEOUT_S = 60.0

NODE = """<node>
  <domain type="test">
    <name>imap</name>
    <uuid>11111111-1111-1111-1111-111111111111</uuid>
    <memory>32768</memory>
    <sysinfo type="fwcfg"><entry name="opt/com.coreos/config" file="/srv/vm/imap.ign"/></sysinfo>
    <os><type>hvm</type>
      <loader readonly="yes" type="pflash">/usr/share/OVMF/OVMF_CODE.fd</loader>
      <nvram>/srv/vm/imap_VARS.fd</nvram></os>
    <devices>
      <disk type="block"><driver name="qemu" type="raw"/><source dev="/dev/mapper/cr_imap"/>
        <target dev="vda"/></disk>
      <disk type="file"><driver name="qemu" type="qcow2"/><source file="/srv/vm/imap.qcow2"/>
        <target dev="vdb"/></disk>
      <disk type="volume"><driver name="qemu" type="qcow2"/>
        <source pool="vault" volume="spool"/><target dev="vdc"/></disk>
      <console type="pty"><log file="/srv/vm/imap.log"/></console>
    </devices>
  </domain>
  <pool type="dir">
    <name>vault</name>
    <uuid>33333333-3333-3333-3333-333333333333</uuid>
    <target><path>/srv/vault</path></target>
    <volume type="file">
      <name>spool</name>
      <capacity>1000000</capacity>
      <target><path>/srv/vault/spool</path><format type="qcow2"/></target>
    </volume>
  </pool>
</node>
"""


def domain_xml(name: str, device: str = "/dev/mapper/cr_new") -> str:
    return f"""<domain type="test"><name>{name}</name><memory>32768</memory>
        <os><type>hvm</type></os><devices><disk type="block"><source dev="{device}"/>
        <target dev="vda"/></disk></devices></domain>"""


class Observer:
    """The adapter under test, and a way to wait for what it tells."""

    def __init__(self, uri: str) -> None:
        self.domains = Libvirt(uri)
        self.calls = 0
        self._changed = asyncio.Event()

    def changed(self) -> None:
        self.calls += 1
        self._changed.set()

    async def sees(self, what: Callable[[Virtualisation], bool]) -> Virtualisation:
        async with asyncio.timeout(TIMEOUT_S):
            while not what(self.domains.current()):
                self._changed.clear()
                await self._changed.wait()
        return self.domains.current()

    @property
    def session(self) -> Any:
        session = self.domains._link._session
        assert session is not None
        return session


@asynccontextmanager
async def observing(uri: str = DEFAULT) -> AsyncIterator[Observer]:
    observer = Observer(uri)
    observer.domains.watch(observer.changed)
    try:
        await observer.domains.refresh(TIMEOUT_S)
        yield observer
    finally:
        await observer.domains.close()


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    def run_bounded(work: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(3 * TIMEOUT_S):
                await work

        asyncio.run(bounded(), debug=True)

    return run_bounded


@pytest.fixture
def outsider() -> Iterator[Any]:
    """Another connection to the same guests, as virsh has; without one the driver forgets them."""
    import libvirt

    connection = libvirt.open(DEFAULT)
    for domain in connection.listAllDomains():
        if domain.name() != "test":
            if domain.isActive():
                domain.destroy()
            domain.undefine()
    yield connection
    connection.close()


@pytest.fixture
def node(tmp_path: Path) -> str:
    path = tmp_path / "testdriver.xml"
    path.write_text(NODE)
    return f"test://{path}"


@pytest.fixture
def hang() -> Iterator[Callable[..., Any]]:
    """A call into libvirt that returns when the test is over."""
    import libvirt

    over = threading.Event()

    def wait(*_arguments: Any, **_named: Any) -> Any:
        over.wait()
        raise libvirt.libvirtError("too late")

    yield wait
    over.set()
