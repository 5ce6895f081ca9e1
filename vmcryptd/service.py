# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmcryptd's bus interface: every method is one line, every property a copy of the engine's state.

The docstrings here are the reference of the interface; org.vmcryptd1(5) explains it at length.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from vmcryptd import __version__
from vmcryptd.bus.objects import CALL, Handle, Interface, ObjectPath, Objects, exported, take_fd
from vmcryptd.bus.transport import object_path
from vmcryptd.core.errors import NoVolumeError
from vmcryptd.core.goals import Goal, Plan
from vmcryptd.core.model import Infinity
from vmcryptd.core.states import GuestView, VolumeView
from vmcryptd.core.text import escaped
from vmcryptd.engine import unlock_with_key
from vmcryptd.engine.engine import Engine
from vmcryptd.engine.jobs import Job
from vmcryptd.engine.prompt import Held

NAME = "org.vmcryptd1"
ROOT = "/org/vmcryptd1"

UNLOCK = "org.vmcryptd1.unlock"
LOCK = "org.vmcryptd1.lock"
GUESTS = "org.vmcryptd1.guests"
PANIC = "org.vmcryptd1.panic"
KEYS = "org.vmcryptd1.keys"
ENCRYPT = "org.vmcryptd1.encrypt"
RELOAD = "org.vmcryptd1.reload"

# Changes within this time of the last ones are announced together, and always before a method is answered.
ANNOUNCE_S = 0.1

_USEC_INFINITY = 2**63 - 1  # `x` is signed; systemd's own USEC_INFINITY does not fit


