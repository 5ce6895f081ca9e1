# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test host: a Debian 13 virtual machine that runs what is tested as root of a real system.

    host = Host(build_image(), Path("somewhere"), disks=["1G", "1G"])
    with host.boot() as vm:
        vm.run("cryptsetup luksFormat …", stdin=b"secret")
        vm.power_cut()
    with host.boot(wait=False) as vm:  # the same disks
        vm.console.expect(r"Passphrase.*: ")
        vm.console.type("secret\n")
        vm.poweroff()

Emulated, a boot takes a minute or two. A test that needs a host which has booted, and not the boot itself, resumes a
snapshot within a second or two:

    with host.resume() as vm:  # booted and settled, nothing is configured, the host's disks are plugged in
        …
        kept = vm.save()  # ends this machine
    with Host(image, Path("elsewhere"), snapshot=kept).resume() as vm:  # goes on from there, as often as wanted
        …

The host's directory keeps the console's and the journal's transcript of every boot.
"""

import base64
import codecs
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from tests.vm import guest

PROJECT = Path(__file__).resolve().parents[2]
# For disks that are plugged into a machine that runs. Each makes a boot longer: only what is booted once for all tests
# has one for every disk that a test may have.
SLOTS = 4
SLOTS_OF_A_SNAPSHOT = 24

# A machine without KVM on a busy host is slow. These bound a hang; no test measures with them.
BOOT_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 300.0
OFF_TIMEOUT_S = 300.0

# Emulated, a second CPU's timer dies now and then while that comes up. The kernel cannot go on then.
LOST_TIMER = "rcu_preempt kthread timer wakeup didn't happen"

Accel = Literal["kvm", "tcg"]
Json = dict[str, Any]

# Emulated, a CPU with all that QEMU knows is slower: libraries choose wide vectors, page tables have a fifth level.
# What ciphers use stays. Nor are guests virtualised in an emulated machine: libvirt would ask QEMU about KVM, too.
CPU: dict[Accel, str] = {
    "kvm": "max",
    "tcg": "qemu64,-svm,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+rdrand,+rdseed",
}


# Run once in a host that has just booted, before its snapshot is taken. Each of these is slow only the first time:
# libvirt asks QEMU for its capabilities, the kernel loads modules, Python and the programs come from the disk.
SETTLE = """
modprobe -a dm_crypt af_alg algif_skcipher algif_hash
virsh capabilities; virsh domcapabilities
vmcryptctl status; busctl status org.vmcryptd1; cryptsetup --version; dmsetup ls; python3 -c 'import json, subprocess'
udevadm settle; sync
"""


class VmError(Exception):
    """The virtual machine did not do what a test needs of it."""


@dataclass(frozen=True)
class Image:
    """What packaging/image/build made."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk.img"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.img"

    @property
    def tools(self) -> Path:
        return (self.directory / "tools").resolve()

    def tool(self, name: str, *private: str) -> list[str]:
        """The command line of a program in the image's tree, which needs nothing installed.

        Debian 12's QEMU 7.2 crashes the image's kernel; the tree has the QEMU that belongs to it. `private` are
        directories below the tree's libraries where the program has its own.
        """
        libraries = self.tools / "usr/lib/x86_64-linux-gnu"
        loader = libraries / "ld-linux-x86-64.so.2"
        path = ":".join(f"{libraries / place}" for place in ("", *private))
        places = [self.tools / place / name for place in ("usr/bin", "usr/sbin")]
        program = next(place for place in places if place.exists())
        return [f"{loader}", "--library-path", path, f"{program}"]

    def qemu(self) -> list[str]:
        data = [f"{self.tools / 'usr/share' / name}" for name in ("qemu", "seabios")]
        return [*self.tool("qemu-system-x86_64"), "-L", data[0], "-L", data[1]]

    def environment(self) -> dict[str, str]:
        modules = self.tools / "usr/lib/x86_64-linux-gnu/qemu"
        return {**os.environ, "QEMU_MODULE_DIR": f"{modules}"}


