# SPDX-License-Identifier: LGPL-2.1-or-later
"""The port `Domains` by libvirt. The only module that imports libvirt, and only when used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from vmcryptd.adapters.libvirt import images
from vmcryptd.adapters.libvirt.connection import Link
from vmcryptd.adapters.libvirt.session import Event, Refused, Session
from vmcryptd.core.errors import DeadlineError, GuestError, LibvirtError
from vmcryptd.core.model import DiskSource, GuestSpec, GuestState, Virtualisation
from vmcryptd.core.ports import Changed
from vmcryptd.posix.threads import DaemonThreads

CALL_S = 30.0
START_S = 600.0  # restoring a managed save reads the guest's whole memory
POOL_S = 120.0  # refreshing a pool looks at every volume of it
PRESS_S = 15.0  # between two presses of the power button: a boot loader loses one
CONNECT_S = 2.0  # one attempt at a guest's port
RETRY_S = 1.0  # between two attempts


class Libvirt:
    """The port `Domains` for one libvirt URI. To be used from one event loop."""

    def __init__(self, uri: str) -> None:
        self._link = Link(uri, _import, _attach)
        self._virsh = self._link.virsh
        self._lookups = DaemonThreads()

    def watch(self, changed: Changed) -> None:
        self._link.watch(changed)

    def current(self) -> Virtualisation:
        return self._link.known

    async def refresh(self, timeout_s: float) -> Virtualisation:
        return await self._link.refresh(timeout_s)

    async def close(self) -> None:
        """Stop following libvirt and disconnect; the domains go on."""
        await self._link.close()

    async def chain(self, source: DiskSource) -> tuple[DiskSource, ...]:
        path = self._link.known.path_of(source)
        formats = (
            image_format
            for known in self._link.formats.values()
            for other, image_format in known.items()
            if path and path == self._link.known.path_of(other)
        )
        return await images.chain(path, next(formats, ""))

    # --- domains ---

    async def start(self, name: str) -> None:
        advice = f"`{self._virsh} start {name}` shows the same"
        deadline = _now() + START_S
        while True:
            with self._explained(f"guest {name} could not be started", advice):
                state = await self._link.ask(START_S, Session.start, name)
            await self._link.look_again(domains=[name])
            if state is not GuestState.STARTING:
                return
            # libvirt's own autostart, or another client, is starting it. If that fails, the guest
            # is off without an event, and we start it.
            self._link.mark(Event.DOMAIN, name)
            left = deadline - _now()
            if left <= 0 or not await self._link.learnt.until(
                lambda: not self._is_starting(name), left
            ):
                raise GuestError(
                    f"guest {name} is being started by libvirt since more than {START_S:g} s; "
                    f"`{self._virsh} domstate --reason {name}` shows the same"
                )

    async def ready(self, guest: GuestSpec, timeout_s: float) -> None:
        name, kind = guest.name, guest.ready
        deadline = _now() + timeout_s
        if kind.startswith("tcp:"):
            host, _, port = kind.removeprefix("tcp:").rpartition(":")
            waits_for = f"an answer at {host} port {port}"
            reached = await self._answers(name, host.strip("[]"), int(port), deadline)
        else:
            waits_for = "its guest agent" if kind == "agent" else "it to run"
            reached = await self._link.learnt.until(
                lambda: (
                    self._is_off(name)
                    or (
                        self._state(name) is GuestState.RUNNING
                        and (kind != "agent" or name in self._link.agents)
                    )
                ),
                timeout_s,
            )
        if self._is_off(name):
            raise GuestError(
                f"guest {name} went off before it was ready; `{self._virsh} dominfo {name}` and "
                f"/var/log/libvirt/qemu/{name}.log tell more"
            )
        if not reached:
            raise DeadlineError(
                f"guest {name} was not ready within {timeout_s:g} s: waited for {waits_for}; "
                f"see what it does with `{self._virsh} console {name}`"
            )

    async def stop(self, guest: GuestSpec, timeout_s: float) -> None:
        name = guest.name
        deadline = _now() + timeout_s
        advice = (
            f"see what it does with `{self._virsh} console {name}`, "
            f"or end it with `{self._virsh} destroy {name}`"
        )
        refusal = ""
        acpi = False
        while (left := deadline - _now()) > 0:
            pressed, cut_off = _now(), False
            try:
                state = await self._link.ask(min(PRESS_S, left), Session.press, name, acpi)
                refusal = ""
                if state is GuestState.OFF:
                    await self._link.look_again(domains=[name])
                    return
                if state is GuestState.CRASHED:
                    raise GuestError(
                        f"guest {name} has crashed and cannot stop by itself; {advice}"
                    )
            except Refused as error:
                refusal = f" ({error})"
                if error.forever:
                    text = f"guest {name} could not be asked to stop: {error}; {advice}"
                    raise GuestError(text) from None
            except LibvirtError as error:
                # The connection broke meanwhile: the next one shows the guest's state.
                refusal, cut_off = f" ({error})", True
            # The power button is pressed even if the guest agent does not answer, or answers wrongly.
            acpi = not acpi
            if self._is_off(name):  # an event is on its way: another client has just started it
                await self._link.look_again(domains=[name])
            pause = min(pressed + PRESS_S, deadline) - _now()
            await self._link.learnt.until(
                lambda: self._is_off(name) or (cut_off and self._link.known.reachable),  # noqa: B023
                pause,
            )
        if self._is_off(name):
            return
        raise DeadlineError(f"guest {name} did not stop within {timeout_s:g} s{refusal}; {advice}")

    async def kill(self, name: str) -> None:
        advice = f"`{self._virsh} destroy {name}` shows the same"
        with self._explained(f"guest {name} could not be ended", advice):
            await self._link.ask(CALL_S, Session.kill, name)
        # Noted without asking libvirt again: panic does not wait for the answer.
        domains = dict(self._link.known.domains)
        if domain := domains.pop(name, None):
            if domain.persistent:
                domains[name] = domain._replace(state=GuestState.OFF)
            self._link.agents.discard(name)
            self._link.learn(self._link.known._replace(domains=domains))
        self._link.mark(Event.DOMAIN, name)

    # --- pools ---

    async def start_pool(self, name: str) -> None:
        advice = f"`{self._virsh} pool-start {name}` shows the same"
        with self._explained(f"storage pool {name} could not be started", advice):
            await self._link.ask(POOL_S, Session.start_pool, name)
        await self._link.look_again(pools=[name])

    async def stop_pool(self, name: str) -> None:
        advice = f"`{self._virsh} pool-destroy {name}` shows the same (it leaves the content alone)"
        with self._explained(f"storage pool {name} could not be stopped", advice):
            await self._link.ask(POOL_S, Session.stop_pool, name)
        await self._link.look_again(pools=[name])

    # --- waiting ---

    def _state(self, name: str) -> GuestState | None:
        domain = self._link.known.domains.get(name)
        return None if domain is None else domain.state

    def _is_starting(self, name: str) -> bool:
        return self._state(name) is GuestState.STARTING

    def _is_off(self, name: str) -> bool:
        return self._link.known.reachable and self._state(name) in (None, GuestState.OFF)

    async def _answers(self, name: str, host: str, port: int, deadline: float) -> bool:
        """True when a connection is accepted; False when time is up or the guest went off."""
        while (left := deadline - _now()) > 0:
            addresses: list[tuple[Any, ...]] = []
            with contextlib.suppress(OSError, DeadlineError):
                # Not by open_connection: it looks names up in threads that are joined at exit.
                lookup = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
                addresses = await self._lookups.call(min(CONNECT_S, left), lookup)
            # A name may stand for several addresses, of which the guest listens on one only.
            for *_, address in addresses:
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(min(CONNECT_S, left)):
                        _, writer = await asyncio.open_connection(*address[:2])
                    writer.close()
                    return True
            if await self._link.learnt.until(
                lambda: self._is_off(name), min(RETRY_S, deadline - _now())
            ):
                return False
        return False

    @contextlib.contextmanager
    def _explained(self, what: str, advice: str) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            kind = LibvirtError if error.silent else GuestError
            raise kind(f"{what}: {error}; {advice}") from None


def _now() -> float:
    return asyncio.get_running_loop().time()


def _import() -> Any:
    """Slow, so it is not done before the daemon is ready."""
    try:
        import libvirt
        import libvirtaio  # noqa: F401 (for _attach)
    except ImportError as error:
        raise LibvirtError(f"{error}: install python3-libvirt") from None
    # Without one, libvirt prints every error to stderr besides raising it.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    return libvirt


_attached: Any = None  # libvirt takes one implementation in a process's life


def _attach(loop: asyncio.AbstractEventLoop) -> None:
    """Have libvirt's events run in this loop. Must happen before the first connection."""
    global _attached  # noqa: PLW0603 (as it is in libvirt)
    if _attached is None:
        _attached = _implementation(loop).register()
    elif _attached.loop is not loop:
        _attached.move(loop)


