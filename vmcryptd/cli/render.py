# SPDX-License-Identifier: LGPL-2.1-or-later
"""Renders the daemon's state as lines for a serial console and as JSON. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from vmcryptd.cli.columns import padded, shortened, width, wrapped
from vmcryptd.core.wording import few

Properties = Mapping[str, Any]

WIDTH = 80

_GREEN, _YELLOW, _RED = "32", "33", "31"
_COLOURS = {
    **dict.fromkeys(("ready", "unlocked", "running"), _GREEN),
    **dict.fromkeys(
        ("waiting", "unlocking", "locking", "starting", "stopping", "suspended", "paused"), _YELLOW
    ),
    **dict.fromkeys(("degraded", "failed", "missing", "crashed", "undefined"), _RED),
}


_FAILED = {"failed", "crashed", "undefined"}
_UNDER_WAY = {"waiting", "unlocking", "locking", "starting", "stopping"}
# A shorter path of a device is useless.
_SHORTEST = 12

_PRIORITIES = {0: "ignored", 1: "normal", 2: "preferred"}


# --- JSON: the members are stable; new ones may be added ---


def volume_members(values: Properties) -> dict[str, Any]:
    return {
        "name": values["Name"],
        "state": values["State"],
        "device": values["Device"],
        "uuid": values["Uuid"],
        "key_source": values["KeySource"],
        "needed_by": list(values["NeededBy"]),
        "header_backup_due": bool(values.get("HeaderBackupDue")),
        "rotation": str(values.get("Rotation", "")),
        "error": values["LastError"],
    }


def guest_members(values: Properties) -> dict[str, Any]:
    return {
        "name": values["Name"],
        "state": values["State"],
        "needs": list(values["Needs"]),
        "starts_at_boot": values["StartsAtBoot"],
        "error": values["LastError"],
    }


# The daemon runs the configuration that it read last.
CHANGED_ON_DISK = "the configuration has changed on disk -- run: vmcryptctl reload"


def status_members(
    host: Properties,
    volumes: Iterable[Properties],
    guests: Iterable[Properties],
    jobs: Iterable[Properties] = (),
) -> dict[str, Any]:
    jobs = list(jobs)
    return {
        "state": host["State"],
        "error": str(host.get("LastError", "")),
        "waiting": list(host["Waiting"]),
        "off": list(host.get("Off", ())),
        "config_changed": bool(host.get("ConfigChanged")),
        "held_keys": [
            {"source": key["source"], "volumes": key["volumes"].split(), "until": key["until"]}
            for key in host.get("HeldKeys", ())
        ],
        "volumes": [
            {
                **volume_members(values),
                "rotation_progress": progress(f"rotate:{values['Name']}", jobs),
            }
            for values in volumes
        ],
        "guests": [guest_members(values) for values in guests],
    }


def snake(values: Properties) -> dict[str, Any]:
    """Changed properties with their JSON names."""
    names = {re.sub(r"(?<!^)(?=[A-Z])", "_", key).lower(): value for key, value in values.items()}
    if "last_error" in names:
        names["error"] = names.pop("last_error")
    return names


# --- for people ---


def has_failed(values: Properties) -> bool:
    """Whether a volume or guest has failed. One that is being brought up may still have an old error."""
    state = str(values["State"])
    return state in _FAILED or (bool(values["LastError"]) and state not in _UNDER_WAY)


def by_urgency(many: Iterable[Properties]) -> list[Properties]:
    """Volumes or guests: the failed ones, then waiting, then in progress, then the rest."""

    def rank(values: Properties) -> int:
        state = str(values["State"])
        if has_failed(values):
            return 0
        if state == "waiting" or (state == "off" and values.get("StartsAtBoot")):
            return 1
        return 2 if state in _UNDER_WAY else 3

    return sorted(many, key=rank)


class HasObjects(Protocol):
    """The daemon's objects, as mirrored by a client."""

    host: dict[str, Any]
    volumes: dict[str, dict[str, Any]]
    guests: dict[str, dict[str, Any]]


