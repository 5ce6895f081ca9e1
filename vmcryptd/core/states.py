# SPDX-License-Identifier: LGPL-2.1-or-later
"""Derives the states that users see from observations and activities. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vmcryptd.core.errors import (
    CancelledError,
    DependencyError,
    DeviceMissingError,
    DeviceUnreadableError,
    GuestDiedError,
    LibvirtError,
    NotAskedError,
    VmcryptdError,
)
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import GuestState, HostState, VolumeState
from vmcryptd.core.requester import Requester

# Errors with their cause outside of the volume.
_NOT_ITS_OWN = (DeviceMissingError, DependencyError, CancelledError, NotAskedError)


@dataclass
class Activity:
    """The running action on one volume or guest, and the result of the last attempt."""

    doing: VolumeState | GuestState | None = None
    error: VmcryptdError | None = None
    key_source: str = ""
    giver: Requester | None = None  # of the key that was handed in last and fitted

    @property
    def has_failed_by_itself(self) -> bool:
        """Whether another attempt is pointless until the volume or guest itself changes."""
        passing = (DependencyError, CancelledError, LibvirtError)
        return self.doing is None and self.error is not None and not isinstance(self.error, passing)


class Activities:
    """The activity of every volume and guest."""

    def __init__(self, volumes: Iterable[str]) -> None:
        self.volumes = {name: Activity() for name in volumes}
        self._guests: dict[str, Activity] = {}

    def configure(self, volumes: Iterable[str]) -> None:
        """Keep the activities of these volumes, forget the others."""
        self.volumes = {name: self.volumes.get(name) or Activity() for name in volumes}

    def seen(self, graph: Graph) -> None:
        """Clear errors of what is up, and key sources of what is closed."""
        for name, node in graph.volumes.items():
            activity = self.volumes[name]
            if node.is_usable:
                if activity.doing is None or activity.doing is VolumeState.WAITING:
                    activity.error = None
            elif activity.doing is None:
                activity.key_source = ""
        for name, guest in graph.guests.items():
            died = isinstance(self.guest(name).error, GuestDiedError)
            if not guest.trouble and (guest.is_up or died):
                self.guest(name).error = None

    def died(self, name: str, trouble: str) -> GuestDiedError | None:
        """Note that a guest died; returns the error if it is new."""
        activity = self.guest(name)
        if activity.doing is not None or isinstance(activity.error, GuestDiedError):
            return None
        activity.error = error = GuestDiedError(f"guest {name} {trouble}")
        return error

    def forget(self) -> None:
        """Forget errors of bringing up, because everything goes down."""
        for _, activity in self.all():
            activity.error = None

    def guest(self, name: str) -> Activity:
        return self._guests.setdefault(name, Activity())

    def errors(self) -> dict[str, VmcryptdError]:
        """`volume NAME` or `guest NAME` → why it has failed."""
        volumes = {f"volume {n}": one.error for n, one in self.volumes.items() if one.error}
        return volumes | {f"guest {n}": one.error for n, one in self._guests.items() if one.error}

    def restore(self, errors: Mapping[str, VmcryptdError], graph: Graph) -> None:
        """Take over an earlier daemon's errors of volumes and guests that exist and are still down."""
        for of, error in errors.items():
            kind, _, name = of.partition(" ")
            if kind == "volume" and name in graph.volumes and not graph.volumes[name].is_open:
                self.volumes[name].error = error
            elif kind == "guest" and not (name in graph.guests and graph.guests[name].is_running):
                self.guest(name).error = error

    def all(self) -> Iterable[tuple[str, Activity]]:
        return (*self.volumes.items(), *self._guests.items())


class VolumeView(NamedTuple):
    """The state of one volume, as shown to users."""

    name: str
    device: str
    uuid: str
    state: VolumeState
    key_source: str
    discard: bool
    needed_by: tuple[str, ...]
    header_backup_due: bool
    rotation: str  # rotation of its volume key: running, unfinished; else empty
    error: str


class GuestView(NamedTuple):
    """The state of one guest, as shown to users."""

    name: str
    state: GuestState
    needs: tuple[str, ...]
    starts_at_boot: bool
    error: str


def volume_state(graph: Graph, name: str, activity: Activity) -> VolumeState:
    node = graph.volumes[name]
    if isinstance(activity.doing, VolumeState):
        return activity.doing
    if node.is_open:
        return VolumeState.SUSPENDED if node.suspended else VolumeState.UNLOCKED
    if isinstance(activity.error, DeviceUnreadableError):
        has_failed = not node.absent
    else:
        has_failed = activity.error is not None and not isinstance(activity.error, _NOT_ITS_OWN)
    if has_failed:
        return VolumeState.FAILED
    if node.rivals:
        return VolumeState.FAILED
    if node.absent and not graph.is_explained(name):
        return VolumeState.MISSING
    return VolumeState.LOCKED


def volume_view(
    graph: Graph,
    name: str,
    activity: Activity,
    *,
    header_backup_due: bool = False,
    rotation: str = "",
) -> VolumeView:
    node = graph.volumes[name]
    needed_by = (
        *graph.standing_on.get(name, ()),
        *graph.opened_after.get(name, ()),
        *graph.guests_on.get(name, ()),
    )
    return VolumeView(
        name=name,
        device=node.spec.device,
        uuid=node.uuid,
        state=volume_state(graph, name, activity),
        key_source=activity.key_source if node.is_open else "",
        discard=node.spec.discard,
        needed_by=tuple(dict.fromkeys(needed_by)),
        header_backup_due=header_backup_due,
        rotation=rotation,
        error=str(activity.error or node.trouble),
    )


def guest_view(graph: Graph, name: str, activity: Activity) -> GuestView:
    node = graph.guests[name]
    doing = activity.doing
    # libvirt's state wins: a guest that runs is no longer starting.
    if doing is GuestState.STARTING and node.is_running:
        doing = None
    return GuestView(
        name=name,
        state=doing if isinstance(doing, GuestState) else node.state,
        needs=node.needs,
        starts_at_boot=node.starts_at_boot,
        error=str(activity.error or ""),
    )


def host_state(
    volumes: Iterable[VolumeState],
    guests: Iterable[tuple[GuestState, bool]],
    *,
    stopping: bool,
    rising: bool,
    waiting: bool,
    booted: bool,
    failed: bool,
) -> HostState:
    """The state of the host. A guest that was shut down does not count; one that died has an error.

    `volumes` and `guests` (each with a flag: has an error) are those of the boot set. `rising`: a job that brings
    something up is running; `booted`: boot was requested and not cancelled; `failed`: it failed in a way that no volume
    or guest shows.
    """
    if stopping:
        return HostState.STOPPING
    if waiting:
        return HostState.WAITING
    if rising:
        return HostState.UNLOCKING
    volumes, guests = list(volumes), list(guests)
    is_open = [state is VolumeState.UNLOCKED for state in volumes]
    if any(error for _, error in guests) or (failed and booted):
        return HostState.DEGRADED
    if all(is_open) and (booted or all(state is GuestState.RUNNING for state, _ in guests)):
        return HostState.READY
    if booted and (
        any(is_open) or any(s in (VolumeState.FAILED, VolumeState.MISSING) for s in volumes)
    ):
        return HostState.DEGRADED
    return HostState.LOCKED
