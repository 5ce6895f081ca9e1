# SPDX-License-Identifier: LGPL-2.1-or-later
"""Durations: systemd's units, and bounds on what they may say."""

from __future__ import annotations

import contextlib
import math
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcryptd.cli import verbs
from vmcryptd.config import schema
from vmcryptd.core.durations import LONGEST_S, duration
from vmcryptd.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90), ("2min", 120), ("infinity", math.inf), ("0", 0), ("90", 90), (5, 5), (1.5, 1.5),
        ("1h 30min", 5400), ("1h30min5s", 5405), ("100ms", 0.1), ("1.5min", 90), (" 2 d ", 172800),
        ("1 hour 2 minutes 3 seconds", 3723), ("2 minutes", 120), ("5 msec", 0.005), ("7us", 7e-6),
        ("1w", 604800), ("1M", 2629800), ("1m", 60), ("2y", 63115200), ("100y", LONGEST_S),
        (math.inf, math.inf),
    ],
)  # fmt: skip
def test_durations(text: object, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", " ", "s", "-1", "1x", "1 2 3x", "Infinity", None, True, [], -0.1, "1,5s", "1h,", "1e300", "٣s"],
)  # fmt: skip
def test_refused_durations(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        duration(text)


@pytest.mark.parametrize(
    "value", ["99999999999999d", "9" * 300, "9" * 5000 + "s", 1e300, 10**300, 10**400, "101y", "0 " * 200]
)  # fmt: skip
def test_a_duration_is_bounded(value: object) -> None:
    with pytest.raises(ValueError, match="at most 100 years") as caught:
        duration(value)
    assert len(str(caught.value)) < 120


@given(st.one_of(st.text(), st.integers(), st.floats()))
def test_a_duration_is_a_number_or_refused(value: object) -> None:
    seconds = 0.0
    with contextlib.suppress(ValueError):
        seconds = duration(value)
    assert 0 <= seconds <= LONGEST_S or math.isinf(seconds)


@pytest.mark.parametrize(
    "text", ["1w 2d 3h 4min 5s", "1M", "1month", "1y", "2.5h", "1hr", "3 minutes", "90", "20ms", "7us"]
)  # fmt: skip
def test_it_means_what_systemd_means(text: str) -> None:
    shown = subprocess.run(
        ["systemd-analyze", "timespan", text], capture_output=True, text=True, check=True
    ).stdout
    microseconds = int(shown.partition("s: ")[2].split()[0])
    assert duration(text) * 1e6 == pytest.approx(microseconds)


def test_the_configuration_and_the_command_line_have_the_same_parser() -> None:
    settings = schema.parse({"vmcryptd.toml": '[daemon]\nkey_cache = "2 minutes"\n'})
    assert settings.daemon.key_cache_s == verbs.timeout("2 minutes") == 120
    assert verbs.timeout("infinity") is None
    with pytest.raises(verbs.UsageError, match="--timeout: expected a duration"):
        verbs.timeout("soon")
    with pytest.raises(ConfigError, match="at most 100 years"):
        schema.parse({"vmcryptd.toml": "[daemon]\nkey_cache = 1e300\n"})
