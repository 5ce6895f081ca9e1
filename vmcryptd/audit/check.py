# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks whether boot will work: what is wrong with the configuration and the host, and what to do."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vmcryptd.audit.probe import Facts, look
from vmcryptd.config import files
from vmcryptd.core import conflicts
from vmcryptd.core.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    ConfigError,
    DeviceMissingError,
    Mistake,
    VmcryptdError,
)
from vmcryptd.core.graph import GuestNode, VolumeNode
from vmcryptd.core.keystores import SWEPT_MOUNTS, swept_by
from vmcryptd.core.model import Header, KeySource, SourceKind, Unlock
from vmcryptd.core.text import escaped

ERROR, WARNING = "error", "warning"
CONFIGURATION = "configuration"


class Finding(NamedTuple):
    """One thing that is wrong (error), or that the administrator should know (warning)."""

    severity: str
    object: str
    text: str
    advice: str


async def problems(directory: Path = files.DIRECTORY, *, required: bool = False) -> list[Finding]:
    """Everything that is wrong, errors first. A `required` directory has to be there."""
    try:
        facts = await look(files.load(directory, required=required))
    except ConfigError as error:
        return [_mistake(mistake) for mistake in error.mistakes]
    found = [
        *_not_read(directory),
        *_host(facts),
        *_units(facts),
        *_volumes(facts),
        *_guests(facts),
    ]
    return sorted(found, key=lambda finding: finding.severity != ERROR)


def _mistake(mistake: Mistake) -> Finding:
    text = f"{mistake.text}: {mistake.line}" if mistake.line else mistake.text
    advice = f"write: {mistake.hint}" if mistake.hint else "correct it; see vmcryptd.toml(5)"
    return Finding(ERROR, CONFIGURATION, text, advice)


def _not_read(directory: Path) -> Iterator[Finding]:
    if names := files.not_read(directory):
        shown = ", ".join(map(escaped, names))
        text = f"not read, since only *.toml is: {shown} in {directory / files.DROP_INS}"
        yield Finding(WARNING, CONFIGURATION, text, "rename them to NAME.toml, or move them away")


def exit_status(findings: Iterable[Finding]) -> int:
    errors = [finding for finding in findings if finding.severity == ERROR]
    if any(finding.object == CONFIGURATION for finding in errors):
        return EXIT_USAGE
    return EXIT_FAILED if errors else EXIT_OK


def _host(facts: Facts) -> Iterator[Finding]:
    if not facts.is_root:
        text = "not everything can be seen without root"
        yield Finding(WARNING, "check", text, "run it again as root: sudo vmcryptctl check")
    if not facts.settings.volumes:
        text = "no volume is configured, so nothing is opened at boot"
        yield Finding(
            WARNING, "volumes", text, "see vmcryptd.toml(5) and the examples that come with it"
        )
    if facts.libvirt_error:
        advice = "see `systemctl status libvirtd virtqemud`; guests were not checked"
        yield Finding(ERROR, "libvirt", facts.libvirt_error, advice)
    if facts.plain_swap:
        text = f"swap is not encrypted ({', '.join(facts.plain_swap)}): what guests have in memory can land there"
        advice = "encrypt it with a random key, see swap in crypttab(5), or use zram"
        yield Finding(WARNING, "swap", text, advice)
    daemon = facts.settings.daemon
    for key, argv in (("on_waiting", daemon.on_waiting), ("on_failed", daemon.on_failed)):
        for path in argv[:1]:
            yield from _program(key, path, facts)
    if facts.suspends:
        text = f"{facts.suspends} would suspend guests at shutdown, which writes their memory to disk in plain text"
        advice = "set ON_SHUTDOWN=shutdown there, or disable it: vmcryptd stops the guests on its volumes"
        yield Finding(WARNING, "libvirt-guests", text, advice)