def build_image(deb: Path | None = None) -> Image:
    command: list[str | Path] = [PROJECT / "packaging/image/build"]
    if deb:
        command += ["--deb", deb]
    built = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Image(Path(built.stdout.strip()))


@functools.cache
def accelerator(image: Image) -> Accel:
    """KVM if a guest really runs under it: /dev/kvm can exist, and every guest die."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name, "disk")
        disk.write_bytes(guest.disk_image(guest.Variant.ONCE))
        # The machine a test host is, less its devices: what works for one works for the other.
        command = [
            *image.qemu(),
            "-machine", "q35", "-accel", "kvm", "-cpu", "max", "-m", "32", "-nodefaults",
            "-no-user-config", "-display", "none",
            "-drive", f"file={disk},format=raw,if=virtio",
        ]  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=image.environment(),
                timeout=5,
                check=False,
            )
        return "kvm" if guest.read_counters(disk) == guest.Counters(1, 1) else "tcg"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class CommandError(VmError):
    def __init__(self, argv: Sequence[str], result: Result) -> None:
        super().__init__(
            f"{shlex.join(argv)}: exit status {result.code}\n{result.out}{result.err}".rstrip()
        )
        self.result = result


class Console:
    """The first serial line, as a person in front of it sees it."""

    def __init__(self, connection: socket.socket, text: str = "", seen: int = 0) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        # What was shown before, and how much of it was expected: a machine that is resumed goes on.
        self._text = text
        self.seen = seen
        self._closed = False
        # Called with the output as it arrives, to show it live.
        self.mirror: Callable[[bytes], None] = lambda data: None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        # A character may arrive in two pieces.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with contextlib.suppress(OSError), self._connection:
            while data := self._connection.recv(65536):
                self.mirror(data)
                with self._changed:
                    self._text += decoder.decode(data)
                    self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def transcript(self) -> str:
        with self._changed:
            return self._text

    def expect(self, pattern: str, timeout_s: float = BOOT_TIMEOUT_S) -> re.Match[str]:
        """Waits for text behind what was last expected."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                match = re.compile(pattern).search(self._text, self.seen)
                if match:
                    self.seen = match.end()
                    return match
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    why = "the machine is off" if self._closed else f"{timeout_s:.0f} s went by"
                    raise VmError(
                        f"no {pattern!r} on the console: {why}. Its end:\n{self._text[-2000:]}"
                    )
                self._changed.wait(left)

    def type(self, text: str) -> None:
        self._connection.sendall(text.encode())


class _Channel:
    """JSON lines both ways; each arriving line wakes the waiting threads."""

    def __init__(self, connection: socket.socket, received: Callable[[Json], None]) -> None:
        self._connection = connection
        self._received = received
        self._sending = threading.Lock()
        self.changed = threading.Condition()
        self.closed = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with (
            contextlib.suppress(OSError),
            self._connection,
            self._connection.makefile("rb") as lines,
        ):
            for line in lines:
                # A machine that was cut off leaves half a line.
                with contextlib.suppress(json.JSONDecodeError):
                    message = json.loads(line)
                    with self.changed:
                        self._received(message)
                        self.changed.notify_all()
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def send(self, message: Mapping[str, object]) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def wait(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: ready() or self.closed, timeout_s):
                raise VmError(f"{what}: not within {timeout_s:.0f} s")
            if not ready():
                raise VmError(f"{what}: the machine went off")


