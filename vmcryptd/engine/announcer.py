# SPDX-License-Identifier: LGPL-2.1-or-later
"""Computes the shown states of host, volumes and guests, and keeps systemd's status line and target up to date."""

from __future__ import annotations

from vmcryptd.core.errors import VmcryptdError, named
from vmcryptd.core.goals import BOOT
from vmcryptd.core.model import GuestState, HostState, VolumeState
from vmcryptd.core.ports import Host, Memory, Reason
from vmcryptd.core.states import (
    Activities,
    GuestView,
    VolumeView,
    guest_view,
    host_state,
    volume_state,
    volume_view,
)
from vmcryptd.core.wording import few
from vmcryptd.engine.boot import BootPolicy
from vmcryptd.engine.hooks import Hooks
from vmcryptd.engine.inventory import Inventory
from vmcryptd.engine.jobs import Jobs
from vmcryptd.engine.key_management import KeySlots
from vmcryptd.engine.prompt import Prompt
from vmcryptd.engine.rotation import Rotations


class Announcer:
    """Announces changes to systemd, and keeps them for the next daemon."""

    def __init__(
        self,
        host: Host,
        memory: Memory,
        inventory: Inventory,
        activities: Activities,
        prompt: Prompt,
        jobs: Jobs,
        key_slots: KeySlots,
        rotations: Rotations,
        boot: BootPolicy,
        hooks: Hooks,
    ) -> None:
        self._host = host
        self._memory = memory
        self._inventory = inventory
        self._activities = activities
        self._prompt = prompt
        self._jobs = jobs
        self._key_slots = key_slots
        self._rotations = rotations
        self._boot = boot
        self._hooks = hooks
        self._reported: set[str] | None = None  # what has failed since the host became degraded
        self._status = ""  # as systemd knows it
        self._sources: dict[str, str] = {}  # as kept for the next daemon
        self._errors: dict[str, VmcryptdError] = {}  # the same
        self._is_target_wanted: bool | None = None
        self._is_target_reached: bool | None = None
        self._is_moving_target = False
        inventory.changes.watch(self._announce)

    def start(self) -> None:
        """Show what an earlier run of the daemon has kept."""
        self._sources = self._memory.sources()
        volumes = self._inventory.graph.volumes
        for name, source in self._sources.items():
            if name in volumes and volumes[name].is_open:
                self._activities.volumes[name].key_source = source
        reasons = self._memory.reasons()
        for reason in reasons.values():
            self._inventory.redacted.learn_text(reason.text, reason.shown)
        self._errors = {of: named(reason.error, reason.text) for of, reason in reasons.items()}
        self._activities.restore(self._errors, self._inventory.graph)

    # --- states ---

    @property
    def state(self) -> HostState:
        graph = self._inventory.graph
        volumes, guests = self._inventory.boot_set
        return host_state(
            (volume_state(graph, name, self._activities.volumes[name]) for name in volumes),
            ((graph.guests[n].state, bool(self._activities.guest(n).error)) for n in guests),
            stopping=self._jobs.is_going_down,
            rising=self._jobs.is_rising,
            waiting=bool(self._prompt.waiting),
            booted=self._boot.booted,
            failed=self._inventory.libvirt_error is not None,
        )

    @property
    def reasons(self) -> dict[str, str]:
        """Why the boot set is not up: name → reason. The name of libvirt itself is empty."""
        graph, found = self._inventory.graph, {}
        volumes, guests = self._inventory.boot_set
        if self._inventory.libvirt_error is not None:
            found[""] = str(self._inventory.libvirt_error)
        for name in volumes:
            view = volume_view(graph, name, self._activities.volumes[name])
            if view.state is not VolumeState.UNLOCKED:
                found[name] = view.error or f"volume {name} is {view.state}"
        for name in guests:
            guest = guest_view(graph, name, self._activities.guest(name))
            if guest.error or guest.state is GuestState.CRASHED:
                reason = guest.error or f"guest {name} has crashed"
                found[name] = f"{found[name]}; {reason}" if name in found else reason
        return found

    @property
    def off(self) -> list[str]:
        """Guests of the boot set that are off, for whatever reason."""
        graph = self._inventory.graph
        return [name for name in self._inventory.boot_set[1] if not graph.guests[name].is_running]

    @property
    def host_error(self) -> str:
        """The error of the host as a whole: libvirt is away. Else empty."""
        return str(self._inventory.libvirt_error or self._inventory.graph.libvirt_error)

    @property
    def is_console_needed(self) -> bool:
        """Whether a question for a person is open or may still come while the host boots."""
        return (
            (bool(self._prompt.expected) or self._prompt.is_asking_pin)
            and not self._prompt.declined
            and any(job.goal == BOOT for job in self._jobs.running.values())
        )

    def status_line(self, state: HostState) -> str:
        graph = self._inventory.graph
        match state:
            case HostState.WAITING:
                return f"Waiting for the key of {few(self._prompt.waiting)}: vmcryptctl unlock"
            case HostState.DEGRADED:
                return f"Degraded: {few(list(filter(None, self.reasons))) or self.host_error}"
        count = sum(node.is_open for node in graph.volumes.values())
        return f"{str(state).capitalize()}: {count} of {len(graph.volumes)} volumes open"

    def volume_views(self) -> list[VolumeView]:
        return [
            volume_view(
                self._inventory.graph,
                name,
                self._activities.volumes[name],
                header_backup_due=bool(self._key_slots.backup_due_since(name)),
                rotation=self._rotations.state(name),
            )
            for name in self._inventory.graph.volumes
        ]

    def guest_views(self) -> list[GuestView]:
        graph = self._inventory.graph
        return [guest_view(graph, name, self._activities.guest(name)) for name in graph.guests]

    # --- announcements ---

    def _announce(self) -> None:
        self._keep_sources()
        self._keep_errors()
        state = self.state
        if state is HostState.READY and self._is_target_wanted is not True:
            self._want_target(True)
        elif state in (HostState.STOPPING, HostState.LOCKED) and self._is_target_wanted is True:
            self._want_target(False)
        self._report(state)
        if (line := self.status_line(state)) != self._status:
            self._status = line
            self._host.status(line)

    def _report(self, state: HostState) -> None:
        """Log when the host becomes degraded, and each later failure."""
        if state in (HostState.READY, HostState.STOPPING) or not self._boot.booted:
            self._reported = None
            return
        if state is not HostState.DEGRADED:
            return
        reasons = self.reasons
        if self._reported is None or not reasons.keys() <= self._reported:
            self._reported = (self._reported or set()).union(reasons)
            self._jobs.spawn(self._hooks.failed(reasons))

    def _keep_sources(self) -> None:
        volumes = self._activities.volumes.items()
        sources = {name: activity.key_source for name, activity in volumes if activity.key_source}
        if sources != self._sources:
            self._sources = sources
            self._memory.keep_sources(sources)

    def _keep_errors(self) -> None:
        if self._jobs.is_closed:
            return  # what is broken off now has not succeeded
        errors = self._activities.errors()
        if errors == self._errors:
            return
        self._errors = errors
        # The next daemon may have another configuration, and would not know what to hide.
        redacted = self._inventory.redacted
        self._memory.keep_reasons(
            {
                of: Reason(one.name, redacted.without_tokens(str(one)), redacted(str(one)))
                for of, one in errors.items()
            }
        )

    def _want_target(self, is_wanted: bool) -> None:
        self._is_target_wanted = is_wanted
        if not self._is_moving_target:
            self._is_moving_target = True
            self._jobs.spawn(self._move_target())

    async def _move_target(self) -> None:
        """Start or stop the target, one request at a time: two could arrive in the wrong order."""
        try:
            while (wanted := self._is_target_wanted) is not self._is_target_reached:
                if wanted is None:
                    return
                await self._host.reach_target(wanted)
                self._is_target_reached = wanted
        finally:
            self._is_moving_target = False
