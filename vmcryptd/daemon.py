# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the daemon from engine, adapters and bus, and runs it until a signal stops it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vmcryptd import __version__, service
from vmcryptd.adapters.systemd import host, polkit, state_files
from vmcryptd.bus import transport
from vmcryptd.bus.objects import Objects
from vmcryptd.config import files as configuration
from vmcryptd.config.tables import Tables
from vmcryptd.core.errors import BusyError, ConfigError, DeadlineError, VmcryptdError
from vmcryptd.core.model import Infinity, Settings
from vmcryptd.core.ports import Ports
from vmcryptd.core.requester import REQUESTER, Requester
from vmcryptd.engine.engine import Engine
from vmcryptd.posix import journal, notify
from vmcryptd.posix.file_watch import FileWatch
from vmcryptd.posix.host_lock import DAEMON, HostLock
from vmcryptd.posix.threads import DaemonThreads

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 86400.0
# Panic waits this long for libvirt's list of running guests.
PANIC_LIBVIRT_S = 5.0

LOAD_S = 30.0  # for reading the configuration again, and for parsing it
RUNTIME = Path("/run/vmcryptd")
STATE = Path("/var/lib/vmcryptd")


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    journal.log_to_journal(logging.DEBUG if arguments.debug else logging.INFO)
    keep_out_of_core_dumps()
    try:
        code = asyncio.run(_serve(arguments))
    except ConfigError as error:
        for mistake in error.mistakes:
            log.error("%s", mistake.text)
        log.error("the configuration is refused; `vmcryptctl check` says what to write")
        code = error.exit_code
    except VmcryptdError as error:
        log.error("%s", error)
        code = error.exit_code
    # A call into libvirt that hangs sits in a thread; nothing must wait for it.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


class Arguments:
    """The command line."""

    config: Path | None = None
    sim: Path | None = None
    bus: str | None = None
    debug: bool = False


def _arguments(argv: list[str]) -> Arguments:
    if not argv:
        return Arguments()  # as systemd starts it: no parser is imported
    import argparse

    parser = argparse.ArgumentParser(
        prog="vmcryptd",
        description="Open encrypted volumes, then start the guests that live on them. See vmcryptd(8).",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help="configuration directory instead of /etc/vmcryptd",
    )
    parser.add_argument(
        "--sim",
        type=Path,
        metavar="FILE",
        help="simulate the host that FILE describes; changes nothing",
    )
    parser.add_argument("--bus", metavar="ADDRESS", help="D-Bus address instead of the system bus")
    parser.add_argument("--debug", action="store_true", help="log every step")
    parser.add_argument("--version", action="version", version=f"vmcryptd {__version__}")
    return parser.parse_args(argv, Arguments())


