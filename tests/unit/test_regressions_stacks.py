# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults that volumes stacked on a real host had shown."""

import asyncio
from typing import Any

import pytest

from tests.lib import Host, Running, opened_by
from vmcryptd.core.errors import DeadlineError
from vmcryptd.core.graph import build, wanted_paths
from vmcryptd.core.model import (
    BlockDevice,
    Content,
    DiskSource,
    Domain,
    GuestSpec,
    GuestState,
    Observation,
    Pool,
    Remembered,
    Settings,
    SourceType,
    Storage,
    Virtualisation,
    VolumeSpec,
)

STORE = VolumeSpec("store", "/dev/store", content=Content.FILESYSTEM, mount="/vm")
BASE = VolumeSpec("base", "/dev/base", content=Content.FILESYSTEM, mount="/base")
IN_POOL = DiskSource(SourceType.POOL, pool="vms", volume="web.qcow2")


def test_what_backs_a_pools_volume_is_remembered() -> None:
    """While the volumes are locked, libvirt lists nothing in the pool, and nothing can be read."""
    settings = Settings(volumes={"store": STORE, "base": BASE})
    known = Virtualisation(
        True,
        {"web": Domain("web", "web", GuestState.OFF, sources=(IN_POOL,))},
        {"vms": Pool("vms", active=True, path="/vm")},
    )
    assert "/vm/web.qcow2" in wanted_paths(settings, known, {})
    seen = Observation(
        storage=Storage(), virtualisation=known, chains={"/vm/web.qcow2": ("/base/img",)}
    )
    lies_on = build(settings, seen).lies_on
    assert lies_on["/vm/web.qcow2"] == ("store", "base")
    later = Observation(
        storage=Storage(), virtualisation=known, remembered=Remembered(paths=dict(lies_on))
    )
    assert build(settings, later).guests["web"].needs == ("store", "base")


def test_what_backs_an_image_on_a_block_device_counts() -> None:
    disk = DiskSource(SourceType.BLOCK, "/dev/vg/web")
    known = Virtualisation(True, {"web": Domain("web", "web", GuestState.OFF, sources=(disk,))})
    storage = Storage({"dm-7": BlockDevice("dm-7")}, {"/dev/vg/web": "dm-7"})
    seen = Observation(
        storage=storage, virtualisation=known, chains={"/dev/vg/web": ("/base/img",)}
    )
    graph = build(Settings(volumes={"base": BASE}), seen)
    assert graph.guests["web"].needs == ("base",)


class Images(Host):
    """A guest in image files: the base image is known when the store is mounted, not before."""

    def observe(self, paths: Any) -> Storage:
        storage = super().observe(paths)
        mounts = {"/vm": self._volumes["store"].mounted, "/base": self._volumes["base"].mounted}
        files = {
            path: "0:1"
            for path in paths
            if any(path.startswith(f"{top}/") and mounted for top, mounted in mounts.items())
        }
        return storage._replace(files={**storage.files, **files})

    def current(self) -> Virtualisation:
        known = super().current()
        domains = {name: d._replace(sources=(IN_POOL,)) for name, d in known.domains.items()}
        return known._replace(domains=domains, pools={"vms": Pool("vms", True, path="/vm")})

    async def start_pool(self, name: str) -> None:
        self.calls.append(f"start pool {name}")

    is_slow = False

    async def chain(self, source: DiskSource) -> tuple[DiskSource, ...]:
        self.calls.append(f"chain of {source.path or source.volume}")
        if self.is_slow:
            self.is_slow = False  # the disk has spun up by now
            raise DeadlineError("qemu-img does not answer")
        return (DiskSource(SourceType.FILE, path="/base/img"),)


IMAGES = f"""
[volume.store]
device = "/dev/store"
content = "filesystem"
mount = "/vm"
[volume.base]
device = "/dev/base"
content = "filesystem"
mount = "/base"
unlock = "guest"
keys = ["file:/key", "prompt"]
[sim.volume.store]
{opened_by("one")}
[sim.volume.base]
sources = ["file:/key"]
[sim.guest.web]
autostart = true
"""


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_guest_waits_for_what_its_image_turns_out_to_be_backed_by(is_slow: bool) -> None:
    async def scene() -> None:
        running = Running(Images.parse(IMAGES))
        running.host.is_slow = is_slow
        running.engine.boot()
        running.host.answer("one")
        await running.until(lambda: running.guests() == {"web": "running"})
        done = running.host.done("mount", "start web")
        assert done == ["mount store", "mount base", "start web"]
        await running.idle()
        assert running.state == "ready"
        await running.close()

    asyncio.run(scene())


class BlockImage(Images):
    """A guest in a qcow2 image that lies on a mapping itself."""

    def current(self) -> Virtualisation:
        known = Host.current(self)
        domains = {
            name: d._replace(sources=(DiskSource(SourceType.BLOCK, "/dev/mapper/store"),))
            for name, d in known.domains.items()
        }
        return known._replace(domains=domains)


def test_a_guest_waits_for_what_an_image_on_a_block_device_is_backed_by() -> None:
    text = IMAGES.replace('content = "filesystem"\nmount = "/vm"\n', "")

    async def scene() -> None:
        running = Running(BlockImage.parse(text))
        running.engine.boot()
        running.host.answer("one")
        await running.until(lambda: running.guests() == {"web": "running"})
        done = running.host.done("open", "chain", "mount", "start web")
        assert done == [
            "open store",
            "chain of /dev/mapper/store",
            "open base",
            "mount base",
            "chain of /dev/mapper/store",
            "start web",
        ]
        await running.idle()
        await running.close()

    asyncio.run(scene())


class Slow(Host):
    """A guest that libvirt has started, and that is ready when the test says so."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.is_ready = asyncio.Event()
        self.asked = 0

    async def ready(self, guest: GuestSpec, timeout_s: float) -> None:
        self.asked += guest.name == "dns"
        await self.is_ready.wait()


AFTER = f"""
[guest.dns]
ready = "tcp:192.0.2.1:53"
[guest.imap]
after = ["dns"]
[guest.web]
after = ["dns"]
[volume.a]
device = "/dev/a"
[volume.b]
device = "/dev/b"
[sim.volume.a]
{opened_by("one")}
[sim.volume.b]
{opened_by("one")}
[sim.guest.dns]
running = true
[sim.guest.imap]
autostart = true
disks = ["/dev/mapper/a"]
[sim.guest.web]
autostart = true
disks = ["/dev/mapper/b"]
"""


def test_a_guest_starts_after_one_that_runs_already_is_ready() -> None:
    async def scene() -> None:
        running = Running(Slow.parse(AFTER))
        host = running.host
        assert isinstance(host, Slow)
        running.engine.boot()
        host.answer("one")
        await running.until(lambda: host.asked == 2)
        assert host.done("start") == []
        host.is_ready.set()
        await running.until(lambda: set(running.guests().values()) == {"running"})
        assert sorted(host.done("start ")) == ["start imap", "start web"]
        await running.idle()
        await running.close()

    asyncio.run(scene())
