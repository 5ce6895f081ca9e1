# SPDX-License-Identifier: LGPL-2.1-or-later
"""What to do, in which order, and why: a graph and a goal in, a plan out. Pure, and does nothing.

A plan holds only what is not so yet, so that planning again after a plan ran gives an empty one.
"""

from __future__ import annotations

import difflib
import graphlib
from collections.abc import Iterable

from vmcryptd.errors import BusyError, GoalError, NoSuchGuestError, NoSuchVolumeError
from vmcryptd.graph import Graph
from vmcryptd.model import Action, Content, Lock, Plan, Step, Unlock

GOALS = ("boot", "shutdown", "lock-all", "unlock:NAME", "lock:NAME", "start:NAME", "stop:NAME")


def plan(graph: Graph, goal: str) -> Plan:
    """The steps that reach the goal. Raises GoalError, NoSuchVolumeError, NoSuchGuestError, BusyError."""
    verb, _, name = goal.partition(":")
    steps = _Steps(graph)
    match verb:
        case "boot" if not name:
            _boot(graph, steps)
        case "shutdown" if not name:
            _shutdown(graph, steps)
        case "lock-all" if not name:
            _lock(graph, steps, [volume for volume, node in graph.volumes.items() if node.is_open])
        case "unlock":
            check_volume(graph, name)
            steps.up(name, "asked for")
        case "lock":
            check_volume(graph, name)
            _lock(graph, steps, [name])
        case "start":
            check_guest(graph, name)
            steps.start(name, "asked for")
        case "stop":
            check_guest(graph, name)
            _stop(graph, steps, name)
        case _:
            raise GoalError(f'"{goal}" is no goal; expected one of {", ".join(GOALS)}')
    return Plan(goal, steps.sorted())


def boot_set(graph: Graph) -> tuple[list[str], list[str]]:
    """The volumes and the guests that boot brings up. A keystore (lock = "boot") is a means, not an end."""
    guests = [
        name
        for name, node in graph.guests.items()
        if node.is_ours and node.starts_at_boot and _may_start(graph, name)
    ]
    roots = [
        name
        for name, node in graph.volumes.items()
        if node.spec.unlock is Unlock.BOOT and node.spec.lock is not Lock.BOOT
    ]
    roots += [need for name in guests for need in graph.guests[name].needs]
    volumes = [
        name for name in graph.beneath(roots) if graph.volumes[name].spec.lock is not Lock.BOOT
    ]
    return volumes, guests


def idle_volumes(graph: Graph, guest: str) -> list[str]:
    """The open volumes to be closed now that the guest has stopped (lock = "guest")."""
    return [
        need
        for need in graph.guests[guest].needs
        if graph.volumes[need].spec.lock is Lock.GUEST
        and graph.volumes[need].is_open
        and not graph.users(need)
    ]


def check_volume(graph: Graph, name: str) -> None:
    if name not in graph.volumes:
        raise NoSuchVolumeError(f'there is no volume "{name}"{_nearest(name, graph.volumes)}')


def check_guest(graph: Graph, name: str) -> None:
    if name in graph.guests:
        return
    if not graph.libvirt_reachable:
        raise NoSuchGuestError(
            f'no guest "{name}" is known; libvirt cannot be reached, so it may be there all the same'
        )
    raise NoSuchGuestError(f'there is no guest "{name}"{_nearest(name, graph.guests)}')


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f'; did you mean "{close[0]}"?'
    return "" if names else "; none is configured"


def _may_start(graph: Graph, guest: str) -> bool:
    """A guest on a volume that is opened only when told to does not start by itself, unless it is open."""
    return all(
        graph.volumes[need].is_open or graph.volumes[need].spec.unlock is not Unlock.MANUAL
        for need in graph.guests[guest].needs
    )


