"""A tracker that records the CPU time of a run, as a plugin.

    python train.py plugins=[examples/study/cpu_seconds.py] tracking.trackers=[cpu_seconds]

`<run>/cpu_seconds.csv` gets a line for each row of `metrics.jsonl`: the step, and the CPU seconds that all threads of
rank 0's process have used since its start. They contain evaluations, probes and everything else that the run does.
"""

import time

from training.report.metrics import Row
from training.report.trackers import TRACKERS, TrackedRun, Tracker

FILE = "cpu_seconds.csv"


@TRACKERS.register("cpu_seconds")
class CpuSeconds(Tracker):
    """Writes the file. A resumed run begins it anew, because its process does."""

    def __init__(self, run: TrackedRun) -> None:
        self.file = open(run.directory / FILE, "w", encoding="utf-8")  # noqa: SIM115 - closed by finish()
        self.file.write("step,cpu_seconds\n")

    def log(self, row: Row, step: int) -> None:  # noqa: D102
        self.file.write(f"{step},{time.process_time()}\n")
        self.file.flush()

    def finish(self) -> None:  # noqa: D102
        self.file.close()
