# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: pydantic models for the TOML, and its translation into `model.Settings`.

The only module that knows pydantic. The commented default file and the option pages are generated from the
descriptions here (`packaging/docs.py`).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vmcryptd.config import syntax
from vmcryptd.core.durations import duration
from vmcryptd.core.errors import ConfigError, Mistake, nearest
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
from vmcryptd.core.text import escaped

_TAGS = ("UUID", "PARTUUID", "LABEL", "PARTLABEL")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# Names that other tools use.
_MEANT = {
    **dict.fromkeys(("disk", "path", "source", "partition", "blockdevice"), "device"),
    **dict.fromkeys(("passphrase", "password", "ask", "none"), "prompt"),
    **dict.fromkeys(("tang", "sss"), "clevis"),
    **dict.fromkeys(("depends", "requires", "depends_on"), "after"),
    **dict.fromkeys(("mountpoint", "mount_point", "where", "target"), "mount"),
    "autostart": "start",
    "trim": "discard",
    "volume_group": "vg",
    "yubikey": "fido2",
    "script": "exec",
}
LONGEST_PATH = 4096
LONGEST_TEXT = 3 * LONGEST_PATH
LONGEST_DELAY_S = 3600.0
_SHOWN = 60  # characters of a value that an error repeats


class _WrongKeyError(ValueError):
    """Two keys of a table contradict each other; the error points at `key`."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def _toml(value: object) -> str:
    """A value in TOML syntax, for an error."""
    return escaped(json.dumps(value, ensure_ascii=False, default=str), _SHOWN)


def _share(value: object) -> float:
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", value.strip())):
        share = float(match[1]) / 100
        if 0 < share <= 1:
            return share
    raise ValueError(f'expected a percentage from "1%" to "100%", not {_toml(value)}')


def _delay(value: object) -> float:
    seconds = duration(value)
    if seconds > LONGEST_DELAY_S:
        raise ValueError(f'expected at most "1h", not {_toml(value)}')
    return seconds


def mapping_name(value: str) -> str:
    """Return a valid mapping name unchanged; raises ValueError (device-mapper allows 127 characters)."""
    if value in ("control", ".", "..") or not re.fullmatch(r"[A-Za-z0-9._+-]{1,127}", value):
        raise ValueError(
            f'{_toml(value)} is not a valid mapping name: letters, digits and "._+-", at most 127, '
            'not "control"'
        )
    return value


def _device(value: str) -> str:
    if value.startswith("/"):
        return _absolute(value)
    tag, sep, rest = value.partition("=")
    if sep and tag in _TAGS:
        if set(rest) & set("\"'"):
            raise ValueError(f"no quotes inside {tag}=…; write {_toml(_without_quotes(value))}")
        if rest not in ("", ".", "..") and "/" not in rest:
            # udev's links are in the case in which libblkid prints it, which for these is lower.
            if _UUID.fullmatch(rest.lower()):
                return f"{tag}={rest.lower()}"
            if tag != "UUID":
                return value
            raise ValueError(f"expected the whole UUID of a LUKS header, not {_toml(rest)}")
    hint = ""
    if _UUID.fullmatch(value.lower()):
        hint = f'; write "UUID={value.lower()}"'
    elif sep and tag not in _TAGS and (upper := _without_quotes(tag).upper()) in _TAGS:
        hint = f"; write {_toml(f'{upper}={_without_quotes(rest)}')}"
    elif re.fullmatch(r"[A-Za-z0-9._+-]+(/[A-Za-z0-9._+-]+)*", value):
        hint = f' (did you mean "/dev/{value.removeprefix("dev/")}"?)'
    expected = ", ".join(f"{tag}=…" for tag in _TAGS)
    raise ValueError(f"expected an absolute path or one of {expected}, not {_toml(value)}{hint}")


def _without_quotes(text: str) -> str:
    return re.sub("[\"']", "", text).strip()


def _absolute(value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/") or not value.isprintable():
        raise ValueError(f"expected an absolute path, not {_toml(value)}")
    return "/" + "/".join(part for part in value.split("/") if part)


def _mount(value: str) -> str:
    path = _absolute(value)
    if path == "/":
        raise ValueError("a volume cannot be mounted over the host's own root")
    return path


def _uuid(value: str) -> str:
    text = value.lower()
    if not _UUID.fullmatch(text):
        bare = _without_quotes(text.removeprefix("uuid="))
        hint = f"; write {_toml(bare)}" if _UUID.fullmatch(bare) else ""
        raise ValueError(f"expected a UUID such as 0b7c8a1e-…, not {_toml(value)}{hint}")
    return text


def _vg_name(value: str) -> str:
    """A name that lvm(8) allows."""
    if value in (".", "..") or not re.fullmatch(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}", value):
        raise ValueError(f"{_toml(value)} is not a valid volume group name")
    return value


def _key_source(value: str) -> str:
    """Errors do not repeat the value: it may be a passphrase written here by mistake, or a fetcher's token."""
    kind, colon, argument = value.partition(":")
    if kind not in tuple(SourceKind):
        known = "prompt, tpm2, fido2, pkcs11, clevis, file:/path, credential:name, exec:/command"
        hint = ' (did you mean "file:/…"?)' if kind.startswith("/") else _hint(kind, SourceKind)
        raise ValueError(f"no such key source: expected one of {known}{hint}")
    if kind not in (SourceKind.FILE, SourceKind.CREDENTIAL, SourceKind.EXEC):
        if colon:
            raise ValueError(f'"{kind}" takes no argument')
    elif not argument:
        raise ValueError(f'"{kind}:" needs an argument')
    elif kind == SourceKind.FILE:
        return f"file:{_absolute(argument)}"
    elif kind == SourceKind.CREDENTIAL:
        if "/" in argument or argument in (".", "..") or not argument.isprintable():
            raise ValueError(f"{_toml(argument)} is not a valid credential name")
    elif kind == SourceKind.EXEC:
        try:
            words = shlex.split(argument)
        except ValueError as error:
            raise ValueError(f'"exec:…": {str(error)[:1].lower()}{str(error)[1:]}') from None
        if not words or not words[0].startswith("/"):
            raise ValueError('"exec:…": expected the absolute path of a program')
    return value


