# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which device and mapping is a volume's, when links, kernel names and copies mislead."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from tests.lib import key
from tests.unit.test_graph import OTHER, UUID, build, disk, luks, lv, settings, storage, volume
from vmcryptd.adapters.luks import mappings
from vmcryptd.core import identity
from vmcryptd.core.errors import WrongUuidError
from vmcryptd.core.model import BlockDevice, Observation, Remembered, Storage, Token
from vmcryptd.posix.run import Completed

TAG = f"UUID={UUID}"
LINK = f"/dev/disk/by-uuid/{UUID}"
SEEN = Remembered(uuids={"cr_a": UUID})


def claimed(seen: Storage, *names: str, link: str = LINK) -> Storage:
    return seen._replace(claims={link: names})


@pytest.mark.parametrize("device", [TAG, LINK, "LABEL=data", "PARTUUID=1-2"])
def test_an_open_volume_stays_when_a_copy_takes_its_link(device: str) -> None:
    """The mapping tells what is open: it is made of vda, wherever the link leads."""
    spec = volume("cr_a", device)
    seen = storage(disk("vda"), disk("vdb"), luks("dm-0", "cr_a", "vda"), vdb=spec.device_path)
    node = build(settings(spec), seen, remembered=SEEN).volumes["cr_a"]
    assert (node.mapping, node.device, node.spec.device) == ("cr_a", "vda", "/dev/vda")
    assert (node.taken_by, node.rivals, node.uuid) == ("", (), UUID)


def test_a_mapping_of_another_name_stays_when_a_copy_takes_the_link() -> None:
    seen = storage(disk("vda"), disk("vdb"), luks("dm-0", "by-hand", "vda"), vdb=LINK)
    node = build(settings(volume("cr_a", TAG)), seen).volumes["cr_a"]
    assert (node.mapping, node.device) == ("by-hand", "vda")


def test_a_copy_that_is_open_too_is_not_the_volume() -> None:
    devices = [luks("dm-0", "rescue", "vdb"), luks("dm-1", "cr_a", "vda")]
    seen = storage(disk("vda"), disk("vdb"), *devices, vdb=LINK)
    node = build(settings(volume("cr_a", TAG)), seen).volumes["cr_a"]
    assert (node.mapping, node.device) == ("cr_a", "vda")


def test_an_open_volume_stays_when_its_path_leads_to_another_device() -> None:
    """`lvrename`, and a new logical volume by the old name; a disk in another slot's place."""
    devices = [lv("dm-0", "vg-old"), lv("dm-1", "vg-imap"), luks("dm-2", "cr_a", "dm-0")]
    seen = storage(*devices, dm_1="/dev/vg/imap")
    node = build(settings(volume("cr_a", "/dev/vg/imap")), seen, remembered=SEEN).volumes["cr_a"]
    assert (node.mapping, node.device, node.taken_by) == ("cr_a", "dm-0", "")
    stranger = build(settings(volume("cr_a", "/dev/vg/imap")), seen).volumes["cr_a"]
    assert (stranger.mapping, bool(stranger.taken_by)) == ("", True)


def test_the_mapping_shows_the_device_of_an_open_volume() -> None:
    devices = [disk("sda"), luks("dm-0", "outer", "sda", uuid=OTHER), lv("dm-1", "vg-a", "dm-0"), disk("sdb"),
               luks("dm-2", "cr_a", "dm-1")]  # fmt: skip
    seen = storage(*devices, sda="/dev/outer", sdb=LINK)
    graph = build(settings(volume("outer"), volume("cr_a", TAG)), seen)
    assert graph.volumes["cr_a"].stands_on == ("outer",)


def test_integrity_lies_between_a_mapping_and_its_device() -> None:
    between = BlockDevice("dm-0", "", ("vda",), "cr_a_dif", "CRYPT-INTEGRITY-x-cr_a_dif")
    seen = storage(disk("vda"), disk("vdb"), between, luks("dm-1", "cr_a", "dm-0"), vdb=LINK)
    node = build(settings(volume("cr_a", TAG)), seen).volumes["cr_a"]
    assert (node.mapping, node.device) == ("cr_a", "vda")


def test_two_devices_of_one_tag_are_none() -> None:
    seen = claimed(storage(disk("vda"), disk("vdb"), vdb=LINK), "vda", "vdb")
    node = build(settings(volume("cr_a", TAG)), seen).volumes["cr_a"]
    assert (node.device, node.rivals, node.mapping) == ("", ("vda", "vdb"), "")
    assert f"volume cr_a: {TAG} is on /dev/vda and /dev/vdb" in node.trouble


def test_a_snapshot_and_its_origin_are_two() -> None:
    devices = [lv("dm-0", "vg-a-real", "vda"), lv("dm-1", "vg-a", "dm-0"), lv("dm-2", "vg-a-cow", "vda"),
               lv("dm-3", "vg-snap", "dm-0", "dm-2")]  # fmt: skip
    seen = claimed(storage(disk("vda"), *devices, dm_1=LINK), "dm-1", "dm-3")
    assert build(settings(volume("cr_a", TAG)), seen).volumes["cr_a"].rivals == ("dm-1", "dm-3")


MIRROR = [disk("sda"), disk("sda1", "sda"), disk("sdb"), disk("sdb1", "sdb")]


