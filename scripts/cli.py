"""The line between Hydra and the rest: arguments in front of it, one dataclass and one-line errors behind it."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import CheckpointError, ConfigError, DataError, ModelError, PreflightError, RunError
from common.strict import from_dict, leaf_keys, located, unknown_key
from common.text import nearest, one_line
from parallel.startup.launch import WorkerFailure, World, die_with_parent, launch_workers, world_from_env
from training.config import Config, LaunchConfig, RunConfig
from training.layout import build_workload, resolve_layout
from training.run import choose_name, discard_unstarted, launched_directory, prepare_directory, save_config, save_result

T = TypeVar("T")
R = TypeVar("R")

CONF = Path(__file__).resolve().parent.parent / "conf"
PATIENCE_S = 3.0
"""How long other ranks leave local rank 0 to print a mistake that all of them make."""
USER_ERRORS = (ConfigError, RunError, DataError, CheckpointError, ModelError, PreflightError)


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments less `--local_rank N`, which deepspeed adds; LOCAL_RANK in the environment says the same."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def run_tool(name: str, cls: type[T], function: Callable[[T], Any], *, free_text: Sequence[str] = ()) -> NoReturn:
    """The whole of a tool's `main`: command line -> `conf/<name>.yaml` -> `cls` -> `function`; ends the process.

    Exit status 0, 2 with one line for a mistake of the user's, 1 for anything else.

    Args:
        cls: the dataclass that `conf/<name>.yaml` mirrors.
        free_text: keys whose values are taken as they are typed: a prompt is no expression of Hydra's grammar.
    """
    arguments = without_local_rank(sys.argv[1:])
    try:
        if {"-h", "--help"} & set(arguments):
            print(f"{sys.modules[cls.__module__].__doc__}\n{(CONF / f'{name}.yaml').read_text()}")
            raise SystemExit(0)
        unwanted = next((argument for argument in arguments if argument.startswith("-")), None)
        if unwanted is not None:
            raise ConfigError(f"{unwanted}: expected key=value, or --help for the keys")
        overrides = [_as_typed(argument) if argument.split("=")[0] in free_text else argument for argument in arguments]
        plainly = [override for override in overrides if _names_a_group(override, cls)]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = plain(compose(name, [override for override in overrides if override not in plainly]))
        for override in OverridesParser.create().parse_overrides(plainly):
            raw[override.key_or_group] = override.value()
        function(from_dict(cls, raw))
    except Exception as error:
        end(error, arguments, cls)
    raise SystemExit(0)


def _names_a_group(override: str, cls: type) -> bool:
    """Whether Hydra would look for a preset where the tool has a plain value, as in `checkpoint=runs/x`."""
    key = override.partition("=")[0]
    return (CONF / key).is_dir() and key in leaf_keys(cls)


def _as_typed(argument: str) -> str:
    """`key=value` with the value as a quoted string of Hydra's grammar."""
    key, _, value = argument.partition("=")
    # Inside quotes Hydra reads a backslash as itself, except before a quote, and resolves `${`.
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped).replace("${", "\\${")
    return f"{key}='{escaped}'"


