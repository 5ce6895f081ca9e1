# SPDX-License-Identifier: LGPL-2.1-or-later
"""The benchmark's own decisions: its rows, their goals, and the script that the whole job is held against."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.bench import guests, inside
from tests.bench.__main__ import chosen
from tests.bench.rows import Medians, Row, Samples, medians, rounds_table, rows, table

SYSTEMD, ALONE = "systemd-cryptsetup", "cryptsetup alone, all at once"
PASSPHRASE, LANES = (
    "one passphrase, Argon2id",
    "one passphrase, Argon2id of as many lanes as cores",
)
SCRIPT = "`cryptsetup open && virsh start`, all at once"
GOALS = [
    (f"opening 8 volumes, {PASSPHRASE}", SYSTEMD, "≤ 0.60"),
    (f"opening 8 volumes, {PASSPHRASE}", ALONE, "≤ 1.05"),
    (f"opening 8 volumes, {LANES}", SYSTEMD, "≤ 1.00"),
    (f"opening 8 volumes, {LANES}", ALONE, "≤ 1.05"),
    ("opening 8 volumes, a keystore", f"{SYSTEMD}, by the passphrase", "≤ 0.25"),
    ("opening 32 volumes, a keystore", f"{SYSTEMD}, by the passphrase", "≤ 0.15"),
    ("opening 64 volumes, one full-entropy key, PBKDF2", ALONE, "≤ 1.20"),
    ("opening 8 volumes, TPM2", f"{SYSTEMD}, tpm2-device=auto", "≤ 1.00"),
    ("closing 8 volumes", "`systemctl stop`", "≤ 0.30"),
    (
        "the daemon's own CPU for one more volume, of 8",
        "the cryptsetup child's own, one full-entropy key, PBKDF2",
        "≤ 0.25",
    ),
    ("daemon, exec to READY", "Python importing its libraries", "≤ 1.10"),
    ("`vmcryptctl status`", "Python importing dbus_next.aio", "≤ 1.15"),
    ("from the key to 8 guests on 8 volumes", SCRIPT, "≤ 1.05"),
    ("these guests and volumes down", "`virsh shutdown`, wait, close, all at once", "≤ 1.10"),
    ("planning 10 000 volumes and guests", "1 000", "≤ 12, < 2 s"),
    (
        "longest time without an answer to root, one user floods `Plan`",
        "without the flood",
        "≤ 3 s",
    ),
    ("panic with 8 open volumes and 2 guests", "closing politely", "≤ 1.00"),
]
OPENING = ("open", "close", "peer_open", "peer_close", "floor_open", "floor_close")
SAMPLES = {
    "guests": (
        *("up", "first", "mean", "down", "cpu_up", "cpu_down"),
        *("peer_up", "peer_first", "peer_mean", "peer_down"),
    ),
    "start": ("ready", "libraries", "status", "dbus_next"),
    "refusing": ("before", "after"),
    "flood": ("calm", "flood"),
    "panic": ("panic", "polite"),
}


def everything(value: float) -> dict[str, Samples]:
    """A whole run in which every measurement is the same."""

    def names(part: str) -> tuple[str, ...]:
        of_more = () if part.rstrip("0123456789") + "1" == part else ("cpu", "child_cpu")
        return SAMPLES.get(part, (*OPENING, *of_more))

    return {part: {name: [value] for name in names(part)} for part in inside.PARTS}


def found(value: float = 1.0) -> list[Row]:
    return rows(medians(everything(value)), {1_000: [value], 10_000: [value]})


def test_the_table_holds_to_every_goal_and_to_no_other() -> None:
    of_64 = ("the daemon's own CPU for one more volume, of 64", *GOALS[9][1:])
    seen = [(row.what, row.against, row.goal) for row in found() if row.goal]
    assert sorted(seen) == sorted([*GOALS, of_64])


def test_a_goal_is_met_or_shown_as_missed() -> None:
    measured: dict[str, Medians] = medians(everything(1.0))
    measured["guests"] |= {"up": 1.06, "peer_up": 1.0, "down": 1.1, "peer_down": 1.0}
    measured["flood"]["flood"] = 3.5
    of = {row.what: row for row in rows(measured, {1_000: [0.1], 10_000: [1.3]})}
    met = {what: row.is_met for what, row in of.items() if row.goal}
    assert met["from the key to 8 guests on 8 volumes"] is False
    assert met["these guests and volumes down"] is True
    assert met["longest time without an answer to root, one user floods `Plan`"] is False
    assert met["planning 10 000 volumes and guests"] is False
    assert met["`vmcryptctl status`"] is True
    line = f"| from the key to 8 guests on 8 volumes | 1.06 s | {SCRIPT} | 1.00 s | 1.06 | ≤ 1.05 **missed** |"
    assert line in table(list(of.values())).splitlines()


def test_rounds_of_one_daemon_stand_side_by_side() -> None:
    raw = everything(1.0)
    raw["guests"] |= {"up": [24.0, 40.0], "cpu_up": [3.8, 20.3], "peer_up": [28.0, 29.0]}
    shown = rounds_table(raw).splitlines()
    assert shown[0] == "| 8 guests on 8 volumes | round 1 | round 2 | the script |"
    assert "| up | 24.00 s | 40.00 s | 28.50 s |" in shown
    assert "| the daemon's own CPU, up | 3.80 s | 20.30 s | – |" in shown
    assert rounds_table({}) == ""


def test_parts_are_chosen_by_kind_or_name() -> None:
    assert chosen("slow8,tpm") == ["slow8", "tpm8"]
    assert chosen("") == list(inside.PARTS)


def test_the_guests_times_count_from_the_key() -> None:
    events = [(12.0, "b"), (11.0, "a"), (16.0, "c")]
    assert guests.started(10.0, events) == guests.Started(1.0, 3.0, 6.0)


def test_the_script_does_all_at_once_and_fails_if_one_fails(tmp_path: Path) -> None:
    # Each waits for the last: one after the other this would not end.
    last, there = guests.NAMES[-1], f"{tmp_path}/{{guest}}"
    together = f"touch {there}; until [ -e {tmp_path}/{last} ]; do sleep 0.01; done"
    subprocess.run(["sh", "-c", guests.all_at_once(together)], timeout=60, check=True)
    one = guests.all_at_once(f"[ {{volume}} != {guests.MAPPINGS[2]} ]")
    assert subprocess.run(["sh", "-c", one], check=False).returncode != 0
