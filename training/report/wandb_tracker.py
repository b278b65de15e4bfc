"""The tracker of Weights & Biases."""

import math
import netrc
import os
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from common.files import read_file
from common.text import first_line
from training.config import TrackingConfig
from training.report.alarms import Alarm
from training.report.code_state import code_state, uncommitted_changes
from training.report.metrics import Row
from training.report.trackers import TrackedRun, Tracker, separate
from training.report.wandb_files import logged_steps

MAX_BINS = 512
"""The most bins that W&B accepts in a histogram."""
INIT_TIMEOUT_S = 30
"""Seconds that W&B gets to start. The other ranks wait meanwhile, so this must be well below `parallel.timeout_s`."""
FINISH_TIMEOUT_S = 120
"""Seconds that W&B gets at the end of a run to send what it has not sent yet. It stays on the disk after that."""
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""The hosts of W&B's service: its default was the first, and is the second in newer versions of the package."""
SECTIONS = ("train", "eval", "router", "experts", "optim", "speed", "health", "alarm")
"""The first parts of the metrics' names. W&B shows a section of panels for each, with the step as the x axis."""
ALERT_PAUSE_S = 600
"""Seconds after an alert in which W&B sends no other with the same title."""


class WandbTracker(Tracker):
    """A W&B run. The values of a layer's experts become a histogram over the expert's index: a heatmap over the steps.

    Args:
        seen: the steps whose rows W&B has from earlier launches of this run.
        step: the last step of the run that has a row.
        per_expert: whether every expert also has a scalar.
    """

    def __init__(
        self,
        wandb: Any,
        run: Any,
        warn: Callable[[str], None],
        *,
        seen: Collection[int] = (),
        step: int | None = None,
        per_expert: bool = False,
    ) -> None:
        self._wandb, self._run, self._warn, self._seen, self._step = wandb, run, warn, seen, step
        self._per_expert = per_expert
        with self._connection():
            run.define_metric("step", hidden=True)
            for section in SECTIONS:
                run.define_metric(f"{section}/*", step_metric="step")
        self._images = find_spec("PIL") is not None

    def seen(self) -> Collection[int]:
        return self._seen

    def log(self, row: Row, step: int) -> None:
        self._step = step
        with self._connection():
            # W&B writes the row when it gets one of a later step. Until then, `image` adds to it.
            self._run.log({"step": step} | self._expand(row), step=step)

    def alert(self, alarm: Alarm) -> None:
        """Send the alarm as an alert of W&B, at most one in ten minutes for each rule."""
        with self._connection():
            title, level = (f"{alarm.rule}: ended", "INFO") if alarm.ended else (alarm.rule, "WARN")
            self._run.alert(
                title=title, text=f"step {alarm.step}: {alarm.message}", level=level, wait_duration=ALERT_PAUSE_S
            )

    def summary(self, values: dict[str, Any]) -> None:
        with self._connection():
            self._run.summary.update(values)

    def image(self, name: str, path: Path) -> None:
        """Add a PNG file to the row of the last step. Without the package pillow, warn and leave the image out."""
        if not self._images:
            self._warn(f"W&B does not get the image {name} ({path}): the package pillow is not installed")
            return
        with self._connection():
            self._run.log({name: self._wandb.Image(str(path))}, step=self._step)

    def finish(self) -> None:
        """Finish the run, and wait for the end of W&B's service.

        `Run.finish` returns before the service has written the last rows to the file of an offline run. If this process
        were the last of a container, they would be lost. A worker process skips the exit hook in which W&B waits.

        Raises:
            TimeoutError: the service does not take the rest of the data within `FINISH_TIMEOUT_S`.
        """
        with self._connection():
            try:
                self._run.finish()
            except TimeoutError as error:
                files = Path(self._run.dir).parent
                raise TimeoutError(
                    f"no network for {FINISH_TIMEOUT_S} s; `wandb sync {files}` sends the rest"
                ) from error
            self._wandb.teardown()

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """Remove W&B's exit hook after an error, such as the end of W&B's service, and raise the error again."""
        try:
            yield
        except Exception:
            # The hook would end the process with the traceback of the same error.
            with suppress(Exception):
                self._wandb.teardown(exit_code=0)
            raise

    def _expand(self, row: Row) -> dict[str, Any]:
        values, lists = separate(row, self._per_expert)
        return values | {
            name: self._wandb.Histogram(np_histogram=load_histogram(value_E))
            for name, value_E in lists.items()
            if all(map(math.isfinite, value_E))
        }