def _uri(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9+]*://\S*", value):
        raise ValueError(f'expected a URI such as "qemu:///system", not {_toml(value)}')
    return value


def _ready(value: str) -> str:
    if value in ("running", "agent"):
        return value
    match = re.fullmatch(r"tcp:(\[[0-9a-fA-F:]+\]|[^:\s]+):([0-9]{1,5})", value)
    if match and 0 < int(match[2]) < 65536:
        return value
    raise ValueError(f'expected "running", "agent" or "tcp:HOST:PORT", not {_toml(value)}')


def _hint(word: str, known: Iterable[str]) -> str:
    close = _meant(word, known)
    return f' (did you mean "{close}"?)' if close else ""


def _meant(word: str, known: Iterable[str]) -> str:
    known = list(known)
    word = word.lower().replace("-", "_") if word not in known else word
    if alias := _MEANT.get(word):
        return alias if alias in known else ""
    return nearest(word, known)


def _before(function: Any) -> Any:
    return BeforeValidator(lambda value: function(value) if isinstance(value, str) else value)


Duration = Annotated[float, BeforeValidator(duration)]
Delay = Annotated[float, BeforeValidator(_delay)]
Share = Annotated[float, BeforeValidator(_share)]
Device = Annotated[str, _before(_device)]
AbsolutePath = Annotated[str, _before(_absolute)]
MountPoint = Annotated[str, _before(_mount)]
Uri = Annotated[str, _before(_uri)]
Uuid = Annotated[str, _before(_uuid)]
Source = Annotated[str, _before(_key_source)]
Ready = Annotated[str, _before(_ready)]
VgName = Annotated[str, _before(_vg_name)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DaemonTable(_Table):
    """How vmcryptd itself behaves."""

    libvirt_uri: Uri = Field(
        "qemu:///system",
        description="The libvirt connection whose guests are started and stopped. A change takes effect when "
        "vmcryptd.service is restarted, which stops and closes nothing; a reload is not enough. Run `vmcryptctl check` "
        "before: a daemon does not start with a mistake in the configuration.",
    )
    console_prompt: Duration = Field(
        60.0,
        description="How long boot keeps the console for the passphrase question. Boot always goes on afterwards, and "
        "the question can still be answered in every other way. Until then only root can log in. "
        '"0" = do not keep the console at all.',
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
        description="How long an answer is kept in memory after the last volume that waited for it has been opened, "
        "for volumes whose device appears late.",
        json_schema_extra={"shown": "0"},
    )
    on_waiting: list[str] = Field(
        [],
        description="A command (argument vector, absolute path first) that is run when volumes start to wait "
        "for a person, and again when more do. "
        "VMCRYPTD_WAITING in its environment holds the names of all that wait, separated by spaces.",
        json_schema_extra={"shown": ["/usr/local/bin/mail-me"]},
    )
    on_failed: list[str] = Field(
        [],
        description="A command (argument vector, absolute path first) that is run when the host becomes degraded, "
        "and again when something else fails then. VMCRYPTD_FAILED in its environment holds the names of the volumes "
        "and guests that have failed, separated by spaces; VMCRYPTD_REASONS why, a line for each.",
        json_schema_extra={"shown": ["/usr/local/bin/mail-me"]},
    )
    start_delay: Delay = Field(
        0.0,
        description="How long to wait after the start of a guest before the next one is started, beyond their order "
        "and readiness: many guests that boot at once make each other slow. At most an hour.",
        json_schema_extra={"shown": "0"},
    )

    @model_validator(mode="after")
    def _check(self) -> DaemonTable:
        for key, argv in (("on_waiting", self.on_waiting), ("on_failed", self.on_failed)):
            if argv and not argv[0].startswith("/"):
                raise _WrongKeyError(key, "expected the absolute path of a program first")
        return self


class VolumeTable(_Table):
    """One LUKS volume. The table's name is the name of the mapping, /dev/mapper/NAME."""

    device: Device = Field(
        description='The LUKS device: an absolute path (of a file, too), or "UUID=…", "PARTUUID=…", "LABEL=…". '
        "If several devices bear that tag (a copy, a snapshot), the volume is not opened, and the error names them. "
        "Kernel names such as /dev/sdb can be another disk after the next boot. An open volume keeps its "
        "disk, even if its path leads to another one by then.",
        json_schema_extra={"shown": "/dev/volgrp4/lvimap_hd0"},
    )
    uuid: Uuid | None = Field(
        None,
        description="The LUKS header's UUID. A header with another one is refused; without it, a header that was last "
        "seen under another volume's name.",
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
        "The first key that fits opens the volume. When all other sources have failed, a person is asked; without "
        '"prompt" the volume fails. The PIN of a token is asked for at the same time, in a separate question, at most '
        "three times. While a person is asked, clevis, exec and tokens that are not connected are tried again, first "
        "after a second, in the end every minute. Without a person clevis is tried for five minutes, since the network "
        "may come up later.",
        json_schema_extra={"shown": ["tpm2", "file:/etc/vmcryptd/keys/imap", "prompt"]},
    )
    unlock: Literal["boot", "guest", "manual"] = Field(
        "boot",
        description="When it is opened: boot, guest (when a guest needs it), manual (only by command).",
    )
    lock: Literal["shutdown", "guest", "boot", "manual"] = Field(
        "shutdown",
        description="When it is closed: shutdown, guest (when the last guest using it has stopped), "
        "boot (when everything else of the boot set is open: a keystore), manual (only by command).",
    )
    content: Literal["guest", "lvm", "filesystem"] = Field(
        "guest",
        description="The content of the volume: guest (a guest's raw disk, the host never looks into it), "
        "lvm (a volume group of the host), filesystem (mounted by the host).",
    )
    mount: MountPoint | None = Field(
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
        description="Volumes to be opened before this one, beyond those that vmcryptd finds by itself.",
        json_schema_extra={"shown": ["keystore"]},
    )
    timeout: Duration = Field(
        30.0,
        description="How long the device, and a detached header, may take to appear.",
        json_schema_extra={"shown": "30s"},
    )

    @model_validator(mode="after")
    def _check(self) -> VolumeTable:
        if self.mount is not None and self.content != "filesystem":
            text = f'only with content = "filesystem", here it is "{self.content}"'
            raise _WrongKeyError("mount", text)
        if self.content == "filesystem" and self.mount is None:
            raise _WrongKeyError("content", '"filesystem" needs the key mount, too')
        if self.vg is not None and self.content != "lvm":
            text = f'only with content = "lvm", here it is "{self.content}"'
            raise _WrongKeyError("vg", text)
        return self


class GuestTable(_Table):
    """Settings that libvirt does not have. A guest without a table is found and started, too."""

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
        description="How long it may take to shut down.",
        json_schema_extra={"shown": "3min"},
    )
    on_stop_timeout: Literal["kill", "leave"] = Field(
        "kill",
        description="After stop_timeout: kill it, or leave it running (its volumes stay open, and shutdown reports "
        "the failure).",
    )


