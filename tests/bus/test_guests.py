# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that are off, die, or must not start, and libvirt that is away: what is shown, and what `wait` says."""

from __future__ import annotations

import json

import pytest

from tests.bus.simulated import Host, ctl, host
from vmcryptd.bus.transport import RemoteError
from vmcryptd.core.errors import VmcryptdError

__all__ = ["host"]  # a fixture


def imap(*lines: str, disk: str = "/dev/mapper/cr_imap") -> str:
    """A volume that a key file opens, and a guest on it that boot starts."""
    return "\n".join(
        [
            "[volume.cr_imap]",
            'device = "/dev/vg/imap"',
            'keys = ["file:/etc/k"]',
            "[sim.volume.cr_imap]",
            'sources = ["file:/etc/k"]',
            "[guest.imap]",
            'needs = ["cr_imap"]',
            "[sim.guest.imap]",
            f'disks = ["{disk}"]',
            "autostart = true",
            *lines,
        ]
    )


def test_a_guest_that_was_shut_down_is_off_and_the_host_stays_ready(host: Host) -> None:
    host.start(imap('shuts_down_after = "0.1s"'))
    host.boot("ready")
    host.until(lambda client: client.host["Off"] == ["imap"])
    assert ctl("wait").code == 0
    done = ctl("wait", "--all")
    assert (done.code, done.err) == (
        1,
        "vmcryptctl: off: imap; `vmcryptctl start imap` starts what should run\n",
    )
    assert json.loads(ctl("wait", "--json").out)["off"] == ["imap"]
    shown = ctl("status").out
    assert shown.startswith("ready: ")
    assert "\n    off: imap\n" in shown
    host.call("Shutdown")
    assert host.states() == {"cr_imap": "locked", "imap": "off"}


def test_all_run(host: Host) -> None:
    host.start(imap())
    host.boot("ready")
    assert ctl("wait", "--all").code == 0
    status = json.loads(ctl("status", "--json").out)
    assert (status["off"], status["error"]) == ([], "")


def test_a_guest_that_dies_makes_the_host_degraded(host: Host) -> None:
    host.start(imap('dies_after = "0.1s"'))
    host.boot("degraded")
    done = ctl("wait")
    assert (done.code, "imap: guest imap died: its process ended" in done.err) == (1, True)
    status = json.loads(ctl("status", "--json").out)
    assert (status["state"], status["off"]) == ("degraded", ["imap"])
    host.call("Shutdown")
    status = json.loads(ctl("status", "--json").out)
    assert (status["state"], status["guests"][0]["error"]) == ("locked", "")


def test_libvirts_own_start_that_fails_is_followed_by_ours(host: Host) -> None:
    """Its autostart is half way when boot is asked for, and the volume still locked: it must fail."""
    host.start(imap('starting = "0.5s"'))
    assert host.states()["imap"] == "starting"
    host.boot("ready")
    assert host.states() == {"cr_imap": "unlocked", "imap": "running"}


def test_libvirts_own_start_that_fails_for_a_reason_shows_it(host: Host) -> None:
    host.start(imap('starting = "0.5s"', 'fault = "no such network"'))
    host.boot("degraded")
    assert "no such network" in ctl("status").out


def test_libvirt_is_away(host: Host) -> None:
    host.start(imap() + "\n[sim]\nlibvirt = false\n")
    host.boot("degraded")
    assert "libvirt cannot be reached" in ctl("status").out
    assert "libvirt cannot be reached" in ctl("wait").err
    status = json.loads(ctl("status", "--json").out)
    assert "libvirt cannot be reached" in status["error"]
    assert [(one["name"], one["state"]) for one in status["guests"]] == [("imap", "undefined")]
    assert status["volumes"][0]["state"] == "unlocked"


def test_a_guest_on_the_luks_device_is_refused(host: Host) -> None:
    host.start(imap(disk="/dev/vg/imap"))
    host.boot("degraded")
    text = (
        "guest imap was not started: its disk /dev/vg/imap (/dev/sim-cr_imap) is the LUKS device of"
    )
    assert text in ctl("start", "imap").err
    with pytest.raises((RemoteError, VmcryptdError)) as caught:
        host.call("StartGuest", "s", "imap")
    assert text in str(caught.value)
    assert host.states()["imap"] == "off"
