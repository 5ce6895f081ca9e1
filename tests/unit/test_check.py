# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl check`: what it finds wrong, and what exit status that gives."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmcryptd import daemon
from vmcryptd.audit import check, probe
from vmcryptd.audit.check import ERROR, WARNING, Finding
from vmcryptd.audit.probe import Facts, File
from vmcryptd.audit.tables import Fault
from vmcryptd.cli import main
from vmcryptd.config import files as configuration_files
from vmcryptd.config import schema
from vmcryptd.core import graph
from vmcryptd.core.errors import ConfigError, DeviceMissingError, NotLuksError
from vmcryptd.core.model import (
    BlockDevice,
    DiskSource,
    Domain,
    GuestState,
    Header,
    KeySlot,
    Observation,
    SourceType,
    Storage,
    Token,
    Virtualisation,
)

UUID = "3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"
ENABLED = dict.fromkeys(probe.UNITS[:3], "enabled")
PLUGINS = frozenset({"systemd-tpm2"})
TPM2 = Header(2, UUID, tokens=(Token(0, "systemd-tpm2", (0,)),))
KEY = File(is_regular=True, mode=0o600)


LINK = "/dev/disk/by-path/a"
COPIED = "/dev/disk/by-label/a"


def facts(text: str, *domains: Domain, **more: Any) -> Facts:
    settings = schema.parse({"vmcryptd.toml": text})
    links = dict.fromkeys(["/dev/vda", LINK, COPIED], "vda")
    devices = {name: BlockDevice(name) for name in ("vda", "vdb")}
    storage = Storage(devices, links, claims={COPIED: ("vda", "vdb")})
    virtualisation = Virtualisation(True, {domain.name: domain for domain in domains})
    built = graph.build(settings, Observation(storage, virtualisation))
    return replace(Facts(settings, built, units=ENABLED, memory_kib=4 << 20), **more)


def disk(path: str, **more: Any) -> DiskSource:
    return DiskSource(SourceType.BLOCK, path, **more)


def guest(name: str, *sources: DiskSource, running: bool = False, **more: Any) -> Domain:
    state = GuestState.RUNNING if running else GuestState.OFF
    return Domain(name, "", state, sources=sources, **more)


def found(subject: Facts) -> list[Finding]:
    rules: list[Callable[[Facts], Any]] = [check._host, check._units, check._volumes, check._guests]
    return [finding for rule in rules for finding in rule(subject)]


GOOD = f'[volume.a]\ndevice = "{LINK}"\n'
BY_KERNEL_NAME = '[volume.a]\ndevice = "/dev/vda"\n'


def test_a_token_and_its_plugin_are_there() -> None:
    text = GOOD + 'keys = ["tpm2"]\n'
    assert found(facts(text, headers={"a": TPM2}, token_plugins=PLUGINS)) == []


def test_nothing_is_wrong() -> None:
    subject = facts(GOOD, guest("g", disk("/dev/mapper/a")), headers={"a": Header(2, UUID)})
    assert found(subject) == []


@pytest.mark.parametrize(
    ("more", "headers", "advice"),
    [
        ("", {"a": Header(2, UUID)}, f'write device = "UUID={UUID}"'),
        ('header = "/h"\n', {"a": Header(2, UUID)}, "name the disk by one of its links"),
        ("", {}, "name the disk by one of its links"),
    ],
)
def test_what_to_write_for_a_kernel_name(
    more: str, headers: dict[str, Header], advice: str
) -> None:
    [finding] = found(facts(BY_KERNEL_NAME + more, headers=headers))
    assert finding.advice.startswith(advice)


