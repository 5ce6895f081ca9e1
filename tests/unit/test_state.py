# SPDX-License-Identifier: LGPL-2.1-or-later
"""The states that users see."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from vmcryptd.core import graph as graphs
from vmcryptd.core.errors import (
    CancelledError,
    DependencyError,
    DeviceMissingError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import (
    BlockDevice,
    DiskSource,
    Domain,
    GuestState,
    HostState,
    Observation,
    Settings,
    SourceType,
    Storage,
    Virtualisation,
    VolumeSpec,
    VolumeState,
)
from vmcryptd.core.states import (
    Activities,
    Activity,
    guest_view,
    host_state,
    volume_state,
    volume_view,
)

UP, OFF = VolumeState.UNLOCKED, VolumeState.LOCKED
RUNS, STOPPED = GuestState.RUNNING, GuestState.OFF


def graph(*, there: bool = True, opened: bool = False, suspended: bool = False) -> Graph:
    devices = {"sda": BlockDevice("sda")} if there else {}
    if opened:
        dm_uuid = f"CRYPT-LUKS2-{0:032x}-a"
        devices["dm-0"] = BlockDevice("dm-0", "", ("sda",), "a", dm_uuid, suspended)
    known = Domain(
        "g", "g", RUNS, autostart=True, sources=(DiskSource(SourceType.BLOCK, "/dev/mapper/a"),)
    )
    specs = {
        "a": VolumeSpec("a", "/dev/sda", discard=True),
        "b": VolumeSpec("b", "/dev/mapper/a"),
    }
    return graphs.build(
        Settings(volumes=specs),
        Observation(
            storage=Storage(devices, {"/dev/sda": "sda"} if there else {}),
            virtualisation=Virtualisation(True, {"g": known}),
        ),
    )


@pytest.mark.parametrize(
    ("seen", "activity", "state"),
    [
        ({}, Activity(), VolumeState.LOCKED),
        ({"opened": True}, Activity(), VolumeState.UNLOCKED),
        ({"opened": True, "suspended": True}, Activity(), VolumeState.SUSPENDED),
        ({"there": False}, Activity(), VolumeState.MISSING),
        ({}, Activity(error=WrongKeyError()), VolumeState.FAILED),
        ({"there": False}, Activity(error=WrongKeyError()), VolumeState.FAILED),
        ({"opened": True}, Activity(error=WrongKeyError()), VolumeState.UNLOCKED),
        ({}, Activity(error=DeviceMissingError()), VolumeState.LOCKED),
        ({"there": False}, Activity(error=DeviceMissingError()), VolumeState.MISSING),
        ({}, Activity(error=DependencyError("x")), VolumeState.LOCKED),
        ({}, Activity(error=CancelledError()), VolumeState.LOCKED),
        *(({}, Activity(doing=state), state)
          for state in (VolumeState.WAITING, VolumeState.UNLOCKING)),
        ({"opened": True}, Activity(doing=VolumeState.LOCKING), VolumeState.LOCKING),
    ],
)  # fmt: skip
def test_volumes(seen: dict[str, bool], activity: Activity, state: VolumeState) -> None:
    assert volume_state(graph(**seen), "a", activity) is state


def test_a_missing_device_on_a_locked_volume_is_locked() -> None:
    assert volume_state(graph(), "b", Activity()) is VolumeState.LOCKED
    assert volume_state(graph(opened=True), "b", Activity()) is VolumeState.MISSING


def test_views() -> None:
    view = volume_view(
        graph(opened=True), "a", Activity(key_source="prompt", error=WrongKeyError("x"))
    )
    assert (view.device, view.key_source, view.discard, view.needed_by, view.error) == (
        "/dev/sda", "prompt", True, ("b", "g"), "x"
    )  # fmt: skip
    assert volume_view(graph(), "a", Activity(key_source="prompt")).key_source == ""
    guest = guest_view(graph(), "g", Activity(doing=GuestState.STARTING))
    assert (guest.state, guest.needs, guest.starts_at_boot) == (RUNS, ("a",), True)
    assert (
        guest_view(graph(), "g", Activity(doing=GuestState.STOPPING)).state is GuestState.STOPPING
    )


def test_activities_survive_a_reload() -> None:
    activities = Activities(["a", "b"])
    kept = activities.volumes["a"]
    activities.guest("g").key_source = "x"
    activities.configure(["a", "c"])
    assert activities.volumes["a"] is kept
    assert set(activities.volumes) == {"a", "c"}
    assert activities.guest("g").key_source == "x"


def state(volumes: Any = (), guests: Any = (), **flags: bool) -> HostState:
    given = dict.fromkeys(("stopping", "rising", "waiting", "booted", "failed"), False)
    return host_state(volumes, guests, **{**given, **flags})


@pytest.mark.parametrize(
    ("volumes", "guests", "flags", "expected"),
    [
        ([UP], [(RUNS, False)], {}, HostState.READY),
        ([UP], [(STOPPED, False)], {}, HostState.LOCKED),
        ([UP], [(STOPPED, False)], {"booted": True}, HostState.READY),  # it was stopped by hand
        ([UP], [(STOPPED, True)], {"booted": True}, HostState.DEGRADED),
        ([UP, OFF], [], {"booted": True}, HostState.DEGRADED),
        ([UP, OFF], [], {}, HostState.LOCKED),
        ([OFF], [], {"booted": True}, HostState.LOCKED),
        ([VolumeState.FAILED], [], {"booted": True}, HostState.DEGRADED),
        ([VolumeState.MISSING], [], {"booted": True}, HostState.DEGRADED),
        ([VolumeState.MISSING], [], {}, HostState.LOCKED),
        ([VolumeState.SUSPENDED], [], {}, HostState.LOCKED),
        ([UP], [], {"booted": True, "failed": True}, HostState.DEGRADED),
        ([], [], {}, HostState.READY),
        ([OFF], [], {"rising": True}, HostState.UNLOCKING),
    ],
)
def test_the_whole(volumes: Any, guests: Any, flags: dict[str, bool], expected: HostState) -> None:
    assert state(volumes, guests, **flags) is expected


def test_what_goes_before_what() -> None:
    order = {
        "stopping": HostState.STOPPING,
        "waiting": HostState.WAITING,
        "rising": HostState.UNLOCKING,
    }
    names = list(order)
    for flags in itertools.product((False, True), repeat=3):
        if any(flags):
            given = dict(zip(names, flags, strict=True))
            first = next(name for name in names if given[name])
            assert state([OFF], [(STOPPED, True)], **given) is order[first]


def test_errors_are_named_apart() -> None:
    from vmcryptd.core.errors import subclasses

    names = [cls.__name__ for cls in subclasses().values()]
    assert len(names) == len(set(names))
    assert all(issubclass(cls, VmcryptdError) for cls in subclasses().values())
