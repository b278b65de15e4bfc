"""Everything that one GPU can prove and measure, in stages: correctness, speed of a layer and of a step, memory, a run.

    python benchmarks/gpu.py                                 # all stages, at most 8 minutes on one H100
    python benchmarks/gpu.py stages=layer,step minutes=4 out=/tmp/gpu
    python benchmarks/gpu.py stages=step:100,tests:45        # seconds of each stage
    python benchmarks/gpu.py device=cpu size=tiny            # checks the script itself, without a GPU
    torchrun --nproc-per-node 8 benchmarks/gpu.py stages=calibrate   # every GPU, and the links between them

Every stage is a file in `benchmarks/gpu_stages/` and runs in its own process with its own share of the time: the share
in `SHARES`, or the seconds after its name. With seconds, `minutes` is their sum unless it is given, too. It then scales
them. Time that a stage leaves goes to the next ones. Each row
of its result is written to `<out>/<stage>.json` when it is measured, so that a run that is cut off keeps what it has.
The table of a stage is printed when the stage ends. Stages put traces and plots into `<out>/files.zip`. The exit status
is 1 if a check failed or a stage did not finish.

Nothing is downloaded. The stage `train` needs the packages of `train.py`. `benchmarks/gpu_wheels.sh` collects those
that a machine without a network lacks.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.text import to_json

HERE = Path(__file__).resolve().parent
SHARES = {"tests": 0.2, "layer": 0.2, "step": 0.2, "train": 0.2, "memory": 0.08, "parity": 0.06, "calibrate": 0.06}
"""Stage -> its share of the time, in the order in which stages run."""
DEFAULTS = {"stages": ",".join(SHARES), "minutes": "8", "out": "runs/gpu", "device": "cuda", "size": "full"}
CHOICES = {"device": ("cuda", "cpu"), "size": ("full", "tiny")}
GRACE_S = 3.0
"""Seconds between the signals that ask a stage to end and that end it."""


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    options = read_options(sys.argv[1:])
    if isinstance(options, str):
        print(f"error: {options}", file=sys.stderr)
        return 2
    rank = os.environ.get("RANK", "0")
    if rank != "0":  # torchrun has started several of this script. Rank 0 prints and has the files that users read.
        options["out"] = str(Path(options["out"]) / f"rank-{rank}")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "files.zip").unlink(missing_ok=True)
    shares = read_stages(options["stages"])
    assert not isinstance(shares, str)
    deadline = time.monotonic() + float(options["minutes"]) * 60
    failed = []
    for number, (stage, share) in enumerate(shares):
        left = deadline - time.monotonic()
        budget = left * share / sum(later for _, later in shares[number:])
        print(f"== {stage}: at most {budget:.0f} s", flush=True)
        start = time.monotonic()
        status = run_stage(stage, budget, options)
        print_table(out / f"{stage}.json")
        print(f"== {stage}: {time.monotonic() - start:.0f} s, {status}", flush=True)
        if status != "passed":
            failed.append(stage)
    print(f"failed or unfinished: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def read_options(arguments: list[str]) -> dict[str, str] | str:
    """Return the options `key=value` with their defaults, or a line that says what is wrong with them."""
    options = dict(DEFAULTS)
    given = set()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in options or not equals:
            return f"{argument}: expected key=value with one of the keys {', '.join(options)}"
        options[key] = value
        given.add(key)
    shares = read_stages(options["stages"])
    if isinstance(shares, str):
        return f"stages={options['stages']}: expected {shares}"
    if ":" in options["stages"] and "minutes" not in given:
        options["minutes"] = str(sum(seconds for _, seconds in shares) / 60)
    for key, allowed in CHOICES.items():
        if options[key] not in allowed:
            return f"{key}={options[key]}: expected {' or '.join(allowed)}"
    try:
        minutes = float(options["minutes"])
    except ValueError:
        minutes = 0
    if not 0 < minutes < 1e4:
        return f"minutes={options['minutes']}: expected a number > 0"
    return options


def read_stages(text: str) -> list[tuple[str, float]] | str:
    """Return the stages with the seconds of each, or with its share of the time. A text says what was expected."""
    names, _, numbers = zip(*(part.partition(":") for part in text.split(",")), strict=True)
    unknown = [name for name in names if name not in SHARES]
    if unknown:
        return f"some of {', '.join(SHARES)}, found {', '.join(unknown)}"
    if not any(numbers):
        return [(name, SHARES[name]) for name in names]
    try:
        seconds = [float(number) for number in numbers]
    except ValueError:
        seconds = [0.0]
    if not all(0 < number < 1e6 for number in seconds):
        return "seconds > 0 after each stage or after none, as in step:100,tests:45"
    return list(zip(names, seconds, strict=True))


def run_stage(stage: str, budget: float, options: dict[str, str]) -> str:
    """Run a stage in its own process. Return `passed`, `failed`, or `cut off` if it takes longer than its budget."""
    result = Path(options["out"]) / f"{stage}.json"
    result.unlink(missing_ok=True)
    # The stage ends itself before it is killed, so that it can leave out what no longer fits.
    # Its imports take seconds, which count.
    times = {"start": time.time(), "end": time.time() + budget - 2 * GRACE_S}
    own = to_json({"out": str(result), **times, "device": options["device"], "size": options["size"]})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "gpu_stages" / f"{stage}.py"), own], env=environment, start_new_session=True
    )
    try:
        code = process.wait(timeout=budget)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if isinstance(error, KeyboardInterrupt):
            raise
        return "cut off"
    return "passed" if code == 0 else "failed"


def print_table(path: Path) -> None:
    """Print the rows of a stage's result, one table for each set of columns."""
    if not path.exists():
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    print(to_json(result["about"]))
    tables: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for row in result["rows"]:
        tables.setdefault(tuple(row), []).append(row)
    for columns, rows in tables.items():
        cells = [list(columns), *([shown(row[name]) for name in columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def shown(value: object) -> str:
    """Return a cell of a table: numbers with four digits, a dash for no value, and at most 120 characters of a text."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:120]


if __name__ == "__main__":
    raise SystemExit(main())
