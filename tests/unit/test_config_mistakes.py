# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people write by mistake, and the one sentence that each mistake gets."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcryptd.config import files, schema, syntax
from vmcryptd.core.errors import EXIT_USAGE, ConfigError, Mistake

FILE = "/etc/vmcryptd/vmcryptd.toml"
VOLUME = '[volume.a]\ndevice = "/dev/vg/a"\n'
SHORT = {
    "U1": "3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11",
    "TAGS": "UUID=…, PARTUUID=…, LABEL=…, PARTLABEL=…",
    "KINDS": "prompt, tpm2, fido2, pkcs11, clevis, file:/path, credential:name, exec:/command",
    "NAMES": 'letters, digits and "._+-", at most 127, not "control"',
}

# The text; line and sentence; for a line that is no TOML that line, and what to write instead.
MISTAKES: list[tuple[str, ...]] = [
    ('[volume.a]\ndevice = /dev/vg/a\n',
     '2: not valid TOML: invalid value; a text stands in quotes',
     'device = /dev/vg/a', 'device = "/dev/vg/a"'),
    ('[volume.a]\ndevice = "/dev/vg/a\n',
     '2: not valid TOML: the quotes are not closed',
     'device = "/dev/vg/a', 'device = "/dev/vg/a"'),
    ('[volume.a]\ndevice = \'/dev/vg/a"\n',
     '2: not valid TOML: expected "\'"; a text stands in quotes',
     'device = \'/dev/vg/a"', 'device = "/dev/vg/a"'),
    ('[volume.a]\ndevice = “/dev/vg/a”\n',
     '2: not valid TOML: invalid value; a text stands in quotes',
     'device = “/dev/vg/a”', 'device = "/dev/vg/a"'),
    ('[volume.a]\ndevice: "/dev/vg/a"\n',
     '2: not valid TOML: expected KEY = VALUE',
     'device: "/dev/vg/a"', 'device = "/dev/vg/a"'),
    ('[volume.a]\ndevice "/dev/vg/a"\n',
     '2: not valid TOML: expected KEY = VALUE',
     'device "/dev/vg/a"', 'device = "/dev/vg/a"'),
    ('[volume.a]\ndevice = /dev/vg/a  # mail\n',
     '2: not valid TOML: invalid value; a text stands in quotes',
     'device = /dev/vg/a  # mail', 'device = "/dev/vg/a"  # mail'),
    ('[volume.a]\ndevice =\n',
     '2: not valid TOML: the value is missing',
     'device =', ''),
    ('[volume.a]\ndevice = UUID=U1\n',
     '2: not valid TOML: invalid value; a text stands in quotes',
     'device = UUID=U1', 'device = "UUID=U1"'),
    ('[volume.a]\ndevice = UUID="U1"\n',
     '2: not valid TOML: invalid value; no quotes inside UUID=…',
     'device = UUID="U1"', 'device = "UUID=U1"'),
    ('[volume.a]\ndevice = "UUID="U1""\n',
     '2: not valid TOML: unexpected text at the end of the line; no quotes inside UUID=…',
     'device = "UUID="U1""', 'device = "UUID=U1"'),
    ('[volume.a]\ndevice = \'UUID="U1"\'\n',
     '2: [volume.a] device: no quotes inside UUID=…; write "UUID=U1"'),
    ('[volume.a]\ndevice = "UUID=3f1d5c5e-"\n',
     '2: [volume.a] device: expected the whole UUID of a LUKS header, not "3f1d5c5e-"'),
    ('[volume.a]\ndevice = "uuid=U1"\n',
     '2: [volume.a] device: expected an absolute path or one of TAGS, not "uuid=U1"; write "UUID=U1"'),
    ('[volume.a]\ndevice = "U1"\n',
     '2: [volume.a] device: expected an absolute path or one of TAGS, not "U1"; write "UUID=U1"'),
    ('[volume.a]\ndevice = "vg/a"\n',
     '2: [volume.a] device: expected an absolute path or one of TAGS, not "vg/a" (did you mean "/dev/vg/a"?)'),
    ('[volume.a]\ndevice = "dev/sda1"\n',
     '2: [volume.a] device: expected an absolute path or one of TAGS, not "dev/sda1" (did you mean "/dev/sda1"?)'),
    ('[volume.a]\ndevice = "sda1"\n',
     '2: [volume.a] device: expected an absolute path or one of TAGS, not "sda1" (did you mean "/dev/sda1"?)'),
    ('[volume.a]\ndevice = "/dev/mapper/a"\n',
     '2: [volume.a] device: this is the mapping that the volume gets; name the device beneath it'),
    (VOLUME + 'keys = "tpm2"\n',
     '3: [volume.a] keys: expected a list such as ["one", "two"], not a text',
     '', 'keys = ["tpm2"]'),
    (VOLUME + 'keys = "tpm2, prompt"\n',
     '3: [volume.a] keys: expected a list such as ["one", "two"], not a text',
     '', 'keys = ["tpm2", "prompt"]'),
    (VOLUME + 'keys = "exec:/bin/x --token s3"\n',
     '3: [volume.a] keys: expected a list such as ["one", "two"], not a text',
     '', 'keys = ["exec:/bin/x --token s3"]'),
    (VOLUME + 'keys = tpm2\n',
     '3: not valid TOML: invalid value; a text stands in quotes',
     'keys = tpm2', 'keys = ["tpm2"]'),
    (VOLUME + 'keys = [tpm2, prompt]\n',
     '3: not valid TOML: invalid value; a text stands in quotes',
     'keys = [tpm2, prompt]', 'keys = ["tpm2", "prompt"]'),
    (VOLUME + 'keys = ["tpm2" "prompt"]\n',
     '3: not valid TOML: the list is not closed, or a comma is missing in it',
     'keys = ["tpm2" "prompt"]', 'keys = ["tpm2", "prompt"]'),
    (VOLUME + 'keys = ["tpm2", "prompt"\n[guest.g]\n',
     '3: not valid TOML: the list is not closed, or a comma is missing in it',
     'keys = ["tpm2", "prompt"', 'keys = ["tpm2", "prompt"]'),
    (VOLUME + 'keys = ["tpm2", "prompt"\n',
     '3: not valid TOML: the list is not closed, or a comma is missing in it',
     'keys = ["tpm2", "prompt"', 'keys = ["tpm2", "prompt"]'),
    (VOLUME + 'keys = ["tpm2",\n  prompt,\n]\n',
     '4: not valid TOML: invalid value; a text stands in quotes',
     'prompt,', '"prompt",'),
    (VOLUME + 'keys = ["hunter2 geheim"]\n',
     '3: [volume.a] keys, entry 1: no such key source: expected one of KINDS'),
    (VOLUME + 'keys = ["/etc/k"]\n',
     '3: [volume.a] keys, entry 1: no such key source: expected one of KINDS (did you mean "file:/…"?)'),
    (VOLUME + 'keys = ["passphrase"]\n',
     '3: [volume.a] keys, entry 1: no such key source: expected one of KINDS (did you mean "prompt"?)'),
    (VOLUME + 'timeout = 30s\n',
     '3: not valid TOML: unexpected text at the end of the line; a text stands in quotes',
     'timeout = 30s', 'timeout = "30s"'),
    (VOLUME + 'timeout = 2 min\n',
     '3: not valid TOML: unexpected text at the end of the line; a text stands in quotes',
     'timeout = 2 min', 'timeout = "2 min"'),
    (VOLUME + 'timeout = "30 parsecs"\n',
     '3: [volume.a] timeout: expected a duration such as "90s", "2min" or "infinity", not "30 parsecs"'),
    (VOLUME + 'timeout = 1e300\n',
     '3: [volume.a] timeout: expected a duration of at most 100 years, or "infinity"'),
    (VOLUME + 'timeout = "99999999999999d"\n',
     '3: [volume.a] timeout: expected a duration of at most 100 years, or "infinity", not "99999999999999d"'),
    (VOLUME + 'timeout = "-5s"\n',
     '3: [volume.a] timeout: expected a duration such as "90s", "2min" or "infinity", not "-5s"'),
    (VOLUME + 'discard = yes\n',
     '3: not valid TOML: invalid value',
     'discard = yes', 'discard = true'),
    (VOLUME + 'discard = True\n',
     '3: not valid TOML: invalid value',
     'discard = True', 'discard = true'),
    (VOLUME + 'discard = "true"\n',
     '3: [volume.a] discard: expected true or false, not "true"'),
    (VOLUME + 'discard = 1\n',
     '3: [volume.a] discard: expected true or false, not 1'),
    (VOLUME + 'unlock = "Boot"\n',
     '3: [volume.a] unlock: expected one of "boot", "guest", "manual", not "Boot" (did you mean "boot"?)'),
    (VOLUME + 'unlock = true\n',
     '3: [volume.a] unlock: expected one of "boot", "guest", "manual", not true'),
    (VOLUME + 'unlock = "auto"\n',
     '3: [volume.a] unlock: expected one of "boot", "guest", "manual", not "auto"'),
    (VOLUME + 'Lock = "guest"\n',
     '3: [volume.a] Lock: unknown key (did you mean "lock"?)'),
    (VOLUME + 'on-waiting = "x"\n',
     '3: [volume.a] on-waiting: unknown key; it belongs in [daemon]'),
    (VOLUME + 'ready = "agent"\n',
     '3: [volume.a] ready: unknown key; it belongs in [guest.NAME]'),
    (VOLUME + 'console_prompt = "5s"\n',
     '3: [volume.a] console_prompt: unknown key; it belongs in [daemon]'),
    ('[volume.a]\ndevise = "/dev/a"\n',
     '2: [volume.a] devise: unknown key (did you mean "device"?)'),
    ('[volume.a]\nDevice = "/dev/a"\n',
     '2: [volume.a] Device: unknown key (did you mean "device"?)'),
    ('[volume.a]\npath = "/dev/a"\n',
     '2: [volume.a] path: unknown key (did you mean "device"?)'),
    ('[volume.a]\ndisk="/dev/a"\ndevice="/dev/a"\n',
     '2: [volume.a] disk: unknown key'),
    ('[volumes.a]\ndevice="/dev/a"\n',
     '1: [volumes]: unknown table (did you mean "volume"?); expected [daemon], [volume.NAME] or [guest.NAME]'),
    ('[Volume.a]\ndevice="/dev/a"\n',
     '1: [Volume]: unknown table (did you mean "volume"?); expected [daemon], [volume.NAME] or [guest.NAME]'),
    ('[cr_imap]\ndevice="/dev/a"\n',
     '1: [cr_imap]: unknown table (did you mean "volume.cr_imap"?)'),
    ('[[volume]]\nname="a"\n',
     '1: [volume]: expected one table, not a list: write [volume.NAME] with single brackets'),
    ('[volume]\ndevice="/dev/a"\n',
     '2: [volume.device]: this key belongs in a table with the name of a volume: [volume.NAME]'),
    ('device="/dev/a"\n',
     '1: device: stands in no table; it belongs in [volume.NAME]'),
    ('console_prompt="0"\n',
     '1: console_prompt: stands in no table; it belongs in [daemon]'),
    ('foo=1\n',
     '1: foo: unknown key, in no table'),
    ('[volume "imap"]\ndevice="/dev/a"\n',
     "1: not valid TOML: expected ']' at the end of a table declaration",
     '[volume "imap"]', '[volume.imap]'),
    ('[volume.a/b]\ndevice="/dev/a"\n',
     '1: [volume.a/b]: "a/b" is not a valid mapping name: NAMES'),
    ('[volume.cr imap]\ndevice="/dev/a"\n',
     '1: [volume.cr imap]: "cr imap" is not a valid mapping name: NAMES'),
    ('[guest.mail server]\n',
     "1: not valid TOML: expected ']' at the end of a table declaration; a text stands in quotes",
     '[guest.mail server]', '[guest."mail server"]'),
    ('[volume.my.name]\ndevice="/dev/a"\n',
     '1: [volume.my]: a name with a dot stands in quotes: [volume."my.name"]'),
    ('[volume.a\ndevice="/dev/a"\n',
     "1: not valid TOML: expected ']' at the end of a table declaration",
     '[volume.a', '[volume.a]'),
    ('[volume.a]]\ndevice="/dev/a"\n',
     '1: not valid TOML: unexpected text at the end of the line',
     '[volume.a]]', '[volume.a]'),
    ('[volume.a] device="/dev/a"\n',
     '1: not valid TOML: unexpected text at the end of the line',
     '[volume.a] device="/dev/a"', ''),
    ('[volume.]\ndevice="/dev/a"\n',
     '1: not valid TOML: invalid initial character for a key part',
     '[volume.]', ''),
    ('[volume.control]\ndevice="/dev/a"\n',
     '1: [volume.control]: "control" is not a valid mapping name: NAMES'),
    ('[volume:a]\ndevice="/dev/a"\n',
     "1: not valid TOML: expected ']' at the end of a table declaration",
     '[volume:a]', '[volume.a]'),
    ('[deamon]\n',
     '1: [deamon]: unknown table (did you mean "daemon"?); expected [daemon], [volume.NAME] or [guest.NAME]'),
    ('[daemon.x]\n',
     '1: [daemon] x: unknown key'),
    ('[ volume . a ]\ndevise="/x"\n',
     '2: [volume.a] devise: unknown key (did you mean "device"?)'),
    ('[volume."ä"]\ndevice="/dev/a"\n',
     '1: [volume.ä]: "ä" is not a valid mapping name: NAMES'),
    ('[volume.ä]\ndevice="/dev/a"\n',
     '1: [volume.ä]: "ä" is not a valid mapping name: NAMES'),
    (VOLUME + '[volume.a]\ndevice = "/dev/vg/a"\n',
     '3: not valid TOML: the table [volume.a] stands twice; make it one',
     '[volume.a]', ''),
    (VOLUME + 'device = "/dev/b"\n',
     '3: not valid TOML: the key device stands twice in its table; keep one of the two',
     'device = "/dev/b"', ''),
    (VOLUME + '[volume.b]\ndevice = "/dev/vg/a"\n',
     '4: [volume.b] device: "/dev/vg/a" is the device of [volume.a] already'),
    (VOLUME + 'after = "b"\n',
     '3: [volume.a] after: expected a list such as ["one", "two"], not a text',
     '', 'after = ["b"]'),
    (VOLUME + 'after = ["b"]\n',
     '3: [volume.a] after: there is no volume "b"'),
    (VOLUME + '[guest.imap]\n[volume.c]\ndevice="/dev/c"\nafter = ["imap"]\n',
     '6: [volume.c] after: "imap" is a guest; expected the name of a volume'),
    (VOLUME + '[guest.g]\nneeds = ["/dev/mapper/a"]\n',
     '4: [guest.g] needs: there is no volume "/dev/mapper/a" (did you mean "a"?)'),
    (VOLUME + '[guest.g]\nneeds = ["A"]\n',
     '4: [guest.g] needs: there is no volume "A" (did you mean "a"?)'),
    (VOLUME + 'content = "filesystem"\n',
     '3: [volume.a] content: "filesystem" needs the key mount, too'),
    (VOLUME + 'mount = "/srv"\n',
     '3: [volume.a] mount: only with content = "filesystem", here it is "guest"'),
    (VOLUME + 'content="filesystem"\nmount = "/"\n',
     "4: [volume.a] mount: a volume cannot be mounted over the host's own root"),
    (VOLUME + 'content="filesystem"\nmount = "srv"\n',
     '4: [volume.a] mount: expected an absolute path, not "srv"'),
    (VOLUME + 'content = "ext4"\n',
     '3: [volume.a] content: expected one of "guest", "lvm", "filesystem", not "ext4"'),
    (VOLUME + 'vg = "x"\n',
     '3: [volume.a] vg: only with content = "lvm", here it is "guest"'),
    ('; comment\n[volume.a]\ndevice = "/dev/vg/a"\n',
     '1: not valid TOML: invalid statement',
     '; comment', '# comment'),
    ('// comment\n[volume.a]\ndevice = "/dev/vg/a"\n',
     '1: not valid TOML: invalid statement',
     '// comment', '# comment'),
    (VOLUME + 'discard = true // c\n',
     '3: not valid TOML: unexpected text at the end of the line',
     'discard = true // c', 'discard = true  # c'),
    (VOLUME + 'discard = true;\n',
     '3: not valid TOML: unexpected text at the end of the line',
     'discard = true;', 'discard = true'),
    (VOLUME + 'discard = true discard = false\n',
     '3: not valid TOML: unexpected text at the end of the line',
     'discard = true discard = false', ''),
    ('[guest.g]\nready = "tcp:host"\n',
     '2: [guest.g] ready: expected "running", "agent" or "tcp:HOST:PORT", not "tcp:host"'),
    ('[guest.g]\nstart = true\n',
     '2: [guest.g] start: expected one of "auto", "always", "never", not true'),
    ('[guest.g]\nautostart = "x"\n',
     '2: [guest.g] autostart: unknown key (did you mean "start"?)'),
    ('[guest.g]\non_stop_timeout = "destroy"\n',
     '2: [guest.g] on_stop_timeout: expected one of "kill", "leave", not "destroy"'),
    ('[guest.g]\nafter = ["g"]\n',
     '2: [guest.g] after: "g" cannot be after itself'),
    ('[daemon]\non_waiting = "mail-me root"\n',
     '2: [daemon] on_waiting: expected a list such as ["one", "two"], not a text',
     '', 'on_waiting = ["mail-me", "root"]'),
    ('[daemon]\non_waiting = ["mail"]\n',
     '2: [daemon] on_waiting: expected the absolute path of a program first'),
    ('[daemon]\non_failed = ["mail"]\n',
     '2: [daemon] on_failed: expected the absolute path of a program first'),
    ('[daemon]\nstart_delay = "infinity"\n',
     '2: [daemon] start_delay: expected at most "1h", not "infinity"'),
    ('[daemon]\nkdf_memory = 50%\n',
     '2: not valid TOML: unexpected text at the end of the line; a text stands in quotes',
     'kdf_memory = 50%', 'kdf_memory = "50%"'),
    ('[daemon]\nkdf_memory = "1 GiB"\n',
     '2: [daemon] kdf_memory: expected a percentage from "1%" to "100%", not "1 GiB"'),
    ('[daemon]\nlibvirt_uri = ""\n',
     '2: [daemon] libvirt_uri: expected a URI such as "qemu:///system", not ""'),
    ('a\x00b = 1\n',
     '1: not valid TOML: expected KEY = VALUE',
     'a\\x00b = 1', ''),
    ('volume = "x"\n',
     '1: [volume]: expected a table, not "x"'),
    ('<xml>\n',
     '1: not valid TOML: invalid statement',
     '<xml>', ''),
    ('#[volume.a]\ndevice="/dev/a"\n',
     '2: device: stands in no table; it belongs in [volume.NAME]'),
    ('[volume.a]\n#device="/dev/a"\n',
     '1: [volume.a]: device is missing'),
    ('export A=1\n',
     '1: not valid TOML: expected KEY = VALUE; a text stands in quotes',
     'export A=1', 'export = "A=1"'),
    (VOLUME + 'mount = ""\n',
     '3: [volume.a] mount: expected an absolute path, not ""'),
    (VOLUME + 'header = "imap.header"\n',
     '3: [volume.a] header: expected an absolute path, not "imap.header"'),
    (VOLUME + 'uuid = "3f1d"\n',
     '3: [volume.a] uuid: expected a UUID such as 0b7c8a1e-…, not "3f1d"'),
    (VOLUME + 'uuid = "UUID=U1"\n',
     '3: [volume.a] uuid: expected a UUID such as 0b7c8a1e-…, not "UUID=U1"; write "U1"'),
    (VOLUME + 'after = [3]\n',
     '3: [volume.a] after, entry 1: expected a text, not 3'),
    (VOLUME + 'timeout = [3]\n',
     '3: [volume.a] timeout: expected a duration such as "90s", "2min" or "infinity"'),
    (VOLUME + 'keys = []\n',
     '3: [volume.a] keys: expected at least one'),
    (VOLUME + 'keys = ["fil:x"]\n',
     '3: [volume.a] keys, entry 1: no such key source: expected one of KINDS (did you mean "file"?)'),
    (VOLUME + 'keys = ["prompt:x"]\n',
     '3: [volume.a] keys, entry 1: "prompt" takes no argument'),
    (VOLUME + 'keys = ["tpm2:7"]\n',
     '3: [volume.a] keys, entry 1: "tpm2" takes no argument'),
    (VOLUME + 'keys = ["fido2:"]\n',
     '3: [volume.a] keys, entry 1: "fido2" takes no argument'),
    (VOLUME + 'keys = ["file:"]\n',
     '3: [volume.a] keys, entry 1: "file:" needs an argument'),
    (VOLUME + 'keys = ["prompt", "file:etc/k"]\n',
     '3: [volume.a] keys, entry 2: expected an absolute path, not "etc/k"'),
    (VOLUME + 'keys = ["credential:../k"]\n',
     '3: [volume.a] keys, entry 1: "../k" is not a valid credential name'),
    (VOLUME + 'keys = ["exec:fetch --token s3cret"]\n',
     '3: [volume.a] keys, entry 1: "exec:…": expected the absolute path of a program'),
    (VOLUME + 'keys = ["exec:/bin/x --token \'s3cret"]\n',
     '3: [volume.a] keys, entry 1: "exec:…": no closing quotation'),
    (VOLUME + 'content = "lvm"\nvg = "-inner"\n',
     '4: [volume.a] vg: "-inner" is not a valid volume group name'),
    (VOLUME + 'content = "lvm"\nvg = "x"\n[volume.b]\ndevice = "/dev/b"\ncontent = "lvm"\nvg = "x"\n',
     '8: [volume.b] vg: "x" is the vg of [volume.a] already'),
    (VOLUME + 'header = "/h"\n[volume.b]\ndevice = "/dev/b"\nheader = "/h"\n',
     '6: [volume.b] header: "/h" is the header of [volume.a] already'),
    ('[volume.a]\ndevice = "LABEL=x"\n[volume.b]\ndevice = "/dev/disk/by-label/x"\n',
     '4: [volume.b] device: "/dev/disk/by-label/x" is the device of [volume.a] already'),
    ('[volume.a]\ndevice = "UUID="\n',
     '2: [volume.a] device: expected an absolute path or one of TAGS, not "UUID="'),
    ('[volume.a]\ndevice = "LABEL=../sda"\n',
     '2: [volume.a] device: expected an absolute path or one of TAGS, not "LABEL=../sda"'),
    ('[volume.a]\ndevice = "/dev/../etc"\n',
     '2: [volume.a] device: expected an absolute path, not "/dev/../etc"'),
    ('[volume.a]\ndevice = 3\n',
     '2: [volume.a] device: expected a text, not 3'),
    ('[volume.a]\ndevice = ["/dev/a", "/dev/b"]\n',
     '2: [volume.a] device: expected a text, not ["/dev/a", "/dev/b"]'),
    ('[volume.a]\ndevice = 2026-01-01\n',
     '2: [volume.a] device: expected a text, not "2026-01-01"'),
    ('daemon = 3\n',
     '1: [daemon]: expected a table, not 3'),
    ('volume = 3\n',
     '1: [volume]: expected a table, not 3'),
    ('[volume]\na = 3\n',
     '2: [volume.a]: expected a table, not 3'),
    ('[daemon]\nconsole_promt = "60s"\n',
     '2: [daemon] console_promt: unknown key (did you mean "console_prompt"?)'),
    ('[daemon]\nconsole_prompt = true\n',
     '2: [daemon] console_prompt: expected a duration such as "90s", "2min" or "infinity"'),
    ('[daemon]\nkey_cache = -1\n',
     '2: [daemon] key_cache: expected a duration that is not negative'),
    ('[daemon]\nkey_cache = nan\n',
     '2: [daemon] key_cache: expected a duration that is not negative'),
    ('[daemon]\nkdf_memory = "0%"\n',
     '2: [daemon] kdf_memory: expected a percentage from "1%" to "100%", not "0%"'),
    ('[daemon]\nkdf_memory = 0.5\n',
     '2: [daemon] kdf_memory: expected a percentage from "1%" to "100%", not 0.5'),
    ('[daemon]\nlibvirt_uri = 3\n',
     '2: [daemon] libvirt_uri: expected a text, not 3'),
    ('[guest."a/b"]\n',
     '1: [guest.a/b]: "a/b" cannot be the name of a libvirt domain'),
    ('[guest.g]\nready = "tcp:host:0"\n',
     '2: [guest.g] ready: expected "running", "agent" or "tcp:HOST:PORT", not "tcp:host:0"'),
    ('[guest."a\\nb"]\n',
     '1: [guest.a\\nb]: "a\\nb" cannot be the name of a libvirt domain'),
    ('[volume."a\\nb"]\ndevice = "/dev/a"\n',
     '1: [volume.a\\nb]: "a\\nb" is not a valid mapping name: NAMES'),
    ('[volume.a]\ndevice = "/dev/\\u202ea"\n',
     '2: [volume.a] device: expected an absolute path, not "/dev/\\u202ea"'),
    ('volume.a.device = "sda1"\n',
     '1: [volume.a] device: expected an absolute path or one of TAGS, not "sda1" (did you mean "/dev/sda1"?)'),
    ('volume = { a = { device = "sda1" } }\n',
     '1: [volume.a] device: expected an absolute path or one of TAGS, not "sda1" (did you mean "/dev/sda1"?)'),
    ('[volume.a]\ndevice = """/dev/a"""\nkeys = [\n  "prompt", # "#"\n  "nothing",\n]\n',
     '5: [volume.a] keys, entry 2: no such key source: expected one of KINDS'),
]  # fmt: skip