def _implementation(loop: asyncio.AbstractEventLoop) -> Any:
    """libvirtaio, changed to allow calls from any thread.

    libvirt sets timers, and changes its watches, at each of its calls, in any thread.
    libvirtaio then does at once what asyncio allows in the loop's thread only: the loop does
    not wake up for a timer, and of two threads that change a selector one fails, after which a
    connection is watched no more. So all of it is done in the loop.
    """
    import libvirtaio
    from libvirt import VIR_EVENT_HANDLE_READABLE, VIR_EVENT_HANDLE_WRITABLE

    class Callback(libvirtaio.Callback):  # type: ignore[misc]  # libvirtaio has no types
        """libvirt sets `wanted` in any thread; the loop's thread acts on it."""

        NOTHING = 0

        def __init__(self, wanted: int, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.wanted = wanted

        def close(self) -> None:
            self.update()
            super().close()

    class Watch(Callback):
        """Has a descriptor of its own: libvirt closes the watched one before the loop learns of that."""

        def __init__(self, fd: int, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.fd = fd
            self._own = os.dup(fd)

        def update(self) -> None:
            loop = self.impl.loop
            for event, add, remove in (
                (VIR_EVENT_HANDLE_READABLE, loop.add_reader, loop.remove_reader),
                (VIR_EVENT_HANDLE_WRITABLE, loop.add_writer, loop.remove_writer),
            ):
                if self.wanted & event:
                    add(self._own, self._is_ready, event)
                else:
                    remove(self._own)

        def _is_ready(self, event: int) -> None:
            if self.wanted & event:
                self.cb(self.iden, self.fd, event, self.opaque)

        def close(self) -> None:
            super().close()
            os.close(self._own)

    class Timer(Callback):
        """`wanted` is its period in milliseconds."""

        NOTHING = -1

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._next: asyncio.TimerHandle | None = None

        def update(self) -> None:
            if self._next is not None:
                self._next.cancel()
                self._next = None
            if self.wanted >= 0:
                self._next = self.impl.loop.call_later(self.wanted / 1000, self._fire)

        def _fire(self) -> None:
            if self.wanted >= 0:
                self.update()  # until libvirt changes it, which it often does within the call
                self.cb(self.iden, self.opaque)

    class AnyThread(libvirtaio.virEventAsyncIOImpl):  # type: ignore[misc]  # as above
        def move(self, loop: asyncio.AbstractEventLoop) -> None:
            """To another loop, the old one being closed; only tests have two."""
            self.loop = loop
            for callback in list(self.callbacks.values()):
                callback.update()

        def _soon(self, function: Callable[..., object], *arguments: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(function, *arguments)

        # Only drain() needs the count, which is not used, and which threads would get wrong.
        def _pending_inc(self) -> None: ...

        def _pending_dec(self) -> None: ...

        def schedule_ff_callback(self, iden: int, opaque: Any) -> None:
            self._soon(super().schedule_ff_callback, iden, opaque)

        def _add(self, callback: Callback) -> int:
            self.callbacks[callback.iden] = callback
            self._soon(callback.update)
            return int(callback.iden)

        def _update(self, iden: int, wanted: int) -> None:
            if (callback := self.callbacks.get(iden)) is not None:
                callback.wanted = wanted
                self._soon(callback.update)

        def _remove(self, iden: int) -> int:
            callback = self.callbacks.pop(iden, None)
            if callback is None:
                return -1
            callback.wanted = callback.NOTHING
            self._soon(callback.close)
            return 0

        def _add_handle(self, fd: int, event: int, cb: Any, opaque: Any) -> int:
            return self._add(Watch(fd, event, self, cb, opaque))

        def _add_timeout(self, timeout: int, cb: Any, opaque: Any) -> int:
            return self._add(Timer(timeout, self, cb, opaque))

        _update_handle = _update_timeout = _update
        _remove_handle = _remove_timeout = _remove

    return AnyThread(loop)
