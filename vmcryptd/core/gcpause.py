# SPDX-License-Identifier: LGPL-2.1-or-later
"""Python's garbage collector, kept out of the way of what makes many objects and no garbage."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def paused(function: Callable[P, T]) -> Callable[P, T]:
    """Let the collector wait while the function runs.

    It runs after so many new objects, and then walks all that live: ten times the objects cost it more than ten times
    the time. For functions that run to their end in one go, in the thread of the event loop.
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
