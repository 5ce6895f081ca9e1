# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units, configuration files and code say the same, and the system's own tools accept them."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest

import vmcryptd

PROJECT = Path(__file__).resolve().parents[2]
UNITS = PROJECT / "units"
CONFIG = PROJECT / "config"

NAME = "org.vmcryptd1"
STANDARD_INTERFACES = {
    "org.freedesktop.DBus.Introspectable",
    "org.freedesktop.DBus.ObjectManager",
    "org.freedesktop.DBus.Peer",
    "org.freedesktop.DBus.Properties",
}

# Each of these gives a service a mount namespace (systemd's exec_needs_mount_namespace()), in which
# unmounting has no effect on the host.
NAMESPACING = {
    "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "ExtensionDirectories",
    "ExtensionImages", "InaccessiblePaths", "MountFlags", "MountImages", "NoExecPaths",
    "PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateNetwork", "PrivatePIDs", "PrivateTmp",
    "ProcSubset", "ProtectControlGroups", "ProtectHome", "ProtectKernelLogs",
    "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem",
    "ReadOnlyPaths", "ReadWritePaths", "RootDirectory", "RootImage", "TemporaryFileSystem",
}  # fmt: skip

Unit = dict[str, list[str]]


def unit(name: str) -> Unit:
    """Option → the words of all its lines; an option has the same name in one section only."""
    options: Unit = defaultdict(list)
    text = (UNITS / name).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and line[0] not in "#;[":
            option, _, value = line.partition("=")
            options[option].extend(value.split())
    return options


@pytest.fixture(scope="module")
def trees() -> list[ast.AST]:
    return [ast.parse(path.read_text()) for path in (PROJECT / "vmcryptd").rglob("*.py")]


@pytest.fixture(scope="module")
def interfaces(trees: list[ast.AST]) -> set[str]:
    """class Manager(Interface, name="org.vmcryptd1.Manager")"""
    return {
        keyword.value.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for keyword in node.keywords
        if keyword.arg == "name"
        and isinstance(keyword.value, ast.Constant)
        and str(keyword.value.value).startswith(NAME)
    }