def whole(text: str) -> str:
    for short, long in SHORT.items():
        text = text.replace(short, long)
    return text


def mistakes(*texts: str) -> tuple[Mistake, ...]:
    with pytest.raises(ConfigError) as caught:
        schema.parse({f"{FILE if index == 0 else index}": text for index, text in enumerate(texts)})
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.dbus_name == "org.vmcryptd1.Error.Config"
    assert str(caught.value) == "; ".join(one.text for one in caught.value.mistakes)
    return caught.value.mistakes


@pytest.mark.parametrize("row", MISTAKES, ids=lambda row: row[0])
def test_a_mistake_is_one_finding_with_its_line(row: tuple[str, ...]) -> None:
    text, sentence, line, hint = (*map(whole, row), "", "")[:4]
    assert mistakes(text) == (Mistake(f"{FILE}:{sentence}", line, hint),)
    # Windows' line ends and a mark at the beginning change nothing.
    assert mistakes(text.replace("\n", "\r\n"))[0].text == f"{FILE}:{sentence}"


@pytest.mark.parametrize("row", [row for row in MISTAKES if len(row) == 4 and row[2] and row[3]],
                         ids=lambda row: row[0])  # fmt: skip
def test_the_hint_is_toml(row: tuple[str, ...]) -> None:
    text, hint = whole(row[0]), whole(row[3])
    assert not syntax.parse("x", text).mistakes[1:]
    assert syntax.parse("x", f"a = [{hint}]" if hint.endswith(",") else hint).mistakes == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (VOLUME + f"timeout = {'9' * 5000}\n", "3: not valid TOML: a number has too many digits"),
        (VOLUME + f'timeout = "{"9" * 300}"\n',
         f'3: [volume.a] timeout: expected a duration of at most 100 years, or "infinity", not "{"9" * 40}…"'),
        (f"\na = {'[' * 5000}\n", "2: not valid TOML: nested too deep"),
        (f"\na = {'[' * 5000}{']' * 5000}\n", "2: not valid TOML: nested too deep"),
        (f"\na = {'{a=' * 5000}1{'}' * 5000}\n", "2: not valid TOML: nested too deep"),
    ],
)  # fmt: skip
def test_what_no_person_writes(text: str, sentence: str) -> None:
    assert mistakes(text) == (Mistake(f"{FILE}:{sentence}"),)


