# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each attempt to open a volume is in the journal: by whose request, by which way, and whether it worked."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.lib import Host, handed_in, opened_by
from vmcryptd.core.errors import WrongKeyError
from vmcryptd.core.requester import REQUESTER, Requester
from vmcryptd.engine import unlock_with_key
from vmcryptd.engine.engine import Engine

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
