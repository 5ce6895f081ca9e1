# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what, as polkit says. Root always may; if polkit cannot be asked, nobody else may."""

from __future__ import annotations

import asyncio
import itertools

from vmcryptd.bus.transport import Connection, RemoteError, Typed
from vmcryptd.core.errors import NotAuthorizedError, VmcryptdError

_NAME = "org.freedesktop.PolicyKit1"
_PATH = "/org/freedesktop/PolicyKit1/Authority"
_INTERFACE = "org.freedesktop.PolicyKit1.Authority"
_ALLOW_USER_INTERACTION = 1

ROOT = 0


class Polkit:
    """Asks polkit about the sender of a call. While a person types, only its caller waits.

    `trusted`: users who may do everything, and about whom nobody is asked.
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
        self._trusted = trusted
        self._timeout_s = timeout_s
        self._interactive_timeout_s = interactive_timeout_s
        self._ids = itertools.count(1)

    async def check(self, sender: str, action: str, *, interactive: bool) -> None:
        """Raises NotAuthorizedError."""
        try:
            uid = await self._connection.peer_uid(sender)
        except (RemoteError, VmcryptdError):
            raise NotAuthorizedError(f"{sender} left before it was known who it is") from None
        if uid in self._trusted:
            return
        timeout_s = self._interactive_timeout_s if interactive else self._timeout_s
        try:
            allowed, challenge = await self._ask(sender, action, interactive, timeout_s)
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
                return
            reason = (
                "polkit wants a password, and the caller forbids to ask"
                if challenge
                else "polkit refused"
            )
        raise NotAuthorizedError(f"user {uid} may not do {action}: {reason}; root always may")

    async def _ask(
        self, sender: str, action: str, interactive: bool, timeout_s: float
    ) -> tuple[bool, bool]:
        cancellation = f"vmcryptd-{next(self._ids)}"
        subject = ["system-bus-name", {"name": Typed("s", sender)}]
        flags = _ALLOW_USER_INTERACTION if interactive else 0
        body = [subject, action, {}, flags, cancellation]
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
