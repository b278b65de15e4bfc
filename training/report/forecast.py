"""What was predicted for a step and what was measured, as lines for the terminal and rows for the report.

`forecast.json` has the prediction, which `training.planning.forecast` writes, and under `measured` the figures of the
run, which `training.forecast` adds. This module reads it without trusting it, because it is a file.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.files import read_file
from common.text import parse_json_object, shorten
from training.report.plots import is_number
from training.report.terminal import human_bytes, human_time
from training.run import FORECAST_FILE

MAX_BYTES = 2**18
"""The file is smaller."""
LIMIT = 0.1
"""The largest deviation, as a share of the prediction, that needs no explanation."""
STATE = ("weights", "moments")
"""The parts of the memory that exist at every time, and that the run counts exactly."""
REST = "gradients, activations and temporary tensors"
BUSY = 0.8
"""If a rank runs on a CPU for a smaller share of its own time than this, other programs are named as a reason."""
COMPUTATION, COMMUNICATION = "computation", "communication and waiting for other ranks"
UNEVEN = 1.05
"""The rows on the fullest rank over those of balanced experts, from which they are named as a reason."""


class Compared(NamedTuple):
    """One figure."""

    name: str
    predicted: float | None
    measured: float | None
    show: Callable[[float], str]

    @property
    def deviation(self) -> float | None:
        """How far the measured figure is above the predicted one, as a share of the predicted one; None: unknown."""
        return self.measured / self.predicted - 1 if self.predicted and self.measured is not None else None

    def text(self) -> str:
        """Return the figure as words."""
        predicted, measured, deviation = self.shown()
        known = f"predicted {predicted}, measured {measured}"
        return f"{known} ({deviation})" if self.deviation is not None else known

    def shown(self) -> tuple[str, str, str]:
        """Return what was predicted, what was measured, and the deviation."""
        figures = ("-" if value is None else self.show(value) for value in (self.predicted, self.measured))
        predicted, measured = figures
        return predicted, measured, "-" if self.deviation is None else percent(self.deviation)


def percent(share: float) -> str:
    """Return a signed percentage.

    >>> percent(0.0131), percent(-0.07), percent(0.18)
    ('+1.3 %', '-7.0 %', '+18 %')
    """
    return f"{100 * share:+.{1 if abs(share) < 0.0995 else 0}f} %"


def short_time(seconds: float) -> str:
    """Return a duration, with more digits than `human_time` if it is short.

    >>> short_time(0.0245), short_time(0.41)
    ('24.5 ms', '0.41 s')
    """
    return f"{1000 * seconds:.1f} ms" if seconds < 0.0995 else human_time(seconds)


def read_forecast(directory: Path) -> dict[str, Any]:
    """Return the content of `forecast.json` in a run's directory; empty if it is missing or cannot be read."""
    try:
        return parse_json_object(read_file(directory / FORECAST_FILE, MAX_BYTES))
    except (OSError, ValueError):
        return {}


