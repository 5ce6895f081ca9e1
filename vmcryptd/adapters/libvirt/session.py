# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes calls to libvirt over one connection. Everything here blocks.

`domains.py`, the only module that imports libvirt, passes it in.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any, NamedTuple, ParamSpec, TypeVar
from xml.etree import ElementTree

from vmcryptd.adapters.libvirt import definitions
from vmcryptd.core.model import Domain, GuestState, Pool

P = ParamSpec("P")
T = TypeVar("T")

KEEPALIVE = (5, 3)  # seconds between pings, pings that may stay unanswered

log = logging.getLogger(__name__)


class Event(Enum):
    """The subjects of libvirt's events."""

    DOMAIN = auto()
    POOL = auto()
    CLOSED = auto()


class Refused(Exception):
    """libvirt refused a call: its error as plain values, without libvirt's objects."""

    def __init__(
        self, text: str, *, lost: bool = False, forever: bool = False, silent: bool = False
    ) -> None:
        super().__init__(text)
        self.silent = silent  # it gave no answer
        self.lost = lost  # the connection is broken
        self.forever = forever  # a repeated call would be refused, too


class Seen(NamedTuple):
    domain: Domain
    contents: definitions.Contents
    has_forgotten: bool = False  # it is off, and libvirt was restarted since and does not know why


class Reading:
    """The result of one reading of libvirt; None: libvirt knows no such domain or pool."""

    def __init__(self, *, complete: bool = False) -> None:
        self.complete = complete
        self.domains: dict[str, Seen | None] = {}
        self.pools: dict[str, Pool | None] = {}
        self.pools_known = True


