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
from vmcryptd.core.errors import EXIT_USAGE, ConfigError, GraphError
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


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[deamon]\n",
         '[deamon]: unknown table (did you mean "daemon"?); expected [daemon], [volume.NAME] or [guest.NAME]'),
        ('console_prompt = "60s"\n',
         "[console_prompt]: unknown table; expected [daemon], [volume.NAME] or [guest.NAME]"),
        ('[daemon]\nconsole_promt = "60s"\n',
         '[daemon] console_promt: unknown key (did you mean "console_prompt"?)'),
        ("daemon = 3\n", "[daemon]: expected a table, not 3"),
        ("[daemon]\nlibvirt_uri = 3\n", "[daemon] libvirt_uri: expected a text, not 3"),
        ("[daemon]\nconsole_prompt = true\n",
         '[daemon] console_prompt: expected a duration such as "90s", "2min" or "infinity"'),
        ('[daemon]\nconsole_prompt = "2 fortnights"\n',
         '[daemon] console_prompt: expected a duration such as "90s", "2min" or "infinity", not "2 fortnights"'),
        ("[daemon]\nkey_cache = -1\n", "[daemon] key_cache: expected a duration that is not negative"),
        ("[daemon]\nkey_cache = nan\n", "[daemon] key_cache: expected a duration that is not negative"),
        ('[daemon]\nkdf_memory = "0%"\n', '[daemon] kdf_memory: expected a percentage from "1%" to "100%"'),
        ('[daemon]\nkdf_memory = "101%"\n', '[daemon] kdf_memory: expected a percentage from "1%" to "100%"'),
        ("[daemon]\nkdf_memory = 0.5\n", '[daemon] kdf_memory: expected a percentage from "1%" to "100%"'),
        ('[daemon]\non_waiting = "mail"\n', "[daemon] on_waiting: expected a list, not 'mail'"),
        ('[daemon]\non_waiting = ["mail"]\n',
         "[daemon]: on_waiting: expected the absolute path of a program first"),
        ("volume = 3\n", "[volume]: expected a table, not 3"),
        ("[volume]\na = 3\n", "[volume.a]: expected a table, not 3"),
        ("[volume.a]\n", "[volume.a]: device is missing"),
        ('[volume.a]\ndevise = "/dev/a"\n',
         '[volume.a]: device is missing; FILE: [volume.a] devise: unknown key (did you mean "device"?)'),
        ('[volume.a]\ndevice = "sda1"\n',
         '[volume.a] device: expected an absolute path or one of TAGS, not "sda1"'),
        ('[volume.a]\ndevice = "UUID="\n',
         '[volume.a] device: expected an absolute path or one of TAGS, not "UUID="'),
        ('[volume.a]\ndevice = "LABEL=../sda"\n',
         '[volume.a] device: expected an absolute path or one of TAGS, not "LABEL=../sda"'),
        ('[volume.a]\ndevice = "/dev/../etc"\n',
         '[volume.a] device: expected an absolute path, not "/dev/../etc"'),
        (VOLUME + 'uuid = "3f1d"\n', '[volume.a] uuid: expected a UUID such as 0b7c8a1e-…, not "3f1d"'),
        (VOLUME + 'discard = "yes"\n', "[volume.a] discard: expected true or false, not 'yes'"),
        (VOLUME + "discard = 1\n", "[volume.a] discard: expected true or false, not 1"),
        (VOLUME + "after = [3]\n", "[volume.a] after.0: expected a text, not 3"),
        (VOLUME + "timeout = [3]\n",
         '[volume.a] timeout: expected a duration such as "90s", "2min" or "infinity"'),
        (VOLUME + 'unlock = "boots"\n',
         '[volume.a] unlock: expected one of "boot", "guest", "manual", not "boots" (did you mean "boot"?)'),
        (VOLUME + 'lock = "never"\n',
         '[volume.a] lock: expected one of "shutdown", "guest", "boot", "manual", not "never"'),
        (VOLUME + 'content = "lvm2"\n',
         '[volume.a] content: expected one of "guest", "lvm", "filesystem", not "lvm2" (did you mean "lvm"?)'),
        (VOLUME + "keys = []\n", "[volume.a] keys: expected at least one"),
        (VOLUME + 'keys = ["fil:x"]\n',
         '[volume.a] keys.0: "fil:x" is no key source: expected one of KINDS (did you mean "file"?)'),
        (VOLUME + 'keys = ["prompt:x"]\n', '[volume.a] keys.0: "prompt" takes no argument'),
        (VOLUME + 'keys = ["tpm2:7"]\n', '[volume.a] keys.0: "tpm2" takes no argument'),
        (VOLUME + 'keys = ["fido2:"]\n', '[volume.a] keys.0: "fido2" takes no argument'),
        (VOLUME + 'keys = ["fido"]\n',
         '[volume.a] keys.0: "fido" is no key source: expected one of KINDS (did you mean "fido2"?)'),
        (VOLUME + 'keys = ["file:"]\n', '[volume.a] keys.0: "file:" needs an argument'),
        (VOLUME + 'keys = ["file:etc/k"]\n', '[volume.a] keys.0: expected an absolute path, not "etc/k"'),
        (VOLUME + 'keys = ["credential:../k"]\n', '[volume.a] keys.0: "../k" is not a valid credential name'),
        (VOLUME + 'keys = ["exec:fetch"]\n',
         '[volume.a] keys.0: "exec:fetch": expected the absolute path of a program'),
        (VOLUME + """keys = ["exec:/bin/x 'a"]\n""",
         """[volume.a] keys.0: "exec:/bin/x 'a": No closing quotation"""),
        (VOLUME + 'mount = "/srv"\n',
         '[volume.a]: mount: only with content = "filesystem", here it is "guest"'),
        (VOLUME + 'content = "filesystem"\n', '[volume.a]: mount: needed with content = "filesystem"'),
        (VOLUME + 'content = "filesystem"\nmount = "srv"\n',
         '[volume.a] mount: expected an absolute path, not "srv"'),
        (VOLUME + 'vg = "inner"\n', '[volume.a]: vg: only with content = "lvm", here it is "guest"'),
        (VOLUME + 'content = "lvm"\nvg = "-inner"\n',
         '[volume.a] vg: "-inner" is not a valid volume group name'),
        (VOLUME + 'after = ["b"]\n', '[volume.a] after: there is no volume "b"'),
        (VOLUME + '[volume.keystore]\ndevice = "/dev/b"\nafter = ["key_store"]\n',
         '[volume.keystore] after: there is no volume "key_store" (did you mean "keystore"?)'),
        (VOLUME + '[volume.b]\ndevice = "//dev/a"\n',
         '[volume.b] device: "/dev/a" is the device of [volume.a] already'),
        (VOLUME.replace("/dev/a", "LABEL=x") + '[volume.b]\ndevice = "/dev/disk/by-label/x"\n',
         '[volume.b] device: "/dev/disk/by-label/x" is the device of [volume.a] already'),
        (VOLUME + 'content = "lvm"\nvg = "x"\n[volume.b]\ndevice = "/dev/b"\ncontent = "lvm"\nvg = "x"\n',
         '[volume.b] vg: "x" is the vg of [volume.a] already'),
        ('[guest.a]\nneeds = ["cr_imap"]\n[volume.cr_imab]\ndevice = "/dev/a"\n',
         '[guest.a] needs: there is no volume "cr_imap" (did you mean "cr_imab"?)'),
        ('[guest.a]\nafter = ["a"]\n', '[guest.a] after: "a" cannot be after itself'),
        ('[guest.a]\nready = "tcp:host"\n',
         '[guest.a] ready: expected "running", "agent" or "tcp:HOST:PORT", not "tcp:host"'),
        ('[guest.a]\nready = "tcp:host:0"\n',
         '[guest.a] ready: expected "running", "agent" or "tcp:HOST:PORT", not "tcp:host:0"'),
        ('[guest.a]\nstart = "autos"\n',
         '[guest.a] start: expected one of "auto", "always", "never", not "autos" (did you mean "auto"?)'),
        ('[guest.a]\non_stop_timeout = "wait"\n',
         '[guest.a] on_stop_timeout: expected one of "kill", "leave", not "wait"'),
        ('[guest."a/b"]\n', '[guest.a/b]: "a/b" cannot be the name of a libvirt domain'),
        ("[volume.a]\n[volume.a]\n", "not valid TOML: Cannot declare ('volume', 'a') twice (at line 2, column 10)"),
        ("[volume.a\n", "not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 10)"),
    ],
)  # fmt: skip
def test_refusals_name_file_table_key_and_what_was_meant(text: str, sentence: str) -> None:
    sentence = sentence.replace("FILE", "/etc/x.toml")
    sentence = sentence.replace(
        "KINDS", "prompt, tpm2, fido2, pkcs11, clevis, file:/path, credential:name, exec:/command"
    )
    sentence = sentence.replace("TAGS", "UUID=…, PARTUUID=…, LABEL=…, PARTLABEL=…")
    with pytest.raises(ConfigError) as caught:
        schema.parse({"/etc/x.toml": text})
    assert str(caught.value) == f"/etc/x.toml: {sentence}"
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.dbus_name == "org.vmcryptd1.Error.Config"


