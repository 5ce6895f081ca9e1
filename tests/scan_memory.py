# SPDX-License-Identifier: LGPL-2.1-or-later
"""Searches a process's memory, page by page where a page cannot be read; runs inside the test host, too.

python3 scan_memory.py PID <NEEDLES, one a line
"""

import os
import re
import sys
from collections.abc import Iterator

PAGE = os.sysconf("SC_PAGESIZE")
LINE = re.compile(r"(\w+)-(\w+) (\S+) \S+ \S+ \S+ *(.*)")


def regions(pid: int) -> Iterator[tuple[str, bytes]]:
    """The kind of each region, and the content of its readable pages; one that cannot be read separates them."""
    with open(f"/proc/{pid}/mem", "rb", 0) as memory, open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            start, end, rights, name = LINE.fullmatch(line.rstrip("\n")).groups()  # type: ignore[union-attr]
            if rights[0] != "r" or name.startswith(("[vvar", "[vsyscall")):
                continue
            content = b"".join(_pieces(memory.fileno(), int(start, 16), int(end, 16)))
            yield f"{name or 'anonymous memory'} at {start}", content


def _pieces(memory: int, place: int, end: int) -> Iterator[bytes]:
    while place < end:
        try:
            piece = os.pread(memory, end - place, place)
        except (
            OSError
        ):  # a guard page of a thread's stack (glibc 2.42), a file that has become shorter
            piece = b""
        yield piece or b"\0"
        place += len(piece) or PAGE


def found_in(pid: int, *needles: bytes) -> list[str]:
    """The regions that hold one of them."""
    size = 0
    found = []
    for name, content in regions(pid):
        size += len(content)
        if any(needle in content for needle in needles):
            found.append(name)
    assert size > 1 << 20, f"only {size} bytes of memory were read"
    return found


if __name__ == "__main__":
    for region in found_in(int(sys.argv[1]), *sys.stdin.buffer.read().split(b"\n")):
        print(region)