class Session:
    """One connection to libvirt. Every method blocks: call it in a thread."""

    def __init__(self, api: Any, uri: str, events: Callable[[Event, str], None]) -> None:
        self.api = api
        self.connection: Any = None
        self._uri = uri
        self._events = events
        self._lock = threading.Lock()
        self._calls = 0
        self._closing = False

    def guarded(self, method: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Every call goes through here. Raises Refused."""
        with self._lock:
            if self._closing:
                raise Refused("the connection was closed", lost=True)
            self._calls += 1
        try:
            return method(*arguments, **named)
        except self.api.libvirtError as error:
            text = " ".join(str(error).split()).rstrip(".")
            forever = error.get_error_code() in (
                self.api.VIR_ERR_NO_SUPPORT,
                self.api.VIR_ERR_OPERATION_DENIED,
                self.api.VIR_ERR_ACCESS_DENIED,
            )
            raise Refused(text, lost=not self.alive(), forever=forever) from None
        finally:
            self._leave()

    def close(self) -> None:
        """Close now, or when the last call has returned: a call that hangs still uses the connection.

        virConnectClose frees it without regard to that
        (https://libvirt.org/html/libvirt-libvirt-host.html#virConnectClose).
        """
        with self._lock:
            self._closing = True
            self._calls += 1
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._calls -= 1
            last = self._closing and not self._calls
        if last:
            self._hang_up()

    def alive(self) -> bool:
        try:
            return self.connection is not None and bool(self.connection.isAlive())
        except self.api.libvirtError:
            return False

    def open(self) -> None:
        api = self.api
        self.connection = connection = api.open(self._uri)
        events = self._events  # libvirt calls these in any thread

        def about_domain(_connection: Any, domain: Any, *_rest: Any) -> None:
            events(Event.DOMAIN, domain.name())

        def about_pool(_connection: Any, pool: Any, *_rest: Any) -> None:
            events(Event.POOL, pool.name())

        listen, listen_pools = (
            connection.domainEventRegisterAny,
            connection.storagePoolEventRegisterAny,
        )
        listen(None, api.VIR_DOMAIN_EVENT_ID_LIFECYCLE, about_domain, None)
        # Not every driver offers the following. Agent, devices, and block jobs change the live XML;
        # no event reports autostart
        # (https://libvirt.org/html/libvirt-libvirt-domain.html).
        with self._optional():
            listen(None, api.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, about_domain, None)
        with self._optional():
            listen(None, api.VIR_DOMAIN_EVENT_ID_DISK_CHANGE, about_domain, None)
        with self._optional():
            listen(None, api.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, about_domain, None)
        with self._optional():
            listen(None, api.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, about_domain, None)
        with self._optional():
            listen(None, api.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, about_domain, None)
        with self._optional():
            listen_pools(None, api.VIR_STORAGE_POOL_EVENT_ID_LIFECYCLE, about_pool, None)
        with self._optional():
            listen_pools(None, api.VIR_STORAGE_POOL_EVENT_ID_REFRESH, about_pool, None)
        with self._optional():
            connection.registerCloseCallback(lambda *_: events(Event.CLOSED, ""), None)
        with self._optional():
            connection.setKeepAlive(*KEEPALIVE)

    def _hang_up(self) -> None:
        """libvirt holds a reference to the connection for each callback, so these go first."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        with self._optional():
            connection.unregisterCloseCallback()
        for number in list(getattr(connection, "domainEventCallbackID", ())):
            with self._optional():
                connection.domainEventDeregisterAny(number)
        for number in list(getattr(connection, "storagePoolEventCallbackID", ())):
            with self._optional():
                connection.storagePoolEventDeregisterAny(number)
        with self._optional():
            connection.close()

    def _optional(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.suppress(self.api.libvirtError)

    # --- reading ---

    def read(self, domains: Iterable[str] | None = None, pools: Iterable[str] = ()) -> Reading:
        """These domains and pools, or everything."""
        reading = Reading(complete=domains is None)
        if domains is None:
            for domain in self.connection.listAllDomains():
                reading.domains[domain.name()] = self._see(domain)
        else:
            for name in domains:
                found = self._domain(name)
                reading.domains[name] = None if found is None else self._see(found)
        try:
            if domains is None:
                for pool in self.connection.listAllStoragePools():
                    reading.pools[pool.name()] = self._see_pool(pool)
            else:
                for name in pools:
                    found = self._pool(name)
                    reading.pools[name] = None if found is None else self._see_pool(found)
        except self.api.libvirtError as error:
            # With the modular daemons, another daemon has the pools; it may be away, or not
            # installed.
            if not self.alive():
                raise
            reading.pools_known = error.get_error_code() == self.api.VIR_ERR_NO_SUPPORT
            log.debug("storage pools cannot be read: %s", error)
        return reading

    def _domain(self, name: str) -> Any:
        return self._found(self.connection.lookupByName, name, self.api.VIR_ERR_NO_DOMAIN)

    def _pool(self, name: str) -> Any:
        lookup = self.connection.storagePoolLookupByName
        return self._found(lookup, name, self.api.VIR_ERR_NO_STORAGE_POOL)

    def _found(self, lookup: Callable[[str], Any], name: str, unknown: int) -> Any:
        try:
            return lookup(name)
        except self.api.libvirtError as error:
            if error.get_error_code() == unknown:
                return None
            raise

    def _see(self, domain: Any) -> Seen | None:
        api, name = self.api, domain.name()
        try:
            state, trouble, has_forgotten = self._condition(domain)
            persistent = bool(domain.isPersistent())
            autostart = bool(domain.autostart())
            contents = self._contents(domain, persistent, state is not GuestState.OFF)
        except api.libvirtError as error:
            if error.get_error_code() == api.VIR_ERR_NO_DOMAIN:  # gone since it was listed
                return None
            raise
        return Seen(
            Domain(
                name=name,
                uuid=domain.UUIDString(),
                state=state,
                autostart=autostart,
                persistent=persistent,
                sources=contents.sources,
                autostart_once=self._autostart_once(domain),
                trouble=trouble,
            ),
            contents,
            has_forgotten,
        )

    def _autostart_once(self, domain: Any) -> bool:
        is_set = False
        if hasattr(domain, "autostartOnce"):  # since libvirt 11.2
            with self._optional():
                is_set = bool(domain.autostartOnce())
        return is_set

    def _contents(self, domain: Any, persistent: bool, active: bool) -> definitions.Contents:
        api = self.api
        try:
            texts = [domain.XMLDesc(api.VIR_DOMAIN_XML_INACTIVE)] if persistent else []
            if active or not persistent:
                texts.append(domain.XMLDesc(0))
            return definitions.domain(*texts)
        except (api.libvirtError, ElementTree.ParseError) as error:
            gone = isinstance(error, api.libvirtError) and (
                error.get_error_code() == api.VIR_ERR_NO_DOMAIN or not self.alive()
            )
            if gone:
                raise
            # One domain with an unexpected description must not hide the others.
            log.warning("the description of guest %s cannot be read: %s", domain.name(), error)
            return definitions.Contents()

    def _state(self, domain: Any) -> GuestState:
        return self._condition(domain)[0]

    def _condition(self, domain: Any) -> tuple[GuestState, str, bool]:
        """The state; what is wrong, as Domain.trouble; and whether libvirt has forgotten why it is off."""
        api, name = self.api, domain.name()
        state, reason = domain.state()[:2]
        if state == api.VIR_DOMAIN_PAUSED and reason == api.VIR_DOMAIN_PAUSED_STARTING_UP:
            return GuestState.STARTING, "", False
        again = f"`vmcryptctl start {name}` starts it again"
        died = (
            "died: its process ended without a shutdown; "
            f"/var/log/libvirt/qemu/{name}.log may tell why, {again}"
        )
        trouble = {
            (api.VIR_DOMAIN_SHUTOFF, api.VIR_DOMAIN_SHUTOFF_CRASHED): died,
            # libvirtd could no longer connect to its QEMU, and killed it.
            (api.VIR_DOMAIN_SHUTOFF, api.VIR_DOMAIN_SHUTOFF_DAEMON): died,
            (api.VIR_DOMAIN_PAUSED, api.VIR_DOMAIN_PAUSED_IOERROR): (
                f"is paused by an error of a disk; `virsh domblkerror {name}` names it; when that is "
                f"well again: `virsh resume {name}`"
            ),
        }.get((state, reason), "")
        if state == api.VIR_DOMAIN_CRASHED:
            trouble = (
                f"has crashed and is kept for a look; `virsh destroy {name}` ends it, then {again}"
            )
        has_forgotten = (state, reason) == (api.VIR_DOMAIN_SHUTOFF, api.VIR_DOMAIN_SHUTOFF_UNKNOWN)
        return self._plain_state(domain, state), trouble, has_forgotten

    def _plain_state(self, domain: Any, state: int) -> GuestState:
        api = self.api
        return {
            api.VIR_DOMAIN_RUNNING: GuestState.RUNNING,
            api.VIR_DOMAIN_BLOCKED: GuestState.RUNNING,
            api.VIR_DOMAIN_PAUSED: GuestState.PAUSED,
            api.VIR_DOMAIN_PMSUSPENDED: GuestState.PAUSED,
            api.VIR_DOMAIN_SHUTDOWN: GuestState.STOPPING,
            api.VIR_DOMAIN_SHUTOFF: GuestState.OFF,
            api.VIR_DOMAIN_CRASHED: GuestState.CRASHED,
        }.get(state) or (GuestState.RUNNING if domain.isActive() else GuestState.OFF)

    def _see_pool(self, pool: Any) -> Pool | None:
        try:
            active = bool(pool.isActive())
            place = definitions.pool(pool.XMLDesc(0))
            volumes: dict[str, str] = {}
            with self._optional():  # stopped since it was listed
                if active:
                    volumes = {volume.name(): volume.path() for volume in pool.listAllVolumes()}
            return Pool(
                name=pool.name(),
                active=active,
                autostart=bool(pool.autostart()),
                path=place.path,
                devices=place.devices,
                vg=place.vg,
                volumes=volumes,
            )
        except self.api.libvirtError as error:
            if error.get_error_code() == self.api.VIR_ERR_NO_STORAGE_POOL:
                return None
            raise

    # --- acting ---

    def start(self, name: str) -> GuestState:
        """The state afterwards; STARTING while libvirt itself starts it, which may still fail."""
        domain = self.connection.lookupByName(name)
        if not domain.isActive():
            try:
                domain.create()
            except self.api.libvirtError:
                if not domain.isActive():  # else another client was faster
                    raise
        return self._state(domain)

    def press(self, name: str, acpi: bool) -> GuestState:
        """Press the guest's power button once; OFF if the guest is off."""
        api = self.api
        domain = self._domain(name)
        if domain is None or not domain.isActive():
            return GuestState.OFF
        state = self._state(domain)
        if state is GuestState.CRASHED:
            return state
        if state is GuestState.PAUSED:
            # A paused guest cannot react. One that libvirt itself holds paused (a migration)
            # refuses.
            wake = domain.resume
            if domain.state()[0] == api.VIR_DOMAIN_PMSUSPENDED:
                wake = domain.pMWakeup
            with self._optional():
                wake()
        ways = [api.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN, 0]
        if not acpi:
            ways.reverse()
        refusal: Any = None
        for flags in ways:
            try:
                domain.shutdownFlags(flags)
                return state
            except api.libvirtError as error:
                # The words about the way that every driver has are the ones that help.
                refusal = error if flags == 0 or refusal is None else refusal
        if not domain.isActive():
            return GuestState.OFF
        raise refusal

    def kill(self, name: str) -> None:
        domain = self._domain(name)
        try:
            if domain is not None and domain.isActive():
                domain.destroy()
        except self.api.libvirtError as error:
            if error.get_error_code() != self.api.VIR_ERR_NO_DOMAIN and domain.isActive():
                raise

    def start_pool(self, name: str) -> None:
        pool = self.connection.storagePoolLookupByName(name)
        if not pool.isActive():
            pool.create()
        pool.refresh()

    def stop_pool(self, name: str) -> None:
        pool = self.connection.storagePoolLookupByName(name)
        if pool.isActive():
            pool.destroy()