@pytest.mark.parametrize(
    ("devices", "names", "found"),
    [
        # Superblocks at the end: each half of a mirror begins like the whole.
        ([*MIRROR, disk("md0", "sda1", "sdb1")], ("md0", "sda1", "sdb1"), "md0"),
        # A mirror of whole disks, in which the kernel sees the mirror's partitions.
        (
            [*MIRROR, disk("md0", "sda", "sdb"), disk("md0p1", "md0")],
            ("md0p1", "sda1", "sdb1"),
            "md0p1",
        ),
        # A multipath device, its paths, and their partitions.
        (
            [disk("sda"), disk("sdb"), disk("dm-0", "sda", "sdb", dm_name="mpatha")],
            ("dm-0", "sda", "sdb"),
            "dm-0",
        ),
        (
            [*MIRROR, disk("dm-0", "sda", "sdb", dm_name="mpatha"), disk("dm-1", "dm-0", dm_name="mpatha1")],
            ("dm-1", "sda1", "sdb1"),
            "dm-1",
        ),
        ([disk("sda"), disk("sda1", "sda"), disk("sda2", "sda")], ("sda1", "sda2"), ""),
        ([disk("sda"), disk("sda1", "sda")], ("sda1", "gone"), "sda1"),
    ],
)  # fmt: skip
def test_parts_of_one_device_are_no_copies(
    devices: list[BlockDevice], names: tuple[str, ...], found: str
) -> None:
    seen = claimed(storage(*devices, **{names[-1]: LINK}), *names)
    node = build(settings(volume("cr_a", TAG)), seen).volumes["cr_a"]
    assert (node.device, bool(node.rivals)) == (found, not found)
    assert node.spec.device == (f"/dev/{found}" if found else TAG)


def test_a_mapping_on_another_volumes_disk_is_that_ones() -> None:
    """Kernel names have changed places, and one was opened by hand."""
    specs = settings(volume("cr_a", "/dev/sdb"), volume("cr_b", "/dev/sdc"))
    devices = [disk("sdb"), disk("sdc"), luks("dm-0", "by-hand", "sdb", uuid=OTHER)]
    seen = storage(*devices, sdb="/dev/sdb", sdc="/dev/sdc")
    remembered = Remembered(uuids={"cr_a": UUID, "cr_b": OTHER})
    volumes = build(specs, seen, remembered=remembered).volumes
    assert not volumes["cr_a"].is_open
    named = replace_name(seen, "cr_b")
    assert build(specs, named, remembered=remembered).volumes["cr_b"].device == "sdb"


def replace_name(seen: Storage, name: str) -> Storage:
    mapping = luks("dm-0", name, "sdb", uuid=OTHER)
    return seen._replace(devices={**seen.devices, "dm-0": mapping})


def test_a_copy_that_comes_during_the_key_derivation_is_not_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cryptsetup hands the path on to the kernel when it has the key; a link may lead elsewhere by then."""
    ran: list[list[str]] = []

    async def run(argv: list[str], **_: object) -> Completed:
        ran.append(argv)
        return Completed(0)

    monkeypatch.setattr(mappings, "run", run)
    monkeypatch.setattr(mappings.os.path, "realpath", {LINK: "/dev/vda"}.__getitem__)
    crypt = mappings.Cryptsetup()
    token = Token(0, "systemd-tpm2")
    with contextlib.closing(key("x")) as passphrase:
        asyncio.run(crypt.open(volume("cr_a", TAG), passphrase))
    asyncio.run(crypt.open_by_token(volume("cr_a", TAG), token, None, ""))
    assert [argv[-2:] for argv in ran] == [["/dev/vda", "cr_a"]] * 2


@pytest.mark.parametrize(
    ("own", "remembered", "uuid", "words"),
    [
        ({}, {}, UUID, ""),
        ({}, {"cr_a": UUID}, UUID, ""),
        ({}, {"cr_a": UUID}, OTHER, ""),  # formatted anew
        ({}, {"cr_a": UUID, "cr_b": OTHER}, OTHER, "was last seen as volume cr_b"),
        ({}, {"cr_b": OTHER}, OTHER, "was last seen as volume cr_b"),
        ({}, {"old": OTHER}, OTHER, ""),  # the volume has another name by now
        ({}, {"cr_a": UUID, "old": OTHER}, OTHER, "was last seen as volume old"),
        ({"uuid": OTHER}, {"cr_b": OTHER}, OTHER, ""),  # configured
        ({"uuid": UUID}, {}, OTHER, "the configuration says"),
        ({"device": TAG}, {}, OTHER, "the configuration says"),
        ({"device": TAG, "header": "/h"}, {}, OTHER, ""),  # the tag is not the header's
    ],
)
def test_a_header_that_was_another_volumes(
    own: dict[str, str], remembered: dict[str, str], uuid: str, words: str
) -> None:
    spec = replace(volume("cr_a"), **own)  # type: ignore[arg-type]
    specs = settings(spec, volume("cr_b"))
    observation = Observation(remembered=Remembered(uuids=remembered))
    if not words:
        identity.check_header(spec, uuid, specs, observation)
        return
    with pytest.raises(WrongUuidError, match=f"volume cr_a: .*{words}"):
        identity.check_header(spec, uuid, specs, observation)
