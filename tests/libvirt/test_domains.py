# SPDX-License-Identifier: LGPL-2.1-or-later
"""The adapter on libvirt's test driver."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.libvirt.conftest import DEFAULT, domain_xml, observing
from vmcryptd.adapters.libvirt import connection
from vmcryptd.adapters.libvirt import domains as module
from vmcryptd.adapters.libvirt.domains import Libvirt
from vmcryptd.adapters.libvirt.session import Event, Session
from vmcryptd.core.errors import DeadlineError, GuestError, LibvirtError
from vmcryptd.core.model import DiskSource, GuestSpec, GuestState, SourceType

TEST = GuestSpec("test")


def test_reads_sources_and_pools(run: Any, node: str) -> None:
    async def work() -> None:
        async with observing(node) as observer:
            known = observer.domains.current()
            assert known.reachable
            assert known.domains["imap"].sources == (
                DiskSource(SourceType.BLOCK, path="/dev/mapper/cr_imap"),
                DiskSource(SourceType.FILE, path="/srv/vm/imap.qcow2"),
                DiskSource(SourceType.POOL, pool="vault", volume="spool"),
                DiskSource(SourceType.FILE, path="/srv/vm/imap_VARS.fd"),
                DiskSource(SourceType.FILE, path="/srv/vm/imap.ign", shareable=True),
                DiskSource(SourceType.FILE, path="/srv/vm/imap.log", shareable=True),
            )
            assert known.domains["imap"].state is GuestState.RUNNING
            assert known.pools["vault"].path == "/srv/vault"
            assert known.pools["vault"].volumes == {"spool": "/srv/vault/spool"}

    run(work())


def test_pools_stop_and_start(run: Any, node: str) -> None:
    async def work() -> None:
        async with observing(node) as observer:
            domains = observer.domains
            await domains.stop_pool("vault")
            assert not domains.current().pools["vault"].active
            assert domains.current().pools["vault"].volumes == {}
            await domains.stop_pool("vault")
            await domains.start_pool("vault")
            assert domains.current().pools["vault"].active
            await domains.start_pool("vault")
            with pytest.raises(GuestError, match=r"pool none could not be started: .*not"):
                await domains.start_pool("none")
            with pytest.raises(GuestError, match="storage pool none could not be stopped"):
                await domains.stop_pool("none")

    run(work())


def test_sees_what_others_do(run: Any, outsider: Any) -> None:
    async def work() -> None:
        async with observing() as observer:
            await observer.sees(lambda known: known.domains["test"].state is GuestState.RUNNING)
            before = observer.calls
            other = outsider.lookupByName("test")
            other.suspend()
            await observer.sees(lambda known: known.domains["test"].state is GuestState.PAUSED)
            other.resume()
            await observer.sees(lambda known: known.domains["test"].state is GuestState.RUNNING)
            other.destroy()
            await observer.sees(lambda known: known.domains["test"].state is GuestState.OFF)
            other.create()
            await observer.sees(lambda known: known.domains["test"].state is GuestState.RUNNING)
            other.shutdown()
            await observer.sees(lambda known: known.domains["test"].state is GuestState.OFF)
            assert observer.calls >= before + 5
            other.create()

            outsider.defineXML(domain_xml("new"))
            known = await observer.sees(lambda known: "new" in known.domains)
            assert known.domains["new"].sources[0].path == "/dev/mapper/cr_new"
            assert known.domains["new"].persistent
            outsider.lookupByName("new").undefine()
            await observer.sees(lambda known: "new" not in known.domains)

            outsider.createXML(domain_xml("short-lived"))
            known = await observer.sees(lambda known: "short-lived" in known.domains)
            assert not known.domains["short-lived"].persistent
            outsider.lookupByName("short-lived").destroy()
            await observer.sees(lambda known: "short-lived" not in known.domains)

            pool = outsider.storagePoolLookupByName("default-pool")
            pool.destroy()
            await observer.sees(lambda known: not known.pools["default-pool"].active)
            pool.create()
            await observer.sees(lambda known: known.pools["default-pool"].active)

    run(work())


def test_autostart_shows_at_the_next_refresh(run: Any, outsider: Any) -> None:
    async def work() -> None:
        async with observing() as observer:
            for wanted in (1, 0):
                outsider.lookupByName("test").setAutostart(wanted)
                known = await observer.domains.refresh(10)
                assert known.domains["test"].autostart is bool(wanted)

    run(work())


def test_what_no_event_tells_shows_after_a_while(
    run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LOOK_S", 0.05)

    async def work() -> None:
        async with observing() as observer:
            outsider.lookupByName("test").setAutostart(1)
            await observer.sees(lambda known: known.domains["test"].autostart)

    run(work())


def test_a_reboot_is_no_stop(run: Any, outsider: Any) -> None:
    async def work() -> None:
        async with observing() as observer:
            states = []
            observer.domains.watch(
                lambda: states.append(observer.domains.current().domains["test"].state)
            )
            outsider.lookupByName("test").reboot()
            outsider.defineXML(domain_xml("after"))
            await observer.sees(lambda known: "after" in known.domains)
            assert set(states) == {GuestState.RUNNING}

    run(work())


def test_start_stop_kill(run: Any, outsider: Any, capfd: Any) -> None:
    async def work() -> None:
        async with observing() as observer:
            domains = observer.domains

            def state() -> GuestState:
                return domains.current().domains["test"].state

            await domains.start("test")
            assert state() is GuestState.RUNNING
            await domains.ready(TEST, 10)
            await domains.stop(TEST, 10)
            assert state() is GuestState.OFF
            await domains.stop(TEST, inf)
            await domains.start("test")
            assert state() is GuestState.RUNNING
            await domains.kill("test")
            assert state() is GuestState.OFF
            await domains.kill("test")
            await domains.kill("unknown")
            await domains.stop(GuestSpec("unknown"), 10)
            await domains.start("test")
            outsider.lookupByName("test").suspend()
            await observer.sees(lambda known: state() is GuestState.PAUSED)
            await domains.stop(TEST, 10)
            assert state() is GuestState.OFF
            with pytest.raises(GuestError) as caught:
                await domains.ready(TEST, 10)
            assert str(caught.value).startswith("guest test went off before it was ready")
            await domains.start("test")
            with pytest.raises(GuestError) as caught:
                await domains.start("unknown")
            text = str(caught.value)
            assert text.startswith("guest unknown could not be started: Domain not found")
            assert text.endswith(f"`virsh -c {DEFAULT} start unknown` shows the same")

    run(work())
    assert capfd.readouterr().err == ""


class Reasons:
    """What libvirt says of the domain "test" where the test driver has no way to bring that about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: tuple[int, int] | None = None
        real = libvirt.virDomain.state

        def state(domain: Any, flags: int = 0) -> Any:
            return list(self.said) if self.said and domain.name() == "test" else real(domain, flags)

        monkeypatch.setattr(libvirt.virDomain, "state", state)


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> Reasons:
    return Reasons(monkeypatch)