class Manager(Interface, name="org.vmcryptd1.Manager"):
    """The host as a whole."""

    State: str
    Waiting: list[str]
    Off: list[str]
    LastError: str
    Version: str
    ConsoleNeeded: bool
    ConsolePromptUSec: int
    HeldKeys: list[dict[str, str]]
    ConfigChanged: bool

    def __init__(self, engine: Engine, reload: Callable[[], Awaitable[None]]) -> None:
        super().__init__(**manager_properties(engine), ConfigChanged=False)
        self._engine = engine
        self._reload = reload

    @exported(action=UNLOCK, purpose="unlock volume $(volume)")
    async def Unlock(self, volume: str) -> None:
        """Open a volume and all it needs: key sources first, then a person is asked. Answers when it is open."""
        await self._engine.unlock(volume)

    @exported(action=UNLOCK, purpose="unlock volume $(volume)")
    async def UnlockUnattended(self, volume: str) -> None:
        """The same by key sources alone. Fails with NotAsked if a person is needed, also if another call asks one."""
        await self._engine.unlock_unattended(volume)

    @exported(action=UNLOCK, purpose="unlock volume $(volume)")
    async def UnlockWithKey(self, volume: str, key: Handle) -> None:
        """The same with a key, which is read from the descriptor to its end."""
        await unlock_with_key.unlock(self._engine, volume, take_fd(key))

    @exported(action=UNLOCK, purpose="unlock all volumes of the boot set")
    async def UnlockAll(self) -> None:
        """Open every volume of the boot set."""
        await self._engine.unlock_all()

    @exported(action=UNLOCK, purpose="unlock all volumes that wait for a key")
    async def UnlockAllWithKey(self, key: Handle) -> None:
        """The same; the key is tried on all volumes that wait."""
        await unlock_with_key.unlock_all(self._engine, take_fd(key))

    @exported(action=LOCK, purpose="lock volume $(volume)")
    async def Lock(self, volume: str) -> None:
        """Close a volume. Refused with Busy and the names of its users while it is in use."""
        await self._engine.lock(volume)

    @exported(action=LOCK, purpose="lock all volumes", overtakes=True)
    async def LockAll(self) -> None:
        """Close every volume."""
        await self._engine.lock_all()

    @exported(action=GUESTS, purpose="start guest $(guest)")
    async def StartGuest(self, guest: str) -> None:
        """Open the guest's volumes, then start it."""
        self._check_needs(guest)
        await self._engine.start_guest(guest)

    @exported(action=GUESTS, purpose="stop guest $(guest)")
    async def StopGuest(self, guest: str) -> None:
        """Stop the guest, then close the volumes whose `lock` says so."""
        self._check_needs(guest)
        await self._engine.stop_guest(guest)

    @exported(
        action=(UNLOCK, GUESTS), purpose="unlock the volumes and start the guests of the boot set"
    )
    async def Boot(self) -> ObjectPath:
        """Bring up the boot set. Answers with the job, once libvirt has said which guests start."""
        await self._engine.look_before_boot()
        return ObjectPath(job_path(self._engine.boot()))

    @exported(action=(LOCK, GUESTS), purpose="stop the guests and lock all volumes", overtakes=True)
    async def Shutdown(self) -> None:
        """Stop the guests, close the volumes. Answers when that is done."""
        await self._engine.shutdown()

    @exported(action=PANIC, purpose="kill the guests and lock all volumes at once", overtakes=True)
    async def Panic(self) -> None:
        """Kill the guests, wipe the keys and close the volumes at once, past every error."""
        await self._engine.panic()

    @exported(action=None)
    def Plan(self, goal: str) -> str:
        """The steps that a goal would take, as JSON; does nothing."""
        return plan_json(self._engine.plan(Goal.parse(goal)))

    @exported(action=None)
    async def ListKeys(self, volume: str) -> str:
        """The key slots and tokens of a volume's header, as JSON. Arguments of key sources for root only."""
        is_trusted = CALL.get().is_trusted
        listed = await self._engine.key_slots.listed(volume)
        if not is_trusted:
            listed["sources"] = [kind(one) for one in listed["sources"]]
            for slot in listed["slots"]:
                slot["fitted_by"] = [kind(one) for one in slot["fitted_by"]]
        return json.dumps(listed)

    @exported(action=KEYS, purpose="test a key of volume $(volume)")
    async def TestKey(self, volume: str, key: Handle) -> int:
        """The key slot that a key opens. Fails with WrongKey if there is none. Opens nothing."""
        return await self._engine.key_slots.test(volume, take_fd(key))

    @exported(action=KEYS, purpose="add a key to volume $(volume)")
    async def AddKey(self, volume: str, key: Handle, new_key: Handle) -> int:
        """Add a key to a volume. Answers with its key slot once the key was tested."""
        return await self._engine.key_slots.add(volume, take_fd(key), take_fd(new_key))

    @exported(action=KEYS, purpose="add a key in keystore $(keystore) to volume $(volume)")
    async def AddKeystoreKey(self, volume: str, keystore: str, key: Handle) -> str:
        """Add a random key, stored in an open keystore, to a volume. Answers with the key source for its `keys`."""
        return await self._engine.key_slots.add_from_keystore(volume, keystore, take_fd(key))

    @exported(action=KEYS, purpose="remove a key of volume $(volume)")
    async def RemoveKey(self, volume: str, slot: int, key: Handle) -> None:
        """Wipe a key slot. The key proves that the volume can be opened by another one."""
        await self._engine.key_slots.remove(volume, slot, take_fd(key))

    @exported(action=KEYS, purpose="change a key of volume $(volume)")
    async def ChangeKey(self, volume: str, key: Handle, new_key: Handle) -> int:
        """Replace a key. The old one is removed after the new one was tested."""
        return await self._engine.key_slots.change(volume, take_fd(key), take_fd(new_key))

    @exported(action=KEYS, purpose="encrypt volume $(volume) under a new volume key")
    async def RotateKey(self, volume: str, key: Handle, drop_others: bool) -> None:
        """Re-encrypt an open volume under a new volume key, or resume that. Only this key stays. Answers at the end."""
        await self._engine.rotations.rotate(volume, take_fd(key), drop_others=drop_others)

    @exported(action=KEYS, purpose="pause the key rotation of volume $(volume)")
    async def StopRotation(self, volume: str) -> None:
        """Pause the key rotation; RotateKey resumes it. Answers when it has stopped."""
        await self._engine.rotations.stop(volume)

    @exported(action=KEYS, purpose="back up the LUKS header of volume $(volume)")
    async def BackupHeader(self, volume: str, file: Handle) -> None:
        """Write a backup of a volume's header into a new file."""
        await self._engine.key_slots.back_up(volume, take_fd(file))

    @exported(action=ENCRYPT, purpose="create keystore $(name)")
    async def CreateKeystore(self, name: str, key: Handle, options: dict[str, Any]) -> ObjectPath:
        """Make a small volume for keys; this key opens it. Answers with the job; "/" for a dry run."""
        fd = take_fd(key)
        if options.get("dry-run") is True:
            os.close(fd)
            await self._engine.keystores.check(name, options)
            return ObjectPath("/")
        return ObjectPath(job_path(await self._engine.keystores.create(name, fd, options)))

    @exported(action=RELOAD, purpose="read the configuration of vmcryptd again")
    async def Reload(self) -> None:
        """Read the configuration again; a bad one is refused and the running one kept."""
        await self._reload()

    def _check_needs(self, guest: str) -> None:
        """The right to start and stop guests covers those on encrypted volumes, not all guests of the host."""
        node = self._engine.graph.guests.get(guest)
        if node is not None and not node.needs:
            raise NoVolumeError(
                f"guest {escaped(guest)}: it needs no configured volume, so vmcryptd leaves it alone; "
                "use `virsh`, or name its volume in `needs`"
            )


class Volume(Interface, name="org.vmcryptd1.Volume"):
    """One LUKS volume and its mapping."""

    Name: str
    Device: str
    Uuid: str
    State: str
    KeySource: str
    Discard: bool
    NeededBy: list[str]
    HeaderBackupDue: bool
    Rotation: str
    LastError: str


class Guest(Interface, name="org.vmcryptd1.Guest"):
    """One libvirt domain."""

    Name: str
    State: str
    Needs: list[str]
    StartsAtBoot: bool
    LastError: str


class RunningJob(Interface, name="org.vmcryptd1.Job"):
    """One goal that is being pursued; the object is gone when it has ended."""

    Goal: str
    State: str
    Progress: float
    LastError: str
    ErrorName: str