def test_all_mistakes_of_a_file_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        schema.parse({MAIN: "[daemon]\nx = 1\n[volume.a]\ny = 1\n[guest.b]\nz = 1\n"})
    assert str(caught.value).split("; ") == [
        f"{MAIN}: [daemon] x: unknown key",
        f"{MAIN}: [volume.a]: device is missing",
        f"{MAIN}: [volume.a] y: unknown key",
        f"{MAIN}: [guest.b] z: unknown key",
    ]


@pytest.mark.parametrize("name", ["cr_imap", "a", "A.b+c-d_9", "x" * 127, "..."])
def test_mapping_names(name: str) -> None:
    assert name in schema.parse({MAIN: f'[volume."{name}"]\ndevice = "/dev/a"\n'}).volumes


@pytest.mark.parametrize(
    "name", ["", "control", ".", "..", "a/b", "a b", "ä", "x" * 128, "a\\n", "a\\u0000"]
)
def test_refused_mapping_names(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid mapping name"):
        schema.parse({MAIN: f'[volume."{name}"]\ndevice = "/dev/a"\n'})


def test_a_volume_is_defined_in_one_file_only() -> None:
    with pytest.raises(ConfigError) as caught:
        schema.parse({MAIN: VOLUME, "conf.d/b.toml": VOLUME})
    assert str(caught.value) == (
        f"conf.d/b.toml: [volume.a] is defined in {MAIN} already; define it in one file only"
    )
    with pytest.raises(ConfigError, match=r"conf.d/b.toml: \[guest.g\] is defined in"):
        schema.parse({MAIN: "[guest.g]\n", "conf.d/b.toml": "[guest.g]\n"})


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


def test_a_circle_is_refused_with_its_path() -> None:
    text = "".join(
        f'[volume.{name}]\ndevice = "/dev/{name}"\nafter = ["{lower}"]\n'
        for name, lower in (("a", "b"), ("b", "c"), ("c", "a"))
    )
    with pytest.raises(GraphError, match=r"the volumes need each other in a circle: ") as caught:
        graph.build(schema.parse({MAIN: text}), Observation())
    path = str(caught.value).split(": ")[1].split(";")[0].split(" → ")
    assert path[0] == path[-1]
    assert all((upper, lower) in {("a", "b"), ("b", "c"), ("c", "a")}
               for upper, lower in itertools.pairwise(path))  # fmt: skip
    assert isinstance(caught.value, ConfigError)


def test_a_volume_after_itself_is_a_circle() -> None:
    with pytest.raises(GraphError, match="a → a"):
        graph.build(schema.parse({MAIN: VOLUME + 'after = ["a"]\n'}), Observation())


def test_guests_in_a_circle() -> None:
    text = '[guest.x]\nafter = ["y"]\n[guest.y]\nafter = ["x"]\n'
    with pytest.raises(GraphError, match="the guests need each other in a circle"):
        graph.build(schema.parse({MAIN: text}), Observation())


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


def test_unreadable_files_are_refused(folder: Path) -> None:
    (folder / MAIN).write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match=r"vmcryptd.toml: cannot be read: 'utf-8' codec"):
        configuration_files.load(folder)
    (folder / MAIN).unlink()
    (folder / "conf.d" / "a.toml").mkdir()
    with pytest.raises(ConfigError, match=r"conf.d/a.toml: cannot be read: .*directory"):
        configuration_files.load(folder)


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