def sweep_directory(arguments: Sequence[str]) -> Path | None:
    """Choose and create the directory of the sweep that the arguments ask for; `None` when they ask for a single run.

    Raises:
        ConfigError: a sweep inside torchrun or deepspeed, whose ranks would sweep in lockstep.
        RunError: the directory cannot be written.
    """
    parsed = get_args_parser().parse_args(list(arguments))
    if not (parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides):
        return None
    if "LOCAL_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "--multirun: expected no torchrun or deepspeed around a sweep; use: "
            "python train.py -m launch.nproc=<processes of one job> <overrides>"
        )
    first_job = []
    for override in OverridesParser.create().parse_overrides(parsed.overrides):
        if not override.is_sweep_override():
            first_job.append(str(override.input_line))
        elif override.is_discrete_sweep():
            first_job.append(f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = plain(compose("config", first_job))
    run = from_dict(RunConfig, raw["run"], "run")
    if run.name is not None and any((Path(run.root) / run.name).glob("[0-9]*")):
        raise RunError(f"run.name={run.name}: expected a free name for a sweep; {run.root}/{run.name} has jobs already")
    return prepare_directory(run, choose_name(run))


def current_job() -> tuple[Path | None, int | None]:
    """Inside a Hydra job: the sweep's directory and the job's number in it; (None, None) outside of a sweep."""
    hydra = HydraConfig.get()
    return (Path(hydra.sweep.dir), int(hydra.job.num)) if hydra.mode is RunMode.MULTIRUN else (None, None)


def plain(cfg: DictConfig, sweep_dir: Path | None = None, number: int | None = None) -> dict[str, Any]:
    """What Hydra composed, interpolations resolved, as dicts, lists and scalars; a job of a sweep gets its name."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    raw: dict[str, Any] = {str(name): value for name, value in container.items()}
    if sweep_dir is not None:
        raw["run"]["name"] = f"{os.path.relpath(sweep_dir, raw['run']['root'])}/{number}"
    return raw


def execute(
    config: Config, train: Callable[[Config], dict[str, Any]], *, fresh_processes: bool = False
) -> dict[str, Any]:
    """Run `train(config)`: here, when a launcher started this process or one process is enough, else in own workers.

    Args:
        train: a function of an importable module, or of the script that runs; its result on rank 0 is returned.
        fresh_processes: start workers even for one process, so that nothing is left over for the next job of a sweep.

    Raises:
        ConfigError: the world does not fit, or any other error of `USER_ERRORS`, with one line for the user.
        WorkerFailure: a worker of ours failed.
    """
    from training.report.trackers import check_tracking

    launch, launched = config.launch, "RANK" in os.environ
    try:
        world = world_from_env() if launched else World(world_size=launch.nproc, local_world_size=launch.nproc)
    except ValueError as error:
        raise located(error, "") from error
    resolve_layout(config, build_workload(config, config.model), world)
    check_tracking(config.tracking)
    if launched:
        die_with_parent()
        try:
            return train(config)
        except USER_ERRORS:
            begun = launched_directory(config.run) if os.environ["RANK"] == "0" else None
            if begun is not None:
                discard_unstarted(begun)
            raise
    config = prepared(config)
    assert config.run.name is not None
    try:
        return in_processes(launch, train, config, fresh=fresh_processes)
    except Exception:
        discard_unstarted(Path(config.run.root) / config.run.name)
        raise


def in_processes(launch: LaunchConfig, function: Callable[..., R], *arguments: Any, fresh: bool = False) -> R:
    """`function(*arguments)` as `launch` wants it: here, or in own workers; returns what it returned (on rank 0).

    Args:
        function: of an importable module; it and `arguments` are pickled for workers.
        fresh: start workers even for one process.

    Raises:
        WorkerFailure: a worker failed; with status 2 where it was a mistake of the user's.
    """
    if launch.nproc > 1 or launch.max_restarts > 0 or fresh:
        results: dict[int, R] = launch_workers(
            _in_worker,
            (function, arguments),
            nproc=launch.nproc,
            max_restarts=launch.max_restarts,
            threads=launch.threads,
        )
        return results[0]
    if launch.threads is not None:
        import torch

        torch.set_num_threads(launch.threads)
    return function(*arguments)


def prepared(config: Config) -> Config:
    """What the launching process does for its workers: the token store, the run's name and directory.

    Raises:
        ConfigError, DataError, RunError: whatever of it cannot be had, before any worker exists.
    """
    from data.tokens.store import prepare
    from training.report.terminal import show_line

    prepare_directory(config.run, ".")  # the root, before the work of reading a corpus
    prepare(config.data, verify=False, report=show_line)
    name = choose_name(config.run)
    prepare_directory(config.run, name)
    return replace(config, run=replace(config.run, name=name))


def record_failure(error: Exception, arguments: Sequence[str], cfg: DictConfig, directory: Path) -> None:
    """Print why a job of a sweep failed, and leave in its directory what its row in the table needs."""
    message = user_message(error, arguments)
    if message is None:
        print(_details(error), file=sys.stderr)
        message = _details(error).strip().splitlines()[-1]
    print(f"error: job {directory.name}: {message}", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    save_config(directory, _with_defaults(plain(cfg, directory.parent, int(directory.name))))
    save_result(directory, {"status": "failed", "error": message})


def user_message(error: Exception, arguments: Sequence[str], cls: type = Config) -> str | None:
    """The one line that tells the user what to change; `None` for an error that is not the user's.

    Args:
        arguments: the command line, for the value of a key that Hydra refused.
        cls: the configuration that the command line is for.
    """
    if isinstance(error, WorkerFailure):
        return error.message if error.exitcode == 2 else None
    if isinstance(error, USER_ERRORS):
        return one_line(str(error))
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = sorted(error.options)
        return f"{group}={option}: expected one of {', '.join(options)}; the nearest is {nearest(option, options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected key=value ({one_line(error.message.split('See https')[0])})"
    if isinstance(error, HydraException | OmegaConfBaseException):
        text = str(error) or str(error.__cause__)
        refused = re.search(r"Could not override '([^']+)'", text)
        return _refused_key(refused[1], arguments, cls) if refused else one_line(text)
    return None


def end(error: Exception, arguments: Sequence[str], cls: type = Config) -> NoReturn:
    """End the process: status 2 and one line for a mistake of the user's, else 1 and where it happened.

    Under a launcher only local rank 0 prints a mistake, because every rank makes it.
    """
    message = user_message(error, arguments, cls)
    if message is None:
        print(_details(error), file=sys.stderr)
        raise SystemExit(1)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    else:  # a launcher ends the other ranks as soon as one has ended: first the one that says why
        time.sleep(PATIENCE_S)
    raise SystemExit(2)


def _details(error: Exception) -> str:
    """The traceback, which a worker's failure brings from its own process."""
    return error.message if isinstance(error, WorkerFailure) else "".join(traceback.format_exception(error))


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """The sections, with what the dataclasses fill in: a key only some jobs have would look as if it had been swept."""
    for section, cls in get_type_hints(Config).items():
        given = raw.get(section)
        for field in fields(cls):
            if isinstance(given, dict) and field.default is not MISSING:
                given.setdefault(field.name, list(field.default) if isinstance(field.default, tuple) else field.default)
    return raw


def _refused_key(key: str, arguments: Sequence[str], cls: type) -> str:
    given = [argument.partition("=") for argument in arguments]
    value = next((text for name, _, text in given if name.lstrip("+") == key), "")
    keys = list(leaf_keys(cls))
    if key in keys:
        refused = f"{key}={value}"
        return f"{refused}: expected a key of the chosen presets; +{refused} adds it, another preset may have it"
    return str(unknown_key(key, value, keys))


def _in_worker(function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    try:
        return function(*arguments)
    except USER_ERRORS as error:
        raise SystemExit(2) from error