@pytest.mark.parametrize("is_open", [True, False])
def test_a_detached_header_on_a_locked_volume(is_open: bool) -> None:
    text = GOOD.replace("]", ']\nheader = "/srv/a.header"\nafter = ["b"]') + (
        '[volume.b]\ndevice = "/dev/vdb"\ncontent = "filesystem"\nmount = "/srv"\n'
    )
    subject = facts(text, headers={"a": DeviceMissingError("/srv/a.header cannot be read")})
    volumes = dict(subject.graph.volumes)
    volumes["b"] = volumes["b"]._replace(mapping="b" if is_open else "", mounts=("/srv",))
    subject = replace(subject, graph=replace(subject.graph, volumes=volumes))
    shown = [
        finding.severity for finding in check._volumes(subject) if finding.object == "volume a"
    ]
    assert shown == [ERROR] * is_open


@pytest.mark.parametrize(
    ("text", "more", "severity", "words"),
    [
        ("", {}, WARNING, "no volume is configured"),
        ('[volume.a]\ndevice = "/dev/vdx"\n', {}, ERROR, "/dev/vdx is not there"),
        (GOOD, {"headers": {"a": NotLuksError("no LUKS")}}, ERROR, "no LUKS"),
        (
            GOOD + f'uuid = "{UUID}"\n',
            {"headers": {"a": Header(2, "other")}, "strangers": {"a": "was last seen as b"}},
            ERROR,
            "was last seen as b",
        ),
        (BY_KERNEL_NAME, {"headers": {"a": Header(2, UUID)}}, WARNING, "can be another disk then"),
        ('[volume.a]\ndevice = "LABEL=a"\n', {}, ERROR, "is on /dev/vda and /dev/vdb"),
        (
            GOOD,
            {"headers": {"a": Header(2, UUID, (KeySlot(0, "argon2id", 8 << 20),))}},
            ERROR,
            "needs 8192 MiB",
        ),
        (GOOD + 'keys = ["file:/k"]\n', {}, ERROR, "/k is not there"),
        (
            GOOD + 'keys = ["file:/k"]\n',
            {"files": {"/k": replace(KEY, mode=0o640)}},
            ERROR,
            "others",
        ),
        (GOOD + 'keys = ["file:/k"]\n', {"files": {"/k": replace(KEY, uid=7)}}, ERROR, "to root"),
        (
            GOOD + 'keys = ["file:/k"]\n',
            {"files": {"/k": replace(KEY, is_empty=True)}},
            ERROR,
            "empty",
        ),
        (
            GOOD + 'keys = ["file:/k"]\n',
            {"files": {"/k": File(is_directory=True)}},
            ERROR,
            "regular",
        ),
        (GOOD + 'keys = ["exec:/bin/x y"]\n', {}, ERROR, "/bin/x is not there"),
        (GOOD + 'keys = ["exec:/bin/x y"]\n', {"files": {"/bin/x": KEY}}, ERROR, "cannot be run"),
        (GOOD + 'keys = ["credential:c"]\n', {}, ERROR, "no credential c"),
        (
            GOOD + 'keys = ["tpm2", "prompt"]\n',
            {"headers": {"a": Header(2, UUID)}, "token_plugins": PLUGINS},
            WARNING,
            "no systemd-tpm2 token",
        ),
        (
            GOOD + 'keys = ["tpm2", "prompt"]\n',
            {"headers": {"a": TPM2}, "token_plugins": {"systemd-fido2"}},
            WARNING,
            "no plugin for systemd-tpm2",
        ),
        (
            GOOD + 'keys = ["clevis", "prompt"]\n',
            {"headers": {"a": Header(2, UUID)}, "has_clevis": True},
            WARNING,
            "no Clevis binding",
        ),
        (
            GOOD + 'keys = ["clevis", "prompt"]\n',
            {"headers": {"a": Header(1, UUID)}},
            WARNING,
            "clevis is not installed",
        ),
        ('[daemon]\non_waiting = ["/bin/x"]\n' + GOOD, {}, ERROR, "/bin/x is not there"),
        ('[daemon]\non_failed = ["/bin/y"]\n' + GOOD, {}, ERROR, "/bin/y is not there"),
        (
            GOOD + 'content = "filesystem"\nmount = "/m"\n',
            {"files": {"/m": KEY}},
            ERROR,
            "no directory",
        ),
        (
            GOOD + 'content = "filesystem"\nmount = "/m"\n',
            {"files": {"/m": File(is_directory=True)}},
            WARNING,
            "not empty",
        ),
        (
            GOOD + 'content = "filesystem"\nmount = "/run/vmcryptd/keys"\n',
            {},
            WARNING,
            "mounted in /run/vmcryptd, where files are removed",
        ),
        (GOOD, {"units": {}}, WARNING, "systemd does not say"),
        (
            GOOD,
            {"units": {**ENABLED, "vmcryptd-guests.service": "disabled"}},
            ERROR,
            "it is disabled",
        ),
        (GOOD, {"libvirt_error": "libvirt is away"}, ERROR, "libvirt is away"),
        (GOOD, {"plain_swap": ("/dev/vdb",)}, WARNING, "swap is not encrypted (/dev/vdb)"),
        (GOOD, {"suspends": "libvirt-guests.service"}, WARNING, "plain text"),
        (GOOD, {"is_root": False}, WARNING, "without root"),
        (GOOD + '[guest.x]\nstart = "never"\n', {}, ERROR, "libvirt knows no such guest"),
    ],
)
def test_findings(text: str, more: dict[str, Any], severity: str, words: str) -> None:
    findings = found(facts(text, **more))
    assert len(findings) == 1, findings
    assert findings[0].severity == severity
    assert words in findings[0].text
    assert findings[0].advice


