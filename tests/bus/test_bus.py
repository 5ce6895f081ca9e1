# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bus boundary: what strangers send, what callers get back, what followers see."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import random
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vmcryptd.bus import transport, wire
from vmcryptd.bus.objects import (
    CALL,
    MAX_PENDING,
    Handle,
    Interface,
    ObjectPath,
    Objects,
    exported,
    take_fd,
)
from vmcryptd.bus.transport import Call, Connection, RemoteError, Typed, object_path
from vmcryptd.bus.wire import Frame
from vmcryptd.core.errors import (
    DeadlineError,
    NoSuchVolumeError,
    NotAuthorizedError,
    UnreachableError,
)

NAME = "org.vmcryptd1.Test"
ROOT = "/org/vmcryptd1"
MANAGER = "org.vmcryptd1.Manager"
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
INTERNAL = "vmcryptd made a mistake; its journal tells more"

pytestmark = pytest.mark.bus_library


@dataclass
class Gate:
    """An authority that says yes, no, or nothing yet."""

    allowed: bool = True
    asked: list[tuple[str, str, bool]] = field(default_factory=list)
    trusted: frozenset[int] = frozenset({os.getuid()})
    cancelled: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    hangs: bool = False

    async def check(
        self, call: Call, actions: Sequence[str], purpose: str, details: Mapping[str, str]
    ) -> None:
        self.asked += [(call.sender, action, call.interactive) for action in actions]
        if self.hangs:
            try:
                await self.open.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if not self.allowed:
            raise NotAuthorizedError("no")


class Manager(Interface, name=MANAGER):
    State: str
    Waiting: list[str]

    def __init__(self) -> None:
        super().__init__(State="locked", Waiting=[])
        self.go = asyncio.Event()
        self.started: asyncio.Queue[str] = asyncio.Queue()
        self.finished: list[str] = []

    @exported(action=None)
    async def Plan(self, goal: str) -> str:
        return goal

    @exported(action="org.vmcryptd1.unlock")
    async def Unlock(self, volume: str) -> str:
        self.started.put_nowait(volume)
        await self.go.wait()
        self.finished.append(volume)
        return f"{volume} {CALL.get().sender}"

    @exported(action="org.vmcryptd1.unlock")
    async def UnlockWithKey(self, volume: str, key: Handle) -> str:
        with os.fdopen(take_fd(key)) as file:
            assert not os.get_inheritable(file.fileno())
            return file.read()

    @exported(action="org.vmcryptd1.unlock")
    async def Forget(self, key: Handle) -> None:
        """Never takes its key."""

    @exported(action="org.vmcryptd1.lock")
    async def Lock(self, volume: str) -> None:
        raise NoSuchVolumeError(f"no volume is named {volume!r}")

    @exported(action="org.vmcryptd1.lock", overtakes=True)
    async def LockAll(self) -> None:
        """What was begun before this takes no effect after it."""

    @exported(action="org.vmcryptd1.lock")
    async def Bug(self) -> None:
        raise RuntimeError("secret detail in /some/path.py")

    @exported(action=None)
    async def WrongResult(self) -> str:
        return 7  # type: ignore[return-value]

    @exported(action=None)
    async def Boot(self) -> ObjectPath:
        return ObjectPath(object_path("job", "1"))


class Guarded(Interface, name="org.vmcryptd1.Guarded"):
    @exported(action="org.vmcryptd1.lock", purpose="lock volume $(volume)")
    async def Lock(self, volume: str) -> None:
        raise NoSuchVolumeError(f"no volume is named {volume!r}")


class Volume(Interface, name="org.vmcryptd1.Volume"):
    Name: str
    State: str
    Discard: bool
    NeededBy: list[str]


@dataclass
class Fixture:
    service: Connection
    objects: Objects
    gate: Gate
    manager: Manager
    client: Connection

    async def ask(self, member: str, signature: str = "", *body: Any, **options: Any) -> list[Any]:
        options.setdefault("timeout_s", 10)
        client = options.pop("client", self.client)
        interface = options.pop("interface", MANAGER)
        path = options.pop("path", ROOT)
        result: list[Any] = await client.call(
            NAME, path, interface, member, signature, body, **options
        )
        return result

    async def refused(self, member: str, signature: str = "", *body: Any, **options: Any) -> str:
        with pytest.raises(RemoteError) as caught:
            await self.ask(member, signature, *body, **options)
        return caught.value.name.removeprefix("org.freedesktop.DBus.Error.").removeprefix(
            "org.vmcryptd1.Error."
        )


