# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backing chain of a disk image, read with `qemu-img info`.

Each image is opened in the format that the layer above names, and never probed: the content of a
raw image belongs to the guest, which could write a header there that names any file or host
(CVE-2024-32498). `--backing-chain` is not used because it probes where a layer names no format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from vmcryptd.adapters.libvirt import names
from vmcryptd.core.errors import DeadlineError, StorageError, VmcryptdError
from vmcryptd.core.model import DiskSource, SourceType
from vmcryptd.posix.run import run

INFO_S = 20.0
# The output lists all snapshots, each in about 350 bytes: room for ten thousand.
INFO_LIMIT = 4 * 1024 * 1024
# libvirt starts no guest with a longer one (src/qemu/qemu_domain.c,
# QEMU_DOMAIN_STORAGE_SOURCE_CHAIN_MAX_DEPTH).
MOST_LAYERS = 200


async def chain(path: str, image_format: str) -> tuple[DiskSource, ...]:
    """The layers below the image, as far as they can be read now; none when qemu-img is missing.

    Raises DeadlineError when the disk does not answer, StorageError when there is more than is read.
    """
    found: dict[str, DiskSource] = {}
    left = [(path, image_format)]
    while left:
        layer, image_format = left.pop(0)
        if image_format in ("", "raw"):
            continue
        info = await _info(layer, image_format)
        directory = os.path.dirname(layer)
        for data, _ in names.images(_data_file(info), "raw", directory):
            found.setdefault(data, _source(data, writable=layer == path))
        # A layer on a locked volume cannot be read, but the layer above still names it.
        below = _text(info, "full-backing-filename") or _text(info, "backing-filename")
        below_format = _text(info, "backing-filename-format")
        for name, its_format in names.images(below, below_format, directory):
            if name != path and name not in found:
                found[name] = _source(name, writable=False)
                left.append((name, its_format))
        if len(found) > MOST_LAYERS:
            raise StorageError(
                f"the backing chain of {path} has more than {MOST_LAYERS} layers, which libvirt "
                f"refuses: shorten it with `virsh blockpull` or `qemu-img rebase`"
            )
    return tuple(found.values())


async def _info(path: str, image_format: str) -> Mapping[str, Any]:
    argv = ["qemu-img", "info", "--force-share", "--output=json", "-f", image_format, "--", path]
    try:
        done = await run(argv, timeout_s=INFO_S, output_limit=INFO_LIMIT)
    except DeadlineError:
        raise  # for example a disk that was just switched on: a later try may succeed
    except VmcryptdError:
        return {}
    if done.is_cut:
        raise StorageError(
            f"`qemu-img info {path}` says more than {INFO_LIMIT // 1024**2} MiB; delete snapshots "
            f"of the image with `qemu-img snapshot -d`"
        )
    try:
        info = json.loads(done.out) if done.code == 0 else {}
    except (ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


def _data_file(info: Mapping[str, Any]) -> str:
    specific = info.get("format-specific")
    data = specific.get("data") if isinstance(specific, dict) else None
    return _text(data, "data-file") if isinstance(data, dict) else ""


def _text(info: Mapping[str, Any], key: str) -> str:
    value = info.get(key)
    return value if isinstance(value, str) else ""


def _source(path: str, *, writable: bool) -> DiskSource:
    kind = SourceType.BLOCK if path.startswith("/dev/") else SourceType.FILE
    return DiskSource(kind, path=path, writable=writable)
