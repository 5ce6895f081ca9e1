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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench import planning
from tests.bench.rows import growth, growth_table, medians, rows, table
from tests.vm import guest
from tests.vm.conftest import current_package
from tests.vm.host import PROJECT, Host, Image, accelerator, build_image
from tests.vm.tpm import Tpm

RESULT = PROJECT / "build/bench.json"
# What runs in the machine, as the same package.
INSIDE = (
    *(f"bench/{name}.py" for name in ("__init__", "inside", "machine", "opening", "refusing")),
    *(f"vm/{name}.py" for name in ("__init__", "caller")),
)
GUESTS = ("one", "two")
# A machine without KVM takes minutes for a round.
ROUNDS = {"kvm": 5, "tcg": 2}
LIMIT_S = 3600.0


def measure_inside(image: Image, rounds: int, only: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vmcryptd-bench-") as name:
        tpm = Tpm(image, Path(name))
        host = Host(image, Path(name), disks=["2G"], extra_qemu=tpm.qemu)
        tpm.plug_in()
        with host.boot() as vm:
            domains = [
                guest.domain_xml(domain, f"/dev/mapper/fast{number}")
                for number, domain in enumerate(GUESTS)
            ]
            vm.put("/run/bench/guest", guest.disk_image())
            vm.put("/run/bench/work.json", json.dumps({"guests": GUESTS, "domains": domains}))
            for file in INSIDE:
                vm.put(f"/run/bench/tests/{file}", (PROJECT / "tests" / file).read_text())
            command = f"python3 -m tests.bench.inside --rounds {rounds} --only '{only}'"
            done = vm.run(f"cd /run/bench && exec {command}", timeout_s=LIMIT_S)
            print(done.err, file=sys.stderr)
            measured: dict[str, Any] = json.loads(done.out)
            vm.poweroff()
            return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, help="how often each is measured; fewer if it is long"
    )
    parser.add_argument(
        "--only", default="", help="some of slow,kept,tpm,fast,start,panic, or slow8, kept32 …"
    )
    options = parser.parse_args()
    begun = time.monotonic()
    image = build_image(current_package())
    rounds = options.rounds or ROUNDS[accelerator(image)]
    load_before = os.getloadavg()
    plans = planning.measure(rounds)
    measured = measure_inside(image, rounds, options.only)
    middle = medians(measured["raw"])
    found, grown = rows(middle, plans), growth(middle)
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
        "growth": grown,
        "raw": {**measured["raw"], "plan": plans},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(table(found))
    print(f"\n{growth_table(grown)}")
    taken_s = time.monotonic() - begun
    busy = max(os.getloadavg()[0], load_before[0])
    print(f"\n{report['machine']['accel']}, {Host.cpus} CPUs, {rounds} rounds, {taken_s:.0f} s")
    if busy > 2 * (os.cpu_count() or 1):
        print(
            f"The machine was busy with other things (load {busy:.1f}): measure again when it is not."
        )


if __name__ == "__main__":
    main()
