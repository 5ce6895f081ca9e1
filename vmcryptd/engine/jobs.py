# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps the running jobs, each with its goal, steps and results, and decides whether new ones may begin."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Container, Coroutine, Iterable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from vmcryptd.core.errors import (
    OVERTAKEN,
    BusyError,
    CancelledError,
    DependencyError,
    InternalError,
    ShuttingDownError,
    VmcryptdError,
)
from vmcryptd.core.goals import Goal, Plan, StepId, Verb
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import Infinity
from vmcryptd.core.ports import Memory
from vmcryptd.posix.changes import Changes

log = logging.getLogger(__name__)


class JobState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Job:
    """One goal that is pursued, and how far it has come."""

    def __init__(
        self,
        number: int,
        goal: Goal,
        may_ask: bool = True,
        without: frozenset[StepId] = frozenset(),
        deadline: float = Infinity,
    ) -> None:
        self.id = number
        self.goal = goal
        self.may_ask = may_ask  # a person may be asked for what it opens
        self.without = without  # steps of boot that were not requested again
        self.deadline = deadline  # event loop time, for stopping guests
        self.tasks: dict[StepId, asyncio.Task[None]] = {}
        self.state = JobState.RUNNING
        self.error: VmcryptdError | None = None
        self.progress = -1.0  # 0 to 1, if known
        self.is_stopped = False  # overtaken by another request: nothing new is begun
        self.task: asyncio.Task[None] | None = None
        # The latest plan, and what it was made from.
        self.planned: tuple[Graph, Plan] | None = None

    @property
    def is_rising(self) -> bool:
        return self.goal.is_rising

    def is_idle_but(self, needless: Container[StepId]) -> bool:
        """Whether nothing is under way for it, but for these steps."""
        return all(task.done() for step_id, task in self.tasks.items() if step_id not in needless)

    def forget(self, to_be_done: Container[StepId], but: Container[StepId] = ()) -> None:
        """Allow failed steps to be tried again, and done ones that were undone since to be repeated.

        `but`: these steps are not.
        """
        self.tasks = {
            step_id: task
            for step_id, task in self.tasks.items()
            if step_id in but or not (task.done() and (step_id in to_be_done or outcome(task)))
        }

    def failures(self) -> dict[StepId, VmcryptdError]:
        """Step → why it failed, without those that only failed because another did, if it is among them."""
        found = {
            step_id: error
            for step_id, task in self.tasks.items()
            if task.done() and (error := outcome(task)) is not None
        }
        own = {k: error for k, error in found.items() if not isinstance(error, DependencyError)}
        return own or found


class Unasked(NamedTuple):
    """Steps that a job without a request does not take."""

    done: frozenset[StepId]  # were done; if they are undone now, that was on purpose
    failed: frozenset[StepId]  # have failed for a reason that is still there

    @property
    def steps(self) -> frozenset[StepId]:
        return self.done | self.failed


class Jobs:
    """Those that run, and what goes on beside them."""

    def __init__(self, memory: Memory, changes: Changes) -> None:
        self.running: dict[int, Job] = {}
        self.is_closed = False
        self._memory = memory
        self._changes = changes
        self._numbers = itertools.count(1)
        self._going_down = 0  # requests to go down that are under way
        self._closing = 0  # of these, the ones that only close volumes
        self._beside: tuple[str, ...] = ()
        self._is_held = False  # what is kept stays as it is for now
        self._background: set[asyncio.Task[None]] = set()

    @property
    def is_going_down(self) -> bool:
        """Whether the host is on its way down: guests, too."""
        return self._going_down > self._closing

    @property
    def is_rising(self) -> bool:
        return any(job.is_rising for job in self.running.values())

    def check_may_begin(self, *, rising: bool) -> None:
        """Raises ShuttingDownError after `close`; BusyError on the way up while everything goes down."""
        if self.is_closed:
            raise ShuttingDownError("vmcryptd is stopping; ask again when it is back")
        if rising and self._going_down:
            raise BusyError("everything is being stopped and closed; try again when that is done")

    def register(
        self,
        goal: Goal,
        may_ask: bool = True,
        without: frozenset[StepId] = frozenset(),
        deadline: float = Infinity,
    ) -> Job:
        """A new job; `end` it. Raises as `check_may_begin`."""
        self.check_may_begin(
            rising=goal.is_rising or goal.verb in (Verb.ROTATE, Verb.CREATE_KEYSTORE)
        )
        job = Job(next(self._numbers), goal, may_ask, without, deadline)
        self.running[job.id] = job
        self._keep()
        return job

    def end(self, job: Job) -> None:
        job.state = JobState.FAILED if job.error else JobState.DONE
        self.running.pop(job.id, None)
        self._keep()
        self._changes.notify()

    async def ended(self, job: Job) -> None:
        await self._changes.until(lambda: job.id not in self.running)

    def may_ask(self, step: StepId) -> bool:
        """Whether a person may be asked for it: one of the jobs that want it says so."""
        return any(job.may_ask for job in self.running.values() if step in job.tasks)

    def stop_rising(self) -> None:
        """What comes up begins nothing new."""
        for job in self.running.values():
            job.is_stopped = job.is_stopped or job.is_rising

    @contextlib.contextmanager
    def going_down(self, *, only_volumes: bool = False) -> Iterator[None]:
        """Nothing comes up meanwhile."""
        self._going_down += 1
        self._closing += only_volumes
        self._changes.notify()
        try:
            yield
        finally:
            self._going_down -= 1
            self._closing -= only_volumes
            self._changes.notify()

    def close(self) -> None:
        """Nothing begins any more, and what is kept for the next daemon stays as it is."""
        self.is_closed = True
        for job in self.running.values():
            job.is_stopped = True

    # --- for the next daemon ---

    def keep_beside(self, *beside: str) -> None:
        """Keep something for the next daemon beside the present goals."""
        if beside != self._beside:
            self._beside = beside
            self._keep()

    @contextlib.contextmanager
    def kept_at_once(self) -> Iterator[None]:
        """What is kept changes at the end only: a daemon that is killed meanwhile has lost nothing."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self._keep()

    def _keep(self) -> None:
        if not self.is_closed and not self._is_held:
            rising = (job for job in self.running.values() if job.is_rising and job.may_ask)
            self._memory.keep_goals([*(str(job.goal) for job in rising), *self._beside])

    # --- beside the jobs ---

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Let it run in the background; an error is logged."""
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            trace = None if isinstance(error, VmcryptdError) else error
            log.error("in the background: %s", error, exc_info=trace)

    async def background_done(self) -> None:
        """Wait until what goes on beside the jobs has ended."""
        while self._background:
            await asyncio.wait(self._background)


def together(errors: Iterable[VmcryptdError]) -> VmcryptdError:
    """One error with all texts, of the first one's class. At least one is needed."""
    first, *more = errors
    texts = dict.fromkeys(str(error) for error in (first, *more))
    return type(first)("; ".join(texts)) if more else first


def outcome(task: asyncio.Task[None]) -> VmcryptdError | None:
    """The error of a finished task, if it failed."""
    if task.cancelled():
        return CancelledError(OVERTAKEN)
    error = task.exception()
    if error is None or isinstance(error, VmcryptdError):
        return error
    return InternalError("an internal error; the journal has the details")
