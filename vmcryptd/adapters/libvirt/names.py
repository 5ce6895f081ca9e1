# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the host's paths in QEMU's image names and options. Pure: no I/O.

A name is a path, `PROTOCOL:…` with the colon before the first slash, or `json:{…}` with a tree of
block devices (QEMU, block.c: path_has_protocol, parse_json_protocol; block/vvfat.c for `fat:`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

# Block drivers for the file itself, not for a format in it (QEMU, qapi/block-core.json).
_FILE_DRIVERS = ("file", "host_device", "host_cdrom")


def images(name: str, image_format: str = "", directory: str = "/") -> Iterator[tuple[str, str]]:
    """The files and devices in an image's name, each with its format, if that is named.

    A relative path starts at `directory`, the overlay's.
    """
    protocol, colon, rest = name.partition(":")
    if not colon or "/" in protocol:
        if name:
            yield os.path.join(directory, name), image_format
    elif protocol == "json":
        yield from _nodes(_tree(rest), image_format)
    elif protocol == "file":
        yield from images(
            f"./{rest}" if not rest.startswith("/") else rest, image_format, directory
        )
    elif protocol == "fat":
        # fat:rw:16:label=x:DIRECTORY; QEMU's working directory is the root.
        yield os.path.join("/", rest.rpartition(":")[2]), "raw"
    else:
        yield from ((path, "") for path in _in_words(rest))


def paths(text: str) -> Iterator[str]:
    """The absolute host paths in an attribute or element that may hold a path or an image's name."""
    if text.startswith("/"):
        yield text
    elif text.startswith(("json:", "file:", "fat:")):
        yield from (path for path, _ in images(text) if path.startswith("/"))


def paths_in_option(text: str) -> Iterator[str]:
    """The same in an argument of QEMU's command line, or the value of a variable.

    Arguments are `key=value,key=value` with commas doubled in values, or JSON.
    """
    if text.startswith("{"):
        yield from (path for path, _ in _nodes(_tree(text), ""))
        return
    for part in text.replace(",,", "\0").split(","):
        part = part.replace("\0", ",")
        key, equals, value = part.partition("=")
        value = value if equals and "/" not in key else part
        if value.startswith(("json:", "fat:")):
            yield from paths(value)
        else:
            yield from _in_words(value)


def _in_words(text: str) -> Iterator[str]:
    """`/a:/b`, `unix:/socket`, `rbd:pool/image:conf=/etc/ceph.conf`; a URL's `//host` is no path."""
    for word in re.split(r"[:;&?]", text):
        key, equals, value = word.partition("=")
        value = value if equals and "/" not in key else word
        if value.startswith("/") and not value.startswith("//"):
            yield value


def _tree(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _nodes(node: Any, image_format: str) -> Iterator[tuple[str, str]]:
    """The files in a tree of block devices; nested, or flat with keys such as `file.filename`."""
    left = [(node, image_format)]
    while left:
        node, image_format = left.pop(0)
        if isinstance(node, str):
            if node.startswith(("/", "json:", "file:", "fat:")):
                yield from images(node, image_format)
        elif isinstance(node, list):
            left += [(child, "") for child in node]
        elif isinstance(node, dict):
            node = _nested(node)
            driver = node.get("driver")
            if isinstance(driver, str) and driver not in _FILE_DRIVERS:
                image_format = driver
            for key, child in node.items():
                # A format describes its own file; other children carry a driver of their own.
                inner = image_format if key in ("file", "filename") else ""
                left.append((child, inner))


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        head, dot, rest = key.partition(".")
        if not dot:
            nested.setdefault(head, value)
        else:
            below = nested.setdefault(head, {})
            if isinstance(below, dict):
                below[rest] = value
    return nested
