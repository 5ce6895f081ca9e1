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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import guests, inside, planning
from tests.bench.rows import Samples, growth, growth_table, medians, rounds_table, rows, table
from tests.vm import guest
from tests.vm.conftest import current_package
from tests.vm.host import PROJECT, Host, Image, accelerator, build_image
from tests.vm.tpm import Tpm

RESULT = PROJECT / "build/bench.json"
# What runs in the machine, as the same package.
INSIDE = (
    *(
        f"bench/{name}.py"
        for name in ("__init__", "inside", "machine", "opening", "guests", "flooding", "refusing")
    ),
    *(f"vm/{name}.py" for name in ("__init__", "caller")),
    "bus/flooder.py",
)
# For panic, beside those that the whole job starts.
FEW_GUESTS = ("one", "two")
# A machine without KVM takes minutes for a round.
ROUNDS = {"kvm": 5, "tcg": 2}
LIMIT_S = 1800.0  # of one part


def work() -> str:
    few = {
        name: guest.domain_xml(name, f"/dev/mapper/fast{number}")
        for number, name in enumerate(FEW_GUESTS)
    }
    many = [
        guest.domain_xml(name, f"/dev/mapper/{volume}")
        for name, volume in zip(guests.NAMES, guests.MAPPINGS, strict=True)
    ]
    return json.dumps({"panic": few, "guests": many})


def measure_inside(
    image: Image, rounds: int, parts: Sequence[str], report: Callable[[str, Any], None]
) -> None:
    with tempfile.TemporaryDirectory(prefix="vmcryptd-bench-") as name:
        tpm = Tpm(image, Path(name))
        host = Host(image, Path(name), disks=["2G"], extra_qemu=tpm.qemu)
        tpm.plug_in()
        with host.boot() as vm:
            vm.put("/run/bench/guest", guest.disk_image())
            vm.put("/run/bench/work.json", work())
            for file in INSIDE:
                vm.put(f"/run/bench/tests/{file}", (PROJECT / "tests" / file).read_text())
            for part in ("prepare", *parts):
                begun = time.monotonic()
                command = f"python3 -m tests.bench.inside {part} --rounds {rounds}"
                done = vm.run(f"cd /run/bench && exec {command}", timeout_s=LIMIT_S)
                print(f"{part}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
                report(part, json.loads(done.out))
            vm.poweroff()


def show(samples: Samples) -> None:
    for what, values in samples.items():
        if values:
            shown = " ".join(f"{value:.3f}" for value in values)
            print(f"  {what:12} {median(values):.3f}   {shown}", file=sys.stderr, flush=True)


def chosen(only: str) -> list[str]:
    wanted = set(only.split(",")) - {""}
    return [
        part for part in inside.PARTS if not wanted or wanted & {part, part.rstrip("0123456789")}
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, help="how often each is measured; fewer if it is long"
    )
    kinds = ",".join(dict.fromkeys(part.rstrip("0123456789") for part in inside.PARTS))
    parser.add_argument("--only", default="", help=f"some of {kinds}, or slow8, kept32 …")
    options = parser.parse_args()
    begun = time.monotonic()
    image = build_image(current_package())
    rounds = options.rounds or ROUNDS[accelerator(image)]
    load_before = os.getloadavg()
    plans = planning.measure(rounds)
    raw: dict[str, Samples] = {}
    versions: dict[str, str] = {}

    def report(part: str, measured: Any) -> None:
        """Written anew after each part: a later one may fail."""
        if part == "prepare":
            versions.update(measured)
            return
        raw[part] = measured
        show(measured)
        found = rows(medians(raw), plans)
        written = {
            "machine": {
                "accel": accelerator(image),
                "cpus": Host.cpus,
                "memory_mib": Host.memory_mib,
                "kernel": platform.release(),
                "python": platform.python_version(),
                "load_before": load_before,
                "load_after": os.getloadavg(),
            },
            "guest": versions,
            "rows": [{**asdict(row), "ratio": row.ratio, "met": row.is_met} for row in found],
            "growth": growth(medians(raw)),
            "raw": {**raw, "plan": plans},
        }
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(written, indent=1) + "\n")

    measure_inside(image, rounds, chosen(options.only), report)
    print(table(rows(medians(raw), plans)))
    for more in (growth_table(growth(medians(raw))), rounds_table(raw)):
        if more:
            print(f"\n{more}")
    taken_s = time.monotonic() - begun
    busy = max(os.getloadavg()[0], load_before[0])
    print(f"\n{accelerator(image)}, {Host.cpus} CPUs, {rounds} rounds, {taken_s:.0f} s")
    if busy > 2 * (os.cpu_count() or 1):
        print(
            f"The machine was busy with other things (load {busy:.1f}): measure again when it is not."
        )


if __name__ == "__main__":
    main()
