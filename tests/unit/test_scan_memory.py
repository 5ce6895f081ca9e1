# SPDX-License-Identifier: LGPL-2.1-or-later
"""The search that other tests trust: it finds what is there, also beside pages that cannot be read."""

import os
import subprocess
import sys
from pathlib import Path

from tests.scan_memory import PAGE, found_in

# Its file is two pages long, then one: the second cannot be read any more. What lies behind the mapping can.
MAPS = """
import mmap, os, sys
path, page = sys.argv[1], int(sys.argv[2])
with open(path, "r+b") as file:
    shorter = mmap.mmap(file.fileno(), 2 * page)
    gone = mmap.mmap(file.fileno(), 2 * page, offset=2 * page)
    file.truncate(page)
print("ready", flush=True)
sys.stdin.read()
"""


def test_it_finds_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    secret = os.urandom(24)
    path.write_bytes(bytes(PAGE - len(secret)) + secret + bytes(3 * PAGE))
    with subprocess.Popen(
        [sys.executable, "-c", MAPS, path, str(PAGE)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        [place] = found_in(process.pid, secret)
        assert str(path) in place
        assert found_in(process.pid, os.urandom(24)) == []
        process.communicate()
