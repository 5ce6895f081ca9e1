# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TPM 2.0 in software, which keeps what it knows while the test host it belongs to is off."""

import subprocess
from pathlib import Path

from tests.vm.host import Image


class Tpm:
    """One swtpm for one boot: it ends with the machine, so each boot needs `plug_in` before."""

    def __init__(self, image: Image, directory: Path) -> None:
        self._image = image
        self._state = directory / "tpm"
        self._state.mkdir(parents=True, exist_ok=True)

    @property
    def _socket(self) -> Path:
        return self._state / "socket"

    @property
    def qemu(self) -> list[str]:
        """For Host's `extra_qemu`."""
        return [
            "-chardev", f"socket,id=tpm,path={self._socket}",
            "-tpmdev", "emulator,id=tpm0,chardev=tpm",
            "-device", "tpm-crb,tpmdev=tpm0",
        ]  # fmt: skip

    def plug_in(self) -> None:
        """Returns when it takes connections."""
        subprocess.run(
            [
                *self._image.tool("swtpm", "swtpm"),
                "socket", "--tpm2", "--daemon", "--terminate",
                "--tpmstate", f"dir={self._state}",
                "--ctrl", f"type=unixio,path={self._socket}",
                "--flags", "startup-clear",
            ],
            check=True,
        )  # fmt: skip
