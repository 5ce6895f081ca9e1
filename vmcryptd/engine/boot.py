# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decides what starts without a request: late volumes of boot, their guests, and closing idle volumes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Iterable

from vmcryptd.core import planner
from vmcryptd.core.errors import (
    AmbiguousDeviceError,
    DependencyError,
    DeviceMissingError,
    KeyFileMissingError,
    LibvirtError,
    VmcryptdError,
)
from vmcryptd.core.goals import BOOT, Action, Goal, StepId, Verb
from vmcryptd.core.model import Lock
from vmcryptd.core.ports import Memory
from vmcryptd.core.requester import by_itself
from vmcryptd.core.states import Activities
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, Jobs, Unasked
from vmcryptd.engine.late import Late
from vmcryptd.engine.opening import Openings
from vmcryptd.engine.scheduler import Scheduler

log = logging.getLogger(__name__)

# Kept beside the goals: that boot was requested, and the volumes that it opens when their device appears.
_UP, _LATE = "up", "late:"
# Errors of a volume that lacks its device, the right one of several, or its key file.
_LACKS = (AmbiguousDeviceError, DeviceMissingError, KeyFileMissingError)


class BootPolicy:
    """Whether boot was requested, and what follows from that."""

    def __init__(
        self,
        inventory: Inventory,
        activities: Activities,
        jobs: Jobs,
        openings: Openings,
        scheduler: Scheduler,
    ) -> None:
        self.booted = False  # requested, and not cancelled
        self._inventory = inventory
        self._activities = activities
        self._jobs = jobs
        self._openings = openings
        self._scheduler = scheduler
        self._late = Late(inventory)
        # Parts of the boot set that have been up since the request: if they are down now, that was on purpose.
        self._came_up: set[StepId] = set()
        self._was_running: dict[str, tuple[str, ...]] = {}  # guest → what it needs
        self._was_usable: set[str] = set()
        self._keystores: set[str] = set()  # opened for others, to be closed when nothing comes up
        inventory.rebuilt.watch(self._look)
        scheduler.on_step.append(self._note_late)
        scheduler.on_job.append(self._close_keystores)

    def boot(self) -> Job:
        """Bring up the boot set, on request. Raises VmcryptdError."""
        before, self.booted = self.booted, True
        try:
            job = self._scheduler.begin(BOOT)
        except VmcryptdError:
            self.booted = before
            raise
        self._came_up.clear()
        self._note_up()
        self._keep()
        return job

    def resume(self, memory: Memory) -> None:
        """Continue what an earlier run of the daemon had begun."""
        with self._jobs.kept_at_once():
            self._resume(memory.goals())
        self._open_late()

    def _resume(self, goals: Collection[str]) -> None:
        self.booted = not {_UP, str(BOOT)}.isdisjoint(goals)
        for name in self._inventory.settings.volumes:
            if f"{_LATE}{name}" in goals:
                self._late.expect(name)
        self._keep()
        for text in goals:
            if text == _UP or text.startswith(_LATE):
                continue
            try:
                self._scheduler.begin(Goal.parse(text))
            except VmcryptdError as error:
                log.warning(
                    "%s was not finished before the restart and is not taken up again: %s",
                    text,
                    error,
                )

    def forget(self) -> None:
        """Nothing is to come up by itself any more, and what has not is no failure."""
        self.booted = False
        self._late.clear()
        self._came_up.clear()
        self._inventory.libvirt_error = None
        self._activities.forget()
        self._keep()

    def configure(self) -> None:
        """Forget late comers that are not configured any more."""
        self._late.keep_only(self._inventory.settings.volumes)
        self._keep()

    def _keep(self) -> None:
        late = (f"{_LATE}{name}" for name in self._late.names)
        self._jobs.keep_beside(*late, *([_UP] if self.booted else ()))

    def _begin(self, goal: Goal, arrived: Container[str] = ()) -> None:
        """Continue boot without a new request: what was up and is down again stays down.

        Of what has failed only volumes that have `arrived` are tried again.
        """
        self._inventory.observe()
        unasked = Unasked(frozenset(self._came_up), self._failed(arrived))
        try:
            with by_itself():
                self._scheduler.begin(goal, look=False, unasked=unasked)
        except VmcryptdError as error:
            log.warning("%s: %s", goal, error)

    def _failed(self, arrived: Container[str]) -> frozenset[StepId]:
        """Steps of boot that have failed for a reason of their own, or for one of those: they wait for their own news.

        `arrived`: volumes that may open now.
        """
        graph = self._inventory.graph
        volumes = [
            name
            for name, node in graph.volumes.items()
            if not node.is_open
            and name not in arrived
            and self._activities.volumes[name].has_failed_by_itself
        ]
        for name in volumes:
            above = (*graph.standing_on.get(name, ()), *graph.opened_after.get(name, ()))
            volumes += [
                upper
                for upper in above
                if upper not in volumes
                and upper not in arrived
                and not graph.volumes[upper].is_open
            ]
        guests = [guest for name in volumes for guest in graph.guests_on.get(name, ())]
        guests += [n for n in graph.guests if self._activities.guest(n).has_failed_by_itself]
        return frozenset(
            (
                *(StepId(Action.UNLOCK, name) for name in volumes),
                *(StepId(Action.START, guest) for guest in guests),
            )
        )

    # --- the graph was rebuilt ---

    def _look(self) -> None:
        graph = self._inventory.graph
        for name, node in graph.volumes.items():
            if node.is_open:
                self._late.discard(name)
        self._keep()
        self._note_up()
        self._note_deaths()
        self._close_idle()
        self._start_guests()
        self._open_late()
        if self._inventory.libvirt_error is not None and graph.libvirt_reachable:
            self._inventory.libvirt_error = None
            if self.booted:
                self._begin(BOOT)
        elif self._inventory.libvirt_error is None and graph.libvirt_error:
            self._inventory.libvirt_error = LibvirtError(graph.libvirt_error)

    def _note_deaths(self) -> None:
        for name, node in self._inventory.graph.guests.items():
            if not node.trouble or not (self.booted or name in self._was_running):
                continue
            if error := self._activities.died(name, node.trouble):
                log.error("%s", error)

    def _note_up(self) -> None:
        if not self.booted:
            return
        graph = self._inventory.graph
        volumes, guests = graph.volumes.items(), graph.guests.items()
        self._came_up.update(StepId(Action.UNLOCK, name) for name, node in volumes if node.is_open)
        self._came_up.update(StepId(Action.START, name) for name, node in guests if node.is_up)

    def _open_late(self) -> None:
        if self.booted and (arrived := self._late.arrived()):
            self._keep()
            self._begin(BOOT, arrived)

    def _close_idle(self) -> None:
        """Close what only guests that have stopped since the last look used (lock = "guest")."""
        graph = self._inventory.graph
        if not graph.libvirt_reachable:
            return  # what is not seen now has not stopped for that
        was_running = self._was_running
        running = {
            name: node.needs
            for name, node in graph.guests.items()
            if node.is_up or (node.is_running and name in was_running)
        }
        stopped = {name: needs for name, needs in was_running.items() if name not in running}
        self._was_running = running
        for name, needs in stopped.items():
            idle = [] if self._jobs.is_going_down else planner.idle_volumes(graph, needs, name)
            if idle:
                self._jobs.spawn(self._lock(idle, f"guest {name} was the last to use it"))

    def _start_guests(self) -> None:
        """Start the guests of boot whose locked volume is open now."""
        graph = self._inventory.graph
        usable = {name for name, node in graph.volumes.items() if node.is_usable}
        fresh, self._was_usable = usable - self._was_usable, usable
        if not self.booted or self._jobs.is_going_down:
            return
        for name in dict.fromkeys(g for v in fresh for g in graph.guests_on.get(v, ())):
            node, activity = graph.guests[name], self._activities.guest(name)
            failed = isinstance(activity.error, DependencyError) and activity.doing is None
            if failed and node.starts_at_boot and usable.issuperset(node.needs):
                self._begin(Goal(Verb.START, name))

    # --- a step or job has ended ---

    def _note_late(self, step_id: StepId, error: VmcryptdError | None) -> None:
        """A volume of the boot set that lacks something is opened when that comes."""
        name = step_id.object
        lacks = step_id.action is Action.UNLOCK and isinstance(error, _LACKS)
        if lacks and self.booted and name in self._inventory.boot_set[0]:
            self._late.rest(name, self._openings.of(name).seen)
            self._keep()
            self._open_late()  # it may have come in this moment

    def _close_keystores(self, job: Job) -> None:
        """Close keystores (lock = "boot") when nothing is being brought up any more."""
        volumes = self._inventory.graph.volumes
        if job.is_rising and job.goal != BOOT:
            self._keystores.update(
                name
                for name, node in volumes.items()
                if node.spec.lock is Lock.BOOT
                and StepId(Action.UNLOCK, name) in job.tasks
                and job.goal != Goal(Verb.UNLOCK, name)
            )
        if not self._keystores or self._jobs.is_rising:
            return
        keystores, self._keystores = self._keystores, set()
        if not self._jobs.is_going_down and not self._jobs.is_closed:
            users = self._inventory.graph.users
            idle = [n for n in keystores if n in volumes and volumes[n].is_open and not users(n)]
            self._jobs.spawn(self._lock(idle, "nothing is opened with it any more"))

    async def _lock(self, volumes: Iterable[str], why: str) -> None:
        for name in volumes:
            log.info("volume %s is closed: %s", name, why)
            try:
                with by_itself():
                    await self._scheduler.pursue(Goal(Verb.LOCK, name))
            except VmcryptdError as error:
                log.warning("%s", error)
