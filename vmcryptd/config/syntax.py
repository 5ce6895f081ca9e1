# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses TOML with line numbers, and suggests corrections of common mistakes.

tomllib reports the line of a syntax error, but not of a valid key; this module finds that.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

from vmcryptd.core.errors import Mistake
from vmcryptd.core.text import escaped

Path = tuple[str | int, ...]  # table, name, key, index into a list

_MOST_MISTAKES = 20  # in one file; the rest is not reported
_SHOWN = 100  # characters of a quoted line
_TRIED = 1 << 20  # characters that are parsed to find corrections: about a second
_TABLES_WITH_NAMES = ("volume", "guest")

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_KEY = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|[A-Za-z0-9_-]+')
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""{1,3}|\'\'\'.*?\'\'\'{1,3}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}#\n]+")
_AT = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


class Document(NamedTuple):
    """The valid part of one file, and its mistakes."""

    tables: Mapping[str, Any]
    lines: Mapping[Path, int]
    mistakes: tuple[tuple[int, Mistake], ...]  # line, mistake
    whole: bool  # False: the rest after a mistake is unknown

    def line(self, path: Path) -> int:
        """The line of a key, else of its table; 0 if unknown."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)


def parse(name: str, text: str, lists: Container[str] = ()) -> Document:
    """Parse one file. A line with a likely correction is corrected, so that later mistakes are found, too.

    `lists` are the keys whose values are lists.
    """
    text = text.replace("\r\n", "\n")
    trials = _Trials()
    mistakes: list[tuple[int, Mistake]] = []
    for _ in range(_MOST_MISTAKES):
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            number, mistake, corrected = _explained(name, text, str(error), lists, trials)
            if mistake is not None:
                mistakes.append((number, mistake))
            if corrected is None:
                break
            text = corrected
        except (RecursionError, ValueError) as error:  # a number of 5000 digits is a ValueError
            is_deep = isinstance(error, RecursionError)
            what = "nested too deep" if is_deep else "a number has too many digits"
            number = _longest(text, r"[\[{]" if is_deep else r"[0-9_]+")
            mistakes.append((number, Mistake(f"{name}:{number}: not valid TOML: {what}")))
            break
        else:
            return Document(tables, _lines(text), tuple(mistakes), whole=True)
    return Document({}, {}, tuple(mistakes), whole=False)


# --- mistakes ---


def _longest(text: str, pattern: str) -> int:
    """The line with the most matching characters."""
    lines = text.split("\n")
    lengths = [sum(map(len, re.findall(pattern, line))) for line in lines]
    return lengths.index(max(lengths)) + 1


def _explained(
    name: str, text: str, error: str, lists: Container[str], trials: _Trials
) -> tuple[int, Mistake | None, str | None]:
    """The line, its mistake, and the whole text with the line corrected if possible.

    No mistake if the corrected line is refused anyway, for a better reason.
    """
    at = _AT.search(error)
    lines = text.split("\n")
    number = int(at[1]) if at and at[1] else len(lines)
    begins = trials.begin(lines, number)
    if begins < number and (not (at and at[1]) or _begins_statement(lines[number - 1])):
        number = begins  # it was never closed; the parser noticed far below
    line, continues = lines[number - 1], begins < number
    what = _in_words(_AT.sub("", error), line)
    for corrected in _corrections(line, continues, lists):
        lines[number - 1] = corrected
        attempt, until_here = "\n".join(lines), "\n".join(lines[:number])
        works = trials.goes_beyond(attempt, number) if continues else trials.parses(until_here)
        if corrected == line or not works:
            continue
        if _is_refused_anyway(corrected):
            return number, None, attempt
        if re.search(r"(UUID|LABEL)=[\"']", line):
            what += "; no quotes inside UUID=…"
        elif corrected.count('"') > line.count('"') and "quotes" not in what:
            what += "; a text stands in quotes"
        text = f"{name}:{number}: not valid TOML: {what}"
        return number, Mistake(text, _shown(line), corrected.strip()), attempt
    return number, Mistake(f"{name}:{number}: not valid TOML: {what}", _shown(line)), None


def _in_words(error: str, line: str) -> str:
    """tomllib's message, in the configuration's terms instead of tomllib's."""
    key, equals, value = line.partition("=")
    if match := re.match(r"Cannot declare (\(.*\)) twice", error):
        name = ".".join(str(part) for part in ast.literal_eval(f"({match[1]},)")[0])
        return f"the table [{escaped(name)}] stands twice; make it one"
    if error == "Cannot overwrite a value":
        if equals and not line.lstrip().startswith("["):
            return f"the key {escaped(key.strip())} stands twice in its table; keep one of the two"
        return "a table and a key have the same name"
    if error.startswith("Illegal character '\\n'") or error == "Unterminated string":
        return "the quotes are not closed"
    if error == "Unclosed array":
        return "the list is not closed, or a comma is missing in it"
    if error == "Expected newline or end of document after a statement":
        return "unexpected text at the end of the line"
    if "'='" in error:
        return "expected KEY = VALUE"
    if error == "Invalid value" and equals and not value.strip():
        return "the value is missing"
    return error[:1].lower() + error[1:]