def keep_out_of_core_dumps() -> None:
    """Neither this process nor its children leave their memory in a core dump (core(5), coredump_filter)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/coredump_filter").write_text("0", encoding="ascii")


def real_ports(settings: Settings, directory: Path = configuration.DIRECTORY) -> Ports:
    """The adapters that work on this host."""
    from vmcryptd.adapters.keysources.sources import SystemKeys
    from vmcryptd.adapters.libvirt.domains import Libvirt
    from vmcryptd.adapters.luks.format import CryptsetupFormatting
    from vmcryptd.adapters.luks.key_slots import CryptsetupSlots
    from vmcryptd.adapters.luks.mappings import Cryptsetup
    from vmcryptd.adapters.luks.reencrypt import CryptsetupReencryption
    from vmcryptd.adapters.storage.blocks import SysfsBlocks

    return Ports(
        blocks=SysfsBlocks(),
        crypt=Cryptsetup(),
        slots=CryptsetupSlots(),
        formatting=CryptsetupFormatting(),
        tables=Tables(directory),
        reencryption=CryptsetupReencryption(),
        keys=SystemKeys(),
        domains=Libvirt(settings.daemon.libvirt_uri),
        host=host.SystemdHost(),
        memory=state_files.StateFiles(RUNTIME, STATE),
    )


class Source:
    """The configuration files, and their texts when they were last applied."""

    def __init__(
        self,
        directory: Path,
        read: Callable[[], Mapping[str, str]],
        parse: Callable[[Mapping[str, str]], Settings],
        keep: Callable[[Mapping[str, str], Settings], None] = lambda texts, settings: None,
        *,
        parses_in_thread: bool = True,
    ) -> None:
        self._directory = directory
        self._read, self._parse, self._keep = read, parse, keep
        self._parses_in_thread = parses_in_thread
        self._threads = DaemonThreads()
        self._loads = 0
        self._loaded: tuple[Mapping[str, str], Settings] = {}, Settings()
        self._running: tuple[Mapping[str, str], Settings] = self._loaded
        self._keeping: set[asyncio.Task[None]] = set()
        self._one_keeps = threading.Lock()  # two would write the same temporary file

    def load(self) -> Settings:
        """Raises ConfigError."""
        self._loads += 1
        texts = self._read()
        settings = self._parse(texts)
        self._loaded = texts, settings
        return settings

    async def load_again(self) -> Settings:
        """The same in a thread: building models takes time, and the files may lie on a disk that hangs.

        Raises ConfigError, and DeadlineError when the files cannot be read in time.
        """
        while True:
            self._loads += 1
            mine = self._loads
            texts = await self._threads.call(LOAD_S, self._read)
            if self._parses_in_thread:
                parse = functools.partial(self._parse, texts)
                settings = await self._threads.call(LOAD_S, parse)
            else:
                settings = self._parse(texts)
            if mine == self._loads:  # else newer texts were applied meanwhile
                self._loaded = texts, settings
                return settings

    def taken_over(self) -> None:
        """Note that the configuration loaded last is applied."""
        self._running = self._loaded

    def keep(self) -> None:
        """Keep what runs for the next start, and for a shutdown without a daemon."""
        with self._one_keeps:
            self._keep(*self._running)

    def keep_beside(self) -> None:
        """The same beside the loop: it is written to a disk."""
        keeping = asyncio.get_running_loop().create_task(self._kept_beside())
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)

    async def _kept_beside(self) -> None:
        try:
            await self._threads.call(LOAD_S, self.keep)
        except DeadlineError as error:
            log.warning("the configuration is not kept for the next start: %s", error)

    def texts(self) -> Mapping[str, str] | None:
        """The present texts of the files; None if they cannot be read."""
        try:
            return self._read()
        except ConfigError:
            return None

    def differs(self, texts: Mapping[str, str] | None) -> bool:
        return texts != self._running[0]

    def watched(self) -> list[Path]:
        files = map(Path, {**self._loaded[0], **self._running[0]})
        return [self._directory, self._directory / configuration.DROP_INS, *files]


def _composition(arguments: Arguments) -> tuple[Settings, Ports, Source]:
    if arguments.sim is not None:
        from vmcryptd.adapters.sim.host import Simulation, read

        simulation = Simulation.load(arguments.sim)
        source = Source(
            arguments.sim.parent,
            functools.partial(read, arguments.sim),
            lambda texts: simulation.reload(next(iter(texts.values()))),
            parses_in_thread=False,  # the simulated host changes with it
        )
        return source.load(), simulation.ports(), source

    directory = arguments.config or configuration.DIRECTORY
    source = Source(
        directory,
        functools.partial(configuration.read, directory, required=arguments.config is not None),
        functools.partial(configuration.settings, validated=configuration.VALIDATED),
        functools.partial(configuration.keep, configuration.VALIDATED),
    )
    settings = source.load()
    return settings, real_ports(settings, directory), source


async def _serve(arguments: Arguments) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if arguments.sim is None and not await _hold_alone(stop):
        return 0
    connection = await transport.connect(arguments.bus)
    # The user who runs the simulation is its administrator.
    trusted = {polkit.ROOT} if arguments.sim is None else {polkit.ROOT, os.getuid()}
    authority = polkit.Polkit(connection, trusted=frozenset(trusted))
    objects = Objects(connection, service.ROOT, authority)
    # Before anything is read or written: a second daemon must not change anything.
    await objects.own(service.NAME)
    settings, ports, source = _composition(arguments)
    engine = Engine(settings, ports)
    engine.start()
    source.taken_over()
    source.keep()
    await engine.inventory.look()

    @contextlib.contextmanager
    def reloading() -> Iterator[None]:
        notify.notify(f"RELOADING=1\nMONOTONIC_USEC={int(loop.time() * 1e6)}")
        try:
            yield
        except VmcryptdError as error:
            log.error("the configuration is refused, the running one is kept: %s", error)
            raise
        finally:
            files.look_again()
            notify.ready()

    def take_over(settings: Settings) -> None:
        before = engine.settings.daemon.libvirt_uri
        engine.configure(settings)
        source.taken_over()
        source.keep_beside()
        shown.config_changed = False
        log.info("the configuration was read again")
        if engine.settings.daemon.libvirt_uri != before:
            log.warning("the new libvirt_uri counts from the next `systemctl restart vmcryptd`")

    one_at_a_time = asyncio.Lock()

    async def reload() -> None:
        async with one_at_a_time:
            with reloading():
                take_over(await source.load_again())

    engine.keystores.read_again = reload
    shown = service.Service(engine, objects, reload)

    def looked(texts: Mapping[str, str] | None) -> None:
        shown.config_changed = source.differs(texts)
        shown.changed()

    files = FileWatch(source.watched, source.texts, looked)
    engine.changes.watch(shown.changed)
    objects.serve()
    notify.ready()
    # The objects made so far live as long as the process: the collector need not visit them.
    gc.freeze()
    files.start()
    watchdog = asyncio.create_task(_watchdog())
    engine.inventory.watch_libvirt()
    engine.resume()
    waits = [asyncio.create_task(stop.wait()), asyncio.create_task(connection.closed())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    notify.stopping()
    watchdog.cancel()
    files.close()
    await objects.stop()
    engine.close()
    await ports.memory.kept()
    if not stop.is_set():
        log.error("the connection to the bus is lost; starting again")
        return 1
    await connection.disconnect()
    return 0


async def _watchdog() -> None:
    interval_s = notify.watchdog_interval_s()
    while interval_s is not None:
        notify.alive()
        await asyncio.sleep(interval_s)


# Held until the process ends.
_lock = HostLock()


async def _hold_alone(stop: asyncio.Event) -> bool:
    """Take the host's lock. False if the daemon is to stop before it has it. Raises BusyError.

    `vmcryptctl shutdown` or `panic` may be doing the daemon's work in their own process: one would open what the
    other closes.
    """
    if _lock.try_hold(DAEMON):
        return True
    holder = _lock.holder()
    if holder is not None and holder.role == DAEMON:
        raise BusyError(f"{holder} runs already; `systemctl restart vmcryptd` starts it anew")
    log.warning("%s works in its own process; vmcryptd starts when that has ended", holder)
    notify.extend_timeout(LONGEST_WAIT_S)
    notify.notify(f"STATUS=Waiting for {holder} to end")
    holding = asyncio.create_task(_lock.hold(DAEMON, Infinity))
    stopping = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait({holding, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if holding not in done:
        holding.cancel()
        return False
    holding.result()
    return True


def down_here(verb: str) -> None:
    """`shutdown` or `panic` in this process, when the daemon or the bus is dead. Raises VmcryptdError.

    The caller holds the host's lock. If the configuration has a mistake, the last valid one is used.
    """
    journal.log_to_journal()
    keep_out_of_core_dumps()
    REQUESTER.set(Requester(os.getuid(), is_here=True))

    async def run() -> None:
        with contextlib.ExitStack() as stack:
            engine, ports = _engine_here(stack)
            await engine.inventory.look()
            withdrawal = asyncio.create_task(ports.host.reach_target(False))
            try:
                if verb == "panic":
                    # Without libvirt's answer no guest can be killed, and each keeps its volumes open.
                    with contextlib.suppress(VmcryptdError):
                        await ports.domains.refresh(PANIC_LIBVIRT_S)
                    await engine.panic()
                else:
                    await engine.shutdown()
            finally:
                await asyncio.wait({withdrawal})
                await engine.background_done()
                await ports.memory.kept()

    asyncio.run(run())


def _engine_here(stack: contextlib.ExitStack) -> tuple[Engine, Ports]:
    """Going down until the stack ends. On the settings in the files, else the last that a daemon ran with, else on what
    is known to be open.

    Raises ConfigError if none of these is there.
    """
    refused: ConfigError | None = None
    for what, load in _SETTINGS_HERE:
        try:
            if (settings := load()) is None:
                continue
            ports = real_ports(settings)
            engine = Engine(settings, ports)
            stack.enter_context(engine.going_down())
            engine.start()  # the volumes may need each other in a circle, which is refused here
        except ConfigError as error:
            if refused is None:
                refused = error
                log.error("%s", error)
            continue
        if refused is not None:
            if not settings.volumes and not engine.graph.volumes:
                break
            log.error("%s", what)
        return engine, ports
    assert refused is not None  # an empty configuration is never refused
    raise refused


_SETTINGS_HERE: tuple[tuple[str, Callable[[], Settings | None]], ...] = (
    ("", lambda: configuration.load(validated=configuration.VALIDATED)),
    (
        "the last valid configuration is used",
        lambda: configuration.last_valid(configuration.VALIDATED),
    ),
    ("there is no valid configuration: what vmcryptd has opened is closed", Settings),
)


if __name__ == "__main__":
    sys.exit(main())