TABLES: dict[str, type[_Table]] = {
    "daemon": DaemonTable,
    "volume": VolumeTable,
    "guest": GuestTable,
}
_LISTS = {
    key
    for table in TABLES.values()
    for key, field in table.model_fields.items()
    if isinstance(field.default, list)
}
_EXPECTED_TABLES = "expected [daemon], [volume.NAME] or [guest.NAME]"


def parse(texts: Mapping[str, str]) -> Settings:
    """Turn file name → TOML text, in the order of precedence, into settings. Raises ConfigError with all mistakes."""
    reading = _Reading()
    for name, text in texts.items():
        reading.read(name, syntax.parse(name, text, _LISTS))
    return reading.settings()


def parse_tables(tables: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The same for file name → parsed TOML. Raises ConfigError."""
    reading = _Reading()
    for name, raw in tables.items():
        reading.read(name, syntax.Document(raw, {}, (), whole=True))
    return reading.settings()


_T = TypeVar("_T", bound=_Table)


class _Reading:
    """Reads all files and collects settings, their lines, and mistakes."""

    def __init__(self) -> None:
        self._mistakes: list[tuple[int, int, Mistake]] = []  # file's number, line
        self._files = 0
        self._name, self._document = "", syntax.Document({}, {}, (), whole=True)
        self._all_known = True  # False if a syntax error may hide names
        self._daemon: dict[str, Any] = {}
        self._volumes: dict[str, VolumeTable] = {}
        self._guests: dict[str, GuestTable] = {}
        self._documents: dict[tuple[str, str], tuple[int, str, syntax.Document]] = {}

    def read(self, name: str, document: syntax.Document) -> None:
        self._files += 1
        self._name, self._document = name, document
        self._mistakes += [(self._files, line, mistake) for line, mistake in document.mistakes]
        self._all_known &= document.whole
        for table, value in document.tables.items():
            if table not in TABLES:
                self._unknown_table(table, value)
            elif not isinstance(value, dict):
                self._no_table(table, value)
            elif table == "daemon":
                if (parsed := self._parsed(DaemonTable, ("daemon",), value)) is not None:
                    self._daemon |= {key: getattr(parsed, key) for key in value}
            else:
                for entry, raw in value.items():
                    self._entry(table, entry, raw)

    def _entry(self, table: str, name: str, raw: object) -> None:
        path = (table, name)
        first = self._documents.setdefault(path, (self._files, self._name, self._document))
        if first[0] != self._files:
            text = f"is defined in {_place(first[1], first[2], path)} already; define it in one file only"
            self._mistake(path, text, about=" ")
            return
        try:
            _check_name(table, name)
        except ValueError as error:
            self._mistake(path, str(error))
            return
        model = TABLES[table]
        if not isinstance(raw, dict):
            if name in model.model_fields:
                text = f"this key belongs in a table with the name of a {table}: [{table}.NAME]"
            else:
                text = f"expected a table, not {_toml(raw)}"
            self._mistake(path, text)
            return
        if parts := self._dotted(model, raw):
            text = f'a name with a dot stands in quotes: [{table}."{".".join((name, *parts))}"]'
            self._mistake(path, text)
            return
        if table == "volume":
            self._keep(self._volumes, name, self._parsed(VolumeTable, path, raw))
        else:
            self._keep(self._guests, name, self._parsed(GuestTable, path, raw))

    @staticmethod
    def _keep(tables: dict[str, _T], name: str, parsed: _T | None) -> None:
        if parsed is not None:
            tables[name] = parsed

    @staticmethod
    def _dotted(model: type[_Table], raw: Mapping[str, Any]) -> list[str]:
        """The rest of a name such as [volume.a.b], which TOML reads as a table in a table."""
        parts: list[str] = []
        while len(raw) == 1:
            [(key, inner)] = raw.items()
            if key in model.model_fields or not isinstance(inner, dict):
                break
            parts.append(key)
            raw = inner
        return parts

    def _unknown_table(self, name: str, value: object) -> None:
        if not isinstance(value, dict):
            owners = [table for table, model in TABLES.items() if name in model.model_fields]
            where = " or ".join(_table_name(table) for table in owners)
            text = (
                f"stands in no table; it belongs in {where}"
                if owners
                else "unknown key, in no table"
            )
            self._mistake((name,), text, about=f" {name}: ")
            return
        keys = set(value)
        for table in ("volume", "guest"):
            if keys and keys <= set(TABLES[table].model_fields):
                self._mistake((name,), f'unknown table (did you mean "{table}.{name}"?)')
                return
        self._mistake((name,), f"unknown table{_hint(name, TABLES)}; {_EXPECTED_TABLES}")

    def _no_table(self, name: str, value: object) -> None:
        if isinstance(value, list):
            text = f"expected one table, not a list: write {_table_name(name)} with single brackets"
            self._mistake((name,), text)
        else:
            self._mistake((name,), f"expected a table, not {_toml(value)}")

    def _parsed(self, model: type[_T], path: syntax.Path, raw: Mapping[str, Any]) -> _T | None:
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            self._explain(model, path, raw, error)
            return None

    def _explain(
        self, model: type[_Table], path: syntax.Path, raw: Mapping[str, Any], error: ValidationError
    ) -> None:
        items = error.errors(include_url=False)
        unknown = [str(item["loc"][0]) for item in items if item["type"] == "extra_forbidden"]
        # A misspelt key is one mistake, not two.
        meant = {
            _meant(key, [one for one in model.model_fields if one not in raw]) for key in unknown
        }
        for item in items:
            key, *inside = item["loc"] or ("",)
            if item["type"] == "extra_forbidden":
                text = f"unknown key{self._home(model, str(key), raw)}"
                self._mistake((*path, str(key)), text, about=f" {key}: ")
            elif item["type"] == "missing":
                if key not in meant:
                    self._mistake(path, f"{key} is missing")
            elif not key:
                wrong = item["ctx"]["error"]
                self._mistake((*path, wrong.key), str(wrong), about=f" {wrong.key}: ")
            else:
                where = f"{key}, entry {int(inside[0]) + 1}" if inside else key
                hint = _list_form(str(key), item)
                self._mistake((*path, key, *inside), _message(item), about=f" {where}: ", hint=hint)

    @staticmethod
    def _home(model: type[_Table], key: str, raw: Mapping[str, Any]) -> str:
        """The table to which a misplaced key belongs, else the key that was probably meant."""
        for table, other in TABLES.items():
            if other is not model and key.replace("-", "_") in other.model_fields:
                return f"; it belongs in {_table_name(table)}"
        return _hint(
            key, [one for one in model.model_fields if one not in raw] or model.model_fields
        )

    def _mistake(self, path: syntax.Path, text: str, *, about: str = ": ", hint: str = "") -> None:
        """Note a mistake. `about` names the key, between the table and the text."""
        line = self._document.line(path)
        if any(line == number > 0 for number, _ in self._document.mistakes):
            return  # the line was corrected by a guess; its own mistake is reported
        known = [str(part) for part in (path[:1] if path[0] == "daemon" else path[:2])]
        table = "" if about.startswith(f" {path[0]}:") else f" [{escaped('.'.join(known))}]"
        place = _place(self._name, self._document, path)
        # A key in quotes may hold any character.
        sentence = escaped(f"{place}:{table}{about}{text}", LONGEST_TEXT)
        self._mistakes.append((self._files, line, Mistake(sentence, hint=hint)))

    def settings(self) -> Settings:
        if self._all_known:
            self._check_references()
        if self._mistakes:
            self._mistakes.sort(key=lambda one: one[:2])
            raise ConfigError.of([mistake for _, _, mistake in self._mistakes])
        defaults = DaemonTable().model_dump()
        return Settings(
            daemon=_daemon(DaemonTable.model_construct(**{**defaults, **self._daemon})),
            volumes={
                name: _volume(name, table, self._origin("volume", name))
                for name, table in self._volumes.items()
            },
            guests={
                name: _guest(name, table, self._origin("guest", name))
                for name, table in self._guests.items()
            },
        )

    def _origin(self, table: str, name: str) -> str:
        _, file, document = self._documents[table, name]
        return _place(file, document, (table, name))

    def _names(self, table: str) -> list[str]:
        return [name for kind, name in self._documents if kind == table]

    def _check_references(self) -> None:
        """Check the names by which tables refer to each other, in all files."""
        seen: dict[tuple[str, str], str] = {}
        for name, volume in self._volumes.items():
            path = ("volume", name)
            self._files, self._name, self._document = self._documents[path]
            self._check_names((*path, "after"), volume.after)
            # A tag and its link are one device.
            device = _volume(name, volume, "").device_path
            if device == f"/dev/mapper/{name}":
                text = "this is the mapping that the volume gets; name the device beneath it"
                self._mistake((*path, "device"), text, about=" device: ")
                continue
            for key, value in (
                ("device", device),
                ("mount", volume.mount),
                ("vg", volume.vg),
                ("header", volume.header),
            ):
                if value is None:
                    continue
                other = seen.setdefault((key, value), name)
                if other != name:
                    text = f"{_toml(value)} is the {key} of [volume.{other}] already"
                    self._mistake((*path, key), text, about=f" {key}: ")
        for name, guest in self._guests.items():
            path = ("guest", name)
            self._files, self._name, self._document = self._documents[path]
            self._check_names((*path, "needs"), guest.needs)
            if name in guest.after:
                text = f"{_toml(name)} cannot be after itself"
                self._mistake((*path, "after"), text, about=" after: ")

    def _check_names(self, path: syntax.Path, names: Iterable[str]) -> None:
        known = self._names("volume")
        for index, name in enumerate(names):
            if name in known:
                continue
            if name in self._names("guest"):
                text = f"{_toml(name)} is a guest; expected the name of a volume"
            else:
                text = f"there is no volume {_toml(name)}{_hint(name.removeprefix('/dev/mapper/'), known)}"
            self._mistake((*path, index), text, about=f" {path[-1]}: ")


def _check_name(table: str, name: str) -> None:
    """Raises ValueError."""
    if table == "volume":
        mapping_name(name)
    elif not name or "/" in name or not name.isprintable():
        raise ValueError(f"{_toml(name)} cannot be the name of a libvirt domain")


def _place(file: str, document: syntax.Document, path: syntax.Path) -> str:
    line = document.line(path)
    return escaped(f"{file}:{line}" if line else file, LONGEST_PATH)


def _table_name(table: str) -> str:
    return f"[{table}]" if table == "daemon" else f"[{table}.NAME]"


def _list_form(key: str, item: Mapping[str, Any]) -> str:
    """How to write the text as a list."""
    if item["type"] != "list_type" or not isinstance(item["input"], str):
        return ""
    words = re.split(r"[,\s]+" if key != "keys" else r"\s*,\s*", item["input"].strip())
    return f"{key} = {json.dumps(words, ensure_ascii=False)}"


def _message(item: Mapping[str, Any]) -> str:
    value = item["input"]
    match item["type"]:
        case "value_error":
            return str(item["ctx"]["error"])
        case "literal_error":
            options = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
            expected = ", ".join(f'"{option}"' for option in options)
            return f"expected one of {expected}, not {_toml(value)}{_hint(str(value), options)}"
        case "too_short":
            return "expected at least one"
        case "list_type" if isinstance(value, str):  # not for the journal: see _key_source
            return 'expected a list such as ["one", "two"], not a text'
        case "list_type":
            return f"expected a list, not {_toml(value)}"
        case "string_type":
            return f"expected a text, not {_toml(value)}"
        case "bool_type":
            return f"expected true or false, not {_toml(value)}"
    return str(item["msg"])


def _daemon(table: DaemonTable) -> DaemonSpec:
    return DaemonSpec(
        libvirt_uri=table.libvirt_uri,
        console_prompt_s=table.console_prompt,
        shutdown_timeout_s=table.shutdown_timeout,
        kdf_memory=table.kdf_memory,
        key_cache_s=table.key_cache,
        on_waiting=tuple(table.on_waiting),
        on_failed=tuple(table.on_failed),
        start_delay_s=table.start_delay,
    )


def _volume(name: str, table: VolumeTable, origin: str) -> VolumeSpec:
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
        origin=origin,
    )


def _guest(name: str, table: GuestTable, origin: str) -> GuestSpec:
    return GuestSpec(
        name=name,
        start=Start(table.start),
        needs=tuple(table.needs),
        after=tuple(table.after),
        ready=table.ready,
        stop_timeout_s=table.stop_timeout,
        on_stop_timeout=OnStopTimeout(table.on_stop_timeout),
        configured=True,
        origin=origin,
    )
