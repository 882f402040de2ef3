"""Reads csv and json files, and records the line on which each row begins, so that messages can name it.

The readers of `datasets` do not know lines. They also read the words "NA" and "null" in a csv file as missing values,
and stop at a row of another type without naming it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import fsspec

from ..errors import UsageError

SPACE = re.compile(r"[\s,]*")  # between the values of a file; a list's commas are not checked


class Table(NamedTuple):
    """The content of a file. Missing values are None."""

    columns: dict[str, list[Any]]
    lines: list[int]  # the line on which each row begins, from 1
    faults: dict[int, str]  # the reason, for each row that cannot be read


def read_table(path: str, kind: str) -> Table:
    """The rows of a file of this kind, csv, json or jsonl. Raises UsageError for a file without rows."""
    csv.field_size_limit(2**31 - 1)
    try:
        with fsspec.open(path, "rt", encoding="utf-8-sig", newline="", compression="infer") as file:
            table = (csv_table if kind == "csv" else json_table)(file)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8 ({error.reason}): save it as UTF-8") from error
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read as csv: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    if not table.lines:
        raise UsageError(f"{path} holds no row" + (" below its header" if table.columns else ": the file is empty"))
    return table


def csv_table(file: Iterable[str]) -> Table:
    """Unconverted texts. An empty field is None. A quoted field may extend over several lines."""
    reader = csv.reader(file, strict=True)
    header, rows, lines, faults, before = None, [], [], {}, 0
    try:
        for row in reader:
            line, before = before + 1, reader.line_num
            if not row:
                continue
            if header is None:
                header = _checked_header(row)
                continue
            if len(row) > len(header):
                faults[len(rows)] = f"has {len(row)} fields, the header {len(header)} (a text with commas needs quotes)"
            rows.append(row[: len(header)] + [""] * (len(header) - len(row)))
            lines.append(line)
    except csv.Error as error:
        raise csv.Error(f"line {before + 1}: {error}") from error
    values = zip(*rows, strict=True) if rows else [()] * len(header or ())
    columns = {name: [value or None for value in column] for name, column in zip(header or (), values, strict=True)}
    return Table(columns, lines, faults)


def _checked_header(row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"its header names the column {twice[0]!r} twice: rename one of them")
    other = next((sign for sign in (";", "\t") if sign in row[0]), None)
    if len(names) == 1 and other is not None:
        raise UsageError(f"its columns are separated by {other!r}: save it with commas between them")
    return names


def json_table(file: Any) -> Table:
    """The objects of a file: one per line, in sequence or in a list; or one object with lists of values by column."""
    text = file.read()
    found = list(_values(text))
    if len(found) == 1 and isinstance(found[0][1], dict) and _is_by_column(found[0][1]):
        line, columns = found[0]
        return Table(dict(columns), [line] * len(next(iter(columns.values()))), {})
    names = dict.fromkeys(name for _, row in found if isinstance(row, dict) for name in row)
    rows = [row if isinstance(row, dict) else {} for _, row in found]
    faults = {
        index: str(row) if isinstance(row, UsageError) else f"holds {shortened(row)}: expected an object"
        for index, (_, row) in enumerate(found)
        if not isinstance(row, dict)
    }
    return Table({name: [row.get(name) for row in rows] for name in names}, [line for line, _ in found], faults)


def _is_by_column(found: dict[str, Any]) -> bool:
    lengths = {len(value) if isinstance(value, list) else -1 for value in found.values()}
    return len(found) > 1 and len(lengths) == 1 and -1 not in lengths


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """Each value with the line on which it begins; a UsageError in place of a value that cannot be read."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = SPACE.match(text).end()
    in_list = text[position : position + 1] == "["
    position += in_list
    while (position := SPACE.match(text, position).end()) < len(text):
        if in_list and text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            value = UsageError(f"holds no json ({error.msg})")
            end = text.find("\n", position)
            position = len(text) if end < 0 else end
        yield line, value


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# The types of the values of a column


def kind_of(values: list[Any], written: bool) -> str:
    """The type of most of the values: list, bool, int, float or str. `written`: they are text, from a csv file."""
    counts: dict[str, int] = {}
    for value in values:
        kind = written_kind(value) if written else type(value).__name__
        counts[kind] = counts.get(kind, 0) + 1
    counts.pop("NoneType", None)
    if counts.get("float") and counts.get("int"):
        counts["float"] += counts.pop("int")
    return max(counts, key=counts.__getitem__, default="str")


def written_kind(value: str | None) -> str:
    """The type of a value that is given as text."""
    if value is None:
        return "NoneType"
    text = value.strip()
    if text.lower() in ("true", "false"):
        return "bool"
    try:
        float(text)
    except ValueError:
        return "str"
    return "int" if text.lstrip("+-").isdigit() else "float"


def converted(value: Any, kind: str, written: bool) -> Any:
    """The value, converted to this kind. Raises ValueError if that is impossible."""
    if value is None:
        return None
    if written and kind == "bool" and written_kind(value) == "bool":
        return value.strip().lower() == "true"
    if written and kind in ("int", "float", "str"):
        return {"int": int, "float": float, "str": str}[kind](value)
    if type(value).__name__ == kind:
        return value
    if kind == "float" and type(value) is int:
        return float(value)
    raise ValueError(value)
