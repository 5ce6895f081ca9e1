# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job: one goal that is pursued, the steps begun for it, and how they ended."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from vmcryptd.core.errors import CancelledError, DependencyError, InternalError, VmcryptdError
from vmcryptd.core.goals import Goal, Plan, StepId
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import Infinity


class JobState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(eq=False)
class Job:
    """One goal that is pursued, and how far it has come."""

    id: int
    goal: Goal
    may_ask: bool = True  # a person may be asked for what it opens
    without: frozenset[StepId] = frozenset()  # steps of boot that nobody asked for again
    deadline: float = Infinity  # event loop time, for stopping guests
    tasks: dict[StepId, asyncio.Task[None]] = field(default_factory=dict)
    state: JobState = JobState.RUNNING
    error: VmcryptdError | None = None
    progress: float = -1.0  # 0 to 1, where that can be told
    is_stopped: bool = False  # overtaken by another request: nothing new is begun
    task: asyncio.Task[None] | None = None
    planned: tuple[Graph, Plan] | None = None  # the latest plan, and what it was made from

    @property
    def is_rising(self) -> bool:
        return self.goal.is_rising

    def is_idle_but(self, needless: Container[StepId]) -> bool:
        """Whether nothing is under way for it, but for these steps."""
        return all(task.done() for step_id, task in self.tasks.items() if step_id not in needless)

    def forget(self, to_be_done: Container[StepId], but: Container[StepId] = ()) -> None:
        """What failed may be tried again, and what was done and has been undone since may be done again.

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


def together(errors: Iterable[VmcryptdError]) -> VmcryptdError:
    """One error that tells all of them, of the kind of the first. At least one is needed."""
    first, *more = errors
    told = dict.fromkeys(str(error) for error in (first, *more))
    return type(first)("; ".join(told)) if more else first


def outcome(task: asyncio.Task[None]) -> VmcryptdError | None:
    """How a task that is done has failed, if it has."""
    if task.cancelled():
        return CancelledError("another request (lock, shutdown or panic) overtook this one")
    error = task.exception()
    if error is None or isinstance(error, VmcryptdError):
        return error
    return InternalError("an internal error; the journal has the details")
