# SPDX-License-Identifier: LGPL-2.1-or-later
"""The direction of imports: rooms, and the arrows between them."""

import ast
import functools
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "vmcryptd"

# Room → the rooms it may import from. A package of vmcryptd is a room; adapters have one for each neighbour, and
# service.py and daemon.py are rooms of their own. A new arrow needs a second thought, and a new room a line.
ADAPTERS = {"luks", "keysources", "libvirt", "storage", "systemd"}
ARROWS: dict[str, set[str]] = {
    "vmcryptd": set(),
    "core": {"vmcryptd"},
    "posix": {"core"},
    # One place reads small files within bounds and replaces them whole, also the settings that were validated.
    "config": {"core", "posix", "vmcryptd"},
    "engine": {"core", "posix"},
    "bus": {"core", "posix"},
    "service": {"engine", "bus", "core", "vmcryptd"},
    **{f"adapters/{name}": {"core", "posix"} for name in ADAPTERS},
    "audit": {"core", "config", "posix", *(f"adapters/{name}" for name in ADAPTERS)},
    "cli": {"bus", "core", "posix", "vmcryptd"},
    "daemon": {
        "vmcryptd", "core", "config", "posix", "engine", "bus", "service", "adapters/sim",
        *(f"adapters/{name}" for name in ADAPTERS),
    },
}  # fmt: skip
# The adapters that share mechanics with a neighbour: a header's device is storage, a key is read from a header.
ARROWS["adapters/luks"] |= {"adapters/storage"}
ARROWS["adapters/keysources"] |= {"adapters/luks", "adapters/storage"}
# polkit is asked over the bus that the daemon has.
ARROWS["adapters/systemd"] |= {"bus"}
# What is simulated is the host, not the way from a key source to a descriptor.
ARROWS["adapters/sim"] = {"core", "posix", "config", "adapters/keysources"}

# Inside functions only: few calls of the command line need these, and each call would wait for them. Without a
# daemon "vmcryptctl shutdown" does its work in its own process.
LAZY: dict[str, set[str]] = {"cli": {"audit", "config", "daemon"}}

# Of the bus, the command line has the client only: the objects are the daemon's.
NOT_FOR_CLI = {"bus.objects"}

# Foreign library → its one door.
DOORS = {
    "dbus_fast": "bus.transport",
    "dbus_next": "bus.transport",
    "libvirt": "adapters.libvirt.domains",
    "libvirtaio": "adapters.libvirt.domains",
    "pydantic": "config.schema",
    "subprocess": "posix.run",
    "systemd": "",  # in no module: sd_notify needs no library
}
OS_STARTERS = ("exec", "fork", "posix_spawn", "spawn")
PROCESS_STARTERS = {"create_subprocess_exec", "create_subprocess_shell", "subprocess"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """The folder that a module lies in; at the top, the module itself."""
    if module in {"__init__", "__main__"}:
        return "vmcryptd"
    parts = module.removesuffix(".__init__").split(".")
    if parts[0] == "adapters":
        return "/".join(parts[:2])
    return parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules, and of what is taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def ours(tree: ast.AST) -> set[str]:
    names = {name.removeprefix("vmcryptd.") for name in imported(tree)}
    return names & set(MODULES)


@functools.cache
def parse(module: str) -> ast.AST:
    return ast.parse(MODULES[module].read_text())


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__main__"])
def test_direction(module: str) -> None:
    here = room(module)
    if here == "adapters":
        return
    assert here in ARROWS, f"vmcryptd/{here} has no place in the table of {__file__}"
    tree = parse(module)
    lazy = LAZY.get(here, set())
    rooms = {room(name) for name in ours(tree)} - {here}
    wrong = rooms - ARROWS[here] - lazy
    assert not wrong, f"{module} may not import from {', '.join(sorted(wrong))}"
    at_import = ast.Module(
        [
            node
            for node in ast.iter_child_nodes(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        ],
        [],
    )
    hasty = {name for name in ours(at_import) if room(name) in lazy - ARROWS[here]}
    assert not hasty, f"{module} imports these in functions only: {', '.join(sorted(hasty))}"
    if here == "cli":
        assert not ours(tree) & NOT_FOR_CLI, (
            f"{module} may use the client of the bus, not its objects"
        )


def test_no_arrow_leads_back() -> None:
    """Rooms stand above each other: what is lower knows nothing of what is higher."""
    graphlib.TopologicalSorter(
        {here: ARROWS[here] | LAZY.get(here, set()) for here in ARROWS}
    ).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_each_library_has_one_door(module: str) -> None:
    tree = parse(module)
    for name in imported(tree):
        door = DOORS.get(name.partition(".")[0])
        assert door in {None, module}, f"{module} imports {name}, which is the business of {door}"
    if module != "posix.run":
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                started = node.value.id == "asyncio" and node.attr in PROCESS_STARTERS
                assert not started, f"{module} starts a process by {name}"
                assert name not in {"os.system", "os.popen"}, f"{module} starts a shell"
                of_os = node.value.id == "os" and node.attr.startswith(OS_STARTERS)
                assert not of_os, f"{module} starts a process by {name}"


def test_no_cycle() -> None:
    graph = {module: ours(parse(module)) - {module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def loaded_by(code: str, **environment: str) -> set[str]:
    """The modules that are loaded after these lines."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        cwd=PROJECT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


HEAVY = {
    "libvirt",
    "libvirtaio",
    "pydantic",
    "systemd",
    "vmcryptd.config.schema",
    "vmcryptd.audit.check",
}


def test_the_command_line_starts_fast() -> None:
    assert not (HEAVY | {"vmcryptd.engine"}) & loaded_by("import vmcryptd.cli.main")


def test_the_daemon_starts_fast() -> None:
    code = "from vmcryptd.core.model import Settings; from vmcryptd import daemon; daemon.real_ports(Settings())"
    rarely_needed = {"argparse", "hashlib", "shlex", "uuid", "mmap", "vmcryptd.adapters.sim"}
    assert not (HEAVY | rarely_needed) & loaded_by(code)


def test_the_main_loop_of_glib_is_not_loaded(tmp_path: Path) -> None:
    """The bus library imports it where it is installed; nothing here uses it."""
    (tmp_path / "gi").mkdir()
    (tmp_path / "gi/__init__.py").touch()
    (tmp_path / "gi/repository.py").write_text("class GLib:\n    Source = object\n")
    place = {"PYTHONPATH": str(tmp_path), "VMCRYPTD_BUS_LIBRARY": "dbus_next"}
    assert "gi.repository" in loaded_by("import dbus_next", **place)
    assert "gi" not in loaded_by("import vmcryptd.bus.transport", **place)
    # Others can import it still.
    assert "gi" in loaded_by("import vmcryptd.bus.transport, gi", **place)
