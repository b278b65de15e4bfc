"""The study of docs/study.md: what balances a router, what experts bring at equal cost, and how a collapse is named.

    python benchmarks/study.py balance          # no balance, per rank, over the batch, by a bias
    python benchmarks/study.py experts          # 4 to 32 experts, top-1 to top-4, and the dense model
    python benchmarks/study.py collapse         # a router without and with a balance loss at a high learning rate
    python benchmarks/study.py all

Each part runs one or two sweeps of `train.py` with the presets in `examples/study/`. If a part is interrupted, the same
command continues it and does not repeat finished runs. `<out>/<part>.md`, `.json` and `.png` have the means and the
standard deviations over the seeds. Further arguments are overrides of every run.

Shapes: L MoE layers, E experts, G domains.
"""

import argparse
import csv
import ctypes
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.files import append_line, write_atomically
from common.strict import from_dict
from common.text import parse_yaml, to_json
from moe.accounting.flops import meta_model, training_flops_per_token
from moe.config import ModelConfig, RouterConfig
from training.report.alarms import read_alarms
from training.report.metrics import METRICS_FILE, read_metrics
from training.report.plots import BLUE, GREY, ORANGE, RED, figure
from training.report.probe import ProbeRouting, read_probe, saturation, specialisation
from training.report.sweep import sweep_jobs
from training.run import CONFIG_FILE, read_result

ROOT = Path(__file__).resolve().parents[1]
PRESETS = "examples/study"
COSTS = "costs.jsonl"
"""The file of `<out>` with the CPU seconds of every launch of a sweep."""
TOPS = ("top4", "top2", "top1")
EXPERTS = (4, 8, 16, 32)
BALANCES = ("balance_off", "balance_rank", "balance_global", "balance_sigmoid", "balance_bias", "balance_bias_fast")
COLLAPSE_RATES = (0.03, 0.1)
DENSE_STEPS = (1.0, 1.5, 2.0, 3.0)
"""The lengths of the runs of the dense model, relative to those of the mixtures."""
SETTINGS = ("experiment", "num_experts", "top_k", "lr", "balance_coef", "steps")
"""What distinguishes the runs of a sweep, besides the seed."""
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Number of seeds -> the 97.5 % quantile of Student's t distribution with one degree of freedom less."""
OF_THE_MACHINE = ("slow_rank", "slow_link")
"""The rules of alarms that have nothing to do with the model."""
PR_SET_CHILD_SUBREAPER = 36

Figures = dict[str, Any]
"""The settings and the figures of a run."""
Group = dict[str, Any]
"""Several runs that differ in their seed: the settings, and name -> `Spread` of each figure."""


class Sweep(NamedTuple):
    name: str
    overrides: list[str]


class Spread(NamedTuple):
    """A figure over the seeds."""

    mean: float
    std: float | None
    """The standard deviation of a sample (divided by n - 1). None: one seed."""
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        numbers = list(values)
        return cls(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None, len(numbers))

    @property
    def differs(self) -> bool:
        """Whether 0 is outside the 95 % confidence interval of the mean."""
        if self.std is None or self.n not in T95:
            return False
        return abs(self.mean) > T95[self.n] * self.std / math.sqrt(self.n)


def sweeps_of(part: str, steps: int) -> list[Sweep]:
    """Return the sweeps of a part.

    Args:
        steps: the optimizer steps of a mixture's run.
    """
    same = f"train.steps={steps}"
    lengths = ",".join(str(round(steps * length)) for length in DENSE_STEPS)
    experts = f"model.num_experts={','.join(map(str, EXPERTS))}"
    rates = f"optim.lr={','.join(map(str, COLLAPSE_RATES))}"
    collapse = ["experiment=collapse", rates, "router.balance_coef=0.0,0.01"]
    return {
        "experts": [
            *(Sweep(name, [f"experiment={name}", experts, same]) for name in TOPS),
            Sweep("dense", ["experiment=dense", f"train.steps={lengths}"]),
        ],
        "balance": [Sweep("balance", [f"experiment={','.join(BALANCES)}", same])],
        "collapse": [Sweep("collapse", [*collapse, f"train.steps={round(0.8 * steps)}"])],
    }[part]