def kind(source: str) -> str:
    """A key source without its argument: that may hold a token, and every user can read properties."""
    return source.partition(":")[0]


def plan_json(plan: Plan) -> str:
    steps = [
        {
            "action": step.action,
            "object": step.object,
            "after": [str(other) for other in (*step.after, *step.order)],
            "reason": step.reason,
        }
        for step in plan.steps
    ]
    return json.dumps({"goal": str(plan.goal), "steps": steps})


def job_path(job: Job) -> str:
    return f"{ROOT}/job/{job.id}"


def manager_properties(engine: Engine) -> dict[str, object]:
    prompt_s = engine.settings.daemon.console_prompt_s
    return {
        "State": str(engine.state),
        "Waiting": engine.waiting,
        "Off": engine.off,
        "LastError": engine.host_error,
        "Version": __version__,
        "ConsoleNeeded": engine.is_console_needed,
        "ConsolePromptUSec": _USEC_INFINITY if prompt_s == Infinity else int(prompt_s * 1e6),
        "HeldKeys": [_held(one) for one in engine.prompt.held],
    }


def _job_view(job: Job) -> JobView:
    text, name = (str(job.error), job.error.dbus_name) if job.error else ("", "")
    return JobView(str(job.id), str(job.goal), str(job.state), job.progress, text, name)


def _held(key: Held) -> dict[str, str]:
    """`until` is empty while volumes have yet to try it."""
    until = ""
    if key.until == Infinity:
        until = "infinity"
    elif key.until:
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(key.until))
    return {"source": kind(key.source), "volumes": " ".join(key.volumes), "until": until}


class JobView(NamedTuple):
    """One running job as the bus shows it."""

    name: str
    goal: str
    state: str
    progress: float
    error: str
    error_name: str


View = VolumeView | GuestView | JobView
_INTERFACES: dict[type[View], type[Interface]] = {
    VolumeView: Volume,
    GuestView: Guest,
    JobView: RunningJob,
}


def _path(view: View) -> str:
    if isinstance(view, JobView):
        return f"{ROOT}/job/{view.name}"
    return object_path("volume" if isinstance(view, VolumeView) else "guest", view.name)


class _Shown(NamedTuple):
    view: View
    interface: Interface
    path: str


class Service:
    """Keeps the objects on the bus equal to what the engine shows."""

    def __init__(
        self, engine: Engine, objects: Objects, reload: Callable[[], Awaitable[None]]
    ) -> None:
        self._engine = engine
        self._objects = objects
        self._shown: dict[tuple[type[View], str], _Shown] = {}
        self._jobs: dict[str, Job] = {}  # those that are shown
        self._due: asyncio.Handle | None = None
        self._announced_at = -ANNOUNCE_S
        self.config_changed = False  # the files differ from the running configuration
        self._manager = Manager(engine, reload)
        objects.export(ROOT, self._manager)
        objects.refresh = self.refresh
        objects.redacted = engine.inventory.redacted
        self.update()

    def _properties(self, view: View) -> dict[str, object]:
        named: dict[str, object] = {
            "".join(part.capitalize() for part in key.split("_")): value
            for key, value in view._asdict().items()
        }
        named["LastError"] = str(named.pop("Error"))
        named["State"] = str(named["State"])
        if isinstance(view, JobView):
            del named["Name"]
        if isinstance(view, VolumeView):
            named["KeySource"] = kind(view.key_source)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in named.items()
        }

    def changed(self) -> None:
        """Bring the objects up to date soon: at once, if nothing was announced just now."""
        if self._due is None:
            loop = asyncio.get_running_loop()
            self._due = loop.call_at(self._announced_at + ANNOUNCE_S, self.update)

    def refresh(self) -> None:
        """Bring the objects up to date now, if anything has changed."""
        if self._due is not None:
            self.update()

    def update(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
            self._announced_at = asyncio.get_running_loop().time()
        engine = self._engine
        self._jobs |= {str(number): job for number, job in engine.jobs.items()}
        jobs = [_job_view(job) for job in engine.jobs.values()]
        views: list[View] = [*engine.volume_views(), *engine.guest_views(), *jobs]
        wanted = {(type(view), view.name): view for view in views}
        for key in [key for key in self._shown if key not in wanted]:
            shown = self._shown.pop(key)
            if isinstance(shown.view, JobView):
                # How it ended is said before it is gone.
                shown.interface.changed(
                    **self._properties(_job_view(self._jobs.pop(shown.view.name)))
                )
            self._objects.unexport(shown.path)
        for key, view in wanted.items():
            known = self._shown.get(key)
            if known is None:
                interface = _INTERFACES[type(view)](**self._properties(view))
                self._shown[key] = _Shown(view, interface, _path(view))
                self._objects.export(self._shown[key].path, interface)
            elif view != known.view:  # most are as they were
                known.interface.changed(**self._properties(view))
                self._shown[key] = known._replace(view=view)
        self._manager.changed(**manager_properties(engine), ConfigChanged=self.config_changed)
