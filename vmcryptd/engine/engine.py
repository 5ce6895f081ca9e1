# SPDX-License-Identifier: LGPL-2.1-or-later
"""Executes plans: everything independent side by side, each step once however many callers wait for it.

The engine pursues goals: it plans on the inventory's graph, starts the steps that are new, and plans again when a step
has ended or the graph has changed, until nothing new is to be done.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import Container, Coroutine, Iterable, Iterator
from typing import Any

from vmcryptd.core import planner
from vmcryptd.core.errors import (
    AmbiguousDeviceError,
    BusyError,
    DependencyError,
    DeviceMissingError,
    InternalError,
    KeyFileMissingError,
    KeyUnavailableError,
    LibvirtError,
    ShuttingDownError,
    VmcryptdError,
)
from vmcryptd.core.goals import BOOT, LOCK_ALL, SHUTDOWN, Action, Goal, Plan, StepId, Verb
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import (
    Header,
    HostState,
    Infinity,
    Lock,
    Settings,
    Unlock,
    VolumeSpec,
    VolumeState,
)
from vmcryptd.core.ports import Key, Ports
from vmcryptd.core.states import (
    Activities,
    GuestView,
    VolumeView,
    guest_view,
    host_state,
    volume_state,
    volume_view,
)
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, JobState, outcome, together
from vmcryptd.engine.key_management import KeySlots
from vmcryptd.engine.late import Late
from vmcryptd.engine.panic import panic
from vmcryptd.engine.prompt import Prompt
from vmcryptd.engine.rotation import GRACE_S, Rotations
from vmcryptd.engine.steps import Steps
from vmcryptd.posix.changes import Changes

log = logging.getLogger(__name__)

LIBVIRT_TIMEOUT_S = 30.0
# Whatever does not end within this is left to end by itself: the keys do not wait for it.
PANIC_CANCEL_S = 2.0

# What is kept beside goals: that boot was asked for, and the volumes that it opens when their device appears.
_UP, _LATE = "up", "late:"
_RISING_VOLUME = (Action.UNLOCK, Action.ACTIVATE, Action.MOUNT)


class Engine:
    """All volumes and guests of one host."""

    def __init__(self, settings: Settings, ports: Ports) -> None:
        self.inventory = Inventory(settings, ports.blocks, ports.crypt, ports.domains, ports.memory)
        self.inventory.rebuilt.watch(self._rebuilt_graph)
        self.changes = self.inventory.changes
        self.changes.watch(self._announce)
        self.jobs: dict[int, Job] = {}
        self.booted = False
        self._ports = ports
        self._numbers = itertools.count(1)
        self._running: dict[StepId, tuple[asyncio.Task[None], Job]] = {}
        self._late = Late(self.inventory)
        # What boot brings up and has been up since it was asked for, as steps: whoever took it down again meant it.
        self._came_up: set[StepId] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._libvirt_error: VmcryptdError | None = None
        self._was_running: dict[str, tuple[str, ...]] = {}  # guest → what it needs
        self._was_usable: set[str] = set()
        self._boot_set: tuple[list[str], list[str]] = [], []
        self._boot_set_of: Graph | None = None
        self._keystores: set[str] = set()  # opened for others, to be closed when nothing comes up
        self._target_reached: bool | None = None
        self._target_told: bool | None = None
        self._is_telling_target = False
        self._replans = Changes()
        self._stopping = 0  # requests to go down that are under way
        self._is_closed = False
        self._told_status = ""
        self._sources: dict[str, str] = {}  # as kept for the next daemon
        self.prompt = Prompt(ports.keys, self.changes.notify, self._on_waiting)
        self._activities = Activities(settings.volumes)
        self._steps = Steps(
            ports,
            self.inventory,
            self.prompt,
            self._activities,
            self._may_ask,
            self.changes.notify,
            self._open_for,
            self._stop_rotation,
            self._finish_rotation,
        )
        derivation = self._steps.unlocker.derivation
        self.key_slots = KeySlots(ports, self.inventory, derivation, self.changes.notify)
        self.rotations = Rotations(
            ports,
            self.inventory,
            self.key_slots,
            derivation,
            self._begin_aside,
            self._finish,
            self._spawn,
            self.changes.notify,
        )

    @property
    def settings(self) -> Settings:
        return self.inventory.settings

    @property
    def graph(self) -> Graph:
        return self.inventory.graph

    # --- looking ---

    def start(self) -> None:
        """Look for the first time, and from then on whenever something changes."""
        self.inventory.start()
        self._sources = self._ports.memory.sources()
        for name, source in self._sources.items():
            if name in self.graph.volumes and self.graph.volumes[name].is_open:
                self._activities.volumes[name].key_source = source
        self._configured()
        self.rotations.start()

    def close(self) -> None:
        """Stop without closing or stopping anything; goals that are kept are taken up again by `resume`."""
        self._is_closed = True
        for job in self.jobs.values():
            job.is_stopped = True
        for task, _ in self._running.values():
            task.cancel()
        self.rotations.close()
        self.prompt.close()
        self._replans.notify()

    def configure(self, settings: Settings) -> None:
        """Take a new configuration. Raises GraphError, and then the old one stays."""
        self.inventory.configure(settings)
        for step_id, (task, job) in self._running.items():
            gone = step_id.object not in settings.volumes
            if gone and step_id.action in _RISING_VOLUME and job.is_rising:
                task.cancel()
        self._configured()
        self._keep_goals()
        self._replans.notify()

    def _configured(self) -> None:
        settings = self.settings
        self.prompt.cache(settings.daemon.key_cache_s)
        self._activities.configure(settings.volumes)
        self._late.keep_only(settings.volumes)
        self._after_look()
        self.changes.notify()

    def resume(self) -> None:
        """Take up again what an earlier run of the daemon was about to do."""
        goals = self._ports.memory.goals()
        self.booted = not {_UP, str(BOOT)}.isdisjoint(goals)
        for name in self.settings.volumes:
            if f"{_LATE}{name}" in goals:
                self._late.expect(name)
        for text in goals:
            if text == _UP or text.startswith(_LATE):
                continue
            try:
                self.begin(Goal.parse(text))
            except VmcryptdError as error:
                log.warning(
                    "%s was not finished before the restart and is not taken up again: %s",
                    text,
                    error,
                )
        self._open_late()

    def _rebuilt_graph(self) -> None:
        self._after_look()
        self._replans.notify()

    def _after_look(self) -> None:
        for name, node in self.graph.volumes.items():
            activity = self._activities.volumes[name]
            if node.is_open:
                if activity.doing is None or activity.doing is VolumeState.WAITING:
                    activity.error = None
                self._late.discard(name)
            elif activity.doing is None:
                activity.key_source = ""
        self._note_up()
        self._after_guests()
        self._after_opening()
        self.prompt.changes.notify()  # what waits may have been opened by hand
        self._open_late()
        if self._libvirt_error is not None and self.graph.libvirt_reachable:
            self._libvirt_error = None
            if self.booted:
                self._begin_quietly(BOOT)

    def _note_up(self) -> None:
        if not self.booted:
            return
        volumes, guests = self.graph.volumes.items(), self.graph.guests.items()
        self._came_up.update(StepId(Action.UNLOCK, name) for name, node in volumes if node.is_open)
        self._came_up.update(StepId(Action.START, name) for name, node in guests if node.is_running)

    def _open_late(self) -> None:
        if self.booted and (arrived := self._late.arrived()):
            self._begin_quietly(BOOT, arrived)

    def _not_again(self, arrived: Container[str] = ()) -> frozenset[StepId]:
        """Steps of boot that have failed for a reason of their own, or for one of those: they wait for their own news.

        `arrived`: volumes that may open now.
        """
        volumes = [
            name
            for name, node in self.graph.volumes.items()
            if not node.is_open
            and name not in arrived
            and self._activities.volumes[name].has_failed_by_itself
        ]
        for name in volumes:
            above = (*self.graph.standing_on.get(name, ()), *self.graph.opened_after.get(name, ()))
            volumes += [
                upper
                for upper in above
                if upper not in volumes
                and upper not in arrived
                and not self.graph.volumes[upper].is_open
            ]
        guests = [guest for name in volumes for guest in self.graph.guests_on.get(name, ())]
        guests += [
            name for name in self.graph.guests if self._activities.guest(name).has_failed_by_itself
        ]
        return frozenset(
            (
                *(StepId(Action.UNLOCK, name) for name in volumes),
                *(StepId(Action.START, guest) for guest in guests),
            )
        )

    def _after_guests(self) -> None:
        running = {name: node.needs for name, node in self.graph.guests.items() if node.is_running}
        for name in running:
            self._activities.guest(name).error = None
        if not self.graph.libvirt_reachable:
            return  # what is not seen now has not stopped for that
        stopped = {name: needs for name, needs in self._was_running.items() if name not in running}
        self._was_running = running
        for name, needs in stopped.items():
            if not self._is_stopping and (idle := planner.idle_volumes(self.graph, needs, name)):
                self._spawn(self._lock_idle(idle, f"guest {name} was the last to use it"))

    def _after_opening(self) -> None:
        """Guests that boot could not start because a volume was locked start when somebody opens that."""
        usable = {name for name, node in self.graph.volumes.items() if node.is_usable}
        fresh, self._was_usable = usable - self._was_usable, usable
        if not self.booted or self._is_stopping:
            return
        for name in dict.fromkeys(g for v in fresh for g in self.graph.guests_on.get(v, ())):
            node, activity = self.graph.guests[name], self._activities.guest(name)
            failed = isinstance(activity.error, DependencyError) and activity.doing is None
            if failed and node.starts_at_boot and usable.issuperset(node.needs):
                self._begin_quietly(Goal(Verb.START, name))

    def _announce(self) -> None:
        """Tell systemd, and keep for the next daemon, what is different."""
        self._keep_sources()
        state = self.state
        if state is HostState.READY and self._target_reached is not True:
            self._tell_target(True)
        elif state in (HostState.STOPPING, HostState.LOCKED) and self._target_reached is True:
            self._tell_target(False)
        if (line := self.status_line(state)) != self._told_status:
            self._told_status = line
            self._ports.host.status(line)

    def _keep_sources(self) -> None:
        volumes = self._activities.volumes.items()
        sources = {name: activity.key_source for name, activity in volumes if activity.key_source}
        if sources != self._sources:
            self._sources = sources
            self._ports.memory.keep_sources(sources)

    def _tell_target(self, is_reached: bool) -> None:
        self._target_reached = is_reached
        if not self._is_telling_target:
            self._is_telling_target = True
            self._spawn(self._move_target())

    async def _move_target(self) -> None:
        """One after the other: two at once could arrive the wrong way round."""
        try:
            while (wanted := self._target_reached) is not None and wanted is not self._target_told:
                await self._ports.host.reach_target(wanted)
                self._target_told = wanted
        finally:
            self._is_telling_target = False

    async def background_done(self) -> None:
        """Wait until what goes on beside the jobs has ended."""
        while self._background:
            await asyncio.wait(self._background)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(
                "in the background: %s",
                error,
                exc_info=None if isinstance(error, VmcryptdError) else error,
            )

    # --- telling ---

    @property
    def boot_set(self) -> tuple[list[str], list[str]]:
        """The volumes and guests that boot brings up, as planner.boot_set; worked out once a graph."""
        if self._boot_set_of is not self.graph:
            self._boot_set_of, self._boot_set = self.graph, planner.boot_set(self.graph)
        return self._boot_set

    @property
    def waiting(self) -> list[str]:
        return self.prompt.waiting

    @property
    def is_console_needed(self) -> bool:
        """Whether a question for a person is open or may still come while the host boots."""
        return (
            (bool(self.prompt.expected) or self.prompt.is_asking_pin)
            and not self.prompt.declined
            and any(j.goal == BOOT for j in self.jobs.values())
        )

    @property
    def state(self) -> HostState:
        volumes, guests = self.boot_set
        return host_state(
            (volume_state(self.graph, name, self._activities.volumes[name]) for name in volumes),
            (
                (self.graph.guests[name].state, bool(self._activities.guest(name).error))
                for name in guests
            ),
            stopping=self._is_stopping,
            rising=any(job.is_rising for job in self.jobs.values()),
            waiting=bool(self.prompt.waiting),
            booted=self.booted,
            failed=self._libvirt_error is not None,
        )

    def status_line(self, state: HostState) -> str:
        match state:
            case HostState.WAITING:
                return f"Waiting for the key of {', '.join(self.waiting)}: vmcryptctl unlock"
            case HostState.DEGRADED:
                failed = [name for name, activity in self._activities.all() if activity.error]
                return f"Degraded: {', '.join(failed) or self._libvirt_error}"
        count = sum(node.is_open for node in self.graph.volumes.values())
        return f"{str(state).capitalize()}: {count} of {len(self.graph.volumes)} volumes open"

    def volume_views(self) -> list[VolumeView]:
        return [
            volume_view(
                self.graph,
                name,
                self._activities.volumes[name],
                header_backup_due=bool(self.key_slots.backup_due_since(name)),
                rotation=self.rotations.state(name),
            )
            for name in self.graph.volumes
        ]

    def guest_views(self) -> list[GuestView]:
        return [
            guest_view(self.graph, name, self._activities.guest(name)) for name in self.graph.guests
        ]

    def plan(self, goal: Goal) -> Plan:
        """What the goal would take now. Raises VmcryptdError."""
        self.inventory.observe()
        return planner.plan(self.graph, goal)

    # --- the verbs ---

    def boot(self) -> Job:
        """Bring up the boot set; returns at once."""
        before, self.booted = self.booted, True
        try:
            job = self.begin(BOOT)
        except VmcryptdError:
            self.booted = before
            raise
        self._came_up.clear()
        self._note_up()
        self.prompt.declined = False
        return job

    async def unlock(self, name: str) -> None:
        """Open a volume and what it needs, asking where necessary. Raises what kept it closed."""
        await self.pursue(Goal(Verb.UNLOCK, name))

    async def start_guest(self, name: str) -> None:
        """Open what a guest needs, then start it. Raises what kept it off."""
        await self.pursue(Goal(Verb.START, name))

    async def stop_guest(self, name: str) -> None:
        """Stop a guest, then close what only it kept open. Raises what kept it up."""
        await self._cancel({StepId(Action.START, name)})
        await self.pursue(Goal(Verb.STOP, name))

    async def pursue(self, goal: Goal) -> None:
        """Reach a goal and wait for its end. Raises what it failed by."""
        await self.wait(self.begin(goal))

    async def unlock_all(self) -> None:
        """Open the whole boot set, asking where necessary."""
        self.inventory.observe()
        volumes, _ = self.boot_set
        jobs = [
            self.begin(Goal(Verb.UNLOCK, name), look=False)
            for name in volumes
            if not self.graph.volumes[name].is_open
        ]
        await asyncio.gather(*(self.ended(job) for job in jobs))
        for job in jobs:
            if job.error is not None:
                raise job.error

    async def lock(self, name: str) -> None:
        """Close one volume that nothing uses. Raises BusyError naming the users."""
        self.inventory.observe()
        goal = Goal(Verb.LOCK, name)
        planner.plan(self.graph, goal)
        await self._give_up(name)
        await self.pursue(goal)

    async def lock_all(self) -> None:
        """Close every volume; refused as a whole while anything is used. Raises BusyError naming the users."""
        self.inventory.observe()
        planner.plan(self.graph, LOCK_ALL)
        await self._cancel_rising()
        self._forget_boot()
        await self.pursue(LOCK_ALL)

    async def shutdown(self) -> None:
        """The whole way down. What fails is told at the end; the rest is closed all the same."""
        with self._going_down():
            await self._shutdown()

    async def _shutdown(self) -> None:
        self.changes.notify()
        self._forget_boot()
        await self._cancel_rising()
        if self.inventory.needs_libvirt and not self._ports.domains.current().reachable:
            try:
                await self._ports.domains.refresh(LIBVIRT_TIMEOUT_S)
            except VmcryptdError as error:
                log.warning(
                    "%s; guests cannot be stopped, what they do not hold is closed all the same",
                    error,
                )
        self.inventory.observe()
        now = asyncio.get_running_loop().time()
        job = self.begin(SHUTDOWN, deadline=now + self.settings.daemon.shutdown_timeout_s)
        await self.ended(job)
        failures = job.failures()
        for step_id, failure in failures.items():
            log.error("shutdown: %s: %s", step_id, failure)
        kept = [
            name
            for name, node in self.graph.volumes.items()
            if node.is_open and node.spec.lock is Lock.MANUAL
        ]
        if kept:
            log.warning('shutdown: %s stay open (lock = "manual")', ", ".join(kept))
        if failures:
            raise together(failures.values())

    async def panic(self) -> None:
        """Now: guests killed, keys wiped, mappings closed; goes on past every error and tells them at the end."""
        with self._going_down():
            await self._panic()

    async def _panic(self) -> None:
        self.changes.notify()
        self._forget_boot()
        self._stop_rising_jobs()
        await self._cancel(set(self._running), timeout_s=PANIC_CANCEL_S)
        self.inventory.observe()
        let_go = functools.partial(self.rotations.abort, grace_s=PANIC_CANCEL_S)
        if errors := await panic(self.inventory, self._ports, let_go):
            raise BusyError("; ".join(errors))

    @property
    def _is_stopping(self) -> bool:
        return self._stopping > 0

    @contextlib.contextmanager
    def _going_down(self) -> Iterator[None]:
        self._stopping += 1
        try:
            yield
        finally:
            self._stopping -= 1
            self.changes.notify()

    # --- jobs ---

    def _forget_boot(self) -> None:
        """Nothing is to come up by itself any more, and no key is held."""
        self.booted = False
        self._late.clear()
        self._came_up.clear()
        self._libvirt_error = None
        self.prompt.wipe()

    def begin(
        self, goal: Goal, *, may_ask: bool = True, deadline: float = Infinity, look: bool = True,
        is_asked: bool = True, arrived: Container[str] = (),
    ) -> Job:  # fmt: skip
        """Pursue a goal, or join who pursues it; `look` first, unless that was just done.

        Boot that nobody asked for goes on where the last one ended: what was up since then stays as it is, and of
        what has failed only volumes that have `arrived` are tried again. Raises VmcryptdError.
        """
        self._check_may_begin(goal.is_rising)
        if look:
            self.inventory.observe()
        for job in self.jobs.values():
            if job.goal == goal and not job.is_stopped:
                job.may_ask = job.may_ask or may_ask
                not_again: frozenset[StepId] = frozenset()
                if not is_asked:
                    not_again = self._not_again(arrived)
                if job.without:
                    job.without = not_again | self._came_up if not is_asked else frozenset()
                    job.planned = None
                again = self._plan_again(job).steps if is_asked else ()
                job.forget({step.id for step in again}, not_again)
                self._replans.notify()
                return job
        without = frozenset() if is_asked else self._not_again(arrived) | self._came_up
        first = planner.plan(self.graph, goal, without)
        job = self._register(Job(next(self._numbers), goal, may_ask, without, deadline))
        self._add_steps(job, first)
        job.task = asyncio.create_task(self._pursue(job))
        self.changes.notify()
        return job

    def _check_may_begin(self, rising: bool) -> None:
        if self._is_closed:
            raise ShuttingDownError("vmcryptd is stopping; ask again when it is back")
        if rising and self._is_stopping:
            raise BusyError("everything is being stopped and closed; try again when that is done")

    def _begin_aside(self, goal: Goal) -> Job:
        """A job that takes no steps, and ends by `_finish`. Raises VmcryptdError."""
        self._check_may_begin(True)
        return self._register(Job(next(self._numbers), goal))

    async def _stop_rotation(self, name: str) -> None:
        await self.rotations.stop(name, GRACE_S)

    async def _finish_rotation(self, spec: VolumeSpec, header: Header) -> Header:
        return await self.key_slots.finish_rotation(spec, header)

    def _begin_quietly(self, goal: Goal, arrived: Container[str] = ()) -> None:
        try:
            self.begin(goal, is_asked=False, arrived=arrived)
        except VmcryptdError as error:
            log.warning("%s: %s", goal, error)

    def _register(self, job: Job) -> Job:
        self.jobs[job.id] = job
        self._keep_goals()
        return job

    def _keep_goals(self) -> None:
        if self._is_closed:
            return
        goals = [str(job.goal) for job in self.jobs.values() if job.is_rising and job.may_ask]
        goals += [f"{_LATE}{name}" for name in self._late.names]
        if self.booted:
            goals.append(_UP)
        self._ports.memory.keep_goals(goals)

    async def _pursue(self, job: Job) -> None:
        libvirt = None
        if job.goal == BOOT:
            libvirt = asyncio.create_task(self._libvirt_known())
            libvirt.add_done_callback(lambda _: self._replans.notify())
        try:
            while True:
                self._add_steps(job, self._plan_again(job))
                is_known = libvirt is None or libvirt.done()
                needless = self._needless(job)
                if job.is_idle_but(needless) and (
                    job.is_stopped or (is_known and not self._is_undone(job))
                ):
                    break
                await self._replans.wait()
            failures = job.failures()
            job.error = next((failures[one] for one in failures if one not in needless), None)
        except Exception:
            log.exception("job %s (%s) broke off", job.id, job.goal)
            job.error = InternalError("an internal error; the journal has the details")
        finally:
            if libvirt is not None:
                libvirt.cancel()
            self._finish(job)

    def _needless(self, job: Job) -> set[StepId]:
        """Steps of the job that its goal can do without: of keystores, once other keys have opened what it wants."""
        volumes = self.graph.volumes
        keystores = {name for node in volumes.values() for name in node.keys_in}
        wanted = [name for name in self._wanted(job.goal) if name in volumes] if keystores else []
        if not wanted:
            return set()
        needed = self.graph.bearing(wanted).union(self.graph.beneath(wanted, still=True))
        needless = set(self.graph.beneath(keystores)) - needed
        return {
            step_id
            for step_id in job.tasks
            if step_id.action in _RISING_VOLUME and step_id.object in needless
        }

    def _wanted(self, goal: Goal) -> tuple[str, ...]:
        """The volumes that a goal is to have open at its end."""
        if goal == BOOT:
            volumes, guests = self.boot_set
            needs = [need for guest in guests for need in self.graph.guests[guest].needs]
            return (*volumes, *needs)
        if goal.verb is Verb.START and goal.name in self.graph.guests:
            return self.graph.guests[goal.name].needs
        return (goal.name,) if goal.verb is Verb.UNLOCK else ()

    def _call_off_needless(self) -> None:
        """A keystore is not asked for any more once other keys have opened all that it is wanted for."""
        needless = [(job, self._needless(job)) for job in self.jobs.values()]
        wanted = {
            task
            for job, without in needless
            for step_id, task in job.tasks.items()
            if step_id not in without
        }
        for job, without in needless:
            for step_id in without:
                if job.tasks[step_id] not in wanted:
                    self._call_off(step_id, job.tasks[step_id])

    def _call_off(self, step_id: StepId, task: asyncio.Task[None]) -> None:
        if task.cancel() and step_id.action is Action.UNLOCK:
            # At once, or the question would come again before the step has ended.
            self.prompt.release(step_id.object)

    def _is_undone(self, job: Job) -> bool:
        """Whether what the job wants to be up is open still, but just being closed."""
        verb, name = job.goal
        if verb is not Verb.UNLOCK or name not in self.graph.volumes:
            return False
        closing = (Action.UNMOUNT, Action.DEACTIVATE, Action.LOCK)
        # A keystore is closed when it has done its work; what it opened does not wait for that.
        wanted = self.graph.beneath([name], still=True)
        return any(
            StepId(action, volume) in self._running for action in closing for volume in wanted
        )

    def _finish(self, job: Job) -> None:
        job.state = JobState.FAILED if job.error else JobState.DONE
        self.jobs.pop(job.id, None)
        if undone := {step: task for step, task in job.tasks.items() if not task.done()}:
            others = {task for other in self.jobs.values() for task in other.tasks.values()}
            for step_id, task in undone.items():
                if task not in others:
                    self._call_off(step_id, task)
        if job.is_rising and job.goal != BOOT:
            self._keystores.update(
                name
                for name, node in self.graph.volumes.items()
                if node.spec.lock is Lock.BOOT
                and StepId(Action.UNLOCK, name) in job.tasks
                and job.goal != Goal(Verb.UNLOCK, name)
            )
        if self._keystores and not any(job.is_rising for job in self.jobs.values()):
            keystores, self._keystores = self._keystores, set()
            if not self._is_stopping and not self._is_closed:
                idle = [
                    name
                    for name in keystores
                    if name in self.graph.volumes
                    and self.graph.volumes[name].is_open
                    and not self.graph.users(name)
                ]
                self._spawn(self._lock_idle(idle, "nothing is opened with it any more"))
        self._keep_goals()
        self.changes.notify()

    def _plan_again(self, job: Job) -> Plan:
        if job.planned is not None and job.planned[0] is self.graph:
            return job.planned[1]
        try:
            job.planned = self.graph, planner.plan(self.graph, job.goal, job.without)
            return job.planned[1]
        except VmcryptdError:
            return Plan(job.goal)  # what it was about is gone, or in use by now: no new steps

    def _add_steps(self, job: Job, plan: Plan) -> None:
        for step in plan.steps:
            if step.id in job.tasks or job.is_stopped:
                continue
            running = self._running.get(step.id)
            if running is None or running[0].done():
                task = asyncio.create_task(self._steps.run(job, step))
                self._running[step.id] = (task, job)
                task.add_done_callback(functools.partial(self._step_done, step.id))
                if step.action is Action.UNLOCK and self.settings.volumes[step.object].asks:
                    self.prompt.expect(step.object)
            else:
                task, _ = running
            job.tasks[step.id] = task

    def _step_done(self, step_id: StepId, task: asyncio.Task[None]) -> None:
        if self._running.get(step_id, (task,))[0] is not task:
            return  # begun again meanwhile
        self._running.pop(step_id, None)
        self._note_late(step_id, task)
        action, name = step_id
        if action is Action.UNLOCK:
            if name in self.graph.volumes and self.graph.volumes[name].keys_in:
                self._call_off_needless()
            self.prompt.release(name)
        self.changes.notify()
        self._replans.notify()
        if (
            not task.cancelled()
            and (error := task.exception()) is not None
            and not isinstance(error, VmcryptdError)
        ):
            log.error("%s failed by a fault of vmcryptd", step_id, exc_info=error)

    def _note_late(self, step_id: StepId, task: asyncio.Task[None]) -> None:
        """A volume of the boot set that lacks something is opened when that comes."""
        action, name = step_id
        if self.booted and action is Action.UNLOCK and name in self.graph.volumes:
            lacks = isinstance(
                outcome(task), (AmbiguousDeviceError, DeviceMissingError, KeyFileMissingError)
            )
            if lacks and name in self.boot_set[0]:
                self._late.rest(name, self._steps.unlocker.seen[name])
                self._keep_goals()
                self._open_late()  # it may have come while this was told

    async def _open_for(self, job: Job, volume: str) -> None:
        """Open a volume that a step of the job turned out to need."""
        if job.goal == BOOT and self.settings.volumes[volume].unlock is Unlock.MANUAL:
            raise KeyUnavailableError(f"{volume} is opened only when told to")
        await self.wait(self.begin(Goal(Verb.UNLOCK, volume), may_ask=job.may_ask))

    async def _libvirt_known(self) -> None:
        if not self.inventory.needs_libvirt or self._ports.domains.current().reachable:
            return
        try:
            await self._ports.domains.refresh(LIBVIRT_TIMEOUT_S)
            self._libvirt_error = None
        except VmcryptdError as error:
            self._libvirt_error = LibvirtError(f"{error}; guests start when it is back")
            log.error("%s", self._libvirt_error)
        self.inventory.observe()
        self._replans.notify()

    def is_running(self, step_id: StepId) -> bool:
        return step_id in self._running

    @property
    def running(self) -> Iterable[StepId]:
        """The steps under way."""
        return self._running.keys()

    def is_absent(self, name: str) -> bool:
        """Whether the volume's device is being waited for."""
        return name in self._steps.unlocker.absent

    def is_stuck(self, name: str) -> bool:
        """Whether the volume's sources are exhausted, and a person or a server is waited for."""
        return self._steps.unlocker.is_stuck(name)

    async def receive(self, fd: int) -> Key:
        """Read a caller's key; `fd` is closed. Raises KeyUnusableError."""
        return await self._ports.keys.receive(fd)

    async def ended(self, job: Job) -> None:
        await self.changes.until(lambda: job.id not in self.jobs)

    async def wait(self, job: Job) -> None:
        await self.ended(job)
        if job.error is not None:
            raise job.error

    def _stop_rising_jobs(self) -> None:
        for job in self.jobs.values():
            job.is_stopped = job.is_stopped or job.is_rising

    async def _cancel_rising(self) -> None:
        """End every attempt to bring something up, and wait until it has ended."""
        self._stop_rising_jobs()
        rising = {step_id for step_id, (_, job) in self._running.items() if job.is_rising}
        await self._cancel(rising, timeout_s=self.settings.daemon.shutdown_timeout_s)

    async def _give_up(self, volume: str) -> None:
        """End what is under way to open the volume, or to bring up something on it."""
        above = [volume]
        for name in above:
            above += [u for u in self.graph.standing_on.get(name, ()) if u not in above]
        steps = {StepId(action, name) for name in above for action in _RISING_VOLUME}
        steps |= {
            StepId(Action.START, g) for name in above for g in self.graph.guests_on.get(name, ())
        }
        await self._cancel(steps)

    async def _cancel(self, step_ids: set[StepId], timeout_s: float = Infinity) -> None:
        tasks = [task for step_id, (task, _) in self._running.items() if step_id in step_ids]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=None if timeout_s == Infinity else timeout_s)
        self._replans.notify()

    async def _lock_idle(self, volumes: Iterable[str], why: str) -> None:
        for name in volumes:
            log.info("volume %s is closed: %s", name, why)
            try:
                await self.pursue(Goal(Verb.LOCK, name))
            except VmcryptdError as error:
                log.warning("%s", error)

    async def _on_waiting(self, names: list[str]) -> None:
        log.warning("waiting for the key of %s; `vmcryptctl unlock` takes it", ", ".join(names))
        if self.settings.daemon.on_waiting:
            await self._ports.host.run_hook(
                self.settings.daemon.on_waiting, {"VMCRYPTD_WAITING": " ".join(names)}
            )

    def _may_ask(self, step_id: StepId) -> bool:
        return any(job.may_ask for job in self.jobs.values() if step_id in job.tasks)
