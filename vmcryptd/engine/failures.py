# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collects the failures of one volume's key sources, and sums them up in one error."""

from __future__ import annotations

import logging

from vmcryptd.core import events
from vmcryptd.core.errors import (
    KeyFileMissingError,
    KeyUnavailableError,
    NotYetError,
    VmcryptdError,
    WrongKeyError,
)

log = logging.getLogger(__name__)

_ANSWERS = {"key", "prompt"}  # the sources of answers, beside those of the configuration


class Failures:
    """The last failure of each source."""

    def __init__(self, volume: str, uuid: str = "") -> None:
        self._volume = volume
        self._uuid = uuid
        self._errors: dict[str, VmcryptdError] = {}

    def __contains__(self, source: str) -> bool:
        return source in self._errors

    @property
    def is_answered(self) -> bool:
        """Whether an answer was among them."""
        return not _ANSWERS.isdisjoint(self._errors)

    def note(self, source: str, error: VmcryptdError) -> None:
        """A source of the configuration has failed; logged when it did not fail so before."""
        why = str(error).removeprefix(f"volume {self._volume}: ")
        failure = type(error)(f"{source}: {why}")
        if str(failure) != str(self._errors.get(source)):
            event = events.WRONG_KEY if isinstance(error, WrongKeyError) else events.UNLOCK
            extra = events.fields(
                event, volume=self._volume, uuid=self._uuid, source=source, error=error
            )
            log.warning("volume %s: %s", self._volume, failure, extra=extra)
        self._errors[source] = failure

    def note_answer(self, source: str, error: WrongKeyError) -> None:
        """An answer does not fit."""
        self._errors[source] = error

    def summary(self) -> VmcryptdError:
        """Why the volume is still locked when all have failed."""
        name, errors = self._volume, list(self._errors.values())
        if not errors:
            return KeyUnavailableError(
                f"volume {name}: it has no key source that works without a person; "
                f"`vmcryptctl unlock {name}` asks"
            )
        if len(errors) == 1 and isinstance(errors[0], WrongKeyError):
            return errors[0]
        cls: type[VmcryptdError] = KeyUnavailableError
        if any(isinstance(error, KeyFileMissingError) for error in errors):
            cls = KeyFileMissingError
        elif all(isinstance(error, WrongKeyError) for error in errors):
            cls = WrongKeyError
        listed = "; ".join(map(str, errors))
        return cls(
            f"volume {name}: none of its key sources opened it: {listed}; "
            f"`vmcryptctl unlock {name}` takes a passphrase"
        )


def together(errors: list[VmcryptdError]) -> VmcryptdError:
    """One for several: one that may open it later counts more than one that never will."""
    kinds = (NotYetError, KeyUnavailableError, WrongKeyError)
    kind = next(kind for kind in kinds if any(isinstance(error, kind) for error in errors))
    return kind("; ".join(map(str, errors)))
