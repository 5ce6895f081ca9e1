# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus objects that a process offers: each call is authorised, and answered exactly once.

class Manager(Interface, name="org.vmcryptd1.Manager"):
    State: str  # an annotation is a read-only property

    @exported(action="org.vmcryptd1.unlock", purpose="unlock volume $(volume)")
    async def Unlock(self, volume: str) -> None:
        await self._engine.unlock(volume)
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    NewType,
    Protocol,
    TypeVar,
)

from vmcryptd.bus import transport
from vmcryptd.bus.admission import Admission
from vmcryptd.bus.transport import Call, Connection, Signal, Typed
from vmcryptd.core import events
from vmcryptd.core.errors import (
    OVERTAKEN,
    CancelledError,
    InternalError,
    NotAuthorizedError,
    ShuttingDownError,
    VmcryptdError,
)
from vmcryptd.core.requester import REQUESTER, Requester
from vmcryptd.core.text import escaped

log = logging.getLogger(__name__)

# Calls of one user that are not answered yet. Each may be a polkit check, and dbus-daemon allows this
# connection 128 of them (max_replies_per_connection).
MAX_PENDING = 16
MAX_READING = 4  # of these, calls that need no authorisation: each is a child or a thread
# What a call costs beyond its own time, in seconds of the caller's share.
ASKING_S = 0.003  # polkit
READING_S = 0.01  # a child
# Of one user's refusals within this time the first is logged, and then their number.
REFUSED_S = 10.0

Handle = NewType("Handle", int)  # an argument of D-Bus type `h`, for take_fd()
ObjectPath = NewType("ObjectPath", str)
Function = TypeVar("Function", bound=Callable[..., Any])

_ERROR = "LastError"  # the property that callers see as far as they may

CALL: ContextVar[Call] = ContextVar("CALL")  # the call that the running method answers

_SIGNATURES = {
    "str": "s", "bool": "b", "int": "x", "float": "d", "Any": "v", "None": "",
    "Handle": "h", "ObjectPath": "o",
}  # fmt: skip


class Authority(Protocol):
    """Decides which caller may do what."""

    @property
    def trusted(self) -> frozenset[int]:
        """Users that may do and see everything."""

    async def check(
        self, call: Call, actions: Sequence[str], purpose: str, details: Mapping[str, str]
    ) -> None:
        """Raises NotAuthorizedError unless the caller may do all of the actions.

        `purpose` completes "Authentication is required to …", with $(NAME) for the details.
        """


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
    actions: tuple[str, ...]
    purpose: str
    arguments: Mapping[str, str]  # name → signature
    returns: str
    overtakes: bool = False

    @property
    def signature(self) -> str:
        return "".join(self.arguments.values())


def exported(
    *, action: str | tuple[str, ...] | None, purpose: str = "", overtakes: bool = False
) -> Callable[[Function], Function]:
    """Mark a method of an Interface as a D-Bus method that needs a polkit action, or each of several.

    `None` is open to every user: for reading only. `purpose`: as in `Authority.check`, with the
    method's arguments as details. `overtakes`: a call that waits for its turn or its authorisation
    when this one is answered takes no effect any more.
    """
    actions = (action,) if isinstance(action, str) else action or ()

    def mark(function: Function) -> Function:
        if actions and not inspect.iscoroutinefunction(function):
            raise TypeError(f"{function.__qualname__} needs an authorisation, so it must be async")
        function._exported = actions, purpose, overtakes  # type: ignore[attr-defined]
        return function

    return mark


def take_fd(handle: Handle) -> int:
    """Take the descriptor that came as an argument of the running call; the caller closes it."""
    return CALL.get().take_fd(handle)


def _method(function: Callable[..., Any]) -> _Method:
    hints = {name: _signature(hint) for name, hint in function.__annotations__.items()}
    returns = hints.pop("return")
    actions, purpose, overtakes = function._exported  # type: ignore[attr-defined]
    return _Method(function, actions, purpose, hints, returns, overtakes)


