# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that starts processes.

No shell, a short environment, a process group for each child, bounded output, and always a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vmcryptd.core.errors import DeadlineError, VmcryptdError
from vmcryptd.core.text import escaped
from vmcryptd.posix.pidfd import exit_of
from vmcryptd.posix.threads import DaemonThreads

DIRECTORIES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
ENVIRONMENT = {"PATH": ":".join(DIRECTORIES), "LANG": "C.UTF-8"}
OUTPUT_LIMIT = 64 * 1024
LONGEST_COMPLAINT = 1000  # characters
GRACE_S = 2.0  # between SIGTERM and SIGKILL, and for the kernel to end it after that


class CommandError(VmcryptdError):
    """A program that is needed cannot be started; the text names it."""


class Completed(NamedTuple):
    """How a process ended; a negative code is the signal that killed it."""

    code: int
    out: str = ""
    err: str = ""
    is_cut: bool = False  # it wrote more than was kept

    @property
    def reason(self) -> str:
        if self.code >= 0:
            return f"exit status {self.code}"
        try:
            return f"killed by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"killed by signal {-self.code}"

    @property
    def complaint(self) -> str:
        """The program's last line about its failure, for an error's text."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return escaped(lines[-1].rstrip("."), LONGEST_COMPLAINT) if lines else self.reason


def program(name: str) -> str:
    """The path of an executable, from the fixed directories only. Raises CommandError."""
    candidates = [name] if name.startswith("/") else [f"{d}/{name}" for d in DIRECTORIES]
    if name.startswith("/") or "/" not in name:
        for path in candidates:
            if os.access(path, os.X_OK) and not os.path.isdir(path):
                return path
    raise CommandError(f"the program {name} is not installed or not executable; install it")


async def run(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    fds: Sequence[int] = (),
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    stderr_to_journal: bool = False,
    expendable: bool = False,
    output_limit: int = OUTPUT_LIMIT,
) -> Completed:
    """Run a program to its end. Raises CommandError, DeadlineError.

    `fds`: descriptors that the program has under the same numbers, as /proc/self/fd/N.
    `expendable`: it may need a lot of memory; when there is none left, it dies before all others.
    `output_limit`: bytes of each output that are kept; the rest is dropped, and `is_cut` says so.

    Descriptors stay the caller's. When the deadline passes or the task is cancelled, the whole
    process group is killed and the child reaped.
    """
    # A pidfd and Popen cost a third of what asyncio's subprocess transports cost (0.2 against
    # 0.6 ms a child), and before Python 3.12 asyncio starts a thread for each child. Popen returns
    # once the child's exec is done; vfork makes that short.
    command = await _command(argv, timeout_s)
    loop = asyncio.get_running_loop()
    with (
        _capture(loop, stdout is None, output_limit) as out,
        _capture(loop, not stderr_to_journal, output_limit) as err,
    ):
        try:
            child = subprocess.Popen(  # noqa: ASYNC220 (see above)
                command,
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=out.writer if stdout is None else stdout,
                stderr=None if stderr_to_journal else err.writer,
                pass_fds=fds,
                env={**ENVIRONMENT, **(environment or {})},
                cwd="/",
                process_group=0,
            )
        except (OSError, ValueError) as error:
            text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
            raise CommandError(f"the program {argv[0]} cannot be started: {text}") from None
        if expendable:
            _expend(child.pid)
        out.started()
        err.started()
        try:
            ended = exit_of(child.pid)  # not reaped: until then its group's number stays ours
        except OSError as error:  # no descriptor left
            child.kill()
            child.wait()
            raise CommandError(
                f"the program {argv[0]} cannot be watched: {error.strerror}"
            ) from None
        try:
            timeout = None if math.isinf(timeout_s) else timeout_s
            await asyncio.wait({ended}, timeout=timeout)
        finally:
            in_time = ended.done()
            if not in_time:
                # Reaped as soon as the kernel ends it: it may be in an uninterruptible call.
                ended.add_done_callback(lambda _: child.poll())
                await _kill(child, ended)
        if not in_time:
            raise DeadlineError(f"{argv[0]} did not end within {timeout_s:g} s and was stopped")
        return Completed(child.wait(), out.text(), err.text(), out.is_cut or err.is_cut)


async def _command(argv: Sequence[str], timeout_s: float) -> list[str]:
    """The program's path, and its arguments. Raises CommandError, DeadlineError.

    An administrator's own program may lie on a disk that does not answer. It is looked for in a thread; and because
    Popen returns only when the program was read, a program of the system starts it, which waits in its place.
    """
    name, *arguments = argv
    if os.path.dirname(name) in ("", *DIRECTORIES):
        return [program(name), *arguments]
    bound = DaemonThreads().call(timeout_s, functools.partial(program, name))
    return [program("nice"), "-n", "0", "--", await bound, *arguments]


def spawn_on_terminal(
    paths: Sequence[str], argv: Sequence[str], fds: Mapping[int, int]
) -> int | None:
    """Start a program that reads the caller's terminal, with these descriptors (number in the child → here).

    Unlike `run` it stays in the terminal's foreground process group, which also gives it the Ctrl-C, and has the
    caller's environment. Returns its process id, to be waited for and reaped; None if none of the paths is there.
    """
    path = next((path for path in paths if os.access(path, os.X_OK)), None)
    if path is None:
        return None
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    # The program opens the terminal by name; its standard error would only repeat our messages.
    actions = [(os.POSIX_SPAWN_DUP2, here, there) for there, here in {2: null, **fds}.items()]
    try:
        return os.posix_spawn(
            path,
            list(argv),
            os.environ,
            file_actions=actions,
            setsigdef=[signal.SIGINT, signal.SIGPIPE],
        )
    finally:
        os.close(null)


class _Output:
    """The first bytes of a child's output; the rest is dropped, so that the child never blocks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self._limit = limit
        self.is_cut = False
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.reader, False)
        self._content = bytearray()

    def started(self) -> None:
        self._shut_writer()
        self._loop.add_reader(self.reader, self._read)

    def _shut_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def _read(self) -> bool:
        """True when there may be more."""
        try:
            block = os.read(self.reader, OUTPUT_LIMIT)
        except BlockingIOError:
            return False
        room = self._limit - len(self._content)
        self._content += block[:room]
        self.is_cut = self.is_cut or len(block) > room
        if not block:
            self._loop.remove_reader(self.reader)
        return bool(block)

    def text(self) -> str:
        # The available content, not to the end: a grandchild may keep the pipe open, or go on writing.
        for _ in range(16):
            if not self._read():
                break
        return self._content.decode("utf-8", "replace")

    def close(self) -> None:
        self._shut_writer()
        self._loop.remove_reader(self.reader)
        os.close(self.reader)


class _NoOutput:
    """An output that is not captured."""

    writer = -1
    is_cut = False

    def started(self) -> None: ...

    def text(self) -> str:
        return ""


@contextlib.contextmanager
def _capture(
    loop: asyncio.AbstractEventLoop, wanted: bool, limit: int
) -> Iterator[_Output | _NoOutput]:
    if not wanted:
        yield _NoOutput()
        return
    output = _Output(loop, limit)
    try:
        yield output
    finally:
        output.close()


def _expend(pid: int) -> None:
    # It would inherit the daemon's OOMScoreAdjust=, and guests would be killed for its memory.
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write("1000")


async def _kill(child: subprocess.Popen[bytes], ended: asyncio.Future[None]) -> None:
    try:
        _signal_group(child, signal.SIGTERM)
        await asyncio.wait({ended}, timeout=GRACE_S)
    finally:
        _signal_group(child, signal.SIGKILL)  # also what the leader left behind
    await asyncio.wait({ended}, timeout=GRACE_S)


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
