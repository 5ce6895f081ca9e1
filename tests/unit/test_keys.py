# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys end up whole and sealed in memory, from every source, or are refused with a sentence."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmcryptd.adapters.keysources.sources import SystemKeys
from vmcryptd.core.errors import KeyUnavailableError, KeyUnusableError
from vmcryptd.core.model import KeySource, SourceKind, VolumeSpec
from vmcryptd.core.ports import Key
from vmcryptd.posix import memfd
from vmcryptd.posix.memfd import F_GET_SEALS, LIMIT, SEALS, LockedKey

VOLUME = VolumeSpec("cr_imap", "/dev/nowhere", uuid="u-u")
CONTENT = b"correct horse\nbattery\0staple\n"


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    if set(os.listdir("/proc/self/fd")) - before:
        gc.collect()  # takes its time: exceptions that pytest still holds may hold a key
    assert not set(os.listdir("/proc/self/fd")) - before


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(CONTENT)
    path.chmod(0o600)
    return path


def content(key: Key) -> bytes:
    """What a child would read. Twice: each reader starts at the beginning."""
    found = []
    for _ in range(2):
        fd = key.reader()
        assert fcntl.fcntl(fd, F_GET_SEALS) & SEALS == SEALS
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
        found.append(os.read(fd, LIMIT))
        os.close(fd)
    assert found[0] == found[1]
    key.close()
    key.close()
    return found[0]


def fetch(kind: SourceKind, argument: str, keys: SystemKeys | None = None) -> bytes:
    keys = keys or SystemKeys(credentials=None, stores=(), encrypted_stores=(), timeout_s=5)
    return content(asyncio.run(keys.fetch(KeySource(kind, argument), VOLUME)))


def receive(fd: int, timeout_s: float = 5) -> bytes:
    async def go() -> Key:
        return await SystemKeys(credentials=None, timeout_s=timeout_s).receive(fd)

    try:
        return content(asyncio.run(go()))
    finally:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_file(key_file: Path) -> None:
    assert fetch(SourceKind.FILE, str(key_file)) == CONTENT


def _open_to_others(path: Path) -> str:
    path.chmod(0o640)
    return str(path)


def _directory(path: Path) -> str:
    return str(path.parent)


def _fifo(path: Path) -> str:
    fifo = path.with_name("fifo")
    os.mkfifo(fifo, 0o600)
    return str(fifo)


def _empty(path: Path) -> str:
    path.write_bytes(b"")
    return str(path)


def _large(path: Path) -> str:
    os.truncate(path, LIMIT + 1)
    return str(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_open_to_others, "is open to others; run `chmod 600 "),
        (_directory, "is not a regular file"),
        (_fifo, "is not a regular file"),
        (_empty, "is empty"),
        (_large, "is larger than 8 MiB"),
        (lambda path: str(path) + "x", "is not there; it is tried when it appears"),
        (lambda path: path.name, "is not an absolute path"),
    ],
)
def test_refused_file(key_file: Path, change: Callable[[Path], str], text: str) -> None:
    with pytest.raises(KeyUnavailableError, match=text):
        fetch(SourceKind.FILE, change(key_file))


def test_largest_file(key_file: Path) -> None:
    os.truncate(key_file, LIMIT)
    assert len(fetch(SourceKind.FILE, str(key_file))) == LIMIT


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user(key_file: Path) -> None:
    os.chown(key_file, 12345, -1)
    with pytest.raises(KeyUnavailableError, match="does not belong to root"):
        fetch(SourceKind.FILE, str(key_file))


