# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon as its clients see it: calls with typed errors, and a mirror of its objects."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from vmcryptd.bus import transport
from vmcryptd.bus.transport import Connection, RemoteError, Signal
from vmcryptd.core.errors import (
    DeadlineError,
    NotAuthorizedError,
    UnreachableError,
    VmcryptdError,
    subclasses,
)
from vmcryptd.posix.changes import Changes

NAME = "org.vmcryptd1"
ROOT = "/org/vmcryptd1"
MANAGER = "org.vmcryptd1.Manager"
KINDS = {
    "org.vmcryptd1.Volume": "volume",
    "org.vmcryptd1.Guest": "guest",
    "org.vmcryptd1.Job": "job",
}
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECTS = "org.freedesktop.DBus.ObjectManager"

# A socket that systemd holds for a dead bus daemon accepts, and never answers.
CONNECT_S = 5.0
# Reading is answered from memory; the first call may have to start the daemon.
READ_S = 30.0

AWAY = "vmcryptd is not running; `systemctl status vmcryptd` tells why"
SILENT = "vmcryptd does not answer; `systemctl status vmcryptd` tells more"

# The bus's errors when no daemon answers, or none could be started.
_AWAY = {
    "ServiceUnknown",
    "NameHasNoOwner",
    "NoReply",
    "Disconnected",
    "NoServer",
    "TimedOut",
    "Timeout",
}
_REFUSED = {"AccessDenied", "AuthFailed", "InteractiveAuthorizationRequired"}
_OTHER_VERSION = {
    "UnknownMethod",
    "UnknownInterface",
    "UnknownObject",
    "UnknownProperty",
    "InvalidArgs",
}

Properties = dict[str, Any]


class Change(NamedTuple):
    """A change of one object, or of the daemon itself (`kind` "daemon")."""

    kind: str  # host, volume, guest, job, daemon
    name: str
    event: str  # changed, added, removed; up, down for the daemon
    values: Properties


def translated(error: RemoteError) -> VmcryptdError:
    """An error of the peer or of the bus as one of ours, with its exit status."""
    if cls := subclasses().get(error.name):
        return cls(error.text or error.name)
    kind = error.name.removeprefix(transport.STANDARD_ERROR)
    if (
        kind in _AWAY
        or kind.startswith("Spawn.")
        or error.name.startswith("org.freedesktop.systemd1.")
    ):
        return UnreachableError(AWAY)
    if kind in _REFUSED:
        return NotAuthorizedError(error.text or "not authorised")
    if kind in _OTHER_VERSION:
        text = f"the vmcryptd that runs is of another version: {error.text}; restart it"
        return VmcryptdError(text)
    return VmcryptdError(error.text or error.name)