def _shown(line: str) -> str:
    return escaped(line.strip().replace("\t", " "), _SHOWN)


class _Trials:
    """Parses possible corrections, up to a bound: the daemon reads the configuration, too."""

    def __init__(self) -> None:
        self._left = _TRIED

    def _error(self, text: str) -> str:
        """tomllib's message; empty if the text is valid."""
        self._left -= len(text)
        if self._left < 0:
            return "not tried"
        try:
            tomllib.loads(text)
        except (RecursionError, ValueError) as error:
            return str(error)
        return ""

    def parses(self, text: str) -> bool:
        return not self._error(text)

    def goes_beyond(self, text: str, number: int) -> bool:
        """Whether the parser accepts this line."""
        error = self._error(text)
        at = _AT.search(error)
        return not error or (at is not None and (not at[1] or int(at[1]) > number))

    def begin(self, lines: list[str], number: int) -> int:
        """The first line of the statement with the error in line `number`."""
        for first in range(number, max(0, number - 100), -1):
            if self.parses("\n".join(lines[: first - 1])):
                return first
        return number


def _begins_statement(line: str) -> bool:
    return bool(re.match(r"\s*(\[+\s*(daemon|volume|guest)\b|[A-Za-z_]+\s*=)", line))


def _is_refused_anyway(line: str) -> bool:
    """Whether it is the table of a volume with a name that no mapping can have."""
    match = re.match(r'\[volume\."(.*)"\]$', line)
    return bool(match) and not re.fullmatch(r"[A-Za-z0-9._+-]+", match[1] if match else "")


def _corrections(line: str, continues: bool, lists: Container[str]) -> Iterator[str]:
    """Possible corrections of a line, the most likely first."""
    straight = line.translate(
        dict.fromkeys(map(ord, "“”„«»"), '"') | dict.fromkeys(map(ord, "‘’‚"), "'")
    )
    if straight != line:
        yield straight
        line = straight
    stripped = line.strip()
    if continues and not _begins_statement(line):
        item, comma, _ = stripped.partition(",")
        yield _quoted(item) + comma
        return
    if stripped.startswith(("//", ";", "--", "!")):
        yield f"# {stripped.lstrip('/;-! ')}"
        return
    if stripped.startswith("["):
        yield from _headers(stripped)
        return
    match = re.match(r"([\w.\"'-]+)\s*(:=|=>|==|[=:]|\s)\s*(.*)$", stripped)
    if match is None:
        return
    key, _, rest = match.groups()
    value, comment = _without_comment(rest)
    for one in _values(value, key in lists):
        yield f"{key} = {one}{comment}"


