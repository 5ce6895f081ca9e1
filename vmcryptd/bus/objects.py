# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus objects that a process offers: each call is authorised, and answered exactly once.

class Manager(Interface, name="org.vmcryptd1.Manager"):
    State: str  # an annotation is a read-only property

    @exported(action="org.vmcryptd1.unlock")
    async def Unlock(self, volume: str) -> None:
        await self._engine.unlock(volume)
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    NewType,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from vmcryptd.bus import transport
from vmcryptd.bus.transport import Call, Connection, Signal, Typed
from vmcryptd.core.errors import InternalError, ShuttingDownError, VmcryptdError

log = logging.getLogger(__name__)

MAX_PENDING = 64  # calls of one connection that are not answered yet: each may be a polkit check

Handle = NewType("Handle", int)  # an argument of D-Bus type `h`, for take_fd()
ObjectPath = NewType("ObjectPath", str)
Function = TypeVar("Function", bound=Callable[..., Any])

CALL: ContextVar[Call] = ContextVar("CALL")  # the call that the running method answers

_SIGNATURES: dict[Any, str] = {
    str: "s", bool: "b", int: "x", float: "d", Any: "v", type(None): "",
    Handle: "h", ObjectPath: "o",
}  # fmt: skip


class Authority(Protocol):
    """Who may do what."""

    async def check(self, sender: str, action: str, *, interactive: bool) -> None:
        """Raises NotAuthorizedError."""


