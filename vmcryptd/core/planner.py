# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plans the steps that reach a goal, from the graph. Pure.

A plan holds only steps that are still needed, so planning again after a plan ran gives an empty plan.
"""

from __future__ import annotations

import graphlib
from collections.abc import Container, Iterable

from vmcryptd.core import gcpause
from vmcryptd.core.errors import BusyError, GoalError, NoSuchGuestError, NoSuchVolumeError, nearest
from vmcryptd.core.goals import GOALS, Action, Goal, Plan, Step, StepId, Verb
from vmcryptd.core.graph import Graph, VolumeNode
from vmcryptd.core.model import Content, Lock, Unlock


@gcpause.paused
def plan(graph: Graph, goal: Goal, without: Container[StepId] = ()) -> Plan:
    """The steps that reach the goal. Raises GoalError, NoSuchVolumeError, NoSuchGuestError, BusyError.

    `without`: steps of boot that are planned only if another step needs them.
    """
    name = goal.name
    steps = _Steps(graph)
    match goal.verb:
        case Verb.BOOT:
            _boot(graph, steps, without)
        case Verb.SHUTDOWN:
            _shutdown(graph, steps)
        case Verb.LOCK_ALL:
            _lock(graph, steps, [volume for volume, node in graph.volumes.items() if node.is_open])
        case Verb.UNLOCK:
            check_volume(graph, name)
            steps.up(name, "asked for")
        case Verb.LOCK:
            check_volume(graph, name)
            _lock(graph, steps, [name])
        case Verb.START:
            check_guest(graph, name)
            steps.start(name, "asked for")
        case Verb.STOP:
            check_guest(graph, name)
            _stop(graph, steps, name)
        case _:
            raise GoalError(f'"{goal}" has no plan; expected one of {", ".join(GOALS)}')
    return Plan(goal, steps.sorted())


def boot_set(graph: Graph) -> tuple[list[str], list[str]]:
    """The volumes and guests that boot brings up. Keystores (lock = "boot") are not in it: they only open others."""
    roots = [
        name
        for name, node in graph.volumes.items()
        if node.spec.unlock is Unlock.BOOT and node.spec.lock is not Lock.BOOT
    ]
    opened = dict.fromkeys(graph.beneath(roots, still=True))
    guests: list[str] = []
    left = [name for name, node in graph.guests.items() if node.is_ours and node.starts_at_boot]
    while starting := [name for name in left if _may_start(graph, name, opened)]:
        guests += starting
        started = set(starting)
        needs = [need for name in starting for need in graph.guests[name].needs]
        opened.update(dict.fromkeys(graph.beneath(needs, opened, still=True)))
        left = [name for name in left if name not in started]
    volumes = [name for name in opened if graph.volumes[name].spec.lock is not Lock.BOOT]
    return volumes, guests


def idle_volumes(graph: Graph, needs: Iterable[str], stopped: str) -> list[str]:
    """The open volumes to close after a guest with these needs has stopped (lock = "guest"), topmost first."""
    idle: list[str] = []
    known = [need for need in needs if need in graph.volumes]
    for name in reversed(graph.beneath(known)):
        node = graph.volumes[name]
        gone = {f"guest {stopped}", *(f"volume {upper}" for upper in idle)}
        if node.spec.lock is Lock.GUEST and node.is_open and gone.issuperset(graph.users(name)):
            idle.append(name)
    return idle


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
    if close := nearest(name, names):
        return f'; did you mean "{close}"?'
    return "" if names else "; none is configured"


def _may_start(graph: Graph, guest: str, opened: Container[str]) -> bool:
    """Whether boot may start the guest: not if it needs a locked volume that is opened only on request."""
    return all(
        need in opened
        or graph.volumes[need].is_open
        or graph.volumes[need].spec.unlock is not Unlock.MANUAL
        for need in graph.guests[guest].needs
    )


def _is_up(node: VolumeNode) -> bool:
    match node.spec.content:
        case Content.LVM:
            return node.is_usable and node.is_active
        case Content.FILESYSTEM:
            return node.is_usable and node.spec.mount in node.mounts
    return node.is_usable


class _Steps:
    """Collects the steps of one plan, each once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._steps: dict[StepId, Step] = {}
        self._tops: dict[str, tuple[StepId, ...]] = {}  # volume → the last steps that bring it up
        self._pools: dict[str, str] = {}  # pool → a volume below it that is being brought up

    def __contains__(self, step_id: StepId) -> bool:
        return step_id in self._steps

    def add(
        self,
        action: Action,
        name: str,
        reason: str,
        after: Iterable[StepId] = (),
        order: Iterable[StepId] = (),
    ) -> StepId:
        step_id = StepId(action, name)
        if step_id not in self._steps:
            behind = tuple(dict.fromkeys(after)), tuple(dict.fromkeys(order))
            self._steps[step_id] = Step(step_id, *behind, reason)
        return step_id

    def sorted(self) -> tuple[Step, ...]:
        """The steps in an order in which they can be done one by one. Named steps outside of the plan are done."""
        self._start_pools()
        known = self._steps
        placed: set[StepId] = set()
        is_sorted = True  # the order in which they were added, mostly
        for step_id, step in known.items():
            after = tuple(other for other in step.after if other in known)
            order = tuple(other for other in step.order if other in known and other not in after)
            if (after, order) != (step.after, step.order):
                known[step_id] = Step(step_id, after, order, step.reason)
            is_sorted = is_sorted and placed.issuperset(after) and placed.issuperset(order)
            placed.add(step_id)
        if is_sorted:
            return tuple(known.values())
        sorter = graphlib.TopologicalSorter(
            {step_id: (*step.after, *step.order) for step_id, step in known.items()}
        )
        return tuple(known[step_id] for step_id in sorter.static_order())

    def up(self, volume: str, reason: str) -> tuple[StepId, ...]:
        """Open a volume, all it needs, and its group and mount. Returns the steps to wait for."""
        if volume in self._tops:
            return self._tops[volume]
        reasons = {volume: reason}
        chain = self._graph.beneath([volume], self._tops, still=True)
        for name in reversed(chain):
            for lower in self._graph.volumes[name].stands_on:
                reasons.setdefault(lower, f"{name} lies on it")
            for lower in self._graph.volumes[name].opens_after:
                reasons.setdefault(lower, f"{name} comes after it")
        for name in chain:
            self._tops[name] = self._one_up(name, reasons[name])
        return self._tops[volume]

    def _one_up(self, name: str, reason: str) -> tuple[StepId, ...]:
        node = self._graph.volumes[name]
        # Only ordered after the keystore: if that is lost, the volume's other keys still open it.
        needs = {lower: lower not in node.keys_in for lower in node.still_needs}
        below = [step for lower in needs if needs[lower] for step in self._tops.get(lower, ())]
        keys = [step for lower in needs if not needs[lower] for step in self._tops.get(lower, ())]
        tops = []
        if not node.is_usable:
            tops.append(self.add(Action.UNLOCK, name, reason, below, keys))
        if node.spec.content is Content.LVM and not node.is_active:
            tops.append(self.add(Action.ACTIVATE, name, f"volume group on {name}", tops or below))
        if node.spec.content is Content.FILESYSTEM and node.spec.mount not in node.mounts:
            tops.append(
                self.add(Action.MOUNT, name, f"{node.spec.mount} lies on {name}", tops or below)
            )
        for pool in self._graph.pools_on.get(name, ()):
            known = self._graph.pools[pool].pool
            # libvirt may have started the pool on the empty mount point: refresh it.
            if tops and (known.autostart or known.active):
                self._pools.setdefault(pool, f"storage pool on {name}")
        # The volume itself is up, but one beneath it may have to be resumed.
        return tuple(tops or below)

    def _start_pools(self) -> None:
        """Called after all volumes are planned, because a pool can lie on several."""
        for pool, reason in self._pools.items():
            needs = self._graph.pools[pool].needs
            if all(need in self._tops or _is_up(self._graph.volumes[need]) for need in needs):
                tops = [step for need in needs for step in self._tops.get(need, ())]
                self.add(Action.START_POOL, pool, reason, tops)

    def start(self, guest: str, reason: str) -> None:
        """Start a guest, its volumes and pools first."""
        node = self._graph.guests[guest]
        before = [step for need in node.needs for step in self.up(need, f"guest {guest} needs it")]
        for pool in node.pools:
            if not self._graph.pools[pool].pool.active:
                self._pools.setdefault(pool, f"guest {guest} has a disk in it")
        pools = [pool for need in node.needs for pool in self._graph.pools_on.get(need, ())]
        before += [StepId(Action.START_POOL, pool) for pool in (*node.pools, *pools)]
        if not node.is_up:
            order = [StepId(Action.START, other) for other in node.spec.after]
            self.add(Action.START, guest, reason, before, order)

    def stop(self, guest: str, reason: str) -> None:
        self.add(Action.STOP, guest, reason)

    def order_stops(self, guests: Iterable[str]) -> None:
        """A guest stops after all guests that start after it."""
        later: dict[str, list[StepId]] = {}
        for name in guests:
            for earlier in self._graph.guests[name].spec.after:
                later.setdefault(earlier, []).append(StepId(Action.STOP, name))
        for earlier, stops in later.items():
            step = self._steps.get(StepId(Action.STOP, earlier))
            if step is not None:
                self._steps[step.id] = step._replace(order=tuple(stops))

    def down(self, volume: str, reason: str) -> None:
        """Close one open volume. Named steps outside of the plan count as done."""
        node = self._graph.volumes[volume]
        above = [StepId(Action.STOP, guest) for guest in self._graph.guests_on.get(volume, ())]
        above += [StepId(Action.LOCK, upper) for upper in self._graph.standing_on.get(volume, ())]
        for pool in self._graph.pools_on.get(volume, ()):
            if self._graph.pools[pool].pool.active:
                # Ordered only: a pool that fails to stop keeps nothing open. Unmounting names the real users.
                self.add(
                    Action.STOP_POOL, pool, f"{volume} is to be closed", order=self._on_pool(pool)
                )
        pools = [StepId(Action.STOP_POOL, pool) for pool in self._graph.pools_on.get(volume, ())]
        last = above
        if node.mounts:
            last = [self.add(Action.UNMOUNT, volume, f"{volume} is to be closed", last, pools)]
        if node.spec.content is Content.LVM and node.is_active:
            last = [self.add(Action.DEACTIVATE, volume, f"{volume} is to be closed", last, pools)]
        self.add(Action.LOCK, volume, reason, last, pools)

    def _on_pool(self, pool: str) -> list[StepId]:
        """The steps that stop the users of a pool."""
        needs = self._graph.pools[pool].needs
        guests = dict.fromkeys(self._graph.guests_in.get(pool, ()))
        uppers: dict[str, None] = {}
        for need in needs:
            guests.update(dict.fromkeys(self._graph.guests_on.get(need, ())))
            uppers.update(dict.fromkeys(self._graph.standing_on.get(need, ())))
        beneath = set(self._graph.beneath(needs))
        return [StepId(Action.STOP, guest) for guest in guests] + [
            StepId(Action.LOCK, upper) for upper in uppers if upper not in beneath
        ]


