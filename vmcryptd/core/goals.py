# SPDX-License-Identifier: LGPL-2.1-or-later
"""Goals, and the steps that reach them, as values; text only at the edges (bus, JSON, state files)."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Self

from vmcryptd.core.errors import GoalError


class Verb(StrEnum):
    BOOT = "boot"
    SHUTDOWN = "shutdown"
    LOCK_ALL = "lock-all"
    UNLOCK = "unlock"
    LOCK = "lock"
    START = "start"
    STOP = "stop"
    ROTATE = "rotate"  # a new volume key: a job without a plan
    CREATE_KEYSTORE = "create-keystore"  # likewise


_OF_THE_HOST = (Verb.BOOT, Verb.SHUTDOWN, Verb.LOCK_ALL)
_OF_ONE = (Verb.UNLOCK, Verb.LOCK, Verb.START, Verb.STOP)
_RISING = frozenset((Verb.BOOT, Verb.UNLOCK, Verb.START))
GOALS = (*map(str, _OF_THE_HOST), *(f"{verb}:NAME" for verb in _OF_ONE))


class Goal(NamedTuple):
    """A verb, and the name of its volume or guest; empty for the whole host."""

    verb: Verb
    name: str = ""

    def __str__(self) -> str:
        return f"{self.verb}:{self.name}" if self.name else str(self.verb)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The goal in a caller's or state file's text: `boot`, `unlock:NAME`. Raises GoalError."""
        word, _, name = text.partition(":")
        known = _OF_ONE if name else (*_OF_THE_HOST, *_OF_ONE)
        for verb in known:
            if verb == word:
                return cls(verb, name)
        raise GoalError(f'"{text}" is no goal; expected one of {", ".join(GOALS)}')

    @property
    def is_rising(self) -> bool:
        """Whether the goal brings something up."""
        return self.verb in _RISING


BOOT = Goal(Verb.BOOT)
SHUTDOWN = Goal(Verb.SHUTDOWN)
LOCK_ALL = Goal(Verb.LOCK_ALL)


class Action(StrEnum):
    UNLOCK = "unlock"
    ACTIVATE = "activate"  # the volume group on a volume
    MOUNT = "mount"
    START_POOL = "start-pool"
    START = "start"
    STOP = "stop"
    STOP_POOL = "stop-pool"
    UNMOUNT = "unmount"
    DEACTIVATE = "deactivate"
    LOCK = "lock"


class StepId(NamedTuple):
    """An action and its object. It is unique in a plan."""

    action: Action
    object: str

    def __str__(self) -> str:
        return f"{self.action}:{self.object}"

    @property
    def subject(self) -> str:
        """The object as sentences name it."""
        match self.action:
            case Action.START | Action.STOP:
                return f"guest {self.object}"
            case Action.START_POOL | Action.STOP_POOL:
                return f"storage pool {self.object}"
        return f"volume {self.object}"


class Step(NamedTuple):
    """One action on one object, to be done after all steps named in `after`.

    The steps in `after` must have succeeded; those in `order` must only have ended.
    """

    id: StepId
    after: tuple[StepId, ...] = ()
    order: tuple[StepId, ...] = ()
    reason: str = ""

    @property
    def action(self) -> Action:
        return self.id.action

    @property
    def object(self) -> str:
        return self.id.object


class Plan(NamedTuple):
    """Ordered steps: each comes after all steps that it names."""

    goal: Goal
    steps: tuple[Step, ...] = ()
