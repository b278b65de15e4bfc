"""Alarms: what a run warns about while it trains, and the file `alarms.jsonl` in its directory.

The file has one JSON object per line, with the fields of `Alarm`. It exists from the first alarm on.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import atomic_file, open_binary
from common.strict import from_dict
from common.text import parse_json_object, show_ranges, to_json

ALARMS = "alarms.jsonl"
SHOWN_LAYERS = 3
"""The most alarms of one rule and step that are printed one by one."""


@dataclass(frozen=True)
class Alarm:
    """What a run warns about, or that it no longer does: one line of `alarms.jsonl`."""

    step: int
    """The optimizer step after which the run has warned."""
    rule: str
    """The name of the rule."""
    layer: int | None
    """The MoE layer, counted from 0. None: the rule is not about one layer."""
    message: str
    """What is wrong, its likely cause, and the keys to change, in one line."""
    first_step: int
    """The first step at which it was wrong."""
    ended: bool = False
    """Whether it is no longer wrong. The rule and the layer are those of an earlier alarm."""


def alarm_lines(alarms: Sequence[Alarm]) -> list[str]:
    """Return the lines to print for the alarms of one step. Many layers with the same alarm share a line."""
    lines = []
    groups: dict[tuple[str, bool], list[Alarm]] = {}
    for alarm in alarms:
        groups.setdefault((alarm.rule, alarm.ended), []).append(alarm)
    for group in groups.values():
        shown = group if len(group) <= SHOWN_LAYERS else group[: SHOWN_LAYERS - 1]
        lines += [f"{'' if alarm.ended else 'warning: '}step {alarm.step}: {alarm.message}" for alarm in shown]
        rest = group[len(shown) :]
        if rest:
            layers = show_ranges([alarm.layer for alarm in rest if alarm.layer is not None])
            lines.append(f"step {rest[0].step}: the same in layers {layers} (alarms.jsonl)")
    return lines


def append_alarms(directory: Path, alarms: Sequence[Alarm]) -> None:
    """Add lines to the file, and flush them to the disk.

    Raises:
        OSError: the file cannot be written.
    """
    with open(directory / ALARMS, "ab", buffering=0) as file:
        file.write(b"".join(to_json(asdict(alarm)).encode() + b"\n" for alarm in alarms))
        os.fsync(file.fileno())


def cut_alarms(directory: Path, step: int) -> None:
    """Remove the alarms after `step`, and a line that is incomplete or damaged, from the file.

    The file is replaced atomically. It is removed if nothing is left.

    Raises:
        OSError: the file cannot be written, or is not a regular file.
    """
    path = directory / ALARMS
    if not os.path.lexists(path):
        return
    kept = [alarm for alarm in read_alarms(directory) if alarm.step <= step]
    if not kept:
        path.unlink()
        return
    with atomic_file(path) as file:
        file.writelines(to_json(asdict(alarm)).encode() + b"\n" for alarm in kept)


def read_alarms(directory: Path) -> list[Alarm]:
    """Return the alarms of a run, without lines that are incomplete or damaged.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    path, alarms = directory / ALARMS, []
    if os.path.lexists(path):
        with open_binary(path) as file:
            for line in file.read().splitlines():
                with suppress(ValueError):
                    alarms.append(from_dict(Alarm, parse_json_object(line)))
    return alarms