@pytest.mark.parametrize("end", ['a = """', "device = /dev/x", "keys = ["])
def test_a_large_file_with_a_mistake_is_not_parsed_for_ever(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f'[volume.v{n}]\ndevice = "/dev/v{n}"\n' for n in range(2000)) + end
    parsed = 0
    loads = tomllib.loads

    def counted(text: str) -> dict[str, Any]:
        nonlocal parsed
        parsed += len(text)
        return loads(text)

    monkeypatch.setattr(tomllib, "loads", counted)
    assert syntax.parse("x", text).mistakes
    assert parsed < 2 << 20


@given(st.text(alphabet="[]{}\"'=.,# \nvolumea1\\\t\r", max_size=60))
def test_whatever_is_written_is_settings_or_mistakes(text: str) -> None:
    found: tuple[Mistake, ...] = ()
    try:
        schema.parse({"x": VOLUME + text})
    except ConfigError as error:
        found = error.mistakes or (Mistake("none"),)
    assert all(one.text.startswith("x:") and one.text.isprintable() for one in found)


@pytest.mark.parametrize(
    "text",
    [
        '"x\\ny" = 1\n',
        '["x\\u001b[2Jy"]\n',
        '[volume.a."b\\nc"]\ndevice = "/dev/a"\n',
        VOLUME + '"x\\ny" = 1\n',
        f'"{"x" * 100_000}" = 1\n',
    ],
)
def test_names_neither_begin_a_line_nor_move_a_cursor(text: str) -> None:
    [mistake] = mistakes(text)
    assert mistake.text.isprintable()
    assert len(mistake.text) < 20_000