class Qmp:
    """QEMU's own control: https://www.qemu.org/docs/master/interop/qmp-spec.html"""

    def __init__(self, connection: socket.socket) -> None:
        self._numbers = itertools.count(1)
        self._answers: dict[int, Json] = {}
        self.events: list[Json] = []
        self.channel = _Channel(connection, self._received)
        self.execute("qmp_capabilities")

    def _received(self, message: Json) -> None:
        if "event" in message:
            self.events.append(message)
        elif "id" in message:
            self._answers[message["id"]] = message

    def execute(self, command: str, **arguments: object) -> object:
        number = next(self._numbers)
        self.channel.send({"execute": command, "arguments": arguments, "id": number})
        self.channel.wait(lambda: number in self._answers, 60, command)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise VmError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def migrate(self, command: str, memory: Path, timeout_s: float = 120) -> None:
        """Write the machine's memory to a file, or read it: https://www.qemu.org/docs/master/devel/migration/mapped-ram.html"""
        before = len(self.events)

        def ended() -> list[str]:
            changes = [e["data"] for e in self.events[before:] if e["event"] == "MIGRATION"]
            return [c["status"] for c in changes if c["status"] in ("completed", "failed")]

        capabilities = [{"capability": name, "state": True} for name in ("events", "mapped-ram")]
        self.execute("migrate-set-capabilities", capabilities=capabilities)
        self.execute(command, uri=f"file:{memory}")
        self.channel.wait(lambda: bool(ended()), timeout_s, command)
        if ended() != ["completed"]:
            raise VmError(f"{command} of {memory} failed: {self.execute('query-migrate')}")

    def wait_event(self, name: str, timeout_s: float = 60, **data: object) -> Json:
        """The event of this name and data, also if it has already come."""

        def found() -> list[Json]:
            return [
                event
                for event in self.events
                if event["event"] == name and data.items() <= event.get("data", {}).items()
            ]

        self.channel.wait(lambda: bool(found()), timeout_s, name)
        return found()[0]


class Background:
    """A command that runs in the machine while the test goes on."""

    def __init__(self, control: "_Control", number: int, argv: Sequence[str]) -> None:
        self._control = control
        self._number = number
        self.argv = argv

    @property
    def running(self) -> bool:
        return not self._control.ended(self._number)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._control.channel.send({"id": self._number, "signal": number})

    def wait_bytes(
        self, timeout_s: float = RUN_TIMEOUT_S, *, check: bool = True
    ) -> tuple[int, bytes, bytes]:
        # The machine keeps the time of its commands; this bounds a machine that hangs.
        code, out, err = self._control.wait(self._number, timeout_s, shlex.join(self.argv))
        if check and code:
            raise CommandError(self.argv, _result(code, out, err))
        return code, out, err

    def wait(self, timeout_s: float = RUN_TIMEOUT_S, *, check: bool = True) -> Result:
        return _result(*self.wait_bytes(timeout_s, check=check))


def _result(code: int, out: bytes, err: bytes) -> Result:
    return Result(code, out.decode(errors="replace"), err.decode(errors="replace"))


class _Control:
    """The other end of the image's vm-control."""

    def __init__(
        self, connection: socket.socket, boot_ids: Sequence[str] = (), first: int = 1
    ) -> None:
        # Commands that run in a machine while it is saved keep their numbers when it goes on.
        self._numbers = itertools.count(first)
        self._answers: dict[int, Json] = {}
        self.boot_ids = list(boot_ids)
        self.channel = _Channel(connection, self._received)

    def _received(self, message: Json) -> None:
        if "boot_id" in message:
            self.boot_ids.append(message["boot_id"])
        elif "code" in message:
            self._answers[message["id"]] = message

    def reserve(self) -> int:
        """The next command's number."""
        return next(self._numbers)

    def start(self, argv: Sequence[str], stdin: bytes, timeout_s: float | None) -> int:
        number = self.reserve()
        self.channel.send(
            {
                "id": number,
                "argv": list(argv),
                "stdin": base64.b64encode(stdin).decode(),
                "timeout_s": timeout_s,
            }
        )
        return number

    def ended(self, number: int) -> bool:
        return number in self._answers

    def wait(self, number: int, timeout_s: float, what: str) -> tuple[int, bytes, bytes]:
        self.channel.wait(lambda: number in self._answers, timeout_s, what)
        answer = self._answers[number]
        return answer["code"], base64.b64decode(answer["out"]), base64.b64decode(answer["err"])


Command = str | Sequence[str]


def _argv(command: Command) -> list[str]:
    return ["bash", "-c", command] if isinstance(command, str) else list(command)


