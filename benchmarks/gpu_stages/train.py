"""Stage `train`: a real run of a 1.3 B-parameter mixture by `train.py`, as a user starts it.

The text is Python code of the standard library, of installed packages and of this repository: one domain each. The
number of steps is chosen to fit the time. The run trains its own tokenizer, evaluates at its end, and writes no
checkpoint. Its metrics, plots and profile go into `files.zip`. The table says where the time went. A short run has less
text and no profile.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages.stage import Stage, run_stage

ROOT = Path(__file__).resolve().parents[2]
DOMAIN_BYTES = {"stdlib": 8_000_000, "torch": 7_000_000, "transformers": 7_000_000, "mixwright": 3_000_000}
"""Domain -> the most bytes of it."""
TINY_BYTES = 300_000
SHORT_S, SHORT_SHARE = 120.0, 0.25
"""A run of fewer seconds is a short one. It has this share of the text."""
START_S, PROFILE_S, END_S, STEP_S = {"short": 40.0, "long": 50.0}, 8.0, 14.0, 0.17
"""Estimated seconds up to the end of the first step, of the profile, after the last step, and of a step. They decide
the number of steps."""
STEPS = (30, 400)
"""The least and the largest number of steps."""
MODEL = {
    "dim": 1024, "num_layers": 12, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "hidden_dim": 1024,
    "num_experts": 32, "top_k": 4, "sliding_window": "null",
}  # fmt: skip
TINY_MODEL = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "hidden_dim": 32}
FILES = ("metrics.jsonl", "overview.png", "curves.png", "expert_load.png", "profile.md", "result.json", "log.txt")


def python_files(source: Path) -> Iterator[Path]:
    """Yield the Python files of a folder in a fixed order, without hidden ones and installed packages."""
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "site-packages")
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py") and not name.startswith("."))


def copy_text(target: Path, share: float, *, tiny: bool) -> dict[str, int]:
    """Copy Python files to a folder per domain, up to a share of its limit. Return the bytes of each domain."""
    sources = {"stdlib": Path(sysconfig.get_path("stdlib")), "mixwright": ROOT}
    for package in ("torch", "transformers"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            sources[package] = Path(spec.origin).parent
    sizes = {}
    for domain, source in sources.items():
        limit, size = TINY_BYTES if tiny else share * DOMAIN_BYTES[domain], 0
        (target / domain).mkdir(parents=True)
        for number, path in enumerate(python_files(source)):
            if size >= limit:
                break
            content = path.read_bytes()
            try:
                content.decode()
            except UnicodeDecodeError:
                continue
            if 200 < len(content) < 500_000:
                size += len(content)
                (target / domain / f"{number}.txt").write_bytes(content)
        sizes[domain] = size
    return sizes


def command(stage: Stage, text: Path, runs: Path, steps: int, *, profiled: bool) -> list[str]:
    """Return the command line of the run."""
    model = MODEL | (TINY_MODEL if stage.tiny else {})
    overrides = {
        **{f"model.{key}": value for key, value in model.items()},
        "data.paths": f"[{text}]",
        "data.cache": runs / "cache",
        "data.vocab_size": 512 if stage.tiny else 16_384,
        "train.device": stage.device.type,
        "train.steps": steps,
        "train.seq_len": 64 if stage.tiny else 2048,
        "train.global_batch": 4 if stage.tiny else 16,
        "train.log_every": 2 if stage.tiny else 5,
        "train.profile": str(profiled).lower(),
        "optim.lr": 3e-3 if stage.tiny else 6e-4,
        "checkpoint.at_end": "false",
        "run.root": runs,
        "run.name": "run",
        "run.sample_tokens": 16,
    }
    groups = ["model=small", "data=files", "tracking=disabled"]
    return [sys.executable, str(ROOT / "train.py"), *groups, *(f"{key}={value}" for key, value in overrides.items())]


def run(arguments: list[str], log: Path, timeout: float) -> tuple[int | None, list[tuple[float, str]]]:
    """Run a command with its output in a file.

    Returns:
        Its exit status, or None if the time was over, and its lines with the seconds after which they came.
    """
    # The machine may have no network, and no name that can be resolved.
    defaults = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    given = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}
    environment = {**given, **defaults, **os.environ}
    start, lines = time.monotonic(), list[tuple[float, str]]()
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        text=True,
        errors="replace",
    )

    def read() -> None:
        assert process.stdout is not None
        with open(log, "w", encoding="utf-8") as file:
            for line in process.stdout:
                lines.append((time.monotonic() - start, line.rstrip("\n")))
                file.write(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status: int | None = None
    try:
        status = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(timeout=2)
    return status, lines


PHASES = (
    ("start of train.py", r"reading the corpus"),
    ("text, tokenizer, token store", r"corpus files-"),
    ("model and optimizer", r"run directory"),
    ("first step, with torch.compile", r"step +1/"),
    ("steps", r"step +(\d+)/\1 "),
    ("sample", r"Held-out text"),
)
"""What ends with the first line that contains a pattern. The last evaluation comes before the line of the last step."""


def phases(lines: list[tuple[float, str]], seconds: float) -> dict[str, float]:
    """Return the seconds of each part of a run, up to the one in which it ended.

    Args:
        lines: of its output, with the seconds after which they came.
        seconds: of the whole run.
    """
    found, before = {}, 0.0
    for phase, pattern in PHASES:
        at = next((at for at, line in lines if re.search(pattern, line)), None)
        if at is None:
            return found | {f"{phase}, unfinished": seconds - before}
        found[phase], before = at - before, at
    return found | {"results, plots, end": seconds - before}


def evaluation_seconds(lines: list[tuple[float, str]], rows: list[dict[str, Any]], tokens: int) -> float | None:
    """Return about how long the last evaluation took: the time between the last two lines of steps, without the steps.

    Args:
        rows: the metrics.
        tokens: tokens of a step.
    """
    times = [at for at, line in lines if re.search(r"^step +\d+/", line)]
    if len(times) < 2 or len(rows) < 2:
        return None
    steps = rows[-1]["step"] - rows[-2]["step"]
    return max(0.0, times[-1] - times[-2] - steps * tokens / rows[-1]["speed/tokens_per_s"])


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of the run's metrics."""
    metrics = directory / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def report(stage: Stage, directory: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows with the metrics over the run and with the held-out results."""
    chosen = {round(index * (len(rows) - 1) / 15) for index in range(16)} if rows else set()
    for index in sorted(chosen):
        row: dict[str, Any] = rows[index]
        stage.row(
            step=row["step"],
            loss=row["train/loss"],
            ce=row["train/ce"],
            max_vio=row.get("router/max_vio"),
            grad_norm=row["optim/grad_norm"],
            tokens_per_s=row["speed/tokens_per_s"],
            mfu=row.get("speed/mfu"),
        )
    if rows:
        fell = rows[0]["train/ce"] - rows[-1]["train/ce"]
        stage.check("the loss falls", fell > (0.01 if stage.tiny else 1.0), f"by {fell:.2f} nats")
    result_file = directory / "result.json"
    if result_file.exists():
        result = json.loads(result_file.read_text())
        baselines = result["baselines"]
        for key, value in result.items():
            if key.startswith("eval/bits_per_byte/"):
                domain = key.removeprefix("eval/bits_per_byte/")
                gzip_bits = (baselines.get(domain) or {}).get("gzip_bits_per_byte")
                stage.row(domain=domain, bits_per_byte=value, gzip_bits_per_byte=gzip_bits)
        names = ("eval/loss", "total_params", "active_params", "speed/tokens_per_s", "wall_s")
        stage.row(**{name: result[name] for name in names}, mfu_of_last_rows=_mean_mfu(rows))


def _mean_mfu(rows: list[dict[str, Any]]) -> float | None:
    """Return the mean of the second half of the run."""
    values = [row["speed/mfu"] for row in rows[len(rows) // 2 :] if row.get("speed/mfu") is not None]
    return sum(values) / len(values) if values else None


def main(stage: Stage) -> None:
    """Copy the text, run, report."""
    if importlib.util.find_spec("hydra") is None:
        stage.check("packages of train.py", False, "hydra is not installed: see benchmarks/gpu_wheels.sh")
        return
    with tempfile.TemporaryDirectory() as folder:
        text, runs, log = Path(folder) / "text", Path(folder) / "runs", Path(folder) / "log.txt"
        long = stage.tiny or stage.remaining_s > SHORT_S
        with stage.timed("copying the text"):
            sizes = copy_text(text, 1.0 if long else SHORT_SHARE, tiny=stage.tiny)
        spare_s = stage.remaining_s - START_S["long" if long else "short"] - long * PROFILE_S - END_S
        steps = 12 if stage.tiny else min(max(int(spare_s / STEP_S), STEPS[0]), STEPS[1])
        stage.about |= {"text": sizes, "steps": steps}
        start = time.monotonic()
        arguments = command(stage, text, runs, steps, profiled=long)
        # The stage is killed some seconds after its deadline, and needs less than these.
        status, lines = run(arguments, log, max(10.0, stage.remaining_s + 2))
        seconds = time.monotonic() - start
        directory = runs / "run"
        rows = read_metrics(directory)
        for phase, took in phases(lines, seconds).items():
            stage.row(item=phase, seconds=round(took, 1))
        evaluation = evaluation_seconds(lines, rows, 4 * 64 if stage.tiny else 16 * 2048)
        if evaluation is not None:
            stage.row(item="of the steps: the evaluation, about", seconds=round(evaluation, 1))
        report(stage, directory, rows)
        stage.check("train.py", status == 0, f"{seconds:.0f} s, exit status {status}")
        if status != 0:
            print("\n".join(line for _, line in lines[-25:]), flush=True)
        shutil.copy(log, directory / "log.txt") if directory.exists() else None
        stage.keep(*(directory / name for name in FILES if (directory / name).exists()))


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