def test_a_long_line_is_shown_shortened() -> None:
    [mistake] = mistakes("x" * 3000)
    assert mistake.line == "x" * 100 + "…"


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_text() -> None:
    text = (
        "[daemon]\nconsole_prompt = 60s\nx = 1\n"
        '[volume.a]\ndevice = "sda1"\n'
        '[volume.b]\ndevice = /dev/b\ny = 1\nafter = ["none"]\n'
        '[guest.g]\nz = 1\nneeds = ["c"]\n'
    )
    places = [one.text.split(" ")[0] for one in mistakes(text, '[volume.a]\ndevice = "/dev/a"\n')]
    assert places == [*(f"{FILE}:{line}:" for line in (2, 3, 5, 7, 8, 11)), "1:1:"]


def test_a_name_that_a_syntax_error_may_hide_is_not_missed() -> None:
    [mistake] = mistakes(
        '[volume.a]\ndevice = "/dev/a" "/dev/b" = 3\n', '[guest.g]\nneeds = ["a"]\n'
    )
    assert mistake.text.startswith(f"{FILE}:2: not valid TOML")


def test_a_table_in_two_files() -> None:
    [mistake] = mistakes("\n" + VOLUME, VOLUME)
    assert mistake.text == (
        f"1:1: [volume.a] is defined in {FILE}:2 already; define it in one file only"
    )