def test_credential(tmp_path: Path) -> None:
    for number, store in enumerate(("unit", "etc", "run")):
        (tmp_path / store).mkdir()
        (tmp_path / store / f"c{number}").write_bytes(CONTENT + b"%d" % number)
    (tmp_path / "unit" / "c1").write_bytes(b"first")
    stores = (str(tmp_path / "etc"), str(tmp_path / "run"))
    keys = SystemKeys(str(tmp_path / "unit"), stores, (), timeout_s=5)
    assert fetch(SourceKind.CREDENTIAL, "c0", keys) == CONTENT + b"0"
    assert fetch(SourceKind.CREDENTIAL, "c1", keys) == b"first"
    assert fetch(SourceKind.CREDENTIAL, "c2", keys) == CONTENT + b"2"
    for name in ("", ".", "..", "../unit/c0", "a/b", "a\nb"):
        with pytest.raises(KeyUnavailableError, match="is not the name of a credential"):
            fetch(SourceKind.CREDENTIAL, name, keys)
    with pytest.raises(KeyUnavailableError, match="there is no credential nope"):
        fetch(SourceKind.CREDENTIAL, "nope", keys)


def test_program() -> None:
    assert fetch(SourceKind.EXEC, "/bin/echo -n 'two words'") == b"two words"
    script = 'printf "%s %s %s" "$VMCRYPTD_VOLUME" "$VMCRYPTD_DEVICE" "$VMCRYPTD_UUID"'
    assert fetch(SourceKind.EXEC, f"/bin/sh -c '{script}'") == b"cr_imap /dev/nowhere u-u"
    assert fetch(SourceKind.EXEC, "/bin/sh -c 'echo key > /dev/stdout'") == b"key\n"
    assert len(fetch(SourceKind.EXEC, "/bin/head -c 500000 /dev/zero")) == 500000


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (
            "/bin/sh -c 'echo hush; exit 3'",
            "the key command /bin/sh failed: exit status 3; `journalctl -u vmcryptd`",
        ),
        ("/bin/sh -c 'kill -9 $$'", "the key command /bin/sh failed: killed by SIGKILL; "),
        ("/bin/true", "is empty"),
        ("/bin/cat /dev/zero", "larger than 8 MiB"),
        ("/no/such program", "/no/such is not installed"),
        ("fetch-key", "absolute path"),
        ("", "absolute path"),
        ("/bin/echo 'open", "not well quoted"),
    ],
)
def test_failing_program(command: str, text: str) -> None:
    with pytest.raises(KeyUnavailableError, match=text):
        fetch(SourceKind.EXEC, command)


