# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long building the graph and planning takes, in process and in CPU seconds."""

import gc
import time
from statistics import median

from vmcryptd.core import graph, planner
from vmcryptd.core.goals import BOOT
from vmcryptd.core.model import (
    BlockDevice,
    DiskSource,
    Domain,
    GuestState,
    Observation,
    Settings,
    SourceType,
    Storage,
    Virtualisation,
    VolumeSpec,
)

# Of ten volumes, one holds the volume group that the other nine are on: a host with two layers.
GROUP = 10


def host(count: int) -> tuple[Settings, Observation]:
    """A locked host with so many volumes and so many guests, as it is before boot brings it up."""
    volumes: dict[str, VolumeSpec] = {}
    devices: dict[str, BlockDevice] = {}
    links: dict[str, str] = {}
    domains: dict[str, Domain] = {}
    for number in range(count):
        name, outer = f"cr_{number}", number - number % GROUP
        if number == outer:
            path = f"/dev/disk/by-id/virtio-disk{number}"
            devices[f"vd{number}"] = BlockDevice(f"vd{number}", f"252:{number}")
            links[path] = f"vd{number}"
        else:
            path = f"/dev/vg{outer}/lv{number}"
        vg = f"vg{outer}" if number == outer else None
        volumes[name] = VolumeSpec(name, path, vg=vg)
        disk = DiskSource(SourceType.BLOCK, f"/dev/mapper/{name}")
        guest = f"guest{number}"
        domains[guest] = Domain(guest, guest, GuestState.OFF, autostart=True, sources=(disk,))
    observation = Observation(
        storage=Storage(devices=devices, links=links),
        virtualisation=Virtualisation(reachable=True, domains=domains),
    )
    return Settings(volumes=volumes), observation


def plan_s(count: int) -> float:
    """CPU seconds from what was observed to the ordered steps of boot."""
    settings, observation = host(count)
    gc.collect()
    gc.freeze()  # as the daemon does when it has started
    begun = time.process_time()
    plan = planner.plan(graph.build(settings, observation), BOOT)
    taken = time.process_time() - begun
    gc.unfreeze()
    if len(plan.steps) != 2 * count:
        raise AssertionError(f"{len(plan.steps)} steps for {count} volumes and guests")
    return taken


def measure(rounds: int) -> dict[int, list[float]]:
    samples: dict[int, list[float]] = {1_000: [], 10_000: []}
    plan_s(100)  # what is only done once
    for _ in range(rounds):
        for count, taken in samples.items():
            taken.append(plan_s(count))
    return samples


if __name__ == "__main__":
    for count, taken in measure(5).items():
        print(f"{count}: {median(taken):.3f} s")
