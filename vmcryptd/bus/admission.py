# SPDX-License-Identifier: LGPL-2.1-or-later
"""Orders the calls that arrive: every user has a fair share, and trusted ones need not wait for others.

The share is per user, not per connection: dbus-daemon allows 256 connections a user, with 128 calls
that are not answered yet on each. All of them arrive on the one socket of the daemon, so what is
there is read at once, and sorted before any of it is parsed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from vmcryptd.bus import transport
from vmcryptd.bus.transport import Call, Connection, RemoteError
from vmcryptd.bus.wire import Frame
from vmcryptd.core.errors import VmcryptdError

MAX_QUEUED = 128  # calls of one user that wait for their turn
MAX_QUEUED_BYTES = 128 * 1024
MAX_QUEUED_FDS = 64  # as many as dbus-daemon keeps for one receiver
MAX_FDS = 4  # descriptors of one call; no method takes more than two
MAX_OWED = 4096  # calls of one user whose refusal waits; the rest get no answer
MAX_UNREAD = 4 * 1024 * 1024  # bytes of answers that one user has not fetched from the bus
MAX_UNSENT = 1024 * 1024  # bytes that the bus has not taken from us
# After a call a user waits this many times as long as the call took.
REST = 3
TURN_S = 0.01  # then the loop does something else first
REFUSAL_S = 0.002  # between two refusals to one user: a flood is no faster for being refused
LOOK_AGAIN_S = 1.0
MAX_LANES = 64  # users that are remembered after they have left, so that their wait goes on

_Refusal = tuple[str, str]  # name, text
_FULL = transport.STANDARD_ERROR + "LimitsExceeded"
_TOO_MANY = (_FULL, "too many calls of this user wait already")
_TOO_LARGE = (_FULL, "the arguments are too large")


class _Lane:
    """The calls of one user, or of one connection whose user is not known yet."""

    def __init__(self, uid: int = -1, *, is_trusted: bool = False) -> None:
        self.uid = uid
        self.is_trusted = is_trusted
        self.frames: deque[Frame] = deque()
        self.size = self.fds = 0
        self.owed: deque[tuple[Frame, _Refusal]] = deque()
        self.rests_until = self.pays_at = 0.0
        self.unread: dict[str, int] = {}  # connection → bytes of answers since last looked at
        self.is_deaf = False

    def add(self, frame: Frame) -> None:
        """Queue a call, or note that it is to be refused."""
        if frame.size > transport.MAX_MESSAGE:
            self._refuse(frame, _TOO_LARGE)
        elif self.is_trusted or (
            len(self.frames) < MAX_QUEUED
            and (self.size + frame.size <= MAX_QUEUED_BYTES or not self.frames)
            and len(frame.fds) <= MAX_FDS
            and self.fds + len(frame.fds) <= MAX_QUEUED_FDS
        ):
            self.frames.append(frame)
            self.size += frame.size
            self.fds += len(frame.fds)
        else:
            self._refuse(frame, _TOO_MANY)

    def take(self) -> Frame:
        frame = self.frames.popleft()
        self.size -= frame.size
        self.fds -= len(frame.fds)
        return frame

    def drop(self, sender: str) -> None:
        """Forget a connection that is gone."""
        kept = [frame for frame in self.frames if frame.sender != sender]
        for frame in self.frames:
            if frame.sender == sender:
                frame.close()
        self.frames = deque(kept)
        self.size = sum(frame.size for frame in kept)
        self.fds = sum(len(frame.fds) for frame in kept)
        self.owed = deque(one for one in self.owed if one[0].sender != sender)
        self.unread.pop(sender, None)

    def _refuse(self, frame: Frame, refusal: _Refusal) -> None:
        frame.close()
        if frame.wants_reply and len(self.owed) < MAX_OWED:
            self.owed.append((frame._replace(data=b""), refusal))


class Admission:
    """Queues the calls that arrive on a connection, and has them served one after the other.

    `trusted`: users who are served first, and without limits.
    """

    def __init__(
        self, connection: Connection, serve: Callable[[Call], None], trusted: frozenset[int]
    ) -> None:
        self._connection = connection
        self._serve = serve
        self._trusted = trusted
        self.epoch = 0  # how often a call that overtakes all earlier ones was carried out
        self._is_open = False
        self._uids: dict[str, int] = {}  # connection → user
        self._unknown: dict[str, _Lane] = {}  # by connection, while the bus is asked for its user
        self._lanes: dict[int, _Lane] = {}  # by user, the one served last at the end
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn_due: asyncio.Handle | None = None
        connection.on_frame = self._arrived
        connection.writer.on_drained = self._schedule

    def open(self) -> None:
        """Serve from here on; what arrived before has waited."""
        self._is_open = True
        self._schedule()

    def charge(self, call: Call, cost_s: float) -> None:
        """The call costs more than its own time: a child, another process that is asked."""
        lane = self._lanes.get(call.uid)
        if lane is not None and not lane.is_trusted:
            lane.rests_until = asyncio.get_running_loop().time() + REST * cost_s

    def answered(self, call: Call | Frame, size: int) -> None:
        """So many bytes were sent to the caller. The bus keeps them until it reads them.

        The bus counts them as ours, and reads nothing more from us when they are too many
        (dbus-daemon(1), max_incoming_bytes: 127 MiB).
        """
        lane = self._lanes.get(self._uids.get(call.sender, -1))
        if lane is None or lane.is_trusted:
            return
        lane.unread[call.sender] = lane.unread.get(call.sender, 0) + size
        if not lane.is_deaf and sum(lane.unread.values()) > MAX_UNREAD:
            lane.is_deaf = True
            self._start(self._until_read(lane))

    def vanished(self, sender: str) -> None:
        """The connection is gone from the bus."""
        for lane in (self._unknown.pop(sender, None), self._lanes.get(self._uids.pop(sender, -1))):
            if lane is not None:
                lane.drop(sender)

    def _arrived(self, frame: Frame) -> None:
        frame = frame._replace(epoch=self.epoch)
        uid = self._uids.get(frame.sender)
        if uid is not None:
            self._lane(uid).add(frame)
            self._schedule()
            return
        lane = self._unknown.get(frame.sender)
        if lane is None:
            lane = self._unknown[frame.sender] = _Lane()
            self._start(self._find_user(frame.sender))
        lane.add(frame)

    async def _find_user(self, sender: str) -> None:
        try:
            uid = await self._connection.peer_uid(sender)
        except (RemoteError, VmcryptdError):
            self.vanished(sender)
            return
        waited = self._unknown.pop(sender, None)
        if waited is None:
            return  # it left in the meantime
        self._uids[sender] = uid
        lane = self._lane(uid)
        for frame in waited.frames:
            lane.add(frame)
        lane.owed += waited.owed
        self._schedule()

    def _lane(self, uid: int) -> _Lane:
        if uid not in self._lanes:
            if len(self._lanes) >= MAX_LANES:
                self._forget_lanes()
            self._lanes[uid] = _Lane(uid, is_trusted=uid in self._trusted)
        return self._lanes[uid]

    def _forget_lanes(self) -> None:
        now, present = asyncio.get_running_loop().time(), set(self._uids.values())
        for uid, lane in list(self._lanes.items()):
            if uid not in present and max(lane.rests_until, lane.pays_at) <= now:
                del self._lanes[uid]

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- turns ---

    def _schedule(self, at: float | None = None) -> None:
        """Have a turn in the next round of the loop, or at a time."""
        if not self._is_open:
            return
        loop = asyncio.get_running_loop()
        if isinstance(self._turn_due, asyncio.TimerHandle):
            self._turn_due.cancel()
            self._turn_due = None
        if self._turn_due is None:
            self._turn_due = (
                loop.call_soon(self._turn) if at is None else loop.call_at(at, self._turn)
            )

    def _turn(self) -> None:
        self._turn_due = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        end = now + TURN_S
        while now < end and (lane := self._next(now)) is not None:
            began = time.thread_time()  # CPU time: others' load does not count
            self._serve_one(lane)
            cost_s, now = time.thread_time() - began, loop.time()
            if not lane.is_trusted:
                lane.rests_until = max(lane.rests_until, now + REST * cost_s)
                self._lanes[lane.uid] = self._lanes.pop(lane.uid)
        for lane in self._lanes.values():
            self._pay(lane, now)
        self._plan_turn(now)

    def _next(self, now: float) -> _Lane | None:
        ready = None
        for lane in self._lanes.values():
            if lane.frames and lane.is_trusted:
                return lane
            if ready is None and lane.frames and lane.rests_until <= now and self._may(lane):
                ready = lane
        return ready

    def _may(self, lane: _Lane) -> bool:
        return not lane.is_deaf and self._connection.writer.unsent < MAX_UNSENT

    def _serve_one(self, lane: _Lane) -> None:
        frame = lane.take()
        try:
            call = self._connection.call_of(frame)
        except ValueError as error:
            frame.close()
            self._refuse(frame, transport.STANDARD_ERROR + "InvalidArgs", str(error))
        else:
            self._serve(call._replace(uid=lane.uid, is_trusted=lane.is_trusted, epoch=frame.epoch))

    def _pay(self, lane: _Lane, now: float) -> None:
        while lane.owed and (lane.is_trusted or (lane.pays_at <= now and self._may(lane))):
            frame, refusal = lane.owed.popleft()
            self._refuse(frame, *refusal)
            lane.pays_at = max(lane.pays_at, now - TURN_S) + REFUSAL_S

    def _refuse(self, frame: Frame, name: str, text: str) -> None:
        self.answered(frame, self._connection.refuse(frame, name, text))

    def _plan_turn(self, now: float) -> None:
        times = []
        for lane in self._lanes.values():
            if lane.is_trusted:
                times += [now] if lane.frames else []
            elif self._may(lane):  # else a turn comes when it may again
                times += [lane.rests_until] if lane.frames else []
                times += [lane.pays_at] if lane.owed else []
        if times:
            self._schedule(max(min(times), now) if min(times) > now else None)

    # --- answers that are not read ---

    async def _until_read(self, lane: _Lane) -> None:
        """Leave a user's calls alone until its connections have read what they were sent."""
        while True:
            for sender in list(lane.unread):
                unread = await self._unread(sender)
                if sender in lane.unread:
                    lane.unread[sender] = unread
            lane.unread = {sender: size for sender, size in lane.unread.items() if size}
            if sum(lane.unread.values()) <= MAX_UNREAD // 2:
                break
            await asyncio.sleep(LOOK_AGAIN_S)
        lane.is_deaf = False
        self._schedule()

    async def _unread(self, sender: str) -> int:
        """Bytes that the bus holds for a connection. 0 if the bus does not count them."""
        try:
            [stats] = await self._connection.call(
                transport.DRIVER, transport.DRIVER_PATH, transport.DRIVER + ".Debug.Stats",
                "GetConnectionStats", "s", [sender], timeout_s=25,
            )  # fmt: skip
        except (RemoteError, VmcryptdError, ValueError):
            return 0
        return int(stats.get("OutgoingBytes", 0)) if isinstance(stats, dict) else 0
