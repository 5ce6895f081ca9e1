# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: what it becomes, and the sentence with which it is refused."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest

from vmcryptd.config import files as configuration_files
from vmcryptd.config import schema
from vmcryptd.core import graph
from vmcryptd.core.errors import ConfigError, GraphError
from vmcryptd.core.model import (
    Content,
    DaemonSpec,
    GuestSpec,
    Infinity,
    KeySource,
    Lock,
    Observation,
    OnStopTimeout,
    Settings,
    SourceKind,
    Start,
    Unlock,
    VolumeSpec,
    udev_encoded,
)

MAIN = "vmcryptd.toml"

EVERYTHING = """
[daemon]
libvirt_uri = "qemu+unix:///system"
console_prompt = "2min"
shutdown_timeout = "1h 30s"
kdf_memory = "12.5%"
key_cache = "infinity"
on_waiting = ["/usr/local/bin/mail-me", "root"]
on_failed = ["/usr/local/bin/mail-me", "admin"]
start_delay = "1.5s"

[volume.keystore]
device = "/dev/vg/keys"
lock = "boot"
content = "filesystem"
mount = "/run/keys/"

[volume.cr_imap]
device = "UUID=3F1D5C5E-6F0E-4F0A-9F43-0F3D6A0E8D11"
uuid = "3F1D5C5E-6F0E-4F0A-9F43-0F3D6A0E8D11"
keys = ["file:/run/keys//imap", "credential:imap", "exec:/usr/local/bin/fetch 'a b'", "prompt"]
unlock = "guest"
lock = "guest"
content = "lvm"
vg = "inner"
discard = true
header = "/etc/imap.header"
after = ["keystore"]
timeout = "500ms"

[guest."mail server"]
start = "always"
needs = ["cr_imap"]
after = ["dns"]
ready = "tcp:[2001:db8::1]:993"
stop_timeout = 90
on_stop_timeout = "leave"
"""


def test_every_key_arrives() -> None:
    settings = schema.parse({MAIN: EVERYTHING})
    assert settings.daemon == DaemonSpec(
        libvirt_uri="qemu+unix:///system",
        console_prompt_s=120,
        shutdown_timeout_s=3630,
        kdf_memory=0.125,
        key_cache_s=Infinity,
        on_waiting=("/usr/local/bin/mail-me", "root"),
        on_failed=("/usr/local/bin/mail-me", "admin"),
        start_delay_s=1.5,
    )
    uuid = "3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"
    assert settings.volumes["keystore"] == VolumeSpec(
        "keystore",
        "/dev/vg/keys",
        lock=Lock.BOOT,
        content=Content.FILESYSTEM,
        mount="/run/keys",
    )
    imap = settings.volumes["cr_imap"]
    assert imap == VolumeSpec(
        name="cr_imap",
        device=f"UUID={uuid}",
        uuid=uuid,
        keys=(
            KeySource(SourceKind.FILE, "/run/keys/imap"),
            KeySource(SourceKind.CREDENTIAL, "imap"),
            KeySource(SourceKind.EXEC, "/usr/local/bin/fetch 'a b'"),
            KeySource(SourceKind.PROMPT),
        ),
        unlock=Unlock.GUEST,
        lock=Lock.GUEST,
        content=Content.LVM,
        vg="inner",
        discard=True,
        header="/etc/imap.header",
        after=("keystore",),
        timeout_s=0.5,
    )
    assert imap.device_path == f"/dev/disk/by-uuid/{uuid}"
    assert settings.guests["mail server"] == GuestSpec(
        name="mail server",
        start=Start.ALWAYS,
        needs=("cr_imap",),
        after=("dns",),
        ready="tcp:[2001:db8::1]:993",
        stop_timeout_s=90,
        on_stop_timeout=OnStopTimeout.LEAVE,
        configured=True,
    )


@pytest.mark.parametrize("texts", [{}, {MAIN: ""}, {MAIN: "# nothing\n", "conf.d/a.toml": ""}])
def test_nothing_is_a_valid_configuration(texts: dict[str, str]) -> None:
    assert schema.parse(texts) == Settings()


VOLUME = '[volume.a]\ndevice = "/dev/a"\n'


@pytest.mark.parametrize("name", ["cr_imap", "a", "A.b+c-d_9", "x" * 127, "..."])
def test_mapping_names(name: str) -> None:
    assert name in schema.parse({MAIN: f'[volume."{name}"]\ndevice = "/dev/a"\n'}).volumes