def _units(facts: Facts) -> Iterator[Finding]:
    wanted = [
        (
            "vmcryptd-guests.service",
            ERROR,
            "nothing is opened at boot, and nothing closed at shutdown",
        ),
        ("vmcryptd.service", WARNING, "the daemon starts only when something asks for it"),
    ]
    if facts.settings.daemon.console_prompt_s:
        text = "the console's question may vanish before it can be answered"
        wanted.append(("vmcryptd-console.service", WARNING, text))
    if not facts.units:
        text = "systemd does not say which units are enabled"
        yield Finding(
            WARNING, "systemd", text, "see `systemctl is-enabled vmcryptd-guests.service`"
        )
        return
    for unit, severity, what in wanted:
        state = facts.units.get(unit, "")
        if not state.startswith("enabled"):
            text = f"it is {state or 'not installed'}: {what}"
            yield Finding(severity, unit, text, f"systemctl enable {unit}")


def _volumes(facts: Facts) -> Iterator[Finding]:
    for name, node in facts.graph.volumes.items():
        where = f"volume {name}"
        spec = node.spec
        if node.taken_by:
            text = f"its mapping's name is taken by something else ({node.taken_by})"
            yield Finding(
                ERROR, where, text, f"see `dmsetup info {name}`, and rename one of the two"
            )
        if node.rivals:
            yield Finding(ERROR, where, node.trouble, "see `lsblk -o NAME,UUID,LABEL,PARTUUID`")
        elif not node.device and not facts.graph.is_explained(name):
            text = f"its device {spec.device} is not there"
            advice = "see `lsblk -f`; if it lies on another volume, say so by `after`"
            yield Finding(ERROR, where, text, advice)
        for fault in facts.table_faults:
            if fault.volume == name:
                yield Finding(ERROR if fault.is_error else WARNING, where, fault.text, fault.advice)
        if node.is_misnamed:
            yield Finding(WARNING, where, node.trouble, f"see `dmsetup info {node.mapping}`")
        yield from _kernel_name(facts, where, node)
        yield from _header(facts, where, node)
        yield from _keys(facts, where, node)
        if spec.mount and (directory := swept_by(spec.mount, SWEPT_MOUNTS)):
            text = (
                f"it is mounted in {directory}, where files are removed by age or with the package"
            )
            yield Finding(
                WARNING, where, text, "correct `mount`: name a place of its own, such as /srv"
            )
        if spec.mount and spec.mount not in node.mounts:
            yield from _mount_point(facts, where, spec.mount)


def _kernel_name(facts: Facts, where: str, node: VolumeNode) -> Iterator[Finding]:
    spec = facts.settings.volumes[node.spec.name]
    if not node.device or spec.device != f"/dev/{node.device}":
        return
    text = f"{spec.device} is a name that the kernel gives anew at each boot: it can be another disk then"
    header = facts.headers.get(spec.name)
    if isinstance(header, Header) and not spec.header and spec.name not in facts.strangers:
        advice = f'write device = "UUID={header.uuid}"'
    else:
        advice = "name the disk by one of its links in /dev/disk/by-id"
    yield Finding(WARNING, where, text, advice)


def _header(facts: Facts, where: str, node: VolumeNode) -> Iterator[Finding]:
    header = facts.headers.get(node.spec.name)
    if header is None:
        return
    if isinstance(header, DeviceMissingError) and _lies_deeper(facts, node):
        return  # a detached header on a volume that is locked
    if isinstance(header, VmcryptdError):
        advice = f"see `cryptsetup luksDump {node.spec.header_path}`"
        yield Finding(ERROR if facts.is_root else WARNING, where, str(header), advice)
        return
    if node.spec.name in facts.strangers:
        advice = "see `lsblk -o NAME,UUID`, and correct `device` or `uuid`"
        yield Finding(ERROR, where, facts.strangers[node.spec.name], advice)
    if facts.memory_kib and header.memory_kib > facts.memory_kib:
        text = (
            f"a key slot needs {header.memory_kib // 1024} MiB to be opened, and the host has "
            f"{facts.memory_kib // 1024} MiB"
        )
        advice = f"cryptsetup luksConvertKey --pbkdf-memory 262144 {node.spec.header_path}"
        yield Finding(ERROR, where, text, advice)