def run_sweep(sweep: Sweep, options: argparse.Namespace) -> None:
    """Run the jobs of a sweep that have not finished, and add the CPU seconds to `COSTS`.

    Raises:
        SystemExit: a job has failed, or the sweep was interrupted.
    """
    # Workers are children of a process that outlives the command for a moment. It becomes a child of this process,
    # which therefore counts its CPU time, too. Other systems than Linux cannot do this, and count too little.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    overrides = [*sweep.overrides, f"run.seed={options.seeds}", *options.overrides]
    command = [sys.executable, "train.py", "--config-dir", PRESETS, "-m", *overrides]
    start, before = time.monotonic(), cpu_s_of_children()
    status = subprocess.call(
        [*command, f"run.root={options.out.absolute()}", f"run.name={sweep.name}"],
        cwd=ROOT,
        # This process ignores Ctrl-C, which the command gets, too: it says how the sweep goes on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    cost = {"sweep": sweep.name, "cpu_s": cpu_s_of_children() - before, "wall_s": time.monotonic() - start}
    append_line(options.out / COSTS, to_json(cost))
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def cpu_s_of_children() -> float:
    """Return the CPU seconds of all child processes that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_sweeps(sweeps: Sequence[Sweep], options: argparse.Namespace) -> None:
    """Run `options.jobs` sweeps at a time.

    Raises:
        SystemExit: one of them has failed or was interrupted. Those that have not begun are left out.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(options.jobs) as pool:
        try:
            list(pool.map(partial(run_sweep, options=options), sweeps))
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise


def read_runs(sweep_dir: Path) -> list[Figures]:
    """Return the figures of the finished jobs of a sweep."""
    return [read_run(run) for run in sweep_jobs(sweep_dir) if read_result(run).get("status") == "finished"]


def read_run(run: Path) -> Figures:
    """Return the settings and the figures of a finished run. A dense model has None for those of routers."""
    config, result = parse_yaml((run / CONFIG_FILE).read_bytes()), read_result(run)
    model, router = from_dict(ModelConfig, config["model"]), from_dict(RouterConfig, config["router"])
    steps = config["train"]["steps"]
    tokens = config["train"]["global_batch"] * config["train"]["seq_len"]
    last = [row for row in read_metrics(run / METRICS_FILE) if row["step"] > steps * 3 / 4]
    alarms = [asdict(alarm) for alarm in read_alarms(run) if not alarm.ended and alarm.rule not in OF_THE_MACHINE]
    figures: Figures = {
        "experiment": config["run"]["experiment"],
        "seed": config["run"]["seed"],
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "lr": config["optim"]["lr"],
        "balance_coef": router.balance_coef,
        "steps": steps,
        "width": (model.expert_hidden_dim or model.hidden_dim) if model.is_moe else model.hidden_dim,
        "total_params": result["total_params"],
        "active_params": result["active_params"],
        "flops_per_token": round(training_flops_per_token(meta_model(model, router), config["train"]["seq_len"])),
        "tokens": tokens * steps,
        "loss": result["eval/loss"],
        "cpu_s_per_step": min(cpu_intervals(run / "cpu_seconds.csv", config["train"]["log_every"]), default=None),
        "max_vio": statistics.fmean(row["router/max_vio"] for row in last) if model.is_moe else None,
        "alarms": float(len(alarms)),
        "alarm_lines": alarms,
    }
    return figures | (probe_figures(run, steps) if model.is_moe else {})


def cpu_intervals(path: Path, every: int) -> list[float]:
    """Return the CPU seconds per step between the lines of a file of `examples/study/cpu_seconds.py`.

    Shorter intervals than half of `every` steps are left out.
    """
    with open(path, encoding="utf-8", newline="") as file:
        lines = [(int(line["step"]), float(line["cpu_seconds"])) for line in csv.DictReader(file)]
    return [
        (later - before) / (step - last)
        for (last, before), (step, later) in pairwise(lines)
        if 2 * (step - last) >= every
    ]


def probe_figures(run: Path, steps: int) -> Figures:
    """Return what the probe of a run says, as means over layers.

    `specialisation` is the share of a domain's assignments that would have to move to other experts so that the domain
    is routed like the mean of all domains. `specialisation_untrained` is that of step 0. `max_vio_heldout` is the
    MaxVio of all probe tokens, and `saturation` the saturation at the last probe before a half of the run.
    """
    probe = read_probe(run)
    assert probe is not None, "a run of the study has a probe"
    end = probe.routing(probe.steps[-1])
    half = max(step for step in probe.steps if step <= steps / 2)

    def share_elsewhere(routing: ProbeRouting) -> float:
        share_LEG = specialisation(routing, probe.domain_T, len(probe.domains)) / routing.num_experts
        return float(np.abs(share_LEG - share_LEG.mean(axis=2, keepdims=True)).sum(axis=1).mean() / 2)

    load_LE1 = specialisation(end, np.zeros_like(probe.domain_T), 1)
    return {
        "specialisation": share_elsewhere(end),
        "specialisation_untrained": share_elsewhere(probe.routing(0)),
        "max_vio_heldout": float(load_LE1.max(axis=1).mean() - 1),
        "saturation": float(saturation(probe.routing(half), end).mean()),
        "saturation_step": half,
    }


def aggregate(rows: Sequence[Figures], settings: Sequence[str] = SETTINGS) -> list[Group]:
    """Return one dictionary for each combination of `settings`, in the order of the rows.

    It has the settings, and a `Spread` for each other figure that is a number in all rows of the group. A figure with
    the same integer in all rows, such as a number of parameters, stays a number.
    """
    groups: dict[tuple[Any, ...], list[Figures]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in settings), []).append(row)
    aggregated = []
    for key, members in groups.items():
        group: Group = dict(zip(settings, key, strict=True))
        for name in members[0].keys() - {*settings, "seed"}:
            values = [member.get(name) for member in members]
            if all(type(value) is int for value in values) and len(set(values)) == 1:
                group[name] = values[0]
            elif all(type(value) in (int, float) for value in values):
                group[name] = Spread.of(values)
        aggregated.append(group)
    return aggregated


