"""The template, the script and the data become one HTML file, which needs nothing else.

Everything in the page that comes from a run is text: the template escapes it, and in the JSON of the figures no
character can end the script element. The page forbids itself to load anything (its Content-Security-Policy).
"""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from common.errors import expect
from common.files import explain_os_error, write_atomically
from common.text import first_line, show_value, to_json
from training.report.forecast import read_forecast
from training.report.forecast import rows as forecast_rows
from training.report.page.curves import curve_figures
from training.report.page.figures import router_figures, router_numbers
from training.report.page.gather import RunData, read_run
from training.report.page.heldout import heldout_parts, read_heldout
from training.report.page.jobs import Jobs, has_jobs, job_figures, read_runs, read_sweep, table
from training.report.page.paper import Format, write_job_figures, write_run_figures
from training.report.page.theme import THEMES
from training.report.terminal import human_count, human_time

HERE = Path(__file__).parent
REPORT_FILE = "report.html"


def write_report(directory: Path, target: Path | None = None, reason: str | None = None) -> Path:
    """Write the report of a run or of a sweep, atomically.

    Args:
        target: the file; None: `report.html` in the directory.
        reason: a sentence about why a run has no result, for the note about it.

    Returns:
        The file.

    Raises:
        ConfigError: `directory` is not that of a run or a sweep.
        OSError: the file cannot be written, or the directory not be read.
    """
    page = (
        sweep_page(read_sweep(directory), directory.resolve().name)
        if has_jobs(directory)
        else run_page(read_run(directory, reason=reason))
    )
    return write_atomically(target or directory / REPORT_FILE, page)


def write_comparison(runs: Sequence[Path], target: Path) -> Path:
    """Write a report that compares several runs, as `write_report` does. Returns `target`."""
    return write_atomically(target, sweep_page(read_runs(runs, target.parent), f"{len(runs)} runs"))


def write_figures(directory: Path, target: Path | None, suffix: Format, step: int | None = None) -> Path:
    """Write the figures of a run or a sweep as files.

    Args:
        target: the directory for them; None: `figures` in the directory of the run or sweep.
        step: what figures of one step show; None: the last step.

    Returns:
        The directory.

    Raises:
        ConfigError: as `write_report`. Also if `step` is given for a sweep, or the run has recorded nothing at `step`.
        OSError: as `write_report`.
    """
    target = target or directory / "figures"
    if has_jobs(directory):
        expect(step is None, "step", step, "null for a sweep, whose figures have all steps")
        write_job_figures(read_sweep(directory), target, suffix)
    else:
        write_run_figures(read_run(directory), target, suffix, step)
    return target


def write_report_or_say_why(directory: Path, say: Callable[[str], None], reason: str | None = None) -> Path | None:
    """Write the report of a run or sweep that has just ended, which does not fail because of it.

    Args:
        say: gets a line if the report cannot be written.
        reason: as in `write_report`.

    Returns:
        The file, or None.
    """
    try:
        return write_report(directory, reason=reason)
    except OSError as error:
        say(f"warning: {REPORT_FILE} cannot be written: {explain_os_error(error, directory)}")
    except Exception as error:
        say(f"warning: {REPORT_FILE} cannot be written: {first_line(error)}")
    return None


def sweep_page(jobs: Jobs, title: str) -> str:
    """Return the HTML of the report of several runs."""
    figures = job_figures(jobs)
    headers, body = table(jobs)
    return render(
        "sweep.html.jinja",
        title=title,
        jobs=jobs,
        finished=sum(result["status"] == "finished" for result in jobs.results),
        headers=headers,
        body=body,
        notes=jobs.notes,
        costs=[name for name in figures if name.startswith("cost-")],
        small=[name for name in figures if name.startswith("small-")],
        script={"figures": figures, "themes": THEMES, "router": None, "heldout": None, "alarms": []},
    )


def run_page(data: RunData) -> str:
    """Return the HTML of the report of a run."""
    curves, router, notes = curve_figures(data), router_figures(data), list(data.notes)
    numbers, heldout = router_numbers(data), None
    if data.rows and not router:
        dense = data.config.get("model.num_experts", 0) is None
        notes.append("This is a dense model: it has no router." if dense else "metrics.jsonl has no loads of experts.")
    if numbers is not None:
        if not numbers["norms"]:
            notes.append("metrics.jsonl has no norms of experts (telemetry.every), as in runs of older versions.")
        [values_LE, *_] = numbers["values"]
        heldout = read_heldout(data, (len(values_LE), len(values_LE[0])), notes)
        # The probe also has step 0, before the first loads. The slider can stop there, too.
        before = [step for step in heldout.steps if step < numbers["steps"][0]] if heldout is not None else []
        numbers |= {"steps": [*before, *numbers["steps"]], "values": [None] * len(before) + numbers["values"]}
    tokens, token_numbers = ({}, None) if heldout is None else heldout_parts(heldout, notes)
    script = {
        "figures": curves | router | tokens,
        "themes": THEMES,
        "router": numbers,
        "heldout": token_numbers,
        "alarms": sorted({alarm.step for alarm in data.alarms if not alarm.ended}),
    }
    return render(
        "run.html.jinja",
        title=data.name,
        run=data,
        facts=facts(data),
        tiles=tiles(data),
        notes=notes,
        config_text=config_text(data),
        forecast=forecast_rows(read_forecast(data.directory)),
        curves=list(curves),
        figures=[*router, *tokens],
        script=script,
    )


