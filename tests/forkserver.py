# SPDX-License-Identifier: LGPL-2.1-or-later
"""Daemons and command lines without the time that Python takes to import them, which is most of a short run.

A server imports both programs once, and forks a child for each that a test asks for. The child is a process as any
other: it has its own arguments, environment, folder, standard streams, signals and exit status, and no thread, timer or
descriptor of the server. It differs in what it has imported, in its command line in /proc and in its parent. A test
about one of these, about memory, or about Python's own options, starts a program itself.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn, Self, TextIO

import vmcryptd

PROJECT = Path(__file__).resolve().parents[1]
LONGEST_REQUEST = 128 * 1024  # bytes; the environment is most of it
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL

# --- the side of the tests ---


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Run the server that `Forked` needs."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, subprocess.Popen(
        [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())],
        cwd=PROJECT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
    ) as server:  # fmt: skip
        theirs.close()
        Forked.control = ours
        yield
        Forked.control = None
        ours.close()
        assert server.wait(60) == 0


class Forked:
    """A child of the server, used as subprocess.Popen with text is.

    `program` is "vmcryptd", "vmcryptctl", or "-c" with code as the first argument, as Python has it.
    """

    control: ClassVar[socket.socket | None] = None

    def __init__(
        self, program: str, *argv: str, stdin: int | None = None, stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None, env: Mapping[str, str] | None = None, terminal: bool = False,
    ) -> None:  # fmt: skip
        """With `terminal`, standard input is one, and becomes the child's controlling terminal."""
        assert self.control is not None, "no server: use the fixture"
        self.returncode: int | None = None
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        asked = {
            "program": program,
            "argv": argv,
            "env": dict(os.environ if env is None else env),
            "terminal": terminal,
        }
        with contextlib.ExitStack() as handed_over:

            def stream(name: str, wanted: int | IO[Any] | None, inherited: int) -> int:
                if wanted == PIPE:
                    reader, writer = os.pipe()
                    theirs, ours, mode = (
                        (reader, writer, "w") if inherited == 0 else (writer, reader, "r")
                    )
                    setattr(self, name, open(ours, mode))  # noqa: SIM115 (closed with the process)
                elif wanted == DEVNULL:
                    theirs = os.open(os.devnull, os.O_RDWR)
                elif wanted is None:
                    return inherited
                else:
                    return wanted if isinstance(wanted, int) else wanted.fileno()
                handed_over.callback(os.close, theirs)
                return theirs

            fds = [
                stream("stdin", stdin, 0),
                stream("stdout", stdout, 1),
                stream("stderr", stderr, 2),
            ]
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            handed_over.callback(theirs.close)
            socket.send_fds(self.control, [json.dumps(asked).encode()], [*fds, theirs.fileno()])
        text, [self._pidfd], _, _ = socket.recv_fds(ours, 100, 1)
        self.pid = int(text)
        # No object that would complain in the next test when this one has failed.
        self._report = ours.detach()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)
            self.returncode = int(os.read(self._report, 100))
            os.close(self._report)
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, typed: str = "", timeout: float | None = None) -> tuple[str, str]:
        """All of standard output and error. What is typed fits into a pipe."""
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(typed)
                self.stdin.close()
        end = None if timeout is None else time.monotonic() + timeout
        texts: dict[IO[str], bytes] = {one: b"" for one in (self.stdout, self.stderr) if one}
        unfinished = list(texts)
        while unfinished:
            left = None if end is None else max(0, end - time.monotonic())
            ready = select.select(unfinished, [], [], left)[0]
            if not ready:
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)
            for one in ready:
                block = os.read(one.fileno(), 65536)
                texts[one] += block
                if not block:
                    unfinished.remove(one)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        out, err = (texts[one].decode() if one else "" for one in (self.stdout, self.stderr))
        return out, err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self.stdin, self.stdout, self.stderr):
            if one is not None:
                one.close()
        self.wait()


# --- the side of the server ---

Main = Callable[[], int | None]


def programs() -> dict[str, Main]:
    # All modules: the heaviest are imported by functions.
    for module in pkgutil.walk_packages(vmcryptd.__path__, "vmcryptd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return {
        "vmcryptd": sys.modules["vmcryptd.daemon"].main,
        "vmcryptctl": sys.modules["vmcryptd.cli.main"].main,
        "-c": lambda: exec(sys.argv.pop(1), {"__name__": "__main__"}),
    }


def serve(control: socket.socket, programs: Mapping[str, Main]) -> Main | None:
    """Fork until the tests have ended: None. In a child: the program that it is to run."""
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([control, *children], [], [])
        for fd in ready:
            if fd is not control:
                pid, report = children.pop(fd)
                _end(pid, report)
                os.close(fd)
                continue
            request, fds, _, _ = socket.recv_fds(control, LONGEST_REQUEST, 4)
            if not request:
                return None
            report = socket.socket(fileno=fds.pop())
            pid = os.fork()
            if pid == 0:
                for one in (control, report, *(report for _, report in children.values())):
                    one.close()
                for other in children:
                    os.close(other)
                asked = json.loads(request)
                _take_over(asked, fds)
                return programs[asked["program"]]
            for fd in fds:
                os.close(fd)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = pid, report
            socket.send_fds(report, [str(pid).encode()], [pidfd])


def _end(pid: int, report: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    with report, contextlib.suppress(OSError):  # a test that failed does not wait for it
        report.send(str(os.waitstatus_to_exitcode(status)).encode())


def _take_over(asked: dict[str, Any], fds: list[int]) -> None:
    """Make this child what the interpreter would have made of it at its start."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    if asked["terminal"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # As a login shell leaves it; what is started in the background ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["env"])
    time.tzset()
    sys.argv = [asked["program"], *asked["argv"]]
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        old = getattr(sys, name)
        unbuffered = old.write_through  # $PYTHONUNBUFFERED
        size = 0 if unbuffered and mode == "w" else -1
        binary = open(fd, f"{mode}b", size, closefd=False)  # noqa: SIM115
        by_line = not unbuffered and (fd == 2 or os.isatty(fd))
        new = io.TextIOWrapper(binary, old.encoding, old.errors, "\n", by_line, unbuffered)
        new.mode = mode
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def _end_as(main: Main) -> NoReturn:
    """Run it, and end as the interpreter does, but for freeing all modules.

    That would write to each page that is shared with the server, and take five times as long as all else.
    """
    code = 0
    interrupted = False
    try:
        sys.exit(main())
    except SystemExit as end:
        if isinstance(end.code, int):
            code = end.code
        elif end.code is not None:
            code = 1
            with contextlib.suppress(OSError, ValueError):
                print(end.code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 (nothing is above)
        code = 1
        interrupted = isinstance(error, KeyboardInterrupt)
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not _flushed(sys.stdout, tell=True) or not _flushed(sys.stderr, tell=False):
        code = 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _flushed(stream: TextIO, *, tell: bool) -> bool:
    try:
        if not stream.closed:
            stream.flush()
    except OSError as error:
        if tell:
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}",
                    file=sys.stderr,
                )
        return False
    return True


if __name__ == "__main__":
    imported = programs()
    assert len(os.listdir("/proc/self/task")) == 1  # a thread would not be in the child
    # The collector would write to what parent and child share.
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        program = serve(socket.socket(fileno=int(sys.argv[1])), imported)
        if program is not None:
            _end_as(program)
