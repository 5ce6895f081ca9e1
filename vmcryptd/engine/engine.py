# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs that callers can use on the volumes and guests of a host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager

from vmcryptd.core import events, planner
from vmcryptd.core.errors import BusyError, NotAskedError, VmcryptdError
from vmcryptd.core.goals import LOCK_ALL, SHUTDOWN, Action, Goal, Plan, StepId, Verb
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import HostState, Lock, Settings
from vmcryptd.core.ports import Key, Ports
from vmcryptd.core.requester import REQUESTER
from vmcryptd.core.states import Activities, GuestView, VolumeView
from vmcryptd.engine.adoption import Adoption
from vmcryptd.engine.announcer import Announcer
from vmcryptd.engine.boot import BootPolicy
from vmcryptd.engine.derivation import Derivations
from vmcryptd.engine.hooks import Hooks
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Job, Jobs, together
from vmcryptd.engine.key_management import KeySlots
from vmcryptd.engine.keystores import Keystores
from vmcryptd.engine.opener import Opener
from vmcryptd.engine.opening import Openings
from vmcryptd.engine.operations import Operations
from vmcryptd.engine.panic import panic
from vmcryptd.engine.predecessors import Predecessors
from vmcryptd.engine.prompt import Prompt
from vmcryptd.engine.rotation import Rotations
from vmcryptd.engine.scheduler import Scheduler
from vmcryptd.engine.steps import Steps

log = logging.getLogger(__name__)

# Panic waits this long for running operations before it closes the volumes.
PANIC_CANCEL_S = 2.0
# A child that is killed ends within this, unless it hangs in the kernel.
KILLED_S = 5.0
# A header that is being changed is waited for on the way down, for so long.
CHANGE_S = 30.0


