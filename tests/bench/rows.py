# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was measured as rows of a table, each with what it is held against and its goal."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

Samples = dict[str, list[float]]
Medians = dict[str, float]

KINDS = {
    "slow": "one passphrase, Argon2id",
    "lanes": "one passphrase, Argon2id of as many lanes as cores",
    "kept": "a keystore",
    "tpm": "TPM2",
    "fast": "one full-entropy key, PBKDF2",
}
# The contract's goals for opening, and for what is held against systemd-cryptsetup opening the same
# volumes by the one passphrase.
OPENING_GOALS = {"slow8": 0.60, "lanes8": 1.00, "kept8": 0.25, "kept32": 0.15, "tpm8": 1.00}
# And against bare cryptsetup, all at once.
FLOOR_GOALS = {"slow8": 1.05, "lanes8": 1.05, "fast64": 1.20}
PEERS = {
    "kept": ("slow", "systemd-cryptsetup, by the passphrase"),
    "tpm": ("tpm", "systemd-cryptsetup, tpm2-device=auto"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: two figures in seconds, and what their ratio is to be."""

    what: str
    against: str
    ours_s: float
    theirs_s: float
    goal: str = ""
    goal_ratio: float | None = None
    goal_s: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours_s / self.theirs_s

    @property
    def is_met(self) -> bool:
        return (self.goal_ratio is None or self.ratio <= self.goal_ratio) and (
            self.goal_s is None or self.ours_s < self.goal_s
        )


def medians(inside: dict[str, Samples]) -> dict[str, Medians]:
    # The ratio is that of the medians: rounds that something disturbed count as little as can be.
    return {
        part: {name: median(samples) for name, samples in named.items() if samples}
        for part, named in inside.items()
    }


def rows(measured: dict[str, Medians], plans: dict[int, list[float]]) -> list[Row]:
    found: list[Row] = []
    for part, m in measured.items():
        kind = part.rstrip("0123456789")
        if kind in KINDS:
            found += _opening(measured, kind, int(part.removeprefix(kind)), m)
    if m := measured.get("guests"):
        found += _guests(m)
    if start := measured.get("start"):
        libraries, library = "Python importing its libraries", "Python importing dbus_next.aio"
        ready, status = "daemon, exec to READY", "`vmcryptctl status`"
        found.append(Row(ready, libraries, start["ready"], start["libraries"], *_at_most(1.10)))
        found.append(Row(status, library, start["status"], start["dbus_next"], *_at_most(1.15)))
    if refusing := measured.get("refusing"):
        what, before = "100 answers, after 10 000 calls it refused", "before these"
        found.append(Row(what, before, refusing["after"], refusing["before"]))
    if flood := measured.get("flood"):
        what = "longest time without an answer to root, one user floods `Plan`"
        found.append(
            Row(what, "without the flood", flood["flood"], flood["calm"], "≤ 3 s", None, 3)
        )
    large, small = median(plans[10_000]), median(plans[1_000])
    found.append(
        Row("planning 10 000 volumes and guests", "1 000", large, small, "≤ 12, < 2 s", 12, 2)
    )
    if panic := measured.get("panic"):
        what = "panic with 8 open volumes and 2 guests"
        found.append(Row(what, "closing politely", panic["panic"], panic["polite"], *_at_most(1.0)))
    return found


def _guests(m: Medians) -> list[Row]:
    script = "`cryptsetup open && virsh start`, all at once"
    down = "`virsh shutdown`, wait, close, all at once"
    return [
        Row(
            "from the key to 8 guests on 8 volumes", script, m["up"], m["peer_up"], *_at_most(1.05)
        ),
        Row("the first of these guests", script, m["first"], m["peer_first"]),
        Row("the mean of them", script, m["mean"], m["peer_mean"]),
        Row("these guests and volumes down", down, m["down"], m["peer_down"], *_at_most(1.10)),
    ]


def _opening(measured: dict[str, Medians], kind: str, count: int, m: Medians) -> list[Row]:
    found = []
    many = f"{count} volume{'s' if count > 1 else ''}"
    opening, closing = f"opening {many}, {KINDS[kind]}", f"closing {many}"
    peer_kind, peer = PEERS.get(kind, (kind, "systemd-cryptsetup"))
    theirs = measured.get(f"{peer_kind}{count}", {})
    goal = OPENING_GOALS.get(f"{kind}{count}")
    if "peer_open" in theirs:
        found.append(Row(opening, peer, m["open"], theirs["peer_open"], *_at_most(goal)))
    floor = _at_most(FLOOR_GOALS.get(f"{kind}{count}"))
    found.append(Row(opening, "cryptsetup alone, all at once", m["open"], m["floor_open"], *floor))
    if kind == "slow" and count == 8:
        found.append(Row(closing, "`systemctl stop`", m["close"], m["peer_close"], *_at_most(0.30)))
        found.append(Row(closing, "cryptsetup alone, at once", m["close"], m["floor_close"]))
    if "cpu" in m:
        # The goal is for the full-entropy key, whose derivation costs next to nothing.
        cpu = f"the daemon's own CPU for one more volume, of {count}"
        child = f"the cryptsetup child's own, {KINDS[kind]}"
        is_goal = kind == "fast"
        found.append(
            Row(cpu, child, m["cpu"], m["child_cpu"], *_at_most(0.25 if is_goal else None))
        )
    return found


def _at_most(ratio: float | None) -> tuple[str, float | None]:
    return ("", None) if ratio is None else (f"≤ {ratio:.2f}", ratio)


def table(found: Sequence[Row]) -> str:
    lines = []
    before = ""
    for row in found:
        goal = f"{row.goal}{'' if row.is_met else ' **missed**'}" if row.goal else "–"
        what, ours = (row.what, f"{row.ours_s:.2f} s") if row.what != before else ("", "")
        before = row.what
        lines.append([what, ours, row.against, f"{row.theirs_s:.2f} s", f"{row.ratio:.2f}", goal])
    return _markdown(
        "| what | vmcryptd | against | | ratio | goal |", "|---|--:|---|--:|--:|---|", lines
    )


# --- what more volumes cost ---


def growth(measured: dict[str, Medians], kind: str = "fast") -> dict[str, dict[int, float]]:
    """Seconds for one of so many volumes that are opened at once, by who opens them."""
    sides = {
        "vmcryptd": "open",
        "systemd-cryptsetup": "peer_open",
        "cryptsetup alone, all at once": "floor_open",
        "the daemon's own CPU, for one more": "cpu",
    }
    parts = {
        int(part.removeprefix(kind)): m
        for part, m in measured.items()
        if part.rstrip("0123456789") == kind
    }
    return {
        who: {
            count: m[what] / (1 if what == "cpu" else count)
            for count, m in sorted(parts.items())
            if what in m
        }
        for who, what in sides.items()
    }


def growth_table(grown: dict[str, dict[int, float]]) -> str:
    """The last column is the ratio to linear growth, from the last but one to the last."""
    counts = sorted({count for each in grown.values() for count in each})
    if len(counts) < 2:
        return ""
    few, many = counts[-2:]
    lines = [
        [
            who,
            *(f"{each[count]:.2f} s" if count in each else "–" for count in counts),
            f"{each[many] / each[few]:.2f}",
        ]
        for who, each in grown.items()
        if few in each and many in each
    ]
    titles = " | ".join(f"of {count}" for count in counts)
    return _markdown(
        f"| one volume, full-entropy key | {titles} | {many} against {few} |",
        f"|---|{'--:|' * (len(counts) + 1)}",
        lines,
    )


# --- the rounds of one daemon's life ---


def rounds_table(raw: dict[str, Samples]) -> str:
    """Of the whole job: what grows from round to round piles up."""
    if not (guests := raw.get("guests")):
        return ""
    sides = {
        "up": "up",
        "the first guest": "first",
        "the mean guest": "mean",
        "the daemon's own CPU, up": "cpu_up",
        "down": "down",
        "the daemon's own CPU, down": "cpu_down",
    }
    lines = [
        [
            what,
            *(f"{value:.2f} s" for value in guests[name]),
            f"{median(peer):.2f} s" if (peer := guests.get(f"peer_{name}")) else "–",
        ]
        for what, name in sides.items()
    ]
    numbers = range(1, len(guests["up"]) + 1)
    titles = " | ".join(f"round {number}" for number in numbers)
    return _markdown(
        f"| 8 guests on 8 volumes | {titles} | the script |",
        f"|---|{'--:|' * (len(numbers) + 1)}",
        lines,
    )


def _markdown(head: str, rule: str, lines: Sequence[Sequence[str]]) -> str:
    return "\n".join([head, rule, *(f"| {' | '.join(cells)} |" for cells in lines)])