def _lies_deeper(facts: Facts, node: VolumeNode) -> bool:
    """Whether the volume's key may lie on another volume that is locked."""
    return any(not facts.graph.volumes[lower].is_open for lower in node.opens_after)


def _keys(facts: Facts, where: str, node: VolumeNode) -> Iterator[Finding]:
    lies_deeper = _lies_deeper(facts, node)
    for source in node.spec.keys:
        path = source.argument
        match source.kind:
            case SourceKind.FILE if path not in facts.files:
                if not lies_deeper and facts.is_root:  # else that volume hides the file
                    yield Finding(
                        ERROR,
                        where,
                        f"its key file {path} is not there",
                        "make it, or take it out of `keys`",
                    )
            case SourceKind.FILE:
                yield from _key_file(facts, where, path)
            case SourceKind.EXEC:
                yield from _program(where, shlex.split(path)[0], facts)
            case kind if kind.token_kind:
                yield from _token(facts, where, node, source)
            case SourceKind.CLEVIS:
                yield from _clevis(facts, where, node)
            case SourceKind.CREDENTIAL if path not in facts.credentials and facts.is_root:
                text = f"there is no credential {path}"
                advice = (
                    f"systemd-creds encrypt --name={path} KEYFILE /etc/credstore.encrypted/{path}"
                )
                yield Finding(ERROR, where, text, advice)


def _token(facts: Facts, where: str, node: VolumeNode, source: KeySource) -> Iterator[Finding]:
    kind, header = source.kind.token_kind, facts.headers.get(node.spec.name)
    place = node.spec.header_path
    if isinstance(header, Header) and kind not in {token.kind for token in header.tokens}:
        text = f"its header has no {kind} token, so {source} does not open it"
        option = {SourceKind.TPM2: "--tpm2-device=auto", SourceKind.FIDO2: "--fido2-device=auto"}
        advice = f"systemd-cryptenroll {option.get(source.kind, '--pkcs11-token-uri=auto')} {place}"
        yield Finding(WARNING, where, text, advice)
    if kind not in facts.token_plugins:
        text = f"cryptsetup has no plugin for {kind} tokens, so {source} does not open it"
        advice = "install it: the package systemd-cryptsetup on Debian 13, systemd-udev on Fedora"
        yield Finding(WARNING, where, text, advice)


def _clevis(facts: Facts, where: str, node: VolumeNode) -> Iterator[Finding]:
    header, place = facts.headers.get(node.spec.name), node.spec.header_path
    if not facts.has_clevis:
        text = "clevis is not installed, so it does not open it"
        yield Finding(WARNING, where, text, "install the package clevis-luks")
    kinds = {token.kind for token in header.tokens} if isinstance(header, Header) else set()
    # LUKS1 keeps the bindings elsewhere in the header.
    if isinstance(header, Header) and header.version == 2 and "clevis" not in kinds:
        text = "its header has no Clevis binding, so clevis does not open it"
        advice = f'clevis luks bind -d {place} tang \'{{"url": "http://SERVER"}}\''
        yield Finding(WARNING, where, text, advice)


def _key_file(facts: Facts, where: str, path: str) -> Iterator[Finding]:
    file = facts.files[path]
    if not file.is_regular:
        yield Finding(ERROR, where, f"its key file {path} is no regular file", "name another one")
    elif file.is_empty:
        yield Finding(ERROR, where, f"its key file {path} is empty", "put the key into it")
    if file.uid != 0:
        yield Finding(
            ERROR, where, f"its key file {path} does not belong to root", f"chown root {path}"
        )
    if file.mode & 0o077:
        yield Finding(ERROR, where, f"its key file {path} is open to others", f"chmod 600 {path}")


