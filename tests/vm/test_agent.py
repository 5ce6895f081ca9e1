# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest with a real guest agent: it is waited for on the way up, and stops the guest on the way down."""

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory

# Emulated on an emulated machine, even a kernel and one program take their time.
SLOW_S = 600.0
IMAGES = "/var/lib/libvirt/images"

SAID = "/var/log/libvirt/qemu/agent-console.log"
GO = "/run/agent-go"

# The agent is all that runs, besides what it calls to stop the guest. Nothing there hears the power button.
# It runs from when the test says so.
INIT = """\
#!/usr/bin/dash
export PATH=/usr/bin:/usr/sbin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
echo up >/dev/ttyS0
read go </dev/ttyS1
exec qemu-ga --method=virtio-serial --path=/dev/vport0p1
"""
SHUTDOWN = """\
#!/usr/bin/dash
echo "asked to stop by the agent: $*" >/dev/ttyS0
echo o >/proc/sysrq-trigger
"""
BUILD = rf"""
root=$(mktemp -d)
mkdir -p $root/dev $root/proc $root/sys $root/var/run $root/sbin
for program in /usr/bin/dash /usr/bin/mount /usr/sbin/qemu-ga; do
    for file in $program $(ldd $program | grep -o '/[^ ]*'); do
        [ -e $root$file ] || install -D $file $root$file
    done
done
install /root/init $root/init
install /root/shutdown $root/sbin/shutdown
cd $root
find . | cpio --quiet -o -H newc | gzip -1 >{IMAGES}/initrd.img
cp /vmlinuz {IMAGES}/vmlinuz
"""


def domain_xml(disk: str) -> str:
    plain = guest.domain_xml("agent", disk)
    system = (
        f"<kernel>{IMAGES}/vmlinuz</kernel><initrd>{IMAGES}/initrd.img</initrd>"
        "<cmdline>console=ttyS0 quiet panic=-1 mitigations=off nokaslr cryptomgr.notests</cmdline></os>"
    )
    devices = (
        f"<serial type='file'><source path='{SAID}' append='on'/></serial>"
        f"<serial type='unix'><source mode='bind' path='{GO}'/></serial>"
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices>"
    )
    larger = plain.replace("<memory unit='MiB'>32</memory>", "<memory unit='MiB'>160</memory>")
    return larger.replace("</os>", system).replace("</devices>", devices)


@pytest.mark.long
def test_a_guest_with_an_agent(host: HostFactory) -> None:
    # One CPU, emulated, is too little for a guest with a whole system in it: its agent would be taken for dead.
    with host(disks=["64M", "64M"], cpus=2).resume() as vm:
        setup = lab.Lab(vm)
        vm.put("/root/init", INIT, 0o755)
        vm.put("/root/shutdown", SHUTDOWN, 0o755)
        vm.run(BUILD)
        setup.luks(lab.disk(0))
        mapping = setup.open(lab.disk(0), "cr_agent")
        setup.volume("cr_agent", lab.disk(0))
        setup.domain("agent", xml=domain_xml(mapping))
        # So that it boots within the time that guests have to be ready in.
        vm.run("virsh -q start agent")
        vm.wait_until(f"grep -q up {SAID}", SLOW_S)
        vm.run("virsh -q managedsave agent", timeout_s=SLOW_S)
        setup.close("cr_agent")
        setup.encrypted_guest("later", lab.disk(1))
        setup.table("guest.agent", {"ready": "agent", "stop_timeout": "5min"})
        setup.table("guest.later", {"after": ["agent"]})
        setup.write_config(reload=True)
        vm.run("vmcryptctl boot")
        lab.wait_state(vm, "waiting")
        assert lab.unlock(vm) == 0

        # The guest after it waits for its agent.
        lab.wait_object(vm, "guest", "agent", "running")
        assert lab.guest_states(vm)["later"] == "off"
        assert lab.status(vm)["state"] == "unlocking"
        vm.run(f"echo | nc -NU {GO}")
        lab.wait_object(vm, "guest", "later", "running")
        assert "not ready" not in vm.run("journalctl -b -o cat -u vmcryptd").out
        vm.run(f"virsh -q guest-agent-timeout agent --timeout {SLOW_S:.0f}")
        ping = ["virsh", "qemu-agent-command", "agent", '{"execute": "guest-ping"}']
        assert vm.run(ping).out.split() == ['{"return":{}}']
        lab.wait_state(vm, "ready")

        vm.run("vmcryptctl stop agent", timeout_s=SLOW_S)
        assert "asked to stop by the agent: -h -P" in vm.run(["cat", SAID]).out
        assert vm.run("virsh domstate agent --reason").out.split() == ["shut", "off", "(shutdown)"]
        vm.run("vmcryptctl lock cr_agent")
