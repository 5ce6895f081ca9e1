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

The host's directory keeps the console's and the journal's transcript of every boot.
"""

import base64
import contextlib
import functools
import itertools
import json
import os
import re
import shlex
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
HOTPLUG_SLOTS = 4

# A machine without KVM on a busy host is slow. These bound a hang; no test measures with them.
BOOT_TIMEOUT_S = 180.0
RUN_TIMEOUT_S = 120.0
OFF_TIMEOUT_S = 180.0

# Emulated, a second CPU's timer dies now and then while that comes up. The kernel cannot go on then.
LOST_TIMER = "rcu_preempt kthread timer wakeup didn't happen"

Accel = Literal["kvm", "tcg"]
Json = dict[str, Any]

# Emulated, a CPU with all that QEMU knows is slower: libraries choose wide vectors, page tables have a fifth level.
# What ciphers use stays.
CPU: dict[Accel, str] = {
    "kvm": "max",
    "tcg": "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+rdrand,+rdseed",
}


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
        return [f"{loader}", "--library-path", path, f"{self.tools / 'usr/bin' / name}"]

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
    """The first serial line, as somebody sees it who sits in front of it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._text = ""
        self._seen = 0
        self._closed = False
        # Called with what arrives, for somebody who watches.
        self.mirror: Callable[[bytes], None] = lambda data: None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._connection:
            while data := self._connection.recv(65536):
                self.mirror(data)
                with self._changed:
                    self._text += data.decode(errors="replace")
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
                match = re.compile(pattern).search(self._text, self._seen)
                if match:
                    self._seen = match.end()
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
    """JSON lines both ways; who waits is woken for each that arrives."""

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

    def __init__(self, connection: socket.socket) -> None:
        self._numbers = itertools.count(1)
        self._answers: dict[int, Json] = {}
        self.boot_ids: list[str] = []
        self.channel = _Channel(connection, self._received)

    def _received(self, message: Json) -> None:
        if "boot_id" in message:
            self.boot_ids.append(message["boot_id"])
        elif "code" in message:
            self._answers[message["id"]] = message

    def start(self, argv: Sequence[str], stdin: bytes, timeout_s: float | None) -> int:
        number = next(self._numbers)
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

    def __init__(self, host: "Host", process: subprocess.Popen[bytes], sockets: "_Sockets") -> None:
        self.host = host
        self.console = Console(sockets.console)
        self.qmp = Qmp(sockets.qmp)
        self._control = _Control(sockets.control)
        self._process = process
        self._slots = {f"slot{number}": "" for number in range(HOTPLUG_SLOTS)}

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

    # Disks

    def plug_disk(self, index: int) -> str:
        """Plugs in one of the host's disks; it appears as /dev/disk/by-id/virtio-diskINDEX."""
        slot = next((name for name, used in self._slots.items() if not used), None)
        if slot is None:
            raise VmError(f"all {HOTPLUG_SLOTS} slots are taken")
        name = f"disk{index}"
        self.qmp.execute("blockdev-add", **self.host.block_device(index))
        self.qmp.execute(
            "device_add", driver="virtio-blk-pci", id=name, drive=name, serial=name, bus=slot
        )
        self._slots[slot] = name
        return f"/dev/disk/by-id/virtio-{name}"

    def unplug_disk(self, index: int) -> None:
        """Pulls a plugged disk out as its tray's button does: the machine lets go of it first."""
        name = f"disk{index}"
        slot = next((slot for slot, used in self._slots.items() if used == name), None)
        if slot is None:
            raise VmError(f"{name} was not plugged in by plug_disk()")
        self.qmp.events.clear()
        self.qmp.execute("device_del", id=name)
        self.qmp.wait_event("DEVICE_DELETED", device=name)
        self.qmp.execute("blockdev-del", **{"node-name": name})
        self._slots[slot] = ""


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
    kernel_options: Sequence[str] = ()
    extra_qemu: Sequence[str] = ()
    boots: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for index, size in enumerate(self.disks):
            subprocess.run(["truncate", "-s", size, self.disk_path(index)], check=True)
        if not self.root_path.exists():
            subprocess.run(
                [
                    *self.image.tool("qemu-img"),
                    "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.image.disk,
                    self.root_path,
                ],
                check=True,
            )  # fmt: skip

    @property
    def root_path(self) -> Path:
        return self.directory / "root.qcow2"

    def disk_path(self, index: int) -> Path:
        """A disk as the thief of the machine has it: a raw file."""
        return self.directory / f"disk{index}.img"

    def block_device(self, index: int) -> Json:
        """One of the disks, as QEMU is told of it."""
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

    def switch_on(self) -> Vm:
        """The machine from its first moment on, for who watches."""
        self.boots += 1
        pairs = {name: socket.socketpair() for name in _Sockets.__dataclass_fields__}
        inner = {name: pair[1].fileno() for name, pair in pairs.items()}
        # QEMU must not outlive a test run that was killed.
        command = ["setpriv", "--pdeathsig", "KILL", "--", *self._qemu(inner)]
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
            return Vm(self, process, ours)
        except VmError as error:
            process.kill()
            process.wait()
            said = (self.directory / f"qemu-{self.boots}.log").read_text()
            raise VmError(f"QEMU did not start: {error}\n{said}") from None

    def _qemu(self, sockets: Mapping[str, int]) -> list[str]:
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
        plugged = range(len(self.disks)) if self.plugged is None else self.plugged
        return [
            *self.image.qemu(),
            "-nodefaults", "-no-user-config", "-display", "none", "-nic", "none",
            "-machine", "q35",
            "-accel", "kvm" if accel == "kvm" else "tcg,thread=multi",
            "-cpu", CPU[accel], "-smp", f"{self.cpus}", "-m", f"{self.memory_mib}",
            # A reboot ends QEMU too: it is the test that boots again.
            "-action", "reboot=shutdown",
            "-kernel", f"{self.image.kernel}",
            "-initrd", f"{self.image.initrd}",
            "-append", " ".join(options),
            "-blockdev",
            f"driver=qcow2,node-name=root,file.driver=file,file.filename={self.root_path}",
            "-device", "virtio-blk-pci,drive=root,serial=root",
            *(
                word
                for index in plugged
                for word in (
                    "-blockdev", json.dumps(self.block_device(index)),
                    "-device", f"virtio-blk-pci,drive=disk{index},serial=disk{index}",
                )
            ),
            *(
                word
                for slot in range(HOTPLUG_SLOTS)
                for word in ("-device", f"pcie-root-port,id=slot{slot},chassis={slot + 1}")
            ),
            "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci",
            "-chardev",
            f"socket,id=console,fd={sockets['console']},logfile={self.console_path(self.boots)}",
            "-serial", "chardev:console",
            "-chardev", f"socket,id=control,fd={sockets['control']}",
            "-device", "virtserialport,chardev=control,name=vm.control",
            "-chardev", f"file,id=journal,path={self.journal_path(self.boots)}",
            "-device", "virtserialport,chardev=journal,name=vm.journal",
            "-chardev", f"socket,id=qmp,fd={sockets['qmp']}",
            "-mon", "chardev=qmp,mode=control",
            *self.extra_qemu,
        ]  # fmt: skip
