# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses durations in systemd's syntax, for the configuration, the command line and the simulated host."""

from __future__ import annotations

import math
import re

_YEAR_S = 365.25 * 86400

# systemd.time(7), "Parsing Time Spans". A month is the twelfth of a year, as in systemd.
_UNITS = {
    **dict.fromkeys(("usec", "us", "µs", "μs"), 1e-6),
    **dict.fromkeys(("msec", "ms"), 1e-3),
    **dict.fromkeys(("", "seconds", "second", "sec", "s"), 1),
    **dict.fromkeys(("minutes", "minute", "min", "m"), 60),
    **dict.fromkeys(("hours", "hour", "hr", "h"), 3600),
    **dict.fromkeys(("days", "day", "d"), 86400),
    **dict.fromkeys(("weeks", "week", "w"), 7 * 86400),
    **dict.fromkeys(("months", "month", "M"), _YEAR_S / 12),
    **dict.fromkeys(("years", "year", "y"), _YEAR_S),
}
# [0-9] and not \d, which also matches the digits of other scripts.
_PART = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµμ]*)")

# Timers, D-Bus and sd_notify(3) count microseconds in 64 bits; this leaves room for sums.
LONGEST_S = 100 * _YEAR_S
_LONGEST_TEXT = 100  # characters; every sensible duration is shorter
_SHOWN = 40  # characters of a refused text that an error repeats

_EXPECTED = 'expected a duration such as "90s", "2min" or "infinity"'
_TOO_LONG = 'expected a duration of at most 100 years, or "infinity"'


def duration(value: object) -> float:
    """Seconds of a duration in words, or of a plain number; `math.inf` for "infinity". Raises ValueError."""
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(_EXPECTED)
    if not value >= 0:  # also false for nan
        raise ValueError("expected a duration that is not negative")
    # Compared before it is converted: an int may be too large for a float.
    if LONGEST_S < value != math.inf:
        raise ValueError(_TOO_LONG)
    return float(value)


def _of_text(value: str) -> float:
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
    text = value.strip()
    if text == "infinity":
        return math.inf
    position, seconds = 0, 0.0
    while position < len(text) or not text:
        match = _PART.match(text, position)
        if match is None or match[2] not in _UNITS:
            raise ValueError(f'{_EXPECTED}, not "{shown}"')
        seconds += float(match[1]) * _UNITS[match[2]]
        position = match.end()
    if seconds > LONGEST_S or len(text) > _LONGEST_TEXT:
        raise ValueError(f'{_TOO_LONG}, not "{shown}"')
    return seconds
