# SPDX-License-Identifier: LGPL-2.1-or-later
"""Executes plans: everything independent side by side, each step once however many callers wait for it.

The engine looks at the world through the ports, builds the graph, and pursues goals: it plans, starts the steps that
are new, and plans again when a step has ended or the world has changed, until nothing new is to be done.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from vmcryptd import planner
from vmcryptd.errors import (
    BusyError,
    DeviceMissingError,
    InternalError,
    LibvirtError,
    VmcryptdError,
)
from vmcryptd.graph import Graph
from vmcryptd.jobs import Job, JobState, is_rising
from vmcryptd.model import Action, HostState, Infinity, Lock, Plan, Settings, VolumeState
from vmcryptd.panic import panic
from vmcryptd.ports import Key, Ports
from vmcryptd.prompt import Prompt
from vmcryptd.state import (
    Activities,
    GuestView,
    VolumeView,
    guest_view,
    host_state,
    volume_state,
    volume_view,
)
from vmcryptd.steps import Steps
from vmcryptd.world import World

log = logging.getLogger(__name__)

LIBVIRT_TIMEOUT_S = 30.0


class Engine:
    """All volumes and guests of one host."""

    def __init__(
        self, settings: Settings, ports: Ports, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.world = World(settings, ports.blocks, ports.domains, ports.memory)
        self.world.on_rebuilt = self._rebuilt_graph
        self.jobs: dict[int, Job] = {}
        self.booted = False
        self.changed = changed
        self._ports = ports
        self._numbers = itertools.count(1)
        self._running: dict[str, tuple[asyncio.Task[None], Job]] = {}
        # Volumes of the boot set that are opened when their device appears.
        self._late: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._libvirt_error: VmcryptdError | None = None
        self._was_running: set[str] = set()
        self._target_reached: bool | None = None
        self._rebuilt = asyncio.Event()
        self._is_stopping = False
        self._is_closed = False
        self._told_status = ""
        self.prompt = Prompt(ports.keys, self._touch, self._on_waiting)
        self._activities = Activities(settings.volumes)
        self._steps = Steps(
            ports, self.world, self.prompt, self._activities, self._may_ask, self._touch
        )

    @property
    def settings(self) -> Settings:
        return self.world.settings

    @property
    def graph(self) -> Graph:
        return self.world.graph

    # --- looking ---

    def start(self) -> None:
        """Look for the first time, and from then on whenever something changes."""
        self.world.start()
        self._configured()

    def close(self) -> None:
        """Stop without closing or stopping anything; goals that are kept are taken up again by `resume`."""
        self._is_closed = True
        for job in self.jobs.values():
            job.is_stopped = True
        for task, _ in self._running.values():
            task.cancel()
        self.prompt.close()

    def configure(self, settings: Settings) -> None:
        """Take a new configuration. Raises GraphError, and then the old one stays."""
        self.world.configure(settings)
        self._configured()
        self._replan()

    def _configured(self) -> None:
        settings = self.settings
        self.prompt.key_cache_s = settings.daemon.key_cache_s
        self._activities.configure(settings.volumes)
        self._after_look()
        self._touch()

    def resume(self) -> None:
        """Take up again what an earlier run of the daemon was about to do."""
        goals = self._ports.memory.goals()
        self.booted = "up" in goals or "boot" in goals
        self._late.update(goal.removeprefix("late:") for goal in goals if goal.startswith("late:"))
        self._late &= set(self.settings.volumes)
        for goal in goals:
            if goal == "boot" or goal.startswith(("unlock:", "start:")):
                try:
                    self.begin(goal)
                except VmcryptdError as error:
                    log.warning(
                        "%s was not finished before the restart and is not taken up again: %s",
                        goal,
                        error,
                    )
        if self._late:
            self.world.changed()

    def _rebuilt_graph(self) -> None:
        self._after_look()
        self._touch()
        self._replan()

    def _replan(self) -> None:
        """Let every job plan again."""
        rebuilt, self._rebuilt = self._rebuilt, asyncio.Event()
        rebuilt.set()

    def _after_look(self) -> None:
        for name, node in self.graph.volumes.items():
            activity = self._activities.volumes[name]
            if node.is_open:
                if activity.doing is None or activity.doing is VolumeState.WAITING:
                    activity.error = None
                self._late.discard(name)
            elif activity.doing is None:
                activity.key_source = ""
        running = {name for name, node in self.graph.guests.items() if node.is_running}
        for name in running:
            self._activities.guest(name).error = None
        if not self._is_stopping:
            for name in (self._was_running - running) & set(self.graph.guests):
                for volume in planner.idle_volumes(self.graph, name):
                    self._spawn(self._lock_idle(volume, name))
        self._was_running = running
        if self.booted and any(self.graph.volumes[name].device for name in self._late):
            self._late = {name for name in self._late if not self.graph.volumes[name].device}
            self._begin_quietly("boot")
        if self._libvirt_error is not None and self.graph.libvirt_reachable:
            self._libvirt_error = None
            if self.booted:
                self._begin_quietly("boot")

    def _touch(self) -> None:
        """Something visible changed: wake who waits for it, and tell the bus."""
        self.world.moved()
        state = self.state
        if state is HostState.READY and self._target_reached is not True:
            self._target_reached = True
            self._spawn(self._ports.host.reach_target(True))
        elif state in (HostState.STOPPING, HostState.LOCKED) and self._target_reached is True:
            self._target_reached = False
            self._spawn(self._ports.host.reach_target(False))
        if (line := self.status_line(state)) != self._told_status:
            self._told_status = line
            self._ports.host.status(line)
        self.changed()

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
    def waiting(self) -> list[str]:
        return self.prompt.waiting

    @property
    def is_console_needed(self) -> bool:
        """Whether a question for a person is open or may still come while the host boots."""
        return (
            bool(self.prompt.expected)
            and not self.prompt.declined
            and any(j.goal == "boot" for j in self.jobs.values())
        )

    @property
    def state(self) -> HostState:
        volumes, guests = planner.boot_set(self.graph)
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
            volume_view(self.graph, name, self._activities.volumes[name])
            for name in self.graph.volumes
        ]

    def guest_views(self) -> list[GuestView]:
        return [
            guest_view(self.graph, name, self._activities.guest(name)) for name in self.graph.guests
        ]

    def plan(self, goal: str) -> Plan:
        """What the goal would take now. Raises VmcryptdError."""
        self.world.observe()
        return planner.plan(self.graph, goal)

    # --- the verbs ---

    def boot(self) -> Job:
        """Bring up the boot set; returns at once."""
        self.booted = True
        self.prompt.declined = False
        return self.begin("boot")

    async def unlock(self, name: str) -> None:
        """Open a volume and what it needs, asking where necessary. Raises what kept it closed."""
        await self.pursue(f"unlock:{name}")

    async def pursue(self, goal: str) -> None:
        """Reach a goal and wait for its end. Raises what it failed by."""
        job = self.begin(goal)
        await self.wait(job)

    async def unlock_all(self) -> None:
        """Open the whole boot set, asking where necessary."""
        self.world.observe()
        volumes, _ = planner.boot_set(self.graph)
        jobs = [
            self.begin(f"unlock:{name}") for name in volumes if not self.graph.volumes[name].is_open
        ]
        await asyncio.gather(*(self.ended(job) for job in jobs))
        for job in jobs:
            if job.error is not None:
                raise job.error

    async def lock(self, name: str) -> None:
        """Close one volume that nothing uses. Raises BusyError naming the users."""
        self.world.observe()
        planner.plan(self.graph, f"lock:{name}")
        await self._give_up(name)
        await self.pursue(f"lock:{name}")

    async def lock_all(self) -> None:
        """Close every volume; refused as a whole while anything is used. Raises BusyError naming the users."""
        self.world.observe()
        planner.plan(self.graph, "lock-all")
        await self._cancel_rising()
        self._forget_boot()
        await self.pursue("lock-all")

    async def shutdown(self) -> None:
        """The whole way down. What fails is told at the end; the rest is closed all the same."""
        self._is_stopping = True
        try:
            await self._shutdown()
        finally:
            self._is_stopping = False
            self._touch()

    async def _shutdown(self) -> None:
        self._touch()
        self._forget_boot()
        await self._cancel_rising()
        if self.world.needs_libvirt and not self._ports.domains.current().reachable:
            try:
                await self._ports.domains.refresh(LIBVIRT_TIMEOUT_S)
            except VmcryptdError as error:
                log.warning(
                    "%s; guests cannot be stopped, what they do not hold is closed all the same",
                    error,
                )
        self.world.observe()
        now = asyncio.get_running_loop().time()
        job = self.begin("shutdown", deadline=now + self.settings.daemon.shutdown_timeout_s)
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
            raise next(iter(failures.values()))

    async def panic(self) -> None:
        """Now: guests killed, keys wiped, mappings closed; goes on past every error and tells them at the end."""
        self._is_stopping = True
        try:
            await self._panic()
        finally:
            self._is_stopping = False
            self._touch()

    async def _panic(self) -> None:
        self._touch()
        self._forget_boot()
        for task, _ in list(self._running.values()):
            task.cancel()
        await self._cancel_rising()
        self.world.observe()
        if errors := await panic(self.world, self._ports):
            raise BusyError("; ".join(errors))

    # --- jobs ---

    def _forget_boot(self) -> None:
        """Nothing is to come up by itself any more, and no key is held."""
        self.booted = False
        self._late.clear()
        self._libvirt_error = None
        self.prompt.wipe()

    def begin(self, goal: str, *, may_ask: bool = True, deadline: float = Infinity) -> Job:
        for job in self.jobs.values():
            if job.goal == goal and goal != "panic":
                job.may_ask = job.may_ask or may_ask
                job.forget_failures()  # asked for again: tried again
                self._replan()
                return job
        if is_rising(goal) and self._is_stopping:
            raise BusyError("everything is being stopped and closed; try again when that is done")
        self.world.observe()
        first = planner.plan(self.graph, goal)
        job = self._register(Job(next(self._numbers), goal, may_ask, deadline))
        self._add_steps(job, first)
        job.task = asyncio.create_task(self._pursue(job))
        self._touch()
        return job

    def _begin_quietly(self, goal: str) -> None:
        try:
            self.begin(goal)
        except VmcryptdError as error:
            log.warning("%s: %s", goal, error)

    def _register(self, job: Job) -> Job:
        self.jobs[job.id] = job
        self._keep_goals()
        return job

    def _keep_goals(self) -> None:
        if self._is_closed:
            return
        goals = [job.goal for job in self.jobs.values() if job.is_rising and job.may_ask]
        goals += [f"late:{name}" for name in sorted(self._late)]
        if self.booted:
            goals.append("up")
        self._ports.memory.keep_goals(goals)

    async def _pursue(self, job: Job) -> None:
        libvirt = asyncio.create_task(self._libvirt_known()) if job.goal == "boot" else None
        try:
            while True:
                rebuilt = self._rebuilt
                self._add_steps(job, self._plan_again(job))
                if job.is_idle and (libvirt is None or libvirt.done() or job.is_stopped):
                    break
                await rebuilt.wait()
            job.error = next(iter(job.failures().values()), None)
        except Exception:
            log.exception("job %s (%s) broke off", job.id, job.goal)
            job.error = InternalError("an internal error; the journal has the details")
        finally:
            if libvirt is not None:
                libvirt.cancel()
            self._finish(job)

    def _finish(self, job: Job) -> None:
        job.state = JobState.FAILED if job.error else JobState.DONE
        self.jobs.pop(job.id, None)
        if job.goal == "boot":
            self._late.update(
                name
                for name in self.graph.volumes
                if isinstance(self._activities.volumes[name].error, DeviceMissingError)
                and f"{Action.UNLOCK}:{name}" in job.tasks
            )
        self._keep_goals()
        self._touch()

    def _plan_again(self, job: Job) -> Plan:
        try:
            return planner.plan(self.graph, job.goal)
        except VmcryptdError:
            return Plan(job.goal)  # what it was about is gone, or in use by now: no new steps

    def _add_steps(self, job: Job, plan: Plan) -> None:
        for step in plan.steps:
            if step.id in job.tasks or job.is_stopped:
                continue
            running = self._running.get(step.id)
            if running is None:
                task = asyncio.create_task(self._steps.run(job, step), name=step.id)
                self._running[step.id] = (task, job)
                task.add_done_callback(self._step_done)
                if step.action is Action.UNLOCK and self.settings.volumes[step.object].asks:
                    self.prompt.expect(step.object)
            else:
                task, _ = running
            job.tasks[step.id] = task

    def _step_done(self, task: asyncio.Task[None]) -> None:
        step_id = task.get_name()
        self._running.pop(step_id, None)
        if step_id.startswith(f"{Action.UNLOCK}:"):
            self.prompt.release(step_id.partition(":")[2])
        self._touch()
        self._replan()
        if (
            not task.cancelled()
            and (error := task.exception()) is not None
            and not isinstance(error, VmcryptdError)
        ):
            log.error("%s failed by a fault of vmcryptd", task.get_name(), exc_info=error)

    async def _libvirt_known(self) -> None:
        if not self.world.needs_libvirt or self._ports.domains.current().reachable:
            return
        try:
            await self._ports.domains.refresh(LIBVIRT_TIMEOUT_S)
            self._libvirt_error = None
        except VmcryptdError as error:
            self._libvirt_error = LibvirtError(f"{error}; guests start when it is back")
            log.error("%s", self._libvirt_error)
        self.world.observe()
        self._replan()

    def is_running(self, step_id: str) -> bool:
        return step_id in self._running

    @property
    def running(self) -> Iterable[str]:
        """The steps under way."""
        return self._running.keys()

    def is_absent(self, name: str) -> bool:
        """Whether the volume's device is being waited for."""
        return name in self._steps.unlocker.absent

    async def receive(self, fd: int) -> Key:
        """Read a caller's key; `fd` is closed. Raises KeyUnusableError."""
        return await self._ports.keys.receive(fd)

    async def ended(self, job: Job) -> None:
        while job.id in self.jobs:
            await self.world.move()

    async def wait(self, job: Job) -> None:
        await self.ended(job)
        if job.error is not None:
            raise job.error

    async def _cancel_rising(self) -> None:
        """End every attempt to bring something up, and wait until it has ended."""
        for job in self.jobs.values():
            job.is_stopped = job.is_stopped or job.is_rising
        rising = [task for task, job in self._running.values() if job.is_rising]
        for task in rising:
            task.cancel()
        if rising:
            await asyncio.wait(rising)
        self._replan()

    async def _give_up(self, volume: str) -> None:
        """End an attempt to open the volume that is still under way."""
        running = self._running.get(f"{Action.UNLOCK}:{volume}")
        if running is not None:
            running[0].cancel()
            await asyncio.wait({running[0]})

    async def _lock_idle(self, volume: str, guest: str) -> None:
        log.info("volume %s: guest %s was the last to use it, it is closed", volume, guest)
        try:
            await self.pursue(f"lock:{volume}")
        except BusyError as error:
            log.warning("%s", error)

    async def _on_waiting(self, names: list[str]) -> None:
        log.warning("waiting for the key of %s; `vmcryptctl unlock` takes it", ", ".join(names))
        if self.settings.daemon.on_waiting:
            await self._ports.host.run_hook(
                self.settings.daemon.on_waiting, {"VMCRYPTD_WAITING": " ".join(names)}
            )

    def _may_ask(self, step_id: str) -> bool:
        return any(job.may_ask for job in self.jobs.values() if step_id in job.tasks)