@pytest.mark.parametrize(
    ("text", "domains", "more", "severity", "words"),
    [
        (GOOD, [guest("g", disk("/dev/vda"))], {}, ERROR, "overwrite the LUKS header"),
        (
            GOOD,
            [guest("g", disk("/dev/vdq"))],
            {"luks_disks": frozenset(["/dev/vdq"])},
            WARNING,
            "no volume here",
        ),
        (
            GOOD,
            [guest("g", disk("/x"))],
            {"unread_chains": {"/x": "too many snapshots"}},
            WARNING,
            "what its disk /x is backed by is not known: too many snapshots",
        ),
        (
            GOOD,
            [guest("g", disk("/x"), running=True), guest("h", disk("/link-to-x"), running=True)],
            {},
            ERROR,
            "run both",
        ),
        (GOOD, [guest("g", disk("/x")), guest("h", disk("/link-to-x"))], {}, WARNING, "same disk"),
        (
            GOOD + 'unlock = "manual"\n',
            [guest("g", disk("/dev/mapper/a"), autostart=True)],
            {},
            WARNING,
            "by command only",
        ),
        (
            GOOD + '[guest.g]\nafter = ["nobody"]\n',
            [guest("g")],
            {},
            ERROR,
            "nobody, which libvirt does not know",
        ),
        (
            GOOD,
            [guest("g", disk("/dev/mapper/a"))],
            {"saved": frozenset(["g"])},
            WARNING,
            "managed save",
        ),
    ],
)
def test_findings_about_guests(
    text: str, domains: list[Domain], more: dict[str, Any], severity: str, words: str
) -> None:
    identities = {"/dev/vda": "vda", "/x": "/x", "/link-to-x": "/x", "/dev/vdq": "vdq"}
    findings = found(facts(text, *domains, identities=identities, **more))
    assert [finding.severity for finding in findings] == [severity], findings
    assert words in findings[0].text


def test_shared_and_read_only_disks_are_fine() -> None:
    shared, read_only = disk("/x", shareable=True), disk("/y", writable=False)
    domains = [guest(name, shared, read_only, running=True) for name in ("g", "h")]
    assert found(facts(GOOD, *domains, identities={"/x": "/x", "/y": "/y"})) == []


def test_a_key_file_on_a_locked_volume_is_not_missed() -> None:
    text = (
        GOOD + 'keys = ["file:/m/k"]\nafter = []\n'
        '[volume.store]\ndevice = "/dev/vdb"\ncontent = "filesystem"\nmount = "/m"\n'
    )
    texts = [finding.text for finding in found(facts(text))]
    assert texts == ["its device /dev/vdb is not there"]


