# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each attempt to open a volume is in the journal: by whose request, by which way, and whether it worked."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.lib import Host, Running, handed_in, opened_by
from vmcryptd.core import events
from vmcryptd.core.errors import WrongKeyError
from vmcryptd.core.requester import REQUESTER, Requester
from vmcryptd.engine import unlock_with_key
from vmcryptd.engine.engine import Engine
from vmcryptd.posix.journal import JournalHandler

RIGHT, WRONG = "canary-right", "canary-wrong"
HOST = f"""
[volume.mail]
device = "/dev/vg/mail"
[sim.volume.mail]
{opened_by(RIGHT)}
[volume.web]
device = "/dev/vg/web"
keys = ["file:/etc/web"]
[sim.volume.web]
sources = ["file:/etc/web"]
"""


def test_who_by_which_way_and_whether_it_worked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def as_user(uid: int, passphrase: str) -> None:
        REQUESTER.set(Requester(uid))
        await unlock_with_key.unlock(engine, "mail", handed_in(passphrase))

    async def test() -> None:
        nonlocal engine
        host = Host.parse(HOST)
        engine = Engine(host.settings, host.ports())
        engine.start()
        with pytest.raises(WrongKeyError):
            await asyncio.create_task(as_user(1000, WRONG))
        await asyncio.create_task(as_user(1001, RIGHT))
        await engine.unlock("web")
        await engine.lock("mail")
        host.answer(WRONG)
        host.answer(RIGHT)
        await engine.unlock("mail")
        engine.close()

    engine: Engine
    asyncio.run(test())
    said = [record.getMessage() for record in caplog.records]
    expected = [
        "volume mail: the key handed in by user 1000 over the bus does not open it",
        "volume mail: the key handed in by user 1001 over the bus opens it",
        "volume mail is open (key), asked for by user 1001 over the bus",
        "volume web is open (file:/etc/web), asked for by vmcryptd itself",
        "volume mail: the key given to a password agent does not open it",
        "volume mail: the key given to a password agent opens it",
        "volume mail is open (prompt), asked for by vmcryptd itself",
    ]
    assert [line for line in said if line in expected] == expected
    assert "canary" not in caplog.text


def test_every_event_has_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def as_user(uid: int, work: Coroutine[Any, Any, Any]) -> None:
        REQUESTER.set(Requester(uid))
        await work

    async def test() -> None:
        run = Running(Host.parse(HOST))
        engine = run.engine
        engine.boot()  # by vmcryptd itself: it asks for the passphrase
        await run.until(lambda: run.host.questions)
        unlocking = unlock_with_key.unlock(engine, "mail", handed_in(WRONG))
        with pytest.raises(WrongKeyError):
            await asyncio.create_task(as_user(1000, unlocking))
        unlocking = unlock_with_key.unlock(engine, "mail", handed_in(RIGHT))
        await asyncio.create_task(as_user(1001, unlocking))
        await run.idle()
        keys = engine.key_slots
        adding = keys.add("mail", handed_in(RIGHT), handed_in("canary-new"))
        await asyncio.create_task(as_user(1002, adding))
        await asyncio.create_task(as_user(1003, engine.lock("mail")))
        await asyncio.create_task(as_user(1004, engine.panic()))
        await run.close()

    asyncio.run(test())
    told = [dict(record.fields) for record in caplog.records if hasattr(record, "fields")]
    ids = {one.pop("MESSAGE_ID") for one in told}
    assert len(ids) == len({one["VMCRYPTD_EVENT"] for one in told})
    names = "EVENT", "VOLUME", "SOURCE", "UID", "WAY", "RESULT"
    listed = [tuple(one.get(f"VMCRYPTD_{name}", "") for name in names) for one in told]
    assert sorted(listed) == sorted(
        [
            ("unlock", "web", "file:/etc/web", "", "vmcryptd", "success"),
            ("waiting", "mail", "", "", "vmcryptd", "success"),
            ("wrong-key", "mail", "key", "1000", "bus", "WrongKey"),
            # The boot that waited for it was begun by vmcryptd; the key is the user's.
            ("unlock", "mail", "key", "1001", "bus", "success"),
            ("key-added", "mail", "key slot 1", "1002", "bus", "success"),
            ("lock", "mail", "", "1003", "bus", "success"),
            ("panic", "", "", "1004", "bus", "success"),
            ("lock", "web", "", "1004", "bus", "success"),
        ]
    )


