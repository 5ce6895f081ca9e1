# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures vmcryptd against what else does the same, in one virtual machine, as ratios.

Prints a table in Markdown and writes every single number to build/bench.json. The machine is made
of the package as installed; planning is measured in this process.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import planning
from tests.vm import guest
from tests.vm.conftest import current_package
from tests.vm.host import PROJECT, Host, Image, accelerator, build_image

RESULT = PROJECT / "build/bench.json"
INSIDE = Path(__file__).with_name("inside.py")
GUESTS = ("one", "two")
VOLUMES = 8
LIMIT_S = 1800.0

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One line of the table: two figures in seconds, and what their ratio is to be."""

    what: str
    against: str
    ours_s: float
    theirs_s: float
    goal: str = ""
    goal_ratio: float | None = None
    goal_s: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours_s / self.theirs_s

    @property
    def is_met(self) -> bool:
        return (self.goal_ratio is None or self.ratio <= self.goal_ratio) and (
            self.goal_s is None or self.ours_s < self.goal_s
        )


def rows(inside: dict[str, Samples], plans: dict[int, list[float]]) -> list[Row]:
    # The ratio is that of the medians: rounds that something disturbed count as little as can be.
    middle = {
        part: {name: median(samples) for name, samples in named.items() if samples}
        for part, named in inside.items()
    }
    found = []
    for part, kind in (
        ("slow", "one passphrase, Argon2id"),
        ("fast", "one full-entropy key, PBKDF2"),
    ):
        m = middle.get(part)
        if m is None:
            continue
        # The contract's goals are for the passphrase; the key shows what is ours without it.
        slow = part == "slow"
        opening, closing = f"opening 8 volumes, {kind}", "closing 8 volumes"
        cpu = "the daemon's own CPU for one more volume"
        found.append(
            Row(opening, "systemd-cryptsetup", m["open"], m["peer_open"], *_at_most(0.85, slow))
        )
        found.append(Row(opening, "cryptsetup alone, side by side", m["open"], m["floor_open"]))
        if slow:
            found.append(
                Row(closing, "`systemctl stop`", m["close"], m["peer_close"], *_at_most(0.40))
            )
            found.append(Row(closing, "cryptsetup alone, at once", m["close"], m["floor_close"]))
        child = f"the cryptsetup child's own, {kind}"
        found.append(Row(cpu, child, m["cpu"], m["child_cpu"], *_at_most(0.10, slow)))
    if m := middle.get("start"):
        libraries, library = "Python importing its four libraries", "Python importing dbus_next.aio"
        found.append(
            Row("daemon, exec to READY", libraries, m["ready"], m["libraries"], *_at_most(1.3))
        )
        found.append(
            Row("`vmcryptctl status`", library, m["status"], m["dbus_next"], *_at_most(1.3))
        )
    large, small = median(plans[10_000]), median(plans[1_000])
    found.append(
        Row("planning 10 000 volumes and guests", "1 000", large, small, "≤ 12, < 2 s", 12, 2)
    )
    if m := middle.get("panic"):
        what = "panic with 8 open volumes and 2 guests"
        found.append(Row(what, "closing politely", m["panic"], m["polite"], *_at_most(1.0)))
    return found


def _at_most(ratio: float, is_goal: bool = True) -> tuple[str, float | None]:
    return (f"≤ {ratio:.2f}", ratio) if is_goal else ("", None)


def table(found: Sequence[Row]) -> str:
    lines = ["| what | vmcryptd | against | | ratio | goal |", "|---|--:|---|--:|--:|---|"]
    for row in found:
        goal = f"{row.goal}{'' if row.is_met else ' **missed**'}" if row.goal else "–"
        cells = (
            row.what, f"{row.ours_s:.2f} s", row.against, f"{row.theirs_s:.2f} s",
            f"{row.ratio:.2f}", goal,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_inside(image: Image, rounds: int, only: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vmcryptd-bench-") as name:
        host = Host(image, Path(name), disks=["40M"] * (2 * VOLUMES))
        with host.boot() as vm:
            domains = [
                guest.domain_xml(domain, f"/dev/mapper/fast{number}")
                for number, domain in enumerate(GUESTS)
            ]
            vm.put("/run/bench/guest", guest.disk_image())
            vm.put("/run/bench/work.json", json.dumps({"guests": GUESTS, "domains": domains}))
            vm.put("/run/bench/inside.py", INSIDE.read_text())
            done = vm.run(
                ["python3", "/run/bench/inside.py", "--rounds", f"{rounds}", "--only", only],
                timeout_s=LIMIT_S,
            )
            print(done.err, file=sys.stderr)
            measured: dict[str, Any] = json.loads(done.out)
            vm.poweroff()
            return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--only", default="", help="some of slow,fast,start,panic")
    options = parser.parse_args()
    begun = time.monotonic()
    image = build_image(current_package())
    load_before = os.getloadavg()
    plans = planning.measure(options.rounds)
    measured = measure_inside(image, options.rounds, options.only)
    found = rows(measured["raw"], plans)
    report = {
        "machine": {
            "accel": accelerator(image),
            "cpus": Host.cpus,
            "memory_mib": Host.memory_mib,
            "kernel": platform.release(),
            "python": platform.python_version(),
            "load_before": load_before,
            "load_after": os.getloadavg(),
        },
        "guest": measured["versions"],
        "rows": [{**asdict(row), "ratio": row.ratio, "met": row.is_met} for row in found],
        "raw": {**measured["raw"], "plan": plans},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(table(found))
    taken_s = time.monotonic() - begun
    busy = max(os.getloadavg()[0], load_before[0])
    print(
        f"\n{report['machine']['accel']}, {Host.cpus} CPUs, {options.rounds} rounds, {taken_s:.0f} s"
    )
    if busy > 2 * (os.cpu_count() or 1):
        print(
            f"The machine was busy with other things (load {busy:.1f}): measure again when it is not."
        )


if __name__ == "__main__":
    main()
