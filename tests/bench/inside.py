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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PASSPHRASE = "benchmark-8-volumes"
COUNT = 8
GUESTS = 2

BENCH = Path("/run/bench")
CONFIG = Path("/etc/vmcryptd/vmcryptd.toml")
CALL = "busctl --quiet --timeout=600 call org.vmcryptd1 /org/vmcryptd1 org.vmcryptd1.Manager"
# The four libraries that the daemon stands on.
LIBRARIES = "import dbus_next.aio, libvirt, systemd.daemon, pydantic"
# What a person's passphrase gets (64 MiB, four passes), and what a key of full entropy needs.
SLOW = "argon2id --pbkdf-memory 65536 --pbkdf-parallel 1 --pbkdf-force-iterations 4"
FAST = "pbkdf2 --pbkdf-force-iterations 1000"

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


def children_cpu_s(pid: int) -> float:
    """What the children of a process have used that it has waited for: cutime and cstime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")


# --- the volumes ---


def device(index: int) -> str:
    return f"/dev/disk/by-id/virtio-disk{index}"


def mapped(prefix: str) -> int:
    return sum(
        path.read_text().startswith(prefix) for path in Path("/sys/block").glob("dm-*/dm/name")
    )


def expect_mapped(prefix: str, count: int) -> None:
    if (found := mapped(prefix)) != count:
        sys.exit(f"{found} instead of {count} mappings {prefix}*")


def luks_format(first: int, kdf: str) -> None:
    options = f"--batch-mode --type luks2 --pbkdf {kdf} --key-file {BENCH}/key"
    devices = "\n".join(map(device, range(first, first + COUNT)))
    sh(f"xargs -P 2 -n 1 cryptsetup luksFormat {options}", devices)


def configure(prefix: str, first: int) -> None:
    tables = [
        f'[volume.{prefix}{n}]\ndevice = "{device(first + n)}"\nkeys = ["prompt"]\n'
        for n in range(COUNT)
    ]
    CONFIG.write_text("\n".join(tables))


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

    def unlock_all(self) -> float:
        # busctl passes on what it was itself handed as a socket-activated service is.
        call = f"LISTEN_FDS=1 LISTEN_PID=$$ exec {CALL} UnlockAllWithKey h 3 3<{BENCH}/key"
        return seconds(call)

    def unlock(self, name: str) -> float:
        call = f"LISTEN_FDS=1 LISTEN_PID=$$ exec {CALL} UnlockWithKey sh {name} 3 3<{BENCH}/key"
        return seconds(call)

    def call(self, method: str) -> float:
        return seconds(f"exec {CALL} {method}")


# --- opening and closing ---


def units(prefix: str) -> str:
    return " ".join(f"systemd-cryptsetup@{prefix}{n}.service" for n in range(COUNT))


def write_crypttab(prefix: str, first: int) -> None:
    """The peer's own way at boot, at its best: all units at once, the key from a file in memory.

    With a passphrase each unit asks, or finds the answer of another in the keyring, and goes on
    only then; a key file saves all of that and derives the same keys. `noauto` because it is not
    the boot that is measured.
    """
    lines = [f"{prefix}{n} {device(first + n)} {BENCH}/key luks,noauto\n" for n in range(COUNT)]
    Path("/etc/crypttab").write_text("".join(lines))
    sh("systemctl daemon-reload")


def ours(daemon: Daemon, prefix: str, out: Samples) -> None:
    daemon.start()
    pid = daemon.pid
    before, before_children = cpu_s(pid), children_cpu_s(pid)
    opened_s = daemon.unlock_all()
    after, after_children = cpu_s(pid), children_cpu_s(pid)
    expect_mapped(prefix, COUNT)
    quiet()
    closed_s = daemon.call("LockAll")
    expect_mapped(prefix, 0)
    quiet()
    one_before = cpu_s(pid)
    daemon.unlock(f"{prefix}0")
    one = cpu_s(pid) - one_before
    quiet()
    daemon.call("LockAll")
    daemon.stop()
    out["open"].append(opened_s)
    out["close"].append(closed_s)
    out["cpu"].append((after - before - one) / (COUNT - 1))
    out["child_cpu"].append((after_children - before_children) / COUNT)


def peer(prefix: str, out: Samples) -> None:
    # The daemon is stopped meanwhile: where systemd opens volumes nobody else watches it.
    out["peer_open"].append(seconds(f"exec systemctl start {units(prefix)}"))
    expect_mapped(prefix, COUNT)
    quiet()
    out["peer_close"].append(seconds(f"exec systemctl stop {units(prefix)}"))
    expect_mapped(prefix, 0)
    quiet()


def floor(prefix: str, first: int, out: Samples) -> None:
    """cryptsetup alone, as many side by side as there are cores; closing, all at once.

    Under our names, so that the udev rule holds for it as well.
    """
    opening = "cryptsetup open --type luks --disable-external-tokens --key-file"
    pairs = "".join(f"{device(first + n)} {prefix}{n}\\n" for n in range(COUNT))
    cores = os.cpu_count()
    script = f"printf '{pairs}' | xargs -P {cores} -n 2 {opening} {BENCH}/key"
    out["floor_open"].append(seconds(script))
    expect_mapped(prefix, COUNT)
    quiet()
    names = " ".join(f"{prefix}{n}" for n in range(COUNT))
    out["floor_close"].append(
        seconds(f"printf '%s\\n' {names} | xargs -P {COUNT} -n 1 cryptsetup close")
    )
    expect_mapped(prefix, 0)
    quiet()


def volumes(daemon: Daemon, prefix: str, first: int, rounds: int) -> Samples:
    out: Samples = {
        f"{who}{what}": [] for who in ("", "peer_", "floor_") for what in ("open", "close")
    }
    out |= {"cpu": [], "child_cpu": []}
    peers = f"{prefix}peer"
    configure(prefix, first)
    write_crypttab(peers, first)
    daemon.start()
    daemon.stop()
    sides: list[Callable[[], None]] = [
        lambda: ours(daemon, prefix, out),
        lambda: peer(peers, out),
        lambda: floor(prefix, first, out),
    ]
    for number in range(rounds):
        for side in sides[number % 3 :] + sides[: number % 3]:
            side()
    return out


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


def panic(daemon: Daemon, prefix: str, first: int, guests: list[str], rounds: int) -> Samples:
    out: Samples = {"panic": [], "polite": []}
    configure(prefix, first)
    daemon.start()
    for _ in range(rounds):
        for name, method in (("panic", "Panic"), ("polite", "Shutdown")):
            with all_up(daemon, guests):
                out[name].append(daemon.call(method))
                expect_mapped(prefix, 0)
    daemon.stop()
    return out


def put_guests(prefix: str, first: int, domains: list[str]) -> None:
    for n, domain in enumerate(domains):
        open_it = f"cryptsetup open --key-file {BENCH}/key {device(first + n)} {prefix}{n}"
        copy = f"dd if={BENCH}/guest of=/dev/mapper/{prefix}{n} conv=fsync status=none"
        sh(f"{open_it} && {copy}; udevadm settle; cryptsetup close {prefix}{n}")
        sh("virsh -q define /dev/stdin", domain)


# --- all of it ---


def prepare(domains: list[str]) -> None:
    done = BENCH / "prepared"
    if done.exists():  # measuring once more in the same machine
        return
    key = BENCH / "key"
    key.write_text(PASSPHRASE)
    key.chmod(0o400)
    luks_format(0, SLOW)
    luks_format(COUNT, FAST)
    put_guests("fast", COUNT, domains)
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

    prepare(work["domains"])
    daemon = Daemon()
    raw: dict[str, Samples] = {}
    parts: dict[str, Callable[[], Samples]] = {
        "slow": lambda: volumes(daemon, "slow", 0, rounds),
        "fast": lambda: volumes(daemon, "fast", COUNT, rounds),
        "start": lambda: starting(daemon, 2 * rounds),
        "panic": lambda: panic(daemon, "fast", COUNT, work["guests"], max(rounds // 2, 1)),
    }
    for name, part in parts.items():
        if not wanted or name in wanted:
            begun = time.monotonic()
            raw[name] = part()
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
            for what, samples in raw[name].items():
                shown = " ".join(f"{value:.3f}" for value in samples)
                print(
                    f"  {what:12} {statistics.median(samples):.3f}   {shown}",
                    file=sys.stderr,
                    flush=True,
                )
    print(json.dumps({"versions": versions(), "raw": raw}))


if __name__ == "__main__":
    main()