def test_a_line_of_fstab_or_crypttab() -> None:
    faults = (Fault("a", True, "line 3 of /etc/fstab", "x"), Fault("a", False, "line 4", "y"))
    assert found(facts(GOOD, table_faults=faults)) == [
        Finding(ERROR, "volume a", "line 3 of /etc/fstab", "x"),
        Finding(WARNING, "volume a", "line 4", "y"),
    ]


def test_exit_status() -> None:
    warning = Finding(WARNING, "swap", "", "")
    error = Finding(ERROR, "volume a", "", "")
    refused = Finding(ERROR, check.CONFIGURATION, "", "")
    assert check.exit_status([]) == 0
    assert check.exit_status([warning]) == 0
    assert check.exit_status([warning, error]) == 1
    assert check.exit_status([error, refused]) == 2


def test_each_mistake_is_a_finding_that_shows_the_line_and_what_to_write(tmp_path: Path) -> None:
    text = '[volume.a]\ndevice = /dev/a\n[volume.b]\ndevice = "/dev/b"\nkeys = "tpm2"\n'
    (tmp_path / "vmcryptd.toml").write_text(text)
    findings = asyncio.run(check.problems(tmp_path))
    assert [(one.severity, one.object, one.advice) for one in findings] == [
        (ERROR, check.CONFIGURATION, 'write: device = "/dev/a"'),
        (ERROR, check.CONFIGURATION, 'write: keys = ["tpm2"]'),
    ]
    assert findings[0].text == (
        f"{tmp_path}/vmcryptd.toml:2: not valid TOML: invalid value; a text stands in quotes: device = /dev/a"
    )


def test_a_candidate_has_to_be_there(tmp_path: Path) -> None:
    [finding] = asyncio.run(check.problems(tmp_path / "none", required=True))
    assert check.exit_status([finding]) == 2
    assert "there is no such directory" in finding.text


def test_a_candidate_is_checked_instead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vmcryptd.toml").write_text("[volume.a]\ndevice = /dev/a\n")
    assert main.main(["check", "--config", str(tmp_path)]) == 2
    assert f"{tmp_path}/vmcryptd.toml:2: not valid TOML" in capsys.readouterr().out
    assert main.main(["check", "--config", str(tmp_path / "none")]) == 2
    assert "there is no such directory" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["none", "vmcryptd.toml"])
def test_the_daemon_refuses_a_directory_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "vmcryptd.toml").touch()
    arguments = daemon._arguments(["--config", str(tmp_path / name)])
    with pytest.raises(ConfigError, match="expected the one in which vmcryptd.toml lies"):
        daemon._composition(arguments)


def test_drop_ins_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    for name in ("imap.conf", "old\n.toml~"):
        (tmp_path / "conf.d" / name).touch()
    [finding] = list(check._not_read(tmp_path))
    assert finding.severity == WARNING
    assert f"imap.conf, old\\n.toml~ in {tmp_path}/conf.d" in finding.text


def test_a_refused_configuration(tmp_path: Path) -> None:
    (tmp_path / "vmcryptd.toml").write_text('[volume.a]\ndevise = "/dev/vda"\n')
    findings = asyncio.run(check.problems(tmp_path))
    assert check.exit_status(findings) == 2
    assert 'did you mean "device"' in findings[0].text


def test_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k")
    key.chmod(0o644)
    (tmp_path / "vmcryptd.toml").write_text(
        f'[daemon]\nlibvirt_uri = "test:///default"\n[volume.a]\ndevice = "{tmp_path}/none"\nkeys = ["file:{key}"]\n'
    )
    settings = configuration_files.load(tmp_path)
    monkeypatch.setattr(probe, "LIBVIRT_S", 5.0)
    looked = asyncio.run(probe.look(settings))
    assert looked.files[str(key)].mode == 0o644
    assert looked.memory_kib > 0
    assert looked.is_root == (os.geteuid() == 0)
    texts = [finding.text for finding in found(looked)]
    assert f"its device {tmp_path}/none is not there" in texts
    assert f"its key file {key} is open to others" in texts