def _boot(graph: Graph, steps: _Steps, without: Container[StepId]) -> None:
    volumes, guests = boot_set(graph)
    for name in volumes:
        unlock = StepId(Action.UNLOCK, name)
        if graph.volumes[name].spec.unlock is Unlock.BOOT and unlock not in without:
            steps.up(name, "in the boot set")
    for name in guests:
        if StepId(Action.START, name) not in without:
            is_always = graph.guests[name].spec.start == "always"
            steps.start(name, "always started" if is_always else "autostart is set")
    _close_keystores(graph, steps, volumes)


def _close_keystores(graph: Graph, steps: _Steps, volumes: list[str]) -> None:
    """Close the keystores (lock = "boot") once the boot set is open."""
    reason = "the boot set is open"
    keystores = [name for name, node in graph.volumes.items() if node.spec.lock is Lock.BOOT]
    unlocks = [StepId(Action.UNLOCK, name) for name in (*volumes, *keystores)]
    closing: set[str] = set()
    for name in reversed(graph.beneath(keystores)):
        if name not in keystores:
            continue
        node = graph.volumes[name]
        uppers = [upper for upper in graph.standing_on.get(name, ()) if upper not in closing]
        guests = graph.guests_on.get(name, ())
        is_used = (
            any(graph.volumes[upper].is_open for upper in uppers)
            or any(graph.guests[guest].is_running for guest in guests)
            or any(StepId(Action.UNLOCK, upper) in steps for upper in uppers)
            or any(StepId(Action.START, guest) in steps for guest in guests)
            or name in graph.pools_on
        )
        if is_used or not (node.is_open or StepId(Action.UNLOCK, name) in steps):
            continue
        closing.add(name)
        ends = [
            *unlocks,
            *(StepId(Action.LOCK, upper) for upper in graph.standing_on.get(name, ())),
            *(StepId(action, name) for action in (Action.ACTIVATE, Action.MOUNT)),
        ]
        last: list[StepId] = []
        if node.mounts or StepId(Action.MOUNT, name) in steps:
            last = [steps.add(Action.UNMOUNT, name, reason, (), ends)]
        if node.is_active or StepId(Action.ACTIVATE, name) in steps:
            last = [steps.add(Action.DEACTIVATE, name, reason, last, ends)]
        steps.add(Action.LOCK, name, reason, last, ends)


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
    while stack:  # volumes beneath an open one stay open
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
        # Its configured mount is unmounted; a mount by another program shows that the volume is in use.
        node = graph.volumes[name]
        users += [f"mounted at {mount}" for mount in node.mounts if mount != node.spec.mount]
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
    for volume in idle_volumes(graph, node.needs, name):
        steps.down(volume, f"guest {name} was the last to use it")
