# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps a connection to libvirt, and follows its domains and pools.

Everything that blocks runs in daemon threads: a call may hang for as long as the service behind
libvirt's socket cannot start, and must hold up neither the event loop nor the end of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from vmcryptd.adapters.libvirt.session import Event, Reading, Refused, Session
from vmcryptd.core.errors import DeadlineError, LibvirtError
from vmcryptd.core.model import DiskSource, GuestState, Virtualisation
from vmcryptd.core.ports import Changed
from vmcryptd.posix.changes import Changes
from vmcryptd.posix.threads import DaemonThreads

P = ParamSpec("P")
T = TypeVar("T")

OPEN_S = 30.0  # systemd may have to start the service behind the socket first
READ_S = 60.0  # a thousand domains take some seconds
CLOSE_S = 2.0
# No event reports a change of autostart, and events can be lost: after one restart of libvirtd none
# came at all. So everything is read again after this time.
LOOK_S = 30.0
STARTING_S = 1.0  # between two looks at guests that libvirt itself is starting
BACK_OFF_S = (1.0, 30.0)

log = logging.getLogger(__name__)


class Link:
    """From its first use on, one task connects, reads the domain or pool of each event, and reconnects.

    `load` imports libvirt, in a thread; `attach` makes its events run in the loop, before it
    connects.
    """

    def __init__(
        self, uri: str, load: Callable[[], Any], attach: Callable[[asyncio.AbstractEventLoop], None]
    ) -> None:
        self._uri = uri
        self._load = load
        self._attach = attach
        self.virsh = "virsh" if uri == "qemu:///system" else f"virsh -c {uri}"
        self.known = Virtualisation()
        self.formats: dict[str, Mapping[DiskSource, str]] = {}  # by domain
        self.agents: set[str] = set()  # domains whose guest agent is connected
        self.learnt = Changes()  # of each reading, also if nothing differs
        self._different = Changes()
        self._is_announced = True  # no call of the watchers is queued
        self._keeper: asyncio.Task[None] | None = None
        self._session: Session | None = None
        self._lost = False
        self._failed = 0
        self._failure = ""
        self._hurry = asyncio.Event()  # a caller waits for a connection
        self._stale = asyncio.Event()
        self._stale_domains: set[str] = set()
        self._stale_pools: set[str] = set()
        self._reading = asyncio.Lock()  # a later reading must not be overwritten by an earlier one
        self._threads = DaemonThreads()
        self._partings: set[asyncio.Task[None]] = set()  # connections being closed

    def watch(self, changed: Changed) -> None:
        self._different.watch(changed)
        self._keep()

    async def refresh(self, timeout_s: float) -> Virtualisation:
        try:
            async with asyncio.timeout(_finite(timeout_s)):
                session = self._session
                if session is not None and self.known.reachable:
                    try:
                        await self._read(session)
                        return self.known
                    except Refused as error:
                        if not error.lost:
                            raise self._unreachable(str(error)) from None
                        self.mark(Event.CLOSED, "", session)
                await self._connected(
                    lambda: self.known.reachable and self._session not in (None, session)
                )
                return self.known
        except (TimeoutError, DeadlineError):
            raise self._unreachable(f"no answer within {timeout_s:g} s") from None

    async def close(self) -> None:
        """Stop following libvirt and disconnect; the domains go on."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        if self._partings:
            await asyncio.wait(self._partings)

    # --- the connection ---

    def _keep(self) -> None:
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._stay_connected())

    async def _stay_connected(self) -> None:
        first, longest = BACK_OFF_S
        pause = first
        while True:
            self._hurry.clear()
            connected = False
            try:
                session = await self._open()
                try:
                    await self._read(session)
                    log.info("connected to libvirt at %s", self._uri)
                    connected, pause, self._failure = True, first, ""
                    await self._follow(session)
                finally:
                    self._session = None
                    self._hang_up(session)
            except (Refused, DeadlineError, LibvirtError) as error:
                if str(error) != self._failure:  # once, not at every attempt
                    log.warning("libvirt at %s: %s", self._uri, error)
                self._failure = str(error)
            except Exception as error:
                log.exception("following libvirt failed")
                self._failure = str(error)
            if not connected:
                self._failed += 1
            # A service that was restarted is back at the first attempt, and nothing was wrong then.
            why = "" if connected else str(self._unreachable(self._failure))
            self.learn(self.known._replace(reachable=False, error=why))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._hurry.wait()
            pause = min(pause * 2, longest)

    async def _open(self) -> Session:
        api = await self._threads.call(OPEN_S, self._load)
        loop = asyncio.get_running_loop()
        self._attach(loop)

        def happened(event: Event, name: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.mark, event, name, session)

        session = Session(api, self._uri, happened)
        self._lost = False
        try:
            await self._threads.call(OPEN_S, partial(session.guarded, session.open))
        except BaseException:
            self._hang_up(session)
            raise
        self._session = session
        self.learn(self.known)  # wakes callers that wait for a connection
        return session

    def _hang_up(self, session: Session) -> None:
        async def part() -> None:
            with contextlib.suppress(DeadlineError):
                await self._threads.call(CLOSE_S, session.close)

        parting = asyncio.get_running_loop().create_task(part())
        self._partings.add(parting)
        parting.add_done_callback(self._partings.discard)

    async def _follow(self, session: Session) -> None:
        while not self._lost:
            domains, self._stale_domains = self._stale_domains, set()
            pools, self._stale_pools = self._stale_pools, set()
            if domains or pools:
                await self._read(session, domains, pools)
            # No event reports a start that failed.
            starting = [
                name
                for name, domain in self.known.domains.items()
                if domain.state is GuestState.STARTING
            ]
            try:
                async with asyncio.timeout(STARTING_S if starting else LOOK_S):
                    await self._stale.wait()
            except TimeoutError:
                await self._read(session, starting or None)
            self._stale.clear()
        raise LibvirtError("the connection was closed")

    def mark(self, event: Event, name: str, session: Session | None = None) -> None:
        if event is Event.DOMAIN:
            self._stale_domains.add(name)
        elif event is Event.POOL:
            self._stale_pools.add(name)
        elif session is self._session:
            self._lost = True
        self._stale.set()

    async def _connected(self, enough: Callable[[], bool]) -> None:
        """Wait until there is a connection, or the next attempt at one has failed."""
        self._keep()
        before = self._failed
        if not enough():
            self._hurry.set()
        await self.learnt.until(lambda: enough() or self._failed != before)
        if not enough():
            raise self._unreachable(self._failure)

    def _unreachable(self, why: str) -> LibvirtError:
        return LibvirtError(
            f"libvirt at {self._uri} cannot be reached: {why}; `{self.virsh} list` shows the same, "
            "`systemctl status virtqemud libvirtd` may show why"
        )

    # --- asking ---

    async def ask(
        self,
        timeout_s: float,
        method: Callable[Concatenate[Session, P], T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> T:
        """Raises Refused, LibvirtError."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        lost: Session | None = None
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._connected(lambda: self._session not in (None, lost))  # noqa: B023
            except TimeoutError:
                raise self._unreachable(f"no connection within {timeout_s:g} s") from None
            session = self._session
            assert session is not None
            call = partial(session.guarded, partial(method, session), *arguments, **named)
            left = deadline - asyncio.get_running_loop().time()
            try:
                return await self._threads.call(max(left, 0.0), call)
            except DeadlineError as error:
                raise Refused(f"libvirt did not answer: {error}", silent=True) from None
            except Refused as error:
                if not error.lost:
                    raise
                self.mark(Event.CLOSED, "", session)
                if lost is not None:
                    raise
                # libvirt's service was restarted. Every method may be repeated: each first looks what
                # is left to do.
                lost = session

    async def _read(
        self, session: Session, domains: Iterable[str] | None = None, pools: Iterable[str] = ()
    ) -> None:
        async with self._reading:
            call = partial(session.guarded, session.read, domains, pools)
            reading = await self._threads.call(READ_S, call)
            if session is self._session:
                self._take_in(reading)

    async def look_again(self, domains: Iterable[str] = (), pools: Iterable[str] = ()) -> None:
        """Have `current` show the result of a call at once; its event may come later."""
        if (session := self._session) is not None:
            with contextlib.suppress(Refused, DeadlineError, LibvirtError):
                await self._read(session, domains, pools)

    def _take_in(self, reading: Reading) -> None:
        domains = {} if reading.complete else dict(self.known.domains)
        pools = {} if reading.complete and reading.pools_known else dict(self.known.pools)
        if reading.complete:
            self.agents.clear()
            self.formats.clear()
        for name, seen in reading.domains.items():
            self.agents.discard(name)
            self.formats.pop(name, None)
            domains.pop(name, None)
            if seen is not None:
                domains[name] = seen.domain
                if seen.has_forgotten and (before := self.known.domains.get(name)):
                    domains[name] = seen.domain._replace(trouble=before.trouble)
                self.formats[name] = seen.contents.formats
                if seen.contents.agent_connected:
                    self.agents.add(name)
        for name, pool in reading.pools.items():
            pools.pop(name, None)
            if pool is not None:
                pools[name] = pool
        self.learn(Virtualisation(reachable=True, domains=domains, pools=pools))

    # --- waiting ---

    def learn(self, known: Virtualisation) -> None:
        different, self.known = known != self.known, known
        self.learnt.notify()
        if different and self._is_announced:
            self._is_announced = False
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._is_announced = True
        self._different.notify()


def _finite(timeout_s: float) -> float | None:
    return None if math.isinf(timeout_s) else timeout_s
