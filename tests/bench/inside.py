# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures inside the virtual machine, whose own Python runs this; prints the raw numbers as JSON.

Each figure is taken in rounds, ours and the other one in turn, so that whatever else slows the
machine down slows both. Nothing here waits for the control channel while a clock runs.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.bench import guests, opening
from tests.bench.machine import (
    BENCH,
    KEY,
    Daemon,
    Samples,
    device,
    expect_mapped,
    make_devices,
    quiet,
    seconds,
    sh,
)

DISK = "/dev/disk/by-id/virtio-disk0"
# How many volumes of each kind are opened at once.
COUNTS = {"slow": (1, 8, 32), "lanes": (8,), "kept": (1, 8, 32), "tpm": (8,), "fast": (1, 8, 64)}
LARGEST = max(max(counts) for counts in COUNTS.values())
FEW = 8  # what more than so many cost is measured in fewer rounds
# The libraries that the daemon depends on.
LIBRARIES = "import dbus_next.aio, libvirt, libvirtaio, pydantic"


# --- starting ---


def exec_to_ready() -> float:
    """From the daemon's exec to READY=1, heard where systemd hears it."""
    path = BENCH / "notify"
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.bind(str(path))
        listener.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": str(path)}
        begun = time.perf_counter()
        with subprocess.Popen(
            ["/usr/sbin/vmcryptd"], env=environment, stderr=subprocess.DEVNULL
        ) as process:
            while b"READY=1" not in listener.recv(4096):
                pass
            taken = time.perf_counter() - begun
            time.sleep(1.5)  # libvirt is asked after that
            process.send_signal(signal.SIGTERM)
    path.unlink()
    return taken


def python(statement: str) -> float:
    return seconds(f"exec python3 -c {shlex.quote(statement)}")


def starting(daemon: Daemon, rounds: int) -> Samples:
    out: Samples = {name: [] for name in ("ready", "libraries", "status", "dbus_next")}
    opening.configure(opening.KIND["fast"], FEW)
    daemon.start()
    daemon.stop()
    for _ in range(rounds):
        out["ready"].append(exec_to_ready())
        quiet()
        out["libraries"].append(python(LIBRARIES))
    daemon.start()
    for _ in range(rounds):
        out["status"].append(seconds("exec vmcryptctl status"))
        out["dbus_next"].append(python("import dbus_next.aio"))
    daemon.stop()
    return out


# --- calls that are refused ---


def refusing(daemon: Daemon, rounds: int) -> Samples:
    return called(daemon, f"runuser -u nobody -- python3 -m tests.bench.refusing {rounds}")


def flooding(daemon: Daemon, rounds: int) -> Samples:
    return called(daemon, f"python3 -m tests.bench.flooding {rounds}")


def called(daemon: Daemon, command: str) -> Samples:
    """Measures clients while the daemon has nothing else to do."""
    opening.configure(opening.KIND["fast"], FEW)
    daemon.start()
    out: Samples = json.loads(sh(f"cd {BENCH} && exec {command}"))
    daemon.stop()
    return out


# --- panic ---


@contextlib.contextmanager
def all_up(daemon: Daemon, names: list[str]) -> Iterator[None]:
    daemon.unlock_all()
    for name in names:
        daemon.call(f"StartGuest s {name}")
    quiet()
    time.sleep(1)
    yield
    quiet()


def panic(daemon: Daemon, names: list[str], rounds: int) -> Samples:
    out: Samples = {"panic": [], "polite": []}
    kind = opening.KIND["fast"]
    opening.prepare(kind, FEW)
    put_guests(kind, len(names))
    daemon.start()
    for _ in range(rounds):
        for what, method in (("panic", "Panic"), ("polite", "Shutdown")):
            with all_up(daemon, names):
                out[what].append(daemon.call(method))
                expect_mapped(kind.name, 0)
    daemon.stop()
    return out


def put_guests(kind: opening.Kind, count: int) -> None:
    for n in range(count):
        name = kind.mapping(n)
        open_it = f"cryptsetup open --key-file {KEY} {device(n)} {name}"
        copy = f"dd if={BENCH}/guest of=/dev/mapper/{name} conv=fsync status=none"
        sh(f"{open_it} && {copy}; udevadm settle; cryptsetup close {name}")


# --- all of it ---


Part = Callable[[Daemon, dict[str, Any], int], Samples]


def _opening(kind: opening.Kind, count: int) -> Part:
    def part(daemon: Daemon, _work: dict[str, Any], rounds: int) -> Samples:
        fewer = max(1, min(rounds, rounds * FEW // count))
        return opening.measure(daemon, kind, count, fewer)

    return part


PARTS: dict[str, Part] = {
    **{
        f"{kind.name}{count}": _opening(kind, count)
        for kind in opening.KINDS
        for count in COUNTS[kind.name]
    },
    "guests": lambda daemon, work, rounds: guests.measure(daemon, work["guests"], rounds + 1),
    "start": lambda daemon, _, rounds: starting(daemon, 2 * rounds),
    "refusing": lambda daemon, _, rounds: refusing(daemon, 2 * rounds),
    "flood": lambda daemon, _, rounds: flooding(daemon, rounds),
    "panic": lambda daemon, work, rounds: panic(daemon, list(work["panic"]), max(rounds // 2, 1)),
}


def prepare(work: dict[str, Any]) -> None:
    make_devices(DISK, LARGEST)
    opening.make_headers(LARGEST)
    for domain in work["panic"].values():
        sh("virsh -q define /dev/stdin", domain)


def versions() -> dict[str, str]:
    return {
        "vmcryptd": sh("dpkg-query -W -f '${Version}' vmcryptd"),
        "cryptsetup": sh("cryptsetup --version"),
        "systemd": sh("systemctl --version | head -n 1"),
        "libvirt": sh("virsh --version"),
        "dbus-next": sh("dpkg-query -W -f '${Version}' python3-dbus-next"),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def main() -> None:
    """One part, after `prepare`: so what is known is known when a later one fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["prepare", *PARTS])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    work = json.loads((BENCH / "work.json").read_text())
    if options.part == "prepare":
        prepare(work)
        print(json.dumps(versions()))
    else:
        print(json.dumps(PARTS[options.part](Daemon(), work, options.rounds)))


if __name__ == "__main__":
    main()