def _headers(line: str) -> Iterator[str]:
    match = re.match(r"\[+\s*([A-Za-z]+)\s*[.:/\s]?\s*([^\]\[=]*?)\s*\]*\s*(?:[#;].*)?$", line)
    if match is None:
        return
    table, name = match[1], match[2].strip("\"'")
    if not name:
        if table not in _TABLES_WITH_NAMES:
            yield f"[{table}]"
    elif _BARE.fullmatch(name):
        yield f"[{table}.{name}]"
    elif table in _TABLES_WITH_NAMES:
        yield f"[{table}.{json.dumps(name, ensure_ascii=False)}]"


def _without_comment(rest: str) -> tuple[str, str]:
    match = re.match(r"(.*?)\s+(?:#|//|;)\s*([^\"']*)$", rest)
    return (match[1], f"  # {match[2]}") if match else (rest.rstrip(";, "), "")


def _values(value: str, is_list: bool) -> Iterator[str]:
    if not value:
        return
    yield value  # the mistake may be around it
    if " = " in value:
        return  # two keys in one line
    word = value.strip("\"'").lower()
    if word in ("true", "yes", "on", "false", "no", "off") and not value.startswith(('"', "'")):
        yield "true" if word in ("true", "yes", "on") else "false"
        return
    if is_list or value.startswith("["):
        items = re.split(r"\s*,\s*|(?<=[\"'])\s+(?=[\"'])", value.strip("[] "))
        yield "[" + ", ".join(_quoted(item) for item in items if item) + "]"
        return
    if "\\" in value and "'" not in value:
        yield "'" + value.strip('"') + "'"
    yield _quoted(value)


def _quoted(value: str) -> str:
    """The text in correct quotes."""
    return json.dumps(re.sub(r"[\"']", "", value).strip(), ensure_ascii=False)


# --- lines of keys ---


def _lines(text: str) -> dict[Path, int]:
    """Path → line, for every table and key of a valid document; the first if there are several."""
    try:
        return _Scanner(text).found
    except (RecursionError, IndexError, ValueError):
        return {}  # then mistakes name file and table only


class _Scanner:
    """Scans TOML's structure; tomllib has already checked that it is valid."""

    def __init__(self, text: str) -> None:
        self.found: dict[Path, int] = {}
        self._text = text
        self._at = 0
        self._counted = 0, 1  # position, its line
        table: Path = ()
        while self._skip_space():
            if text[self._at] == "[":
                self._at += 2 if text.startswith("[[", self._at) else 1
                table = self._key(())
                self._at = text.index("]", self._at)
                while text[self._at : self._at + 1] == "]":
                    self._at += 1
            else:
                self._value(self._key(table))

    def _skip_space(self) -> bool:
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._at < len(self._text)

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(self._at)
        self._at = match.end()
        return match[0]

    def _key(self, prefix: Path) -> Path:
        """A dotted key; stops after it."""
        while True:
            self._skip_space()
            self._note(prefix)
            part = self._match(_KEY)
            prefix = *prefix, tomllib.loads(f"k = {part}")["k"] if part[0] in "\"'" else part
            self._note(prefix)
            self._skip_space()
            if self._text[self._at] != ".":
                return prefix
            self._at += 1

    def _note(self, path: Path) -> None:
        position, line = self._counted
        self._counted = self._at, line + self._text.count("\n", position, self._at)
        if path:
            self.found.setdefault(path, self._counted[1])

    def _value(self, path: Path) -> None:
        if self._text[self._at] == "=":
            self._at += 1
        self._skip_space()
        self._note(path)
        match self._text[self._at]:
            case "[":
                self._list("]", lambda index: self._value((*path, index)))
            case "{":
                self._list("}", lambda _: self._value(self._key(path)))
            case "'" | '"':
                self._match(_STRING)
            case _:
                self._match(_SCALAR)

    def _list(self, end: str, member: Callable[[int], None]) -> None:
        self._at += 1
        index = 0
        while self._skip_space() and self._text[self._at] != end:
            member(index)
            index += 1
            self._skip_space()
            if self._text[self._at] == ",":
                self._at += 1
        self._at += 1