@pytest.mark.parametrize(
    "name", ["", "control", ".", "..", "a/b", "a b", "ä", "x" * 128, "a\\n", "a\\u0000"]
)
def test_refused_mapping_names(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid mapping name"):
        schema.parse({MAIN: f'[volume."{name}"]\ndevice = "/dev/a"\n'})


def test_drop_ins_change_single_keys_of_the_daemon() -> None:
    settings = schema.parse(
        {
            MAIN: '[daemon]\nkey_cache = "5s"\nconsole_prompt = "1s"\n',
            "conf.d/10.toml": '[daemon]\nkey_cache = "6s"\n',
            "conf.d/20.toml": '[daemon]\nkdf_memory = "10%"\n',
        }
    )
    assert settings.daemon == DaemonSpec(key_cache_s=6, console_prompt_s=1, kdf_memory=0.1)


def test_references_reach_over_files() -> None:
    other = '[volume.b]\ndevice = "/dev/b"\nafter = ["a"]\n[guest.g]\nneeds = ["a", "b"]\n'
    assert set(schema.parse({"1.toml": other, "2.toml": VOLUME}).volumes) == {"a", "b"}


def circle(*texts: str) -> str:
    settings = schema.parse({f"{number}.toml": text for number, text in enumerate(texts, 1)})
    with pytest.raises(GraphError) as caught:
        graph.build(settings, Observation())
    assert isinstance(caught.value, ConfigError)
    return str(caught.value)


def test_a_circle_is_refused_with_its_path_and_where_each_part_stands() -> None:
    text = "".join(
        f'[volume.{name}]\ndevice = "/dev/{name}"\nafter = ["{lower}"]\n'
        for name, lower in (("a", "b"), ("b", "c"))
    )
    shown = circle("\n" + text, '[volume.c]\ndevice = "/dev/c"\nafter = ["a"]\n')
    path, places = shown.removeprefix("the volumes need each other in a circle: ").split("; ")
    names = path.split(" → ")
    assert names[0] == names[-1]
    assert set(itertools.pairwise(names)) == {("a", "b"), ("b", "c"), ("c", "a")}
    _, _, listed = places.partition(": ")
    assert sorted(listed.split(", ")) == [
        "1.toml:2: [volume.a] after",
        "1.toml:5: [volume.b] after",
        "2.toml:1: [volume.c] after",
    ]


def test_a_circle_through_other_keys() -> None:
    shown = circle(
        VOLUME + 'keys = ["file:/m/k"]\n',
        '[volume.b]\ndevice = "/dev/mapper/c"\ncontent = "filesystem"\nmount = "/m"\n',
        '[volume.c]\ndevice = "/dev/c"\nheader = "/n/h"\n'
        '[volume.d]\ndevice = "/dev/d"\ncontent = "filesystem"\nmount = "/n"\nafter = ["a"]\n',
    )
    for where in ("1.toml:1: [volume.a] keys", "2.toml:1: [volume.b] device",
                  "3.toml:1: [volume.c] header", "3.toml:4: [volume.d] after"):  # fmt: skip
        assert where in shown


def test_a_volume_after_itself_is_a_circle() -> None:
    assert "a → a; take it apart in one of these: 1.toml:1: [volume.a] after" in circle(
        VOLUME + 'after = ["a"]\n'
    )


def test_guests_in_a_circle() -> None:
    shown = circle('[guest.x]\nafter = ["y"]\n', '[guest.y]\nafter = ["x"]\n')
    assert shown.startswith("the guests need each other in a circle: ")
    assert "1.toml:1: [guest.x] after" in shown
    assert "2.toml:1: [guest.y] after" in shown


# --- files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir()
    return tmp_path


def test_absent_files_are_no_mistake(tmp_path: Path, folder: Path) -> None:
    assert configuration_files.load(tmp_path / "nowhere") == Settings()
    assert configuration_files.load(folder) == Settings()


def test_drop_ins_are_read_in_the_order_of_their_names(folder: Path) -> None:
    for name, seconds in (("90-z.toml", 3), ("10-a.toml", 2), ("50.conf", 9)):
        (folder / "conf.d" / name).write_text(f'[daemon]\nkey_cache = "{seconds}s"\n')
    (folder / MAIN).write_text('[daemon]\nkey_cache = "1s"\n')
    assert configuration_files.load(folder).daemon.key_cache_s == 3


def test_what_an_editor_leaves_behind_is_no_mistake(folder: Path) -> None:
    (folder / "conf.d" / ".#a.toml").symlink_to("nobody@nowhere")
    assert configuration_files.load(folder) == Settings()


def test_a_label_is_looked_up_as_udev_links_it() -> None:
    settings = schema.parse({"f": '[volume.a]\ndevice = "LABEL=my disk (é–) "\n'})
    assert settings.volumes["a"].device_path == r"/dev/disk/by-label/my\x20disk\x20\x28é–\x29"


def test_labels_are_encoded_as_libblkid_does() -> None:
    """Every code point: what libblkid's own function makes of it."""
    encode = ctypes.CDLL("libblkid.so.1").blkid_encode_string
    encoded = ctypes.create_string_buffer(64)
    points = [*range(1, 0xD800), *range(0xE000, 0x11000), *range(0x1FFF0, 0x20010), 0x10FFFF]
    wrong = []
    for point in points:
        assert encode(chr(point).encode(), encoded, len(encoded)) == 0
        if udev_encoded(chr(point)) != encoded.value.decode():
            wrong.append(point)
    assert wrong == []
