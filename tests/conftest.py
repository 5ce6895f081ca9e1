# SPDX-License-Identifier: LGPL-2.1-or-later
"""For all tests: what asyncio only writes to its log is a failure."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_forgotten(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An error of a task that nobody looked at shows up when the task is collected, perhaps in a later test."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    assert not [
        record.getMessage()
        for record in records
        if record.name == "asyncio" and record.levelno >= logging.ERROR
    ]
