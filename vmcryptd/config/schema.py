# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: pydantic models for the TOML, and its translation into `model.Settings`.

The only module that knows pydantic. The commented default file and the option pages are generated from the
descriptions here (`packaging/docs.py`).
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vmcryptd.core.durations import duration
from vmcryptd.core.errors import ConfigError, nearest
from vmcryptd.core.model import (
    Content,
    DaemonSpec,
    GuestSpec,
    KeySource,
    Lock,
    OnStopTimeout,
    Settings,
    SourceKind,
    Start,
    Unlock,
    VolumeSpec,
)

_TAGS = ("UUID", "PARTUUID", "LABEL", "PARTLABEL")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _share(value: object) -> float:
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)%", value.strip())):
        share = float(match[1]) / 100
        if 0 < share <= 1:
            return share
    raise ValueError('expected a percentage from "1%" to "100%"')


def mapping_name(value: str) -> str:
    """Return a valid mapping name unchanged; raises ValueError (device-mapper allows 127 characters)."""
    if value in ("control", ".", "..") or not re.fullmatch(r"[A-Za-z0-9._+-]{1,127}", value):
        raise ValueError(
            f'"{value}" is not a valid mapping name: letters, digits and "._+-", at most 127, not "control"'
        )
    return value


def _device(value: str) -> str:
    tag, sep, rest = value.partition("=")
    if sep and tag in _TAGS and rest not in ("", ".", "..") and "/" not in rest:
        # udev's links are in the case in which libblkid prints it, which for these is lower.
        return f"{tag}={rest.lower()}" if _UUID.fullmatch(rest.lower()) else value
    if value.startswith("/"):
        return _absolute(value)
    raise ValueError(
        f'expected an absolute path or one of {", ".join(t + "=…" for t in _TAGS)}, not "{value}"'
    )