def test_neither_lines_nor_values_of_keys_go_over_the_bus_or_into_the_journal() -> None:
    for line in (
        'keys = ["exec:fetch --token s3cret"]',
        'keys = ["exec:/bin/fetch --token \'s3cret"]',
        'keys = "exec:/bin/fetch --token s3cret"',
        'keys = ["exec:/bin/fetch --token s3cret]',
        "keys = [exec:/bin/fetch --token s3cret]",
        'keys = ["s3cret"]',
        'keys = ["passphrase:s3cret"]',
        'keys = ["prompt:s3cret"]',
        'exec = ["/bin/fetch s3cret"]',
    ):
        with pytest.raises(ConfigError) as caught:
            schema.parse({"x": VOLUME + line + "\n"})
        assert "s3cret" not in str(caught.value), line


# --- files ---


def place(folder: Path, text: str | bytes = VOLUME, name: str = "vmcryptd.toml") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(folder: Path, **more: bool) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        files.read(folder, **more)
    return [mistake.text.replace(str(folder), "DIR") for mistake in caught.value.mistakes]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"# \n# \xff\n", "line 2 is not UTF-8; save it as UTF-8"),
        ("# ä\n".encode("latin-1"), "line 1 is not UTF-8; save it as UTF-8"),
        (VOLUME.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b"#" * (files.LARGEST + 1), "it is larger than 16 MiB"),
    ],
)
def test_a_file_that_is_no_text(tmp_path: Path, content: bytes, why: str) -> None:
    place(tmp_path, content, "conf.d/a.toml")
    assert refused(tmp_path) == [f"DIR/conf.d/a.toml: cannot be read: {why}"]


