# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmcryptctl: turns a command line into calls on the bus; messages go to stderr, data to stdout."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Any

from vmcryptd.bus.client import Change, Client, connect
from vmcryptd.cli import verbs
from vmcryptd.cli.output import (
    UNWRITABLE,
    changing,
    check_names,
    discard_output,
    page,
    print_json,
    report,
    say,
)
from vmcryptd.cli.render import (
    CHANGED_ON_DISK,
    Snapshot,
    change,
    guest_members,
    has_failed,
    opening,
    panicked,
    printable,
    snake,
    status_members,
    volume_members,
)
from vmcryptd.cli.verbs import UsageError, Verb
from vmcryptd.core.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    EXIT_WAITING,
    BusyError,
    ConfigError,
    NotAuthorizedError,
    StillWaitingError,
    UnreachableError,
    VmcryptdError,
)
from vmcryptd.core.wording import few
from vmcryptd.posix.notify import extend_timeout, notify

INTERRUPTED = 130  # as in a shell: 128 and the number of SIGINT

# While boot still determines the volumes of its guests, a question may follow.
CONSOLE_SETTLE_S = 1.0
CONSOLE_MARGIN_S = 30.0
# The time for closing after the guests had theirs.
CLOSING_S = 300.0
LONGEST_STOP_S = 86400.0
SNAPSHOT_S = 1.0
# The daemon always answers root within 3 s.
PANIC_ANSWER_S = 5.0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    _fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a replaced stream
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is not None:
            raise
        discard_output()
        code = EXIT_OK  # the reader has closed the pipe
        if not isinstance(error, BrokenPipeError):
            say(f"standard output cannot be written: {error.strerror}")
            code = EXIT_FAILED
    return code