class Client:
    """One connection to the daemon."""

    def __init__(self, connection: Connection, *, interactive: bool = False) -> None:
        self.connection = connection
        self.interactive = interactive
        self.present = False  # the daemon runs, and the mirror below is current
        self.host: Properties = {}
        self.volumes: dict[str, Properties] = {}
        self.guests: dict[str, Properties] = {}
        self.jobs: dict[str, Properties] = {}
        self._paths: dict[str, tuple[str, str]] = {}  # object path → kind, name
        self._early: list[Signal] = []  # what arrived before the objects were known
        self._changes = Changes()
        self._changed: Callable[[Change], None] = lambda change: None
        self._reloading: asyncio.Task[None] | None = None

    async def call(
        self, member: str, signature: str = "", *body: Any, fds: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> list[Any]:  # fmt: skip
        """Call a method of the manager, without a time limit. Raises VmcryptdError."""
        try:
            return await self.connection.call(
                NAME, ROOT, MANAGER, member, signature, body,
                timeout_s=timeout_s, fds=fds, interactive=self.interactive,
            )  # fmt: skip
        except RemoteError as error:
            raise translated(error) from None
        except ValueError as error:  # a file name that is no text, for example
            raise VmcryptdError(str(error)) from None

    async def ping(self, timeout_s: float = READ_S) -> None:
        """Raises UnreachableError unless the daemon answers; the bus starts it if necessary."""
        await self._read(ROOT, "org.freedesktop.DBus.Peer", "Ping", timeout_s=timeout_s)

    async def is_running(self) -> bool:
        """Asks the bus, which does not start the daemon for that."""
        driver = transport.DRIVER, transport.DRIVER_PATH, transport.DRIVER
        [owned] = await self.connection.call(*driver, "NameHasOwner", "s", [NAME], timeout_s=READ_S)
        return bool(owned)

    async def is_config_changed(self) -> bool:
        """Whether the configuration's files differ from what the daemon runs."""
        return bool((await self._read(ROOT, PROPERTIES, "Get", "ss", MANAGER, "ConfigChanged"))[0])

    async def load(self) -> None:
        """Read all that the daemon shows. Raises VmcryptdError."""
        [[host], [objects]] = await asyncio.gather(
            self._read(ROOT, PROPERTIES, "GetAll", "s", MANAGER),
            self._read(ROOT, OBJECTS, "GetManagedObjects"),
        )
        self.host = host
        self._paths.clear()
        for kind in KINDS.values():
            self._table(kind).clear()
        for path, interfaces in objects.items():
            self._add(path, interfaces)
        # Some are older than the answers, some newer; applied in order they give the present state.
        for signal in self._early:
            self._apply(signal)
        self._early.clear()
        self.present = True
        self._changes.notify()

    async def follow(self, changed: Callable[[Change], None] | None = None) -> None:
        """Load, and then follow all changes, also across restarts of the daemon."""
        if changed is not None:
            self._changed = changed
        await self.connection.match(self._on_signal, sender=NAME, path_namespace=ROOT)
        await self.connection.match(
            self._on_owner,
            sender=transport.DRIVER,
            interface=transport.DRIVER,
            member="NameOwnerChanged",
            arg0=NAME,
        )
        await self.load()

    async def until(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until the condition holds for the mirror; False when that took too long.

        Raises UnreachableError when the bus hangs up. While the daemon is away no condition holds.
        """
        lost = asyncio.ensure_future(self.connection.closed())
        lost.add_done_callback(lambda _: self._changes.notify())

        def is_so() -> bool:
            return self.present and predicate()

        try:
            limit_s = math.inf if timeout_s is None else timeout_s
            await self._changes.until(lambda: is_so() or lost.done(), limit_s)
            if lost.done() and not is_so():
                raise UnreachableError("the connection to the bus is lost")
        finally:
            lost.cancel()
        return is_so()

    async def job_ended(self, path: str) -> None:
        """Wait for the end of a job that a method returned; `follow` first.

        Raises the job's error, and UnreachableError if the daemon ends before the job.
        """
        number = path.rpartition("/")[2]
        job = self.jobs.get(number, {})
        await self._changes.until(lambda: not self.present or self.jobs.get(number) is not job)
        match job.get("State"):
            case "done":
                return
            case "failed":
                error = subclasses().get(str(job["ErrorName"]), VmcryptdError)
                raise error(str(job["LastError"]))
        raise UnreachableError(AWAY)

    async def close(self) -> None:
        if self._reloading is not None:
            self._reloading.cancel()
        await self.connection.disconnect()

    async def _read(
        self, path: str, interface: str, member: str, signature: str = "", *body: Any,
        timeout_s: float = READ_S,
    ) -> list[Any]:  # fmt: skip
        try:
            return await self.connection.call(
                NAME, path, interface, member, signature, body, timeout_s=timeout_s
            )
        except RemoteError as error:
            raise translated(error) from None
        except DeadlineError:
            raise UnreachableError(SILENT) from None

    def _table(self, kind: str) -> dict[str, Properties]:
        return {"volume": self.volumes, "guest": self.guests, "job": self.jobs}[kind]

    def _add(self, path: str, interfaces: dict[str, Properties]) -> tuple[str, str] | None:
        for interface, values in interfaces.items():
            if kind := KINDS.get(interface):
                name = str(values.get("Name", path.rpartition("/")[2]))
                self._paths[path] = kind, name
                self._table(kind)[name] = values
                return kind, name
        return None

    def _on_signal(self, signal: Signal) -> None:
        if not self.present:
            self._early.append(signal)
        elif change := self._apply(signal):
            self._changes.notify()
            self._changed(change)

    def _apply(self, signal: Signal) -> Change | None:
        match signal.member, signal.body:
            case "PropertiesChanged", [str(interface), dict(values), *_]:
                if interface == MANAGER:
                    self.host.update(values)
                    return Change("host", "", "changed", values)
                if known := self._paths.get(signal.path):
                    kind, name = known
                    self._table(kind)[name].update(values)
                    return Change(kind, name, "changed", values)
            case "InterfacesAdded", [str(path), dict(interfaces)]:
                if added := self._add(path, interfaces):
                    kind, name = added
                    return Change(kind, name, "added", dict(self._table(kind)[name]))
            case "InterfacesRemoved", [str(path), *_]:
                if known := self._paths.pop(path, None):
                    kind, name = known
                    return Change(kind, name, "removed", self._table(kind).pop(name, {}))
        return None

    def _on_owner(self, signal: Signal) -> None:
        self._early.clear()
        if self._reloading is not None:
            self._reloading.cancel()
        was_present, self.present = self.present, False
        if was_present:
            self._changed(Change("daemon", NAME, "down", {}))
        if signal.body[2]:
            self._reloading = asyncio.create_task(self._reload())
        self._changes.notify()

    async def _reload(self) -> None:
        # It may be gone again already; the next owner starts this anew.
        with contextlib.suppress(VmcryptdError):
            await self.load()
            self._changed(Change("daemon", NAME, "up", self.host))


@contextlib.asynccontextmanager
async def connect(*, interactive: bool = False) -> AsyncIterator[Client]:
    """A client on the system bus. Raises UnreachableError."""
    client = Client(await transport.connect(timeout_s=CONNECT_S), interactive=interactive)
    try:
        yield client
    finally:
        # An interrupted caller does not wait for a bus that hangs.
        await client.close()


def is_root() -> bool:
    return os.geteuid() == 0