STARTING_UP = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP)


def test_a_start_by_libvirt_itself_is_waited_for_and_repeated_if_it_failed(
    run: Any, outsider: Any, reasons: Reasons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STARTING_S", 0.01)  # no event tells of a start that failed

    async def work() -> None:
        async with observing() as observer:
            reasons.said = STARTING_UP
            starting = asyncio.create_task(observer.domains.start("test"))
            await observer.sees(lambda known: known.domains["test"].state is GuestState.STARTING)
            assert not starting.done()
            outsider.lookupByName("test").destroy()
            reasons.said = None
            await starting
            assert observer.domains.current().domains["test"].state is GuestState.RUNNING
            assert outsider.lookupByName("test").isActive()

    run(work())


def test_a_start_by_libvirt_itself_that_fails_without_an_event(
    run: Any, outsider: Any, reasons: Reasons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STARTING_S", 0.01)
    is_active = libvirt.virDomain.isActive
    monkeypatch.setattr(
        libvirt.virDomain, "isActive", lambda domain: bool(reasons.said) or is_active(domain)
    )
    outsider.lookupByName("test").destroy()

    async def work() -> None:
        async with observing() as observer:
            reasons.said = STARTING_UP
            starting = asyncio.create_task(observer.domains.start("test"))
            await observer.sees(lambda known: known.domains["test"].state is GuestState.STARTING)
            reasons.said = None
            async with asyncio.timeout(connection.LOOK_S / 2):  # the look that would see it anyway
                await starting
            assert outsider.lookupByName("test").isActive()

    run(work())


def test_a_start_by_libvirt_itself_that_ends_well_is_left_alone(
    run: Any, outsider: Any, reasons: Reasons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STARTING_S", 0.01)

    async def work() -> None:
        async with observing() as observer:
            before = outsider.lookupByName("test").ID()
            reasons.said = STARTING_UP
            starting = asyncio.create_task(observer.domains.start("test"))
            await observer.sees(lambda known: known.domains["test"].state is GuestState.STARTING)
            reasons.said = None
            await starting
            assert outsider.lookupByName("test").ID() == before

    run(work())


def test_a_start_by_libvirt_itself_that_does_not_end(
    run: Any, outsider: Any, reasons: Reasons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_S", 0.05)
    reasons.said = STARTING_UP

    async def work() -> None:
        async with observing() as observer:
            with pytest.raises(GuestError, match=r"test is being started by libvirt since more"):
                await observer.domains.start("test")

    run(work())


@pytest.mark.parametrize(
    ("state", "reason", "trouble"),
    [
        ("SHUTOFF", "SHUTOFF_CRASHED", "died: its process ended without a shutdown"),
        ("SHUTOFF", "SHUTOFF_DAEMON", "died: its process ended without a shutdown"),
        ("SHUTOFF", "SHUTOFF_SHUTDOWN", ""),
        ("SHUTOFF", "SHUTOFF_DESTROYED", ""),
        ("SHUTOFF", "SHUTOFF_FAILED", ""),
        ("CRASHED", "CRASHED_PANICKED", "has crashed and is kept"),
        ("PAUSED", "PAUSED_IOERROR", "is paused by an error of a disk"),
        ("PAUSED", "PAUSED_USER", ""),
        ("RUNNING", "RUNNING_BOOTED", ""),
    ],
)
def test_why_a_guest_does_not_run(
    run: Any, outsider: Any, reasons: Reasons, state: str, reason: str, trouble: str
) -> None:
    reasons.said = (
        getattr(libvirt, f"VIR_DOMAIN_{state}"),
        getattr(libvirt, f"VIR_DOMAIN_{reason}"),
    )

    async def work() -> None:
        async with observing() as observer:
            found = observer.domains.current().domains["test"].trouble
            assert found.startswith(trouble) if trouble else not found

    run(work())


def test_a_crashed_guest_is_not_said_to_have_taken_too_long(
    run: Any, outsider: Any, reasons: Reasons
) -> None:
    reasons.said = (libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_CRASHED_PANICKED)

    async def work() -> None:
        async with observing() as observer:
            with pytest.raises(
                GuestError, match=r"guest test has crashed and cannot stop"
            ) as error:
                await observer.domains.stop(GuestSpec("test"), 60)
            assert error.type is GuestError  # not the one for a guest that did not stop in time

    run(work())


def test_what_libvirt_has_forgotten_over_a_restart_is_kept(
    run: Any, outsider: Any, reasons: Reasons
) -> None:
    reasons.said = (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED)

    async def work() -> None:
        async with observing() as observer:
            before = observer.domains.current().domains["test"]
            assert before.trouble
            reasons.said = (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN)
            assert (await observer.domains.refresh(10)).domains["test"] == before
            reasons.said = None
            assert (await observer.domains.refresh(10)).domains["test"].trouble == ""

    run(work())


def test_autostart_once(run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt-python 11.2 and later has it; the test driver does not."""
    monkeypatch.setattr(libvirt.virDomain, "autostartOnce", lambda _: 1, raising=False)

    async def work() -> None:
        async with observing() as observer:
            known = observer.domains.current().domains["test"]
            assert (known.autostart_once, known.autostart) == (True, False)

            def refuse(domain: Any) -> int:
                return int(domain.pMSuspendForDuration(0, 0))  # "not supported", as libvirt says it

            monkeypatch.setattr(libvirt.virDomain, "autostartOnce", refuse)
            assert not (await observer.domains.refresh(10)).domains["test"].autostart_once

    run(work())


def test_deaf_guest(run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed = []
    again: Callable[[], object] = list

    def deaf(_domain: Any, flags: int) -> int:
        pressed.append(flags)
        again()
        return 0

    monkeypatch.setattr(libvirt.virDomain, "shutdownFlags", deaf)
    monkeypatch.setattr(module, "PRESS_S", 0.05)

    async def work() -> None:
        nonlocal again
        async with observing() as observer:
            with pytest.raises(DeadlineError, match=r"guest test did not stop within 0\.3 s; see"):
                await observer.domains.stop(TEST, 0.3)
            # The agent may say yes and do nothing: the button is pressed in turn.
            assert pressed[:3] == [0, libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN, 0]

            # Off by other hands: seen by the event, long before the next press.
            monkeypatch.setattr(module, "PRESS_S", 1000)
            heard = asyncio.Event()
            again = partial(asyncio.get_running_loop().call_soon_threadsafe, heard.set)
            stopping = asyncio.create_task(observer.domains.stop(TEST, inf))
            await heard.wait()
            outsider.lookupByName("test").destroy()
            async with asyncio.timeout(120):
                await stopping
            await observer.domains.start("test")

    run(work())


def test_refused_shutdown(run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(domain: Any, flags: int) -> int:
        return int(domain.pMSuspendForDuration(0, 0))  # "not supported", as libvirt says it

    monkeypatch.setattr(libvirt.virDomain, "shutdownFlags", refuse)

    async def work() -> None:
        async with observing() as observer:
            with pytest.raises(GuestError, match="test could not be asked to stop: this function"):
                await observer.domains.stop(TEST, 10)

    run(work())


def test_lost_connection_comes_back(
    run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BACK_OFF_S", (0.01, 0.05))

    async def work() -> None:
        async with observing() as observer:
            seen = []
            observer.domains.watch(lambda: seen.append(observer.domains.current()))
            first = observer.session
            observer.domains._link.mark(Event.CLOSED, "", first)
            await observer.sees(lambda known: not known.reachable)
            assert "test" in observer.domains.current().domains
            await observer.sees(lambda known: known.reachable)
            assert {known.error for known in seen} == {""}  # it was back at the first attempt
            assert observer.session is not first
            outsider.lookupByName("test").suspend()
            await observer.sees(lambda known: known.domains["test"].state is GuestState.PAUSED)
            outsider.lookupByName("test").resume()

            # Nobody tells: the next question finds out, and is asked again.
            second = observer.session
            second.connection.close()
            await observer.domains.kill("test")
            assert observer.session is not second
            await observer.sees(lambda known: known.reachable)
            observer.session.connection.close()
            assert (await observer.domains.refresh(10)).reachable
            await observer.domains.start("test")

    run(work())


def test_stop_survives_a_lost_connection(
    run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BACK_OFF_S", (0.01, 0.05))
    pressed = asyncio.Event()
    monkeypatch.setattr(Session, "press", lambda *_: GuestState.RUNNING)

    async def work() -> None:
        async with observing() as observer:
            loop = asyncio.get_running_loop()

            def deaf(*_: Any) -> GuestState:
                loop.call_soon_threadsafe(pressed.set)
                return GuestState.RUNNING

            monkeypatch.setattr(Session, "press", deaf)
            stopping = asyncio.create_task(observer.domains.stop(TEST, inf))
            await pressed.wait()
            monkeypatch.undo()
            session = observer.session
            # Off while no program listens.
            session._events = lambda *_: None
            observer.domains._link.mark(Event.CLOSED, "", session)
            outsider.lookupByName("test").destroy()
            async with asyncio.timeout(120):
                await stopping
            await observer.domains.start("test")

    run(work())


def test_ready_by_port(run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.02)

    async def work() -> None:
        async with observing() as observer:
            server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            await observer.domains.ready(GuestSpec("test", ready=f"tcp:127.0.0.1:{port}"), 10)
            await observer.domains.ready(GuestSpec("test", ready=f"tcp:localhost:{port}"), 10)
            # A name with two addresses, and no program listens on the first.
            both = [(*[0] * 4, ("::1", port, 0, 0)), (*[0] * 4, ("127.0.0.1", port))]
            with monkeypatch.context() as names:
                names.setattr(module.socket, "getaddrinfo", lambda *_, **__: both)
                await observer.domains.ready(GuestSpec("test", ready=f"tcp:mail.test:{port}"), 10)
            server.close()
            await server.wait_closed()
            guest = GuestSpec("test", ready=f"tcp:127.0.0.1:{port}")
            text = f"guest test was not ready within 0.2 s: waited for .* 127.0.0.1 port {port}"
            with pytest.raises(DeadlineError, match=text):
                await observer.domains.ready(guest, 0.2)
            with pytest.raises(DeadlineError, match="waited for its guest agent"):
                await observer.domains.ready(GuestSpec("test", ready="agent"), 0.1)
            waiting = asyncio.create_task(observer.domains.ready(guest, inf))
            await asyncio.sleep(0)
            outsider.lookupByName("test").destroy()
            with pytest.raises(GuestError):
                await waiting
            await observer.domains.start("test")

    run(work())


def test_it_is_said_that_libvirt_stays_away(
    run: Any, outsider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BACK_OFF_S", (0.01, 0.05))

    async def work() -> None:
        async with observing() as observer:
            with monkeypatch.context() as patched:
                patched.setattr(observer.domains._link, "_uri", "test:///nowhere.xml")
                observer.domains._link.mark(Event.CLOSED, "", observer.session)
                known = await observer.sees(lambda known: bool(known.error))
                assert known.error.startswith("libvirt at test:///nowhere.xml cannot be reached: ")
                assert (known.reachable, known.domains["test"].state) == (False, GuestState.RUNNING)
            known = await observer.sees(lambda known: known.reachable)
            assert known.error == ""

    run(work())


def test_unreachable(run: Any, tmp_path: Path) -> None:
    async def work() -> None:
        missing = Libvirt(f"test://{tmp_path}/missing.xml")
        with pytest.raises(LibvirtError, match=r"cannot be reached: .*missing\.xml"):
            await missing.refresh(10)
        with pytest.raises(LibvirtError):
            await missing.start("test")
        assert not missing.current().reachable
        await missing.close()

    run(work())


def test_hanging_connect(
    run: Any, hang: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        domains = Libvirt(DEFAULT)
        with monkeypatch.context() as patched:
            patched.setattr(libvirt, "open", hang)
            with pytest.raises(LibvirtError, match=r"no answer within 0\.1 s"):
                await domains.refresh(0.1)
            with pytest.raises(LibvirtError, match=r"no connection within 0\.1 s"):
                await domains._link.ask(0.1, Session.kill, "test")
        await domains.close()

    run(work())


def test_hanging_call_holds_up_nobody(
    run: Any, outsider: Any, hang: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with observing() as observer:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0.005)

            ticking = asyncio.create_task(tick())
            with monkeypatch.context() as patched:
                patched.setattr(libvirt.virDomain, "isActive", hang)
                patched.setattr(module, "START_S", 0.2)
                with pytest.raises(LibvirtError, match="libvirt did not answer: no answer within"):
                    await observer.domains.start("test")
            ticking.cancel()
            assert ticks > 5
            await observer.domains.start("test")

    run(work())


def test_hanging_call_does_not_keep_the_process() -> None:
    script = """
import asyncio, sys, threading
import libvirt
libvirt.open = lambda uri: threading.Event().wait()
from vmcryptd.adapters.libvirt import connection
from vmcryptd.adapters.libvirt.domains import Libvirt
from vmcryptd.core.errors import LibvirtError
async def main():
    domains = Libvirt("test:///default")
    domains.watch(lambda: None)
    try:
        await domains.refresh(0.1)
    except LibvirtError:
        print("unreachable")
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "unreachable\n", "")


def test_libvirt_is_not_imported_before_it_is_used() -> None:
    script = """
import sys, vmcryptd.adapters.libvirt.domains
vmcryptd.adapters.libvirt.domains.Libvirt("test:///default")
print("libvirt" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    argv = [sys.executable, "-c", script]
    assert subprocess.check_output(argv, text=True, env=environment) == "False\n"


def test_a_thousand_domains(run: Any, outsider: Any) -> None:
    for number in range(1000):
        outsider.defineXML(domain_xml(f"many{number}"))

    async def work() -> None:
        async with observing() as observer:
            assert len(observer.domains.current().domains) == 1001
            calls = observer.calls
            for number in range(1000):
                outsider.lookupByName(f"many{number}").undefine()
            await observer.sees(lambda known: len(known.domains) == 1)
            assert observer.calls - calls < 1000  # coalesced

    run(work())


def test_what_is_watched_is_changed_in_the_loops_thread_only(run: Any) -> None:
    """libvirt changes it around each call, in whatever thread makes that; two at once leave a connection unwatched."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        here = threading.current_thread()

        def in_the_loop(method: Any) -> Any:
            def checked(*arguments: Any) -> Any:
                assert threading.current_thread() is here
                return method(*arguments)

            return checked

        for name in ("add_reader", "remove_reader", "add_writer", "remove_writer"):
            setattr(loop, name, in_the_loop(getattr(loop, name)))
        implementation = module._implementation(loop)
        freed: asyncio.Future[int] = loop.create_future()
        implementation.schedule_ff_callback = lambda iden, opaque: freed.set_result(iden)
        await asyncio.to_thread(int)  # what it needs is there from now on
        before = len(os.listdir("/proc/self/fd"))
        reader, writer = os.pipe()
        os.write(writer, b"ready")
        seen = asyncio.Event()

        def watched() -> int:
            watch = implementation._add_handle(reader, 1, lambda *_: seen.set(), None)
            implementation._update_handle(watch, 0)
            implementation._update_handle(watch, 1)
            return int(watch)

        watch = await asyncio.to_thread(watched)
        await seen.wait()
        # It closes the descriptor as soon as it wants it watched no more, and its number is used again.
        implementation._remove_handle(watch)
        os.close(reader)
        other, more = os.pipe()
        assert other == reader
        readable = asyncio.Event()
        loop.add_reader(other, readable.set)
        assert await freed == watch
        os.write(more, b"x")
        await readable.wait()
        loop.remove_reader(other)
        for fd in (other, more, writer):
            os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == before

    run(work())


def test_what_is_not_watched_any_more_is_not_called(run: Any) -> None:
    """Also when its turn had come already."""

    async def work() -> None:
        implementation = module._implementation(asyncio.get_running_loop())
        implementation.schedule_ff_callback = lambda iden, opaque: None
        reader, writer = os.pipe()
        os.write(writer, b"ready")

        def both(called: Callable[..., object]) -> tuple[int, int]:
            watch = implementation._add_handle(reader, 1, lambda *_: called("watch"), None)
            return watch, implementation._add_timeout(0, lambda *_: called("timer"), None)

        called: list[str] = []
        turns: asyncio.Queue[str] = asyncio.Queue()
        watch, timer = both(called.append)
        others = both(turns.put_nowait)

        async def all_had_their_turn() -> None:
            """Those that are called for ever were, twice from now on: the first time may have been under way."""
            while not turns.empty():
                turns.get_nowait()
            seen = Counter({"watch": 0, "timer": 0})
            while min(seen.values()) < 2:
                seen[await turns.get()] += 1

        while set(called) != {"watch", "timer"}:
            await turns.get()
        implementation._update_handle(watch, 0)
        implementation._update_timeout(timer, -1)
        called.clear()
        await all_had_their_turn()
        assert called == []
        implementation._update_handle(watch, 1)
        implementation._update_timeout(timer, 0)
        while set(called) != {"watch", "timer"}:
            await turns.get()
        implementation._remove_handle(watch)
        implementation._remove_timeout(timer)
        called.clear()
        await all_had_their_turn()
        assert called == []
        implementation._remove_handle(others[0])
        implementation._remove_timeout(others[1])
        for fd in (reader, writer):
            os.close(fd)

    run(work())
