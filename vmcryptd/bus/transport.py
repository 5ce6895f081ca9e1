# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only module that imports a D-Bus library. In and out go plain Python values.

The library is transport only: it marshals and moves bytes. Its own dispatcher is never reached,
because it leaks every descriptor it does not route, hides the sender, answers with tracebacks and
leaves cancelled calls unanswered (python-dbus-next#162, #93). Calls go to `Connection.on_call`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:  # neither is a mypy dependency, and the types of one are not those of the other
    Message: Any
    MessageFlag: Any
    MessageType: Any
    Variant: Any
    _Transport: Any

    def _trim_signatures() -> None: ...

elif _LIBRARY == "dbus_fast":
    from dbus_fast import Message, MessageFlag, MessageType, Variant
    from dbus_fast.aio import MessageBus as _Transport
    from dbus_fast.signature import get_signature_tree

    def _trim_signatures() -> None:
        if get_signature_tree.cache_info().currsize > MAX_SIGNATURES:
            get_signature_tree.cache_clear()

else:
    from dbus_next import Message, MessageFlag, MessageType, Variant
    from dbus_next._private.unmarshaller import Unmarshaller
    from dbus_next.aio import MessageBus
    from dbus_next.signature import SignatureTree

    class _Signatures(dict):
        """0.2.3 remembers each signature it ever saw: 2000 calls of a stranger cost 92 MB."""

        def __setitem__(self, signature, tree):
            if len(self) >= MAX_SIGNATURES:
                self.clear()
            super().__setitem__(signature, tree)

    SignatureTree._cache = _Signatures()

    def _trim_signatures() -> None:
        pass

    class _Bounded(Unmarshaller):
        """Leaves what is too large unread: 32 MiB of variants block the loop for ten seconds."""

        def read_argument(self, type_):
            if len(self.buf) <= MAX_MESSAGE or self.buf[1] not in (1, 4):  # a call or a signal
                return super().read_argument(type_)
            order = "little" if self.endian == ord("l") else "big"
            if self.offset >= 16 + int.from_bytes(self.buf[12:16], order):
                return None  # in the body
            value = super().read_argument(type_)
            return "/" if type_.token == "o" else value

    class _Transport(MessageBus):
        def _setup_socket(self):
            try:
                super()._setup_socket()
            except BaseException:
                _close_socket(self)
                raise

        def _create_unmarshaller(self):
            return _Bounded(self._stream, self._sock)

        async def _auth_readline(self):
            # The original never yields again once the bus has hung up: not even a timeout ends it.
            line = b""
            while not line.endswith(b"\r\n"):
                received = await self._loop.sock_recv(self._sock, 1)
                if not received or len(line) > 4096:
                    raise EOFError("the bus hung up before authentication was through")
                line += received
            return line[:-2].decode()


class _Socket:
    """To both libraries a full socket is a lost connection: 300 signals in a row were enough."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._ancillary: Sequence[Any] = ()

    def send(self, data: memoryview) -> int:
        return self.sendmsg([data], ())

    def sendmsg(self, buffers: Sequence[memoryview], ancillary: Sequence[Any]) -> int:
        # After "0 bytes sent" the library goes on when there is room, but without the descriptors.
        self._ancillary = ancillary or self._ancillary
        try:
            sent: int = self._sock.sendmsg(buffers, self._ancillary)
        except BlockingIOError:
            return 0
        self._ancillary = ()
        return sent


class RemoteError(Exception):
    """The peer answered with an error: its D-Bus name and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}" if text else name)
        self.name = name
        self.text = text


class NameTakenError(VmcryptdError):
    """Another process owns the bus name, most likely another vmcryptd."""

    name = "NameTaken"


@dataclass(frozen=True, slots=True)
class Typed:
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

    def take_fd(self, index: int) -> int:
        """Hand over the descriptor that an argument of type `h` names; the caller closes it."""
        fd, self.fds[index] = self.fds[index], -1
        if fd < 0:
            raise ValueError(f"descriptor {index} was taken before")
        return fd

    def close(self) -> None:
        _close(self.fds)
        self.fds.clear()


