# SPDX-License-Identifier: LGPL-2.1-or-later
"""For all tests: what asyncio only writes to its log is a failure, and how long each took is written down."""

import gc
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine may take its time.
settings.register_profile("no times", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no times")

DURATIONS = Path(__file__).resolve().parents[1] / "build/durations.json"


class Durations:
    """Seconds by test, with its fixtures, of the last run of each: a slow one shows in a sorted list."""

    def __init__(self) -> None:
        self.took: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.took[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        try:
            before = json.loads(DURATIONS.read_text())
        except (OSError, ValueError):
            before = {}
        before = {test: took for test, took in before.items() if _file(test).exists()}
        rounded = {test: round(seconds, 2) for test, seconds in self.took.items()}
        slowest_first = sorted({**before, **rounded}.items(), key=lambda item: -item[1])
        DURATIONS.parent.mkdir(exist_ok=True)
        unfinished = DURATIONS.with_suffix(".new")
        unfinished.write_text(json.dumps(dict(slowest_first), indent=1) + "\n")
        unfinished.rename(DURATIONS)


def _file(test: str) -> Path:
    return DURATIONS.parents[1] / test.partition("::")[0]


def pytest_configure(config: pytest.Config) -> None:
    # A worker of pytest-xdist sends its reports to the one that writes.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations())


def pytest_collection_finish() -> None:
    # All of it lives until the end. Tests that collect their garbage need not look at it each time.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_forgotten(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An unretrieved error of a task shows up when the task is collected, perhaps in a later test."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    assert not [
        record.getMessage()
        for record in records
        if record.name == "asyncio" and record.levelno >= logging.ERROR
    ]
