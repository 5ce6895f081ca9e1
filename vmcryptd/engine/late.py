# SPDX-License-Identifier: LGPL-2.1-or-later
"""Volumes of the boot set that lack their device, header or key file: each rests until that comes."""

from __future__ import annotations

from collections.abc import Container

from vmcryptd.engine.inventory import Inventory, Sight


class Late:
    """The visible parts of each such volume at the last look."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._seen: dict[str, Sight] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self._seen)

    def rest(self, name: str, seen: Sight) -> None:
        """An attempt has failed with what was there when it began."""
        self._seen[name] = seen

    def expect(self, name: str) -> None:
        """An earlier daemon has waited for it: another attempt is worth while."""
        self._seen[name] = Sight(is_there=False)

    def discard(self, name: str) -> None:
        self._seen.pop(name, None)

    def keep_only(self, names: Container[str]) -> None:
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}

    def clear(self) -> None:
        self._seen.clear()

    def arrived(self) -> list[str]:
        """Those that may open now; they do not rest any more."""
        arrived = []
        for name, before in list(self._seen.items()):
            now = self._inventory.sight(name)
            if now.promises_more_than(before):
                arrived.append(name)
                del self._seen[name]
            else:
                self._seen[name] = now
        return arrived