@pytest.fixture(scope="module")
def used_actions(trees: list[ast.AST]) -> set[str]:
    """@exported(action="org.vmcryptd1.unlock"), a tuple of these, or None, which needs no authorisation"""
    actions = set()
    for tree in trees:
        constants = {
            node.targets[0].id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "exported":
                (action,) = (word.value for word in node.keywords if word.arg == "action")
                for value in action.elts if isinstance(action, ast.Tuple) else [action]:
                    if isinstance(value, ast.Name):
                        actions.add(constants[value.id])
                    else:
                        assert isinstance(value, ast.Constant)
                        actions.add(value.value)
    return actions - {None}


# --- the bus ---


def test_activation_and_unit_have_the_bus_name() -> None:
    activation = (CONFIG / f"{NAME}.service").read_text()
    assert f"\nName={NAME}\n" in activation
    assert "\nUser=root\n" in activation
    assert "\nSystemdService=vmcryptd.service\n" in activation
    assert unit("vmcryptd.service")["BusName"] == [NAME]
    assert unit("vmcryptd.service")["Type"] == ["notify"]


def test_bus_policy(interfaces: set[str]) -> None:
    root = ElementTree.parse(CONFIG / f"{NAME}.conf").getroot()
    owners = {
        (policy.get("user"), rule.get("own"))
        for policy in root.iter("policy")
        for rule in policy
        if rule.get("own")
    }
    assert owners == {("root", NAME)}
    rules = [rule for policy in root.iter("policy") if policy.get("context") for rule in policy]
    assert all(rule.tag == "allow" for rule in rules)
    assert {rule.get("send_destination") for rule in rules} == {NAME}
    assert {rule.get("send_interface") for rule in rules} == interfaces | STANDARD_INTERFACES
    members = {rule.get("send_member") for rule in rules if rule.get("send_member")}
    assert members == {"Get", "GetAll"}, "no property can be set"


def test_each_action_is_declared_and_used(used_actions: set[str]) -> None:
    root = ElementTree.parse(CONFIG / f"{NAME}.policy").getroot()
    declared = {action.get("id", ""): action for action in root.iter("action")}
    assert set(declared) == used_actions
    for action in declared.values():
        defaults = {rule.tag: rule.text for rule in action.iterfind("defaults/*")}
        assert defaults == {
            "allow_any": "auth_admin",
            "allow_inactive": "auth_admin",
            "allow_active": "auth_admin_keep",
        }
        assert action.findtext("description")
        assert action.findtext("message")
    example = (CONFIG / "examples/50-vmcryptd.rules").read_text()
    assert set(re.findall(rf'"({NAME}\.\w+)"', example)) <= set(declared)


# --- units ---


def test_the_daemon_shares_the_mounts_of_the_host() -> None:
    options = unit("vmcryptd.service")
    assert not NAMESPACING & set(options)
    # They come with a list of devices, and volumes are any device.
    assert not {"ProtectClock", "DeviceAllow", "DevicePolicy"} & set(options)


def test_keys_do_not_leave_memory() -> None:
    options = unit("vmcryptd.service")
    assert options["LimitCORE"] == options["MemorySwapMax"] == ["0"]
    assert options["KeyringMode"] == ["private"]


def test_a_crash_keeps_what_was_to_be() -> None:
    options = unit("vmcryptd.service")
    assert options["RuntimeDirectoryPreserve"] == ["yes"]
    assert options["Restart"] == ["always"]
    assert options["StartLimitIntervalSec"] == ["0"]


def test_guests_are_stopped_while_all_they_need_lives() -> None:
    options = unit("vmcryptd-guests.service")
    needed = {
        "vmcryptd.service", "dbus.service", "systemd-udevd.service", "libvirtd.service",
        "libvirtd.socket", "virtqemud.service", "virtqemud.socket", "virt-guest-shutdown.target",
        "libvirt-guests.service",
    }  # fmt: skip
    assert needed <= set(options["After"])
    # An inactive target orders nothing.
    assert "virt-guest-shutdown.target" in options["Wants"]
    for strong in ("Requires", "Requisite", "BindsTo", "PartOf", "StopPropagatedFrom"):
        assert strong not in options
    # A unit that failed to start is not stopped.
    assert options["ExecStart"][0].startswith("-")
    assert "infinity" not in options["TimeoutStopSec"]


def test_no_boot_waits_for_the_target_unasked() -> None:
    pulled = {
        name
        for path in UNITS.iterdir()
        for option in ("Wants", "Requires", "WantedBy", "RequiredBy", "Also")
        for name in unit(path.name)[option]
    }
    assert "vmcryptd.target" not in pulled
    assert "WantedBy" not in unit("vmcryptd.target") | unit("vmcryptd-ready.service")
    assert unit("vmcryptd.target")["Requires"] == ["vmcryptd-ready.service"]


def test_no_unit_is_bound_to_a_device() -> None:
    for path in UNITS.glob("*.service"):
        assert not {"BindsTo", "RequiresMountsFor"} & set(unit(path.name))


def test_the_tools_of_systemd_accept_the_units(tmp_path: Path) -> None:
    directory = tmp_path / "usr/lib/systemd/system"
    directory.mkdir(parents=True)
    for path in UNITS.glob("*.*"):
        if path.suffix in {".service", ".target"}:
            shutil.copy(path, directory)
    # The rest of the system: what ours are ordered after, and what would show a cycle.
    for system in (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system")):
        for path in system.glob("*.*"):
            if not (directory / path.name).exists() and path.exists() and path.is_file():
                shutil.copy(path, directory)
    for program in ("usr/sbin/vmcryptd", "usr/bin/vmcryptctl"):
        (tmp_path / program).parent.mkdir(exist_ok=True)
        (tmp_path / program).touch(0o755)
    names = [path.name for path in UNITS.iterdir() if path.suffix in {".service", ".target"}]
    verify = [
        "systemd-analyze",
        "verify",
        "--man=no",
        "--recursive-errors=one",
        f"--root={tmp_path}",
    ]
    result = subprocess.run(
        [*verify, *names], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, check=False
    )
    complaints = [
        line for line in result.stdout.splitlines() if "vmcryptd" in line or "cycle" in line
    ]
    assert not complaints
    assert result.returncode == 0, result.stdout
    subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=63", "--no-pager",
         f"--root={tmp_path}", "vmcryptd.service"],
        stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def test_units_use_verbs_that_exist() -> None:
    verbs = {
        match
        for path in UNITS.glob("*.service")
        for match in re.findall(
            r"^Exec\w+=-?/usr/bin/vmcryptctl (.+)$", path.read_text(), re.MULTILINE
        )
    }
    assert verbs == {"boot", "shutdown", "console", "wait", "reload"}
    main = "import sys; from vmcryptd.cli.main import main; sys.exit(main())"
    for verb in verbs:
        result = subprocess.run(
            [sys.executable, "-c", main, verb, "--help"],
            cwd=PROJECT, stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"vmcryptctl {verb}"


# --- udev ---


def test_udev_rules_are_well_formed() -> None:
    token = r'(?:[A-Z]+(?:\{[^}]+\})?\s*(?:==|!=|=|\+=|-=|:=)\s*e?"[^"]*")'
    lines = (UNITS / "vmcryptd.rules").read_text().replace("\\\n", " ").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    for rule in rules:
        assert re.fullmatch(rf"{token}(?:,\s*{token})*", rule), rule
    text = "\n".join(rules)
    assert set(re.findall(r'GOTO="(\w+)"', text)) == set(re.findall(r'LABEL="(\w+)"', text))
    assert rules[-1] == 'LABEL="vmcryptd_end"'


@pytest.mark.parametrize("name", ["guest-content", "volumes"])
def test_the_daemon_writes_what_rule_and_hook_read(name: str, trees: list[ast.AST]) -> None:
    readers = "".join(
        (UNITS / file).read_text() for file in ("vmcryptd.rules", "vmcryptd.shutdown")
    )
    assert f"/{name}" in readers
    strings = {
        node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)
    }
    assert any(isinstance(text, str) and name in text.split("/") for text in strings)


# --- the shutdown hook ---


class Hook:
    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "sys/block").mkdir(parents=True)
        (path / "run").mkdir()
        (path / "kmsg").touch()
        (path / "console").touch()

    def mapping(self, number: int, name: str, uuid: str) -> None:
        dm = self.path / f"sys/block/dm-{number}/dm"
        dm.mkdir(parents=True)
        (dm / "name").write_text(f"{name}\n")
        (dm / "uuid").write_text(f"{uuid}\n")

    def run(self) -> str:
        environment = {
            "PATH": os.environ["PATH"],
            "VMCRYPTD_SYS": str(self.path / "sys"),
            "VMCRYPTD_RUN": str(self.path / "run"),
            "VMCRYPTD_KMSG": str(self.path / "kmsg"),
            "VMCRYPTD_CONSOLE": str(self.path / "console"),
        }
        result = subprocess.run(
            ["sh", UNITS / "vmcryptd.shutdown", "poweroff"],
            env=environment, text=True, check=True,
            stderr=subprocess.STDOUT, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert result.stdout == ""
        return (self.path / "kmsg").read_text()


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path)