def test_program_that_never_ends(tmp_path: Path) -> None:
    keys = SystemKeys(credentials=None, timeout_s=0.3)
    pid_file = tmp_path / "pid"
    with pytest.raises(KeyUnavailableError, match="did not end within"):
        fetch(SourceKind.EXEC, f"/bin/sh -c 'sleep 60 & echo $! > {pid_file}; wait'", keys)
    until = time.monotonic() + 2
    while alive(int(pid_file.read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(int(pid_file.read_text()))


def test_program_that_leaves_one_behind(tmp_path: Path) -> None:
    """A grandchild that holds the pipe open is not waited for."""
    pid_file = tmp_path / "pid"
    command = f"/bin/sh -c 'sleep 60 & echo $! > {pid_file}; printf key'"
    assert fetch(SourceKind.EXEC, command) == b"key"
    os.kill(int(pid_file.read_text()), 9)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("blocking", [True, False])
def test_pipe(blocking: bool) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, blocking)

    async def go() -> Key:
        task = asyncio.create_task(SystemKeys(credentials=None, timeout_s=5).receive(reader))
        for part in (CONTENT[:5], CONTENT[5:]):
            await asyncio.sleep(0.05)
            os.write(writer, part)
        os.close(writer)
        return await task

    assert content(asyncio.run(go())) == CONTENT


def test_socket() -> None:
    near, far = socket.socketpair()
    payload = os.urandom(300_000)

    async def go() -> Key:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(SystemKeys(credentials=None, timeout_s=5).receive(near.detach()))
        far.setblocking(False)
        await loop.sock_sendall(far, payload)
        far.close()
        return await task

    assert content(asyncio.run(go())) == payload


def test_handed_in_file(key_file: Path) -> None:
    assert receive(os.open(key_file, os.O_RDONLY)) == CONTENT
    memfd = os.memfd_create("k")
    os.write(memfd, CONTENT)
    os.lseek(memfd, 8, os.SEEK_SET)
    assert receive(memfd) == CONTENT[8:]


def test_a_file_whose_server_does_not_answer(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel waits already when it is asked what that is."""
    answered, mode = threading.Event(), memfd._mode

    def hangs(fd: int) -> int:
        answered.wait(60)
        return mode(fd)

    monkeypatch.setattr(memfd, "_mode", hangs)

    async def test() -> None:
        keys = SystemKeys(credentials=None, timeout_s=0.2)
        with pytest.raises(KeyUnusableError, match="did not end within 0.2 s"):
            await keys.receive(os.open(key_file, os.O_RDONLY))

    asyncio.run(test())
    answered.set()


def test_refused_descriptors(key_file: Path) -> None:
    with pytest.raises(KeyUnusableError, match="is a directory"):
        receive(os.open(key_file.parent, os.O_RDONLY))
    with pytest.raises(KeyUnusableError, match="not open for reading"):
        receive(os.open(key_file, os.O_WRONLY))
    with pytest.raises(KeyUnusableError, match="not open for reading"):
        receive(os.open(key_file, os.O_PATH))
    with pytest.raises(KeyUnusableError, match="is empty"):
        receive(os.open("/dev/null", os.O_RDONLY))
    with pytest.raises(KeyUnusableError, match="larger than 8 MiB"):
        receive(os.open("/dev/zero", os.O_RDONLY))
    with pytest.raises(KeyUnusableError, match="nothing that can be read"):
        receive(os.eventfd(0))
    os.truncate(key_file, LIMIT + 1)
    with pytest.raises(KeyUnusableError, match="larger than 8 MiB"):
        receive(os.open(key_file, os.O_RDONLY))


def test_descriptors_that_never_end() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"begun")
    with pytest.raises(KeyUnusableError, match="did not end within 0.2 s"):
        receive(reader, timeout_s=0.2)
    os.close(writer)
    terminal, other = os.openpty()
    with pytest.raises(KeyUnusableError, match="did not end within 0.2 s"):
        receive(other, timeout_s=0.2)
    os.close(terminal)
    datagrams, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with pytest.raises(KeyUnusableError, match="did not end within 0.2 s"):
        receive(datagrams.detach(), timeout_s=0.2)
    peer.close()


def test_endless_pipe() -> None:
    reader, writer = os.pipe()
    pid = os.posix_spawn("/bin/cat", ["cat", "/dev/zero"], {}, file_actions=[
        (os.POSIX_SPAWN_DUP2, writer, 1)])  # fmt: skip
    os.close(writer)
    with pytest.raises(KeyUnusableError, match="larger than 8 MiB"):
        receive(reader)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("message", ["two\nlines", "bell\a", "nul\0", "esc\x1b[1m"])
def test_question_of_one_line(message: str) -> None:
    with pytest.raises(KeyUnavailableError, match="one line"):
        asyncio.run(SystemKeys(credentials=None).ask(message))


def test_a_key_of_the_command_line_is_locked_in_memory_and_not_readable_there() -> None:
    def mapped() -> list[str]:
        """The line of /proc/self/maps, and how much of that is locked."""
        lines = Path("/proc/self/smaps").read_text().splitlines()
        found = [number for number, line in enumerate(lines) if "/memfd:vmcryptd-key" in line]
        locked = [
            line for at in found for line in lines[at : at + 30] if line.startswith("Locked:")
        ]
        return [*(lines[at] for at in found), *locked]

    key = LockedKey()
    os.write(key.fileno(), CONTENT)
    assert mapped() == []
    key.seal()
    mapping, locked = mapped()[:2]
    assert mapping.split()[1] == "---p"
    assert int(locked.split()[1]) > 0
    assert content(key) == CONTENT
    assert mapped() == []
    empty = LockedKey()
    empty.seal()
    assert (mapped(), content(empty)) == ([], b"")