@dataclass(eq=False, slots=True)
class _Subscription:
    rule: Mapping[str, str]
    callback: Callable[[Signal], None]
    owner: str | None  # of rule["sender"] now; "" while not known yet

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
        self._transport = transport
        self._replies: dict[int, tuple[asyncio.Future[tuple[Any, list[int]]], bool]] = {}
        self._subscriptions: list[_Subscription] = []
        self._closed = asyncio.Event()
        transport._writer.sock = _Socket(transport._sock)
        transport.add_message_handler(self._receive)
        self._watch = asyncio.create_task(self._wait_for_disconnect())

    async def closed(self) -> None:
        """Wait until the connection is lost or closed."""
        await self._closed.wait()

    async def disconnect(self) -> None:
        """Close after what was sent before has arrived."""
        with contextlib.suppress(VmcryptdError, RemoteError):
            await self._driver("GetId", timeout_s=5)
        self._transport.disconnect()
        await self.closed()

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
        """Call back for each signal that fits; returns what ends it.

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

    def reply(self, call: Call, signature: str = "", body: Sequence[Any] = ()) -> None:
        """Answer a call. Raises ValueError if the values are not of the signature."""
        if call.wants_reply:
            self._post(
                message_type=MessageType.METHOD_RETURN, reply_serial=call.serial,
                destination=call.sender, signature=signature, body=body,
            )  # fmt: skip

    def refuse(self, call: Call, name: str, text: str) -> None:
        """Answer a call with an error."""
        if call.wants_reply:
            self._post(
                message_type=MessageType.ERROR, reply_serial=call.serial, destination=call.sender,
                error_name=name, signature="s", body=[text[:MAX_TEXT]],
            )  # fmt: skip

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

    def _post(self, **header: Any) -> None:
        with contextlib.suppress(UnreachableError):  # nobody is left to read it
            self._send(**header)

    def _send(self, *, body: Sequence[Any] = (), fds: Sequence[int] = (), **header: Any) -> None:
        if self._closed.is_set() or not self._transport.connected:
            raise UnreachableError("the connection to the bus is lost")
        copies: list[int] = []
        try:
            # The library sends later, when the caller may have closed its own.
            copies.extend(os.dup(fd) for fd in fds)
            message = Message(body=_outgoing(list(body)), unix_fds=copies, **header)
            sent = self._transport.send(message)
        except OSError:
            _close(copies)
            raise
        except Exception as error:
            _close(copies)
            raise ValueError(f"cannot be sent over D-Bus: {error}") from error

        def done(future: asyncio.Future[None]) -> None:
            _close(copies)
            if not future.cancelled():
                future.exception()  # seen: a lost connection is told by closed()

        sent.add_done_callback(done)

    def _receive(self, message: Any) -> bool:
        """See every message first, own its descriptors, and leave no method call to the library."""
        fds, message.unix_fds = list(message.unix_fds or ()), []
        for fd in fds:
            os.set_inheritable(fd, False)  # neither library receives with MSG_CMSG_CLOEXEC
        _trim_signatures()
        if message.message_type is MessageType.METHOD_CALL:
            self._receive_call(message, fds)
            return True
        if message.message_type is MessageType.SIGNAL:
            self._receive_signal(message)
        else:
            reply, wants_fds = self._replies.get(message.reply_serial, (None, False))
            if reply is not None and not reply.done():
                reply.set_result((message, fds if wants_fds else []))
                if wants_fds:
                    fds = []
        _close(fds)
        return False

    def _receive_call(self, message: Any, fds: list[int]) -> None:
        call = Call(
            sender=message.sender or "", path=message.path, interface=message.interface,
            member=message.member, signature=message.signature, serial=message.serial,
            body=[_incoming(value) for value in message.body], fds=fds,
            wants_reply=not message.flags & MessageFlag.NO_REPLY_EXPECTED,
            interactive=bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION),
        )  # fmt: skip
        if None in call.body:
            call.close()
            self.refuse(call, STANDARD_ERROR + "LimitsExceeded", "the arguments are too large")
        elif self.on_call is None:
            call.close()
            self.refuse(call, STANDARD_ERROR + "UnknownObject", "this is a client")
        else:
            self.on_call(call)

    def _receive_signal(self, message: Any) -> None:
        body = [_incoming(value) for value in message.body]
        if None in body:
            return
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
        # Its reader would find the socket closed, and leave that error to nobody.
        if transport is not None:
            asyncio.get_running_loop().remove_reader(transport._fd)
        _close_socket(transport)
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
    # The bus hangs up on who sends NUL or what is not UTF-8, and file names may hold the latter.
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


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def _close_socket(transport: Any) -> None:
    # dbus_next never closes its own (dbus-fast#494).
    for name in ("_stream", "_sock"):
        stream = getattr(transport, name, None)
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
