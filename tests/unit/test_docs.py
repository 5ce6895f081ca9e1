# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is written about vmcryptd is so: generated files, examples, man pages, completion."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vmcryptd.cli.verbs import GOALS, VISIBLE, parse
from vmcryptd.config import schema
from vmcryptd.config.schema import TABLES
from vmcryptd.core import graph
from vmcryptd.core.errors import subclasses
from vmcryptd.core.model import Observation
from vmcryptd.service import Manager

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
EXAMPLES = sorted((PROJECT / "config/examples").glob("*.toml"))
PAGES = sorted(DOCS.glob("*.[158].rst"))


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    # There is a library named "packaging", so this directory is no package.
    spec = importlib.util.spec_from_file_location("docs", PROJECT / "packaging/docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_generated_files_are_up_to_date(docs: ModuleType) -> None:
    for name, text in docs.generated().items():
        assert (PROJECT / name).read_text() == text, f"{name}: run packaging/docs.py"


# --- the configuration ---


def test_the_default_file_configures_nothing() -> None:
    text = (PROJECT / "config/vmcryptd.toml").read_text()
    assert schema.parse({"vmcryptd.toml": text}) == schema.parse({})


def test_what_the_default_file_shows_is_right() -> None:
    text = (PROJECT / "config/vmcryptd.toml").read_text()
    shown = tomllib.loads(re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE))
    assert shown.keys() == TABLES.keys()
    for name, table in TABLES.items():
        values = shown[name] if name == "daemon" else next(iter(shown[name].values()))
        assert values.keys() == table.model_fields.keys()
        needed = {"device": values["device"]} if name == "volume" else {}
        for key, value in values.items():
            content = {"mount": "filesystem", "vg": "lvm"}.get(key)
            more = {"content": content} if content else {}
            table.model_validate({**needed, **more, key: value})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    settings = schema.parse({path.name: path.read_text()})
    assert settings.volumes
    graph.build(settings, Observation())
    # What is commented out is an example, too.
    optional = re.sub(r'^#(?=\w+ = ["\[])', "", path.read_text(), flags=re.MULTILINE)
    schema.parse({path.name: optional})


def test_examples_find_their_layers() -> None:
    text = (PROJECT / "config/examples/two-layers.toml").read_text()
    built = graph.build(schema.parse({"x": text}), Observation())
    assert built.beneath(["cr_customer"]) == ["cr_outer", "cr_customer"]
    assert built.beneath(["cr_other"]) == ["cr_outer", "keystore", "cr_other"]


def test_examples_in_the_pages_load() -> None:
    page = (DOCS / "vmcryptd.toml.5.rst").read_text()
    blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", page)
    tables = [block for block in blocks if "[" in block]
    assert len(tables) == 3
    for block in tables:
        schema.parse({"page": re.sub(r"^    ", "", block, flags=re.MULTILINE)})


UUID = "3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"
MARKDOWN = [PROJECT / "README.md", *sorted(DOCS.rglob("*.md"))]


def test_examples_in_readme_and_guides_load() -> None:
    found = 0
    for page in MARKDOWN:
        for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            found += 1
            schema.parse({page.name: block.replace("UUID=…", f"UUID={UUID}")})
    assert found > 1


def test_commands_in_readme_and_guides_are_understood() -> None:
    found = 0
    for page in MARKDOWN:
        for line in re.findall(r"^    (.*vmcryptctl .*)$", page.read_text(), re.MULTILINE):
            for command in re.split(r"&&|\|\||[|;]", re.sub(r"\s# .*", "", line)):
                words = shlex.split(command)
                if words[:1] != ["vmcryptctl"]:
                    continue
                found += 1
                parse(words[1:])
    assert found > 20


