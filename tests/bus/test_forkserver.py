# SPDX-License-Identifier: LGPL-2.1-or-later
"""A forked program is what one that is started is, so that tests may take either."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bus.simulated import LONG_S, PROJECT
from tests.forkserver import DEVNULL, PIPE, Forked

SURROUNDINGS = """
import json, os, signal, sys
print(json.dumps({
    "arguments": sys.argv, "environment": dict(os.environ), "folder": os.getcwd(),
    "descriptors": sorted(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
    "session": os.getsid(0), "group": os.getpgrp(), "mask": os.umask(0),
    "signals": [getattr(signal.getsignal(n), "__name__", str(signal.getsignal(n))) for n in signal.valid_signals()],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "streams": [
        (s.fileno(), s.encoding, s.errors, s.line_buffering, s.mode)
        for s in (sys.stdin, sys.stdout, sys.stderr)
    ],
}))
"""


def test_it_finds_what_every_process_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMCRYPTD_TESTED", "set after the server's start")
    started = subprocess.run(
        [sys.executable, "-c", SURROUNDINGS, "one", "two"],
        cwd=PROJECT, env=dict(os.environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    with Forked("-c", SURROUNDINGS, "one", "two", stdin=DEVNULL, stdout=PIPE) as forked:
        out, _ = forked.communicate(timeout=LONG_S)
    assert json.loads(out) == json.loads(started.stdout)


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('a reason')",
        "raise ValueError('a mistake')",
        "import os; os._exit(5)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.kill(os.getpid(), 15)",
        "print('written at the end')",
        "import atexit; atexit.register(print, 'at the end')",
        "import sys; sys.stdout.close()",
        "import sys; sys.stderr.close(); sys.exit('a reason')",
        "import threading; threading.Timer(0, print, ['in a thread']).start()",
        "print('a part', end=''); raise KeyError(1)",
        "import os; os.close(1); print('nowhere')",
        "raise KeyboardInterrupt",
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_it_ends_as_every_process_ends(code: str, full: bool) -> None:
    with open("/dev/full" if full else os.devnull, "w") as file:
        out = file if full else PIPE
        started = subprocess.run(
            [sys.executable, "-c", code],
            cwd=PROJECT, stdout=out, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        with Forked("-c", code, stdout=out, stderr=PIPE) as forked:
            said = forked.communicate(timeout=LONG_S)
    assert forked.returncode == started.returncode
    assert said[0] == (started.stdout or "")
    assert _last_line(said[1]) == _last_line(started.stderr)


def _last_line(text: str) -> str:
    """Tracebacks differ in where it was called from."""
    return text.rstrip("\n").rpartition("\n")[2]


def test_signals_reach_it() -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with Forked("-c", "import time; print(flush=True); time.sleep(600)", stdout=PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "\n"
            assert child.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0)
            child.send_signal(number)
            assert child.wait(LONG_S) == -number
            child.send_signal(number)  # it has gone


def test_the_program_it_runs_is_this_tree() -> None:
    with Forked("vmcryptctl", "--version", stdout=PIPE) as child:
        out, _ = child.communicate(timeout=LONG_S)
    assert out.startswith("vmcryptctl ")
    where = "import vmcryptd; print(vmcryptd.__file__)"
    with Forked("-c", where, stdout=PIPE) as child:
        out, _ = child.communicate(timeout=LONG_S)
    assert Path(out.strip()) == PROJECT / "vmcryptd/__init__.py"


def test_a_terminal_is_its_own() -> None:
    ours, theirs = os.openpty()
    code = "import os; print(os.getsid(0) == os.getpid(), os.tcgetpgrp(0) == os.getpgrp(), open('/dev/tty').isatty())"
    with Forked("-c", code, stdin=theirs, stdout=theirs, terminal=True) as child:
        assert child.wait(LONG_S) == 0
    assert os.read(ours, 100) == b"True True True\r\n"
    os.close(ours)
    os.close(theirs)
