# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs on the test host: calls on its bus with descriptors and the names of errors, which busctl has not.

    python3 caller.py SOCKET [USER]

takes one JSON request for each connection to the socket, from root, and makes the call as the user.
`flood` is an attacker; the rest is a client that knows all that D-Bus can do.
"""

import asyncio
import base64
import json
import os
import pwd
import re
import socket
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from dbus_next import BusType, Message, MessageType, Variant
from dbus_next.aio import MessageBus

NAME = "org.vmcryptd1"
ROOT = "/org/vmcryptd1"
MANAGER = "org.vmcryptd1.Manager"
BUS_SOCKET = "/run/dbus/system_bus_socket"
QUESTIONS = Path("/run/systemd/ask-password")
ANSWERED: set[str] = set()  # the sockets of questions that have their answer
WINDOW = 60  # the bus delivers no more descriptors to one receiver than some hundreds at once

Json = dict[str, Any]

MALFORMED: list[list[Any]] = [
    [ROOT, MANAGER, "UnlockAllWithKey", "s", ["x"], 2],
    [ROOT, MANAGER, "Nothing", "h", [0], 1],
    [ROOT, MANAGER, "Unlock", "u", [7], 1],
    ["/no/where", MANAGER, "Lock", "s", ["a"], 2],
    [ROOT, "org.freedesktop.DBus.Peer", "Ping", "h", [0], 3],
    [ROOT, "org.freedesktop.DBus.Introspectable", "Introspect", "h", [0], 1],
    [ROOT, "org.freedesktop.DBus.Properties", "Get", "sh", ["x", 0], 1],
]
REFUSED: list[list[Any]] = [
    [ROOT, MANAGER, "UnlockWithKey", "sh", ["cr_ask", 0], 1],
    [ROOT, MANAGER, "UnlockAllWithKey", "h", [0], 1],
    [ROOT, MANAGER, "Lock", "s", ["cr_ask"], 1],  # with a descriptor that it does not want
]
# What `flood` may be given: of 125 calls polkit decides three, which is what takes most of the time.
BAD_CALLS = [*(MALFORMED * 35)[:244], *(REFUSED * 2)]


def plain(value: Any) -> Any:
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value


async def call(bus: MessageBus, request: Json) -> Json:
    fds: list[int] = []
    if "key" in request:
        reader, writer = os.pipe()
        os.write(writer, base64.b64decode(request["key"]))
        os.close(writer)
        fds.append(reader)
    message = Message(
        destination=NAME,
        path=request.get("path", ROOT),
        interface=request.get("interface", MANAGER),
        member=request["member"],
        signature=request.get("signature", ""),
        body=request.get("body", []),
        unix_fds=fds,
    )
    try:
        reply = await bus.call(message)
    finally:
        for fd in fds:
            os.close(fd)
    assert reply is not None
    if reply.message_type is MessageType.ERROR:
        return {"error": reply.error_name, "text": str(reply.body[0]) if reply.body else ""}
    return {"out": plain(reply.body)}


async def until(bus: MessageBus, request: Json) -> Json:
    """Until a property is one of these values; tells what it was last."""
    get = {
        "path": request.get("path", ROOT),
        "interface": "org.freedesktop.DBus.Properties",
        "member": "Get",
        "signature": "ss",
        "body": [request.get("interface", MANAGER), request["until"]],
    }
    answer: Json = {}
    try:
        async with asyncio.timeout(request["timeout_s"]):
            # A daemon that restarts at this moment answers with an error, or not at all.
            while answer.get("out") not in [[value] for value in request["values"]]:
                await asyncio.sleep(0.05)
                answer = await call(bus, get)
    except TimeoutError:
        answer["late"] = True
    return answer


def questions() -> dict[str, str]:
    """The socket for the answer → the text of each question that waits for one."""
    found = {}
    for path in QUESTIONS.glob("ask.*"):
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            continue
        fields = dict(line.split("=", 1) for line in lines if "=" in line)
        if fields.get("Socket", "") not in {"", *ANSWERED}:  # none: it is being written
            found[fields["Socket"]] = fields["Message"]
    return found


async def answer(request: Json) -> Json:
    """Wait for a question whose text matches; answer it, as an agent does, if there is an answer."""
    texts: dict[str, str] = {}
    try:
        async with asyncio.timeout(request["timeout_s"]):
            while True:
                texts = questions()
                for address, text in texts.items():
                    if re.search(request["question"], text):
                        if "answer" in request:
                            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as agent:
                                agent.sendto(b"+" + base64.b64decode(request["answer"]), address)
                            ANSWERED.add(address)
                        return {"out": [text]}
                await asyncio.sleep(0.05)
    except TimeoutError:
        return {"late": True, "out": list(texts.values())}


def connect() -> socket.socket:
    """A bare connection to the bus that may send descriptors."""
    bus = socket.socket(socket.AF_UNIX)
    bus.connect(BUS_SOCKET)
    uid = str(os.getuid()).encode().hex()
    bus.sendall(b"\0AUTH EXTERNAL " + uid.encode() + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
    said = b""
    while b"AGREE_UNIX_FD\r\n" not in said:
        said += bus.recv(4096)
    hello = Message(
        destination="org.freedesktop.DBus",
        path="/org/freedesktop/DBus",
        interface="org.freedesktop.DBus",
        member="Hello",
        serial=1,
    )
    bus.sendall(hello._marshall(False))
    return bus


def flood(request: Json) -> Json:
    """Many calls with descriptors, none of which is to succeed. Counts how they were answered."""
    bus = connect()
    templates = [
        bytearray(
            Message(
                destination=NAME,
                path=path,
                interface=interface,
                member=member,
                signature=signature,
                body=body,
                unix_fds=[0] * count,
                serial=1,
            )._marshall(True)
        )
        for path, interface, member, signature, body, count in request["messages"]
    ]
    counts = [one[-1] for one in request["messages"]]
    reader, writer = os.pipe()
    answers: Counter[str] = Counter()
    buffer = bytearray()
    sent = answered = 0
    total = request["flood"]
    while answered < total:
        while sent < total and sent - answered < WINDOW:
            which = sent % len(templates)
            data = templates[which]
            data[8:12] = struct.pack("<I", sent + 2)
            fds = struct.pack(f"{counts[which]}i", *[reader] * counts[which])
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)
            bus.sendmsg([data], [rights] if counts[which] else [])
            sent += 1
        block = bus.recv(65536)
        if not block:
            return {"error": "disconnected", "text": f"after {answered} answers"}
        buffer += block
        while len(buffer) >= 16:
            body, _, fields = struct.unpack_from("<III", buffer, 4)
            size = 16 + (fields + 7) // 8 * 8 + body
            if len(buffer) < size:
                break
            kind, head = buffer[1], bytes(buffer[16 : 16 + fields])
            del buffer[:size]
            if kind == MessageType.ERROR.value:
                match = re.search(rb"[\w.]+\.Error\.[\w.]+", head)
                answers[match[0].decode() if match else "?"] += 1
                answered += 1
            elif kind == MessageType.METHOD_RETURN.value and answered + sent:
                # The bus has answered Hello before anything else was sent off.
                if not answers["hello"]:
                    answers["hello"] += 1
                else:
                    answers["allowed"] += 1
                    answered += 1
    bus.close()
    os.close(reader)
    os.close(writer)
    del answers["hello"]
    return {"out": [dict(answers)]}


async def serve(path: str, user: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o600)
    if user != "root":
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(await reader.readline())
        if "flood" in request:
            result = await asyncio.to_thread(flood, request)
        elif "until" in request:
            result = await until(bus, request)
        elif "question" in request:
            result = await answer(request)
        else:
            result = await call(bus, request)
        writer.write(json.dumps(result).encode())
        writer.close()

    async with await asyncio.start_unix_server(serve_one, sock=listener) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], (sys.argv[2:] or ["root"])[0]))