@contextlib.asynccontextmanager
async def serving(gate: Gate | None = None) -> AsyncIterator[Fixture]:
    service, client = await transport.connect(), await transport.connect()
    gate, manager = gate or Gate(), Manager()
    objects = Objects(service, ROOT, gate)
    objects.export(ROOT, manager)
    await objects.own(NAME)
    objects.serve()
    try:
        yield Fixture(service, objects, gate, manager, client)
    finally:
        await objects.stop()
        await client.disconnect()
        await service.disconnect()


def test_a_call_that_waits_for_polkit_is_overtaken(run: Any) -> None:
    """Authorised at last, it takes no effect after everything was locked."""

    async def test() -> None:
        async with serving() as it:
            it.manager.go.set()
            it.gate.hangs = True
            early = asyncio.create_task(it.refused("Unlock", "s", "a"))
            while not it.gate.asked:
                await asyncio.sleep(0.001)
            it.gate.hangs = False
            await it.ask("LockAll")
            it.gate.open.set()
            assert await early == "Cancelled"
            assert it.manager.finished == []
            await it.ask("Unlock", "s", "b")
            assert it.manager.finished == ["b"]

    run(test())


def test_a_call_whose_turn_has_not_come_is_overtaken(run: Any) -> None:
    """Its user had many calls: it was sent before everything was locked, and is served after it."""

    async def test() -> None:
        async with serving(Gate(trusted=frozenset())) as it:
            it.manager.go.set()
            await it.ask("Plan", "s", "boot")
            admission = it.objects._admission
            lane = admission._lanes[os.getuid()]
            lane.rests_until = math.inf
            early = asyncio.create_task(it.refused("Unlock", "s", "a"))
            read = asyncio.create_task(it.ask("Plan", "s", "lock"))
            while len(lane.frames) < 2:
                await asyncio.sleep(0.001)
            waiting = [lane.take(), lane.take()]
            lane.rests_until = 0
            await it.ask("LockAll")
            for frame in waiting:
                lane.add(frame)
            await it.ask("Plan", "s", "boot")
            assert await early == "Cancelled"
            assert await read == ["lock"]
            assert it.manager.finished == []

    run(test())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def pipe(content: str = "") -> Any:
    reader, writer = os.pipe()
    os.write(writer, content.encode())
    os.close(writer)
    try:
        yield reader
    finally:
        os.close(reader)