def subtract(rows: Sequence[Figures], reference: Callable[[Figures], float | None], name: str) -> None:
    """Add to each row the figure `name`: its loss minus that of a reference with the same seed, None without one."""
    for row in rows:
        other = reference(row)
        row[name] = None if other is None else row["loss"] - other


def share_costs(rows: Sequence[Figures], settings: Sequence[str]) -> None:
    """Add to each row `cpu_s`, the CPU seconds of its steps: their number times the lowest `cpu_s_per_step` of all runs
    with the same `settings`.

    The CPU time of the same work grows while other programs use the machine's caches, so the lowest time is the best
    estimate.
    """
    lowest: dict[tuple[Any, ...], float] = {}
    for row in rows:
        key = tuple(row[name] for name in settings)
        lowest[key] = min(lowest.get(key, math.inf), row["cpu_s_per_step"])
    for row in rows:
        row["cpu_s"] = lowest[tuple(row[name] for name in settings)] * row["steps"]


def loss_at(dense: Sequence[Figures], seed: int, cpu_s: float) -> float | None:
    """Return the loss of the dense model after `cpu_s` CPU seconds of training, None outside of the measured range.

    Runs of different lengths were each trained to the end of their own schedule. Between them, the loss is linear in
    the logarithm of the time.
    """
    points = sorted((row["cpu_s"], row["loss"]) for row in dense if row["seed"] == seed)
    seconds, losses = zip(*points, strict=True)
    if not seconds[0] <= cpu_s <= seconds[-1]:
        return None
    return float(np.interp(math.log(cpu_s), np.log(seconds), losses))


def study_balance(out: Path) -> tuple[list[Figures], str]:
    rows = read_runs(out / "balance")
    losses = {row["seed"]: row["loss"] for row in rows if row["experiment"] == "balance_global"}
    subtract(rows, lambda row: losses.get(row["seed"]), "minus_global")
    groups = aggregate(rows)
    names = ("loss", "minus_global", "max_vio", "max_vio_heldout", "specialisation", "saturation", "alarms")
    labels = [group["experiment"].removeprefix("balance_") for group in groups]
    with figure(out / "balance.png", 9, 2.4, PNG) as canvas:
        shown = ("loss", "max_vio", "specialisation")
        for axes, name in zip(canvas.subplots(1, len(shown), sharey=True), shown, strict=True):
            means, errors = zip(*[bar(group[name]) for group in groups], strict=True)
            axes.errorbar(means, labels, xerr=errors, fmt="o", color=BLUE, capsize=4)
            axes.set(title=TITLES[name])
            axes.margins(y=0.15)
            axes.grid(alpha=0.25)
        axes.invert_yaxis()
    return rows, table(groups, ("experiment", *names))


