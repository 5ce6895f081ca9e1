# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures: a machine for one test, or one that the tests of a module share.

Emulated, a boot takes one to two minutes, and going on from a snapshot two seconds. So boot only to test the boot:

    def test_something(host: HostFactory) -> None:
        with host(disks=["64M"]).resume() as vm:  # booted and settled, with the package; the disks are plugged in
            lab.Lab(vm).encrypted_guest("imap", lab.disk(0))
            …
            vm.power_cut()
        with vm.host.boot(wait=False) as vm:  # a real boot, from the same disks
            …

Tests that begin alike share what was prepared, and none sees what another did:

    @pytest.fixture(scope="module")
    def prepared(module_host: HostFactory) -> Snapshot:
        with module_host(disks=["64M"]).resume() as vm:
            …
            return vm.save()

    @pytest.fixture
    def vm(host: HostFactory, prepared: Snapshot) -> Iterator[Vm]:
        with host(snapshot=prepared).resume() as vm:
            yield vm

What ran when a machine was saved runs on: daemons, guests, open volumes, and each `lab.Caller` (make it again for the
new Vm: it finds its other half). The machine's clock goes on from the time at which it was saved, so its files and its
journal fit together; nothing in it may be compared with the time outside.
"""

import fcntl
import functools
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.vm.host import PROJECT, Host, Image, accelerator, build_image

HostFactory = Callable[..., Host]

DIRECTORIES = pytest.StashKey[list[Path]]()


def current_package() -> Path | None:
    """The project's package, built anew if a source is younger; None if none can be built."""
    if not (PROJECT / "Makefile").exists():
        return None

    def newest() -> Path | None:
        return max(PROJECT.glob("dist/*.deb"), key=lambda deb: deb.stat().st_mtime, default=None)

    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ":!tests"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    sources = [PROJECT / name for name in listed.stdout.split("\0") if name]
    changed = max(path.stat().st_mtime for path in sources if path.exists())
    package = newest()
    if package is None or package.stat().st_mtime < changed:
        subprocess.run(["make", "deb"], cwd=PROJECT, check=True)
    return newest()


@functools.cache
def current_image() -> Image:
    """The image with the project's package."""
    lock_file = PROJECT / "build/package.lock"
    lock_file.parent.mkdir(exist_ok=True)
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers that run side by side build one package
        package = current_package()
    return build_image(package)


@pytest.fixture(scope="session")
def image() -> Image:
    return current_image()


def _hosts(
    request: pytest.FixtureRequest, image: Image, factory: pytest.TempPathFactory
) -> Iterator[HostFactory]:
    directories = request.session.stash.setdefault(DIRECTORIES, [])
    mine: list[Path] = []
    failed_before = request.session.testsfailed

    def new(**options: object) -> Host:
        if accelerator(image) == "tcg":
            # Two machines run side by side; with a CPU each to emulate they take a fifth less time.
            options.setdefault("cpus", 1)
        directory = factory.mktemp("host")
        mine.append(directory)
        directories.append(directory)
        return functools.partial(Host, image, directory)(**options)  # type: ignore[arg-type]

    yield new
    for directory in mine:
        directories.remove(directory)
        # Disks are large; all of them are kept only after a failure.
        if request.session.testsfailed == failed_before:
            shutil.rmtree(directory)


@pytest.fixture
def host(
    request: pytest.FixtureRequest, image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HostFactory]:
    """Makes hosts, with Host's arguments: host(disks=["1G"])."""
    yield from _hosts(request, image, tmp_path_factory)


@pytest.fixture(scope="module")
def module_host(
    request: pytest.FixtureRequest, image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HostFactory]:
    """The same for a module's own fixture that boots a machine for all its tests."""
    yield from _hosts(request, image, tmp_path_factory)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="run the tests marked long, also on an emulated machine"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave long tests out before a module prepares a machine for them.

    That the device of KVM is there says nothing; a guest must have run.
    """
    if item.get_closest_marker("long") is None or item.config.getoption("--long"):
        return
    if accelerator(current_image()) == "tcg":
        pytest.skip("takes minutes without KVM: `make nightly` runs it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for directory in item.session.stash.get(DIRECTORIES, []):
            logs = "\n".join(f"{path}" for path in sorted(directory.glob("*.log")))
            report.sections.append(("test host", f"kept in {directory}\n{logs}"))
    return report