def test_plain_values_both_ways(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            assert await it.ask("Plan", "s", "böot ☃") == ["böot ☃"]
            assert await it.ask("Boot") == ["/org/vmcryptd1/job/_31"]
            assert await it.ask("Get", "ss", MANAGER, "State", interface=PROPERTIES) == ["locked"]
            # A name that is not UTF-8, or holds NUL, gets an answer, not a hang-up.
            assert await it.ask("Plan", "s", "a\udcff\0b") == ["a?\ufffdb"]
            assert it.service._transport.connected

    run(test())


def test_a_key_is_handed_over_as_a_descriptor(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            with pipe("hunter2") as key:
                before = descriptors()
                assert await it.ask("UnlockWithKey", "sh", "x", 0, fds=[key]) == ["hunter2"]
                assert await it.ask("Forget", "h", 0, fds=[key]) == []
                assert descriptors() == before
                os.fstat(key)  # the client's own is still the client's

    run(test())


def test_errors_carry_their_name_and_nothing_else(run: Any, caplog: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            for member, text in (("Lock", "no volume is named 'x'"), ("Bug", INTERNAL)):
                with pytest.raises(RemoteError) as caught:
                    await it.ask(member, *(["s", "x"] if member == "Lock" else []))
                name = "NoSuchVolume" if member == "Lock" else "Internal"
                assert (caught.value.name, caught.value.text) == (
                    "org.vmcryptd1.Error." + name,
                    text,
                )
            assert await it.refused("WrongResult") == "Internal"
            assert [record.exc_info is not None for record in caplog.records] == [True, True]
            with pytest.raises(RemoteError) as caught:
                await it.ask("Lock", "s", "x" * 50_000)
            assert len(caught.value.text) <= transport.MAX_TEXT

    with caplog.at_level(logging.ERROR):
        run(test())


def test_standard_errors(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            nowhere = {"path": "/nowhere"}
            properties = {"interface": PROPERTIES}
            assert await it.refused("Nope") == "UnknownMethod"
            assert await it.refused("Plan", "u", 7) == "InvalidArgs"
            assert await it.refused("Plan", **nowhere) == "UnknownObject"
            assert await it.refused("Plan", interface="a.b") == "UnknownInterface"
            assert await it.refused("Get", "ss", "a.b", "State", **properties) == "UnknownInterface"
            assert await it.refused("Get", "ss", "", "State", **properties) == "UnknownInterface"
            assert await it.refused("GetAll", "s", "a.b", **properties) == "UnknownInterface"
            assert await it.refused("Get", "ss", MANAGER, "Nope", **properties) == "UnknownProperty"
            new = Typed("s", "ready")
            refused = await it.refused("Set", "ssv", MANAGER, "State", new, **properties)
            assert refused == "PropertyReadOnly"
            assert it.manager.values["State"] == "locked"
            assert await it.ask("GetAll", "s", PROPERTIES, **properties) == [{}]
            for _ in range(2):  # dbus_next's own answers the second one with a traceback
                peer = await it.ask("GetMachineId", interface="org.freedesktop.DBus.Peer")
                assert peer == [Path("/etc/machine-id").read_text().strip()]
            assert await it.ask("Ping", interface="org.freedesktop.DBus.Peer", **nowhere) == []
            introspect = "org.freedesktop.DBus.Introspectable"
            assert (
                await it.refused("Introspect", interface=introspect, **nowhere) == "UnknownObject"
            )

    run(test())


def test_the_sender_is_right_under_interleaved_calls(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            clients = [it.client, await transport.connect(), await transport.connect()]
            calls = [
                asyncio.create_task(it.ask("Unlock", "s", str(n), client=one))
                for n, one in enumerate(clients)
            ]
            assert {await it.manager.started.get() for _ in clients} == {"0", "1", "2"}
            it.manager.go.set()
            answers = [(await call)[0] for call in calls]
            names = [one._transport.unique_name for one in clients]
            assert answers == [f"{n} {name}" for n, name in enumerate(names)]
            assert sorted(sender for sender, _, _ in it.gate.asked) == sorted(names)
            for one in clients[1:]:
                await one.disconnect()

    run(test())


def test_who_is_not_authorised_is_refused_before_anything_happens(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            it.gate.allowed = False
            assert await it.refused("Unlock", "s", "x", interactive=True) == "NotAuthorized"
            assert await it.refused("Unlock", "s", "x") == "NotAuthorized"
            assert [ask[1:] for ask in it.gate.asked] == [
                ("org.vmcryptd1.unlock", True),
                ("org.vmcryptd1.unlock", False),
            ]
            assert it.manager.started.empty()
            assert await it.ask("Plan", "s", "boot") == ["boot"]

    run(test())


HOSTILE: list[tuple[str, str, str, list[Any], int]] = [
    ("org.freedesktop.DBus.Peer", "Ping", "", [], 1),
    ("org.freedesktop.DBus.Peer", "Ping", "h", [0], 1),
    ("org.freedesktop.DBus.Introspectable", "Introspect", "", [], 1),
    (PROPERTIES, "Set", "ssv", [MANAGER, "State", Typed("h", 0)], 1),
    (PROPERTIES, "GetAll", "s", [MANAGER], 3),
    (OBJECT_MANAGER, "GetManagedObjects", "", [], 1),
    (MANAGER, "Nope", "h", [0], 1),
    (MANAGER, "UnlockWithKey", "s", ["x"], 1),  # wrong signature
    (MANAGER, "UnlockWithKey", "sh", ["x", 0], 1),  # refused
    (MANAGER, "UnlockWithKey", "sh", ["x", 7], 1),  # no such descriptor
    (MANAGER, "UnlockWithKey", "sh", ["x", 0], 0),  # none came: 0 is no index into our own
    (MANAGER, "UnlockWithKey", "sh", ["x", 0], 3),  # more than are named
    (MANAGER, "UnlockWithKey", "sah", ["x", [0]], 1),
    (MANAGER, "Lock", "s", ["x"], 2),
    ("a.b", "C", "v", [Typed("a{sv}", {"x": Typed("h", 0)})], 1),
]


def test_hostile_calls_leave_nothing_behind(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            it.gate.allowed = False

            async def once() -> None:
                for interface, member, signature, body, count in HOSTILE:
                    with contextlib.suppress(RemoteError):
                        await it.client.call(
                            NAME, ROOT, interface, member, signature, body,
                            timeout_s=60, fds=[key] * count,
                        )  # fmt: skip
                it.client._post(  # a signal to one connection, with a descriptor
                    message_type=transport.MessageType.SIGNAL, destination=NAME, path=ROOT,
                    interface="a.b", member="C", signature="h", body=[0], fds=[key],
                )  # fmt: skip
                it.client.tell(NAME, ROOT, MANAGER, "Bug")

            with pipe() as key:
                await once()
                await it.ask("Plan", "s", "x")
                before = descriptors()
                for _ in range(14):
                    await once()
                await it.ask("Plan", "s", "x")
                assert descriptors() == before
                assert not it.objects._pending
                assert not it.objects._counts

    run(test())


def test_a_descriptor_that_did_not_come_is_not_one_of_ours(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            for index, count in ((0, 0), (1, 0), (7, 1), (0, 2)):
                with pipe() as key:
                    fds = [key] * count
                    refused = await it.refused("UnlockWithKey", "sh", "x", index, fds=fds)
                    assert refused == "InvalidArgs"
            assert it.gate.asked == []

    run(test())


def test_thousands_of_refusals_cost_no_memory(run: Any) -> None:
    def resident_kib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    async def test() -> None:
        random.seed(1)
        async with serving() as it:
            it.gate.allowed = False

            async def hundreds() -> None:
                with pipe() as key:
                    for n in range(500):
                        with contextlib.suppress(RemoteError):
                            if n % 2:
                                await it.ask("UnlockWithKey", "sh", "x", 0, fds=[key])
                            else:  # a new signature each time: dbus_next would remember them all
                                kinds = "".join(random.choice("ynqiuxtd") for _ in range(250))
                                await it.ask("Unlock", f"a({kinds})", [])

            await hundreds()
            gc.collect()
            before, fds = resident_kib(), descriptors()
            for _ in range(3):
                await hundreds()
            gc.collect()
            assert descriptors() == fds
            # 750 signatures would be some 40 MiB; the 256 that are remembered are there already.
            assert resident_kib() - before < 16 * 1024

    run(test())


if transport._LIBRARY == "dbus_next":  # dbus_fast parses fast enough

    def test_a_huge_message_is_not_parsed(run: Any) -> None:
        async def test() -> None:
            async with serving() as it:
                assert await it.refused("Plan", "s", "x" * 10_000_000) == "LimitsExceeded"
                assert await it.refused("Plan", "as", ["x"] * 100_000) == "LimitsExceeded"
                assert await it.refused("Plan", "s", "x", path="/a" * 100_000) == "LimitsExceeded"
                assert await it.refused("Nope", path="/a" * 100_000) == "LimitsExceeded"
                # An answer may be as large as it likes.
                it.manager.changed(Waiting=["x" * 100] * 2000)
                assert (
                    len((await it.ask("GetAll", "s", MANAGER, interface=PROPERTIES))[0]["Waiting"])
                    == 2000
                )

        run(test())


def test_one_sender_cannot_pile_up_calls(run: Any) -> None:
    async def test() -> None:
        async with serving(Gate(trusted=frozenset(), hangs=True)) as it:
            calls = [
                asyncio.create_task(it.ask("Unlock", "s", "x")) for _ in range(MAX_PENDING + 5)
            ]
            done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 5:
                more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                done |= more
            assert len(it.gate.asked) == MAX_PENDING
            names = {call.exception().name for call in done}  # type: ignore[union-attr]
            assert names == {"org.freedesktop.DBus.Error.LimitsExceeded"}
            other = await transport.connect()
            another = asyncio.create_task(it.ask("Unlock", "s", "y", client=other))
            it.gate.open.set()
            it.manager.go.set()
            assert (await another)[0].startswith("y ")
            assert {(await call)[0][0] for call in waiting} == {"x"}
            assert not it.objects._counts
            await other.disconnect()

    run(test())


def test_who_leaves_is_not_asked_any_more_but_what_runs_goes_on(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            runner, asker = await transport.connect(), await transport.connect()
            running = asyncio.create_task(it.ask("Unlock", "s", "runs", client=runner))
            assert await it.manager.started.get() == "runs"
            it.gate.hangs = True
            asking = asyncio.create_task(it.ask("Unlock", "s", "asks", client=asker))
            while len(it.gate.asked) < 2:
                await it.ask("Plan", "s", "x")  # a round trip, so that the other call has come
            await runner.disconnect()
            await asker.disconnect()
            ends = await asyncio.gather(running, asking, return_exceptions=True)
            assert all(isinstance(end, Exception) for end in ends)
            while it.gate.cancelled < 1:
                await it.ask("Plan", "s", "x")
            it.manager.go.set()
            while it.objects._pending:
                await it.ask("Plan", "s", "x")
            assert it.manager.finished == ["runs"]

    run(test())


def test_stop_answers_everything_exactly_once(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            replies: list[Any] = []
            handler = it.client._transport.reader.on_frame

            def count(frame: Frame) -> None:
                if frame.reply_serial:
                    replies.append(frame.reply_serial)
                handler(frame)

            it.client._transport.reader.on_frame = count
            calls = [asyncio.create_task(it.refused("Unlock", "s", str(n))) for n in range(3)]
            for _ in calls:
                await it.manager.started.get()
            with pipe() as key:
                before = descriptors()
                it.gate.hangs = True
                calls.append(asyncio.create_task(it.refused("Forget", "h", 0, fds=[key])))
                while len(it.gate.asked) < 4:
                    await it.ask("Plan", "s", "x")
                replies.clear()
                await it.objects.stop()
                assert [await call for call in calls] == ["ShuttingDown"] * 4
                assert await it.refused("Plan", "s", "x") == "ShuttingDown"
                assert descriptors() == before
            assert len(replies) == len(set(replies)) == 5

    run(test())


def test_stop_does_not_wait_for_what_ignores_it(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            release = asyncio.Event()

            async def stubborn(*_: Any) -> None:
                while not release.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await release.wait()

            it.gate.check = stubborn  # type: ignore[method-assign]
            call = asyncio.create_task(it.refused("Unlock", "s", "x"))
            while not it.objects._pending:
                await it.ask("Plan", "s", "x")
            await it.objects.stop(grace_s=0.01)
            assert await call == "ShuttingDown"
            release.set()

    run(test())


def test_a_call_that_wants_no_answer_gets_none(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            seen: list[int] = []
            handler = it.client._transport.reader.on_frame

            def note(frame: Frame) -> None:
                if frame.kind in (wire.METHOD_RETURN, wire.ERROR):
                    seen.append(frame.kind)
                handler(frame)

            it.client._transport.reader.on_frame = note
            for member, signature in (("Bug", ""), ("Nope", ""), ("Plan", "s"), ("Lock", "s")):
                it.client.tell(NAME, ROOT, MANAGER, member, signature, ["x"] if signature else [])
            await it.ask("Plan", "s", "x")
            assert seen == [wire.METHOD_RETURN]

    run(test())


def test_only_real_changes_are_announced_and_typing_errors_raise(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            seen: list[tuple[str, list[Any]]] = []
            await it.client.match(
                lambda signal: seen.append((signal.path, signal.body)),
                sender=NAME, interface=PROPERTIES, path_namespace=ROOT,
            )  # fmt: skip
            it.manager.changed(State="waiting", Waiting=["a"])
            it.manager.changed(State="waiting", Waiting=["a"])
            it.manager.changed(State="ready", Waiting=["a"])
            await it.ask("Plan", "s", "x")
            assert seen == [
                (ROOT, [MANAGER, {"State": "waiting", "Waiting": ["a"]}, []]),
                (ROOT, [MANAGER, {"State": "ready"}, []]),
            ]
            with pytest.raises(TypeError, match="Staet"):
                it.manager.changed(Staet="ready")
            wrong: list[dict[str, object]] = [
                {"State": None}, {"State": 7}, {"Waiting": "abc"}, {"Waiting": ["a", None]},
            ]  # fmt: skip
            for values in wrong:
                with pytest.raises(TypeError):
                    it.manager.changed(**values)
            with pytest.raises(TypeError, match="Discard"):
                Volume(Name="x", State="locked", NeededBy=[])
            waiting = ["b"]
            it.manager.changed(Waiting=waiting)
            waiting.append("c")  # the snapshot is not the caller's list
            assert it.manager.values["Waiting"] == ("b",)

    run(test())


def test_following_the_signals_gives_what_get_managed_objects_gives(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            mirror: dict[str, Any] = {}

            def follow(signal: transport.Signal) -> None:
                if signal.member == "InterfacesAdded":
                    assert signal.path == ROOT
                    mirror.setdefault(signal.body[0], {}).update(signal.body[1])
                elif signal.member == "InterfacesRemoved":
                    for name in signal.body[1]:
                        del mirror[signal.body[0]][name]
                    if not mirror[signal.body[0]]:
                        del mirror[signal.body[0]]
                elif signal.path != ROOT:
                    mirror[signal.path][signal.body[0]].update(signal.body[1])

            await it.client.match(follow, sender=NAME, path_namespace=ROOT)
            rng = random.Random(7)
            volumes: dict[str, Volume] = {}
            for step in range(300):
                name = rng.choice("abcdefgh")
                path = object_path("volume", name)
                if name not in volumes:
                    volumes[name] = Volume(Name=name, State="locked", Discard=False, NeededBy=[])
                    it.objects.export(path, volumes[name])
                elif rng.random() < 0.3:
                    it.objects.unexport(path)
                    del volumes[name]
                else:
                    volumes[name].changed(
                        State=rng.choice(["locked", "unlocked"]), NeededBy=[str(step)]
                    )
            [now] = await it.ask("GetManagedObjects", interface=OBJECT_MANAGER)
            assert now == mirror
            assert len(now) == len(volumes) > 3
            below = object_path("volume", next(iter(volumes)))
            wrong = await it.refused("GetManagedObjects", interface=OBJECT_MANAGER, path=below)
            assert wrong == "UnknownInterface"

    run(test())


def test_a_burst_is_not_a_lost_connection(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            seen: list[int] = []
            await it.client.match(lambda signal: seen.append(signal.body[0]), member="Burst")
            with pipe("key") as key:
                calls = []
                for n in range(3000):
                    it.service.emit(ROOT, "a.b", "Burst", "is", [n, "x" * 1000])
                    if n % 100 == 0:  # descriptors wait for room too
                        calls.append(
                            asyncio.create_task(
                                it.ask("Forget", "h", 0, fds=[key], client=it.service)
                            )
                        )
                for call in calls:
                    assert await call == []
            await it.ask("Plan", "s", "x")
            assert seen == list(range(3000))

    run(test())


INTROSPECTED = """
org.freedesktop.DBus.Introspectable Introspect()→s
org.freedesktop.DBus.ObjectManager GetManagedObjects()→a{oa{sa{sv}}}
org.freedesktop.DBus.ObjectManager InterfacesAdded oa{sa{sv}}
org.freedesktop.DBus.ObjectManager InterfacesRemoved oas
org.freedesktop.DBus.Peer GetMachineId()→s
org.freedesktop.DBus.Peer Ping()→
org.freedesktop.DBus.Properties Get(interface_name s,property_name s)→v
org.freedesktop.DBus.Properties GetAll(interface_name s)→a{sv}
org.freedesktop.DBus.Properties PropertiesChanged sa{sv}as
org.freedesktop.DBus.Properties Set(interface_name s,property_name s,value v)→
org.vmcryptd1.Manager Boot()→o
org.vmcryptd1.Manager Bug()→
org.vmcryptd1.Manager Forget(key h)→
org.vmcryptd1.Manager Lock(volume s)→
org.vmcryptd1.Manager LockAll()→
org.vmcryptd1.Manager Plan(goal s)→s
org.vmcryptd1.Manager State s read true
org.vmcryptd1.Manager Unlock(volume s)→s
org.vmcryptd1.Manager UnlockWithKey(volume s,key h)→s
org.vmcryptd1.Manager Waiting as read true
org.vmcryptd1.Manager WrongResult()→s
"""


def flat(xml: str) -> list[str]:
    lines = []
    for interface in ET.fromstring(xml).iter("interface"):
        for member in interface:
            arguments = member.findall("arg")
            text = f"{interface.get('name')} {member.get('name')}"
            if member.tag == "method":
                into = [
                    f"{a.get('name')} {a.get('type')}"
                    for a in arguments
                    if a.get("direction") == "in"
                ]
                out = [str(a.get("type")) for a in arguments if a.get("direction") == "out"]
                text += f"({','.join(into)})→{''.join(out)}"
            elif member.tag == "signal":
                text += " " + "".join(str(a.get("type")) for a in arguments)
            else:
                [annotation] = member
                text += f" {member.get('type')} {member.get('access')} {annotation.get('value')}"
            lines.append(text)
    return sorted(lines)


def test_introspection_is_complete(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:

            async def introspect(path: str) -> str:
                interface = "org.freedesktop.DBus.Introspectable"
                return str((await it.ask("Introspect", path=path, interface=interface))[0])

            values: dict[str, Any] = {"State": "locked", "Discard": False, "NeededBy": []}
            for name in ("a", "ab"):  # dbus_next's own finds a child "b" below "a"
                it.objects.export(object_path("volume", name), Volume(Name=name, **values))
            assert flat(await introspect(ROOT)) == INTROSPECTED.strip().splitlines()

            async def nodes(path: str) -> list[str | None]:
                return [
                    node.get("name")
                    for node in ET.fromstring(await introspect(path)).findall("node")
                ]

            assert await nodes("/") == ["org"]
            assert await nodes("/org") == ["vmcryptd1"]
            assert await nodes(ROOT) == ["volume"]
            assert await nodes(ROOT + "/volume") == ["a", "ab"]
            assert await nodes(ROOT + "/volume/a") == []
            assert "ObjectManager" not in await introspect(ROOT + "/volume/a")

    run(test())


def test_busctl_finds_its_way(run: Any, bus_address: str) -> None:
    async def busctl(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "busctl", f"--address={bus_address}", *arguments,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        return output.decode()

    async def test() -> None:
        async with serving() as it:
            values: dict[str, Any] = {"State": "locked", "Discard": False, "NeededBy": []}
            it.objects.export(object_path("volume", "a-b"), Volume(Name="a-b", **values))
            tree = await busctl("tree", "--list", NAME)
            assert object_path("volume", "a-b") in tree.split()
            shown = await busctl("introspect", NAME, ROOT, MANAGER)
            assert ".UnlockWithKey" in shown
            assert "emits-change" in shown
            assert (await busctl("call", NAME, ROOT, MANAGER, "Plan", "s", "boot")) == 's "boot"\n'
            answer = await busctl("call", NAME, ROOT, MANAGER, "Lock", "s", "x")
            assert answer == "Call failed: no volume is named 'x'\n"

    run(test())


def test_a_signal_of_another_sender_is_ignored(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            listener, liar = await transport.connect(), await transport.connect()
            seen: list[transport.Signal] = []
            end = await listener.match(seen.append, sender=NAME, member="PrepareForSleep")
            target = listener._transport.unique_name
            for sender in (liar, it.service):
                sender._post(
                    message_type=transport.MessageType.SIGNAL, destination=target, path=ROOT,
                    interface="org.freedesktop.login1.Manager", member="PrepareForSleep",
                    signature="b", body=[sender is it.service],
                )  # fmt: skip
                with contextlib.suppress(RemoteError):  # a round trip behind it
                    await sender.call(target, "/", "a.b", "C", timeout_s=60)
            assert [(signal.sender, signal.body) for signal in seen] == [(NAME, [True])]
            end()
            assert listener._subscriptions == []
            await listener.disconnect()
            await liar.disconnect()

    run(test())


def test_the_owner_of_a_name_is_followed(run: Any) -> None:
    async def test() -> None:
        listener = await transport.connect()
        seen: list[list[Any]] = []
        await listener.match(lambda signal: seen.append(signal.body), sender="a.b.c", member="Hi")
        for turn in ("first", "second"):
            service = await transport.connect()
            service.emit("/", "a.b", "Hi", "s", ["too early"])
            await service.request_name("a.b.c")
            service.emit("/", "a.b", "Hi", "s", [turn])
            await service.disconnect()
        await listener.peer_uid(listener._transport.unique_name)
        assert seen == [["first"], ["second"]]
        await listener.disconnect()

    run(test())


def test_calls_end(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            with pytest.raises(DeadlineError, match="did not answer Unlock within 0.05 s"):
                await it.ask("Unlock", "s", "x", timeout_s=0.05)
            assert it.client._replies == {}
            assert (
                await it.refused("Plan", "s", "x", client=it.client, path="/") == "UnknownInterface"
            )
            with pytest.raises(RemoteError, match="ServiceUnknown|NameHasNoOwner"):
                await it.client.call("no.such.name", "/", "a.b", "C", timeout_s=60)
            bad: list[tuple[str, str, list[Any]]] = [("not a path", "", []), ("/", "s", [7])]
            for path, signature, body in bad:
                with pytest.raises(ValueError, match="cannot be sent"):
                    await it.client.call(NAME, path, "a.b", "C", signature, body, timeout_s=60)
            client = await transport.connect()
            call = asyncio.create_task(it.ask("Unlock", "s", "x", client=client, timeout_s=None))
            await it.manager.started.get()
            await client.disconnect()
            with pytest.raises(UnreachableError):
                await call
            with pytest.raises(UnreachableError):
                await it.ask("Plan", "s", "x", client=client)
            await client.closed()

    run(test())


def test_an_error_without_a_text_is_an_error(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            it.service.on_frame = it.service._serve  # past the queue
            it.service.on_call = lambda call: it.service._post(
                message_type=transport.MessageType.ERROR, reply_serial=call.serial,
                destination=call.sender, error_name="a.b.Empty",
            )  # fmt: skip
            with pytest.raises(RemoteError) as caught:
                await it.ask("Plan", "s", "x")
            assert (caught.value.name, caught.value.text) == ("a.b.Empty", "")

    run(test())


def test_descriptors_in_answers(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            with pipe("lock") as held:
                it.service.on_frame = it.service._serve  # past the queue
                it.service.on_call = lambda call: it.service._post(
                    message_type=transport.MessageType.METHOD_RETURN, reply_serial=call.serial,
                    destination=call.sender, signature="h", body=[0], fds=[held],
                )  # fmt: skip
                await it.ask("Inhibit")
                before = descriptors()
                await it.ask("Inhibit")  # not wanted: closed
                assert descriptors() == before
                [received] = await it.ask("Inhibit", wants_fds=True)
                assert os.read(received, 9) == b"lock"
                assert not os.get_inheritable(received)
                os.close(received)

    run(test())


def test_a_name_is_owned_once(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            with pytest.raises(transport.NameTakenError, match=NAME):
                await it.client.request_name(NAME)
            await it.service.request_name(NAME)

    run(test())


@pytest.mark.parametrize("hangs_up", ["at once", "when asked", "never"])
def test_a_bus_that_hangs_up_or_says_nothing_is_unreachable(
    run: Any, tmp_path: Path, hangs_up: str
) -> None:
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if hangs_up == "when asked":
            await reader.readline()  # dbus_next's own never returns from this
        if hangs_up == "never":
            await reader.read()
        writer.close()
        done.set()

    async def test() -> None:
        path = str(tmp_path / "bus")
        server = await asyncio.start_unix_server(answer, path)
        with pytest.raises(UnreachableError, match="cannot be reached"):
            await transport.connect(f"unix:path={path}", timeout_s=0.2)
        await done.wait()
        server.close()
        await server.wait_closed()
        for wrong in ("unix:path=/nonexistent", "rubbish", "x:y=z"):
            with pytest.raises(UnreachableError):
                await transport.connect(wrong)

    run(test())


def test_a_lost_bus_is_reported(run: Any) -> None:
    async def test() -> None:
        async with serving() as it:
            service = await transport.connect()
            service._transport._sock.shutdown(socket.SHUT_RDWR)
            await service.closed()
            service.emit("/", "a.b", "C", "", [])
            assert it.client._transport.connected

    run(test())


def test_object_paths() -> None:
    # The second column is what sd_bus_path_encode(3) makes of it.
    for name, escaped in (
        ("imap", "imap"), ("cr_imap", "cr_5fimap"), ("1a", "_31a"), ("a1", "a1"), ("", "_"),
        ("a/b", "a_2fb"), ("ö", "_c3_b6"), ("..", "_2e_2e"), ("a\n", "a_0a"), ("\udcff", "_ff"),
    ):  # fmt: skip
        assert object_path("volume", name) == f"/org/vmcryptd1/volume/{escaped}"


def test_what_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="must be async"):

        @exported(action="a.b")
        def sync() -> None: ...

    with pytest.raises(TypeError, match="no D-Bus type"):

        class _Wrong(Interface, name="a.b"):
            What: bytes


def test_a_client_is_cheap_to_import() -> None:
    code = "import sys, vmcryptd.bus.client; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    for heavy in ("pydantic", "libvirt", "logging.config", "unittest", "vmcryptd.bus.objects"):
        assert heavy not in loaded
    assert transport._LIBRARY in loaded
    assert {"dbus_next", "dbus_fast"} - {transport._LIBRARY} - set(loaded)


def test_failures_and_refusals_are_in_the_journal(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("vmcryptd.bus.objects.REFUSED_S", 0.5)
    uid = os.getuid()

    async def test() -> None:
        async with serving() as it:
            it.objects.export(f"{ROOT}/guarded", Guarded())
            options = {"path": f"{ROOT}/guarded", "interface": Guarded.interface_name}
            assert await it.refused("Lock", "s", "x", **options) == "NoSuchVolume"
            it.gate.allowed = False
            for _ in range(3):
                assert await it.refused("Lock", "s", "x", **options) == "NotAuthorized"
            async with asyncio.timeout(60):
                while "more times" not in caplog.text:
                    await asyncio.sleep(0.05)

    run(test())
    told = [(r.getMessage(), dict(r.fields)) for r in caplog.records if hasattr(r, "fields")]
    assert [text for text, _ in told] == [
        f"user {uid} failed to lock volume x: no volume is named 'x'",
        f"user {uid} was refused to lock volume x: no",
        f"user {uid} was refused 2 more times since then",
    ]
    assert [fields["VMCRYPTD_RESULT"] for _, fields in told[:2]] == [
        "NoSuchVolume",
        "NotAuthorized",
    ]
    assert [fields["VMCRYPTD_VOLUME"] for _, fields in told[:2]] == ["x", "x"]
    assert {fields["VMCRYPTD_UID"] for _, fields in told} == {str(uid)}
