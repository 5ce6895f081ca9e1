# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process runner: ends, outputs, deadlines, and nothing that stays behind."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmcryptd.core.errors import DeadlineError
from vmcryptd.posix.run import OUTPUT_LIMIT, CommandError, Completed, run


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert not set(os.listdir("/proc/self/fd")) - before


def sh(script: str, timeout_s: float = 5) -> Completed:
    return asyncio.run(run(["sh", "-c", script], timeout_s=timeout_s))


def test_outcomes() -> None:
    assert sh("echo out; echo err >&2; exit 7") == Completed(7, "out\n", "err\n")
    assert sh("exit 7").reason == "exit status 7"
    assert sh("kill -TERM $$").reason == "killed by SIGTERM"
    assert sh("exit 1").complaint == "exit status 1"
    assert sh("printf 'first\\nlast.\\n\\n' >&2").complaint == "last"


def test_environment_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hush")
    code = run(["env"], timeout_s=5, environment={"MORE": "1"})
    names = {line.partition("=")[0] for line in asyncio.run(code).out.splitlines()}
    assert names == {"PATH", "LANG", "MORE"}


def test_output_is_bounded() -> None:
    done = sh("head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2")
    assert (done.code, len(done.out), len(done.err)) == (0, OUTPUT_LIMIT, OUTPUT_LIMIT)
    assert done.is_cut
    more = run(["head", "-c", "3000000", "/dev/zero"], timeout_s=5, output_limit=3_000_000)
    assert len(asyncio.run(more).out) == 3_000_000
    assert not asyncio.run(run(["echo"], timeout_s=5)).is_cut


def test_descriptors() -> None:
    source, sink = os.memfd_create("in"), os.memfd_create("out")
    os.write(source, b"content")
    os.lseek(source, 0, os.SEEK_SET)
    assert asyncio.run(run(["cat"], stdin=source, stdout=sink, timeout_s=5)).out == ""
    assert os.pread(sink, 99, 0) == b"content"
    os.close(source)
    os.close(sink)


@pytest.mark.parametrize("name", ["no-such-program", "/no/such", "bin/true", "/etc", "/etc/passwd"])
def test_missing_program(name: str) -> None:
    with pytest.raises(CommandError, match=f"the program {name} is not installed"):
        asyncio.run(run([name], timeout_s=5))


def test_a_program_without_an_interpreter(tmp_path: Path) -> None:
    """The system's shell takes it, as execvp(3) has it."""
    (tmp_path / "p").write_bytes(b"\xff\xfe no program")
    (tmp_path / "p").chmod(0o700)
    done = asyncio.run(run([str(tmp_path / "p")], timeout_s=60))
    assert done.code in (126, 127)
    assert "not found" in done.complaint


def test_a_program_on_a_disk_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, access = threading.Event(), os.access

    def hangs(path: str, mode: int) -> bool:
        return answered.wait(60) if path == "/mnt/dead/fetch" else access(path, mode)

    monkeypatch.setattr("vmcryptd.posix.run.os.access", hangs)

    async def test() -> None:
        asking = asyncio.create_task(run(["/mnt/dead/fetch"], timeout_s=0.2))
        assert (await run(["echo", "-n", "the loop goes on"], timeout_s=60)).out != ""
        with pytest.raises(DeadlineError):
            await asking

    asyncio.run(test())
    answered.set()


def test_a_program_of_the_administrators_own(tmp_path: Path) -> None:
    script = tmp_path / "a=b c"
    script.write_text('#!/bin/sh\necho "$0|$1|$(nice)"; exit 7\n')
    script.chmod(0o700)
    done = asyncio.run(run([str(script), "-n x"], timeout_s=60))
    assert (done.code, done.out) == (7, f"{script}|-n x|{os.nice(0)}\n")


def gone(pid_file: Path) -> bool:
    """Soon: a signal that was sent is not yet a process that ended."""
    stat = Path(f"/proc/{int(pid_file.read_text())}/stat")
    until = time.monotonic() + 2
    while time.monotonic() < until:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("trap", ["", "trap : TERM;"])
def test_deadline_kills_the_whole_group(
    tmp_path: Path, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmcryptd.posix.run.GRACE_S", 0.3)
    script = f"{trap} sleep 60 & echo $! > {tmp_path}/child; while :; do wait; sleep 1; done"
    with pytest.raises(DeadlineError, match="sh did not end within 0.2 s"):
        sh(script, 0.2)
    assert gone(tmp_path / "child")


def test_cancelling_kills_it(tmp_path: Path) -> None:
    async def go() -> None:
        task = asyncio.create_task(
            run(["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"], timeout_s=60)
        )
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert gone(tmp_path / "pid")
    with pytest.raises(ChildProcessError):
        os.waitpid(int((tmp_path / "pid").read_text()), os.WNOHANG)


def test_grandchild_with_the_outputs_is_not_waited_for(tmp_path: Path) -> None:
    assert sh(f"sleep 60 & echo $! > {tmp_path}/pid; echo done").out == "done\n"
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_many_at_once() -> None:
    async def go() -> list[Completed]:
        return await asyncio.gather(
            *(run(["sh", "-c", f"echo {n}; exit {n}"], timeout_s=20) for n in range(40))
        )

    assert asyncio.run(go()) == [Completed(n, f"{n}\n") for n in range(40)]