def load_histogram(load_E: list[float]) -> tuple[list[float], list[float]]:
    """Return the heights and the edges of a histogram over the expert index.

    Each expert has a bin; beyond 512 experts, neighbouring experts share one.
    """
    import numpy as np

    num_experts = len(load_E)
    heights, edges = np.histogram(
        np.arange(num_experts) + 0.5,
        bins=min(num_experts, MAX_BINS),
        range=(0, num_experts),
        weights=np.asarray(load_E),
    )
    return heights.tolist(), edges.tolist()


def start_wandb(config: TrackingConfig, run: TrackedRun, warn: Callable[[str], None]) -> WandbTracker:
    """Start W&B in the mode `config.wandb`, and return its tracker. Nothing is printed.

    If the service cannot be reached within `INIT_TIMEOUT_S`, or refuses the key, the run is written offline.

    Args:
        warn: receives a line about that, and one for each plot that W&B does not get.

    Raises:
        Exception: W&B does not start.
    """
    import wandb

    if config.wandb != "online":
        return _start(config, run, warn)
    try:
        return _start(config, run, warn)
    except Exception as error:
        wandb.teardown()  # Its settings are those of the mode `online`.
        tracker = _start(replace(config, wandb="offline"), run, warn)
        warn(
            f"W&B cannot be reached ({first_line(error)}); the run is written offline, and "
            f"`wandb sync {run.directory / 'wandb'}/offline-run-*` sends it"
        )
        return tracker


def _start(config: TrackingConfig, run: TrackedRun, warn: Callable[[str], None]) -> WandbTracker:
    import wandb

    id_file = run.directory / "wandb" / "run_id.txt"
    id_file.parent.mkdir(parents=True, exist_ok=True)
    code = code_state()
    settings = wandb.Settings(
        mode=config.wandb,
        silent=True,
        console="off",
        disable_git=True,  # It would also send uncommitted changes, and the address of the repository.
        git_commit=code["commit"],
        disable_code=True,
        disable_job_creation=True,
        x_save_requirements=False,
        init_timeout=INIT_TIMEOUT_S,
        **_finish_settings(wandb),
    )
    # This must come before init, which would otherwise print where it found the API key.
    wandb.setup(settings=settings)
    wandb_run = wandb.init(
        project=config.project,
        entity=config.entity,
        name=run.name,
        group=config.group or run.sweep,
        job_type=config.job_type,
        tags=config.tags or None,
        notes=config.notes,
        id=_run_id(id_file, run.resumed_step),
        # `wandb sync` appends the rows of an offline run to those of earlier launches if the run says so.
        resume=None if run.resumed_step is None else "allow",
        dir=str(run.directory),
        config=run.config | {"code": code},
        settings=settings,
    )
    # An agent of `wandb sweep` has chosen another id.
    id_file.write_text(f"{wandb_run.id}\n", encoding="utf-8")
    changes = uncommitted_changes() if config.diff else None
    if changes is not None:
        file = run.directory / "wandb" / "code.diff"
        file.write_text(changes, encoding="utf-8")
        wandb_run.save(str(file), base_path=str(file.parent), policy="now")
    seen: Collection[int] = ()
    if run.resumed_step is not None:
        # The service has all rows before the step that it expects next. It refuses earlier steps.
        online = config.wandb == "online"
        seen = range(wandb_run.starting_step) if online else logged_steps(id_file.parent, wandb_run.id)
    return WandbTracker(wandb, wandb_run, warn, seen=seen, step=run.resumed_step, per_expert=config.per_expert)


def _finish_settings(wandb: Any) -> dict[str, Any]:
    """Return settings by which `Run.finish` raises TimeoutError if the service does not take the rest of the data.

    Without them it would wait for the network for ever. Old versions of W&B do not have them.
    """
    settings = {"finish_timeout": FINISH_TIMEOUT_S, "finish_timeout_raises": True}
    return settings if settings.keys() <= getattr(wandb.Settings, "model_fields", {}).keys() else {}


def _run_id(file: Path, resumed_step: int | None) -> str:
    """Return the id of the run that is resumed, which `file` has, or a new one."""
    if resumed_step is not None and file.is_file():
        return read_file(file, 256).decode().strip()
    return uuid.uuid4().hex[:12]


def netrc_has_key() -> bool:
    """Return whether the netrc file has an API key of W&B's service."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname
    try:
        found = netrc.netrc(os.environ.get("NETRC"))
        return any(found.authenticators(name) is not None for name in ([host] if host else HOSTS))
    except (OSError, netrc.NetrcParseError):
        return False
