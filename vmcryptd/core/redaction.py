# SPDX-License-Identifier: LGPL-2.1-or-later
"""Key sources by their kind alone, in texts that everybody may read: an argument may hold a token."""

from __future__ import annotations

from vmcryptd.core.model import Settings


class Redaction:
    """Knows every key source that was configured since the daemon started: errors outlive a reload."""

    def __init__(self) -> None:
        self._kinds: dict[
            str, str
        ] = {}  # by source, the longest first: one may begin as another does

    def learn(self, settings: Settings) -> None:
        for spec in settings.volumes.values():
            self._kinds |= {str(one): one.kind for one in spec.keys if one.argument}
        longest_first = sorted(self._kinds, key=len, reverse=True)
        self._kinds = {source: self._kinds[source] for source in longest_first}

    def __call__(self, text: str) -> str:
        if ":" in text:
            for source, kind in self._kinds.items():
                text = text.replace(source, kind)
        return text