class _Steps:
    """Collects the steps of one plan, each once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._steps: dict[str, Step] = {}
        self._tops: dict[str, tuple[str, ...]] = {}  # volume → the steps that complete its way up

    def __contains__(self, step_id: str) -> bool:
        return step_id in self._steps

    def add(
        self,
        action: Action,
        name: str,
        reason: str,
        after: Iterable[str] = (),
        order: Iterable[str] = (),
    ) -> str:
        step = Step(action, name, tuple(dict.fromkeys(after)), tuple(dict.fromkeys(order)), reason)
        return self._steps.setdefault(step.id, step).id

    def sorted(self) -> tuple[Step, ...]:
        """In an order in which they could be taken one by one; what a step names but the plan does not hold is done."""
        known = self._steps
        for step_id, step in known.items():
            after = tuple(other for other in step.after if other in known)
            order = tuple(other for other in step.order if other in known and other not in after)
            if (after, order) != (step.after, step.order):
                known[step_id] = Step(step.action, step.object, after, order, step.reason)
        sorter = graphlib.TopologicalSorter(
            {step_id: (*step.after, *step.order) for step_id, step in known.items()}
        )
        return tuple(known[step_id] for step_id in sorter.static_order())

    def up(self, volume: str, reason: str) -> tuple[str, ...]:
        """Open a volume, all it needs, and what the host brings up on it. Returns the steps to wait for."""
        reasons = {volume: reason}
        chain = self._graph.beneath([volume])
        for name in reversed(chain):
            for lower in self._graph.volumes[name].stands_on:
                reasons.setdefault(lower, f"{name} lies on it")
            for lower in self._graph.volumes[name].opens_after:
                reasons.setdefault(lower, f"{name} comes after it")
        needed = self._still_needed(volume, chain)
        for name in chain:
            if name not in self._tops and name in needed:
                self._tops[name] = self._one_up(name, reasons[name])
        return self._tops.get(volume, ())

    def _still_needed(self, volume: str, chain: list[str]) -> set[str]:
        """What only opens others (a keystore) is left alone when these are open already."""
        needed = {volume}
        for name in reversed(chain):
            if name in needed:
                node = self._graph.volumes[name]
                needed.update(node.stands_on)
                if not node.is_open or node.suspended:
                    needed.update(node.opens_after)
        return needed

    def _one_up(self, name: str, reason: str) -> tuple[str, ...]:
        node = self._graph.volumes[name]
        below = [step for lower in node.needs for step in self._tops.get(lower, ())]
        tops = []
        if not node.is_open or node.suspended:
            tops.append(self.add(Action.UNLOCK, name, reason, below))
        if node.spec.content is Content.LVM and not node.is_active:
            tops.append(self.add(Action.ACTIVATE, name, f"volume group on {name}", tops or below))
        mounting = node.spec.content is Content.FILESYSTEM and node.spec.mount not in node.mounts
        if mounting:
            tops.append(
                self.add(Action.MOUNT, name, f"{node.spec.mount} lies on {name}", tops or below)
            )
        for pool in self._graph.pools_on.get(name, ()):
            pool_node = self._graph.pools[pool]
            # A pool that libvirt started on the empty mount point must look again.
            if (mounting or tops) and pool_node.pool.autostart | pool_node.pool.active:
                self.add(Action.START_POOL, pool, f"storage pool on {name}", tops)
        return tuple(tops)

    def start(self, guest: str, reason: str) -> None:
        """Start a guest, its volumes and pools first."""
        node = self._graph.guests[guest]
        before = [step for need in node.needs for step in self.up(need, f"guest {guest} needs it")]
        for pool in node.pools:
            if f"{Action.START_POOL}:{pool}" in self or not self._graph.pools[pool].pool.active:
                needs = [
                    step
                    for need in self._graph.pools[pool].needs
                    for step in self._tops.get(need, ())
                ]
                before.append(
                    self.add(Action.START_POOL, pool, f"guest {guest} has a disk in it", needs)
                )
        before += [
            f"{Action.START_POOL}:{pool}"
            for need in node.needs
            for pool in self._graph.pools_on.get(need, ())
        ]
        if not node.is_running:
            order = [f"{Action.START}:{other}" for other in node.spec.after]
            self.add(Action.START, guest, reason, before, order)

    def stop(self, guest: str, reason: str) -> None:
        self.add(Action.STOP, guest, reason)

    def order_stops(self, guests: Iterable[str]) -> None:
        """A guest stops when all guests after it have."""
        later: dict[str, list[str]] = {}
        for name in guests:
            for earlier in self._graph.guests[name].spec.after:
                later.setdefault(earlier, []).append(f"{Action.STOP}:{name}")
        for earlier, stops in later.items():
            step = self._steps.get(f"{Action.STOP}:{earlier}")
            if step is not None:
                self._steps[step.id] = Step(
                    step.action, step.object, step.after, tuple(stops), step.reason
                )

    def down(self, volume: str, reason: str) -> None:
        """Close one open volume: what is named here but not part of the plan counts as done."""
        node = self._graph.volumes[volume]
        above = [f"{Action.STOP}:{guest}" for guest in self._graph.guests_on.get(volume, ())]
        above += [f"{Action.LOCK}:{upper}" for upper in self._graph.standing_on.get(volume, ())]
        for pool in self._graph.pools_on.get(volume, ()):
            if self._graph.pools[pool].pool.active:
                # A pool that does not stop holds nothing open by itself; what does is told by the unmounting.
                stops = [f"{Action.STOP}:{guest}" for guest in self._graph.guests_in.get(pool, ())]
                self.add(
                    Action.STOP_POOL, pool, f"{volume} is to be closed", order=[*above, *stops]
                )
        pools = [f"{Action.STOP_POOL}:{pool}" for pool in self._graph.pools_on.get(volume, ())]
        last = above
        if node.mounts:
            last = [self.add(Action.UNMOUNT, volume, f"{volume} is to be closed", last, pools)]
        if node.spec.content is Content.LVM and node.is_active:
            last = [self.add(Action.DEACTIVATE, volume, f"{volume} is to be closed", last, pools)]
        self.add(Action.LOCK, volume, reason, last, pools)


def _boot(graph: Graph, steps: _Steps) -> None:
    volumes, guests = boot_set(graph)
    for name in volumes:
        steps.up(name, "in the boot set")
    for name in guests:
        steps.start(
            name,
            "always started" if graph.guests[name].spec.start == "always" else "autostart is set",
        )
    unlocks = [f"{Action.UNLOCK}:{name}" for name in volumes]
    for name, node in graph.volumes.items():
        if node.spec.lock is Lock.BOOT and (
            f"{Action.UNLOCK}:{name}" in steps or (node.is_open and not graph.users(name))
        ):
            last: list[str] = []
            if node.mounts or f"{Action.MOUNT}:{name}" in steps:
                last = [steps.add(Action.UNMOUNT, name, "the boot set is open", (), unlocks)]
            if node.is_active or f"{Action.ACTIVATE}:{name}" in steps:
                last = [steps.add(Action.DEACTIVATE, name, "the boot set is open", last, unlocks)]
            steps.add(
                Action.LOCK,
                name,
                "the boot set is open",
                last,
                [*unlocks, f"{Action.UNLOCK}:{name}"],
            )


def _shutdown(graph: Graph, steps: _Steps) -> None:
    running = [name for name, node in graph.guests.items() if node.is_ours and node.is_running]
    for name in running:
        steps.stop(name, "the host goes down")
    steps.order_stops(running)
    kept = {
        name
        for name, node in graph.volumes.items()
        if node.is_open and node.spec.lock is Lock.MANUAL
    }
    stack = list(kept)
    while stack:  # what a volume stands on stays open with it
        for lower in graph.volumes[stack.pop()].stands_on:
            if lower not in kept:
                kept.add(lower)
                stack.append(lower)
    for name, node in graph.volumes.items():
        if node.is_open and name not in kept:
            steps.down(name, "the host goes down")


def _lock(graph: Graph, steps: _Steps, names: list[str]) -> None:
    going = set(names)
    for name in names:
        users = [
            user
            for user in graph.users(name)
            if user.removeprefix("volume ") not in going or user.startswith("guest ")
        ]
        if users:
            raise BusyError(
                f"volume {name} is in use by {', '.join(users)}; stop or lock these first"
            )
    for name in names:
        if graph.volumes[name].is_open:
            steps.down(name, "asked for")


def _stop(graph: Graph, steps: _Steps, name: str) -> None:
    node = graph.guests[name]
    if not node.is_running:
        return
    steps.stop(name, "asked for")
    for need in node.needs:
        volume = graph.volumes[need]
        if (
            volume.spec.lock is Lock.GUEST
            and volume.is_open
            and graph.users(need) == [f"guest {name}"]
        ):
            steps.down(need, f"guest {name} was the last to use it")
