"""Output on stdout: lines, tables, and numbers in a readable form.

On a terminal, the package `rich` draws. Elsewhere (a pipe, a file, a CI log), the same content is printed as aligned
plain lines without escape codes, which are never cut or wrapped. Only rank 0 prints.
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
"""The width given to rich for plain output: more than any line needs, so that rich cuts and wraps nothing."""


def _stdout() -> TextIO:
    """Return the stream behind `sys.stdout`.

    While a progress bar is shown, `sys.stdout` is a proxy of rich's, whose `isatty` returns False.
    """
    stream: TextIO = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return stream


def on_terminal() -> bool:
    """Return whether stdout is a terminal that can move its cursor."""
    return _stdout().isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def console() -> Console:
    """Return a rich console on the current stdout.

    If stdout is not a terminal, environment variables such as `FORCE_COLOR` have no effect: a log file gets no escape
    codes.
    """
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
    """Return `text` with control characters, and characters that stdout cannot encode, as backslash escapes.

    Newlines and tabs stay. The text can come from a model, which can generate escape sequences that change the settings
    of a terminal.
    """
    escaped = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = _stdout().encoding or "utf-8"
    return escaped.encode(encoding, errors="backslashreplace").decode(encoding)


def show(renderable: RenderableType) -> None:
    """Print a rich renderable. Plain output gets no spaces at the ends of lines, which rich's tables would leave."""
    target = console()
    with target.capture() as captured:
        target.print(renderable, soft_wrap=isinstance(renderable, Text))
    text = captured.get()
    if not target.is_terminal:
        text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    # sys.stdout, and not the console's file: while a progress bar is shown, it is rich's proxy, which prints above the
    # bar.
    sys.stdout.write(text)
    sys.stdout.flush()


def show_line(text: str = "", style: str = "") -> None:
    """Print `text` without interpreting markup and without wrapping it.

    The terminal itself wraps a long line, so a command that is copied from it stays one line.
    """
    show(Text(printable(text), style=style))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
    """Print an empty line, `title` and a table.

    Args:
        title: the line above the table.
        columns: the names of the columns.
        rows: the cells of each row, as text.
        left: the names of the columns that are left-aligned, besides the first. The others are right-aligned.
    """
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
    """Print an empty line, `title`, and one line `name  value` for each field."""
    show_line()
    show_line(title, style="bold")
    width = max(map(len, fields))
    for name, value in fields.items():
        show_line(f"  {name:<{width}}  {value}")


def _scaled(value: float, units: Sequence[str]) -> str:
    """Return `value` in the largest unit that fits, with three significant digits; an integer below 1000 unchanged.

    Args:
        value: a number in the first unit.
        units: names of units, each 1000 times the one before.
    """
    if not math.isfinite(value):
        return str(value)
    power = 0
    # The limit is 999.5 and not 1000, because 999,950 rounded to three digits would be printed as "1000 k".
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    if power == 0 and float(value).is_integer():
        digits = 0
    else:
        digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {units[power]}".rstrip()


def human_count(count: float) -> str:
    """Return a count with a unit: k for thousand, M for million, B for billion, T for trillion.

    >>> human_count(46_700_000_000)
    '46.7 B'
    """
    return _scaled(count, ("", "k", "M", "B", "T"))


def human_bytes(size: float) -> str:
    """Return a number of bytes with a decimal unit (1 kB = 1000 B).

    >>> human_bytes(21_700_000)
    '21.7 MB'
    """
    return _scaled(size, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_time(seconds: float) -> str:
    """Return a duration in seconds as `0.42 s`, `12.3 s`, `3 min 12 s`, `1 h 02 min` or `2 d 03 h`.

    >>> human_time(192)
    '3 min 12 s'
    """
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