class Engine:
    """All volumes and guests of one host.

    Each part gets the parts built before it, and does not know those built later.
    """

    def __init__(self, settings: Settings, ports: Ports) -> None:
        self._ports = ports
        self.inventory = Inventory(settings, ports.blocks, ports.crypt, ports.domains, ports.memory)
        self.changes = self.inventory.changes
        self._activities = Activities(settings.volumes)
        self.inventory.rebuilt.watch(self._seen)
        self._jobs = Jobs(ports.memory, self.changes)
        self.operations = Operations(self._jobs)
        hooks = Hooks(ports.host, self.inventory)
        self.prompt = Prompt(ports.keys, self.changes.notify, hooks.waiting)
        self.inventory.rebuilt.watch(self.prompt.changes.notify)  # opened by hand, perhaps
        self.openings = Openings(self.inventory, self.prompt)
        self.derivations = Derivations(ports.crypt, self.inventory)
        self.key_slots = KeySlots(ports, self.inventory, self.derivations, self.operations)
        self.rotations = Rotations(
            ports, self.inventory, self.key_slots, self.derivations, self._jobs, self.operations
        )
        self.keystores = Keystores(ports, self.inventory, self._jobs, self.operations)
        opener = Opener(
            ports.crypt, ports.keys, self.inventory, self._activities, self.prompt, self.openings, self.derivations,
            self.key_slots,
        )  # fmt: skip
        self._adoption = Adoption(ports, self.inventory, self._activities, self._jobs)
        steps = Steps(
            ports,
            self.inventory,
            self._activities,
            self._jobs,
            opener,
            self.rotations,
            self._adoption,
        )
        predecessors = Predecessors(self.inventory, self.prompt, self.openings, opener)
        self.scheduler = Scheduler(self.inventory, self._jobs, self.openings, predecessors, steps)
        self._boot = BootPolicy(
            self.inventory, self._activities, self._jobs, self.openings, self.scheduler
        )
        self._announcer = Announcer(
            ports.host, ports.memory, self.inventory, self._activities, self.prompt, self._jobs,
            self.key_slots, self.rotations, self._boot, hooks,
        )  # fmt: skip

    # --- what is shown ---

    @property
    def settings(self) -> Settings:
        return self.inventory.settings

    @property
    def graph(self) -> Graph:
        return self.inventory.graph

    @property
    def jobs(self) -> Mapping[int, Job]:
        return self._jobs.running

    @property
    def booted(self) -> bool:
        return self._boot.booted

    @property
    def state(self) -> HostState:
        return self._announcer.state

    @property
    def waiting(self) -> list[str]:
        return self.prompt.waiting

    @property
    def off(self) -> list[str]:
        return self._announcer.off

    @property
    def host_error(self) -> str:
        return self._announcer.host_error

    @property
    def is_console_needed(self) -> bool:
        return self._announcer.is_console_needed

    def status_line(self, state: HostState) -> str:
        return self._announcer.status_line(state)

    def volume_views(self) -> list[VolumeView]:
        return self._announcer.volume_views()

    def guest_views(self) -> list[GuestView]:
        return self._announcer.guest_views()

    def plan(self, goal: Goal) -> Plan:
        """The plan for a goal now. Raises VmcryptdError."""
        self.inventory.observe()
        return planner.plan(self.graph, goal)

    # --- from start to end ---

    def start(self) -> None:
        """Look for the first time, and from then on whenever something changes."""
        self.inventory.start()
        self._seen()
        self._announcer.start()
        self._configured()
        self.rotations.start()
        self.keystores.start()

    def going_down(self) -> AbstractContextManager[None]:
        """Nothing comes up, or is announced as up, while this lasts: from before `start`, where all is to go down."""
        return self._jobs.going_down()

    def resume(self) -> None:
        """Continue what an earlier run of the daemon had begun."""
        self._boot.resume(self._ports.memory)

    def configure(self, settings: Settings) -> None:
        """Take a new configuration. Raises GraphError, and then the old one stays."""
        self.inventory.configure(settings)
        self.scheduler.cancel_gone()
        self._configured()

    def _configured(self) -> None:
        self.prompt.cache(self.settings.daemon.key_cache_s)
        self._boot.configure()
        self.inventory.rebuilt.notify()
        self.changes.notify()

    def _seen(self) -> None:
        self._activities.configure(self.settings.volumes)
        self._activities.seen(self.graph)

    def close(self) -> None:
        """Stop without closing or stopping anything; goals that are kept are taken up again by `resume`."""
        self._jobs.close()
        self.scheduler.close()
        self.rotations.close()
        self.prompt.close()

    async def background_done(self) -> None:
        """Wait until what goes on beside the jobs has ended."""
        await self._jobs.background_done()

    # --- bringing up ---

    async def look_before_boot(self) -> None:
        """See which guests start at boot now. Raises CancelledError when all goes down meanwhile, BusyError."""
        with self.operations.begun():
            await self.inventory.know_autostart()

    def boot(self) -> Job:
        """Bring up the boot set; returns at once."""
        job = self._boot.boot()
        self.prompt.declined = False
        return job

    async def unlock(self, name: str) -> None:
        """Open a volume and what it needs, asking where necessary. Raises what kept it closed."""
        await self.scheduler.pursue(Goal(Verb.UNLOCK, name))

    async def unlock_unattended(self, name: str) -> None:
        """The same without a question. Raises NotAskedError if a person is needed."""
        job = self.scheduler.begin(Goal(Verb.UNLOCK, name), may_ask=False)

        def is_asked_for() -> bool:
            return not set(self.waiting).isdisjoint(self.graph.beneath([name], still=True))

        await self.changes.until(lambda: job.id not in self.jobs or is_asked_for())
        if job.id in self.jobs:  # another caller has begun to open it
            raise NotAskedError(
                f"volume {name} waits for a passphrase; `vmcryptctl unlock {name}` asks for it"
            )
        await self.scheduler.wait(job)

    async def unlock_all(self) -> None:
        """Open the whole boot set, asking where necessary."""
        self.inventory.observe()
        volumes, _ = self.inventory.boot_set
        jobs = [
            self.scheduler.begin(Goal(Verb.UNLOCK, name), look=False)
            for name in volumes
            if not self.graph.volumes[name].is_open
        ]
        await asyncio.gather(*map(self.scheduler.ended, jobs))
        for job in jobs:
            if job.error is not None:
                raise job.error

    async def start_guest(self, name: str) -> None:
        """Open what a guest needs, then start it. Raises what kept it off."""
        await self.scheduler.pursue(Goal(Verb.START, name))

    async def receive(self, fd: int) -> Key:
        """Read a caller's key; `fd` is closed. Raises KeyUnusableError."""
        return await self._ports.keys.receive(fd)

    # --- bringing down ---

    async def stop_guest(self, name: str) -> None:
        """Stop a guest, then close what only it kept open. Raises what kept it up."""
        await self.scheduler.cancel([StepId(Action.START, name)])
        await self.scheduler.pursue(Goal(Verb.STOP, name))

    async def lock(self, name: str) -> None:
        """Close one volume that nothing uses. Raises BusyError naming the users."""
        self.inventory.observe()
        goal = Goal(Verb.LOCK, name)
        planner.plan(self.graph, goal)
        above = (v for v in self.operations.volumes & self.graph.volumes.keys())
        await self.operations.end_opening({v for v in above if name in self.graph.beneath([v])})
        await self.scheduler.cancel_opening(name)
        await self.scheduler.pursue(goal)

    async def lock_all(self) -> None:
        """Close every volume; refused as a whole while anything is used. Raises BusyError naming the users."""
        self.inventory.observe()
        planner.plan(self.graph, LOCK_ALL)
        with self._jobs.going_down(only_volumes=True):
            await self._cancel_rising()
            self._forget_boot()
            await self.scheduler.pursue(LOCK_ALL)

    async def shutdown(self) -> None:
        """Stop all guests and close all volumes. Failures are raised at the end; the rest is closed all the same."""
        with self._jobs.going_down():
            await self._shutdown()

    async def _shutdown(self) -> None:
        self._forget_boot()
        await self._cancel_rising()
        await self.inventory.know_libvirt_going_down()
        now = asyncio.get_running_loop().time()
        deadline = now + self.settings.daemon.shutdown_timeout_s
        job = self.scheduler.begin(SHUTDOWN, deadline=deadline)
        await self.scheduler.ended(job)
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
        """Kill guests, wipe keys and close mappings at once, past every error; errors are raised at the end."""
        with self._jobs.going_down():
            await self._panic()

    async def _panic(self) -> None:
        held = len(self.prompt.held)
        self._forget_boot()
        asked = REQUESTER.get()
        log.warning("panic: asked for by %s", asked, extra=events.fields(events.PANIC))
        log.warning("panic: keys dropped from memory: %d", held)
        self._jobs.stop_rising()
        opening = self.scheduler.opening()
        ended, _ = await asyncio.gather(
            self.operations.break_off(PANIC_CANCEL_S),
            self.scheduler.cancel(list(self.scheduler.running), PANIC_CANCEL_S),
        )
        self.prompt.wipe()  # an answer may have come meanwhile
        self._activities.forget()
        self.inventory.observe()
        errors = await panic(self.inventory, self._ports, self._release)
        late = {name: task for name, task in opening.items() if not task.done()}
        if late or not ended:
            errors |= await self._end_late(late)
            # A child may have made its mapping just before it was killed.
            errors |= await panic(self.inventory, self._ports, self._release)
        for name, error in errors.items():
            if name in self._activities.volumes:
                self._activities.volumes[name].error = error
        self.changes.notify()
        if errors:
            raise BusyError("; ".join(map(str, errors.values())))

    async def _release(self, name: str) -> str:
        """End what works on a volume; the name of its mapping, as far as it is known in time."""
        await self.rotations.abort(name, PANIC_CANCEL_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PANIC_CANCEL_S):
                return await self._adoption.mapping_to_close(name)
        return ""

    async def _end_late(
        self, opening: Mapping[str, asyncio.Task[None]]
    ) -> dict[str, VmcryptdError]:
        """Wait until all that has a key has ended, for KILLED_S. Returns what has not."""
        ended = asyncio.create_task(self.operations.break_off(KILLED_S))
        await asyncio.wait({*opening.values(), ended}, timeout=KILLED_S)
        advice = "its process hangs in the kernel and may still have the key (`journalctl -k`)"
        errors: dict[str, VmcryptdError] = {
            name: BusyError(f"volume {name}: an attempt to open it does not end: {advice}")
            for name, task in opening.items()
            if not task.done()
        }
        if not await ended:
            errors["keys"] = BusyError(f"a call with a key does not end: {advice}")
        for error in errors.values():
            log.error("panic: %s", error)
        self.inventory.observe()
        return errors

    async def _cancel_rising(self) -> None:
        timeout_s = self.settings.daemon.shutdown_timeout_s
        await asyncio.gather(
            self.operations.end(min(timeout_s, CHANGE_S)),
            self.scheduler.cancel_rising(timeout_s),
        )

    def _forget_boot(self) -> None:
        """Nothing is to come up by itself any more, and no key is held."""
        self._boot.forget()
        self.prompt.wipe()
