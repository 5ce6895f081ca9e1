# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pauses Python's garbage collector for functions that make many objects and no garbage."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def paused(function: Callable[P, T]) -> Callable[P, T]:
    """Pause the collector while the function runs.

    The collector runs after a number of new objects and then visits all live ones, so its cost grows faster than their
    number. For functions without `await`, in the thread of the event loop.
    """

    @functools.wraps(function)
    def wrapper(*arguments: P.args, **named: P.kwargs) -> T:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*arguments, **named)
        finally:
            if was_enabled:
                gc.enable()

    return wrapper
