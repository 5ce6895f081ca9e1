# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages as bytes on the socket: cut apart by their headers, before anything of them is parsed.

A library's parser takes a fifth of a millisecond for each message and reads on as long as there
is one. The header alone names sender and size, at a twentieth of that:
https://dbus.freedesktop.org/doc/dbus-specification.html#message-protocol-messages
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

log = logging.getLogger(__name__)

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY_EXPECTED = 1

CHUNK = 64 * 1024  # bytes that are read in one turn of the loop
MAX_SIZE = 128 * 1024 * 1024  # of one message, by the specification

_REPLY_SERIAL, _SENDER = 5, 7
_ERROR_NAME, _DESTINATION, _SIGNATURE = 4, 6, 8
_MAX_FDS = 253  # the kernel's SCM_MAX_FD
_ANCILLARY = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
_ORDERS = {
    ord("l"): (struct.Struct("<III"), struct.Struct("<I")),
    ord("B"): (struct.Struct(">III"), struct.Struct(">I")),
}


class Frame(NamedTuple):
    """One whole message, of which only the header was read. It owns its descriptors."""

    kind: int
    sender: str
    serial: int
    reply_serial: int
    wants_reply: bool
    size: int
    data: bytes
    fds: list[int]
    epoch: int = 0  # how often everything had gone down when it arrived

    def close(self) -> None:
        close(self.fds)
        self.fds.clear()


class Reader:
    """Reads a socket when it is ready: one chunk each time, so that the loop has its turn between.

    `finalize` takes the error that ended the connection.
    """

    def __init__(self, sock: socket.socket, finalize: Callable[[Exception], None]) -> None:
        self.on_frame: Callable[[Frame], None] = Frame.close
        self._sock = sock
        self._finalize = finalize
        self._buffer = bytearray()
        self._fds: list[int] = []  # of the message at the beginning of the buffer

    def __call__(self) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not data:
            close(fds)
            self._end(EOFError("the bus hung up"))
            return
        self._buffer += data
        try:
            frames = self._split(list(fds))
        except ValueError as error:
            self._end(error)
            return
        for frame in frames:
            try:
                self.on_frame(frame)
            except Exception:
                log.exception("a message could not be handled")
                frame.close()

    def _split(self, fds: list[int]) -> list[Frame]:
        """The kernel ends a read after data that came with descriptors: they are the last message's."""
        ends: list[int] = []
        start, length = 0, len(self._buffer)
        while length - start >= 16:
            end = start + _size(self._buffer, start)
            if end > length:
                break
            ends.append(end)
            start = end
        if not ends:
            self._fds += fds
            return []
        owners: list[list[int]] = [[] for _ in ends]
        tail: list[int] = []
        (tail if start < length else owners[-1]).extend(fds)
        owners[0], self._fds = self._fds + owners[0], tail
        frames, start = [], 0
        for end, owned in zip(ends, owners, strict=True):
            try:
                frames.append(_frame(bytes(self._buffer[start:end]), owned))
            except (ValueError, IndexError, struct.error) as error:
                # A field that the specification does not know: the sender is not known either.
                log.debug("a message is not readable: %s", error)
                close(owned)
            start = end
        del self._buffer[:start]
        return frames

    def _end(self, error: Exception) -> None:
        close(self._fds)
        self._fds.clear()
        self._finalize(error)


class Writer:
    """Sends messages in order, as the socket takes them.

    A full socket is no lost connection, and descriptors are closed when they are sent.
    """

    def __init__(self, sock: socket.socket, finalize: Callable[[Exception], None]) -> None:
        self.unsent = 0  # bytes
        self.on_drained: Callable[[], None] = lambda: None
        self._sock = sock
        self._finalize = finalize
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._is_waiting = self._is_closed = False

    def send(self, data: bytes, fds: list[int]) -> None:
        """Send a message. The descriptors are the writer's from here on."""
        if self._is_closed:
            close(fds)
            return
        self._queue.append((memoryview(data), fds))
        self.unsent += len(data)
        if not self._is_waiting:
            self._flush()

    def close(self) -> None:
        self._is_closed = True
        if self._is_waiting:
            self._is_waiting = False
            asyncio.get_running_loop().remove_writer(self._sock.fileno())
        for _, fds in self._queue:
            close(fds)
        self._queue.clear()
        self.unsent = 0

    def _flush(self) -> None:
        while self._queue:
            data, fds = self._queue.popleft()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg([data], rights)
            except (BlockingIOError, InterruptedError):
                self._queue.appendleft((data, fds))
                break
            except OSError as error:
                close(fds)
                self.close()
                # Not from within a send: the caller is not prepared to lose the connection there.
                asyncio.get_running_loop().call_soon(self._finalize, error)
                return
            close(fds)
            self.unsent -= sent
            if sent < len(data):
                self._queue.appendleft((data[sent:], []))
        if bool(self._queue) is not self._is_waiting:
            self._is_waiting = bool(self._queue)
            loop = asyncio.get_running_loop()
            if self._is_waiting:
                loop.add_writer(self._sock.fileno(), self._flush)
            else:
                loop.remove_writer(self._sock.fileno())
                self.on_drained()


def error(serial: int, reply_serial: int, destination: str, name: str, text: str) -> bytes:
    """An error message. A library takes twenty times as long to make one."""
    body = _string(text)
    fields = b""
    for code, kind, value in (
        (_ERROR_NAME, b"s", _string(name)),
        (_REPLY_SERIAL, b"u", struct.pack("<I", reply_serial)),
        (_DESTINATION, b"s", _string(destination)),
        (_SIGNATURE, b"g", b"\x01s\0"),
    ):
        fields += b"\0" * (-len(fields) % 8) + bytes((code, 1)) + kind + b"\0" + value
    head = struct.pack("<BBBBIII", ord("l"), ERROR, 1, 1, len(body), serial, len(fields))
    return head + fields + b"\0" * (-len(fields) % 8) + body


def close(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded + b"\0"


def _size(buffer: bytearray, start: int) -> int:
    """Bytes of the message that begins there. Raises ValueError."""
    order = _ORDERS.get(buffer[start])
    if order is None:
        raise ValueError("the bus sent something that is no message")
    body, _, fields = order[0].unpack_from(buffer, start + 4)
    size: int = 16 + fields + -fields % 8 + body
    if size > MAX_SIZE:
        raise ValueError("the bus sent a message that is too large")
    return size


def _frame(data: bytes, fds: list[int]) -> Frame:
    header, number = _ORDERS[data[0]]
    _, serial, length = header.unpack_from(data, 4)
    at, end = 16, 16 + length
    sender, reply_serial = "", 0
    while at < end:
        at += -at % 8
        code, kind = data[at], data[at + 1 : at + 4]
        at += 4
        if kind == b"\x01g\0":
            at += 2 + data[at]
            continue
        at += -at % 4
        (value,) = number.unpack_from(data, at)
        at += 4
        if kind in (b"\x01s\0", b"\x01o\0"):
            if code == _SENDER:
                sender = data[at : at + value].decode()
            at += value + 1
        elif kind != b"\x01u\0":
            raise ValueError(f"a header field of type {kind!r}")
        elif code == _REPLY_SERIAL:
            reply_serial = value
    if at > len(data):
        raise ValueError("a header field beyond the end")
    wants_reply = not data[2] & NO_REPLY_EXPECTED
    return Frame(data[1], sender, serial, reply_serial, wants_reply, len(data), data, fds)