def render(template: str, *, script: Mapping[str, Any], **values: Any) -> str:
    """Fill in a template.

    Args:
        template: its file.
        script: what `page.js` gets as JSON.
        values: the variables of the template.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(
        style=_file("page.css"), code=_file("page.js"), plotly=plotly_code(), data=script_json(script), **values
    )


def script_json(value: Any) -> str:
    """Return JSON that can stand in a script element: no `<` in it can end the element or begin a comment."""
    return to_json(value, separators=(",", ":")).replace("<", "\\u003c")


@cache
def plotly_code() -> str:
    """Return plotly.js, compressed with gzip and encoded in base64: 2.3 MB instead of 4.8. More effort saves little."""
    code = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    compressor = zlib.compressobj(level=1, wbits=31)
    return base64.b64encode(compressor.compress(code) + compressor.flush()).decode()


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def facts(data: RunData) -> dict[str, str]:
    """Return name -> value of what ran and on what, as far as it is known."""
    config, result = data.config, data.result

    def known(*keys: str) -> list[str]:
        return [show_value(config[key]) for key in keys if config.get(key) is not None]

    experts = known("model.num_experts", "model.top_k")
    shape = [f"{experts[0]} experts, top-{experts[1]}"] if len(experts) == 2 else ["dense"] if config else []
    shape += [
        f"{value} {name}"
        for name, value in zip(("layers", "wide"), known("model.num_layers", "model.dim"), strict=False)
    ]
    sizes = [
        f"{human_count(result[key])} {name}"
        for key, name in (("total_params", "in all"), ("active_params", "active per token"))
        if isinstance(result.get(key), int)
    ]
    ranks = [rank for rank in result.get("ranks") or [] if isinstance(rank, dict)]
    devices, hosts = ({str(rank.get(key)) for rank in ranks} for key in ("device", "host"))
    layout = [
        f"{key.partition('.')[2]}={value}"
        for key, value in config.items()
        if key.startswith("parallel.") and type(value) is int and value > 1
    ]
    batch = known("train.global_batch", "train.seq_len")
    step, steps = None if data.continued else result.get("step"), config.get("train.steps")
    rows = {
        "model": ", ".join(shape),
        "parameters": ", ".join(sizes),
        "router": ", ".join(
            known("router.kind")
            + [f"{key}={show_value(config[f'router.{key}'])}" for key in ROUTER_KEYS if config.get(f"router.{key}")]
        )
        if experts
        else "",
        "data": ", ".join(known("data.kind") + [f"batch of {' x '.join(batch)} tokens"] * (len(batch) == 2)),
        "optimizer": ", ".join(known("optim.kind") + [f"lr={v}" for v in known("optim.lr")] + known("optim.schedule")),
        "steps": f"{step if step is not None else data.rows[-1]['step'] if data.rows else '?'} of {steps or '?'}",
        "ranks": f"{len(ranks)} ({', '.join([*sorted(devices), f'{len(hosts)} host' + 's' * (len(hosts) != 1)])})"
        if ranks
        else "",
        "layout": ", ".join(layout) if len(ranks) > 1 else "",
        "torch": str(result.get("torch") or ""),
        "time": human_time(result["wall_s"]) if isinstance(result.get("wall_s"), float) else "",
    }
    return {name: value for name, value in rows.items() if value}


ROUTER_KEYS = ("balance_coef", "z_coef", "capacity_factor", "bias_update_rate", "jitter")


def tiles(data: RunData) -> list[tuple[str, str, str]]:
    """Return the main results: (name, value, what it compares with)."""
    result, shown = data.result, list[tuple[str, str, str]]()

    def add(name: str, key: str, form: str, note: str = "") -> None:
        value = result.get(key)
        if isinstance(value, (int, float)):
            shown.append((name, format(value, form), note))

    add("held-out loss", "eval/loss", ".4f", "nats per token")
    baselines = result.get("baselines")
    for key in sorted(result):
        if key.startswith("eval/bits_per_byte/"):
            domain = key.removeprefix("eval/bits_per_byte/")
            baseline = baselines.get(domain) if isinstance(baselines, dict) else None
            gzip = baseline.get("gzip_bits_per_byte") if isinstance(baseline, dict) else None
            add(domain, key, ".3f", "bits per byte" + (f", gzip {gzip:.3f}" if isinstance(gzip, float) else ""))
    add("MaxVio", "router/max_vio", ".3f", "0 = balanced")
    speed = result.get("speed/tokens_per_s")
    if isinstance(speed, float):
        shown.append(("speed", human_count(speed), "tokens per second"))
    return shown


def config_text(data: RunData) -> str:
    """Return the configuration as one line per key."""
    return "\n".join(f"{key}={show_value(value)}" for key, value in data.config.items())