def _fill_standard_descriptors() -> None:
    """Open those that the caller has closed, so that no socket of ours gets their number and our output."""
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            # Standard output is opened for reading only: lost output must be an error.
            os.set_inheritable(os.open(os.devnull, flags), True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _run(argv: list[str]) -> int:
    try:
        if not argv or argv in (["-h"], ["--help"], ["help"]):
            (sys.stdout if argv else sys.stderr).write(verbs.overview())
            return EXIT_OK if argv else EXIT_USAGE
        if argv[0] == "help":
            argv = [*argv[1:], "--help"]
        if argv[0] == "--version":
            from vmcryptd import __version__

            print(f"vmcryptctl {__version__}")
            return EXIT_OK
        verb, arguments = verbs.parse(argv)
        try:
            return asyncio.run(_carried_out(verb, arguments))
        except VmcryptdError as error:
            if error.exit_code != EXIT_UNREACHABLE or verb.name not in ("shutdown", "panic"):
                raise
            from vmcryptd.cli import without_daemon

            return without_daemon.go_down(verb.name, str(error), lambda: RUN[verb.name](arguments))
    except SystemExit as asked:  # --help of a verb
        return int(asked.code or 0)
    except UsageError as error:
        say(str(error))
        return EXIT_USAGE
    except VmcryptdError as error:
        say(str(error))
        return error.exit_code


async def _carried_out(verb: Verb, arguments: Namespace) -> int:
    for argument in verb.arguments:
        if argument.completes in ("volumes", "names") and not argument.name.startswith("-"):
            await _resolve_paths(arguments, argument.name)
    return await RUN[verb.name](arguments)


async def _resolve_paths(arguments: Namespace, name: str) -> None:
    """Replace paths of devices and mappings by the names of volumes."""
    given = getattr(arguments, name)
    words = given if isinstance(given, list) else [given]
    if any("/" in word or "=" in word for word in words):
        from vmcryptd.cli.volume_paths import resolve

        async with connect() as client:
            await client.load()
        names = resolve(words, client.volumes)
        setattr(arguments, name, names if isinstance(given, list) else names[0])


# --- reading ---


async def _status(arguments: Namespace) -> int:
    async with connect() as client:
        await client.load()
    volumes, guests = list(client.volumes.values()), list(client.guests.values())
    jobs = list(client.jobs.values())
    names = set(arguments.NAME)
    if unknown := sorted(names - set(client.volumes) - set(client.guests)):
        for name in unknown:
            known = [*client.volumes, *client.guests]
            say(f'there is no volume and no guest "{name}"{verbs.near(name, known)}')
        return EXIT_USAGE
    if names:
        volumes = [values for values in volumes if values["Name"] in names]
        guests = [values for values in guests if values["Name"] in names]
    if arguments.failed:
        volumes = list(filter(has_failed, volumes))
        guests = list(filter(has_failed, guests))
    if arguments.json:
        print_json(status_members(client.host, volumes, guests, jobs))
        return EXIT_OK
    shown = page()
    if arguments.failed and not (volumes or guests):
        lines = ["nothing has failed"]
    elif names or arguments.failed:
        lines = [*shown.volumes(volumes, jobs), *shown.guests(guests)][1:]
    else:
        if not arguments.all:
            members = "Needs", "StartsAtBoot", "LastError"
            guests = [values for values in guests if any(values[key] for key in members)]
        lines = shown.status(client.host, volumes, guests, jobs)
    print("\n".join(lines))
    return EXIT_OK


async def _plan(arguments: Namespace) -> int:
    import json

    async with connect() as client:
        [text] = await client.call("Plan", "s", arguments.GOAL)
        is_old = await client.is_config_changed()
    plan = json.loads(text)
    if arguments.json:
        print_json(plan)
    else:
        print("\n".join(page().plan(plan)))
    if is_old:
        say(CHANGED_ON_DISK)
    return EXIT_OK


async def _check(arguments: Namespace) -> int:
    from pathlib import Path

    from vmcryptd.audit import check

    candidate = arguments.config
    if candidate is None:
        findings = await check.problems()
        is_old = await _runs_older_files()
    else:
        findings = await check.problems(Path(candidate), required=True)
        is_old = False
    if arguments.json:
        print_json(
            {
                "ok": check.exit_status(findings) == EXIT_OK,
                "findings": [one._asdict() for one in findings],
                "config_changed": is_old,
            }
        )
    elif findings:
        print("\n".join(page().findings([one._asdict() for one in findings])))
    else:
        print("nothing is wrong: boot will work")
    if is_old:
        say(CHANGED_ON_DISK)
    return check.exit_status(findings)


async def _runs_older_files() -> bool:
    """Whether the running daemon has not read the present files."""
    with contextlib.suppress(VmcryptdError):  # `check` needs no daemon, and starts none
        async with connect() as client:
            return await client.is_running() and await client.is_config_changed()
    return False


async def _wait(arguments: Namespace) -> int:
    timeout_s = None if arguments.timeout is None else verbs.timeout(arguments.timeout)
    async with connect() as client:
        await client.follow()
        ended = await client.until(lambda: client.host["State"] in ("ready", "degraded"), timeout_s)
    state, off = str(client.host["State"]), list(client.host.get("Off", ()))
    error = str(client.host.get("LastError", ""))
    reasons = [error] if error else []
    reasons += [
        f"{one['Name']}: {one['LastError']}"
        for one in (*client.volumes.values(), *client.guests.values())
        if one["LastError"]
    ]
    if arguments.json:
        members = {"state": state, "waiting": list(client.host["Waiting"]), "off": off}
        print_json({**members, "reasons": reasons})
    if not ended:
        waiting = few(client.host["Waiting"])
        why = f"a passphrase is missing for {waiting}" if waiting else f"the state is {state}"
        say(f"not ready within {arguments.timeout}: {why}")
        return EXIT_WAITING
    if state == "degraded":
        for reason in reasons or ["some of it is not up; `vmcryptctl status` shows more"]:
            say(reason)
        return EXIT_FAILED
    if arguments.all and off:
        say(f"off: {', '.join(off)}; `vmcryptctl start {' '.join(off)}` starts what should run")
        return EXIT_FAILED
    return EXIT_OK


async def _monitor(arguments: Namespace) -> int:
    import time

    changes: asyncio.Queue[Change] = asyncio.Queue()
    async with connect() as client:
        await client.follow(changes.put_nowait)
        if not arguments.json:
            first = page().status(
                client.host, [*client.volumes.values()], [*client.guests.values()]
            )[0]
            print(first, flush=True)
        lost = asyncio.ensure_future(client.until(lambda: False))
        while True:
            coming = asyncio.ensure_future(changes.get())
            await asyncio.wait({coming, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                lost.result()
            what = coming.result()
            if arguments.json:
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                members = {"time": stamp, "event": what.event, "type": what.kind, "name": what.name}
                print_json({**members, **_members(what)}, indent=None)
            else:
                print(time.strftime("%H:%M:%S"), printable(change(*what)), flush=True)


def _members(what: Change) -> dict[str, Any]:
    if what.event == "added" and what.kind == "volume":
        return volume_members(what.values)
    if what.event == "added" and what.kind == "guest":
        return guest_members(what.values)
    return snake(what.values) if what.event != "removed" else {}


async def _names(arguments: Namespace) -> int:
    with contextlib.suppress(Exception):  # a shell completes: no messages here
        async with connect() as client:
            if await client.is_running():
                await client.load()
        tables = {"volumes": [client.volumes], "guests": [client.guests]}
        for table in tables.get(arguments.WHAT, [client.volumes, client.guests]):
            for name in table:
                print(name)
    return EXIT_OK


# --- changing ---


async def _unlock(arguments: Namespace) -> int:
    timeout_s = None if arguments.timeout is None else verbs.timeout(arguments.timeout)
    async with changing() as client:
        await client.follow()
        try:
            async with asyncio.timeout(timeout_s):
                return await _opened(client, arguments)
        except TimeoutError:
            names = arguments.VOLUME or list(client.host["Waiting"])
            left = [name for name in names if client.volumes[name]["State"] != "unlocked"]
            what = f"still locked: {few(left)}" if left else "vmcryptd goes on with it"
            raise StillWaitingError(f"not open within {arguments.timeout}; {what}") from None


async def _opened(client: Client, arguments: Namespace) -> int:
    from vmcryptd.cli import unlock

    names = arguments.VOLUME
    check_names(client, names)
    if arguments.key_file is not None:
        from vmcryptd.cli.key_input import from_file

        async with from_file(arguments.key_file) as key:
            failed = await unlock.with_key(client, names, key, say)
        report(unlock.named(failed))
        return unlock.exit_status(client, names, failed)
    if arguments.no_ask:
        failed = await unlock.without_asking(client, names)
        is_needed = any(error.exit_code == EXIT_WAITING for error in failed.values())
        if is_needed and (hint := unlock.unread_key()):
            say(hint)
    else:
        can_ask = client.interactive
        failed = await unlock.Unlocking(client, names, can_ask=can_ask, say=say).run()
    return report(failed.values())


async def _lock(arguments: Namespace) -> int:
    failed: dict[str, VmcryptdError] = {}
    async with changing() as client:
        if not arguments.VOLUME:
            await client.call("LockAll")
        left = list(dict.fromkeys(arguments.VOLUME))
        while left:
            refused = await _called(client, "Lock", left)
            failed.update(refused)
            busy = [name for name, error in refused.items() if isinstance(error, BusyError)]
            if len(busy) == len(left):
                break
            # Closing a volume frees the ones it stood on.
            for name in busy:
                del failed[name]
            left = busy
    return report(failed[name] for name in dict.fromkeys(arguments.VOLUME) if name in failed)


async def _start(arguments: Namespace) -> int:
    from vmcryptd.cli.guests import start_each

    async with changing() as client:
        failed = await start_each(client, arguments.GUEST, say)
    return report(failed.values())


async def _stop(arguments: Namespace) -> int:
    async with changing() as client:
        failed = await _called(client, "StopGuest", arguments.GUEST)
    return report(failed.values())


async def _restart(arguments: Namespace) -> int:
    from vmcryptd.cli.guests import start_each

    async with changing() as client:
        failed = await _called(client, "StopGuest", arguments.GUEST)
        failed |= await start_each(
            client, [name for name in arguments.GUEST if name not in failed], say
        )
    return report(failed.values())


async def _called(client: Client, method: str, names: list[str]) -> dict[str, VmcryptdError]:
    """Call a method for each name, one after the other. Returns the failures."""
    failed: dict[str, VmcryptdError] = {}
    for name in names:
        try:
            await client.call(method, "s", name)
        except UnreachableError:
            raise
        except VmcryptdError as error:
            failed[name] = error
    return failed


async def _boot(arguments: Namespace) -> int:
    async with changing() as client:
        await client.call("Boot")
    print("booting: `vmcryptctl status` shows how far it is, `vmcryptctl wait` waits for its end")
    return EXIT_OK


async def _panic(arguments: Namespace) -> int:
    async with changing() as client:
        await client.ping(PANIC_ANSWER_S)  # do not wait for a silent daemon
        before = await _snapshot(client)
        failure = None
        try:
            await client.call("Panic")
        except (UnreachableError, NotAuthorizedError):
            raise
        except VmcryptdError as error:
            failure = error
        with contextlib.suppress(VmcryptdError):
            await client.ping()  # all earlier changes arrive before the answer
        try:
            print("\n".join(panicked(before, Snapshot.of(client))), flush=True)
        except OSError:
            discard_output()
    return EXIT_OK if failure is None else report([failure])


async def _snapshot(client: Client) -> Snapshot:
    """The state before panic, for its report. Panic neither needs it nor waits for it."""
    with contextlib.suppress(VmcryptdError, TimeoutError):
        async with asyncio.timeout(SNAPSHOT_S):
            await client.follow()
    return Snapshot.of(client)


async def _reload(arguments: Namespace) -> int:
    async with changing() as client:
        await client.call("Reload")
    return EXIT_OK


async def _shutdown(arguments: Namespace) -> int:
    _extend_stop()

    def show(what: Change) -> None:
        # The console shows this at host shutdown.
        if what.kind in ("guest", "volume") and "State" in what.values and what.event == "changed":
            try:
                print(printable(change(*what)), flush=True)
            except OSError:
                discard_output()  # the output is closed; the work goes on

    async with changing() as client:
        await client.follow(show)
        await client.call("Shutdown")
    return EXIT_OK


def _extend_stop() -> None:
    """Extend the unit's stop timeout to `shutdown_timeout` and the time to close."""
    if "NOTIFY_SOCKET" not in os.environ:
        return
    with contextlib.suppress(Exception):  # else the unit's own timeout holds
        from vmcryptd.config import files
        from vmcryptd.core.model import Settings

        try:
            settings = files.load(validated=files.VALIDATED)
        except ConfigError:  # what is done without a daemon goes by these, too
            settings = files.last_valid(files.VALIDATED) or Settings()
        _notify_longer(settings.daemon.shutdown_timeout_s + CLOSING_S)


async def _console(arguments: Namespace) -> int:
    # No error here may stop the boot.
    with contextlib.suppress(Exception):
        async with connect() as client:
            await client.follow(lambda _: _notify_status(client))
            _notify_status(client)
            longest_s = client.host["ConsolePromptUSec"] / 1e6
            if longest_s > 0:
                _notify_longer(longest_s + CONSOLE_MARGIN_S)
                async with asyncio.timeout(longest_s):
                    await _while_console_is_needed(client)
    return EXIT_OK


async def _while_console_is_needed(client: Client) -> None:
    while any(job.get("Goal") == "boot" for job in client.jobs.values()):
        if not await client.until(lambda: bool(client.host["ConsoleNeeded"]), CONSOLE_SETTLE_S):
            return
        await client.until(lambda: not client.host["ConsoleNeeded"])


def _notify_longer(seconds: float) -> None:
    """Extend this start or stop to so long from now."""
    extend_timeout(min(seconds, LONGEST_STOP_S))


def _notify_status(client: Client) -> None:
    """While a unit starts, systemd shows this on the console after the unit's name."""
    done, count = opening(client.volumes.values())
    text = f"{done} of {count} open"
    if client.host["Waiting"]:
        text += f", waiting for the passphrase of {few(client.host['Waiting'])}"
    notify(f"STATUS={printable(text)}")


# --- verbs of two words ---


def _keys(name: str) -> Callable[[Namespace], Coroutine[Any, Any, int]]:
    async def run(arguments: Namespace) -> int:
        from vmcryptd.cli import keys

        return await keys.RUN[name](arguments)

    return run


RUN: dict[str, Callable[[Namespace], Coroutine[Any, Any, int]]] = {
    "status": _status,
    "unlock": _unlock,
    "lock": _lock,
    "start": _start,
    "stop": _stop,
    "restart": _restart,
    "boot": _boot,
    "shutdown": _shutdown,
    "panic": _panic,
    "plan": _plan,
    "check": _check,
    "wait": _wait,
    "monitor": _monitor,
    "reload": _reload,
    "console": _console,
    "_names": _names,
}
RUN |= {verb.name: _keys(verb.name) for verb in verbs.VISIBLE if " " in verb.name}

if __name__ == "__main__":
    sys.exit(main())