def test_what_vmcryptd_begins_by_itself_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    """A look that a caller's doing brings about runs in his context."""
    caplog.set_level(logging.INFO)

    async def test() -> None:
        away = HOST.replace("[volume.web]", "[volume.web]\ntimeout = '1ms'")
        run = Running(
            Host.parse(away.replace("[sim.volume.web]", "[sim.volume.web]\npresent = false"))
        )
        run.engine.boot()
        run.host.answer(RIGHT)
        await run.idle()
        assert run.volumes() == {"mail": "unlocked", "web": "missing"}
        REQUESTER.set(Requester(1000))
        run.host.volume("web", present=True)
        await run.until(lambda: run.engine.graph.volumes["web"].is_open)
        await run.close()

    asyncio.run(test())
    assert "volume web is open (file:/etc/web), asked for by vmcryptd itself" in caplog.messages


def test_no_argument_of_a_program_is_in_a_field() -> None:
    said = dict(events.fields(events.UNLOCK, source="exec:/bin/fetch --token canary")["fields"])
    assert said["VMCRYPTD_SOURCE"] == "exec:/bin/fetch"
    said = dict(events.fields(events.UNLOCK, source="exec: ", volume=["a", "b"])["fields"])
    assert (said["VMCRYPTD_SOURCE"], said["VMCRYPTD_VOLUME"]) == ("exec", "b")
    here = Requester(0, is_here=True)
    assert dict(events.fields(events.PANIC, requester=here)["fields"])["VMCRYPTD_WAY"] == (
        "command-line"
    )
    by_agent = events.fields(events.WRONG_KEY, source="prompt")
    assert dict(by_agent["fields"])["VMCRYPTD_WAY"] == "agent"


def test_ids_are_never_changed() -> None:
    """Filters and catalogs go by them."""
    found = {one for one in vars(events).values() if isinstance(one, events.Event)}
    assert len({one.message_id for one in found}) == len({one.name for one in found}) == len(found)
    assert all(re.fullmatch("[0-9a-f]{32}", one.message_id) for one in found)


# --- how they reach the journal ---


def record(text: str, **extra: Any) -> logging.LogRecord:
    logger = logging.getLogger("test")
    return logger.makeRecord("test", logging.WARNING, "", 0, text, (), None, extra=extra)


def test_records_go_to_the_journals_socket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "socket"))
        journal.setblocking(False)
        handler = JournalHandler(str(tmp_path / "socket"))
        extra = events.fields(events.WAITING, volume=["a", "b\nMESSAGE=forged"])
        handler.emit(record("it waits\nMESSAGE=forged", **extra))
        lines = journal.recv(4096).decode().splitlines()
        handler.emit(record("plain"))
        plain = journal.recv(4096).decode().splitlines()
        assert (plain[:2], len(plain)) == (["MESSAGE=plain", "PRIORITY=4"], 3)
        assert lines[:2] == ["MESSAGE=it waits\\nMESSAGE=forged", "PRIORITY=4"]
        assert f"MESSAGE_ID={events.WAITING.message_id}" in lines
        assert [line for line in lines if "VOLUME" in line] == [
            "VMCRYPTD_VOLUME=a",
            "VMCRYPTD_VOLUME=b\\nMESSAGE=forged",
        ]
    assert capsys.readouterr().err == ""
    # Nobody reads there any more: the sentence stays.
    handler.emit(record("it waits", **extra))
    assert capsys.readouterr().err == "<4>it waits\n"
    handler.close()
