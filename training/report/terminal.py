"""How figures reach a person: human-readable numbers, tables, and lines on stdout.

On a terminal `rich` draws; anywhere else (pipe, file, CI log) the same content comes as aligned plain lines without
escape codes, and no width limit cuts them. Output goes to `sys.stdout` as it is at the call. Rank 0 only.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 100_000
"""Columns that plain output may use: more than any line here needs, so that nothing is ever cut or wrapped."""


def _stdout() -> TextIO:
    """The stream behind `sys.stdout`, where rich puts a proxy that answers `isatty` wrongly while a bar is shown."""
    stream: TextIO = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return stream


def on_terminal() -> bool:
    """Whether a person's terminal is on the other end of stdout, one that can move its cursor."""
    return _stdout().isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def console() -> Console:
    """A console on stdout. `FORCE_COLOR` and the like are ignored off a terminal: a log file gets no escape codes."""
    terminal = on_terminal()
    return Console(
        file=_stdout(),
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        width=None if terminal else PLAIN_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def printable(text: str) -> str:
    """`text` with control characters, and characters that stdout cannot encode, written as backslash escapes.

    Newlines and tabs stay. A model with byte fallback can generate an escape sequence that would reprogram a terminal.
    """
    kept = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = _stdout().encoding or "utf-8"
    return kept.encode(encoding, errors="backslashreplace").decode(encoding)


def show(renderable: RenderableType) -> None:
    """Print; off a terminal without the spaces that tables leave at the ends of lines."""
    target = console()
    with target.capture() as captured:
        target.print(renderable, soft_wrap=isinstance(renderable, Text))
    text = captured.get()
    if not target.is_terminal:
        text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    # Through sys.stdout and not the console: rich's proxy there keeps a live bar below what is printed.
    sys.stdout.write(text)
    sys.stdout.flush()


def show_line(text: str = "", style: str = "") -> None:
    """Print `text` as it is: no markup, no wrapping (the terminal wraps, so that a copied command stays whole)."""
    show(Text(printable(text), style=style))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """Print a table after an empty line. Columns are right-aligned, except the first and those named in `left`."""
    drawn = on_terminal()
    table = Table(
        box=box.SIMPLE_HEAD if drawn else None, show_edge=False, pad_edge=False, padding=(0, 1 if drawn else 2, 0, 0)
    )
    for index, name in enumerate(columns):
        justify = "left" if index == 0 or name in left else "right"
        table.add_column(Text(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    show_line()
    show_line(title, style="bold")
    show(table)


def show_fields(title: str, fields: Mapping[str, str]) -> None:
    """Print `name  value` lines under a title, after an empty line."""
    show_line()
    show_line(title, style="bold")
    width = max(map(len, fields))
    for name, value in fields.items():
        show_line(f"  {name:<{width}}  {value}")


def _scaled(value: float, units: Sequence[str]) -> str:
    """`value` in the largest fitting unit, 1000 apart, with three significant digits (integers below 1000 as such)."""
    if not math.isfinite(value):
        return str(value)
    power = 0
    # 999.5 and not 1000: three digits of 999,950 would read "1000 k".
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    if power == 0 and float(value).is_integer():
        digits = 0
    else:
        digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {units[power]}".rstrip()


def human_count(count: float) -> str:
    """`46_700_000_000` -> `46.7 B` (thousand k, million M, billion B, trillion T)."""
    return _scaled(count, ("", "k", "M", "B", "T"))


def human_bytes(size: float) -> str:
    """`21_700_000` -> `21.7 MB`; decimal units (1 kB = 1000 B)."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_time(seconds: float) -> str:
    """`192` -> `3 min 12 s`; `0.42 s`, `12.3 s`, `1 h 02 min` and `2 d 03 h` for other lengths."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