def test_a_file_from_windows(tmp_path: Path) -> None:
    place(tmp_path, b"\xef\xbb\xbf" + VOLUME.replace("\n", "\r\n").encode())
    assert list(files.load(tmp_path).volumes) == ["a"]


@pytest.mark.parametrize("name", ["vmcryptd.toml", "conf.d/a.toml"])
def test_what_is_there_and_cannot_be_read_is_not_an_empty_file(tmp_path: Path, name: str) -> None:
    path = place(tmp_path, name=name)
    path.unlink()
    path.symlink_to("nowhere.toml")
    assert refused(tmp_path) == [
        f"DIR/{name}: a link to nowhere.toml, which is not there; correct it, or remove it"
    ]
    path.unlink()
    path.symlink_to(path.name)
    assert refused(tmp_path) == [f"DIR/{name}: cannot be read: too many levels of symbolic links"]
    path.unlink()
    path.mkdir()
    assert refused(tmp_path) == [f"DIR/{name}: cannot be read: it is a directory"]
    path.rmdir()
    os.mkfifo(path)
    assert refused(tmp_path) == [f"DIR/{name}: cannot be read: it is no regular file"]


def test_a_drop_in_that_has_just_gone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, name="conf.d/a.toml")
    monkeypatch.setattr(os, "listdir", lambda path: ["a.toml", "gone.toml"])
    assert list(files.load(tmp_path).volumes) == ["a"]