@functools.cache
def _signature(hint: str) -> str:
    """The D-Bus type of an annotation, which is text here: evaluating all of them takes long. Raises TypeError."""
    outer, _, inner = hint.removesuffix("]").partition("[")
    if outer == "list":
        return f"a{_signature(inner)}"
    if outer == "dict":
        key, _, value = inner.partition(", ")  # a key is of a plain type
        return f"a{{{_signature(key)}{_signature(value)}}}"
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
            for key, hint in inspect.get_annotations(cls).items()
            if not key.startswith("_") and not hint.startswith("ClassVar")
        }
        cls.methods = {
            key: _method(function)
            for key, function in vars(cls).items()
            if hasattr(function, "_exported")
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
        """Set properties, and announce those that differ on the bus."""
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


class _Pending:
    def __init__(self, call: Call, interface: Interface, method: _Method) -> None:
        self.call, self.interface, self.method = call, interface, method
        self.authorised = False

    @property
    def kind(self) -> tuple[int, bool]:
        return self.call.uid, bool(self.method.actions)


class Objects:
    """All objects of a connection, below a root that is their ObjectManager."""

    def __init__(self, connection: Connection, root: str, authority: Authority) -> None:
        self._connection = connection
        self._authority = authority
        self._root = root
        # Brings the properties up to date; called before a property is read.
        self.refresh: Callable[[], None] = lambda: None
        # The part of an error's text that an untrusted caller may see.
        self.redacted: Callable[[str], str] = lambda text: text
        self._objects: dict[str, dict[str, Interface]] = {}
        self._pending: dict[asyncio.Task[Any], _Pending] = {}
        self._counts: Counter[tuple[int, bool]] = Counter()  # pending: user, needs authorisation
        self._serving = self._stopping = False
        self._refused: Counter[int] = Counter()  # by user, since a refusal of his was logged
        self._peer, self._introspectable = _Peer(), _Introspectable(self)
        self._standard = (self._peer, self._introspectable, _Properties(self))
        self._manager = _ObjectManager(self)
        self._admission = Admission(connection, self._on_call, authority.trusted)

    def export(self, path: str, *interfaces: Interface) -> None:
        """Offer an object. Its interfaces stay the same until `unexport`."""
        if path in self._objects:
            raise ValueError(f"{path} is exported already")
        self._objects[path] = {one.interface_name: one for one in interfaces}
        for interface in interfaces:
            interface._emit = lambda member, body: self._emit(
                path, _Properties, member, [body[0], self._public(body[1]), body[2]]
            )
        if path != self._root:
            public = {name: self._public(all_) for name, all_ in self.snapshot(path).items()}
            self._emit(self._root, _ObjectManager, "InterfacesAdded", [path, public])

    def unexport(self, path: str) -> None:
        interfaces = self._objects.pop(path)
        for interface in interfaces.values():
            interface._emit = None
        self._emit(self._root, _ObjectManager, "InterfacesRemoved", [path, list(interfaces)])

    async def own(self, name: str) -> None:
        """Own the name. Calls wait until `serve`. Raises NameTakenError."""
        await self._connection.match(
            self._on_vanished,
            sender=transport.DRIVER,
            interface=transport.DRIVER,
            member="NameOwnerChanged",
            arg2="",
        )
        await self._connection.request_name(name)

    def serve(self) -> None:
        """Answer calls, and announce changes."""
        self._serving = True
        self._admission.open()

    async def stop(self, grace_s: float = 5) -> None:
        """Cancel all running calls, and answer these and all later ones with ShuttingDown."""
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

    def shown(self, values: dict[str, Typed]) -> dict[str, Typed]:
        """Properties as the caller of the running method may see them."""
        return values if CALL.get().is_trusted else self._public(values)

    def _public(self, values: dict[str, Typed]) -> dict[str, Typed]:
        """The same for every user, as in signals."""
        if (error := values.get(_ERROR)) is None:
            return values
        return {**values, _ERROR: Typed(error.signature, self.redacted(error.value))}

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
        for text in _texts(call.body):
            if not text.isprintable():
                raise _StandardError("InvalidArgs", f"not printable: {escaped(text)}")
        handles = [
            value for value, kind in zip(call.body, method.signature, strict=False) if kind == "h"
        ]
        if not handles:
            call.close()
        elif sorted(handles) != list(range(len(call.fds))):
            raise _StandardError("InvalidArgs", "each descriptor must be named by one argument")
        if not inspect.iscoroutinefunction(method.function):
            # Read and answered in one step, so that no change is announced before the older answer.
            token = CALL.set(call)
            try:
                self._reply(call, method, method.function(interface, *call.body))
            finally:
                CALL.reset(token)
            return False
        pending = _Pending(call, interface, method)
        most = MAX_PENDING if method.actions else MAX_READING
        if self._counts[pending.kind] >= most and not call.is_trusted:
            text = f"{most} calls of user {call.uid} are pending already"
            raise _StandardError("LimitsExceeded", text)
        self._admission.charge(call, ASKING_S if method.actions else READING_S)
        task = asyncio.create_task(self._run(pending))
        self._pending[task] = pending
        self._counts[pending.kind] += 1
        # A callback, because a task that is cancelled before its first step never runs.
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
        REQUESTER.set(Requester(call.uid))
        if method.actions:
            details = {
                name: escaped(value)
                for (name, kind), value in zip(method.arguments.items(), call.body, strict=True)
                if kind == "s"
            }
            await self._authority.check(call, method.actions, method.purpose, details)
            if call.epoch != self._admission.epoch and not method.overtakes:
                raise CancelledError(OVERTAKEN)
        pending.authorised = True
        try:
            return await method.function(pending.interface, *call.body)
        finally:
            self._admission.epoch += method.overtakes

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
            self._log_failure(pending, error)
            self._answer(pending, error)
        else:
            self._answer(pending, None, task.result())

    def _log_failure(self, pending: _Pending, error: BaseException) -> None:
        call, method = pending.call, pending.method
        if not method.actions or not isinstance(error, VmcryptdError):
            return  # reading, or a fault of vmcryptd, which is logged with its traceback
        is_refusal = isinstance(error, NotAuthorizedError)
        values = dict(zip(method.arguments, call.body, strict=True))
        what = _filled(method.purpose, values)
        extra = events.fields(
            events.REFUSED if is_refusal else events.FAILED,
            volume=str(values.get("volume", values.get("keystore", ""))) or (),
            guest=str(values.get("guest", "")),
            error=error,
            requester=Requester(call.uid),
        )
        if not is_refusal:
            log.info("user %d failed to %s: %s", call.uid, what, error, extra=extra)
        elif call.uid in self._refused:
            self._refused[call.uid] += 1
        else:
            # A user who is refused again and again must not fill the journal.
            self._refused[call.uid] = 0
            asyncio.get_running_loop().call_later(REFUSED_S, self._log_refusals, call.uid)
            log.warning("user %d was refused to %s: %s", call.uid, what, error, extra=extra)

    def _log_refusals(self, uid: int) -> None:
        if more := self._refused.pop(uid):
            extra = events.fields(events.REFUSED, requester=Requester(uid))
            log.warning("user %d was refused %d more times since then", uid, more, extra=extra)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        pending = self._pending.pop(task)
        pending.call.close()
        self._counts[pending.kind] -= 1
        if not self._counts[pending.kind]:
            del self._counts[pending.kind]

    def _answer(self, pending: _Pending, error: BaseException | None, value: Any = None) -> None:
        try:
            self.refresh()
            if error is not None:
                raise error
            self._reply(pending.call, pending.method, value)
        except Exception as failure:  # noqa: BLE001 - logged and answered there
            self._refuse(pending.call, failure)

    def _reply(self, call: Call, method: _Method, value: Any) -> None:
        size = self._connection.reply(call, method.returns, [value] if method.returns else [])
        self._admission.answered(call, size)

    def _refuse(self, call: Call, error: Exception) -> None:
        if not isinstance(error, VmcryptdError):
            log.error("%s.%s failed", call.interface, call.member, exc_info=error)
            error = InternalError("vmcryptd made a mistake; its journal tells more")
        text = str(error) if call.is_trusted else self.redacted(str(error))
        size = self._connection.refuse(call, error.dbus_name, text)
        self._admission.answered(call, size)

    def _on_vanished(self, signal: Signal) -> None:
        self._admission.vanished(signal.body[0])
        # No caller is left to be asked for a password. An authorised call goes on.
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
        found = self._interface(interface_name, property_name).typed(property_name)
        return self._objects.shown(found)[property_name]

    @exported(action=None)
    def GetAll(self, interface_name: str) -> dict[str, Any]:
        return self._objects.shown(self._interface(interface_name).typed())

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
        shown, snapshot = self._objects.shown, self._objects.snapshot
        return {
            ObjectPath(path): {name: shown(values) for name, values in snapshot(path).items()}
            for path in paths
        }


def _filled(purpose: str, values: Mapping[str, object]) -> str:
    """A purpose with its $(NAME)s in place."""
    for name, value in values.items():
        purpose = purpose.replace(f"$({name})", escaped(str(value)))
    return purpose


def _quoted(text: str) -> str:
    # xml.sax.saxutils would import urllib and with it a fifth of what a start takes.
    from html import escape  # imported late: only introspection needs it

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


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.items() if isinstance(value, dict) else value:
            yield from _texts(list(one) if isinstance(one, tuple) else one)


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
