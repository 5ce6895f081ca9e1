# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each kind of key source stands in every list that users read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_config_mistakes import SHORT
from vmcryptd.core.model import SourceKind

PROJECT = Path(__file__).parents[2]
LISTS = ("README.md", "docs/vmcryptd.toml.5.rst")


@pytest.mark.parametrize("kind", SourceKind)
@pytest.mark.parametrize("path", LISTS)
def test_documents_name_it(path: str, kind: SourceKind) -> None:
    text = (PROJECT / path).read_text()
    assert f"`{kind}`" in text or f"`{kind}:" in text


@pytest.mark.parametrize("kind", SourceKind)
def test_the_hint_at_a_misspelt_source_names_it(kind: SourceKind) -> None:
    assert str(kind) in SHORT["KINDS"].replace(":", ", ").split(", ")