def test_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so the refusal is the system's only in name.
    place(tmp_path, name="conf.d/a.toml")

    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", denied)
        assert refused(tmp_path) == ["DIR/conf.d: cannot be read: permission denied"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        assert refused(tmp_path) == [
            "DIR/vmcryptd.toml: cannot be read: permission denied",
            "DIR/conf.d/a.toml: cannot be read: permission denied",
        ]


def test_conf_d_is_a_directory(tmp_path: Path) -> None:
    place(tmp_path, name="conf.d").unlink()
    (tmp_path / "conf.d").symlink_to("nowhere")
    assert refused(tmp_path) == ["DIR/conf.d: cannot be read: no such file or directory"]
    (tmp_path / "conf.d").unlink()
    place(tmp_path, name="conf.d")
    assert refused(tmp_path) == ["DIR/conf.d: cannot be read: not a directory"]


def test_the_directory_that_is_asked_for_is_there(tmp_path: Path) -> None:
    wanted = "expected the one in which vmcryptd.toml lies"
    assert files.read(tmp_path / "none") == {}
    assert refused(tmp_path / "none", required=True) == [
        f"DIR: there is no such directory; {wanted}"
    ]
    path = place(tmp_path)
    assert refused(path) == [f"DIR: is no directory; {wanted}"]


def test_a_link_to_null_switches_a_drop_in_off(tmp_path: Path) -> None:
    place(tmp_path, name="conf.d/a.toml").unlink()
    (tmp_path / "conf.d" / "a.toml").symlink_to("/dev/null")
    assert files.load(tmp_path).volumes == {}


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("a.toml", "b.conf", "c.toml~", "d", ".e.toml", "F.TOML", ".a.toml.swp"):
        place(tmp_path, "", f"conf.d/{name}")
    (tmp_path / "conf.d" / ".#a.toml").symlink_to("me@here")
    assert files.not_read(tmp_path) == [".e.toml", "F.TOML", "b.conf", "c.toml~", "d"]
    assert list(files.read(tmp_path)) == [str(tmp_path / "conf.d" / "a.toml")]