def test_hook_is_quiet_when_all_is_closed(hook: Hook) -> None:
    assert hook.run() == ""
    hook.mapping(0, "vg-root", "LVM-abc")
    hook.mapping(1, "empty", "")
    assert hook.run() == ""


def test_hook_names_what_is_open_and_whose_it_is(hook: Hook) -> None:
    hook.mapping(0, "luks-root", "CRYPT-LUKS2-0123-luks-root")
    hook.mapping(1, "cr_imap_encr", "CRYPT-LUKS2-4567-cr_imap_encr")
    (hook.path / "run/volumes").write_text("cr_mail\ncr_imap_encr")
    said = hook.run()
    assert "<2>vmcryptd: STILL OPEN at poweroff, keys in memory: cr_imap_encr\n" in said
    # The root file system's own is no failure.
    assert "<6>vmcryptd: Open at poweroff, not vmcryptd's: luks-root\n" in said
    assert "STILL OPEN" in (hook.path / "console").read_text()


def test_hook_does_not_wait_for_a_console_that_nobody_reads(hook: Hook) -> None:
    hook.mapping(0, "luks-root", "CRYPT-LUKS2-0123-luks-root")
    (hook.path / "console").unlink()
    os.mkfifo(hook.path / "console")
    assert "luks-root" in hook.run()


# --- one version ---


def test_one_version() -> None:
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (PROJECT / "packaging/debian/changelog").read_text()
    assert changelog.startswith(f"vmcryptd ({version}) ")
    spec = (PROJECT / "packaging/vmcryptd.spec").read_text()
    assert re.search(rf"^Version: +{re.escape(version)}$", spec, re.MULTILINE)
    assert vmcryptd.__version__ == version
