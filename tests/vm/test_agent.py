# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest with a real guest agent: it is waited for on the way up, and stops the guest on the way down."""

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory

# Emulated on an emulated machine, even a kernel and one program take their time.
SLOW_S = 600.0
IMAGES = "/var/lib/libvirt/images"

# The agent is all that runs, besides what it calls to stop the guest. Nothing there hears the power button.
INIT = """\
#!/usr/bin/dash
export PATH=/usr/bin:/usr/sbin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
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
        "<serial type='file'><source path='/var/log/libvirt/qemu/agent-console.log'/></serial>"
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices>"
    )
    larger = plain.replace("<memory unit='MiB'>32</memory>", "<memory unit='MiB'>160</memory>")
    return larger.replace("</os>", system).replace("</devices>", devices)


def test_a_guest_with_an_agent(host: HostFactory) -> None:
    with host(disks=["64M", "64M"]).boot() as vm:
        setup = lab.Lab(vm)
        vm.put("/root/init", INIT, 0o755)
        vm.put("/root/shutdown", SHUTDOWN, 0o755)
        vm.run(BUILD)
        setup.luks(lab.disk(0))
        setup.volume("cr_agent", lab.disk(0))
        setup.domain("agent", xml=domain_xml("/dev/mapper/cr_agent"))
        setup.encrypted_guest("later", lab.disk(1))
        setup.table("guest.agent", {"ready": "agent", "stop_timeout": "10min"})
        setup.table("guest.later", {"after": ["agent"]})
        setup.write_config('[daemon]\nshutdown_timeout = "15min"\n', reload=True)
        vm.run("vmcryptctl boot")
        lab.wait_state(vm, "waiting")
        assert lab.unlock(vm) == 0

        # It runs long before its agent does; who comes after it waits for that.
        vm.wait_until("virsh domstate agent | grep -q running")
        assert lab.guest_states(vm)["later"] == "off"
        assert lab.status(vm)["state"] == "unlocking"
        lab.wait_object(vm, "guest", "later", "running", SLOW_S)
        assert lab.guest_states(vm)["agent"] == "running"
        ping = ["virsh", "qemu-agent-command", "agent", '{"execute": "guest-ping"}']
        assert vm.run(ping).out.split() == ['{"return":{}}']
        lab.wait_state(vm, "ready")

        vm.run("vmcryptctl stop agent", timeout_s=SLOW_S)
        said = vm.run("cat /var/log/libvirt/qemu/agent-console.log").out
        assert "asked to stop by the agent: -h -P" in said
        assert lab.guest_states(vm)["agent"] == "off"
        assert vm.run("virsh domstate agent --reason").out.split() == ["shut", "off", "(shutdown)"]
        vm.run("vmcryptctl lock cr_agent")
