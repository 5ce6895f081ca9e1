# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may import whom. A new module needs a place in the table, or its author a second thought."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "vmcryptd"

VALUES = {"errors", "model"}
CORE = VALUES | {"config", "domainxml", "graph", "luksheader", "planner", "slots", "state"}
ENGINE = {
    "attempts", "engine", "guests", "jobs", "kdf", "keyed", "keyslots", "opening", "panic",
    "prompt", "rotation", "steps", "tokens", "unlock", "world",
}  # fmt: skip
BUS = {"bus", "objects"}

# Module → what of ours it may import. Adapters have a rule of their own, see allowed().
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"daemon"},
    "collector": set(),
    "errors": set(),
    "model": {"errors"},
    "config": VALUES,
    "settings": VALUES,
    "domainxml": VALUES,
    "graph": VALUES | {"collector"},
    "luksheader": VALUES,
    "planner": VALUES | {"collector", "graph"},
    "slots": VALUES,
    "state": VALUES | {"graph"},
    "log": set(),
    "ports": VALUES,
    **dict.fromkeys(ENGINE, CORE | ENGINE | {"ports"}),
    "bus": {"errors"},
    "objects": {"bus", "errors"},
    "client": {"bus", "errors"},
    "service": CORE | ENGINE | BUS | {"ports"},
    "render": {"errors"},
    "terminal": {"errors"},
    "verbs": {"errors"},
    "check": CORE | {"settings", "bus", "client", "render", "survey"},
    "unlocking": {"adapters.memfd", "client", "errors", "talk", "terminal"},
    "talk": {"client", "errors", "render", "verbs"},
    "asking": {
        "adapters.memfd",
        "adapters.run",
        "client",
        "errors",
        "talk",
        "terminal",
        "verbs",
    },
    "keycli": {"adapters.memfd", "asking", "client", "errors", "talk", "verbs"},
    "keystore": {
        "adapters.crypt",
        "adapters.memfd",
        "adapters.run",
        "asking",
        "client",
        "errors",
        "settings",
        "talk",
        "verbs",
    },
    "cli": {"bus", "client", "errors", "render", "talk", "verbs"},
}

# What stands behind a port. Only the composition roots know these; the other modules in adapters/
# are there for them to share.
PORT_ADAPTERS = {
    "authority",
    "blocks",
    "crypt",
    "domains",
    "host",
    "keys",
    "memory",
    "reencrypt",
    "sim",
    "slots",
}

COMMAND_LINE = {
    "asking", "check", "cli", "client", "keycli", "keystore", "render", "survey", "talk", "terminal",
    "unlocking", "verbs",
}  # fmt: skip

# Inside functions only: few calls need these, and each call would wait for them. Without a daemon
# "vmcryptctl shutdown" does its work in its own process.
LAZY = {
    "cli": {"check", "daemon", "keycli", "settings", "unlocking"},
    "keycli": {"keystore"},
    "keystore": {"config"},
    "settings": {"config"},
    "talk": {"terminal"},
    "unlocking": {"adapters.memfd"},
}

# What is simulated is the host, not the way from a key source to a descriptor.
REUSED = {"adapters.sim": {"adapters.keys", "config"}}

# Foreign library → its one door.
DOORS = {
    "dbus_fast": "bus",
    "dbus_next": "bus",
    "libvirt": "adapters.domains",
    "libvirtaio": "adapters.domains",
    "pydantic": "config",
    "subprocess": "adapters.run",
    "systemd": "adapters.host",
}
PROCESS_STARTERS = {"create_subprocess_exec", "create_subprocess_shell", "subprocess"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def allowed(module: str) -> set[str]:
    if module == "daemon":
        return set(MODULES) - COMMAND_LINE
    if module == "survey":  # puts the adapters together as the daemon does, but only to look
        return CORE | {name for name in MODULES if name.startswith("adapters.")}
    if module == "adapters.__init__":
        return set()
    if module.startswith("adapters."):
        ports = {f"adapters.{name}" for name in PORT_ADAPTERS}
        shared = {name for name in MODULES if name.startswith("adapters.")} - ports
        reused = REUSED.get(module, set())
        return VALUES | shared | reused | {"bus", "domainxml", "luksheader", "ports"}
    assert module in ALLOWED, f"vmcryptd/{module}.py has no place in the table of {__file__}"
    return ALLOWED[module]


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules, and of what is taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.AST) -> set[str]:
    names = {name.removeprefix("vmcryptd.") for name in imported(tree)}
    return names & set(MODULES)


def inside_functions(tree: ast.AST) -> set[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return set().union(*(ours(node) for node in ast.walk(tree) if isinstance(node, functions)))


def parse(module: str) -> ast.AST:
    return ast.parse(MODULES[module].read_text())


@pytest.mark.parametrize("module", MODULES)
def test_direction(module: str) -> None:
    tree = parse(module)
    wrong = ours(tree) - allowed(module) - {module}
    lazy = LAZY.get(module, set())
    assert not wrong - lazy, f"{module} may not import {', '.join(sorted(wrong))}"
    at_import = ast.Module(
        [
            node
            for node in ast.iter_child_nodes(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        ],
        [],
    )
    assert not ours(at_import) & lazy, f"{module} imports these in functions only: {lazy}"


@pytest.mark.parametrize("module", MODULES)
def test_each_library_has_one_door(module: str) -> None:
    tree = parse(module)
    for name in imported(tree):
        door = DOORS.get(name.partition(".")[0])
        assert door in {None, module}, f"{module} imports {name}, which is the business of {door}"
    if module != "adapters.run":
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                started = node.value.id == "asyncio" and node.attr in PROCESS_STARTERS
                assert not started, f"{module} starts a process by {name}"
                assert name not in {"os.system", "os.popen"}, f"{module} starts a shell"


def test_no_cycle() -> None:
    graph = {module: ours(parse(module)) - LAZY.get(module, set()) - {module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_command_line_starts_fast() -> None:
    heavy = {"libvirt", "libvirtaio", "pydantic", "systemd", "vmcryptd.config", "vmcryptd.engine"}
    code = "import sys, vmcryptd.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert not heavy & set(loaded)