class _StandardError(VmcryptdError):
    """An error that the D-Bus specification names."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name

    @property
    def dbus_name(self) -> str:
        return transport.STANDARD_ERROR + self.name


class _Method(NamedTuple):
    function: Callable[..., Any]
    action: str | None
    arguments: Mapping[str, str]  # name → signature
    returns: str

    @property
    def signature(self) -> str:
        return "".join(self.arguments.values())


def exported(*, action: str | None) -> Callable[[Function], Function]:
    """Mark a method of an Interface as a D-Bus method that needs a polkit action.

    `None` is open to everybody: for reading only.
    """

    def mark(function: Function) -> Function:
        if action is not None and not inspect.iscoroutinefunction(function):
            raise TypeError(f"{function.__qualname__} needs an authorisation, so it must be async")
        function._action = action  # type: ignore[attr-defined]
        return function

    return mark


def take_fd(handle: Handle) -> int:
    """Take the descriptor that came as an argument of the running call; the caller closes it."""
    return CALL.get().take_fd(handle)


def _method(function: Callable[..., Any]) -> _Method:
    hints = {name: _signature(hint) for name, hint in get_type_hints(function).items()}
    returns = hints.pop("return")
    return _Method(function, function._action, hints, returns)  # type: ignore[attr-defined]


def _signature(hint: Any) -> str:
    if get_origin(hint) is list:
        return "a" + _signature(get_args(hint)[0])
    if get_origin(hint) is dict:
        return "a{" + "".join(_signature(one) for one in get_args(hint)) + "}"
    if hint not in _SIGNATURES:
        raise TypeError(f"{hint} has no D-Bus type")
    return _SIGNATURES[hint]


class Interface:
    """One interface of one object. Its public annotations are properties."""

    interface_name: ClassVar[str]
    methods: ClassVar[Mapping[str, _Method]]
    properties: ClassVar[Mapping[str, str]]  # name → signature
    signals: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    def __init_subclass__(cls, *, name: str) -> None:
        cls.interface_name = name
        cls.properties = {
            key: _signature(hint)
            for key, hint in get_type_hints(cls).items()
            if not key.startswith("_") and get_origin(hint) is not ClassVar
        }
        cls.methods = {
            key: _method(function)
            for key, function in vars(cls).items()
            if hasattr(function, "_action")
        }

    def __init__(self, **values: object) -> None:
        if values.keys() != self.properties.keys():
            wrong = sorted(values.keys() ^ self.properties.keys())
            raise TypeError(
                f"{self.interface_name}: properties missing or unknown: {', '.join(wrong)}"
            )
        self._values: Mapping[str, object] = MappingProxyType({})
        self._emit: Callable[[str, list[Any]], None] | None = None
        self.changed(**values)

    @property
    def values(self) -> Mapping[str, object]:
        """The properties as they are now; a snapshot that never changes."""
        return self._values

    def changed(self, **values: object) -> None:
        """Set properties, and tell the bus about those that are different now."""
        for name, value in values.items():
            if name not in self.properties:
                raise TypeError(f"{self.interface_name} has no property {name!r}")
            if not _fits(self.properties[name], value):
                raise TypeError(f"{self.interface_name}.{name} cannot be {value!r}")
        new = {
            name: _frozen(value)
            for name, value in values.items()
            if name not in self._values or self._values[name] != _frozen(value)
        }
        if not new:
            return
        self._values = MappingProxyType({**self._values, **new})
        if self._emit is not None:
            self._emit("PropertiesChanged", [self.interface_name, self.typed(*new), []])

    def typed(self, *names: str) -> dict[str, Typed]:
        """These properties (or all) for a D-Bus type `a{sv}`."""
        return {
            name: Typed(self.properties[name], self._values[name])
            for name in names or self.properties
        }


@dataclass(eq=False, slots=True)
class _Pending:
    call: Call
    interface: Interface
    method: _Method
    authorised: bool = False


class Objects:
    """All objects of a connection, below a root that is their ObjectManager."""

    def __init__(self, connection: Connection, root: str, authority: Authority) -> None:
        self._connection = connection
        self._authority = authority
        self._root = root
        # Brings the properties up to date; called before anything of them is answered.
        self.refresh: Callable[[], None] = lambda: None
        self._objects: dict[str, dict[str, Interface]] = {}
        self._pending: dict[asyncio.Task[Any], _Pending] = {}
        self._counts: Counter[str] = Counter()  # pending calls by sender
        self._serving = self._stopping = False
        self._peer, self._introspectable = _Peer(), _Introspectable(self)
        self._standard = (self._peer, self._introspectable, _Properties(self))
        self._manager = _ObjectManager(self)
        connection.on_call = self._on_call

    def export(self, path: str, *interfaces: Interface) -> None:
        """Offer an object. What it is made of does not change until `unexport`."""
        if path in self._objects:
            raise ValueError(f"{path} is exported already")
        self._objects[path] = {one.interface_name: one for one in interfaces}
        for interface in interfaces:
            interface._emit = lambda member, body: self._emit(path, _Properties, member, body)
        if path != self._root:
            self._emit(self._root, _ObjectManager, "InterfacesAdded", [path, self.snapshot(path)])

    def unexport(self, path: str) -> None:
        interfaces = self._objects.pop(path)
        for interface in interfaces.values():
            interface._emit = None
        self._emit(self._root, _ObjectManager, "InterfacesRemoved", [path, list(interfaces)])

    async def serve(self, name: str) -> None:
        """Own the name, and from here on tell what changes. Raises NameTakenError."""
        await self._connection.match(
            self._on_vanished,
            sender=transport.DRIVER,
            interface=transport.DRIVER,
            member="NameOwnerChanged",
            arg2="",
        )
        self._serving = True
        await self._connection.request_name(name)

    async def stop(self, grace_s: float = 5) -> None:
        """Cancel what runs, and answer it and all that still comes with ShuttingDown."""
        self._stopping = True
        for task in self._pending:
            task.cancel()
        if self._pending:
            await asyncio.wait(list(self._pending), timeout=grace_s)
        await asyncio.sleep(0)  # one turn of the loop: the done callbacks answer
        for task in list(self._pending):  # it ignored the cancellation
            self._answer(self._pending[task], ShuttingDownError("vmcryptd is stopping"))
            self._forget(task)

    def snapshot(self, path: str) -> dict[str, dict[str, Typed]]:
        """Interface → properties of one object."""
        return {name: interface.typed() for name, interface in self._objects[path].items()}

    def interfaces(self, path: str) -> dict[str, Interface]:
        """What an object answers to, with the standard interfaces. Peer is on every path."""
        found: list[Interface] = [self._peer]
        if path in self._objects:
            found = [*self._standard, *self._objects[path].values()]
            if path == self._root:
                found.insert(len(self._standard), self._manager)
        elif self.children(path):
            found.append(self._introspectable)
        return {one.interface_name: one for one in found}

    def children(self, path: str) -> list[str]:
        prefix = path.rstrip("/") + "/"
        return sorted(
            {one[len(prefix) :].split("/")[0] for one in self._objects if one.startswith(prefix)}
        )

    def below_root(self) -> list[str]:
        return [path for path in self._objects if path.startswith(self._root + "/")]

    def _emit(self, path: str, interface: type[Interface], member: str, body: list[Any]) -> None:
        if self._serving:
            signature = "".join(interface.signals[member].values())
            self._connection.emit(path, interface.interface_name, member, signature, body)

    def _on_call(self, call: Call) -> None:
        handed_over = False
        try:
            self.refresh()
            handed_over = self._begin(call)
        except Exception as error:  # noqa: BLE001 - logged and answered there
            self._refuse(call, error)
        finally:
            if not handed_over:
                call.close()

    def _begin(self, call: Call) -> bool:
        """True if a task answers the call, and owns its descriptors."""
        if self._stopping:
            raise ShuttingDownError("vmcryptd is stopping; ask again when it is back")
        interface, method = self._find(call)
        if call.signature != method.signature:
            wanted = f"{call.member} takes ({method.signature}), not ({call.signature})"
            raise _StandardError("InvalidArgs", wanted)
        handles = [
            value for value, kind in zip(call.body, method.signature, strict=False) if kind == "h"
        ]
        if not handles:
            call.close()
        elif sorted(handles) != list(range(len(call.fds))):
            raise _StandardError("InvalidArgs", "each descriptor must be named by one argument")
        if not inspect.iscoroutinefunction(method.function):
            # Read and answered in one go, so that no change can be told before the older answer.
            token = CALL.set(call)
            try:
                self._reply(call, method, method.function(interface, *call.body))
            finally:
                CALL.reset(token)
            return False
        if self._counts[call.sender] >= MAX_PENDING:
            raise _StandardError("LimitsExceeded", f"{MAX_PENDING} calls are pending already")
        pending = _Pending(call, interface, method)
        task = asyncio.create_task(self._run(pending))
        self._pending[task] = pending
        self._counts[call.sender] += 1
        # A callback, because a task that is cancelled before its first step runs no line at all.
        task.add_done_callback(self._on_done)
        return True

    def _find(self, call: Call) -> tuple[Interface, _Method]:
        found = self.interfaces(call.path)
        if call.interface is not None:
            if call.interface not in found:
                known = call.path in self._objects or self.children(call.path)
                kind = "UnknownInterface" if known else "UnknownObject"
                raise _StandardError(kind, f"no {call.interface} at {call.path}")
            found = {call.interface: found[call.interface]}
        for interface in found.values():
            if call.member in interface.methods:
                return interface, interface.methods[call.member]
        raise _StandardError("UnknownMethod", f"no method {call.member} at {call.path}")

    async def _run(self, pending: _Pending) -> Any:
        call, method = pending.call, pending.method
        CALL.set(call)
        if method.action is not None:
            await self._authority.check(call.sender, method.action, interactive=call.interactive)
        pending.authorised = True
        return await method.function(pending.interface, *call.body)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        pending = self._pending.get(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if pending is None:  # stop() lost patience and answered
            return
        self._forget(task)
        if isinstance(error, asyncio.CancelledError):
            self._answer(
                pending, ShuttingDownError("vmcryptd is stopping; ask again when it is back")
            )
        elif error is not None:
            self._answer(pending, error)
        else:
            self._answer(pending, None, task.result())

    def _forget(self, task: asyncio.Task[Any]) -> None:
        call = self._pending.pop(task).call
        call.close()
        self._counts[call.sender] -= 1
        if not self._counts[call.sender]:
            del self._counts[call.sender]

    def _answer(self, pending: _Pending, error: BaseException | None, value: Any = None) -> None:
        try:
            self.refresh()
            if error is not None:
                raise error
            self._reply(pending.call, pending.method, value)
        except Exception as failure:  # noqa: BLE001 - logged and answered there
            self._refuse(pending.call, failure)

    def _reply(self, call: Call, method: _Method, value: Any) -> None:
        self._connection.reply(call, method.returns, [value] if method.returns else [])

    def _refuse(self, call: Call, error: Exception) -> None:
        if not isinstance(error, VmcryptdError):
            log.error("%s.%s failed", call.interface, call.member, exc_info=error)
            error = InternalError("vmcryptd made a mistake; its journal tells more")
        self._connection.refuse(call, error.dbus_name, str(error))

    def _on_vanished(self, signal: Signal) -> None:
        # Nobody is left to be asked for a password. What was authorised goes on.
        for task, pending in self._pending.items():
            if pending.call.sender == signal.body[0] and not pending.authorised:
                task.cancel()


class _Peer(Interface, name="org.freedesktop.DBus.Peer"):
    @exported(action=None)
    def Ping(self) -> None:
        pass

    @exported(action=None)
    def GetMachineId(self) -> str:
        try:
            return Path("/etc/machine-id").read_text(encoding="ascii").strip()
        except OSError:
            raise _StandardError("FileNotFound", "this machine has no id") from None


class _Introspectable(Interface, name="org.freedesktop.DBus.Introspectable"):
    def __init__(self, objects: Objects) -> None:
        super().__init__()
        self._objects = objects

    @exported(action=None)
    def Introspect(self) -> str:
        path = CALL.get().path
        lines = ["<node>", *_xml(self._objects.interfaces(path)), *(
            f"  <node name={_quoted(child)}/>" for child in self._objects.children(path)
        ), "</node>"]  # fmt: skip
        return "\n".join(lines)


class _Properties(Interface, name="org.freedesktop.DBus.Properties"):
    signals: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "PropertiesChanged": {
            "interface_name": "s", "changed_properties": "a{sv}", "invalidated_properties": "as",
        },
    }  # fmt: skip

    def __init__(self, objects: Objects) -> None:
        super().__init__()
        self._objects = objects

    @exported(action=None)
    def Get(self, interface_name: str, property_name: str) -> Any:
        return self._interface(interface_name, property_name).typed(property_name)[property_name]

    @exported(action=None)
    def GetAll(self, interface_name: str) -> dict[str, Any]:
        return self._interface(interface_name).typed()

    @exported(action=None)
    def Set(self, interface_name: str, property_name: str, value: Any) -> None:
        self._interface(interface_name, property_name)
        raise _StandardError("PropertyReadOnly", f"{property_name} is read-only")

    def _interface(self, name: str, property_name: str | None = None) -> Interface:
        found = self._objects.interfaces(CALL.get().path)
        if name not in found:
            raise _StandardError("UnknownInterface", f"no interface {name!r} here")
        if property_name is not None and property_name not in found[name].properties:
            raise _StandardError("UnknownProperty", f"{name} has no property {property_name!r}")
        return found[name]


class _ObjectManager(Interface, name="org.freedesktop.DBus.ObjectManager"):
    # From the manager's path, as the specification and GLib want it; the libraries' own do not.
    signals: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "InterfacesAdded": {"object_path": "o", "interfaces_and_properties": "a{sa{sv}}"},
        "InterfacesRemoved": {"object_path": "o", "interfaces": "as"},
    }

    def __init__(self, objects: Objects) -> None:
        super().__init__()
        self._objects = objects

    @exported(action=None)
    def GetManagedObjects(self) -> dict[ObjectPath, dict[str, dict[str, Any]]]:
        paths = self._objects.below_root()
        return {ObjectPath(path): self._objects.snapshot(path) for path in paths}


def _quoted(text: str) -> str:
    # xml.sax.saxutils would import urllib and with it a fifth of what a start takes.
    from html import escape  # who is not introspected needs no list of all entities

    return f'"{escape(text)}"'


def _xml(interfaces: Mapping[str, Interface]) -> list[str]:
    lines = []
    for name, interface in interfaces.items():
        lines.append(f"  <interface name={_quoted(name)}>")
        for method_name, method in interface.methods.items():
            lines.append(f"    <method name={_quoted(method_name)}>")
            for argument, kind in method.arguments.items():
                lines.append(f'      <arg name="{argument}" type="{kind}" direction="in"/>')
            if method.returns:
                lines.append(f'      <arg name="result" type="{method.returns}" direction="out"/>')
            lines.append("    </method>")
        for signal, arguments in interface.signals.items():
            lines.append(f"    <signal name={_quoted(signal)}>")
            lines += [f'      <arg name="{one}" type="{kind}"/>' for one, kind in arguments.items()]
            lines.append("    </signal>")
        for one, kind in interface.properties.items():
            lines.append(f'    <property name="{one}" type="{kind}" access="read">')
            emits = "org.freedesktop.DBus.Property.EmitsChangedSignal"
            lines.append(f'      <annotation name="{emits}" value="true"/>')
            lines.append("    </property>")
        lines.append("  </interface>")
    return lines


def _fits(signature: str, value: object) -> bool:
    if signature.startswith("a{"):
        return isinstance(value, Mapping) and all(
            _fits(signature[2], key) and _fits(signature[3:-1], one) for key, one in value.items()
        )
    if signature.startswith("a"):
        return isinstance(value, (list, tuple)) and all(_fits(signature[1:], one) for one in value)
    kinds: dict[str, Any] = {"s": str, "o": str, "b": bool, "x": int, "d": (int, float)}
    return isinstance(value, kinds[signature]) and (signature == "b" or not isinstance(value, bool))


def _frozen(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(one) for one in value)
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(one) for key, one in value.items()})
    return value
