# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plans: what, in which order, why; and that a plan which ran leaves nothing to be planned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcryptd.core import gcpause, planner
from vmcryptd.core import graph as graphs
from vmcryptd.core.errors import BusyError, GoalError, NoSuchGuestError, NoSuchVolumeError
from vmcryptd.core.goals import BOOT, SHUTDOWN, Action, Goal, Plan
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import (
    BlockDevice,
    Content,
    DiskSource,
    Domain,
    GuestSpec,
    GuestState,
    KeySource,
    Lock,
    Mount,
    Observation,
    Pool,
    Remembered,
    Settings,
    SourceKind,
    SourceType,
    Start,
    Storage,
    Unlock,
    Virtualisation,
    VolumeSpec,
)


@dataclass
class Host:
    """A pure host: what is configured and what is up. A plan can be applied to it."""

    volumes: dict[str, VolumeSpec] = field(default_factory=dict)
    on: dict[str, tuple[str, ...]] = field(default_factory=dict)  # volume → volumes it lies on
    guests: dict[str, GuestSpec] = field(default_factory=dict)
    disks: dict[str, tuple[str, ...]] = field(default_factory=dict)  # guest → volumes
    pools: dict[str, Pool] = field(default_factory=dict)
    in_pool: dict[str, str] = field(default_factory=dict)  # guest → pool
    autostart: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    suspended: set[str] = field(default_factory=set)
    active: set[str] = field(default_factory=set)
    mounted: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    libvirt: bool = True

    def volume(self, name: str, *on: str, **more: Any) -> Host:
        self.volumes[name] = VolumeSpec(name, f"/dev/disk/{name}", **more)
        self.on[name] = on
        return self

    def guest(self, name: str, *disks: str, auto: bool = True, pool: str = "", **more: Any) -> Host:
        if more:
            self.guests[name] = GuestSpec(name, configured=True, **more)
        self.disks[name] = disks
        if auto:
            self.autostart.add(name)
        if pool:
            self.in_pool[name] = pool
        return self

    def graph(self) -> Graph:
        devices: dict[str, BlockDevice] = {}
        links: dict[str, str] = {}
        mounts = []
        for number, (name, spec) in enumerate(self.volumes.items()):
            device = BlockDevice(f"dev-{name}", below=tuple(f"dm-{x}" for x in self.on[name]))
            if self.open.issuperset(self.on[name]):  # else memory knows what the kernel cannot show
                devices[device.name] = device
                links[spec.device_path] = device.name
            if name in self.open:
                uuid = f"CRYPT-LUKS2-{number:032x}-{name}"
                devices[f"dm-{name}"] = BlockDevice(
                    f"dm-{name}", f"9:{number}", (device.name,), name, uuid, name in self.suspended
                )
                links[spec.mapper_path] = f"dm-{name}"
            if name in self.active:
                devices[f"lv-{name}"] = BlockDevice(
                    f"lv-{name}", "", (f"dm-{name}",), f"{name}-lv", "LVM-x"
                )
            if name in self.mounted and spec.mount:
                mounts.append(Mount(f"9:{number}", spec.mount))
        domains = {
            name: Domain(
                name,
                name,
                GuestState.RUNNING if name in self.running else GuestState.OFF,
                name in self.autostart,
                sources=(
                    *(DiskSource(SourceType.BLOCK, f"/dev/mapper/{d}") for d in disks),
                    *(
                        DiskSource(SourceType.POOL, pool=p)
                        for g, p in self.in_pool.items()
                        if g == name
                    ),
                ),
            )
            for name, disks in self.disks.items()
        }
        return graphs.build(
            Settings(volumes=self.volumes, guests=self.guests),
            Observation(
                storage=Storage(devices, links, mounts=tuple(mounts)),
                virtualisation=Virtualisation(self.libvirt, domains, self.pools),
                remembered=Remembered(
                    {spec.device_path: self.on[name] for name, spec in self.volumes.items()}
                ),
            ),
        )

    def plan(self, goal: str) -> Plan:
        plan = planner.plan(self.graph(), Goal.parse(goal))
        places = {step.id: place for place, step in enumerate(plan.steps)}
        assert len(places) == len(plan.steps)
        for step in plan.steps:
            assert step.reason
            assert all(places[other] < places[step.id] for other in (*step.after, *step.order))
        return plan

    def ids(self, goal: str) -> list[str]:
        return [str(step.id) for step in self.plan(goal).steps]

    def apply(self, plan: Plan) -> None:
        """Each step must be possible when its turn comes."""
        for step in plan.steps:
            name = step.object
            match step.action:
                case Action.UNLOCK:
                    assert name not in self.open or name in self.suspended
                    assert self.is_up(self.graph().volumes[name].needs, name), step
                    self.open.add(name)
                    self.suspended.discard(name)
                case Action.ACTIVATE:
                    assert self.is_open(name)
                    self.active.add(name)
                case Action.MOUNT:
                    assert self.is_open(name)
                    self.mounted.add(name)
                case Action.START_POOL:
                    assert self.is_up(self.graph().pools[name].needs), step
                    self.pools[name] = self.pools[name]._replace(active=True)
                case Action.START:
                    assert self.is_up(self.graph().guests[name].needs), step
                    self.running.add(name)
                case Action.STOP:
                    assert name in self.running
                    self.running.discard(name)
                case Action.STOP_POOL:
                    self.pools[name] = self.pools[name]._replace(active=False)
                case Action.UNMOUNT:
                    self.unused(name)
                    self.mounted.discard(name)
                case Action.DEACTIVATE:
                    self.unused(name)
                    self.active.discard(name)
                case Action.LOCK:
                    self.unused(name)
                    assert name in self.open
                    assert name not in self.mounted | self.active
                    self.open.discard(name)
                    self.suspended.discard(name)

    def is_open(self, name: str) -> bool:
        return name in self.open - self.suspended

    def is_up(self, names: tuple[str, ...], for_volume: str = "") -> bool:
        """A suspended one that stands on a suspended one is resumed after it."""
        return all(
            self.is_open(name)
            and (self.volumes[name].content is not Content.LVM or name in self.active)
            and (self.volumes[name].content is not Content.FILESYSTEM or name in self.mounted)
            for name in names
        ) or (for_volume in self.open and all(self.is_open(name) for name in self.on[for_volume]))

    def unused(self, name: str) -> None:
        graph = self.graph()
        assert graph.users(name) == []


