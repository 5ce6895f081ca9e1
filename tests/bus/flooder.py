# SPDX-License-Identifier: LGPL-2.1-or-later
"""An unprivileged user who sends as many calls as the bus takes. Knows nothing but the bytes.

    python3 flooder.py ADDRESS UID CONNECTIONS MEMBER SIGNATURE… < BODY

keeps as many calls under way on each connection as dbus-daemon allows, until its stdin ends. For each
line there it prints how many answers it has got. With `deaf` as first argument it never reads one, and
sends as many calls again for each line.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys

PENDING = 120  # dbus-daemon allows a connection 128 calls without an answer


def call(path: str, interface: str, member: str, argument: str | None, name: str) -> bytearray:
    body = b"" if argument is None else string(argument)
    fields = b""
    values = [(1, b"o", path), (2, b"s", interface), (3, b"s", member), (6, b"s", name)]
    for code, kind, text in values:
        fields += b"\0" * (-len(fields) % 8) + bytes((code, 1)) + kind + b"\0" + string(text)
    if argument is not None:
        fields += b"\0" * (-len(fields) % 8) + b"\x08\x01g\0\x01s\0"
    head = struct.pack("<BBBBIII", ord("l"), 1, 0, 1, len(body), 1, len(fields))
    return bytearray(head + fields + b"\0" * (-len(fields) % 8) + body)


def string(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode() + b"\0"


class Connection:
    def __init__(self, path: str, message: bytearray) -> None:
        self.message = message
        self.sent = self.answered = 0
        self.out, self.into = bytearray(), bytearray()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        uid = str(os.getuid()).encode().hex().encode()
        self.sock.sendall(b"\0AUTH EXTERNAL " + uid + b"\r\nBEGIN\r\n")
        while not self.into.endswith(b"\r\n"):
            self.into += self.sock.recv(1)
        self.into = bytearray()
        driver = "org.freedesktop.DBus"
        self.sock.sendall(call("/org/freedesktop/DBus", driver, "Hello", None, driver))
        while not self.answered:  # Hello, and NameAcquired with it
            self.read()
        self.answered = 0
        self.sock.setblocking(False)

    def write(self, most: int) -> None:
        while self.sent - self.answered < most:
            if not self.out:
                self.message[8:12] = struct.pack("<I", self.sent + 2)
                self.out = bytearray(self.message)
            try:
                size = self.sock.send(self.out)
            except BlockingIOError:
                return
            self.out = self.out[size:]
            self.sent += not self.out

    def read(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            sys.exit("the bus hung up")
        self.into += data
        start = 0
        while len(self.into) - start >= 16:
            body, _, fields = struct.unpack_from("<III", self.into, start + 4)
            end = start + 16 + fields + -fields % 8 + body
            if end > len(self.into):
                break
            self.answered += self.into[start + 1] in (2, 3)
            start = end
        del self.into[:start]


def main() -> None:
    mode, address, uid, count, path, interface, member, *argument = sys.argv[1:]
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    message = call(path, interface, member, argument[0] if argument else None, "org.vmcryptd1")
    address = address.partition(",")[0].removeprefix("unix:path=")
    connections = [Connection(address, bytearray(message)) for _ in range(int(count))]
    poll = select.epoll()
    by_fd = {one.sock.fileno(): one for one in connections} if mode == "reads" else {}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    poll.register(0, select.EPOLLIN)
    for one in connections:
        one.write(PENDING)
    print("ready", flush=True)
    while True:
        for fd, _ in poll.poll():
            if fd == 0:
                if not os.read(0, 100):
                    return
                for one in connections if mode == "deaf" else ():
                    one.write(one.sent + PENDING)
                print(sum(one.answered for one in connections), flush=True)
            else:
                by_fd[fd].read()
                by_fd[fd].write(PENDING)


if __name__ == "__main__":
    main()