def _program(where: str, path: str, facts: Facts) -> Iterator[Finding]:
    file = facts.files.get(path)
    if file is None:
        yield Finding(
            ERROR, where, f"the program {path} is not there", "install it, or name another"
        )
    elif not (file.is_regular and file.is_executable):
        yield Finding(ERROR, where, f"{path} cannot be run", f"chmod 755 {path}")


def _mount_point(facts: Facts, where: str, path: str) -> Iterator[Finding]:
    file = facts.files.get(path)
    if file is None:
        return  # it is made when it is needed
    if not file.is_directory:
        yield Finding(
            ERROR, where, f"{path} is no directory, so nothing can be mounted there", "move it away"
        )
    elif not file.is_empty:
        text = f"{path} is not empty: what lies there is on the host's own disk, and hidden once this is mounted"
        yield Finding(WARNING, where, text, "look at it, and move it onto the volume")


def _guests(facts: Facts) -> Iterator[Finding]:
    graph = facts.graph
    for name, guest in graph.guests.items():
        where = f"guest {name}"
        raw = conflicts.overwritten_volume(graph, name)
        if raw:
            yield Finding(ERROR, where, raw.text, raw.advice)
        for source in guest.domain.sources if guest.domain else ():
            if source.path in facts.luks_disks and not (raw and raw.disk.path == source.path):
                text = f"its disk {source.path} begins with a LUKS header that is no volume here"
                advice = "if the guest itself encrypts it, this is right; else it will overwrite the header"
                yield Finding(WARNING, where, text, advice)
            if why := facts.unread_chains.get(source.path):
                text = f"what its disk {source.path} is backed by is not known: {why}"
                advice = f"name the volumes in needs = [...] of [guest.{name}]"
                yield Finding(WARNING, where, text, advice)
        if not graph.libvirt_reachable:
            continue
        if guest.spec.configured and guest.domain is None:
            yield Finding(ERROR, where, "libvirt knows no such guest", "see `virsh list --all`")
        for other in guest.spec.after:
            if other not in graph.guests:
                text = f"it starts after {other}, which libvirt does not know"
                yield Finding(ERROR, where, text, "see `virsh list --all`")
        manual = [need for need in guest.needs if graph.volumes[need].spec.unlock is Unlock.MANUAL]
        if manual and guest.starts_at_boot:
            text = f"it starts at boot, but {', '.join(manual)} is opened by command only"
            advice = 'set unlock = "boot" or "guest" there, or `virsh autostart --disable` here'
            yield Finding(WARNING, where, text, advice)
        if guest.needs and name in facts.saved:
            text = "its memory lies on the host's disk in plain text (managed save)"
            advice = f"start it and shut it down, or throw it away: virsh managedsave-remove {name}"
            yield Finding(WARNING, where, text, advice)
    yield from _shared_disks(facts)


def _shared_disks(facts: Facts) -> Iterator[Finding]:
    writers: dict[str, list[tuple[str, GuestNode, str]]] = {}
    for name, guest in facts.graph.guests.items():
        for source in guest.domain.sources if guest.domain else ():
            identity = facts.identities.get(source.path)
            if identity and source.writable and not source.shareable:
                writers.setdefault(identity, []).append((name, guest, source.path))
    for users in writers.values():
        names = dict.fromkeys(name for name, _, _ in users)
        if len(names) < 2:
            continue
        running = [name for name in names if facts.graph.guests[name].is_running]
        text = f"{', '.join(names)} write to the same disk {users[0][2]}"
        if len(running) > 1:
            yield Finding(
                ERROR,
                f"guest {running[0]}",
                f"{text}, and run both: it is being destroyed",
                "stop one now",
            )
        else:
            advice = "never start both; <shareable/> says that it is meant to be so"
            yield Finding(WARNING, f"guest {next(iter(names))}", text, advice)