def written(plan: Plan) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Each step, what it stands behind, and what it only comes after, as text."""
    for step in plan.steps:
        yield str(step.id), tuple(map(str, step.after)), tuple(map(str, step.order))


def test_the_way_up() -> None:
    host = (
        Host()
        .volume("outer", content=Content.LVM, vg="v")
        .volume("inner", "outer")
        .guest("dns", "inner")
        .guest("mail", "inner", after=("dns",))
        .guest("manual", "inner", auto=False)
    )
    plan = host.plan("boot")
    assert [(*row, step.reason) for row, step in zip(written(plan), plan.steps, strict=True)] == [
        ("unlock:outer", (), (), "in the boot set"),
        ("activate:outer", ("unlock:outer",), (), "volume group on outer"),
        ("unlock:inner", ("unlock:outer", "activate:outer"), (), "in the boot set"),
        ("start:dns", ("unlock:inner",), (), "autostart is set"),
        ("start:mail", ("unlock:inner",), ("start:dns",), "autostart is set"),
    ]
    host.apply(plan)
    assert host.plan("boot") == Plan(BOOT)


def test_the_way_down() -> None:
    host = (
        Host()
        .volume("outer", content=Content.LVM, vg="v")
        .volume("inner", "outer", content=Content.FILESYSTEM, mount="/srv")
        .guest("dns", "inner")
        .guest("mail", "outer", after=("dns",))
    )
    host.apply(host.plan("boot"))
    plan = host.plan("shutdown")
    assert {step: tuple(behind) for step, *behind in written(plan)} == {
        "stop:mail": ((), ()),
        "stop:dns": ((), ("stop:mail",)),
        "unmount:inner": (("stop:dns",), ()),
        "lock:inner": (("unmount:inner",), ()),
        "deactivate:outer": (("stop:mail", "lock:inner"), ()),
        "lock:outer": (("deactivate:outer",), ()),
    }
    host.apply(plan)
    assert (host.open, host.running) == (set(), set())
    assert host.plan("shutdown") == Plan(SHUTDOWN)


def test_guests_stop_in_levels() -> None:
    host = Host().guest("a", start=Start.ALWAYS).guest("b", after=("a",)).guest("c", after=("b",))
    host.guest("d", after=("a",))
    host.running = {"a", "b", "c", "d"}
    orders = {step.object: set(map(str, step.order)) for step in host.plan("shutdown").steps}
    assert orders == {"a": {"stop:b", "stop:d"}, "b": {"stop:c"}, "c": set(), "d": set()}
    host.running = {"a", "c"}
    assert {step.object for step in host.plan("shutdown").steps} == {"a", "c"}


@pytest.mark.parametrize(
    ("unlock", "auto", "opened"),
    [
        (Unlock.BOOT, False, True),
        (Unlock.GUEST, True, True),
        (Unlock.GUEST, False, False),
        (Unlock.MANUAL, False, False),
        (Unlock.MANUAL, True, False),
    ],
)
def test_what_boot_opens(unlock: Unlock, auto: bool, opened: bool) -> None:
    host = Host().volume("a", unlock=unlock).guest("g", "a", auto=auto)
    assert host.ids("boot") == (["unlock:a"] if opened else []) + (
        ["start:g"] if opened and auto else []
    )


def test_a_guest_on_a_manual_volume_that_is_open_is_started() -> None:
    host = Host().volume("a", unlock=Unlock.MANUAL).guest("g", "a")
    host.open = {"a"}
    assert host.ids("boot") == ["start:g"]


def test_boot_opens_a_manual_volume_beneath_another() -> None:
    host = Host().volume("low", unlock=Unlock.MANUAL).volume("a", "low")
    assert host.ids("boot") == ["unlock:low", "unlock:a"]
    assert host.plan("boot").steps[0].reason == "a lies on it"


@pytest.mark.parametrize(
    ("start", "auto", "started", "reason"),
    [
        (Start.AUTO, True, True, "autostart is set"),
        (Start.AUTO, False, False, ""),
        (Start.ALWAYS, False, True, "always started"),
        (Start.NEVER, True, False, ""),
    ],
)
def test_which_guests_boot_starts(start: Start, auto: bool, started: bool, reason: str) -> None:
    host = Host().volume("a").guest("g", "a", auto=auto, start=start)
    steps = [step for step in host.plan("boot").steps if step.action is Action.START]
    assert [step.reason for step in steps] == ([reason] if started else [])


def test_foreign_guests_are_left_alone() -> None:
    host = Host().volume("a").guest("else")
    host.running = {"else"}
    assert host.ids("boot") == ["unlock:a"]
    assert host.ids("shutdown") == []


# --- keystore ---


def keystore(**more: Any) -> Host:
    key = (KeySource(SourceKind.FILE, "/run/keys/x"),)
    return (
        Host()
        .volume("store", lock=Lock.BOOT, content=Content.FILESYSTEM, mount="/run/keys", **more)
        .volume("a", keys=key)
        .volume("b", keys=key)
    )


def test_a_keystore_is_closed_when_the_boot_set_is_open() -> None:
    host = keystore()
    plan = host.plan("boot")
    assert {step: after for step, after, _ in written(plan)} == {
        "unlock:store": (),
        "mount:store": ("unlock:store",),
        "unlock:a": (),
        "unlock:b": (),
        "unmount:store": (),
        "lock:store": ("unmount:store",),
    }
    # Waited for, but were it lost, other keys may open them.
    for step in plan.steps[2:4]:
        assert tuple(map(str, step.order)) == ("unlock:store", "mount:store")
    assert {"unlock:a", "unlock:b"} <= set(map(str, plan.steps[-1].order))
    assert plan.steps[0].reason == "a comes after it"
    host.apply(plan)
    assert host.open == {"a", "b"}
    assert host.ids("boot") == []


def test_a_keystore_is_left_alone_when_nothing_needs_it() -> None:
    host = keystore()
    host.open = {"a", "b"}
    assert host.ids("boot") == []
    assert host.ids("unlock:a") == []


def test_a_keystore_that_was_left_open_is_closed_by_boot() -> None:
    host = keystore()
    host.open, host.mounted = {"a", "b", "store"}, {"store"}
    assert host.ids("boot") == ["unmount:store", "lock:store"]


def test_a_keystore_that_something_lies_on_stays() -> None:
    host = keystore().volume("c", "store")
    host.open = {"store"}
    assert "lock:store" not in host.ids("boot")


def test_a_keystore_after_a_keystore() -> None:
    host = keystore(after=("vault",)).volume("vault", lock=Lock.BOOT)
    host.apply(host.plan("boot"))
    assert host.open == {"a", "b"}


def test_a_keystore_on_a_keystore() -> None:
    host = Host().volume("low", lock=Lock.BOOT).volume("store", "low", lock=Lock.BOOT)
    host.volume("a", after=("store",))
    assert host.ids("boot") == [
        "unlock:low", "unlock:store", "unlock:a", "lock:store", "lock:low",
    ]  # fmt: skip
    host.apply(host.plan("boot"))
    assert host.open == {"a"}


# --- one volume, one guest ---


def test_unlock_and_lock_one() -> None:
    host = Host().volume("low").volume("a", "low").volume("b", "low")
    assert host.ids("unlock:a") == ["unlock:low", "unlock:a"]
    host.apply(host.plan("unlock:a"))
    assert host.ids("unlock:a") == []
    assert host.ids("lock:b") == []
    with pytest.raises(BusyError, match=r"volume low is in use by volume a; stop or lock these"):
        host.plan("lock:low")
    assert host.ids("lock:a") == ["lock:a"]
    assert set(host.ids("lock-all")) == {"lock:a", "lock:low"}
    host.apply(host.plan("lock-all"))
    assert host.open == set()


def test_lock_names_all_users() -> None:
    host = (
        Host()
        .volume("low")
        .volume("a", "low")
        .guest("g", "low")
        .guest("h", "a")
        .guest("off", "low")
    )
    host.open, host.running = {"low", "a"}, {"g", "h"}
    with pytest.raises(BusyError, match=r"volume low is in use by guest g, volume a; "):
        host.plan("lock:low")
    with pytest.raises(
        BusyError, match=r"volume low is in use by guest g; |volume a is in use by guest h"
    ):
        host.plan("lock-all")


def test_start_and_stop_a_guest() -> None:
    host = (
        Host()
        .volume("a", unlock=Unlock.MANUAL)
        .volume("b", lock=Lock.GUEST)
        .volume("c", lock=Lock.GUEST)
        .guest("g", "a", "b", "c")
        .guest("h", "c")
    )
    plan = host.plan("start:g")
    assert [step.reason for step in plan.steps] == ["guest g needs it"] * 3 + ["asked for"]
    host.apply(plan)
    assert host.ids("start:g") == []
    host.running.add("h")
    assert host.ids("stop:g") == ["stop:g", "lock:b"]
    assert host.plan("stop:g").steps[1].reason == "guest g was the last to use it"
    host.apply(host.plan("stop:g"))
    assert host.ids("stop:g") == []


def test_the_last_guest_closes_the_whole_stack() -> None:
    host = Host().volume("low", lock=Lock.GUEST).volume("a", "low", lock=Lock.GUEST).guest("g", "a")
    host.apply(host.plan("start:g"))
    assert host.ids("stop:g") == ["stop:g", "lock:a", "lock:low"]
    host.running.clear()
    assert planner.idle_volumes(host.graph(), ("a",), "g") == ["a", "low"]
    assert planner.idle_volumes(host.graph(), ("a", "forgotten"), "g") == ["a", "low"]


def test_shutdown_leaves_manual_volumes_and_what_they_stand_on() -> None:
    host = Host().volume("low").volume("a", "low", lock=Lock.MANUAL).volume("b", "low")
    host.open = {"low", "a", "b"}
    assert host.ids("shutdown") == ["lock:b"]


def test_a_suspended_volume_is_unlocked_again() -> None:
    host = Host().volume("low").volume("a", "low").guest("g", "a")
    host.open, host.suspended = {"low", "a"}, {"low", "a"}
    assert host.ids("boot") == ["unlock:low", "unlock:a", "start:g"]
    host.suspended = {"low"}
    plan = host.plan("boot")
    assert tuple(map(str, plan.steps[-1].after)) == ("unlock:low",)
    assert set(host.ids("lock-all")) == {"lock:a", "lock:low"}


def test_nested_mounts() -> None:
    mounted = {"content": Content.FILESYSTEM}
    host = Host().volume("in", mount="/srv/in", **mounted).volume("out", mount="/srv", **mounted)
    assert host.ids("boot") == ["unlock:out", "mount:out", "unlock:in", "mount:in"]
    host.apply(host.plan("boot"))
    assert host.ids("shutdown") == ["unmount:in", "lock:in", "unmount:out", "lock:out"]


# --- pools ---


def with_pool(**more: Any) -> Host:
    host = Host().volume("a").volume("b").guest("g", pool="p")
    host.pools = {"p": Pool("p", devices=("/dev/mapper/a", "/dev/mapper/b"), **more)}
    return host


@pytest.mark.parametrize(("active", "autostart"), [(True, False), (False, True), (False, False)])
def test_a_pool_comes_after_all_it_lies_on(active: bool, autostart: bool) -> None:
    host = with_pool(active=active, autostart=autostart)
    after = {step: after for step, after, _ in written(host.plan("boot"))}
    assert after["start-pool:p"] == ("unlock:a", "unlock:b")
    assert set(after["start:g"]) == {"unlock:a", "unlock:b", "start-pool:p"}
    host.apply(host.plan("boot"))
    assert host.ids("boot") == []
    assert {step: tuple(behind) for step, *behind in written(host.plan("shutdown"))} == {
        "stop:g": ((), ()),
        "stop-pool:p": ((), ("stop:g",)),
        "lock:a": (("stop:g",), ("stop-pool:p",)),
        "lock:b": (("stop:g",), ("stop-pool:p",)),
    }


def test_a_pool_of_which_a_part_stays_locked_is_left_alone() -> None:
    host = with_pool(active=False, autostart=True)
    assert host.ids("unlock:a") == ["unlock:a"]
    host.open = {"a"}
    assert host.ids("unlock:b") == ["unlock:b", "start-pool:p"]


def test_a_pool_on_a_volume_and_on_what_stands_on_that() -> None:
    host = Host().volume("a").volume("b", "a").guest("g", pool="p")
    host.pools = {"p": Pool("p", active=True, devices=("/dev/mapper/a", "/dev/mapper/b"))}
    host.open, host.running = {"a", "b"}, {"g"}
    assert host.ids("shutdown") == ["stop:g", "stop-pool:p", "lock:b", "lock:a"]


# --- refusals ---


@pytest.mark.parametrize(
    "goal", ["", "boot:x", "shutdown:x", "lock-all:x", "reboot", "Boot", "panic"]
)
def test_unknown_goals(goal: str) -> None:
    with pytest.raises(GoalError, match="is no goal; expected one of boot, shutdown, "):
        Host().plan(goal)


def test_unknown_names() -> None:
    host = Host()
    with pytest.raises(NoSuchVolumeError, match=r'^there is no volume "x"; none is configured$'):
        host.plan("unlock:x")
    host.volume("cr_imap").guest("imap", "cr_imap")
    for verb in ("unlock", "lock"):
        with pytest.raises(NoSuchVolumeError, match='no volume "cr_imp"; did you mean "cr_imap"?'):
            host.plan(f"{verb}:cr_imp")
    for verb in ("start", "stop"):
        with pytest.raises(
            NoSuchGuestError, match='there is no guest "imab"; did you mean "imap"?'
        ):
            host.plan(f"{verb}:imab")
    host.libvirt, host.disks = False, {}
    with pytest.raises(NoSuchGuestError, match="libvirt cannot be reached, so it may be there"):
        host.plan("start:imap")


# --- properties ---


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    host = Host()
    names = [f"v{i}" for i in range(draw(st.integers(0, 6)))]
    for place, name in enumerate(names):
        lower = (
            draw(st.lists(st.sampled_from(names[:place]), max_size=2, unique=True)) if place else []
        )
        after = (
            draw(st.lists(st.sampled_from(names[:place]), max_size=2, unique=True)) if place else []
        )
        content = draw(st.sampled_from(Content))
        host.volume(
            name,
            *lower,
            after=tuple(after),
            content=content,
            mount=f"/m/{name}" if content is Content.FILESYSTEM else None,
            unlock=draw(st.sampled_from(Unlock)),
            lock=draw(st.sampled_from(Lock)),
        )
    guests = [f"g{i}" for i in range(draw(st.integers(0, 4)))]
    for place, name in enumerate(guests):
        host.guest(
            name,
            *(draw(st.lists(st.sampled_from(names), max_size=3, unique=True)) if names else []),
            auto=draw(st.booleans()),
            after=tuple(
                draw(st.lists(st.sampled_from(guests[:place]), unique=True)) if place else []
            ),
            start=draw(st.sampled_from(Start)),
            pool=draw(st.sampled_from(["", "p"])),
        )
    if names and draw(st.booleans()):
        devices = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        host.pools["p"] = Pool(
            "p",
            active=draw(st.booleans()),
            autostart=draw(st.booleans()),
            devices=tuple(f"/dev/mapper/{name}" for name in devices),
        )
    # What is up stands on what is up.
    for name in names:
        if all(lower in host.open for lower in host.on[name]) and draw(st.booleans()):
            host.open.add(name)
            if host.volumes[name].content is Content.LVM and draw(st.booleans()):
                host.active.add(name)
            if host.volumes[name].content is Content.FILESYSTEM and draw(st.booleans()):
                host.mounted.add(name)
            if draw(st.integers(0, 5)) == 0:
                host.suspended.add(name)
    for name, node in host.graph().guests.items():
        if host.open.issuperset(node.needs) and draw(st.booleans()):
            host.running.add(name)
    return host


@settings(max_examples=120, deadline=None)
@given(hosts(), st.data())
def test_a_plan_that_ran_leaves_nothing_to_do(host: Host, data: st.DataObject) -> None:
    goals = ["boot", "shutdown", *(f"unlock:{name}" for name in host.volumes)]
    goals += [f"{verb}:{name}" for name in host.disks for verb in ("start", "stop")]
    goal = data.draw(st.sampled_from(goals))
    host.apply(host.plan(goal))
    assert host.plan(goal) == Plan(Goal.parse(goal))
    graph = host.graph()
    match goal.partition(":")[0]:
        case "boot":
            volumes, guests = planner.boot_set(graph)
            assert host.open.issuperset(volumes)
            assert host.running.issuperset(guests)
        case "shutdown":
            assert not any(node.is_ours and node.is_running for node in graph.guests.values())
            kept = graph.beneath(n for n in host.open if host.volumes[n].lock is Lock.MANUAL)
            assert host.open <= set(kept)


@settings(max_examples=60, deadline=None)
@given(hosts())
def test_up_and_down_again(host: Host) -> None:
    host.apply(host.plan("boot"))
    host.apply(host.plan("shutdown"))
    host.apply(host.plan("boot"))
    for name in host.disks:
        host.apply(host.plan(f"stop:{name}"))
    host.apply(host.plan("lock-all"))
    assert host.open == set()


@settings(max_examples=60, deadline=None)
@given(hosts())
def test_lock_refuses_exactly_what_is_used(host: Host) -> None:
    for name in host.volumes:
        if users := host.graph().users(name):
            with pytest.raises(BusyError) as caught:
                host.plan(f"lock:{name}")
            assert all(user in str(caught.value) for user in users)
        else:
            host.apply(host.plan(f"lock:{name}"))
            assert name not in host.open


# --- size ---


def test_each_volume_is_walked_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = 0
    beneath = Graph.beneath

    def counted(self: Graph, *arguments: Any, **more: Any) -> list[str]:
        nonlocal walked
        found = beneath(self, *arguments, **more)
        walked += len(found)
        return found

    monkeypatch.setattr(Graph, "beneath", counted)
    counts = []
    for size in (100, 1000):
        host = Host().volume("store", lock=Lock.BOOT)
        for i in range(size):
            host.volume(f"v{i}", after=("store",)).guest(f"g{i}", f"v{i}")
        graph = host.graph()
        walked = 0
        assert len(planner.plan(graph, BOOT).steps) == 2 * size + 2
        counts.append(walked)
    assert counts[1] <= 12 * counts[0]


def test_a_tower_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    for i in range(300):
        host.volume(f"v{i}", *([f"v{i - 1}"] if i else []))
    graph = host.graph()
    looks = 0
    needs = graphs.VolumeNode.needs.fget  # type: ignore[attr-defined]

    def counted(node: graphs.VolumeNode) -> tuple[str, ...]:
        nonlocal looks
        looks += 1
        return tuple(needs(node))

    monkeypatch.setattr(graphs.VolumeNode, "needs", property(counted))
    assert len(planner.plan(graph, BOOT).steps) == 300
    assert looks <= 300 * 6


def test_the_collector_waits_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @gcpause.paused
    def inner(fails: bool) -> None:
        seen.append(gc.isenabled())
        if fails:
            raise GoalError("no")

    @gcpause.paused
    def outer() -> None:
        inner(False)
        seen.append(gc.isenabled())

    outer()
    assert gc.isenabled()
    with pytest.raises(GoalError):
        inner(True)
    assert gc.isenabled()
    assert seen == [False] * 3
