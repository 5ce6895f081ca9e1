# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a disk image stands on, as `qemu-img info` tells it.

Each image is opened in the format that the layer above names, and never probed: the content of a
raw image belongs to the guest, which could write a header there that names any file or host
(CVE-2024-32498). That is why this does not use `--backing-chain`, which probes where a layer names
no format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from vmcryptd.core.errors import DeadlineError, VmcryptdError
from vmcryptd.core.model import DiskSource, SourceType
from vmcryptd.posix.run import run

INFO_S = 20.0
MOST_LAYERS = 200  # an end for chains that lead in circles through symbolic links


async def chain(path: str, image_format: str) -> tuple[DiskSource, ...]:
    """The layers below the image, as far as they can be read now; none when qemu-img is missing.

    Raises DeadlineError when the disk does not answer.
    """
    found: dict[str, DiskSource] = {}
    layer = path
    while image_format not in ("", "raw") and len(found) < MOST_LAYERS:
        told = await _info(layer, image_format)
        if data := _data_file(told, layer):
            found.setdefault(data, _source(data, writable=layer == path))
        # A layer that cannot be read, because what holds it is locked, is still named by the one
        # above.
        below = _local(told.get("full-backing-filename") or told.get("backing-filename"), layer)
        if not below or below == path or below in found:
            break
        found[below] = _source(below, writable=False)
        layer, image_format = below, str(told.get("backing-filename-format") or "")
    return tuple(found.values())


async def _info(path: str, image_format: str) -> Mapping[str, Any]:
    argv = ["qemu-img", "info", "--force-share", "--output=json", "-f", image_format, "--", path]
    try:
        done = await run(argv, timeout_s=INFO_S)
        told = json.loads(done.out) if done.code == 0 else {}
    except DeadlineError:
        raise  # a disk that has just been switched on, say: later it may
    except (VmcryptdError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _data_file(told: Mapping[str, Any], overlay: str) -> str:
    specific = told.get("format-specific")
    data = specific.get("data") if isinstance(specific, dict) else None
    return _local(data.get("data-file") if isinstance(data, dict) else None, overlay)


def _local(name: object, overlay: str) -> str:
    """The path that a layer's name stands for, or an empty string when it is none of this host.

    Names may be paths, relative to the overlay, or `protocol:…` with the colon before the first
    slash (QEMU, block.c: path_has_protocol).
    """
    if not isinstance(name, str) or not name:
        return ""
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    elif ":" in name.partition("/")[0]:
        return ""
    return os.path.join(os.path.dirname(overlay), name)


def _source(path: str, *, writable: bool) -> DiskSource:
    kind = SourceType.BLOCK if path.startswith("/dev/") else SourceType.FILE
    return DiskSource(kind, path=path, writable=writable)
