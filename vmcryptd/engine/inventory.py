# SPDX-License-Identifier: LGPL-2.1-or-later
"""Observes the host through the ports, and keeps the graph up to date."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NamedTuple

from vmcryptd.core import events, identity, planner
from vmcryptd.core import graph as graphs
from vmcryptd.core.errors import (
    AmbiguousDeviceError,
    DeadlineError,
    LibvirtError,
    VmcryptdError,
)
from vmcryptd.core.events import Event, Fields
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import (
    BlockDevice,
    Content,
    DiskSource,
    GuestState,
    Header,
    Observation,
    Remembered,
    Settings,
    SourceKind,
    Virtualisation,
    VolumeSpec,
)
from vmcryptd.core.ports import Blocks, Crypt, Domains, Memory
from vmcryptd.core.redaction import Redaction
from vmcryptd.engine.unconfigured import Unconfigured
from vmcryptd.posix.changes import Changes

log = logging.getLogger(__name__)

# One look serves all events within this time: a mapping that comes makes about five. Most are of our own steps, whose
# end is looked at at once.
COALESCE_S = 0.2
LIBVIRT_TIMEOUT_S = 30.0
AUTOSTART_S = 5.0  # for the guests to be read anew
# Backing chains are read side by side: a disk that does not answer holds up its own guest only.
CHAIN_READERS = 4


class Sight(NamedTuple):
    """The visible parts of a volume that is to be opened."""

    is_there: bool  # device and header, and the disk answers
    device: BlockDevice | None = None
    places: tuple[str | None, str | None] = (None, None)  # what the header's path leads to
    key_files: frozenset[str] = frozenset()

    def promises_more_than(self, before: Sight) -> bool:
        """Whether another attempt may succeed where the one before failed."""
        if not self.is_there:
            return False
        same_place = self[:3] == before[:3]
        return not same_place or not self.key_files <= before.key_files


class Inventory:
    """Configuration and observation, and the graph of both."""

    def __init__(
        self, settings: Settings, blocks: Blocks, crypt: Crypt, domains: Domains, memory: Memory
    ) -> None:
        self.settings = settings  # with what has left the configuration and is open still
        self._configured = settings
        self.unconfigured = Unconfigured(memory)
        self.redacted = Redaction()
        self.graph = Graph()
        self.uuids: dict[str, str] = {}  # volume → UUID, as its header says
        self.reencrypting: set[str] = set()  # volumes whose header says that this is unfinished
        self.activated: set[str] = set()  # volumes whose group was activated since they were opened
        self.changes = Changes()  # of anything that is shown
        self.rebuilt = Changes()  # of the graph
        self._blocks = blocks
        self._crypt = crypt
        self._domains = domains
        self._memory = memory
        self._published: dict[str, bool] | None = None  # mapping → whether a guest's disk
        self._fitted: dict[str, dict[str, int]] = {}
        self._once: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()
        self._chains: dict[str, tuple[str, ...]] = {}
        # Of each chain the members that were there when it was read: those beneath could be read.
        self._chains_read: dict[str, frozenset[str]] = {}
        self.libvirt_error: LibvirtError | None = None  # why boot does without guests
        self._boot_set: tuple[list[str], list[str]] = [], []
        self._boot_set_of: Graph | None = None
        self._observation = Observation()
        self._may_follow_libvirt = False
        self._look: asyncio.TimerHandle | None = None
        self._shared: asyncio.Future[None] | None = None
        self._reading: dict[asyncio.Task[None], str] = {}  # of backing chains, by image
        self._readers = asyncio.Semaphore(CHAIN_READERS)
        self._looker: asyncio.Task[None] | None = None
        self._wanted: list[asyncio.Future[None] | None] = []  # looks that have not begun

    def start(self) -> None:
        """Look for the first time, and from then on whenever a device or mount changes."""
        paths, uuids = self._memory.seen()
        self._fitted = self._memory.fitted()
        self._once = frozenset(), frozenset(self._memory.due_once())
        self._observation = Observation(remembered=Remembered(paths, uuids))
        self.unconfigured.start()
        self.configure(self.settings)
        self._blocks.watch(self.changed)
        self._crypt.watch(self.changed)

    def watch_libvirt(self) -> None:
        """Connect to libvirt and follow it, from the moment on that something is configured."""
        self._may_follow_libvirt = True
        self._follow_libvirt()

    def _follow_libvirt(self) -> None:
        if self._may_follow_libvirt and self.needs_libvirt:
            self._may_follow_libvirt = False  # once is for good
            self._domains.watch(self.changed)

    @property
    def needs_libvirt(self) -> bool:
        return bool(self.settings.volumes or self.settings.guests)

    @property
    def boot_set(self) -> tuple[list[str], list[str]]:
        """The volumes and guests that boot brings up, as planner.boot_set; worked out once a graph."""
        if self._boot_set_of is not self.graph:
            self._boot_set_of, self._boot_set = self.graph, planner.boot_set(self.graph)
        return self._boot_set

    def mapping_of(self, uuid: str) -> str:
        """The name of the open mapping of the LUKS header with this UUID, configured or not; else empty."""
        self.observe()
        devices = self._observation.storage.devices.values()
        return next((device.dm_name for device in devices if device.luks_uuid == uuid), "")

    async def know_libvirt(self) -> None:
        """Have libvirt answer once before boot ends; `libvirt_error` tells if it does not."""
        if not self.needs_libvirt or self._domains.current().reachable:
            return
        try:
            await self._domains.refresh(LIBVIRT_TIMEOUT_S)
            self.libvirt_error = None
        except VmcryptdError as error:
            self.libvirt_error = LibvirtError(f"{error}; guests start when it is back")
            log.error("%s", self.libvirt_error)
        self.observe()

    async def know_autostart(self) -> None:
        """Read the guests anew if libvirt is there: no event reports `virsh autostart`."""
        if not self._domains.current().reachable:
            return
        try:
            await self._domains.refresh(AUTOSTART_S)
        except VmcryptdError as error:
            log.warning("%s; the guests are as they were seen last", error)
        self.observe()

    async def know_libvirt_going_down(self) -> None:
        """The same before the way down, which goes on without."""
        if self.needs_libvirt and not self._domains.current().reachable:
            try:
                await self._domains.refresh(LIBVIRT_TIMEOUT_S)
            except VmcryptdError as error:
                log.warning(
                    "%s; guests cannot be stopped, what they do not hold is closed all the same",
                    error,
                )
        self.observe()

    def configure(self, settings: Settings) -> None:
        """Take a new configuration. Raises GraphError, and then the old one stays."""
        observation = self._observe(settings)
        graph = graphs.build(settings, observation)
        self.unconfigured.configure(settings, self.graph, self.uuids)
        self._configured, self.settings, self.graph = settings, settings, graph
        self.redacted.learn(settings)
        self._observation = observation
        self._add_unconfigured()
        self._remember()
        self._read_chains()
        self._follow_libvirt()
        self.changed()  # no file system has been asked for its new paths yet

    def changed(self) -> None:
        """Something is different: look soon."""
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(COALESCE_S, self._look_for_all)

    async def look(self) -> None:
        """Look now, once for all callers in this turn of the loop."""
        if self._shared is None:
            self._shared = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(self._look_for_all)
        await asyncio.wait({self._shared})

    def _look_for_all(self) -> None:
        self._no_look_soon()
        shared, self._shared = self._shared, None
        self._wanted.append(shared)
        if self._looker is None or self._looker.done():
            self._looker = asyncio.create_task(self._look_while_wanted())

    async def _look_while_wanted(self) -> None:
        """One look at a time: what is wanted meanwhile is served together by the next, which sees all of it.

        Side by side, a look that began earlier could end later, and looks would wait for each other's file systems.
        """
        while self._wanted:
            wanted, self._wanted = self._wanted, []
            try:
                await self._blocks.look(self._paths(self.settings))
                self.observe()
            except Exception:
                log.exception("looking at the host failed")
            finally:
                for shared in wanted:
                    if shared is not None and not shared.done():
                        shared.set_result(None)

    def _no_look_soon(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def observe(self) -> None:
        """Look at devices and mounts now, as far as that cannot block; if anything changed, rebuild the graph."""
        observation = self._observe(self.settings)
        if observation == self._observation:
            return
        self._observation = observation
        try:
            self.graph = graphs.build(self.settings, observation)
            self._add_unconfigured()
        except VmcryptdError as error:
            log.error("%s; vmcryptd goes on with what it knew before", error)
            return
        for name, node in self.graph.volumes.items():
            if not node.is_open:
                self.activated.discard(name)
        self._remember()
        self._read_chains()
        self.rebuilt.notify()
        self.changes.notify()

    def _add_unconfigured(self) -> None:
        """Have the graph know what is open although it is not configured any more. Raises GraphError."""
        while True:
            settings = self.unconfigured.added_to(self._configured, self._observation.storage)
            if settings.volumes != self.settings.volumes:
                self.graph = graphs.build(settings, self._observation)
                self.settings = settings
            elif not self.unconfigured.drop_closed(self.graph):
                return

    def accept_header(self, name: str, header: Header) -> None:
        """Keep what is to be known of a volume's header without reading it again.

        Raises AmbiguousDeviceError, WrongUuidError: then the header may be another disk's, and nothing is kept.
        """
        self.observe()  # a copy may have come just now
        node = self.graph.volumes.get(name)
        if node is not None:
            if node.rivals:
                raise AmbiguousDeviceError(node.trouble)
            identity.check_header(node.spec, header.uuid, self.settings, self._observation)
        self.uuids[name] = header.uuid
        if header.is_reencrypting:
            self.reencrypting.add(name)
        else:
            self.reencrypting.discard(name)

    def event(self, event: Event, volume: str, **more: Any) -> dict[str, Fields]:
        """The journal's fields of what happened to a volume; `more`: as for `events.fields`."""
        return events.fields(event, volume=volume, uuid=self.uuids.get(volume, ""), **more)

    def check_alone(self, spec: VolumeSpec) -> None:
        """Whether no copy has come since the header was read. Raises AmbiguousDeviceError."""
        if spec.has_tag:
            self.observe()
            node = self.graph.volumes.get(spec.name)
            if node is not None and node.rivals:
                raise AmbiguousDeviceError(node.trouble)

    def exists(self, path: str) -> bool:
        """Whether a block device or file that some guest or volume names is there."""
        return self._observation.storage.has(path)

    def sight(self, name: str) -> Sight:
        """The visible parts of a volume before it is opened."""
        node, storage = self.graph.volumes[name], self._observation.storage
        files = (one.argument for one in node.spec.keys if one.kind is SourceKind.FILE)
        return Sight(
            is_there=not node.absent and node.spec.header_path not in self._observation.silent,
            device=storage.devices.get(node.device),
            places=(
                storage.links.get(node.spec.header_path),
                storage.files.get(node.spec.header_path),
            ),
            key_files=frozenset(path for path in files if storage.has(path)),
        )

    def fitted(self, volume: str, source: str) -> int | None:
        """The key slot that a key from this source opened last time."""
        return self._fitted.get(volume, {}).get(source)

    def note_fitted(self, volume: str, source: str, slot: int) -> None:
        if self.fitted(volume, source) != slot:
            known = {
                name: slots for name, slots in self._fitted.items() if name in self.graph.volumes
            }
            self._fitted = {**known, volume: {**known.get(volume, {}), source: slot}}
            self._memory.keep_fitted(self._fitted)

    def forget_fitted(self, volume: str, slot: int | None = None) -> None:
        """The key slot is wiped, or all that there were: what gets its number next is another one."""
        known = self._fitted.get(volume, {})
        left = {} if slot is None else {s: number for s, number in known.items() if number != slot}
        if left != known:
            self._fitted = {**self._fitted, volume: left}
            self._memory.keep_fitted(self._fitted)

    def _observe(self, settings: Settings) -> Observation:
        virtualisation = self._started_once(self._domains.current())
        return self._observation._replace(
            storage=self._blocks.observe(self._paths(settings)),
            virtualisation=virtualisation,
            uuids=dict(self.uuids),
            chains=dict(self._chains),
            activated=frozenset(self.activated),
            silent=self._crypt.silent(),
        )

    def _paths(self, settings: Settings) -> list[str]:
        return sorted(graphs.wanted_paths(settings, self._domains.current(), self._chains))

    def _started_once(self, known: Virtualisation) -> Virtualisation:
        """With the mark of `virsh autostart --once` on guests that had it when the host went down.

        libvirt takes it away with its own attempt, which fails while the volume is locked.
        """
        _, due = self._once
        if known.reachable:
            domains = known.domains
            marked = frozenset(name for name, domain in domains.items() if domain.autostart_once)
            not_yet = (GuestState.OFF, GuestState.STARTING)
            due = frozenset(n for n in due if n in domains and domains[n].state in not_yet)
            if (marked, due) != self._once:
                self._once = marked, due
                self._memory.keep_once(*self._once)
        if not (due := due & known.domains.keys()):
            return known
        still = {name: known.domains[name]._replace(autostart_once=True) for name in due}
        return known._replace(domains={**known.domains, **still})

    def _remember(self) -> None:
        """Keep what is open for the next daemon, and where things lie: after the next boot that cannot be seen."""
        self.unconfigured.keep(self.graph.volumes.values())
        self._publish()
        old, storage = self._observation.remembered, self._observation.storage
        paths, uuids = dict(old.paths), dict(old.uuids)
        for name, node in self.graph.volumes.items():
            if node.uuid:
                uuids[name] = node.uuid
            if node.device and node.spec is self.settings.volumes.get(name):
                paths[node.spec.device_path] = node.stands_on
        is_seen = storage.links.keys() | storage.files.keys()
        paths |= {path: on for path, on in self.graph.lies_on.items() if path in is_seen}
        paths = {path: volumes for path, volumes in paths.items() if volumes}
        if (paths, uuids) != (old.paths, old.uuids):
            self._observation = self._observation._replace(remembered=Remembered(paths, uuids))
            self._memory.keep_seen(paths, uuids)

    def _publish(self) -> None:
        mappings = {}
        for name, node in self.graph.volumes.items():
            mappings[name] = mappings[node.mapping or name] = node.spec.content is Content.GUEST
        if mappings != self._published:
            self._published = mappings
            self._memory.publish(mappings)

    def _read_chains(self) -> None:
        """Follow the backing chains of disks that have become readable, be it a qcow2 image on a block device."""
        virtualisation = self._observation.virtualisation
        for domain in virtualisation.domains.values():
            for source in domain.sources:
                path = virtualisation.path_of(source)
                if self._is_unread(path):
                    self._chains_read[path] = self._readable(path)
                    task = asyncio.create_task(self._read(path, source))
                    self._reading[task] = path
                    task.add_done_callback(self._reading.pop)

    def _readable(self, path: str) -> frozenset[str]:
        has = self._observation.storage.has
        return frozenset(filter(has, self._chains.get(path, ())))

    def _is_unread(self, path: str) -> bool:
        if not self._observation.storage.has(path):
            return False
        return path not in self._chains_read or not self._readable(path) <= self._chains_read[path]

    async def _read(self, path: str, source: DiskSource) -> None:
        try:
            async with self._readers:
                chain = await self._chain(source)
        except VmcryptdError as error:
            log.warning("what %s is backed by cannot be read: %s", path, error)
            self._chains_read.pop(path, None)  # tried again when anything has changed
        else:
            self._chains[path] = tuple(member.path for member in chain if member.path)
        self.changed()

    async def _chain(self, source: DiskSource) -> tuple[DiskSource, ...]:
        try:
            return await self._domains.chain(source)
        except DeadlineError:
            return await self._domains.chain(source)  # a disk that had to spin up has by now

    async def chains_known(self, guest: str) -> None:
        """Wait until the backing chains of those of the guest's disks that are there have been read."""
        await self.look()
        while reading := self._reading_of(guest):
            await asyncio.wait(reading)
            await self.look()

    def _reading_of(self, guest: str) -> list[asyncio.Task[None]]:
        virtualisation = self._observation.virtualisation
        domain = virtualisation.domains.get(guest)
        paths = {virtualisation.path_of(source) for source in domain.sources} if domain else set()
        return [task for task, path in self._reading.items() if path in paths]
