# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carries out each action of a plan through the ports."""

from __future__ import annotations

import logging

from vmcryptd.core import events
from vmcryptd.core.errors import BusyError
from vmcryptd.core.goals import Action, Step
from vmcryptd.core.graph import VolumeNode
from vmcryptd.core.model import Content, GuestState, VolumeState
from vmcryptd.core.ports import Ports
from vmcryptd.core.requester import REQUESTER
from vmcryptd.core.states import Activities, Activity
from vmcryptd.engine.adoption import Adoption
from vmcryptd.engine.guests import Guests
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, Jobs
from vmcryptd.engine.opener import Opener
from vmcryptd.engine.rotation import GRACE_S, Rotations

log = logging.getLogger(__name__)


class Steps:
    """Does one step, once all that it stands behind is done."""

    def __init__(
        self,
        ports: Ports,
        inventory: Inventory,
        activities: Activities,
        jobs: Jobs,
        opener: Opener,
        rotations: Rotations,
        adoption: Adoption,
    ) -> None:
        self._ports = ports
        self._inventory = inventory
        self._activities = activities
        self._jobs = jobs
        self._opener = opener
        self._rotations = rotations
        self._adoption = adoption
        self._guests = Guests(ports.domains, inventory)

    def activity(self, step: Step) -> Activity:
        """The activity of the step's volume or guest; a new one for objects without a shown state."""
        match step.action:
            case Action.START | Action.STOP:
                return self._activities.guest(step.object)
            case Action.START_POOL | Action.STOP_POOL:
                return Activity()
        return self._activities.volumes.get(step.object) or Activity()

    def show(self, activity: Activity, doing: VolumeState | GuestState) -> None:
        activity.doing = doing
        self._inventory.changes.notify()

    async def do(self, job: Job, step: Step, activity: Activity) -> None:
        """Raises VmcryptdError."""
        name, domains = step.object, self._ports.domains
        match step.action:
            case Action.START:
                guests = self._inventory.graph.guests
                for need in guests[name].needs if name in guests else ():
                    await self._adoption.rename(need)
                await self._guests.start(name, any(name in o.spec.after for o in guests.values()))
                log.info("guest %s is started", name)
            case Action.STOP:
                self.show(activity, GuestState.STOPPING)
                await self._guests.stop(name, job.deadline)
                log.info("guest %s is stopped", name)
            case Action.START_POOL:
                await domains.start_pool(name)
            case Action.STOP_POOL:
                await domains.stop_pool(name)
            case _ if name in self._inventory.graph.volumes:
                await self._do_volume(step, self._inventory.graph.volumes[name], activity)

    async def _do_volume(self, step: Step, node: VolumeNode, activity: Activity) -> None:
        name, blocks = step.object, self._ports.blocks
        match step.action:
            case Action.UNLOCK if not node.is_usable:
                source = await self._opener.open(name, lambda: self._jobs.may_ask(step.id))
                self.is_opened(name, source)
            case Action.ACTIVATE:
                nodes = self._inventory.graph.volumes.values()
                others = [n for n in nodes if n.spec.content is Content.LVM and n is not node]
                beside = [other.mapping for other in others if other.is_usable]
                locked = [other.spec for other in others if not other.is_usable]
                await blocks.activate(node.spec, node.mapping, beside, locked)
                self._inventory.activated.add(name)
            case Action.MOUNT:
                await blocks.mount(node.spec, node.mapping)
            case Action.UNMOUNT:
                await blocks.unmount(node.spec, node.mapping)
            case Action.DEACTIVATE:
                await blocks.deactivate(node.spec, node.mapping)
                self._inventory.activated.discard(name)
            case Action.LOCK if node.is_open:
                self.show(activity, VolumeState.LOCKING)
                await self._rotations.stop(name, GRACE_S)
                if mapping := await self._adoption.mapping_to_close(name):
                    await self._close(name, mapping)
                asked = REQUESTER.get()
                extra = self._inventory.event(events.LOCK, name)
                log.info("volume %s is closed, asked for by %s", name, asked, extra=extra)

    def is_opened(self, name: str, source: str) -> None:
        """Note what has opened the volume."""
        activity = self._activities.volumes[name]
        activity.key_source, activity.error = source, None
        by = source or "opened from outside"
        # The user of the key counts, not the one whose question it answers.
        giver = activity.giver if source == "key" else None
        log.info(
            "volume %s is open (%s), asked for by %s",
            name, by, giver or REQUESTER.get(),
            extra=self._inventory.event(events.UNLOCK, name, source=source, requester=giver),
        )  # fmt: skip

    async def _close(self, name: str, mapping: str) -> None:
        try:
            await self._ports.crypt.close(mapping)
        except BusyError:
            holders = await self._ports.blocks.holders(mapping)
            used_by = ", ".join(holders) or "the kernel (no holder is visible)"
            error = BusyError(
                f"volume {name} cannot be closed, it is in use by {used_by}; "
                f"stop that, then `vmcryptctl lock {name}`"
            )
            log.warning("%s", error, extra=self._inventory.event(events.LOCK, name, error=error))
            raise error from None
