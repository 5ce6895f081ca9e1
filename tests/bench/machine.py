# SPDX-License-Identifier: LGPL-2.1-or-later
"""The virtual machine from inside: its clock, its processes, its installed service, its logical volumes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

BENCH = Path("/run/bench")
# The passphrase of every volume; what a person would type.
KEY = BENCH / "key"
CONFIG = Path("/etc/vmcryptd/vmcryptd.toml")
KIB_PER_MIB = 1024
CALL = "busctl --quiet --timeout=600 call org.vmcryptd1 /org/vmcryptd1 org.vmcryptd1.Manager"

Samples = dict[str, list[float]]


def sh(script: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["bash", "-c", script], input=stdin, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{script}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def seconds(script: str) -> float:
    """How long a command takes; both sides are started by the same short way."""
    begun = time.perf_counter()
    done = subprocess.run(
        ["sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"{script}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return taken


def quiet() -> None:
    """Until what was started has come to rest: for half a second nearly nothing runs."""

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, idle and waiting

    sh("udevadm settle")
    for _ in range(40):
        before = ticks()
        time.sleep(0.5)
        total, idle = (now - then for now, then in zip(ticks(), before, strict=True))
        if idle > 0.9 * total:
            break


def cpu_s(pid: int) -> float:
    """What all threads of a process have used; its children are not in it.

    utime and stime of proc_pid_stat(5), but to the nanosecond: clock_getcpuclockid(3), which Python
    lacks, is this arithmetic.
    """
    return time.clock_gettime((~pid << 3) | 2)


def available_mib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    [available] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(available) // KIB_PER_MIB


def children_cpu_s(pid: int) -> float:
    """What the children of a process have used that it has waited for: cutime and cstime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")


class Daemon:
    """The installed service, with what is measured of it."""

    def start(self) -> None:
        sh("systemctl reset-failed vmcryptd; systemctl restart vmcryptd")
        # It has found libvirt when it knows a guest.
        sh("until busctl --auto-start=no tree org.vmcryptd1 | grep -q /guest/; do sleep 0.2; done")
        quiet()

    def stop(self) -> None:
        sh("systemctl stop vmcryptd")
        quiet()

    @property
    def pid(self) -> int:
        return int(sh("systemctl show --value -p MainPID vmcryptd"))

    # busctl passes on what it was itself handed as a socket-activated service is.
    unlocking_all = f"LISTEN_FDS=1 LISTEN_PID=$$ exec {CALL} UnlockAllWithKey h 3 3<{KEY}"

    def unlock_all(self) -> float:
        return seconds(self.unlocking_all)

    def unlock(self, name: str) -> float:
        call = f"LISTEN_FDS=1 LISTEN_PID=$$ exec {CALL} UnlockWithKey sh {name} 3 3<{KEY}"
        return seconds(call)

    def calling(self, method: str) -> str:
        return f"exec {CALL} {method}"

    def call(self, method: str) -> float:
        return seconds(self.calling(method))


# --- logical volumes ---

GROUP = "bench"
KEYSTORE = f"/dev/{GROUP}/keystore"


def device(index: int) -> str:
    return f"/dev/{GROUP}/v{index}"


def make_devices(disk: str, count: int) -> None:
    """They become active by `activate`, as many as are measured: a host has no others."""
    sh(f"vgcreate -q {GROUP} {disk}")
    make = f"lvcreate -qq --yes --activate n --zero n --wipesignatures n {GROUP}"
    sh(f"for n in $(seq 0 {count - 1}); do {make} --size 20M --name v$n; done")
    sh(f"{make} --size 32M --name keystore")


def activate(devices: Iterable[str]) -> None:
    sh(f"vgchange -qq --activate n {GROUP} && lvchange -qq --activate y {' '.join(devices)}")
    sh("udevadm settle")


def mapped(prefix: str) -> int:
    return sum(
        path.read_text().startswith(prefix) for path in Path("/sys/block").glob("dm-*/dm/name")
    )


def expect_mapped(prefix: str, count: int) -> None:
    if (found := mapped(prefix)) != count:
        sys.exit(f"{found} instead of {count} mappings {prefix}*")