class Vm:
    """One boot of a host, from power on to power off."""

    def __init__(
        self,
        host: "Host",
        process: subprocess.Popen[bytes],
        sockets: "_Sockets",
        disks: Mapping[int, str],
        saved: "_Saved | None" = None,
    ) -> None:
        self.host = host
        if saved:
            # `read_text` would drop the carriage returns, which are counted in what was seen.
            text = host.console_path(host.boots).read_bytes().decode(errors="replace")
            self.console = Console(sockets.console, text, saved.console_seen)
            self._control = _Control(sockets.control, [saved.boot_id], saved.next_command)
        else:
            self.console = Console(sockets.console)
            self._control = _Control(sockets.control)
        self.qmp = Qmp(sockets.qmp)
        self._process = process
        self.slots = saved.slots if saved else host.slots
        # Index of a disk that is plugged in → the bus that it is on.
        self._buses = dict(disks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.power_cut()

    # Commands

    def comes_up(self, timeout_s: float = BOOT_TIMEOUT_S) -> bool:
        """False if QEMU has lost the timer of a CPU, which its kernel sees after 21 seconds."""
        deadline = time.monotonic() + timeout_s
        while self.on and not self._control.boot_ids and time.monotonic() < deadline:
            if LOST_TIMER in self.console.transcript:
                return False
            with contextlib.suppress(VmError):  # not yet: what does the console say?
                self.wait_control(2)
        return True  # or something else is wrong, which shows when it is used

    def wait_control(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Until commands can be run: early in the boot, long before it is complete."""
        control = self._control
        try:
            control.channel.wait(lambda: bool(control.boot_ids), timeout_s, "control channel")
        except VmError as error:
            raise VmError(f"{error}. Console:\n{self.console.transcript[-2000:]}") from None

    def background(
        self, command: Command, *, stdin: bytes = b"", timeout_s: float | None = None
    ) -> Background:
        self.wait_control()
        argv = _argv(command)
        return Background(self._control, self._control.start(argv, stdin, timeout_s), argv)

    def run_bytes(
        self,
        command: Command,
        *,
        stdin: bytes = b"",
        timeout_s: float = RUN_TIMEOUT_S,
        check: bool = True,
    ) -> tuple[int, bytes, bytes]:
        job = self.background(command, stdin=stdin, timeout_s=timeout_s)
        return job.wait_bytes(timeout_s + 30, check=check)

    def run(
        self,
        command: Command,
        *,
        stdin: bytes = b"",
        timeout_s: float = RUN_TIMEOUT_S,
        check: bool = True,
    ) -> Result:
        """Runs a command as root, a string by bash; the exit status is 124 when it took longer."""
        return _result(*self.run_bytes(command, stdin=stdin, timeout_s=timeout_s, check=check))

    def put(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        data = content.encode() if isinstance(content, str) else content
        quoted = shlex.quote(path)
        script = f'mkdir -p "$(dirname {quoted})" && umask 077 && cat >{quoted}'
        self.run(f"{script} && chmod {mode:o} {quoted}", stdin=data)

    def get(self, path: str) -> bytes:
        return self.run_bytes(["cat", "--", path])[1]

    def read_counters(self, disk: str) -> guest.Counters:
        """The counters of the boot sector guest on a disk as the machine sees it."""
        size = 3 * guest.SECTOR
        return guest.counters(self.run_bytes(["head", "-c", f"{size}", "--", disk])[1])

    def wait_counters(
        self, disk: str, expected: guest.Counters, timeout_s: float = RUN_TIMEOUT_S
    ) -> None:
        numbers = f"$(od -An -v -tu4 -w512 -j512 -N1024 {disk} | awk '{{ print $1 }}')"
        wanted = f"{expected.starts}\n{expected.clean_stops}"
        self.wait_until(f"[ \"{numbers}\" = $'{wanted}' ]", timeout_s)

    def wait_until(self, command: str, timeout_s: float = RUN_TIMEOUT_S) -> Result:
        """Until this shell condition holds, where the machine tells of it by no event.

        Asking costs an emulated machine the time that it needs to get there.
        """
        loop = f"until {{ {command}\n}} >/dev/null 2>&1; do sleep 0.5; done; {command}"
        return self.run(loop, timeout_s=timeout_s)

    def wait_unit(self, unit: str, state: str = "active", timeout_s: float = RUN_TIMEOUT_S) -> None:
        condition = f'[ "$(systemctl show --value -p ActiveState {unit})" = {state} ]'
        try:
            self.wait_until(condition, timeout_s)
        except CommandError as error:
            status = self.run(f"systemctl status --no-pager {unit}", check=False)
            raise CommandError(["wait_unit", unit, state], status) from error

    def wait_booted(self, timeout_s: float = BOOT_TIMEOUT_S) -> str:
        """Until no boot job is left; says what systemd says: running or degraded."""
        command = "systemctl is-system-running --wait"
        return self.run(command, timeout_s=timeout_s, check=False).out.strip()

    # Power

    @property
    def on(self) -> bool:
        return self._process.poll() is None

    def wait_off(self, timeout_s: float = OFF_TIMEOUT_S) -> str:
        """Until QEMU has ended; says why: guest-shutdown, guest-reset, guest-panic…"""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            tail = self.console.transcript[-2000:]
            raise VmError(f"not off within {timeout_s:.0f} s. Console:\n{tail}") from None
        self._read_to_the_end()
        reasons = [event["data"]["reason"] for event in self.qmp.events
                   if event["event"] == "SHUTDOWN"]  # fmt: skip
        return reasons[0] if reasons else "killed"

    def poweroff(self, timeout_s: float = OFF_TIMEOUT_S) -> str:
        """Shuts down cleanly."""
        self.run("systemctl poweroff --no-block")
        return self.wait_off(timeout_s)

    def reboot(self, timeout_s: float = OFF_TIMEOUT_S) -> str:
        """Shuts down cleanly for a reboot, which is the host's next boot()."""
        self.run("systemctl reboot --no-block")
        return self.wait_off(timeout_s)

    def power_button(self) -> None:
        self.qmp.execute("system_powerdown")

    def power_cut(self) -> None:
        """From one instruction to the next; what was not yet on the disks is lost."""
        self._process.kill()
        self._process.wait()
        self._read_to_the_end()

    def _read_to_the_end(self) -> None:
        for reader in (self.console, self.qmp.channel, self._control.channel):
            reader.reader.join()

    # Snapshots

    def save(self, directory: Path | None = None) -> "Snapshot":
        """Keep the machine as it is at this moment, with its disks, and end it.

        Commands in the background go on in the machine that is resumed; their answers get lost. The snapshot lies
        in the host's directory unless another one is given.
        """
        directory = directory or self.host.directory / "kept"
        unfinished = directory.with_name(directory.name + ".new")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        unfinished.mkdir(parents=True)
        saved = _Saved(
            host=self.host.description(),
            slots=self.slots,
            # As items: the keys of a JSON object are no numbers.
            disks=list(self._buses.items()),
            boot_id=self._control.boot_ids[0],
            next_command=self._control.reserve(),
            console_seen=self.console.seen,
        )
        (unfinished / _MACHINE).write_text(json.dumps(dataclasses.asdict(saved), indent=1))
        self.qmp.execute("stop")
        self.qmp.migrate("migrate", unfinished / _MEMORY)
        self.qmp.execute("quit")
        self.wait_off()
        self.host.keep_files(unfinished)
        unfinished.rename(directory)
        return Snapshot(directory)

    def load(self, snapshot: "Snapshot") -> None:
        """The other end of save(), in a machine that waits for it."""
        self.qmp.migrate("migrate-incoming", snapshot.directory / _MEMORY)
        self.qmp.execute("cont")

    # Disks

    def plug_disk(self, index: int) -> str:
        """Plugs in one of the host's disks; it appears as /dev/disk/by-id/virtio-diskINDEX."""
        taken = self._buses.values()
        slot = next((name for name in _slot_names(self.slots) if name not in taken), None)
        if slot is None:
            raise VmError(f"all {self.slots} slots are taken")
        self.qmp.execute("blockdev-add", **self.host.block_device(index))
        self.qmp.execute("device_add", **_disk_device(index, slot))
        self._buses[index] = slot
        return f"/dev/disk/by-id/virtio-disk{index}"

    def unplug_disk(self, index: int) -> None:
        """Unplugs a disk as its tray's button does: the machine releases it first."""
        name = f"disk{index}"
        if self._buses.get(index) in (None, _FIXED):
            raise VmError(f"{name} was not plugged in by plug_disk()")
        self.qmp.events.clear()
        self.qmp.execute("device_del", id=name)
        self.qmp.wait_event("DEVICE_DELETED", device=name)
        self.qmp.execute("blockdev-del", **{"node-name": name})
        del self._buses[index]


_MACHINE, _MEMORY = "machine.json", "memory"
_FIXED = "pcie.0"  # where disks are that a machine has from the start


def _slot_names(slots: int) -> list[str]:
    return [f"slot{number}" for number in range(slots)]


def _disk_device(index: int, slot: str) -> Json:
    name = f"disk{index}"
    return {"driver": "virtio-blk-pci", "id": name, "drive": name, "serial": name, "bus": slot}


@dataclass(frozen=True)
class _Saved:
    """A machine whose memory is saved in a file."""

    host: Json
    slots: int
    disks: Sequence[tuple[int, str]]
    boot_id: str
    next_command: int
    console_seen: int

    @property
    def buses(self) -> dict[int, str]:
        return dict(self.disks)


@dataclass(frozen=True)
class Snapshot:
    """A machine that was saved: its memory, and its disks at that moment. It is never written to.

    The clock of a machine that is resumed goes on from when it was saved.
    """

    directory: Path

    def saved(self) -> _Saved:
        return _Saved(**json.loads((self.directory / _MACHINE).read_text()))

    def file(self, name: str) -> Path:
        return self.directory / name


@dataclass(frozen=True)
class _Sockets:
    console: socket.socket
    control: socket.socket
    qmp: socket.socket


@dataclass
class Host:
    """A machine with its disks, which stay while it is booted and switched off again."""

    image: Image
    directory: Path
    # Sizes as truncate(1) takes them. They are blank at first.
    disks: Sequence[str] = ()
    # Those of the disks that are in the machine when it is switched on; all, if not said.
    plugged: Sequence[int] | None = None
    memory_mib: int = 3072
    cpus: int = 2
    slots: int = SLOTS
    kernel_options: Sequence[str] = ()
    extra_qemu: Sequence[str] = ()
    # What resume() goes on from, with the disks that belong to it. None: the image, booted and settled. The devices in
    # `extra_qemu` have to be the same; what they know comes with the memory.
    snapshot: Snapshot | None = None
    boots: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.snapshot:
            if self.disks:
                raise ValueError("a snapshot has its own disks")
            for name, value in self.snapshot.saved().host.items():
                setattr(self, name, value)
        if not self.root_path.exists():
            for index, size in enumerate(self.disks):
                if self.snapshot:
                    _copy(self.snapshot.file(self.disk_path(index).name), self.disk_path(index))
                else:
                    subprocess.run(["truncate", "-s", size, self.disk_path(index)], check=True)
            self._overlay(self.snapshot)

    def _overlay(self, snapshot: Snapshot | None) -> None:
        """A root of this machine's own, over what it begins with."""
        kind, lower = "raw", self.image.disk
        if snapshot:
            kind, lower = "qcow2", snapshot.file(self.root_path.name)
        command: list[str | Path] = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            kind,
            "-b",
            lower,
            self.root_path,
        ]
        subprocess.run([*self.image.tool("qemu-img"), *command], check=True)

    def description(self) -> Json:
        """The fields that a machine must have to be resumed from a snapshot of this one."""
        names = ("disks", "plugged", "memory_mib", "cpus", "kernel_options")
        return {name: getattr(self, name) for name in names}

    def keep_files(self, directory: Path) -> None:
        """The files of a saved machine: its disks and its transcripts."""
        self.root_path.rename(directory / self.root_path.name)
        for index in range(len(self.disks)):
            self.disk_path(index).rename(directory / self.disk_path(index).name)
        for path in self._transcripts():
            path.rename(directory / _transcript(path))

    @property
    def root_path(self) -> Path:
        return self.directory / "root.qcow2"

    def disk_path(self, index: int) -> Path:
        """A disk as the thief of the machine has it: a raw file."""
        return self.directory / f"disk{index}.img"

    def block_device(self, index: int) -> Json:
        """One of the disks, as an option of QEMU."""
        # A raw file in the page cache survives QEMU's death: no flush has to reach a real disk.
        cache = {"no-flush": True}
        file = {"driver": "file", "filename": f"{self.disk_path(index)}", "cache": cache}
        disk = {"driver": "raw", "node-name": f"disk{index}", "file": file, "cache": cache}
        return {**disk, "discard": "unmap"}

    def console_path(self, boot: int) -> Path:
        return self.directory / f"console-{boot}.log"

    def journal_path(self, boot: int) -> Path:
        """The journal to the last line, also of a machine that went off."""
        return self.directory / f"journal-{boot}.log"

    def _transcripts(self) -> list[Path]:
        return [self.console_path(self.boots), self.journal_path(self.boots)]

    def boot(self, *, wait: bool = True) -> Vm:
        """Switches on and waits until the boot is complete.

        Without waiting, the machine is as it is: commands run as soon as it takes them, which is
        before udev has made names for its disks.
        """
        while True:
            vm = self.switch_on()
            try:
                if vm.comes_up():
                    if wait:
                        vm.wait_booted()
                    return vm
            except BaseException:
                vm.power_cut()
                raise
            # None of the machine's own programs has run: nothing that is tested is tried twice.
            vm.power_cut()
            self.boots -= 1

    def resume(self) -> Vm:
        """Go on from the host's snapshot, once; its clock goes on from when that was saved.

        A host without one goes on from its image, booted and settled, and gets its disks plugged in.
        """
        if self.boots:
            raise VmError(
                "the disks of this host are not any more as the snapshot's memory knows them"
            )
        snapshot = self.snapshot or booted(self)
        saved = snapshot.saved()
        self.boots += 1
        for path in self._transcripts():
            shutil.copyfile(snapshot.file(_transcript(path)), path)
        if not self.snapshot:
            self.root_path.unlink()
            self._overlay(snapshot)
        vm = self._start(saved)
        try:
            vm.load(snapshot)
            if not self.snapshot:
                devices = [vm.plug_disk(index) for index in self._plugged()]
                if devices:
                    vm.wait_until(" && ".join(f"test -b {device}" for device in devices))
        except BaseException:
            vm.power_cut()
            raise
        return vm

    def switch_on(self) -> Vm:
        """The machine from its first moment on, for who watches."""
        self.boots += 1
        for path in self._transcripts():
            path.unlink(missing_ok=True)
        return self._start()

    def _start(self, saved: _Saved | None = None) -> Vm:
        disks = saved.buses if saved else dict.fromkeys(self._plugged(), _FIXED)
        pairs = {name: socket.socketpair() for name in _Sockets.__dataclass_fields__}
        inner = {name: pair[1].fileno() for name, pair in pairs.items()}
        # QEMU must not outlive a test run that was killed.
        outlive_none = ["setpriv", "--pdeathsig", "KILL", "--"]
        command = [*outlive_none, *self._qemu(inner, disks, saved)]
        with (self.directory / f"qemu-{self.boots}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=tuple(inner.values()),
                env=self.image.environment(),
            )
        for _, end in pairs.values():
            end.close()
        ours = _Sockets(**{name: pair[0] for name, pair in pairs.items()})
        try:
            return Vm(self, process, ours, disks, saved)
        except VmError as error:
            process.kill()
            process.wait()
            said = (self.directory / f"qemu-{self.boots}.log").read_text()
            raise VmError(f"QEMU did not start: {error}\n{said}") from None

    def _plugged(self) -> Sequence[int]:
        return range(len(self.disks)) if self.plugged is None else self.plugged

    def _machine(self, slots: int) -> list[str]:
        """The part of the command line that a machine and those that are resumed from it have in common."""
        accel = accelerator(self.image)
        options = [
            "root=LABEL=root",
            "rw",
            "console=ttyS0",
            "loglevel=4",
            # A crash ends the machine, and with it the test's waiting.
            "panic=-1",
            # What costs an emulated machine time and gives a test nothing.
            "mitigations=off",
            "nokaslr",
            "audit=0",
            "cryptomgr.notests",
            # QEMU's emulation now and then loses the interrupt of a one-shot timer while a second CPU comes up, and
            # that never wakes ("rcu_preempt kthread timer wakeup didn't happen"). A periodic one comes again.
            *(("nohz=off", "highres=off") if accel == "tcg" and self.cpus > 1 else ()),
            *self.kernel_options,
        ]
        return [
            "-nodefaults", "-no-user-config", "-display", "none", "-nic", "none",
            # Without what the machine has no use for.
            "-machine", "q35,sata=off,smbus=off,i8042=off",
            "-accel", "kvm" if accel == "kvm" else "tcg,thread=multi",
            "-cpu", CPU[accel], "-smp", f"{self.cpus}", "-m", f"{self.memory_mib}",
            # A reboot ends QEMU too: it is the test that boots again.
            "-action", "reboot=shutdown",
            "-kernel", f"{self.image.kernel}",
            "-initrd", f"{self.image.initrd}",
            "-append", " ".join(options),
            "-device", "virtio-blk-pci,drive=root,serial=root",
            # Eight to a device: the guest finds and drives them as if each were one of its own.
            *(
                word
                for number, slot in enumerate(_slot_names(slots))
                for word in (
                    "-device",
                    json.dumps({
                        "driver": "pcie-root-port", "id": slot, "chassis": number + 1,
                        "multifunction": True, "addr": f"{0x10 + number // 8:#x}.{number % 8}",
                    }),
                )
            ),
            "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci",
            "-serial", "chardev:console",
            "-device", "virtserialport,chardev=control,name=vm.control",
            "-device", "virtserialport,chardev=journal,name=vm.journal",
            *self.extra_qemu,
        ]  # fmt: skip

    def _qemu(
        self, sockets: Mapping[str, int], disks: Mapping[int, str], saved: _Saved | None
    ) -> list[str]:
        return [
            *self.image.qemu(),
            "-chardev",
            f"socket,id=console,fd={sockets['console']},logfile={self.console_path(self.boots)},logappend=on",
            "-chardev", f"socket,id=control,fd={sockets['control']}",
            "-chardev", f"file,id=journal,path={self.journal_path(self.boots)},append=on",
            "-chardev", f"socket,id=qmp,fd={sockets['qmp']}",
            "-mon", "chardev=qmp,mode=control",
            "-blockdev",
            f"driver=qcow2,node-name=root,file.driver=file,file.filename={self.root_path}",
            *self._machine(saved.slots if saved else self.slots),
            *(
                word
                for index, bus in disks.items()
                for word in (
                    "-blockdev", json.dumps(self.block_device(index)),
                    "-device", json.dumps(_disk_device(index, bus)),
                )
            ),
            *(("-incoming", "defer") if saved else ()),
        ]  # fmt: skip


def booted(host: Host) -> Snapshot:
    """The snapshot of a host's image after its boot, without disks: made once and kept beside the image."""
    if host.extra_qemu:
        raise VmError("a machine with devices of its own has no snapshot of its boot: boot it")
    slots = SLOTS_OF_A_SNAPSHOT
    key = hashlib.sha256("\0".join([*host._machine(slots), SETTLE]).encode()).hexdigest()[:12]
    directory = host.image.directory / f"booted-{key}"
    with (host.image.directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run side by side boot one
        if not directory.exists():
            with (
                tempfile.TemporaryDirectory(dir=host.image.directory, prefix="booting-") as name,
                dataclasses.replace(
                    host, directory=Path(name), disks=(), plugged=None, slots=slots
                ).boot() as vm,
            ):
                vm.run(SETTLE)
                vm.save(directory)
    return Snapshot(directory)


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", source, target], check=True)


def _transcript(path: Path) -> str:
    """console-3.log → console.log"""
    return path.name.partition("-")[0] + path.suffix
