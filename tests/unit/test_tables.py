# SPDX-License-Identifier: LGPL-2.1-or-later
"""fstab and crypttab: which of their lines are in a volume's way, and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmcryptd.audit import probe, tables
from vmcryptd.audit.tables import CRYPTTAB, FSTAB, Fault
from vmcryptd.config import schema
from vmcryptd.core import graph
from vmcryptd.core.model import BlockDevice, Observation, Storage

UUID = "3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"
MAPPED = f"CRYPT-LUKS2-{UUID.replace('-', '')}-"
BEFORE = tables.BEFORE
GUARDED = f"noauto,{BEFORE}"

CONFIG = f"""
[volume.imap]
device = "/dev/vg0/imap"
[volume.store]
device = "UUID={UUID}"
content = "filesystem"
mount = "/srv/vm"
[volume.outer]
device = "/dev/disk/by-id/outer"
content = "lvm"
vg = "in-ner"
"""
DEVICES = {
    "vda": BlockDevice("vda", "254:0"),
    "vdb": BlockDevice("vdb", "254:16"),
    "vdc": BlockDevice("vdc", "254:32"),
    "vdd": BlockDevice("vdd", "254:48"),
}
LINKS = {
    "/dev/vg0/imap": "vda",
    "/dev/vda": "vda",
    f"/dev/disk/by-uuid/{UUID}": "vdb",
    "/dev/vdb": "vdb",
    "/dev/disk/by-id/outer": "vdc",
    "/dev/vdd": "vdd",
}
OPEN = {
    "dm-0": BlockDevice("dm-0", "253:0", ("vda",), "imap", MAPPED + "imap"),
    "dm-1": BlockDevice("dm-1", "253:1", ("vdb",), "store", MAPPED + "store"),
    "dm-2": BlockDevice("dm-2", "253:2", ("vdc",), "outer", MAPPED + "outer"),
    "dm-3": BlockDevice("dm-3", "253:3", ("dm-2",), "in--ner-root", "LVM-x"),
}
OPEN_LINKS = {
    "/dev/mapper/imap": "dm-0",
    "/dev/disk/by-uuid/inside-store": "dm-1",
    "/dev/disk/by-uuid/inside-outer": "dm-3",
    "/dev/mapper/in--ner-root": "dm-3",
}


def faults(file: str, *lines: str, is_open: bool = False) -> list[Fault]:
    devices, links = (DEVICES | OPEN, LINKS | OPEN_LINKS) if is_open else (DEVICES, LINKS)
    storage = Storage(devices, links)
    built = graph.build(schema.parse({"x": CONFIG}), Observation(storage))
    return list(tables.faults(tables.entries(file, lines), built, storage))


@pytest.mark.parametrize(
    ("line", "volume", "words", "instead"),
    [
        ("/dev/mapper/store /srv/vm ext4 defaults 0 2", "store", "emergency shell",
         f"/dev/mapper/store /srv/vm ext4 {GUARDED} 0 2"),
        ("UUID=unknown\t/srv/vm/ ext4 rw,noatime", "store", "emergency shell",
         f"UUID=unknown /srv/vm/ ext4 rw,noatime,{GUARDED}"),
        ("/srv/vm/images /var/lib/libvirt/images none bind 0 0", "store", "emergency shell",
         f"/srv/vm/images /var/lib/libvirt/images none bind,{GUARDED} 0 0"),
        (f"UUID=\"{UUID}\" /x ext4 auto", "store", "emergency shell", f"UUID=\"{UUID}\" /x ext4 {GUARDED}"),
        ("/dev/in-ner/root /x xfs defaults", "outer", "emergency shell", f"/dev/in-ner/root /x xfs {GUARDED}"),
        ("/dev/mapper/in--ner-swap none swap sw 0 0", "outer", "swaps on it", f"swap sw,{GUARDED} 0 0"),
        (f"/dev/mapper/store /srv/vm ext4 nofail,{BEFORE} 0 2", "store", "vmcryptd waits for that",
         f"/dev/mapper/store /srv/vm ext4 nofail,{GUARDED}"),
        ("/dev/mapper/imap /mnt ext4 defaults", "imap", "destroys it", ""),
        ("/dev/mapper/imap /mnt ext4 nofail", "imap", "destroys it", ""),
        ("/dev/vda /mnt ext4 nofail", "imap", "destroys it", ""),
    ],
)  # fmt: skip
def test_a_line_of_fstab_that_stops_the_boot(
    line: str, volume: str, words: str, instead: str
) -> None:
    [fault] = faults(FSTAB, "# /dev/mapper/store /srv/vm", "", "/dev/vdd / ext4 defaults 0 1", line)
    assert (fault.volume, fault.is_error) == (volume, True)
    assert fault.text.startswith("line 4 of /etc/fstab")
    assert words in fault.text
    assert "take that line out" in fault.advice
    assert instead in fault.advice
    assert ("or write" in fault.advice) is bool(instead)


@pytest.mark.parametrize(
    "options", ["noauto", "nofail", "noauto,nofail,x-systemd.before=x.service"]
)
def test_a_mount_that_is_gone_before_the_guests_are(options: str) -> None:
    [fault] = faults(FSTAB, f"/dev/mapper/store /srv/vm ext4 {options}")
    assert not fault.is_error
    assert f"lacks {BEFORE}" in fault.text
    assert BEFORE in fault.advice


@pytest.mark.parametrize(
    "line",
    [
        f"/dev/mapper/store /srv/vm ext4 {GUARDED} 0 2",
        f"/dev/in-ner/root /x xfs {GUARDED},nofail",
        "/dev/mapper/imap /mnt ext4 noauto",
        "/dev/vdd /srv/vmware ext4 defaults",
        "/dev/mapper/other /x ext4 defaults",
        "/dev/mapper/in-other /x ext4 defaults",
        "tmpfs /srv tmpfs defaults",
        "nonsense",
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_lines_of_fstab_that_are_right(line: str, is_open: bool) -> None:
    assert faults(FSTAB, line, is_open=is_open) == []


@pytest.mark.parametrize(
    ("line", "volume"),
    [
        ("UUID=inside-store /x ext4 defaults", "store"),
        ("UUID=inside-outer /x ext4 defaults", "outer"),
        ("/dev/mapper/in--ner-root /x ext4 defaults", "outer"),
    ],
)
def test_what_only_an_open_volume_shows(line: str, volume: str) -> None:
    assert [fault.volume for fault in faults(FSTAB, line, is_open=True)] == [volume]


@pytest.mark.parametrize(
    ("line", "volume", "words", "instead"),
    [
        ("imap /dev/vg0/imap", "imap", "asked for twice, and boot waits", "imap /dev/vg0/imap none noauto"),
        ("imap /dev/vg0/imap none luks,nofail", "imap", "asked for twice",
         "imap /dev/vg0/imap none luks,nofail,noauto"),
        ("luks-x /dev/vda /root/key luks", "imap", "asked for twice", "luks-x /dev/vda /root/key luks,noauto"),
        (f"x UUID={UUID} none discard", "store", "asked for twice", f"x UUID={UUID} none discard,noauto"),
        ("store /dev/vdd none -", "store", "opens /dev/vdd at boot under the name", "store /dev/vdd none noauto"),
        ("imap /dev/vg0/imap none noauto,initramfs", "imap", "asked for twice", "update-initramfs"),
        ("imap /dev/vg0/imap none noauto,x-initrd.attach", "imap", "asked for twice", "dracut"),
    ],
)  # fmt: skip
def test_a_line_of_crypttab(line: str, volume: str, words: str, instead: str) -> None:
    [fault] = faults(CRYPTTAB, "# name device", "root /dev/vdd none luks", line)
    assert (fault.volume, fault.is_error) == (volume, True)
    assert fault.text.startswith("line 3 of /etc/crypttab")
    assert words in fault.text
    assert ("boot waits" in fault.text) is ("nofail" not in line and "twice" in fault.text)
    assert instead in fault.advice


@pytest.mark.parametrize(
    "line",
    ["imap /dev/vg0/imap none noauto", "root /dev/vdd none luks", "imap", "#imap /dev/vg0/imap"],
)
def test_lines_of_crypttab_that_are_right(line: str) -> None:
    assert faults(CRYPTTAB, line) == []


def test_a_mount_point_with_a_space() -> None:
    [entry] = tables.entries(FSTAB, [r"/dev/mapper/my\040vol /srv/a\040b ext4 noauto"])
    assert (entry.what, entry.where) == ("/dev/mapper/my vol", "/srv/a b")
    assert entry.with_options("ro").startswith(r"/dev/mapper/my\040vol /srv/a\040b ext4 ")


# --- libvirt-guests ---


@pytest.mark.parametrize(
    ("script", "default", "suspends"),
    [
        ('ON_SHUTDOWN="shutdown"\nif x; then\n    ON_SHUTDOWN=suspend\nfi\n', "#ON_SHUTDOWN=suspend\n", False),
        ("ON_SHUTDOWN=suspend\n", "", True),
        ("ON_SHUTDOWN=suspend\n", "ON_SHUTDOWN='shutdown'\n", False),
        ("ON_SHUTDOWN=shutdown\n", " ON_SHUTDOWN=suspend\n", True),
        (None, None, True),
    ],
)  # fmt: skip
def test_what_libvirt_guests_does_at_shutdown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str | None,
    default: str | None,
    suspends: bool,
) -> None:
    for name, text in (("script", script), ("default", default)):
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(probe, "LIBVIRT_GUESTS_SCRIPTS", (str(tmp_path / "script"),))
    monkeypatch.setattr(probe, "LIBVIRT_GUESTS", (str(tmp_path / "default"),))
    monkeypatch.setattr(probe, "QEMU_CONF", str(tmp_path / "none"))
    assert bool(probe._suspends({"libvirt-guests.service": "enabled"})) is suspends
    assert not probe._suspends({"libvirt-guests.service": "disabled"})
