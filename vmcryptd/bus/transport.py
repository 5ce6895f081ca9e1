# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only module that imports a D-Bus library. In and out go plain Python values.

The library logs in and marshals. Bytes are moved by `wire`, because the library reads on as long as
there is anything to read. Its dispatcher is never reached, because it leaks every descriptor it does
not route, hides the sender, answers with tracebacks and leaves cancelled calls unanswered
(python-dbus-next#162, #93). Calls go to `Connection.on_call`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vmcryptd.bus import wire
from vmcryptd.bus.wire import Frame, Reader, Writer
from vmcryptd.core.errors import DeadlineError, UnreachableError, VmcryptdError

log = logging.getLogger(__name__)

MAX_MESSAGE = 64 * 1024  # bytes of a call or signal; their arguments are names, and parsing is slow
MAX_TEXT = 1000  # characters of an error's text: a caller's own 10 MB name is not echoed to it
MAX_SIGNATURES = 256  # parsed signatures that are remembered; one can cost 46 KiB

DRIVER = "org.freedesktop.DBus"
DRIVER_PATH = "/org/freedesktop/DBus"
STANDARD_ERROR = "org.freedesktop.DBus.Error."

# Python 3.15 has no typing.no_type_check_decorator (cpython#133601), which dbus_next imports.
_LIBRARY = "dbus_fast" if sys.version_info >= (3, 15) else "dbus_next"
_LIBRARY = os.environ.get("VMCRYPTD_BUS_LIBRARY") or _LIBRARY

if TYPE_CHECKING:  # neither is a dependency of mypy, and their types differ
    Message: Any
    MessageFlag: Any
    MessageType: Any
    Unmarshaller: Any
    Variant: Any
    _Transport: Any

    def _trim_signatures() -> None: ...

elif _LIBRARY == "dbus_fast":
    from dbus_fast import Message, MessageFlag, MessageType, Variant
    from dbus_fast._private.unmarshaller import Unmarshaller
    from dbus_fast.aio import message_bus
    from dbus_fast.signature import get_signature_tree

    def _trim_signatures() -> None:
        if get_signature_tree.cache_info().currsize > MAX_SIGNATURES:
            get_signature_tree.cache_clear()

    def _build_reader(sock, process, finalize, *_):
        reader = finalize.__self__.reader = Reader(sock, finalize)
        reader.on_frame = lambda frame: process(_parsed(frame))
        return reader

    message_bus.build_message_reader = _build_reader

    class _Transport(message_bus.MessageBus):
        pass

else:
    # It imports GLib's main loop where that is installed, which is not used here, and takes a tenth of the start. None
    # stands for "not installed" (https://docs.python.org/3/reference/import.html#the-module-cache).
    _glib = sys.modules.setdefault("gi", None)  # type: ignore[arg-type]
    from dbus_next import Message, MessageFlag, MessageType, Variant
    from dbus_next._private.unmarshaller import Unmarshaller
    from dbus_next.aio import MessageBus
    from dbus_next.signature import SignatureTree

    if _glib is None:
        del sys.modules["gi"]

    class _Signatures(dict):
        """dbus_next 0.2.3 remembers each signature it ever saw: 2000 calls of any user cost 92 MB."""

        def __setitem__(self, signature, tree):
            if len(self) >= MAX_SIGNATURES:
                self.clear()
            super().__setitem__(signature, tree)

    SignatureTree._cache = _Signatures()

    def _trim_signatures() -> None:
        pass

    class _Transport(MessageBus):
        def _setup_socket(self):
            try:
                super()._setup_socket()
            except BaseException:
                _close_socket(self)
                raise
            self.reader = self._message_reader = Reader(self._sock, self._finalize)
            self.reader.on_frame = lambda frame: self._on_message(_parsed(frame))

        async def _auth_readline(self):
            # The original never yields again once the bus has hung up: not even a timeout ends it.
            line = b""
            while not line.endswith(b"\r\n"):
                received = await self._loop.sock_recv(self._sock, 1)
                if not received or len(line) > 4096:
                    raise EOFError("the bus hung up before authentication was through")
                line += received
            return line[:-2].decode()


def _parsed(frame: Frame) -> Any:
    """The library's message, without its descriptors."""
    _trim_signatures()
    return Unmarshaller(io.BytesIO(frame.data)).unmarshall()


class RemoteError(Exception):
    """The peer answered with an error: its D-Bus name and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}" if text else name)
        self.name = name
        self.text = text


class NameTakenError(VmcryptdError):
    """Another process owns the bus name, most likely another vmcryptd."""

    name = "NameTaken"


class Typed(NamedTuple):
    """A value to send as a variant (D-Bus type `v`). Variants that arrive are unpacked."""

    signature: str
    value: Any


class Signal(NamedTuple):
    """A signal that arrived. Its sender is the one that the rule names, if it names one."""

    sender: str
    path: str
    interface: str
    member: str
    body: list[Any]


class Call(NamedTuple):
    """A method call that arrived. It owns its descriptors until they are taken."""

    sender: str
    path: str
    interface: str | None
    member: str
    signature: str
    body: list[Any]
    serial: int
    wants_reply: bool
    interactive: bool
    fds: list[int]
    uid: int = -1  # of the sender; -1 if not known
    is_trusted: bool = False  # the sender may do and see everything
    epoch: int = 0  # as that of its frame

    def take_fd(self, index: int) -> int:
        """Hand over the descriptor that an argument of type `h` names; the caller closes it."""
        fd, self.fds[index] = self.fds[index], -1
        if fd < 0:
            raise ValueError(f"descriptor {index} was taken before")
        return fd

    def close(self) -> None:
        wire.close(self.fds)
        self.fds.clear()


class _Subscription:
    def __init__(
        self, rule: Mapping[str, str], callback: Callable[[Signal], None], owner: str | None
    ) -> None:
        self.rule = rule
        self.callback = callback
        self.owner = owner  # of rule["sender"] now; "" while not known yet

    def wants(self, message: Any) -> bool:
        """Signals can also be sent to one connection directly, past its match rules, by anybody."""
        for key, value in self.rule.items():
            if key == "sender":
                found = message.sender == self.owner
            elif key == "path_namespace":
                found = message.path == value or message.path.startswith(value.rstrip("/") + "/")
            elif key.startswith("arg"):
                index = int(key[3:])
                found = index < len(message.body) and message.body[index] == value
            else:
                found = getattr(message, key) == value
            if not found:
                return False
        return True


class Connection:
    """One connection to the bus."""

    def __init__(self, transport: Any) -> None:
        self.on_call: Callable[[Call], None] | None = None
        # Called with each method call as it arrives; the receiver calls `call_of` when its turn has come.
        self.on_frame: Callable[[Frame], None] = self._serve
        self._transport = transport
        self._replies: dict[int, tuple[asyncio.Future[tuple[Any, list[int]]], bool]] = {}
        self._subscriptions: list[_Subscription] = []
        self._closed = asyncio.Event()
        transport.reader.on_frame = self._receive
        self.writer = Writer(transport._sock, transport._finalize)
        self._watch = asyncio.create_task(self._wait_for_disconnect())

    async def closed(self) -> None:
        """Wait until the connection is lost or closed."""
        await self._closed.wait()

    async def disconnect(self) -> None:
        """Close after what was sent before has arrived."""
        try:
            with contextlib.suppress(VmcryptdError, RemoteError):
                await self._driver("GetId", timeout_s=5)
            self._transport.disconnect()
            await self.closed()
        except asyncio.CancelledError:
            _abandon(self._transport)
            raise

    async def call(
        self, destination: str, path: str, interface: str, member: str,
        signature: str = "", body: Sequence[Any] = (), *,
        timeout_s: float | None, fds: Sequence[int] = (), interactive: bool = False,
        wants_fds: bool = False,
    ) -> list[Any]:  # fmt: skip
        """Call a method. Raises RemoteError, UnreachableError, DeadlineError, ValueError.

        An argument of type `h` is an index into `fds`; those stay the caller's. With `wants_fds`
        the answer's descriptors are returned instead of its values, and are the caller's to close.
        """
        serial = self._transport.next_serial()
        reply: asyncio.Future[tuple[Any, list[int]]] = asyncio.get_running_loop().create_future()
        self._replies[serial] = reply, wants_fds
        try:
            flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE
            self._send(
                destination=destination, path=path, interface=interface, member=member,
                signature=signature, body=body, fds=fds, flags=flags, serial=serial,
            )  # fmt: skip
            async with asyncio.timeout(timeout_s):
                message, received = await reply
        except TimeoutError:
            text = f"{destination} did not answer {member} within {timeout_s:g} s"
            raise DeadlineError(text) from None
        finally:
            self._replies.pop(serial, None)
        if message.message_type is MessageType.ERROR:
            # An error need not have a text.
            text = message.body[0] if message.body and isinstance(message.body[0], str) else ""
            raise RemoteError(message.error_name, text)
        return received if wants_fds else [_incoming(value) for value in message.body]

    def tell(
        self, destination: str, path: str, interface: str, member: str,
        signature: str = "", body: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        """Call a method and want no answer."""
        self._post(
            destination=destination, path=path, interface=interface, member=member,
            signature=signature, body=body, flags=MessageFlag.NO_REPLY_EXPECTED,
        )  # fmt: skip

    async def match(self, callback: Callable[[Signal], None], **rule: str) -> Callable[[], None]:
        """Call back for each signal that fits. Returns a function that ends the match.

        The rule is any of sender, path, path_namespace, interface, member, arg0, arg1…
        """
        if any("'" in value for value in rule.values()):
            raise ValueError(f"not a match rule: {rule}")
        sender = rule.get("sender", DRIVER)
        well_known = sender != DRIVER and not sender.startswith(":")
        subscription = _Subscription(rule, callback, "" if well_known else sender)
        self._subscriptions.append(subscription)
        rules = [_rule(**rule)]
        if well_known:
            rules.append(_rule(sender=DRIVER, member="NameOwnerChanged", arg0=sender))

        def end() -> None:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
                for text in rules:
                    self.tell(DRIVER, DRIVER_PATH, DRIVER, "RemoveMatch", "s", [text])

        try:
            for text in rules:
                await self._driver("AddMatch", "s", text)
            if well_known:
                owner = await self._owner(sender)
                if subscription.owner == "":  # else NameOwnerChanged was faster, and is newer
                    subscription.owner = owner
        except BaseException:
            end()
            raise
        return end

    async def _owner(self, name: str) -> str | None:
        try:
            [owner] = await self._driver("GetNameOwner", "s", name)
        except RemoteError:
            return None
        return str(owner)

    async def request_name(self, name: str) -> None:
        """Own a name. Raises NameTakenError."""
        [answer] = await self._driver("RequestName", "su", name, 4)  # 4: do not queue
        if answer not in (1, 4):  # 1: now ours, 4: was ours already
            raise NameTakenError(f"the bus name {name} is taken: another process serves it")

    async def peer_uid(self, sender: str) -> int:
        """The user id of a peer, as the bus daemon knows it from the kernel."""
        [uid] = await self._driver("GetConnectionUnixUser", "s", sender)
        return int(uid)

    def reply(self, call: Call, signature: str = "", body: Sequence[Any] = ()) -> int:
        """Answer a call. Returns the bytes sent. Raises ValueError if the values do not fit."""
        if not call.wants_reply:
            return 0
        return self._post(
            message_type=MessageType.METHOD_RETURN, reply_serial=call.serial,
            destination=call.sender, signature=signature, body=body,
        )  # fmt: skip

    def refuse(self, call: Call | Frame, name: str, text: str) -> int:
        """Answer a call with an error. Returns the bytes sent."""
        if not call.wants_reply or not self._is_open:
            return 0
        serial = self._transport.next_serial()
        data = wire.error(serial, call.serial, call.sender, name, _text(text[:MAX_TEXT]))
        self.writer.send(data, [])
        return len(data)

    def emit(
        self, path: str, interface: str, member: str, signature: str, body: Sequence[Any]
    ) -> None:
        """Send a signal."""
        self._post(
            message_type=MessageType.SIGNAL, path=path, interface=interface, member=member,
            signature=signature, body=body,
        )  # fmt: skip

    async def _driver(
        self, member: str, signature: str = "", *body: Any, timeout_s: float = 25
    ) -> list[Any]:
        return await self.call(
            DRIVER, DRIVER_PATH, DRIVER, member, signature, body, timeout_s=timeout_s
        )

    @property
    def _is_open(self) -> bool:
        return not self._closed.is_set() and bool(self._transport.connected)

    def _post(self, **header: Any) -> int:
        with contextlib.suppress(UnreachableError):  # the connection is gone
            return self._send(**header)
        return 0

    def _send(
        self, *, body: Sequence[Any] = (), fds: Sequence[int] = (), serial: int = 0, **header: Any
    ) -> int:
        if not self._is_open:
            raise UnreachableError("the connection to the bus is lost")
        copies: list[int] = []
        try:
            # They may be sent later, when the caller may have closed its own.
            copies.extend(os.dup(fd) for fd in fds)
            serial = serial or self._transport.next_serial()
            message = Message(body=_outgoing(list(body)), unix_fds=copies, serial=serial, **header)
            data = bytes(message._marshall(True))
        except OSError:
            wire.close(copies)
            raise
        except Exception as error:
            wire.close(copies)
            raise ValueError(f"cannot be sent over D-Bus: {error}") from error
        self.writer.send(data, copies)
        return len(data)

    def _receive(self, frame: Frame) -> None:
        """See every message first; it owns its descriptors."""
        if frame.kind == wire.METHOD_CALL:
            self.on_frame(frame)
            return
        if frame.kind == wire.SIGNAL:
            if self._is_followed(frame.sender) and frame.size <= MAX_MESSAGE:
                self._receive_signal(_parsed(frame))
        else:
            reply, wants_fds = self._replies.get(frame.reply_serial, (None, False))
            if reply is not None and not reply.done():
                try:
                    reply.set_result((_parsed(frame), frame.fds if wants_fds else []))
                    if wants_fds:
                        return
                except Exception as error:  # noqa: BLE001 - whatever the library stumbles upon
                    reply.set_exception(ValueError(f"the answer cannot be read: {error}"))
        frame.close()

    def call_of(self, frame: Frame) -> Call:
        """Parse a method call, which owns the descriptors then. Raises ValueError."""
        if frame.size > MAX_MESSAGE:
            raise ValueError("the call is too large")
        try:
            message = _parsed(frame)
        except Exception as error:
            raise ValueError("the call cannot be read") from error
        return Call(
            sender=frame.sender, path=message.path, interface=message.interface,
            member=message.member, signature=message.signature, serial=message.serial,
            body=[_incoming(value) for value in message.body], fds=frame.fds,
            wants_reply=frame.wants_reply,
            interactive=bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION),
        )  # fmt: skip

    def _serve(self, frame: Frame) -> None:
        if self.on_call is None:
            frame.close()
            self.refuse(frame, STANDARD_ERROR + "UnknownObject", "this is a client")
            return
        try:
            call = self.call_of(frame)
        except ValueError as error:
            frame.close()
            self.refuse(frame, STANDARD_ERROR + "LimitsExceeded", str(error))
        else:
            self.on_call(call)

    def _is_followed(self, sender: str) -> bool:
        """Anybody can send signals to this connection: most of them need not be parsed."""
        return sender == DRIVER or any(
            "sender" not in one.rule or one.owner == sender for one in self._subscriptions
        )

    def _receive_signal(self, message: Any) -> None:
        body = [_incoming(value) for value in message.body]
        if message.sender == DRIVER and message.member == "NameOwnerChanged":
            for subscription in self._subscriptions:
                if subscription.rule.get("sender") == body[0]:
                    subscription.owner = body[2] or None
        for subscription in [one for one in self._subscriptions if one.wants(message)]:
            signal = Signal(
                subscription.rule.get("sender", message.sender),
                message.path, message.interface, message.member, body,
            )  # fmt: skip
            try:
                subscription.callback(signal)
            except Exception:
                log.exception("a callback for %s.%s failed", message.interface, message.member)

    async def _wait_for_disconnect(self) -> None:
        with contextlib.suppress(Exception):
            await self._transport.wait_for_disconnect()
        self._closed.set()
        self.writer.close()
        for reply, _ in self._replies.values():
            if not reply.done():
                reply.set_exception(UnreachableError("the connection to the bus is lost"))
        _close_socket(self._transport)


async def connect(address: str | None = None, *, timeout_s: float = 25) -> Connection:
    """Connect to the system bus, or to an address. Raises UnreachableError."""
    default = "unix:path=/run/dbus/system_bus_socket"
    address = address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or default
    transport = None
    try:
        transport = _Transport(bus_address=address, negotiate_unix_fd=True)
        # A socket that systemd holds for a dead bus daemon accepts, and never answers.
        async with asyncio.timeout(timeout_s):
            await transport.connect()
    except asyncio.CancelledError:
        _abandon(transport)
        raise
    except Exception as error:
        _close_socket(transport)
        reason = str(error) or type(error).__name__
        raise UnreachableError(f"the bus at {address} cannot be reached: {reason}") from error
    return Connection(transport)


def object_path(*labels: str) -> str:
    """The path of an object below /org/vmcryptd1, escaped as sd_bus_path_encode(3) does."""
    return "/".join(["/org/vmcryptd1", *(_escape(label) for label in labels)])


def _escape(label: str) -> str:
    escaped = ""
    for place, byte in enumerate(label.encode("utf-8", "surrogateescape")):
        char = chr(byte)
        plain = char.isascii() and (char.isalpha() or (char.isdigit() and place > 0))
        escaped += char if plain else f"_{byte:02x}"
    return escaped or "_"


def _rule(**parts: str) -> str:
    return ",".join(["type='signal'", *(f"{key}='{value}'" for key, value in parts.items())])


def _text(text: str) -> str:
    # The bus disconnects a sender of NUL or of invalid UTF-8, and file names may hold the latter.
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _outgoing(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Typed):
        return Variant(value.signature, _outgoing(value.value))
    if isinstance(value, Mapping):
        return {_outgoing(key): _outgoing(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_outgoing(one) for one in value]
    return value


def _incoming(value: Any) -> Any:
    if isinstance(value, Variant):
        return _incoming(value.value)
    if isinstance(value, dict):
        return {key: _incoming(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):  # a struct is a list in dbus_next, a tuple in dbus_fast
        return [_incoming(one) for one in value]
    return value


def _abandon(transport: Any) -> None:
    """Close the socket now, without another turn of the loop."""
    if transport is not None:
        # They would raise an error about the closed socket where nothing catches it.
        loop = asyncio.get_running_loop()
        loop.remove_reader(transport._fd)
        loop.remove_writer(transport._fd)
    _close_socket(transport)


def _close_socket(transport: Any) -> None:
    # dbus_next never closes its own (dbus-fast#494).
    for name in ("_stream", "_sock"):
        stream = getattr(transport, name, None)
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
