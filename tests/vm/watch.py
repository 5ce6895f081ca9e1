# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test host records from before its daemon is up: arguments and environments of all processes, and the bus."""

from collections.abc import Iterable

from tests.vm.host import Vm

NEEDLES = "/root/needles"
BUS = "/root/bus"
_SAMPLED = "/root/sampled"

# No search may name in its own arguments what it looks for, so patterns are in files.
_UNIT = """\
[Unit]
DefaultDependencies=no
After=dbus.socket local-fs.target
Before=vmcryptd.service
[Service]
ExecStart={command}
[Install]
WantedBy=multi-user.target
"""
_SAMPLE = f"""\
#!/bin/bash
while :; do
    for what in cmdline environ; do
        # Reported at once: the process may be gone at the next look.
        grep -HsaoFf {NEEDLES} /proc/[0-9]*/$what | while IFS=/: read -r _ _ pid what found; do
            echo "$what of $(cat /proc/$pid/comm 2>/dev/null): $found" >>{_SAMPLED}
        done
    done
    echo >>/root/samples
done
"""


def install(vm: Vm, needles: Iterable[str]) -> None:
    """From the next boot on."""
    vm.put(NEEDLES, "".join(f"{needle}\n" for needle in needles), 0o600)
    vm.put("/usr/local/bin/sample", _SAMPLE, 0o755)
    vm.put("/usr/local/bin/record", f"#!/bin/sh\nexec busctl capture >{BUS}\n", 0o755)
    for unit in ("sample", "record"):
        command = f"/usr/local/bin/{unit}"
        vm.put(f"/etc/systemd/system/{unit}.service", _UNIT.format(command=command))
    vm.run("systemctl enable -q sample record")


def sampled(vm: Vm, control: str) -> list[str]:
    """The arguments and environments in which a needle was seen; `control` is one that is planted in both first."""
    for what, plant in {
        "environ": f"PLANTED={control} exec sleep 1h",
        "cmdline": f"exec -a {control} sleep 1h",
    }.items():
        # Typed into a shell, because a command is itself an argument.
        planted = vm.background(["bash", "-s"], stdin=f"{plant}\n".encode())
        vm.wait_until(f"grep -q '^{what} of sleep' {_SAMPLED}")
        planted.signal(9)
        planted.wait(check=False)
    assert int(vm.run("wc -l </root/samples").out) > 20, "hardly anything was sampled"
    return [line for line in vm.get(_SAMPLED).decode().splitlines() if control not in line]


def in_output(vm: Vm, command: str, needle: str) -> list[str]:
    """The lines of a command's output that hold it, or one of its lines."""
    script = f"exec 3<&0; {command} </dev/null | grep -aFf /dev/fd/3"
    return vm.run(script, stdin=needle.encode(), check=False).out.splitlines()
