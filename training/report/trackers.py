"""Weights & Biases beside `metrics.jsonl`, which stays the source of truth: when W&B fails, training goes on."""

import math
import netrc
import os
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from common.errors import ConfigError
from training.config import TrackingConfig
from training.report.metrics import Row

# W&B refuses histograms with more.
MAX_BINS = 512
# Other ranks wait for the one that starts W&B: well under `parallel.timeout_s`.
INIT_TIMEOUT_S = 30


class Tracker(Protocol):
    """Where a run's numbers are shown. No method raises: a tracker that fails says so once and falls silent."""

    def log(self, row: Row, step: int) -> None:
        """Show a row of `metrics.jsonl` under its own names."""

    def summary(self, values: dict[str, Any]) -> None:
        """Set values that describe the run as a whole."""

    def image(self, name: str, path: Path) -> None:
        """Show a PNG file."""

    def finish(self) -> None:
        """Write out what is held back, and end."""

    def files(self) -> Path | None:
        """The directory with this process's offline files, which `wandb leet` opens; None where there is none."""


class NullTracker:
    """`tracking.wandb=disabled`."""

    def log(self, row: Row, step: int) -> None:
        pass

    def summary(self, values: dict[str, Any]) -> None:
        pass

    def image(self, name: str, path: Path) -> None:
        pass

    def finish(self) -> None:
        pass

    def files(self) -> Path | None:
        return None


class WandbTracker:
    """A W&B run. Loads (lists of E shares) become one scalar an expert, `<name>/expert_XX`, and one histogram."""

    def __init__(self, wandb: Any, run: Any, warn: Callable[[str], None]) -> None:
        self._wandb, self._run, self._warn = wandb, run, warn
        self._alive = True
        self._images = find_spec("PIL") is not None
        self._files = Path(run.settings.sync_dir)

    def log(self, row: Row, step: int) -> None:
        self._attempt(lambda: self._run.log(self._expand(row), step=step))

    def summary(self, values: dict[str, Any]) -> None:
        self._attempt(lambda: self._run.summary.update(values))

    def image(self, name: str, path: Path) -> None:
        """Needs the package pillow; without it the image is left out, and a warning says so."""
        if not self._images:
            self._warn(f"W&B does not get the image {name} ({path}): the package pillow is not installed")
            return
        # No step: pictures come at the end, and belong to the row that was logged last.
        self._attempt(lambda: self._run.log({name: self._wandb.Image(str(path))}))

    def finish(self) -> None:
        self._attempt(lambda: self._run.finish())

    def files(self) -> Path | None:
        return self._files

    def _attempt(self, call: Callable[[], object]) -> None:
        if not self._alive:
            return
        try:
            call()
        except Exception as error:  # Whatever W&B's service dies of, training does not.
            self._alive = False
            self._warn(f"W&B stopped ({_one_line(error)}); training goes on, metrics.jsonl has every row")
            if isinstance(error, ConnectionError):
                # Takes back W&B's exit hook, which would end the process with the traceback of the same error.
                with suppress(Exception):
                    self._wandb.teardown(exit_code=0)

    def _expand(self, row: Row) -> dict[str, Any]:
        expanded: dict[str, Any] = {}
        for name, value in row.items():
            if not isinstance(value, list):
                expanded[name] = value
                continue
            for expert, share in enumerate(value):
                expanded[f"{name}/expert_{expert:02d}"] = share
            if all(math.isfinite(share) for share in value):
                expanded[name] = self._wandb.Histogram(np_histogram=load_histogram(value))
        return expanded


def load_histogram(load_E: list[float]) -> tuple[list[float], list[float]]:
    """Heights and edges of a histogram over the expert index: a bar an expert, or neighbours together beyond 512."""
    import numpy as np

    num_experts = len(load_E)
    experts = np.arange(num_experts) + 0.5
    bins = min(num_experts, MAX_BINS)
    heights, edges = np.histogram(experts, bins=bins, range=(0, num_experts), weights=np.asarray(load_E))
    return heights.tolist(), edges.tolist()


def check_tracking(config: TrackingConfig) -> None:
    """Refuse what cannot work before any process starts. Reads no network.

    Raises:
        ConfigError: `online` without an API key in `WANDB_API_KEY` or the netrc file.
    """
    if config.wandb == "online" and not os.environ.get("WANDB_API_KEY") and not _netrc_has_key():
        raise ConfigError(
            "tracking.wandb=online: expected an API key in the environment variable WANDB_API_KEY or in ~/.netrc "
            "(`wandb login` writes it), or tracking.wandb=offline"
        )


def start_tracking(
    config: TrackingConfig,
    *,
    name: str,
    directory: Path,
    resolved_config: dict[str, Any],
    resumed_step: int | None,
    warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Tracker:
    """Start tracking, on one rank.

    Args:
        name: the run's name, as shown.
        directory: the run's directory; W&B's files go to `directory/wandb`.
        resolved_config: shown as it is: the caller keeps secrets out of it.
        resumed_step: the checkpoint's step if the run is resumed: then it keeps its W&B id (`wandb/run_id.txt`) and the
            rows' own steps, each offline part in a directory of its own. None: a new W&B run.
        warn: gets one line when W&B fails, at its start or later.

    Prints nothing itself, and W&B neither: no console capture, no code, no git state, no list of packages.
    """
    if config.wandb == "disabled":
        return NullTracker()
    try:
        import wandb

        settings = wandb.Settings(
            mode=config.wandb,
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_save_requirements=False,
            init_timeout=INIT_TIMEOUT_S,
        )
        # Before init, which else announces where it found the key.
        wandb.setup(settings=settings)
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            id=_run_id(directory / "wandb" / "run_id.txt", resumed_step),
            # An offline run cannot ask the service what it has: there the rows' own steps do it alone.
            resume="allow" if config.wandb == "online" and resumed_step is not None else None,
            dir=str(directory),
            config=resolved_config,
            settings=settings,
        )
        return WandbTracker(wandb, run, warn)
    except Exception as error:  # No network, a full disk, a service that does not start: the run is worth more.
        warn(f"W&B did not start ({_one_line(error)}); training goes on, metrics.jsonl has every row")
        return NullTracker()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _run_id(file: Path, resumed_step: int | None) -> str:
    if resumed_step is not None and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:12]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
