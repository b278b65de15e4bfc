"""The tables of `scripts/plan.py`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training.report.terminal import human_bytes, human_count, human_time, show_fields, show_line, show_table

PLAN_KEYS = (
    "gpus=", "gpu=", "gpu.", "task=", "recompute=", "skew=", "document=", "calibration=", "margin=", "tokens=", "top=",
    "verify=", "format=", "picture=", "vocab_size=", "parallel.", "train.accumulation=",
)  # fmt: skip
"""The start of arguments that are the tool's own, or that the plan replaces."""


def show_plan(found: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Print the ranked layouts, and the memory, the times and the launch of the best one.

    Args:
        found: what `training.planning.answer.answer` returned, with the batch.
        arguments: the tool's arguments, for the lines that start the run.
    """
    layouts, gpu = found["layouts"], found["gpu"]
    batch = f"{found['global_batch']:,} rows of {found['seq_len']:,} tokens a step"
    show_line(f"{found['gpus']} x {gpu['name']}; {batch}; {found['precision']}; experts: {found['skew']}")
    totals = ["GPU hours"] * ("gpu_hours" in layouts[0]) + ["USD"] * (layouts[0].get("usd") is not None)
    show_table(
        f"layouts ({found['found']:,} possible; * traced, ~ formulas)",
        ["", "layout", "micro-batches", "recompute", "memory", "step", "tokens/s", "MFU", *totals],
        [_layout_row(row) for row in layouts],
        left=["layout", "recompute"],
    )
    best = layouts[0]
    _show_memory(best)
    _show_times(best)
    if best["changes"]:
        show_table(
            "changes that would help most (estimates)",
            ["change", "step", "memory"],
            [
                [change["override"], f"-{human_time(max(0.0, change['seconds']))}", _signed_bytes(-change["nbytes"])]
                for change in best["changes"]
            ],
        )
    kept = [argument for argument in arguments if not argument.startswith(PLAN_KEYS)]
    show_fields(
        "start it with", launch_lines(found, [*kept, *best["overrides"]]), commands=["one node", "SLURM", "torchrun"]
    )


def launch_lines(found: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Return name -> the command that starts the run."""
    per_node, gpus = found["gpu"]["gpus_per_node"], found["gpus"]
    words = " ".join(overrides)
    if gpus <= per_node:
        return {"one node": f"python train.py launch.nproc={gpus} {words}"}
    nodes = -(-gpus // per_node)
    return {
        "SLURM": f"sbatch --nodes {nodes} --gpus-per-node {per_node} scripts/slurm.sbatch {words}",
        "torchrun": f"HEAD=<first node> NODES={nodes} JOB=<name> scripts/node.sh {words}  (on every node)",
    }


def _layout_row(row: Mapping[str, Any]) -> list[str]:
    cells = [
        f"{row['rank']}{'*' if row['verified'] else '~'}",
        axes_text(row["axes"]),
        f"{row['accumulation']} x {row['rows']}",
        row["recompute"],
        human_bytes(row["peak_bytes"]),
        human_time(row["step_s"]),
        human_count(row["tokens_per_s"]),
        f"{row['mfu']:.1%}",
    ]
    if "gpu_hours" in row:
        cells.append(f"{row['gpu_hours']:,.0f}")
        cells += [] if row["usd"] is None else [f"{row['usd']:,.0f}"]
    return cells


def _show_memory(best: Mapping[str, Any]) -> None:
    """Print the memory of the best layout: each pipeline rank by formulas, and the traced ranks by part."""
    show_table(
        "memory of the ranks of each pipeline stage (formulas)",
        ["stage", "layers", "weights", "gradients", "moments", "casts", "activations", "in all"],
        [
            [
                str(number),
                f"{stage['layers'][0]}-{stage['layers'][-1]}" if stage["layers"] else "-",
                *(
                    human_bytes(stage[name])
                    for name in ("weights", "gradients", "moments", "casts", "activations", "device")
                ),
            ]
            for number, stage in enumerate(best["stages"])
        ],
    )
    for traced in best["traced"]:
        parts = {
            name: human_bytes(nbytes)
            for name, nbytes in traced["parts"].items()
            if nbytes >= 0.001 * traced["peak_bytes"]
        }
        peak = human_bytes(traced["peak_bytes"])
        title = f"rank {traced['rank']}: {peak} at the peak, in the {traced['peak_phase']} pass"
        show_fields(title, parts)
    show_line(f"free on the fullest device: {human_bytes(max(0, best['free_bytes']))}")


def _show_times(best: Mapping[str, Any]) -> None:
    """Print the parts of a step, and what is sent."""
    times, total = dict(best["times"]), best["step_s"]
    parts = {name: seconds for name, seconds in times.items() if name != "exposed"}
    parts |= {f"exposed: {axis}": seconds for axis, seconds in times["exposed"].items()}
    show_table(
        "a step",
        ["part", "time", "share"],
        [
            [name, human_time(seconds), f"{seconds / total:.1%}"]
            for name, seconds in parts.items()
            if seconds > 5e-4 * total
        ],
    )
    show_table(
        "sent by a rank in a step",
        ["axis", "bytes", "over"],
        [[axis, human_bytes(sent["bytes"]), sent["over"]] for axis, sent in best["sent_bytes"].items()],
        left=["over"],
    )
    show_line(f"limit: {best['limits']}")


def _signed_bytes(nbytes: float) -> str:
    return f"{'-' if nbytes < 0 else '+'}{human_bytes(abs(nbytes))}"


def show_serving(found: Mapping[str, Any]) -> None:
    """Print the memory that generation takes on one device."""
    gpu = found["gpu"]
    fields = {name: human_bytes(nbytes) for name, nbytes in found["memory"].items()}
    fields["in all"] = f"{human_bytes(found['peak_bytes'])} of {human_bytes(found['limit_bytes'])}"
    fields["fits"] = "yes" if found["fits"] else _what_would_fit(found)
    speed = human_count(found["tokens_per_s_limit"])
    also = ", and writes and reads each dequantised matrix" if found["quantize"] else ""
    fields["tokens/s"] = f"at most {speed}: each step reads the active weights and the cache{also}"
    weights = f", weights in {found['quantize']}" if found["quantize"] else ""
    rows = f"{found['batch']:,} rows of {found['context']:,} tokens, {gpu['precision']}{weights}"
    title = f"generation on {found['gpus']} x {gpu['name']}: {rows}"
    show_fields(title, fields)


def _what_would_fit(found: Mapping[str, Any]) -> str:
    fewest = found["fewest_gpus"]
    return "no; it fits on no number of these devices" if fewest is None else f"no; it fits on {fewest}"


def show_tuned(found: Mapping[str, Any]) -> None:
    """Print the candidates that `scripts/tune.py` measured, and the fastest one."""
    rows = found["rows"]
    show_table(
        f"layouts measured on {found['gpus']} x {found['gpu']['name']}",
        ["", "layout", "micro-batches", "recompute", "step", "predicted", "error", "memory", "predicted", "error"],
        [
            [
                str(number),
                axes_text(row["axes"]),
                str(row["accumulation"]),
                row["recompute"],
                *_measured(row["step_s"], row["predicted_step_s"], human_time),
                *_measured(row["peak_bytes"], row["predicted_peak_bytes"], human_bytes),
            ]
            for number, row in enumerate(rows, start=1)
        ],
        left=["layout", "recompute"],
    )
    for number, row in enumerate(rows, start=1):
        if row["problem"]:
            show_line(f"{number}: {row['problem']}")
    measured = sorted((row for row in rows if row["step_s"] is not None), key=lambda row: row["step_s"])
    if not measured:
        show_line("no layout was measured")
        return
    best, *others = measured
    margin = f", {others[0]['step_s'] / best['step_s'] - 1:.1%} faster than the next one" if others else ""
    show_line(f"winner: layout {rows.index(best) + 1}, {human_time(best['step_s'])} a step{margin}")
    show_line(f"calibration: {found['calibration']}")
    show_fields("train with", {"arguments": " ".join(best["overrides"])}, commands=["arguments"])


def _measured(measured: float | None, predicted: float, show: Callable[[float], str]) -> list[str]:
    """Return the cells of a measured and a predicted figure, and of the error of the prediction."""
    if measured is None:
        return ["-", show(predicted), "-"]
    return [show(measured), show(predicted), f"{predicted / measured - 1:+.0%}"]


def axes_text(axes: Mapping[str, int]) -> str:
    """Return the axes with more than one rank."""
    return " ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one process"
