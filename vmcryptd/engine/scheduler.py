# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the jobs: independent steps in parallel, each step once for all callers that wait for it.

A job plans on the inventory's graph, begins the steps that are new, and plans again when a step has ended or the graph
has changed, until nothing new is to be done.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection, Iterable

from vmcryptd.core import planner
from vmcryptd.core.errors import (
    BusyError,
    InternalError,
    KeyUnavailableError,
    VmcryptdError,
)
from vmcryptd.core.goals import BOOT, Action, Goal, Plan, Step, StepId, Verb
from vmcryptd.core.model import GuestState, Infinity, Unlock
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, Jobs, Unasked, outcome
from vmcryptd.engine.opening import Openings
from vmcryptd.engine.predecessors import Predecessors, is_reported, not_tried
from vmcryptd.engine.steps import Steps
from vmcryptd.posix.changes import Changes

log = logging.getLogger(__name__)

RISING_VOLUME = (Action.UNLOCK, Action.ACTIVATE, Action.MOUNT)
_CLOSING_VOLUME = (Action.UNMOUNT, Action.DEACTIVATE, Action.LOCK)


class Scheduler:
    """The jobs that take steps, and the steps that are under way for them."""

    def __init__(
        self,
        inventory: Inventory,
        jobs: Jobs,
        openings: Openings,
        predecessors: Predecessors,
        steps: Steps,
    ) -> None:
        self._inventory = inventory
        self._jobs = jobs
        self._openings = openings
        self._predecessors = predecessors
        self._steps = steps
        self._running: dict[StepId, tuple[asyncio.Task[None], Job]] = {}
        # A guest's start waits for volumes beneath it that are closing; no other volume beneath it is closed meanwhile.
        self._starting: set[str] = set()  # guests
        self._closing: set[StepId] = set()
        self._replans = Changes()  # each job is to plan again
        # Called when a step or job has ended.
        self.on_step: list[Callable[[StepId, VmcryptdError | None], None]] = []
        self.on_job: list[Callable[[Job], None]] = []
        inventory.rebuilt.watch(self._replans.notify)

    @property
    def running(self) -> Collection[StepId]:
        """The steps under way."""
        return self._running.keys()

    def opening(self) -> dict[str, asyncio.Task[None]]:
        """The volumes that are being opened, each with its step."""
        return {
            step_id.object: task
            for step_id, (task, _) in self._running.items()
            if step_id.action is Action.UNLOCK
        }

    def close(self) -> None:
        for task, _ in self._running.values():
            task.cancel()
        self._replans.notify()

    # --- jobs ---

    def begin(
        self,
        goal: Goal,
        *,
        may_ask: bool = True,
        deadline: float = Infinity,
        look: bool = True,
        unasked: Unasked | None = None,
    ) -> Job:
        """Pursue a goal, or join the job that pursues it; `look` first, unless that was just done.

        `unasked` is given by what begins by itself. Raises VmcryptdError.
        """
        self._jobs.check_may_begin(rising=goal.is_rising)
        if look:
            self._inventory.observe()
        for job in self._jobs.running.values():
            if job.goal == goal and not job.is_stopped:
                self._join(job, may_ask, unasked)
                return job
        without = unasked.steps if unasked else frozenset()
        first = planner.plan(self._inventory.graph, goal, without)
        job = self._jobs.register(goal, may_ask, without, deadline)
        self._add_steps(job, first)
        job.task = asyncio.create_task(self._pursue(job))
        self._inventory.changes.notify()
        return job

    def _join(self, job: Job, may_ask: bool, unasked: Unasked | None) -> None:
        job.may_ask = job.may_ask or may_ask
        if job.without:
            job.without = unasked.steps if unasked else frozenset()
            job.planned = None
        again = () if unasked else self._plan(job).steps
        job.forget({step.id for step in again}, unasked.failed if unasked else ())
        self._replans.notify()

    async def ended(self, job: Job) -> None:
        """Wait until the job has ended, however."""
        await self._jobs.ended(job)

    async def wait(self, job: Job) -> None:
        """Wait until the job has ended. Raises what it failed by."""
        await self._jobs.ended(job)
        if job.error is not None:
            raise job.error

    async def pursue(self, goal: Goal) -> None:
        """Reach a goal and wait for its end. Raises what it failed by."""
        await self.wait(self.begin(goal))

    async def _pursue(self, job: Job) -> None:
        libvirt = None
        if job.goal == BOOT:
            libvirt = asyncio.create_task(self._inventory.know_libvirt())
            libvirt.add_done_callback(lambda _: self._replans.notify())
        try:
            while True:
                self._add_steps(job, self._plan(job))
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
            self._end(job)

    def _end(self, job: Job) -> None:
        self._jobs.end(job)
        if undone := {step: task for step, task in job.tasks.items() if not task.done()}:
            others = {
                task for other in self._jobs.running.values() for task in other.tasks.values()
            }
            for step_id, task in undone.items():
                if task not in others:
                    self._call_off(step_id, task)
        for listener in self.on_job:
            listener(job)

    def _plan(self, job: Job) -> Plan:
        graph = self._inventory.graph
        if job.planned is not None and job.planned[0] is graph:
            return job.planned[1]
        try:
            job.planned = graph, planner.plan(graph, job.goal, job.without)
            return job.planned[1]
        except VmcryptdError:
            return Plan(job.goal)  # what it was about is gone, or in use by now: no new steps

    # --- what a job can do without ---

    def _needless(self, job: Job) -> set[StepId]:
        """Steps of the job that its goal can do without: of keystores, once other keys have opened what it wants."""
        graph = self._inventory.graph
        keystores = {name for node in graph.volumes.values() for name in node.keys_in}
        wanted = [n for n in self._wanted(job.goal) if n in graph.volumes] if keystores else []
        if not wanted:
            return set()
        needed = graph.bearing(wanted).union(graph.beneath(wanted, still=True))
        needless = set(graph.beneath(keystores)) - needed
        return {
            step_id
            for step_id in job.tasks
            if step_id.action in RISING_VOLUME and step_id.object in needless
        }

    def _wanted(self, goal: Goal) -> tuple[str, ...]:
        """The volumes that a goal is to have open at its end."""
        graph = self._inventory.graph
        if goal == BOOT:
            volumes, guests = self._inventory.boot_set
            needs = [need for guest in guests for need in graph.guests[guest].needs]
            return (*volumes, *needs)
        if goal.verb is Verb.START and goal.name in graph.guests:
            return graph.guests[goal.name].needs
        return (goal.name,) if goal.verb is Verb.UNLOCK else ()

    def _call_off_needless(self) -> None:
        """A keystore is not asked for any more once other keys have opened all that it is wanted for."""
        needless = [(job, self._needless(job)) for job in self._jobs.running.values()]
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
            self._openings.end(step_id.object)

    def _is_undone(self, job: Job) -> bool:
        """Whether what the job wants to be up is open still, but just being closed."""
        verb, name = job.goal
        if verb is not Verb.UNLOCK or name not in self._inventory.graph.volumes:
            return False
        # A keystore is closed when it has done its work; what it opened does not wait for that.
        wanted = self._inventory.graph.beneath([name], still=True)
        return any(
            StepId(action, volume) in self._running
            for action in _CLOSING_VOLUME
            for volume in wanted
        )

    # --- steps ---

    def _add_steps(self, job: Job, plan: Plan) -> None:
        for step in plan.steps:
            if step.id in job.tasks or job.is_stopped:
                continue
            running = self._running.get(step.id)
            if running is None or running[0].done():
                task = asyncio.create_task(self._run(job, step))
                self._running[step.id] = (task, job)
                task.add_done_callback(functools.partial(self._step_done, step.id))
                if step.action is Action.UNLOCK:
                    self._openings.plan(step.object)
            else:
                task, _ = running
            job.tasks[step.id] = task

    async def _run(self, job: Job, step: Step) -> None:
        """One step from the first wait to its end. Raises VmcryptdError; DependencyError if what it needs failed."""
        activity = self._steps.activity(step)
        try:
            opened_by = await self._predecessors.ended(job, step, activity)
            activity.error = None
            if opened_by is not None:
                self._steps.is_opened(step.object, opened_by)
                return
            log.debug("%s (%s)", step.id, step.reason)
            if step.action is Action.START:
                self._starting.add(step.object)
                self._steps.show(activity, GuestState.STARTING)
                await self._closings_ended(step.object)
                await self._open_late_needs(job, step)
            elif step.action in _CLOSING_VOLUME:
                if not self._may_close(job, step):
                    return
                self._closing.add(step.id)
            await self._steps.do(job, step, activity)
        except VmcryptdError as error:
            if not is_reported(step, error):
                activity.error = error
                log.error("%s", error)
            raise
        except asyncio.CancelledError:
            activity.error = None  # what was shown while it waited is not why it ended
            raise
        finally:
            activity.doing = None
            self._closing.discard(step.id)
            if step.action is Action.START:
                self._starting.discard(step.object)
            await self._inventory.look()

    def _may_close(self, job: Job, step: Step) -> bool:
        """Whether no guest is being started on the volume, which libvirt may not show yet. Raises BusyError.

        On the way down of everything, starts have been cancelled before.
        """
        if job.goal.verb not in (Verb.LOCK, Verb.STOP):
            return True
        guests = self._inventory.graph.guests_on.get(step.object, ())
        starting = [name for name in guests if name in self._starting and name != job.goal.name]
        if not starting:
            return True
        text = f"volume {step.object}: it stays open, because guest {starting[0]} is being started"
        if job.goal.verb is Verb.LOCK:
            raise BusyError(f"{text}; `vmcryptctl stop {starting[0]}` stops that")
        log.info("%s", text)  # the guest that was to be stopped is
        return False

    async def _closings_ended(self, guest: str) -> None:
        """Wait until what is being closed beneath a guest is closed; then it can be opened again."""
        while True:
            graph = self._inventory.graph
            needs = graph.guests[guest].needs if guest in graph.guests else ()
            volumes = graph.beneath(needs)
            closing = [
                self._running[step_id][0]
                for step_id in self._closing & self._running.keys()
                if step_id.object in volumes
            ]
            if not closing:
                return
            await asyncio.wait(closing)

    async def _open_late_needs(self, job: Job, step: Step) -> None:
        """Open what a disk image is backed by: that shows only once it can be read, when the plan is long made."""
        tried: set[str] = set()
        while True:
            await self._inventory.chains_known(step.object)
            graph = self._inventory.graph
            guest = graph.guests.get(step.object)
            late = [
                need
                for need in (guest.needs if guest else ())
                if need not in tried and planner.plan(graph, Goal(Verb.UNLOCK, need)).steps
            ]
            if not late:
                return
            tried.update(late)
            for need in late:
                log.info("guest %s needs volume %s, as its disk images tell", step.object, need)
                try:
                    await self._open_for(job, need)
                except VmcryptdError as error:
                    raise not_tried(step, StepId(Action.UNLOCK, need), error) from None

    async def _open_for(self, job: Job, volume: str) -> None:
        """Open a volume that a step of the job turned out to need."""
        spec = self._inventory.settings.volumes[volume]
        if job.goal == BOOT and spec.unlock is Unlock.MANUAL:
            raise KeyUnavailableError(
                f'volume {volume} is opened only when asked for (unlock = "manual"): '
                f"`vmcryptctl unlock {volume}`"
            )
        await self.wait(self.begin(Goal(Verb.UNLOCK, volume), may_ask=job.may_ask))

    def _step_done(self, step_id: StepId, task: asyncio.Task[None]) -> None:
        if self._running.get(step_id, (task,))[0] is not task:
            return  # begun again meanwhile
        self._running.pop(step_id, None)
        error = outcome(task)
        for listener in self.on_step:
            listener(step_id, error)
        action, name = step_id
        if action is Action.UNLOCK:
            volume = self._inventory.graph.volumes.get(name)
            if volume is not None and volume.keys_in:
                self._call_off_needless()
            self._openings.end(name)
        self._inventory.changes.notify()
        self._replans.notify()
        if isinstance(error, InternalError):
            log.error("%s failed by a fault of vmcryptd", step_id, exc_info=task.exception())

    # --- cancelling ---

    async def cancel_rising(self, timeout_s: float) -> None:
        """End every attempt to bring something up, and wait until it has ended."""
        self._jobs.stop_rising()
        rising = {step_id for step_id, (_, job) in self._running.items() if job.is_rising}
        await self.cancel(rising, timeout_s)

    async def cancel_opening(self, volume: str) -> None:
        """End what is under way to open the volume, or to bring up something on it."""
        graph = self._inventory.graph
        above = [volume]
        for name in above:
            above += [u for u in graph.standing_on.get(name, ()) if u not in above]
        steps = {StepId(action, name) for name in above for action in RISING_VOLUME}
        steps |= {StepId(Action.START, g) for name in above for g in graph.guests_on.get(name, ())}
        await self.cancel(steps)

    def cancel_gone(self) -> None:
        """End what is under way to open volumes that are not configured any more."""
        for step_id, (task, job) in self._running.items():
            gone = step_id.object not in self._inventory.settings.volumes
            if gone and step_id.action in RISING_VOLUME and job.is_rising:
                task.cancel()

    async def cancel(self, steps: Iterable[StepId], timeout_s: float = Infinity) -> None:
        """End these steps, and wait until they have ended, or for so long."""
        tasks = [self._running[step_id][0] for step_id in steps if step_id in self._running]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=None if timeout_s == Infinity else timeout_s)
        self._replans.notify()