def _absolute(value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/") or "\0" in value:
        raise ValueError(f'expected an absolute path, not "{value}"')
    return "/" + "/".join(part for part in value.split("/") if part)


def _uuid(value: str) -> str:
    text = value.lower()
    if not _UUID.fullmatch(text):
        raise ValueError(f'expected a UUID such as 0b7c8a1e-…, not "{value}"')
    return text


def _vg_name(value: str) -> str:
    """As lvm(8) allows them."""
    if value in (".", "..") or not re.fullmatch(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}", value):
        raise ValueError(f'"{value}" is not a valid volume group name')
    return value


def _key_source(value: str) -> str:
    kind, _, argument = value.partition(":")
    if kind not in tuple(SourceKind):
        known = "prompt, tpm2, fido2, pkcs11, clevis, file:/path, credential:name, exec:/command"
        raise ValueError(
            f'"{value}" is no key source: expected one of {known}{_hint(kind, SourceKind)}'
        )
    if kind not in (SourceKind.FILE, SourceKind.CREDENTIAL, SourceKind.EXEC):
        if argument or value != kind:
            raise ValueError(f'"{kind}" takes no argument')
    elif not argument:
        raise ValueError(f'"{kind}:" needs an argument')
    elif kind == SourceKind.FILE:
        return f"file:{_absolute(argument)}"
    elif kind == SourceKind.CREDENTIAL:
        if "/" in argument or argument in (".", "..") or not argument.isprintable():
            raise ValueError(f'"{argument}" is not a valid credential name')
    elif kind == SourceKind.EXEC:
        try:
            words = shlex.split(argument)
        except ValueError as error:
            raise ValueError(f'"{value}": {error}') from None
        if not words or not words[0].startswith("/"):
            raise ValueError(f'"{value}": expected the absolute path of a program')
    return value


def _ready(value: str) -> str:
    if value in ("running", "agent"):
        return value
    match = re.fullmatch(r"tcp:(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})", value)
    if match and 0 < int(match[2]) < 65536:
        return value
    raise ValueError(f'expected "running", "agent" or "tcp:HOST:PORT", not "{value}"')


def _hint(word: str, known: Iterable[str]) -> str:
    close = nearest(word, known)
    return f' (did you mean "{close}"?)' if close else ""


def _before(function: Any) -> Any:
    return BeforeValidator(lambda value: function(value) if isinstance(value, str) else value)


Duration = Annotated[float, BeforeValidator(duration)]
Share = Annotated[float, BeforeValidator(_share)]
Device = Annotated[str, _before(_device)]
AbsolutePath = Annotated[str, _before(_absolute)]
Uuid = Annotated[str, _before(_uuid)]
Source = Annotated[str, _before(_key_source)]
Ready = Annotated[str, _before(_ready)]
VgName = Annotated[str, _before(_vg_name)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DaemonTable(_Table):
    """How vmcryptd itself behaves."""

    libvirt_uri: str = Field(
        "qemu:///system",
        description="The libvirt connection whose guests are started and stopped. A change of it takes a restart of "
        "vmcryptd.service, which touches nothing; a reload does not do.",
    )
    console_prompt: Duration = Field(
        60.0,
        description="How long boot keeps the console for the passphrase question. Boot always goes on afterwards; "
        'the question stays open for every other way to answer it. "0" = do not keep the console at all.',
        json_schema_extra={"shown": "60s"},
    )
    shutdown_timeout: Duration = Field(
        300.0,
        description="The whole budget for stopping the guests when the host shuts down.",
        json_schema_extra={"shown": "5min"},
    )
    kdf_memory: Share = Field(
        0.5,
        description="How much of the available memory the key derivations that run side by side may take. "
        "A single one always runs.",
        json_schema_extra={"shown": "50%"},
    )
    key_cache: Duration = Field(
        0.0,
        description="How long an answer is held, for volumes whose device appears late, "
        "after nothing waits for it any more.",
        json_schema_extra={"shown": "0"},
    )
    on_waiting: list[str] = Field(
        [],
        description="A command (argument vector, absolute path first) that is run when volumes start to wait "
        "for a person, and again when more do. "
        "VMCRYPTD_WAITING in its environment holds the names of all that wait, separated by spaces.",
        json_schema_extra={"shown": ["/usr/local/bin/mail-me"]},
    )

    @model_validator(mode="after")
    def _check(self) -> DaemonTable:
        if self.on_waiting and not self.on_waiting[0].startswith("/"):
            raise ValueError("on_waiting: expected the absolute path of a program first")
        return self


class VolumeTable(_Table):
    """One LUKS volume. The table's name is the name of the mapping, /dev/mapper/NAME."""

    device: Device = Field(
        description='The LUKS device: an absolute path (of a file, too), or "UUID=…", "PARTUUID=…", "LABEL=…".',
        json_schema_extra={"shown": "/dev/volgrp4/lvimap_hd0"},
    )
    uuid: Uuid | None = Field(
        None,
        description="The LUKS header's UUID. A header with another one is refused.",
        json_schema_extra={"shown": "3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"},
    )
    keys: list[Source] = Field(
        ["prompt"],
        min_length=1,
        description="Where the key comes from, in order, each tried for a bounded time: "
        "file:/path (owned by root, mode 0600), "
        "credential:name (systemd credentials), exec:/command (its standard output is the key), "
        "tpm2, fido2, pkcs11 (tokens in the LUKS2 header, as systemd-cryptenroll(1) makes them; cryptsetup needs its "
        "plugin for them), clevis (what `clevis luks bind` made, with a Tang server or the like), "
        "prompt (ask a person). "
        'A person is asked after all others have failed; without "prompt" nobody is asked and the volume has failed. '
        "The PIN of a token is asked for then, too, by a question of its own beside that for the passphrase, at most "
        "three times. While a person is asked, clevis, exec and tokens that are not connected are tried again, after a "
        "second at first and every minute in the end; clevis for five minutes even where nobody is asked, since the "
        "network may come up later. "
        "What comes first opens the volume.",
        json_schema_extra={"shown": ["tpm2", "file:/etc/vmcryptd/keys/imap", "prompt"]},
    )
    unlock: Literal["boot", "guest", "manual"] = Field(
        "boot",
        description="When it is opened: boot, guest (when a guest needs it), manual (only when told to).",
    )
    lock: Literal["shutdown", "guest", "boot", "manual"] = Field(
        "shutdown",
        description="When it is closed: shutdown, guest (when the last guest using it has stopped), "
        "boot (when everything else of the boot set is open: a keystore), manual (only when told to).",
    )
    content: Literal["guest", "lvm", "filesystem"] = Field(
        "guest",
        description="What is on it: guest (a guest's raw disk, the host never looks into it), "
        "lvm (a volume group of the host), filesystem (mounted by the host).",
    )
    mount: AbsolutePath | None = Field(
        None,
        description='Where to mount it; content = "filesystem" only. systemd does it, and checks the file system '
        "before, unless that is a keystore's. If fstab names this path, that entry is used: it needs the options "
        "noauto and x-systemd.before=vmcryptd-guests.service.",
        json_schema_extra={"shown": "/srv/vm"},
    )
    vg: VgName | None = Field(
        None,
        description="The volume group on it, so that /dev/VG/… is known to lie here while this is still locked; "
        'content = "lvm" only.',
        json_schema_extra={"shown": "inner"},
    )
    discard: bool = Field(
        False,
        description="Pass discards (trim) down to the device. Shows on the device which blocks are unused.",
    )
    header: AbsolutePath | None = Field(
        None,
        description="A detached LUKS header.",
        json_schema_extra={"shown": "/etc/vmcryptd/imap.header"},
    )
    after: list[str] = Field(
        [],
        description="Volumes to be opened before this one, beyond what is found out by itself.",
        json_schema_extra={"shown": ["keystore"]},
    )
    timeout: Duration = Field(
        30.0,
        description="How long the device may take to appear.",
        json_schema_extra={"shown": "30s"},
    )

    @model_validator(mode="after")
    def _check(self) -> VolumeTable:
        if self.mount is not None and self.content != "filesystem":
            raise ValueError(
                f'mount: only with content = "filesystem", here it is "{self.content}"'
            )
        if self.content == "filesystem" and self.mount is None:
            raise ValueError('mount: needed with content = "filesystem"')
        if self.vg is not None and self.content != "lvm":
            raise ValueError(f'vg: only with content = "lvm", here it is "{self.content}"')
        return self


class GuestTable(_Table):
    """What libvirt does not know about a guest. A guest needs no table to be found and started."""

    start: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Started at boot: auto (when `virsh autostart` is set), always, never.",
    )
    needs: list[str] = Field(
        [],
        description="Volumes it cannot run without, beyond what its domain XML says.",
        json_schema_extra={"shown": ["cr_mail_attachments"]},
    )
    after: list[str] = Field(
        [],
        description="Guests that start before this one and stop after it.",
        json_schema_extra={"shown": ["dns"]},
    )
    ready: Ready = Field(
        "running",
        description="When guests after this one may start: running, agent (the guest agent answers) "
        'or "tcp:HOST:PORT". One that is not ready after two minutes holds them up no longer, and the journal says so.',
    )
    stop_timeout: Duration = Field(
        180.0,
        description="How long it may take to stop when asked to.",
        json_schema_extra={"shown": "3min"},
    )
    on_stop_timeout: Literal["kill", "leave"] = Field(
        "kill",
        description="What then: kill it, or leave it running (then its volumes stay open and the failure is loud).",
    )


class ConfigFile(_Table):
    """One file, `vmcryptd.toml` or a drop-in."""

    daemon: DaemonTable = DaemonTable()
    volume: dict[str, VolumeTable] = {}
    guest: dict[str, GuestTable] = {}


TABLES: dict[str, type[_Table]] = {
    "daemon": DaemonTable,
    "volume": VolumeTable,
    "guest": GuestTable,
}


def parse(texts: Mapping[str, str]) -> Settings:
    """Turn file name → TOML text, in the order of precedence, into settings. Raises ConfigError."""
    tables: dict[str, dict[str, Any]] = {}
    for name, text in texts.items():
        try:
            tables[name] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{name}: not valid TOML: {error}") from None
    return parse_tables(tables)


def parse_tables(tables: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The same from file name → parsed TOML. Raises ConfigError."""
    origin: dict[tuple[str, str], str] = {}
    daemon: dict[str, Any] = {}
    volumes: dict[str, VolumeTable] = {}
    guests: dict[str, GuestTable] = {}
    for name, raw in tables.items():
        try:
            parsed = ConfigFile.model_validate(raw)
        except ValidationError as error:
            raise ConfigError("; ".join(_sentences(name, error))) from None
        for table, entries in (("volume", parsed.volume), ("guest", parsed.guest)):
            for entry in entries:
                first = origin.setdefault((table, entry), name)
                if first != name:
                    raise ConfigError(
                        f"{name}: [{table}.{entry}] is defined in {first} already; define it in one file only"
                    )
        for key in raw.get("daemon", {}):
            daemon[key] = getattr(parsed.daemon, key)
        for entry in parsed.volume:
            try:
                mapping_name(entry)
            except ValueError as error:
                raise ConfigError(f"{name}: [volume.{entry}]: {error}") from None
        for entry in parsed.guest:
            if not entry or "/" in entry or not entry.isprintable():
                raise ConfigError(
                    f'{name}: [guest.{entry}]: "{entry}" cannot be the name of a libvirt domain'
                )
        volumes |= parsed.volume
        guests |= parsed.guest
    settings = Settings(
        daemon=_daemon(DaemonTable.model_construct(**{**DaemonTable().model_dump(), **daemon})),
        volumes={name: _volume(name, table) for name, table in volumes.items()},
        guests={name: _guest(name, table) for name, table in guests.items()},
    )
    _check_references(settings, origin)
    return settings


def _daemon(table: DaemonTable) -> DaemonSpec:
    return DaemonSpec(
        libvirt_uri=table.libvirt_uri,
        console_prompt_s=table.console_prompt,
        shutdown_timeout_s=table.shutdown_timeout,
        kdf_memory=table.kdf_memory,
        key_cache_s=table.key_cache,
        on_waiting=tuple(table.on_waiting),
    )


def _volume(name: str, table: VolumeTable) -> VolumeSpec:
    sources = []
    for text in table.keys:
        kind, _, argument = text.partition(":")
        sources.append(KeySource(SourceKind(kind), argument))
    return VolumeSpec(
        name=name,
        device=table.device,
        uuid=table.uuid,
        keys=tuple(sources),
        unlock=Unlock(table.unlock),
        lock=Lock(table.lock),
        content=Content(table.content),
        mount=table.mount,
        vg=table.vg,
        discard=table.discard,
        header=table.header,
        after=tuple(table.after),
        timeout_s=table.timeout,
    )


def _guest(name: str, table: GuestTable) -> GuestSpec:
    return GuestSpec(
        name=name,
        start=Start(table.start),
        needs=tuple(table.needs),
        after=tuple(table.after),
        ready=table.ready,
        stop_timeout_s=table.stop_timeout,
        on_stop_timeout=OnStopTimeout(table.on_stop_timeout),
        configured=True,
    )


def _check_references(settings: Settings, origin: Mapping[tuple[str, str], str]) -> None:
    devices: dict[str, str] = {}
    mounts: dict[str, str] = {}
    groups: dict[str, str] = {}
    for name, volume in settings.volumes.items():
        where = f"{origin['volume', name]}: [volume.{name}]"
        _check_names(f"{where} after", volume.after, settings.volumes, "volume")
        # A tag and the link that it stands for are one device.
        for key, value, seen in (
            ("device", volume.device_path, devices),
            ("mount", volume.mount, mounts),
            ("vg", volume.vg, groups),
        ):
            if value is not None and seen.setdefault(value, name) != name:
                raise ConfigError(
                    f'{where} {key}: "{value}" is the {key} of [volume.{seen[value]}] already'
                )
    for name, guest in settings.guests.items():
        where = f"{origin['guest', name]}: [guest.{name}]"
        _check_names(f"{where} needs", guest.needs, settings.volumes, "volume")
        if name in guest.after:
            raise ConfigError(f'{where} after: "{name}" cannot be after itself')


def _check_names(where: str, names: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f'{where}: there is no {what} "{name}"{_hint(name, known)}')


def _sentences(file: str, error: ValidationError) -> Iterable[str]:
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        # A table is [daemon] or [volume.NAME]; what follows is the key in it, and an index into a list.
        size = 1 if path[:1] == ["daemon"] else 2
        if len(path) <= 1 and item["type"] == "extra_forbidden":
            unknown = f"{file}: [{path[0]}]: unknown table{_hint(path[0], TABLES)}"
            yield f"{unknown}; expected [daemon], [volume.NAME] or [guest.NAME]"
            continue
        table, rest = path[:size], path[size:]
        where = f"{file}: [{'.'.join(table)}]"
        if not rest:
            yield f"{where}: {_message(item)}"
            continue
        key = rest[0]
        if item["type"] == "extra_forbidden":
            model = TABLES[table[0]]
            yield f"{where} {key}: unknown key{_hint(key, model.model_fields)}"
        elif item["type"] == "missing":
            yield f"{where}: {key} is missing"
        else:
            yield f"{where} {'.'.join(rest)}: {_message(item)}"


def _message(item: Mapping[str, Any]) -> str:
    text = str(item["msg"]).removeprefix("Value error, ")
    match item["type"]:
        case "literal_error":
            options = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
            value = item["input"]
            expected = ", ".join(f'"{option}"' for option in options)
            return f'expected one of {expected}, not "{value}"{_hint(str(value), options)}'
        case "too_short":
            return "expected at least one"
        case "string_type" | "bool_type" | "list_type" | "dict_type" | "model_type":
            kinds = {
                "string_type": "a text",
                "bool_type": "true or false",
                "list_type": "a list",
                "dict_type": "a table",
            }
            return f"expected {kinds.get(item['type'], 'a table')}, not {item['input']!r}"
    return text
