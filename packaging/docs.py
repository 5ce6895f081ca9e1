# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes the files that are generated from the code; with --check names those that are not up to date.

Run as `python packaging/docs.py`. The default configuration and the option pages come from
vmcryptd/config/schema.py, the shells' completion from vmcryptd/cli/verbs.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(Path(__file__).parent)]

import completion  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from vmcryptd.config.schema import TABLES  # noqa: E402

EXAMPLES = {"daemon": "daemon", "volume": "volume.cr_imap_encr", "guest": "guest.imap"}
BEGIN, END = ".. generated from vmcryptd/config/schema.py: begin", ".. generated: end"
PAGE = "docs/vmcryptd.toml.5.rst"


def generated() -> dict[str, str]:
    """Path in the project → what it has to hold."""
    return {
        "config/vmcryptd.toml": default_file(),
        "config/completion/vmcryptctl.bash": completion.bash(),
        "config/completion/_vmcryptctl": completion.zsh(),
        "config/completion/vmcryptctl.fish": completion.fish(),
        PAGE: with_options((PROJECT / PAGE).read_text(encoding="utf-8")),
    }


def toml(value: Any) -> str:
    """A value as TOML has it, which for these is as JSON has it."""
    return json.dumps(value, ensure_ascii=False)


def shown(field: FieldInfo) -> tuple[Any, bool]:
    """The value to show for a key, and whether that is its default."""
    extra = field.json_schema_extra
    text = extra.get("shown", field.default) if isinstance(extra, dict) else field.default
    if field.is_required():
        return text, False
    value = TypeAdapter(Annotated[field.annotation, field]).validate_python(text)
    return text, bool(value == field.default)


def default_text(field: FieldInfo) -> str:
    """The default in words."""
    value, is_default = shown(field)
    if field.is_required():
        return "Required"
    if is_default:
        return f"Default: {toml(value)}"
    return "Default: none" if field.default in (None, []) else f"Default: {toml(field.default)}"


# --- config/vmcryptd.toml ---


def default_file() -> str:
    lines = [
        "# SPDX-License-Identifier: LGPL-2.1-or-later",
        "#",
        "# The configuration of vmcryptd; see vmcryptd.toml(5). Every setting here is commented out, and shows",
        "# its default or an example, so this file by itself configures nothing. Tables can also",
        "# stand in files of their own in conf.d/. After a change:",
        "#",
        "#     vmcryptctl check && vmcryptctl reload",
    ]
    for name, table in TABLES.items():
        lines += ["", "", *_comment(table.__doc__ or ""), f"#[{EXAMPLES[name]}]"]
        for key, field in table.model_fields.items():
            value, is_default = shown(field)
            note = "" if is_default else f" {default_text(field)}."
            lines += ["", *_comment(f"{field.description}{note}"), f"#{key} = {toml(value)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


# --- the option pages in docs/vmcryptd.toml.5.rst ---


def with_options(page: str) -> str:
    """The page with what stands between its two marks written anew."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        sys.exit(f"{PAGE}: the marks are missing: {BEGIN!r} and {END!r}")
    options = "\n".join(_options())
    return f"{before}{BEGIN}\n\n{options}\n{END}{after}"


def _options() -> Iterator[str]:
    for name, table in TABLES.items():
        title = f"[{name}]" if name == "daemon" else f"[{name}.NAME]"
        yield from (title, "-" * len(title), "", table.__doc__ or "", "")
        for key, field in table.model_fields.items():
            yield from _option(key, field)


def _option(key: str, field: FieldInfo) -> Iterator[str]:
    value, is_default = shown(field)
    yield f"``{key}``"
    yield from textwrap.wrap(
        _rst(field.description or ""),
        96,
        initial_indent="    ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )
    if field.is_required():
        yield f"    Required. Example: ``{key} = {toml(value)}``"
    elif is_default:
        yield f"    Default: ``{toml(value)}``"
    else:
        yield f"    {default_text(field)}. Example: ``{key} = {toml(value)}``"
    yield ""


def _rst(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"``\1``", text).replace("*", r"\*")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, fail if a file differs"
    )
    check = parser.parse_args().check
    stale = []
    for name, text in generated().items():
        path = PROJECT / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    if check and stale:
        print(f"not up to date: {', '.join(stale)}; run packaging/docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