class Row(NamedTuple):
    """One line of a table."""

    cells: Sequence[Any]
    names: Sequence[str]  # in the last column
    notes: Sequence[str]  # on their own lines below; empty ones are left out


class Page:
    """Lines of at most `width` columns (0: unlimited), with or without colour. Names are never cut."""

    def __init__(self, *, width: int = 0, colour: bool = False) -> None:
        self._width = width
        self._colour = colour

    def state(self, word: str, text: str | None = None) -> str:
        """The text in the colour of the state."""
        shown = printable(word if text is None else text)
        code = _COLOURS.get(word)
        return f"\033[{code}m{shown}\033[0m" if self._colour and code else shown

    def status(
        self,
        host: Properties,
        volumes: Sequence[Properties],
        guests: Sequence[Properties],
        jobs: Iterable[Properties] = (),
    ) -> list[str]:
        """The output of `vmcryptctl status`: one line with the state and what to do, then the tables."""
        word = str(host["State"])
        sentence = overall(host, volumes, guests)
        lines = self._wrapped(f"{word}: {sentence}")
        lines[0] = self.state(word) + lines[0][len(word) :]
        if error := host.get("LastError"):
            lines += self._wrapped(f"    {error}", 4)
        if (off := host.get("Off", ())) and word in ("ready", "degraded"):
            lines += self._wrapped(f"    off: {', '.join(off)}", 4)
        for key in host.get("HeldKeys", ()):
            lines += self._wrapped(held(key), 4)
        if host.get("ConfigChanged"):
            lines += self._wrapped(CHANGED_ON_DISK, 4)
        return [*lines, *self.volumes(volumes, jobs), *self.guests(guests)]

    def volumes(self, volumes: Sequence[Properties], jobs: Iterable[Properties] = ()) -> list[str]:
        jobs = list(jobs)
        rows = [
            Row(
                (values["Name"], values["State"], values["Device"], values["KeySource"] or "-"),
                list(values["NeededBy"]),
                [values["LastError"], _rotation_note(values, jobs) or _backup_note(values)],
            )
            for values in by_urgency(volumes)
        ]
        heads = ("VOLUME", "STATE", "DEVICE", "KEY", "NEEDED BY")
        return self._table(heads, rows, shorten=2, drop=(2, 3))

    def guests(self, guests: Sequence[Properties]) -> list[str]:
        rows = [
            Row(
                (values["Name"], values["State"], "at boot" if values["StartsAtBoot"] else "-"),
                list(values["Needs"]),
                [values["LastError"]],
            )
            for values in by_urgency(guests)
        ]
        return self._table(("GUEST", "STATE", "STARTS", "NEEDS"), rows, drop=(2,))

    def keys(self, keys: Mapping[str, Any]) -> list[str]:
        """The key slots of one volume."""
        rows = [
            Row(
                (
                    slot["slot"],
                    slot["opened_by"],
                    _cost(slot),
                    _PRIORITIES.get(slot["priority"], slot["priority"]),
                ),
                [
                    f"{one['token']} {one['kind']}"
                    for one in keys["tokens"]
                    if slot["slot"] in one["slots"]
                ],
                [f"fitted last time by {source}" for source in slot.get("fitted_by", ())],
            )
            for slot in keys["slots"]
        ]
        heads = ("SLOT", "OPENED BY", "ONE TRY COSTS", "PRIORITY", "TOKENS")
        lines = self._table(heads, rows, drop=(3,))[1:] or ["it has no key slot"]
        sources = f"key sources of {keys['volume']}: {', '.join(keys['sources'])}"
        lines += ["", *self._wrapped(sources, 4)]
        if keys["is_half_rotated"]:
            command = f"vmcryptctl key rotate {keys['volume']}"
            half = "its volume key is half rotated: a key has to open a slot of the old and one of the new"
            lines += self._wrapped(f"{half}; it is finished by: {command}", 4)
        elif since := keys["header_backup_due_since"]:
            command = f"vmcryptctl header backup {keys['volume']} FILE"
            lines += self._wrapped(f"a new backup of its header is due since {since}: {command}", 4)
        return lines

    def plan(self, plan: Mapping[str, Any]) -> list[str]:
        steps = plan["steps"]
        if not steps:
            return [f"{plan['goal']}: nothing is to be done"]
        number = {
            f"{step['action']}:{step['object']}": place for place, step in enumerate(steps, 1)
        }
        lines = [f"{plan['goal']}: {_count(len(steps), 'step')}"]
        what = [printable(f"{step['action']} {step['object']}") for step in steps]
        wide = min(max(map(width, what)), 40)
        for place, step in enumerate(steps, 1):
            after = sorted({number[other] for other in step["after"] if other in number})
            behind = f" (after {', '.join(map(str, after))})" if after else ""
            head = f"{place:>3}. {padded(what[place - 1], wide)}  "
            reason = f"{step['reason']}{behind}"
            if self._width and width(head) > self._width // 2:
                lines += [head.rstrip(), *self._wrapped(f"       {reason}", 7)]
            else:
                lines += self._wrapped(f"{head}{reason}", width(head))
        return lines

    def findings(self, findings: Sequence[Mapping[str, str]]) -> list[str]:
        lines = []
        for finding in findings:
            head = f"{finding['severity']}: "
            place = f"{finding['object']}: " if finding["object"] else ""
            colour = "failed" if finding["severity"] == "error" else "waiting"
            first = self._wrapped(f"{head}{place}{finding['text']}", 4)
            first[0] = self.state(colour, head.rstrip()) + first[0][len(head) - 1 :]
            lines += [*first, *self._wrapped(f"    {finding['advice']}", 4)]
        return lines

    def _table(
        self,
        heads: Sequence[str],
        rows: Sequence[Row],
        *,
        shorten: int | None = None,
        drop: Sequence[int] = (),
    ) -> list[str]:
        """If the table is too wide, `shorten` is shortened, then `drop` left out, then the last column put below."""
        if not rows:
            return []
        cells = [[printable(str(cell)) for cell in row.cells] for row in rows]
        names = [[printable(name) for name in row.names] for row in rows]
        widths = [max(map(width, column)) for column in zip(heads[:-1], *cells, strict=True)]
        if self._width:  # a name of half a line gets its own line
            firsts = [width(heads[0]), *(width(texts[0]) for texts in cells)]
            widths[0] = max(one for one in firsts if one <= max(self._width // 2, firsts[0]))
        last = self._room_of_last(heads[-1], names)

        def missing() -> int:
            return sum(widths) + 2 * len(widths) + last - self._width if self._width else 0

        if shorten is not None and missing() > 0:
            widths[shorten] = max(widths[shorten] - missing(), min(widths[shorten], _SHORTEST))
        shown = list(range(len(widths)))
        for column in drop:
            if missing() > 0:
                at = shown.index(column)
                del shown[at], widths[at]
        is_below = missing() > 0
        indent = sum(widths) + 2 * len(widths)
        head = self._row([heads[column] for column in shown], widths)
        lines = ["", head if is_below else head + heads[-1]]
        for row, texts, those in zip(rows, cells, names, strict=True):
            if width(texts[0]) > widths[0]:
                lines.append(texts[0])
                texts[0] = ""
            line = self._row([texts[column] for column in shown], widths, state=str(row.cells[1]))
            if is_below:
                lines.append(line)
                if those:
                    lines += self._wrapped(f"    {heads[-1].lower()}: {', '.join(those)}", 4)
            else:
                listed = self._wrapped(" " * indent + (", ".join(those) or "-"), indent)
                lines += [line + listed[0][indent:], *listed[1:]]
            for text in filter(None, row.notes):
                lines += self._wrapped(f"    {text}", 4)
        return [line.rstrip() for line in lines]

    def _room_of_last(self, head: str, names: Sequence[Sequence[str]]) -> int:
        """The width of the last column: one line up to a quarter of the page, but each name whole."""
        whole = max((width(", ".join(those)) for those in names), default=0)
        longest = max((width(name) + 1 for those in names for name in those), default=0)
        return max(width(head), min(whole, self._width // 4), min(longest, whole))

    def _row(self, texts: Sequence[str], widths: Sequence[int], state: str = "") -> str:
        line = ""
        for place, (text, columns) in enumerate(zip(texts, widths, strict=True)):
            cell = shortened(text, columns)
            padding = " " * (columns - width(cell) + 2)
            line += (self.state(state, cell) if state and place == 1 else cell) + padding
        return line

    def _wrapped(self, text: str, indent: int = 0) -> list[str]:
        return wrapped(printable(text), self._width, indent)


def overall(host: Properties, volumes: Sequence[Properties], guests: Sequence[Properties]) -> str:
    """The meaning of the host's state, and what to do next."""
    waiting = list(host["Waiting"])
    if waiting:
        wait = "waits" if len(waiting) == 1 else "wait"
        return f"{_count(len(waiting), 'volume')} {wait} for a passphrase -- run: vmcryptctl unlock"
    if not volumes and not guests:
        return "no volume is configured -- see vmcryptd.toml(5)"
    match host["State"]:
        case "ready":
            but = ", except those that are off" if host.get("Off") else ""
            return f"the volumes of the boot set are open and their guests run{but}"
        case "locked":
            return "boot was not asked for, or everything was closed again -- run: vmcryptctl boot"
        case "unlocking":
            done, count = opening(volumes)
            far = f"{done} of {count} open, " if count > 1 else ""
            return (
                f"{far}volumes are being opened and guests started -- follow it: vmcryptctl monitor"
            )
        case "stopping":
            return "guests are being stopped and volumes closed -- follow it: vmcryptctl monitor"
        case "degraded":
            failed = [str(one["Name"]) for one in (*volumes, *guests) if has_failed(one)]
            what = f" (failed: {few(failed)})" if failed else ""
            return f"not all of the boot set is up{what} -- put it right, then run: vmcryptctl boot"
    return ""


def held(key: Mapping[str, str]) -> str:
    """The keys in the daemon's memory, and when they will be wiped."""
    names = few(key["volumes"].split())
    match key["until"]:
        case "":
            when = f"until it was tried on {names}" if names else "while it is being tried"
        case "infinity":
            when = "until everything is locked (key_cache)"
        case until:
            when = f"until {until} at most (key_cache)"
    known = {"key": "a key that was handed in", "prompt": "an answer"}
    return f"{known.get(key['source'], 'a key')} is held {when}"


class Snapshot(NamedTuple):
    """Open volumes, running guests and held keys at one moment."""

    volumes: dict[str, str]  # name → state
    guests: dict[str, str]
    keys: int

    @classmethod
    def of(cls, shown: HasObjects) -> Snapshot:
        return cls(
            {name: str(values["State"]) for name, values in shown.volumes.items()},
            {n: str(values["State"]) for n, values in shown.guests.items() if values["Needs"]},
            len(shown.host.get("HeldKeys", ())),
        )


def panicked(before: Snapshot, after: Snapshot) -> list[str]:
    """The report of panic: one line for each guest and volume, and one for the keys."""
    lines = []
    for name, state in before.guests.items():
        if state not in ("off", "undefined"):
            is_off = after.guests.get(name, "off") in ("off", "undefined")
            lines.append(f"guest {name}: {'killed' if is_off else 'STILL RUNS'}")
    for name, state in before.volumes.items():
        if state in ("unlocked", "suspended", "locking"):
            match after.volumes.get(name):
                case "suspended":
                    lines.append(
                        f"volume {name}: not closed; its key is wiped, and I/O to it blocks"
                    )
                case "unlocked" | "locking":
                    lines.append(f"volume {name}: STILL OPEN")
                case _:
                    lines.append(f"volume {name}: closed")
    if before.keys:
        lines.append(f"{_count(before.keys, 'key')} dropped from memory")
    return [printable(line) for line in lines] or ["nothing was open"]


def change(kind: str, name: str, event: str, values: Properties) -> str:
    """One line of `vmcryptctl monitor`."""
    match kind, event:
        case "daemon", "down":
            return "vmcryptd has stopped"
        case "daemon", _:
            return "vmcryptd is back"
        case "job", "removed":
            return f"{values.get('Goal', 'job')}: ended"
        case "job", _:
            goal = values.get("Goal") or f"job {name}"
            if error := values.get("LastError"):
                return f"{goal}: {error}"
            if values.get("Progress", -1) >= 0:
                return f"{goal}: {percent(values['Progress']).strip()}"
            return f"{goal}: {values.get('State', '')}"
        case _, "removed":
            return f"{kind} {name}: gone"
    what = []
    if "State" in values:
        what.append(str(values["State"]))
    if values.get("Waiting"):
        what.append(f"waiting for the key of {few(values['Waiting'])}")
    if values.get("LastError"):
        what.append(str(values["LastError"]))
    if "HeldKeys" in values:
        what += [held(key) for key in values["HeldKeys"]] or ["no key is held"]
    if "ConfigChanged" in values:
        what.append(
            CHANGED_ON_DISK if values["ConfigChanged"] else "the configuration is as on disk"
        )
    if not what:
        what = [f"{key} = {value}" for key, value in snake(values).items()]
    return f"{kind} {name}".rstrip() + f": {'; '.join(what)}"


def progress(goal: str, jobs: Iterable[Properties]) -> float | None:
    """The progress of a job, 0 to 1; None if there is no job, or its progress is unknown."""
    for job in jobs:
        if job["Goal"] == goal and job.get("Progress", -1) >= 0:
            return float(job["Progress"])
    return None


def opening(volumes: Iterable[Properties]) -> tuple[int, int]:
    """How many of these volumes are open, and how many are open or are to be."""
    states = [str(values["State"]) for values in volumes]
    opened = states.count("unlocked")
    return opened, opened + sum(
        states.count(state) for state in ("unlocking", "waiting", "failed", "suspended")
    )


def bar(done: float, width: int, text: str = "") -> str:
    """A progress bar, with a text at its end."""
    text = text or percent(done)
    room = max(width - len(text) - 3, 1)
    full = int(done * room)
    return f"[{'#' * full}{'-' * (room - full)}] {text}"


def percent(done: float) -> str:
    """The progress in percent, 100 only at the end."""
    return f"{int(done * 100):>3} %"


def printable(text: str) -> str:
    """Escape names and messages from outside: they must not control the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _rotation_note(values: Properties, jobs: Iterable[Properties]) -> str:
    match values.get("Rotation"):
        case "running":
            done = progress(f"rotate:{values['Name']}", jobs)
            far = "" if done is None else f": {percent(done).strip()}"
            return f"its volume key is being rotated{far}"
        case "unfinished":
            command = f"vmcryptctl key rotate {values['Name']}"
            return f"its volume key is half rotated -- it goes on with: {command}"
    return ""


def _backup_note(values: Properties) -> str:
    if not values.get("HeaderBackupDue"):
        return ""
    return (
        "its header has changed, and no backup of it was made since -- "
        f"run: vmcryptctl header backup {values['Name']} FILE"
    )


def _cost(slot: Mapping[str, Any]) -> str:
    if not slot["iterations"]:
        return f"{slot['kdf']}, not known"
    if slot["memory_kib"]:
        mib = -(-slot["memory_kib"] // 1024)
        return f"{slot['kdf']}, {mib} MiB, {_count(slot['iterations'], 'round')}"
    return f"{slot['kdf']}, {_count(slot['iterations'], 'round')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
