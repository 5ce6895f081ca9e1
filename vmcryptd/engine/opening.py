# SPDX-License-Identifier: LGPL-2.1-or-later
"""The planned unlocks, and how far each is: what callers who wait for one go by."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto

from vmcryptd.core.goals import Action, StepId
from vmcryptd.engine.inventory import Inventory, Sight
from vmcryptd.engine.prompt import Answer, Prompt


class Phase(Enum):
    """Each goes on to the next, or to one after it; only TRYING can come back."""

    PLANNED = auto()  # it waits for what it stands behind
    BEHIND = auto()  # it waits for a keystore, and tries the answers that do not open that
    ABSENT = auto()  # it waits for its device or header
    TRYING = auto()  # header, sources, and the answers that are there
    WAITING = auto()  # its sources are exhausted: a person is asked
    ALONE = auto()  # the same, but no person is asked: a server may come back
    ENDED = auto()


class Opening:
    """One planned unlock."""

    def __init__(self, name: str, seen: Sight, phase: Phase = Phase.PLANNED) -> None:
        self.name = name
        self.seen = seen  # what there was of the volume when it was looked at last
        self.phase = phase


class Openings:
    """One for each volume that is planned to be opened, from then to the end of its step."""

    def __init__(self, inventory: Inventory, prompt: Prompt) -> None:
        self._inventory = inventory
        self._prompt = prompt
        self._openings: dict[str, Opening] = {}

    def plan(self, name: str) -> None:
        """The volume is to be opened; answers are kept for it from now on."""
        self._openings[name] = Opening(name, self._inventory.sight(name))
        self._inventory.unconfigured.opening.add(name)
        if self._inventory.settings.volumes[name].asks:
            self._prompt.expect(name)

    def end(self, name: str) -> None:
        """Its step has ended, or is about to: it takes no more answers."""
        if opening := self._openings.pop(name, None):
            opening.phase = Phase.ENDED
        self._inventory.unconfigured.opening.discard(name)
        self._prompt.release(name)

    def of(self, name: str) -> Opening:
        """The planned unlock of a volume; one that has ended if there is none."""
        return self._openings.get(name) or Opening(name, Sight(is_there=False), Phase.ENDED)

    def phase(self, name: str) -> Phase:
        opening = self._openings.get(name)
        return Phase.ENDED if opening is None else opening.phase

    def has_tried(self, answer: Answer, name: str) -> bool:
        """Whether the volume has tried the answer, or something else keeps it from that."""
        is_refused = name in answer.refused
        match self.phase(name):
            case Phase.ENDED:
                return True
            case Phase.ALONE:
                return is_refused or answer.only is None  # no typed answer is for it
            case Phase.WAITING:
                return is_refused
            case Phase.BEHIND:
                keystores = self._beneath(name)
                is_kept = is_refused or any(map(answer.refused.__contains__, keystores))
                return is_kept and self._prompt.is_behind(name)
            case Phase.PLANNED:
                # That this key does not open a keystore is no reason not to try it on the volume.
                bearing = self._inventory.graph.bearing([name])
                return any(
                    lower in bearing and lower in answer.refused for lower in self._beneath(name)
                )
        return False  # it is about to try it, to end, or to fail

    def is_left_out(self, name: str, running: Collection[StepId]) -> bool:
        """Whether the volume, or one that it needs, lacks a device that nothing is about to bring."""
        names = (name, *self._beneath(name))
        if not any(self.phase(one) is Phase.ABSENT for one in names):
            return False
        if self.phase(name) is not Phase.ABSENT:
            return True
        return not any(step.action in (Action.ACTIVATE, Action.MOUNT) for step in running)

    def _beneath(self, name: str) -> list[str]:
        graph = self._inventory.graph
        return graph.beneath([name])[:-1] if name in graph.volumes else []
