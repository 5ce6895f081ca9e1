# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl start`: starts guests, and asks for their volumes on the caller's terminal."""

from __future__ import annotations

import asyncio

from vmcryptd.bus.client import Client
from vmcryptd.cli.unlock import GATHER_S, Say, Unlocking, beneath, waiting_for
from vmcryptd.core.errors import UnreachableError, VmcryptdError


async def start(client: Client, name: str, say: Say) -> None:
    """Start a guest. The client must `follow`. Raises the reason why the guest is off."""
    call = asyncio.ensure_future(client.call("StartGuest", "s", name))

    def asked_for() -> list[str]:
        needs = client.guests.get(name, {}).get("Needs", ())
        return sorted(
            one
            for one in beneath(client, needs)
            if client.volumes.get(one, {}).get("State") == "waiting"
        )

    def is_question_complete() -> bool:
        needs = beneath(client, client.guests.get(name, {}).get("Needs", ()))
        states = {str(client.volumes[one]["State"]) for one in needs if one in client.volumes}
        return not states & {"locked", "unlocking"}

    try:
        while not call.done():
            asked = asyncio.ensure_future(client.until(lambda: bool(asked_for())))
            try:
                await asyncio.wait({call, asked}, return_when=asyncio.FIRST_COMPLETED)
                if not call.done():
                    asked.result()
            finally:
                asked.cancel()
            if call.done():
                break
            if not client.interactive:
                say(waiting_for(asked_for()))
                await asyncio.wait({call})
                continue
            # The guest's other volumes may join the question.
            await client.until(is_question_complete, GATHER_S)
            if not (names := asked_for()):  # Unlocking takes an empty list for all volumes
                continue
            if failed := await Unlocking(client, names, can_ask=True, say=say).run():
                raise next(iter(failed.values()))
        call.result()
    finally:
        call.cancel()


async def start_each(client: Client, names: list[str], say: Say) -> dict[str, VmcryptdError]:
    """Start the guests one after the other. Returns the failures."""
    failed: dict[str, VmcryptdError] = {}
    await client.follow()
    for name in names:
        try:
            await start(client, name, say)
        except UnreachableError:
            raise
        except VmcryptdError as error:
            failed[name] = error
    return failed