def study_experts(out: Path) -> tuple[list[Figures], str]:
    dense, rows = read_runs(out / "dense"), [row for name in reversed(TOPS) for row in read_runs(out / name)]
    share_costs(dense, ("experiment",))
    share_costs(rows, ("num_experts", "top_k"))
    shortest = min(row["steps"] for row in dense)
    same_steps = {row["seed"]: row["loss"] for row in dense if row["steps"] == shortest}
    subtract(rows, lambda row: same_steps.get(row["seed"]), "minus_dense")
    subtract(rows, lambda row: loss_at(dense, row["seed"], row["cpu_s"]), "minus_dense_cpu")
    mixtures, references = aggregate(rows), aggregate(dense)
    names = ("num_experts", "width", "flops_per_token", "total_params", "steps", "cpu_s", "loss")
    more = ("minus_dense", "minus_dense_cpu", "max_vio", "specialisation", "alarms")
    with figure(out / "experts.png", 9, 3.4, PNG) as canvas:
        left, right = canvas.subplots(1, 2, sharey=True)
        mean, error = bar(next(group for group in references if group["steps"] == shortest)["loss"])
        left.axhspan(mean - error, mean + error, color=GREY, alpha=0.3, label="dense, same FLOPs")
        seconds, (means, errors) = [bar(group["cpu_s"])[0] for group in references], losses_of(references)
        right.errorbar(seconds, means, errors, fmt="s-", color=GREY, capsize=4, label="dense")
        for (top_k, marker), colour in zip({1: "o", 2: "^", 4: "D"}.items(), (BLUE, ORANGE, RED), strict=True):
            line = [group for group in mixtures if group["top_k"] == top_k]
            style = {"color": colour, "capsize": 4, "label": f"top-{top_k}"}
            left.errorbar([group["num_experts"] for group in line], *losses_of(line), fmt=f"{marker}-", **style)
            right.errorbar([bar(group["cpu_s"])[0] for group in line], *losses_of(line), fmt=marker, **style)
        left.set_xscale("log", base=2)
        left.set(xlabel="experts", ylabel=TITLES["loss"], title="equal FLOPs")
        right.set(xlabel="CPU seconds of the optimizer steps", title="measured time")
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize="small")
    return [*dense, *rows], table([*references, *mixtures], ("experiment", *names, *more))


def study_collapse(out: Path) -> tuple[list[Figures], str]:
    rows = read_runs(out / "collapse")
    lines = [
        f"| {row['lr']:g} | {row['balance_coef']:g} | {row['seed']} | {alarm['step']} | `{alarm['rule']}` "
        f"| {alarm['message']} |"
        for row in rows
        for alarm in row["alarm_lines"]
    ]
    head = "| lr | balance_coef | seed | step | rule | alarm |\n|---|---|---|---|---|---|"
    rates = sorted({row["lr"] for row in rows})
    with figure(out / "collapse.png", 9, 2.2 * len(rates), PNG) as canvas:
        panels = canvas.subplots(len(rates), 2, sharex=True, squeeze=False)
        for run in sweep_jobs(out / "collapse"):
            figures, metrics = read_run(run), read_metrics(run / METRICS_FILE)
            colour = BLUE if figures["balance_coef"] else RED
            label = f"balance_coef={figures['balance_coef']:g}" if not figures["seed"] else None
            for axes, name in zip(panels[rates.index(figures["lr"])], ("train/ce", "router/max_vio"), strict=True):
                steps: list[Any] = [row["step"] for row in metrics]
                values: list[Any] = [row[name] for row in metrics]
                axes.plot(steps, values, color=colour, alpha=0.7, label=label)
                for alarm in figures["alarm_lines"]:
                    axes.plot(alarm["step"], np.interp(alarm["step"], steps, values), "v", color=colour)
        for (left, right), rate in zip(panels, rates, strict=True):
            left.set(ylabel="cross-entropy of the batch", title=f"optim.lr={rate:g}")
            right.set(ylabel="MaxVio of the batch", title="triangles: alarms")
        for axes in panels[-1]:
            axes.set(xlabel="step")
        panels[0, 0].legend(frameon=False)
    names = ("lr", "balance_coef", "loss", "max_vio", "max_vio_heldout", "specialisation", "alarms")
    return rows, "\n".join([table(aggregate(rows), names), "", head, *lines])


