# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon that is started again says why what is down has failed, as the one before it did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.lib import Running, opened_by, play
from vmcryptd.adapters.systemd.state_files import StateFiles
from vmcryptd.core.model import KeySource, SourceKind
from vmcryptd.core.ports import Reason

A = opened_by("alpha")


def volume(name: str, sim: str = A, more: str = "") -> str:
    return f'[volume.{name}]\ndevice = "/dev/{name}"\n{more}\n[sim.volume.{name}]\n{sim}\n'


HOST = (
    volume("a")
    + volume("plain", 'fault = "not-luks"')
    + volume("away", "present = false", 'timeout = "1ms"')
    + volume("quiet", A, 'keys = ["file:/etc/none"]')
    + '[sim.guest.g]\ndisks = ["/dev/mapper/quiet"]\nautostart = true\n'
    + '[sim.guest.h]\ndisks = ["/dev/mapper/a"]\nautostart = true\nfault = "no such network"\n'
)


async def restarted(run: Running) -> Running:
    await run.close()
    again = Running(run.host)
    again.engine.resume()
    return again


@play(HOST)
async def test_after_a_restart(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    before = (run.state, run.volumes(), run.guests())
    said = {
        view.name: view.error for view in (*run.engine.volume_views(), *run.engine.guest_views())
    }
    assert "file:/etc/none" in said["quiet"]
    shown = run.engine.inventory.redacted(said["quiet"])
    assert "/etc/none" not in shown
    line = run.engine.status_line(run.engine.state)
    assert [name for name, text in said.items() if not text] == ["a"]
    again = await restarted(run)
    await again.looked()
    views = (*again.engine.volume_views(), *again.engine.guest_views())
    assert {view.name: view.error for view in views} == said
    assert again.engine.inventory.redacted(said["quiet"]) == shown
    assert (again.state, again.volumes(), again.guests()) == before
    assert again.volumes() == {
        "a": "unlocked", "plain": "failed", "away": "missing", "quiet": "failed",
    }  # fmt: skip
    assert again.engine.status_line(again.engine.state) == line
    assert line == "Degraded: plain, away, quiet and 2 more"
    # What failed and is put right is no reason any more.
    run.host.volume("quiet", open=True)
    await again.until(lambda: again.guests()["g"] == "running")
    assert (again.volume("quiet").error, again.guest("g").error) == ("", "")
    third = await restarted(again)
    assert (third.volume("quiet").error, third.guest("g").error) == ("", "")
    assert "no sound LUKS header" in third.volume("plain").error
    run.engine = third.engine


@play(volume("a", A, 'keys = ["exec:/bin/fetch canary-old", "exec:/bin/fetch canary-old-2"]'))
async def test_a_token_that_was_configured_before_is_not_shown(run: Running) -> None:
    run.engine.boot()
    await run.idle()
    assert "canary-old" in run.volume("a").error  # the journal may have it
    kept = str(run.host.reasons())
    assert "volume a: none of its key sources opened it: exec:/bin/fetch …: " in kept
    assert "canary" not in kept
    settings = run.engine.settings
    spec = replace(settings.volumes["a"], keys=(KeySource(SourceKind.EXEC, "/bin/fetch new"),))
    run.engine.configure(replace(settings, volumes={"a": spec}))
    assert "canary" in run.volume("a").error
    assert "canary" not in run.engine.inventory.redacted(run.volume("a").error)
    again = await restarted(run)
    assert "opened it: exec:/bin/fetch …: " in again.volume("a").error
    run.engine = again.engine


@play(volume("a") + volume("b"))
async def test_what_was_locked_by_hand_is_named(run: Running) -> None:
    run.engine.boot()
    run.host.answer("alpha")
    await run.idle()
    await run.engine.lock("b")
    assert run.state == "degraded"
    assert run.engine.status_line(run.engine.state) == "Degraded: b"


@play(volume("a", 'fault = "not-luks"'))
async def test_an_attempt_that_a_restart_breaks_off(run: Running) -> None:
    run.engine.boot()
    await run.idle()
    again = await restarted(run)
    run.host.volume("a", fault="")
    again.engine.boot()
    await again.until(lambda: again.engine.waiting)
    assert again.volume("a").error == ""
    run.engine = again.engine


@pytest.mark.parametrize(
    "entry",
    [
        "5",
        "[]",
        '["WrongKey"]',
        '["WrongKey", "it"]',
        '["WrongKey", 5, "it"]',
        '["WrongKey", "two\\nlines", "it"]',
        "{}",
    ],
)
def test_what_is_no_reason(tmp_path: Path, entry: str) -> None:
    files = StateFiles(tmp_path, tmp_path)
    reason = Reason("WrongKey", "volume a: file:/a does not fit", "volume a: file: does not fit")
    files.keep_reasons({"volume a": reason})
    path = tmp_path / "reasons.json"
    assert path.stat().st_mode & 0o077 == 0
    assert files.reasons() == {"volume a": reason}
    sound = '"guest g": ["Odd", "guest g: odd", "guest g: odd"]'
    path.write_text(f'{{"reasons": {{"volume a": {entry}, {sound}}}}}')
    assert files.reasons() == {"guest g": Reason("Odd", "guest g: odd", "guest g: odd")}
