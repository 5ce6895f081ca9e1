# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks polkit what a caller may do. Root may do everything; without polkit no other user may do anything."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence

from vmcryptd.bus.transport import Call, Connection, RemoteError, Typed
from vmcryptd.core.errors import NotAuthorizedError, VmcryptdError

_NAME = "org.freedesktop.PolicyKit1"
_PATH = "/org/freedesktop/PolicyKit1/Authority"
_INTERFACE = "org.freedesktop.PolicyKit1.Authority"
_ALLOW_USER_INTERACTION = 1

ROOT = 0


class Polkit:
    """Asks polkit about the sender of a call. While a person types a password, only that call waits.

    `trusted`: users that may do and see everything; polkit is not asked about them.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        trusted: frozenset[int] = frozenset({ROOT}),
        timeout_s: float = 25,
        interactive_timeout_s: float = 120,
    ) -> None:
        self._connection = connection
        self.trusted = trusted
        self._timeout_s = timeout_s
        self._interactive_timeout_s = interactive_timeout_s
        self._ids = itertools.count(1)

    async def check(
        self, call: Call, actions: Sequence[str], purpose: str, details: Mapping[str, str]
    ) -> None:
        """Raises NotAuthorizedError unless the caller may do all of the actions.

        The dialog says "Authentication is required to" and the purpose, in which $(NAME) is one of
        the details; rules see them by `action.lookup("NAME")`.
        """
        if call.uid in self.trusted:
            return
        shown = dict(details)
        if purpose:
            shown["polkit.message"] = f"Authentication is required to {purpose}"
        challenged = list(actions)
        if len(actions) > 1:
            # A dialog only if no action is refused outright, and only for those that need one.
            challenged = [
                action
                for action in actions
                if not await self._may(call, action, shown, is_last=not call.interactive)
            ]
        for action in challenged:
            await self._may(call, action, shown, is_last=True)

    async def _may(
        self, call: Call, action: str, details: Mapping[str, str], *, is_last: bool
    ) -> bool:
        """False if polkit wants a password and `is_last` is not set; raises NotAuthorizedError."""
        interactive = call.interactive and is_last
        timeout_s = self._interactive_timeout_s if interactive else self._timeout_s
        try:
            allowed, challenge = await self._ask(
                call.sender, action, details, interactive, timeout_s
            )
        except TimeoutError:
            reason = f"polkit did not answer within {timeout_s:g} s"
        except RemoteError as error:
            reason = f"polkit cannot be asked ({error.text or error.name})"
        except VmcryptdError as error:
            reason = f"polkit cannot be asked ({error})"
        except (TypeError, ValueError):
            reason = "polkit's answer makes no sense"
        else:
            if allowed:
                return True
            if challenge and not is_last:
                return False
            reason = (
                "polkit wants a password, and the caller forbids to ask"
                if challenge
                else "polkit refused"
            )
        raise NotAuthorizedError(f"user {call.uid} may not do {action}: {reason}; root always may")

    async def _ask(
        self,
        sender: str,
        action: str,
        details: Mapping[str, str],
        interactive: bool,
        timeout_s: float,
    ) -> tuple[bool, bool]:
        cancellation = f"vmcryptd-{next(self._ids)}"
        subject = ["system-bus-name", {"name": Typed("s", sender)}]
        flags = _ALLOW_USER_INTERACTION if interactive else 0
        body = [subject, action, details, flags, cancellation]
        try:
            async with asyncio.timeout(timeout_s):
                [answer] = await self._connection.call(
                    _NAME, _PATH, _INTERFACE, "CheckAuthorization",
                    "(sa{sv})sa{ss}us", body, timeout_s=None,
                )  # fmt: skip
        except (TimeoutError, asyncio.CancelledError):
            self._connection.tell(
                _NAME, _PATH, _INTERFACE, "CancelCheckAuthorization", "s", [cancellation]
            )
            raise
        allowed, challenge, _ = answer
        return allowed is True, challenge is True
