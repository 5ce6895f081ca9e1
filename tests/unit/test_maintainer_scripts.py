# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the Debian package's scripts remove: the files that the daemon writes, and never through a mount."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
from pathlib import Path

import pytest

from vmcryptd.adapters.systemd.state_files import StateFiles
from vmcryptd.config import files
from vmcryptd.core.model import Settings
from vmcryptd.posix.host_lock import HostLock

SCRIPTS = Path(__file__).resolve().parents[2] / "packaging/debian"
KEY = "not a key, but as precious"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root directory with all that the daemon writes."""
    runtime, state = tmp_path / "run/vmcryptd", tmp_path / "var/lib/vmcryptd"
    state.mkdir(parents=True)
    memory = StateFiles(runtime, state)
    memory.publish({"cr_a": True, "cr_b": False})
    for name in (name for name in dir(memory) if name.startswith("keep_")):
        keep = getattr(memory, name)
        keep(*[{}] * len(inspect.signature(keep).parameters))
    asyncio.run(memory.kept())
    assert HostLock(runtime / "lock").try_hold("vmcryptd")
    (tmp_path / "etc").mkdir()
    files.keep(state / "settings.json", {}, Settings())
    return tmp_path


def run(script: str, action: str, root: Path, before: str = "") -> str:
    """Run a script as dpkg does, in a mount namespace of its own where `before` may mount something."""
    command = f'{before}\nsh "$SCRIPT" "$ACTION" && find "$DPKG_ROOT" -type f'
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-ec", command],
        env={
            **os.environ,
            "DPKG_ROOT": str(root),
            "SCRIPT": str(SCRIPTS / script),
            "ACTION": action,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


def test_purging_removes_all_that_the_daemon_writes(root: Path) -> None:
    assert run("postrm", "remove", root) != ""
    assert not (root / "run/vmcryptd").exists()
    assert (root / "var/lib/vmcryptd/seen.json").exists()
    assert run("postrm", "purge", root) == ""
    assert not (root / "var/lib/vmcryptd").exists()


@pytest.mark.parametrize("action", ["remove", "purge"])
@pytest.mark.parametrize(
    "place", ["run/vmcryptd", "run/vmcryptd/keystore/keys", "run/vmcryptd/guest-content"]
)
def test_nothing_is_removed_through_a_mount(root: Path, place: str, action: str) -> None:
    (root / place).mkdir(parents=True, exist_ok=True)
    # The names of files that the script removes elsewhere, and one of a key.
    mounted = f"""
        mount -t tmpfs none {root}/{place}
        for name in goals.json volumes cr_a.key; do echo '{KEY}' >{root}/{place}/$name; done
        : >{root}/{place}/cr_a
    """
    left = run("postrm", action, root, mounted).splitlines()
    assert {f"{root}/{place}/{name}" for name in ("goals.json", "volumes", "cr_a.key", "cr_a")} <= {
        *left
    }


def test_files_of_volumes_are_removed(root: Path) -> None:
    for name in ("reencrypt-cr_a", "header-cr_a"):
        (root / "run/vmcryptd" / name).write_text("{}")
        (root / "var/lib/vmcryptd" / name).write_text(KEY)  # somebody's own: a backup, say
    said = run("postrm", "purge", root)
    assert not (root / "run/vmcryptd").exists()
    for name in ("reencrypt-cr_a", "header-cr_a"):
        assert f"{root}/var/lib/vmcryptd/{name}" in said


@pytest.mark.parametrize("name", ["goals.json", "guest-content/cr_a"])
def test_a_mount_on_a_file_does_not_fail_dpkg(root: Path, name: str) -> None:
    (root / "key").write_text(KEY)
    if name != "goals.json":
        (root / "key").write_text("")
    said = run("postrm", "purge", root, f"mount --bind {root}/key {root}/run/vmcryptd/{name}")
    assert f"{root}/key" in said
    assert f"vmcryptd: {root}/run/vmcryptd is left" in said
    assert not (root / "var/lib/vmcryptd").exists()


@pytest.mark.parametrize("directory", ["run/vmcryptd", "var/lib/vmcryptd"])
def test_what_the_daemon_did_not_write_is_left_and_named(root: Path, directory: str) -> None:
    (root / directory / "keys.luks").write_text(KEY)
    said = run("postrm", "purge", root)
    assert f"{root}/{directory}/keys.luks" in said
    assert f"vmcryptd: {root}/{directory} is left, something else is in it." in said


def test_an_upgrade_removes_nothing(root: Path) -> None:
    before = sorted(path for path in root.rglob("*"))
    run("postrm", "upgrade", root)
    assert sorted(path for path in root.rglob("*")) == before
