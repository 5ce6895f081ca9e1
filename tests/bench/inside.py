# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures inside the virtual machine, whose own Python runs this; prints the raw numbers as JSON.

Each figure is taken in rounds, ours and the other one in turn, so that whatever else slows the
machine down slows both. Nothing here waits for the control channel while a clock runs.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from tests.bench import opening
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
COUNTS = {"slow": (1, 8, 32), "kept": (1, 8, 32), "tpm": (8,), "fast": (1, 8, 64)}
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
    opening.configure(opening.KIND["fast"], FEW)
    daemon.start()
    command = f"cd {BENCH} && exec runuser -u nobody -- python3 -m tests.bench.refusing {rounds}"
    out: Samples = json.loads(sh(command))
    daemon.stop()
    return out


# --- panic ---


@contextlib.contextmanager
def all_up(daemon: Daemon, guests: list[str]) -> Iterator[None]:
    daemon.unlock_all()
    for name in guests:
        daemon.call(f"StartGuest s {name}")
    quiet()
    time.sleep(1)
    yield
    quiet()


def panic(daemon: Daemon, guests: list[str], rounds: int) -> Samples:
    out: Samples = {"panic": [], "polite": []}
    kind = opening.KIND["fast"]
    opening.prepare(kind, FEW)
    put_guests(kind, len(guests))
    daemon.start()
    for _ in range(rounds):
        for name, method in (("panic", "Panic"), ("polite", "Shutdown")):
            with all_up(daemon, guests):
                out[name].append(daemon.call(method))
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


def prepare(domains: list[str]) -> None:
    done = BENCH / "prepared"
    if done.exists():  # measuring once more in the same machine
        return
    make_devices(DISK, LARGEST)
    opening.make_headers(LARGEST)
    for domain in domains:
        sh("virsh -q define /dev/stdin", domain)
    done.touch()


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    rounds: int = options.rounds
    work = json.loads((BENCH / "work.json").read_text())
    wanted = set(options.only.split(",")) - {""}

    begun = time.monotonic()
    prepare(work["domains"])
    print(f"prepared: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    daemon = Daemon()
    raw: dict[str, Samples] = {}
    parts: dict[str, Callable[[], Samples]] = {
        f"{kind.name}{count}": functools.partial(
            opening.measure, daemon, kind, count, max(1, min(rounds, rounds * FEW // count))
        )
        for kind in opening.KINDS
        for count in COUNTS[kind.name]
    }
    parts["start"] = lambda: starting(daemon, 2 * rounds)
    parts["refusing"] = lambda: refusing(daemon, 2 * rounds)
    parts["panic"] = lambda: panic(daemon, work["guests"], max(rounds // 2, 1))
    for name, part in parts.items():
        if not wanted or wanted & {name, name.rstrip("0123456789")}:
            begun = time.monotonic()
            raw[name] = part()
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
            for what, samples in raw[name].items():
                if samples:
                    shown = " ".join(f"{value:.3f}" for value in samples)
                    print(
                        f"  {what:12} {statistics.median(samples):.3f}   {shown}",
                        file=sys.stderr,
                        flush=True,
                    )
    print(json.dumps({"versions": versions(), "raw": raw}))


if __name__ == "__main__":
    main()
