# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole job: from the key to guests that run on their volumes and down again, beside a script for the same."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.bench import opening
from tests.bench.machine import (
    BENCH,
    KEY,
    Daemon,
    Samples,
    cpu_s,
    device,
    expect_mapped,
    quiet,
    seconds,
    sh,
)

KIND = opening.KIND["slow"]
COUNT = 8
NAMES = tuple(f"guest{number}" for number in range(COUNT))
MAPPINGS = tuple(KIND.mapping(number) for number in range(COUNT))
LIMIT_S = 600.0
# The script of somebody who has no daemon, at its best: nothing waits for anything of another guest. A QEMU that has
# ended is seen by its process, because asking libvirt again and again costs an emulated machine more.
OPEN = (
    f"cryptsetup open --type luks --disable-external-tokens --key-file {KEY} {{device}} {{volume}}"
)
UP = f"{OPEN} && virsh -q start {{guest}}"
DOWN = (
    "pid=$(cat /run/libvirt/qemu/{guest}.pid); virsh -q shutdown {guest} >/dev/null && "
    "tail -s 0.1 --pid=$pid -f /dev/null && cryptsetup close {volume}"
)
CLOSE = "cryptsetup close {volume}"


class Started(NamedTuple):
    """When guests ran, in seconds after the key was given."""

    first_s: float
    mean_s: float
    last_s: float


def started(begun: float, events: Sequence[tuple[float, str]]) -> Started:
    """From the times of the events, one for each guest."""
    after = sorted(at - begun for at, _ in events)
    return Started(after[0], sum(after) / len(after), after[-1])


class Events:
    """libvirt's own word of when a guest has started and stopped. Costs nothing while nothing happens."""

    def __init__(self) -> None:
        import libvirt

        self._changed = threading.Condition()
        self._seen: dict[str, list[tuple[float, str]]] = {"started": [], "stopped": []}
        kinds = {
            libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
            libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
        }

        def happened(_connection: Any, domain: Any, event: int, *_more: Any) -> None:
            at = time.perf_counter()
            with self._changed:
                if event in kinds:
                    self._seen[kinds[event]].append((at, domain.name()))
                    self._changed.notify_all()

        def run() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=run, daemon=True).start()
        self._connection = libvirt.open("qemu:///system")
        lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        self._connection.domainEventRegisterAny(None, lifecycle, happened, None)

    @contextlib.contextmanager
    def of_all(self, kind: str) -> Iterator[list[tuple[float, str]]]:
        """Complete at the end: one of each guest."""
        seen = self._seen[kind]
        with self._changed:
            seen.clear()
        yield seen
        with self._changed:
            if not self._changed.wait_for(lambda: {n for _, n in seen} == set(NAMES), LIMIT_S):
                sys.exit(f"not all guests have {kind} within {LIMIT_S:g} s: {seen}")


def all_at_once(command: str) -> str:
    """A script that does this for every guest side by side, and fails if one fails."""
    each = [
        command.format(device=device(number), volume=volume, guest=guest)
        for number, (volume, guest) in enumerate(zip(MAPPINGS, NAMES, strict=True))
    ]
    begin = " ".join(f'({one}) & pids="$pids $!";' for one in each)
    return f"{begin} for pid in $pids; do wait $pid || exit 1; done"


def prepare(domains: Sequence[str]) -> None:
    """Volumes with a guest on each, which libvirt is to start."""
    opening.prepare(KIND, COUNT)
    sh(all_at_once(OPEN))
    for volume in MAPPINGS:
        sh(f"dd if={BENCH}/guest of=/dev/mapper/{volume} conv=fsync status=none")
    sh("udevadm settle")
    sh(all_at_once(CLOSE))
    for name, domain in zip(NAMES, domains, strict=True):
        sh("virsh -q define /dev/stdin", domain)
        sh(f"virsh -q autostart {name}")


def booted(times: int) -> None:
    """Until each guest has counted its start: before that it does not see the power button."""
    for volume in MAPPINGS:
        read = f"dd if=/dev/mapper/{volume} bs=512 skip=1 count=1 iflag=direct status=none"
        sh(f'until [ "$({read} | od -An -tu4 -N4 | tr -d " ")" = {times} ]; do sleep 0.5; done')
    quiet()


def waiting(daemon: Daemon) -> None:
    """Until all volumes wait for the key."""
    daemon.call("Boot")
    get = "busctl get-property org.vmcryptd1 /org/vmcryptd1 org.vmcryptd1.Manager Waiting"
    sh(f"until {get} | grep -q '^as {COUNT} '; do sleep 0.5; done")
    quiet()


class Measured:
    def __init__(self) -> None:
        self.times = 0  # that guests were started
        self.events = Events()
        names = ("up", "first", "mean", "down", "cpu_up", "cpu_down")
        self.out: Samples = {name: [] for name in (*names, *(f"peer_{n}" for n in names[:4]))}

    def up(self, prefix: str, bring_up: str) -> None:
        with self.events.of_all("started") as events:
            begun = time.perf_counter()
            seconds(bring_up)
        found = started(begun, events)
        self.times += 1
        for name, value in zip(("first", "mean", "up"), found, strict=True):
            self.out[f"{prefix}{name}"].append(value)
        expect_mapped(KIND.name, COUNT)
        booted(self.times)

    def down(self, prefix: str, bring_down: str) -> None:
        with self.events.of_all("stopped"):
            self.out[f"{prefix}down"].append(seconds(bring_down))
        expect_mapped(KIND.name, 0)
        quiet()

    def ours(self, daemon: Daemon) -> None:
        waiting(daemon)
        pid = daemon.pid
        before = cpu_s(pid)
        self.up("", daemon.unlocking_all)
        self.out["cpu_up"].append(cpu_s(pid) - before)
        before = cpu_s(pid)
        self.down("", daemon.calling("Shutdown"))
        self.out["cpu_down"].append(cpu_s(pid) - before)

    def script(self) -> None:
        self.up("peer_", all_at_once(UP))
        self.down("peer_", all_at_once(DOWN))


def by_hand() -> None:
    """What the daemon sees, and has no part in."""
    sh(all_at_once(OPEN))
    quiet()
    sh(all_at_once(CLOSE))
    quiet()


def measure(daemon: Daemon, domains: Sequence[str], rounds: int) -> Samples:
    """Rounds of one daemon's life; the script's before and after them, while no daemon watches."""
    prepare(domains)
    measured = Measured()
    for _ in range(rounds // 2):
        measured.script()
    daemon.start()
    daemon.call("Shutdown")  # boot's own request would open the volumes at once
    quiet()
    for number in range(rounds):
        if number:
            by_hand()
        measured.ours(daemon)
    daemon.stop()
    for _ in range(rounds - rounds // 2):
        measured.script()
    for name in NAMES:
        sh(f"virsh -q undefine {name}")
    return measured.out
