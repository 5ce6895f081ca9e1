# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program's output as a key: through a pipe into sealed memory, bounded in size and time."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

from vmcryptd.core.errors import DeadlineError, VmcryptdError
from vmcryptd.posix.memfd import LIMIT, MemfdKey, Pump, TooLargeError
from vmcryptd.posix.run import CommandError, Completed, run


@contextlib.contextmanager
def filled(
    what: str, refusal: type[VmcryptdError], late: type[VmcryptdError] | None = None
) -> Iterator[MemfdKey]:
    """A key, sealed at the end of the block; every failure is raised as `refusal`.

    `late`: the error to raise when the program took too long.
    """
    key = MemfdKey()
    error = refusal
    try:
        yield key
        if 0 < key.size <= LIMIT:
            key.seal()
            return
        problem = f"{what} is larger than 8 MiB" if key.size else f"{what} is empty"
    except TooLargeError:
        problem = f"{what} is larger than 8 MiB"
    except CommandError as failed:
        problem = str(failed)
    except DeadlineError as failed:
        problem, error = str(failed), late or refusal
    except OSError as failed:
        problem = f"{what} cannot be read: {failed.strerror}"
    except BaseException:
        key.close()
        raise
    key.close()
    raise error(problem)


async def run_into(
    key: MemfdKey,
    argv: Sequence[str],
    *,
    timeout_s: float,
    stdin: int | None = None,
    environment: Mapping[str, str] | None = None,
    stderr_to_journal: bool = False,
) -> Completed:
    """Not into the memfd itself: an endless output must not fill the memory. Raises CommandError, DeadlineError."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pump = Pump(reader, key)
    try:
        child = asyncio.ensure_future(
            run(
                argv,
                stdin=stdin,
                stdout=writer,
                timeout_s=timeout_s,
                environment=environment,
                stderr_to_journal=stderr_to_journal,
            )
        )
        moving = asyncio.ensure_future(pump.run())
        try:
            # The pipe cannot end while our side is open: `moving` can end first only by an error.
            await asyncio.wait({child, moving}, return_when=asyncio.FIRST_COMPLETED)
            if not child.done():
                moving.result()
            done = await child
        finally:
            for task in (child, moving):
                task.cancel()
            await asyncio.gather(child, moving, return_exceptions=True)
        pump.step()  # the rest; a grandchild that keeps the pipe open is not waited for
        return done
    finally:
        os.close(reader)
        os.close(writer)