PARTS: dict[str, Callable[[Path], tuple[list[Figures], str]]] = {
    "experts": study_experts,
    "balance": study_balance,
    "collapse": study_collapse,
}
"""The name of each part, and what makes its rows, table and figure from the finished runs."""
PNG: Mapping[str, Mapping[str, Any]] = {".png": {"dpi": 85}}
TITLES = {
    "experiment": "run",
    "lr": "lr",
    "balance_coef": "balance_coef",
    "num_experts": "experts",
    "width": "width",
    "flops_per_token": "training FLOPs per token",
    "total_params": "parameters",
    "steps": "steps",
    "cpu_s": "CPU s",
    "loss": "held-out loss",
    "minus_global": "minus `global`",
    "minus_dense": "minus dense, equal FLOPs",
    "minus_dense_cpu": "minus dense, equal CPU s",
    "max_vio": "MaxVio",
    "max_vio_heldout": "MaxVio, held-out",
    "specialisation": "specialisation",
    "saturation": "saturation",
    "alarms": "alarms",
}
DIGITS = {"loss": 3, "minus_global": 3, "minus_dense": 3, "minus_dense_cpu": 3, "cpu_s": 1, "alarms": 1}


def bar(figure: Spread) -> tuple[float, float]:
    """Return the mean and the length of the error bar."""
    return figure.mean, figure.std or 0.0


def losses_of(groups: Sequence[Group]) -> tuple[list[float], list[float]]:
    """Return the mean losses and their error bars."""
    return [bar(group["loss"])[0] for group in groups], [bar(group["loss"])[1] for group in groups]


def table(groups: Sequence[Group], names: Sequence[str]) -> str:
    """Return a table in Markdown. A difference that differs from 0 (95 %) is bold."""
    lines = [[TITLES[name] for name in names], ["---"] * len(names)]
    lines += [[cell(name, group.get(name)) for name in names] for group in groups]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(name: str, value: Any) -> str:
    """Return a value of a table as text.

    >>> cell("loss", Spread(3.14159, 0.0123, 3)), cell("minus_dense", Spread(-0.2, 0.01, 3)), cell("loss", None)
    ('3.142 ± 0.012', '**-0.200 ± 0.010**', '-')
    """
    if not isinstance(value, Spread):
        return "-" if value is None else f"{value:,}" if type(value) is int else str(value)
    digits = DIGITS.get(name, 2)
    text = f"{value.mean:.{digits}f}"
    # All runs of a configuration share their cost, so it has no spread.
    text += "" if not value.std else f" ± {value.std:.{digits}f}"
    return f"**{text}**" if name.startswith("minus_") and value.differs else text


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    import torch

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_minutes(out: Path, sweeps: Sequence[str]) -> float:
    """Return the CPU minutes of all launches of the sweeps."""
    costs = [json.loads(line) for line in (out / COSTS).read_text().splitlines()]
    return sum(cost["cpu_s"] for cost in costs if cost["sweep"] in sweeps) / 60


def write_results(part: str, out: Path, sweeps: Sequence[Sweep]) -> None:
    """Write the table, the rows and the figure of a part, and print the table."""
    rows, text = PARTS[part](out)
    minutes = cpu_minutes(out, [sweep.name for sweep in sweeps])
    about = machine() | {"cpu_minutes": round(minutes, 1)}
    write_atomically(out / f"{part}.json", (to_json({"about": about, "runs": rows}) + "\n").encode())
    write_atomically(out / f"{part}.md", f"{text}\n".encode())
    print(f"\n{text}\n\n{part}: {minutes:.1f} CPU minutes; {out / part}.md, .json, .png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--steps", type=int, default=250, help="optimizer steps of a mixture's run; others are in proportion"
    )
    parser.add_argument("--jobs", type=int, default=1, help="sweeps that run at the same time")
    parser.add_argument("overrides", nargs="*", help="overrides of all runs, as train.py takes them")
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = {part: sweeps_of(part, options.steps) for part in PARTS if options.part in (part, "all")}
    run_sweeps([sweep for sweeps in parts.values() for sweep in sweeps], options)
    for part, sweeps in parts.items():
        write_results(part, options.out, sweeps)


if __name__ == "__main__":
    main()