def summary(forecast: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the figures that `result.json` has of a forecast."""
    memory, step = _memory(forecast), _step(forecast)
    return {
        "plan/peak_bytes": memory.predicted,
        "plan/step_s": step.predicted,
        "real/peak_bytes": memory.measured,
        "real/step_s": step.measured,
    }


def lines(forecast: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> text of what was predicted and measured. Empty if there is nothing to say.

    A deviation of more than 10 % is followed by the part that deviates most, and by the reason if it is known.
    """
    found = {}
    if forecast.get("error"):
        found["forecast"] = f"none: {shorten(str(forecast['error']), 200)}"
    memory, step = _memory(forecast), _step(forecast)
    if memory.measured is not None or memory.predicted is not None:
        found["memory"] = "; ".join([memory.text(), *_reasons(memory, memory_parts(forecast), forecast)])
    if step.measured is not None or step.predicted is not None:
        found["step"] = "; ".join([step.text(), *_reasons(step, time_parts(forecast), forecast)])
    return found


def rows(forecast: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the rows of a table: a figure, what was predicted, what was measured, and the deviation."""
    memory, step = _memory(forecast), _step(forecast)
    if memory.predicted is None and step.predicted is None:
        return []
    compared = [
        memory._replace(name="memory at the peak"),
        *memory_parts(forecast),
        step._replace(name="optimizer step"),
        *time_parts(forecast),
    ]
    return [(figure.name, *figure.shown()) for figure in compared]


def memory_parts(forecast: Mapping[str, Any]) -> list[Compared]:
    """Return the parts of the memory of which the run knows its own figures."""
    memory = _memory(forecast)
    predicted, measured = _numbers(forecast, "memory"), _numbers(_measured(forecast), "memory")
    parts = [Compared(name, predicted.get(name), measured.get(name), human_bytes) for name in STATE]

    def rest(total: float | None, known: Mapping[str, float]) -> float | None:
        return None if total is None or not known.keys() >= set(STATE) else total - sum(known[name] for name in STATE)

    return [*parts, Compared(REST, rest(memory.predicted, predicted), rest(memory.measured, measured), human_bytes)]


def time_parts(forecast: Mapping[str, Any]) -> list[Compared]:
    """Return the parts of a step's time of which the run knows its own figures."""
    predicted, measured = _numbers(forecast, "times"), _numbers(_measured(forecast), "times")
    sums: dict[str, float] = {}
    for name, seconds in predicted.items():
        part = COMMUNICATION if name.startswith("communication") or name == "bubble" else COMPUTATION
        sums[part] = sums.get(part, 0.0) + seconds
    return [Compared(name, sums.get(name), measured.get(name), short_time) for name in (COMPUTATION, COMMUNICATION)]


def _reasons(total: Compared, parts: list[Compared], forecast: Mapping[str, Any]) -> list[str]:
    if total.deviation is None or abs(total.deviation) <= LIMIT:
        return []
    assert total.measured is not None and total.predicted is not None
    reasons = []
    if forecast.get("hardware_note") and total.show is short_time:
        reasons.append(shorten(str(forecast["hardware_note"]), 200))
    known = [part for part in parts if part.predicted is not None and part.measured is not None]
    if known:
        part = max(known, key=lambda part: abs((part.measured or 0.0) - (part.predicted or 0.0)))
        reasons.append(f"most of it: {part.name}, {part.text()}")
    else:
        predicted = _numbers(forecast, "times" if total.show is short_time else "memory")
        largest = max(predicted, key=lambda name: predicted[name], default=None)
        if largest is not None:
            shown = total.show(predicted[largest])
            reasons.append(f"the run does not measure its parts; the largest predicted one: {largest} {shown}")
    if total.measured < total.predicted:
        return reasons
    load = _number(_measured(forecast).get("rank_load_max"))
    if load is not None and load > UNEVEN:
        reasons.append(f"the rank with most tokens at its experts had {load:.2f} x those of balanced experts")
    return reasons + (_host_reasons(known, forecast) if total.show is short_time else [])


def _host_reasons(parts: list[Compared], forecast: Mapping[str, Any]) -> list[str]:
    """Return why the computation on a CPU took longer than predicted, as far as CPU time shows it."""
    cpu_s, operators = _number(_measured(forecast).get("cpu_s")), _number(forecast.get("operators"))
    computation = next((part for part in parts if part.name == COMPUTATION), None)
    if computation is None or not cpu_s or not operators:
        return []
    reasons = []
    extra_s = (cpu_s - (computation.predicted or 0.0)) / operators
    if cpu_s > (1 + LIMIT) * (computation.predicted or 0.0):
        each = f"{1e6 * extra_s:.0f} us more for each of {operators:,.0f} operators"
        reasons.append(f"its CPU time is {short_time(cpu_s)}, {each} (the prediction has no time of Python)")
    share = cpu_s / computation.measured if computation.measured else 1.0
    if share < BUSY:
        had = f"{share:.0%}".replace("%", " %")
        reasons.append(f"other programs used the CPU, which rank 0 had for {had} of its time")
    return reasons


def _memory(forecast: Mapping[str, Any]) -> Compared:
    return _compared("memory", "peak_bytes", forecast, human_bytes)


def _step(forecast: Mapping[str, Any]) -> Compared:
    return _compared("step", "step_s", forecast, short_time)


def _compared(name: str, key: str, forecast: Mapping[str, Any], show: Callable[[float], str]) -> Compared:
    predicted, measured = (_number(source.get(key)) for source in (forecast, _measured(forecast)))
    return Compared(name, predicted, measured, show)


def _measured(forecast: Mapping[str, Any]) -> Mapping[str, Any]:
    measured = forecast.get("measured")
    return measured if isinstance(measured, dict) else {}


def _number(value: Any) -> float | None:
    return value if is_number(value) and not isinstance(value, bool) and value >= 0 else None


def _numbers(source: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return the numbers of a section by name."""
    section = source.get(key)
    found = {str(name): _number(value) for name, value in section.items()} if isinstance(section, dict) else {}
    return {name: value for name, value in found.items() if value is not None}