# --- man pages ---


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_man_pages_are_well_formed(page: Path, tmp_path: Path) -> None:
    rst2man = shutil.which("rst2man")
    if rst2man is None:
        pytest.skip("rst2man is not installed")
    man = tmp_path / "page"
    argv = [rst2man, "--strict", "--no-generator", "--no-datestamp", str(page), str(man)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n.SH SEE ALSO" in man.read_text().replace('"', "")


def test_all_pages_are_there() -> None:
    names = [page.name.removesuffix(".rst") for page in PAGES]
    assert names == ["org.vmcryptd1.5", "vmcryptctl.1", "vmcryptd.8", "vmcryptd.toml.5"]


def test_the_page_of_the_command_line_has_every_verb_and_option() -> None:
    page = (DOCS / "vmcryptctl.1.rst").read_text()
    for verb in VISIBLE:
        entry = re.search(rf"^``{verb.name}``(.*)\n((?:    .*\n|\n)+)", page, re.MULTILINE)
        assert entry is not None, verb.name
        for argument in verb.arguments:
            assert argument.name in entry[1], f"{verb.name}: {argument.name}"
    for goal in GOALS:
        assert f"``{goal}``" in page
    assert set(re.findall(r"^``(\w+(?: \w+)?)``(?: |$)", page, re.MULTILINE)) == {
        *(verb.name for verb in VISIBLE),
        *("0", "1", "2", "3", "4", "5", "6", "130"),
        *("NO_COLOR", "DBUS_SYSTEM_BUS_ADDRESS"),
    }


def exported() -> dict[str, dict[str, list[str]]]:
    """Interface → its methods and properties, as service.py offers them."""
    tree = ast.parse((PROJECT / "vmcryptd/service.py").read_text())
    found: dict[str, dict[str, list[str]]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not node.keywords:
            continue
        name = ast.literal_eval(node.keywords[0].value)
        methods = [
            one.name
            for one in node.body
            if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.decorator_list
        ]
        properties = [
            one.target.id
            for one in node.body
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        ]
        found[name] = {"methods": methods, "properties": properties}
    return found


def test_the_page_of_the_bus_has_everything_that_is_offered() -> None:
    page = (DOCS / "org.vmcryptd1.5.rst").read_text()
    interfaces = exported()
    assert set(interfaces) == {f"org.vmcryptd1.{n}" for n in ("Manager", "Volume", "Guest", "Job")}
    for name, members in interfaces.items():
        assert f"``{name}``" in page
        heading = name.rpartition(".")[2].upper()
        _, _, section = page.partition(f"\n{heading}\n===")
        section = re.split(r"\n[A-Z]+\n===", section)[0]
        for method in members["methods"]:
            assert f"``{method}(" in section, f"{name}.{method}"
        properties = re.findall(r"^``(\w+)`` \([\w{}]+\)$", section, re.MULTILINE)
        assert sorted(properties) == sorted(members["properties"]), name


def test_the_page_of_the_bus_has_the_actions_of_every_method() -> None:
    page = (DOCS / "org.vmcryptd1.5.rst").read_text()
    _, _, section = page.partition("\nAUTHORISATION\n")
    section = section.partition("\nLIMITS\n")[0]
    actions: dict[str, set[str]] = {}
    for action, text in re.findall(
        r"^``(org\.vmcryptd1\.\w+)``\n((?:    .*\n)+)", section, re.MULTILINE
    ):
        actions[action] = set(re.findall(r"``(\w+)``", text))
    needed: dict[str, set[str]] = {}
    for member, method in Manager.methods.items():
        for action in method.actions:
            needed.setdefault(action, set()).add(member)
    assert actions == needed
    names = {name for method in Manager.methods.values() for name in details(method.purpose)}
    assert set(re.findall(r'action\.lookup\("(\w+)"\)', section)) == names


def details(purpose: str) -> list[str]:
    return re.findall(r"\$\((\w+)\)", purpose)


def test_the_page_of_the_bus_has_every_error() -> None:
    page = (DOCS / "org.vmcryptd1.5.rst").read_text()
    _, _, section = page.partition("\nERRORS\n")
    documented = dict(re.findall(r"^``(\w+)`` \((\d)\)$", section, re.MULTILINE))
    ours = {
        cls.name: str(cls.exit_code)
        for cls in subclasses().values()
        if cls.__module__ == "vmcryptd.core.errors"
    }
    assert documented == ours


# --- completion ---


def test_every_verb_and_option_is_completed() -> None:
    for name in ("vmcryptctl.bash", "_vmcryptctl", "vmcryptctl.fish"):
        text = (PROJECT / "config/completion" / name).read_text()
        for verb in VISIBLE:
            for word in verb.name.split():
                assert re.search(rf"\b{word}\b", text), f"{name}: {verb.name}"
            for argument in verb.arguments:
                if argument.name.startswith("--"):
                    assert argument.name.removeprefix("--") in text, f"{name}: {argument.name}"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", [*dict.fromkeys(v.name.split()[0] for v in VISIBLE), "--help", "--version"]),
        ("key ", [*(v.name.split()[1] for v in VISIBLE if v.name.startswith("key ")), "--help"]),
        ("key li", ["list"]),
        ("key list ", ["cr_a", "cr_b"]),
        ("key list --", ["--help", "--json"]),
        ("st", ["status", "start", "stop"]),
        ("lock ", ["cr_a", "cr_b"]),
        ("unlock cr_a ", ["cr_a", "cr_b"]),
        ("start m", ["mail\\ server"]),
        ("start $", ["\\$\\(touch\\ ran\\)"]),
        ("status ", ["all\\ of\\ them"]),
        ("status --", ["--help", "--failed", "--all", "--json"]),
        ("wait --timeout ", []),
        ("plan un", ["unlock:"]),
        ("plan unlock :", ["cr_a", "cr_b"]),
        ("plan unlock : cr_b", ["cr_b"]),
        ("boot ", []),
    ],
)
def test_bash_completion(typed: str, offered: list[str], tmp_path: Path) -> None:
    words = ["vmcryptctl", *typed.split(" ")]
    script = (
        "compopt() { :; }; source config/completion/vmcryptctl.bash; "
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vmcryptctl; '
        "[ ${#COMPREPLY[@]} = 0 ] || printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    assert completed(["bash", "-c", script, "bash", *words], tmp_path) == offered


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("st", ["start", "status", "stop"]),
        ("key ", sorted(v.name.split()[1] for v in VISIBLE if v.name.startswith("key "))),
        ("key list --j", ["--json"]),
        ("lock ", ["cr_a", "cr_b"]),
        ("start ", ["$(touch ran)", "mail server"]),
        ("status ", ["all of them"]),
        ("plan unlock:", ["unlock:cr_a", "unlock:cr_b"]),
        ("boot ", []),
    ],
)
def test_fish_completion(typed: str, offered: list[str], tmp_path: Path) -> None:
    script = f'source config/completion/vmcryptctl.fish; complete -C "vmcryptctl {typed}"'
    found = completed(["fish", "--no-config", "-c", script], tmp_path)
    assert [line.partition("\t")[0] for line in found] == offered


def test_zsh_completion_is_zsh() -> None:
    subprocess.run(["zsh", "-n", PROJECT / "config/completion/_vmcryptctl"], check=True)


def completed(argv: list[str], directory: Path) -> list[str]:
    """What a shell offers where vmcryptctl tells of these volumes and guests, one of them with a name that is code."""
    fake = directory / "vmcryptctl"
    fake.write_text(
        "#!/bin/sh\ncase $2 in volumes) printf 'cr_a\\ncr_b\\n' ;; guests) echo mail server; echo '$(touch ran)' ;; "
        "all) echo all of them ;; esac\n"
    )
    fake.chmod(0o755)
    environment: dict[str, Any] = {
        **os.environ,
        "PATH": f"{directory}:{os.environ['PATH']}",
        "HOME": str(directory),
    }
    done = subprocess.run(
        argv, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert not (PROJECT / "ran").exists()
    return done.stdout.splitlines()
