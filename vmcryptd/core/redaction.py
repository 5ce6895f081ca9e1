# SPDX-License-Identifier: LGPL-2.1-or-later
"""Arguments of key sources in texts that everybody may read: they hold tokens, or tell where keys lie. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vmcryptd.core.model import KeySource, Settings, SourceKind

_WORD = re.compile(r"\S+")
_BEFORE, _AFTER = "\"'`(", "\"'`).,:;"
HIDDEN = "…"


class Redaction:
    """Takes out the arguments of all sources that have ever been configured.

    An error stays after its source has left the configuration, and its token may still be good.
    """

    def __init__(self) -> None:
        # First word of a text to be hidden → such texts with what stands for each.
        self._known: dict[str, dict[str, str]] = {}
        self._tokens: dict[str, dict[str, str]] = {}  # the same for those that may hold a token

    def learn(self, settings: Settings) -> None:
        """These sources are configured now."""
        for spec in settings.volumes.values():
            for source in spec.keys:
                for text, instead in _texts(source):
                    _add(self._known, text, instead)
                for text, instead in _with_tokens(source):
                    _add(self._tokens, text, instead)

    def learn_text(self, text: str, shown: str) -> None:
        """An earlier daemon showed this text so, by sources that it knew."""
        if text.strip() and text != shown:
            _add(self._known, text, shown)

    def __call__(self, text: str) -> str:
        """The text with sources by their kind alone, and without their paths."""
        return _without(self._known, text)

    def without_tokens(self, text: str) -> str:
        """The text as it may be kept for root: without arguments of programs, but with the paths of key files."""
        return _without(self._tokens, text)


def _add(known: dict[str, dict[str, str]], text: str, instead: str) -> None:
    first = text.split(maxsplit=1)[0]
    known.setdefault(first, {})[text] = instead


def _without(hidden: dict[str, dict[str, str]], text: str) -> str:
    parts, end = [], 0
    for match in _WORD.finditer(text):
        word = match[0]
        start = match.start() + len(word) - len(word.lstrip(_BEFORE))
        if start < end:
            continue  # within what was just hidden
        word = word.lstrip(_BEFORE)
        known = {**hidden.get(word.rstrip(_AFTER), {}), **hidden.get(word, {})}
        for long, instead in sorted(known.items(), key=lambda one: -len(one[0])):
            if text.startswith(long, start):
                parts += [text[end:start], instead]
                end = start + len(long)
                break
    return "".join((*parts, text[end:]))


def _texts(source: KeySource) -> Iterator[tuple[str, str]]:
    if not source.argument.strip():
        return
    yield str(source), str(source.kind)
    if source.kind in (SourceKind.FILE, SourceKind.EXEC):
        # Errors name the file, or the program, which other words of the command follow.
        yield source.argument.strip(), HIDDEN
    if source.kind is SourceKind.EXEC:
        yield source.argument.split()[0], HIDDEN


def _with_tokens(source: KeySource) -> Iterator[tuple[str, str]]:
    """A program's arguments may be tokens; its path is none."""
    command = source.argument.strip()
    if source.kind is SourceKind.EXEC and len(command.split()) > 1:
        shown = f"{command.split()[0]} {HIDDEN}"
        yield command, shown
        yield str(source), f"{source.kind}:{shown}"
