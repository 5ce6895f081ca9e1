# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carries out one step of a plan, once all that it stands behind is done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from vmcryptd.core import planner
from vmcryptd.core.errors import BusyError, DependencyError, LibvirtError, VmcryptdError
from vmcryptd.core.goals import Action, Goal, Step, StepId, Verb
from vmcryptd.core.graph import VolumeNode
from vmcryptd.core.model import GuestState, VolumeState
from vmcryptd.core.ports import Ports
from vmcryptd.core.states import Activities, Activity
from vmcryptd.engine.guests import Guests
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, outcome
from vmcryptd.engine.opener import FinishRotation, Unlocker
from vmcryptd.engine.prompt import Answer, Prompt

log = logging.getLogger(__name__)


class Steps:
    """What each action means, in terms of the ports."""

    def __init__(
        self,
        ports: Ports,
        inventory: Inventory,
        prompt: Prompt,
        activities: Activities,
        may_ask: Callable[[StepId], bool],
        touch: Callable[[], None],
        open_for: Callable[[Job, str], Awaitable[None]],
        stop_rotation: Callable[[str], Awaitable[None]],
        finish_rotation: FinishRotation,
    ) -> None:
        self.unlocker = Unlocker(
            ports.crypt,
            finish_rotation,
            ports.keys,
            prompt,
            inventory,
            self._unlocking,
            self._still_locked,
        )
        self._ports = ports
        self._inventory = inventory
        self._activities = activities
        self._prompt = prompt
        self._may_ask = may_ask
        self._touch = touch
        self._open_for = open_for
        self._stop_rotation = stop_rotation
        self._guests = Guests(ports.domains, inventory)

    async def run(self, job: Job, step: Step) -> None:
        """Raises VmcryptdError; DependencyError if something it needs failed."""
        activity = self._activity(step)
        try:
            opened_by = await self._behind(job, step, activity)
            activity.error = None
            if opened_by is not None:
                self._is_opened(step.object, opened_by)
                return
            log.debug("%s (%s)", step.id, step.reason)
            await self._do(job, step, activity)
        except VmcryptdError as error:
            if not _is_told(job, step, error):
                activity.error = error
                log.error("%s", error)
            raise
        except asyncio.CancelledError:
            activity.error = None  # what was told while it waited is not why it ended
            raise
        finally:
            activity.doing = None
            await self._inventory.look()

    async def _behind(self, job: Job, step: Step, activity: Activity) -> str | None:
        """Wait for the steps before this one. Raises DependencyError.

        Who waits for a keystore tries the answers that do not fit that one: its passphrase may be lost, or the person
        know only the volume's. Returns what has opened the volume meanwhile; None if nothing has.
        """
        await _precede(job, step, step.after)
        if not step.order:
            return None
        if step.action is not Action.UNLOCK:
            await _precede(job, step, step.order)
            return None
        name = step.object
        with self._prompt.behind(name, lambda answer: self._is_left(job, name, answer)):
            waiting = asyncio.ensure_future(_precede(job, step, step.order))
            try:
                while not waiting.done():
                    passed_on = asyncio.ensure_future(self._prompt.passed_on(name))
                    try:
                        both = {waiting, passed_on}
                        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        passed_on.cancel()
                    if not waiting.done():
                        opened_by = await self.unlocker.open_by(name, passed_on.result())
                        if opened_by is not None:
                            return opened_by
                        activity.doing = None
                        self._touch()
            finally:
                waiting.cancel()
        return None

    def _is_left(self, job: Job, name: str, answer: Answer) -> bool:
        """Whether the answer opens none of the keystores that the volume waits for, as far as these are there."""
        volumes = self._inventory.graph.volumes
        if name not in volumes or not volumes[name].device:
            return False

        def leaves(keystore: str) -> bool:
            if volumes[keystore].is_usable:
                return False  # the key in it comes next
            unlocking = job.tasks.get(StepId(Action.UNLOCK, keystore))
            if unlocking is None or unlocking.done() or keystore in self.unlocker.absent:
                return True
            is_tried = answer.is_for(keystore) and (
                answer.only is not None or keystore in self._prompt.expected
            )
            return keystore in answer.refused or (not is_tried and self.unlocker.is_stuck(keystore))

        return all(map(leaves, volumes[name].keys_in))

    def _is_opened(self, name: str, source: str) -> None:
        activity = self._activities.volumes[name]
        activity.key_source, activity.error = source, None
        log.info("volume %s is open (%s)", name, source or "opened by somebody else")

    def _activity(self, step: Step) -> Activity:
        match step.action:
            case Action.START | Action.STOP:
                return self._activities.guest(step.object)
            case Action.START_POOL | Action.STOP_POOL:
                return Activity()
        return self._activities.volumes.get(step.object) or Activity()

    async def _do(self, job: Job, step: Step, activity: Activity) -> None:
        name, domains = step.object, self._ports.domains
        match step.action:
            case Action.START:
                self._show(activity, GuestState.STARTING)
                await self._open_late_needs(job, step)
                guests = self._inventory.graph.guests
                await self._guests.start(name, any(name in o.spec.after for o in guests.values()))
                log.info("guest %s is started", name)
            case Action.STOP:
                self._show(activity, GuestState.STOPPING)
                await self._guests.stop(name, job.deadline)
                log.info("guest %s is stopped", name)
            case Action.START_POOL:
                await domains.start_pool(name)
            case Action.STOP_POOL:
                await domains.stop_pool(name)
            case _ if name in self._inventory.graph.volumes:
                await self._do_volume(step, self._inventory.graph.volumes[name], activity)

    async def _open_late_needs(self, job: Job, step: Step) -> None:
        """What a disk image is backed by shows only once that can be read: when the plan is long made."""
        tried: set[str] = set()
        while True:
            await self._inventory.chains_known()
            graph = self._inventory.graph
            needs = graph.guests[step.object].needs
            late = [
                need
                for need in needs
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
                    raise DependencyError(
                        f"{step.action} {step.object} was not tried, "
                        f"because unlock {need} failed: {error}"
                    ) from None

    async def _do_volume(self, step: Step, node: VolumeNode, activity: Activity) -> None:
        name, blocks = step.object, self._ports.blocks
        match step.action:
            case Action.UNLOCK if not node.is_usable:
                source = await self.unlocker.open(name, lambda: self._may_ask(step.id))
                self._is_opened(name, source)
            case Action.ACTIVATE:
                await blocks.activate(node.spec, node.mapping)
                self._inventory.activated.add(name)
            case Action.MOUNT:
                await blocks.mount(node.spec, node.mapping)
            case Action.UNMOUNT:
                await blocks.unmount(node.spec, node.mapping)
            case Action.DEACTIVATE:
                await blocks.deactivate(node.spec, node.mapping)
                self._inventory.activated.discard(name)
            case Action.LOCK if node.is_open:
                self._show(activity, VolumeState.LOCKING)
                await self._stop_rotation(name)
                await self._close(name, node.mapping)
                log.info("volume %s is closed", name)

    async def _close(self, name: str, mapping: str) -> None:
        try:
            await self._ports.crypt.close(mapping)
        except BusyError:
            holders = await self._ports.blocks.holders(mapping)
            used_by = ", ".join(holders) or "the kernel (no holder is visible)"
            raise BusyError(
                f"volume {name} cannot be closed, it is in use by {used_by}; "
                f"stop that, then `vmcryptctl lock {name}`"
            ) from None

    def _unlocking(self, name: str, is_busy: bool) -> None:
        activity = self._activities.volumes[name]
        self._show(activity, VolumeState.UNLOCKING if is_busy else VolumeState.WAITING)

    def _still_locked(self, name: str, error: VmcryptdError) -> None:
        self._activities.volumes[name].error = error
        self._touch()

    def _show(self, activity: Activity, doing: VolumeState | GuestState) -> None:
        activity.doing = doing
        self._touch()


def _is_told(job: Job, step: Step, error: VmcryptdError) -> bool:
    """Whether it failed because an earlier step of the same volume did: that one has told why."""
    before = [other for other in step.after if other.object == step.object]
    return isinstance(error, DependencyError) and any(
        outcome(job.tasks[other]) for other in before if other in job.tasks
    )


async def _precede(job: Job, step: Step, before: Iterable[StepId]) -> None:
    """Wait for these steps, which come before this one. Raises DependencyError."""
    tasks = {other: job.tasks[other] for other in before if other in job.tasks}
    if tasks:
        await asyncio.wait(tasks.values())
    for other in step.after:
        if other in tasks and (error := outcome(tasks[other])) is not None:
            if isinstance(error, LibvirtError) and other.action in (Action.STOP, Action.STOP_POOL):
                # libvirt does not say whether it has stopped. The kernel does: it closes nothing that is in use.
                continue
            raise DependencyError(
                f"{step.action} {step.object} was not tried, "
                f"because {other.action} {other.object} failed: {error}"
            )
