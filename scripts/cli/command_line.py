"""The command line of `train.py` and of every tool, with Hydra.

Arguments become a composed configuration of plain dicts, lists and scalars. A mistake that the user can correct becomes
one line, and any other error a traceback. `run_tool` is the `main` of every tool in scripts/.
"""

import os
import re
import select
import signal
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from yaml import YAMLError

from common.errors import ConfigError, RunError, TrainingFailure, UserError, require
from common.files import disk_errors, read_file
from common.plugins import load_plugins
from common.strict import from_dict, leaf_keys, suggested_key, unknown_key
from common.text import MAX_YAML, check_yaml, escaped, nearest_presets, one_line, shorten
from parallel.startup.launch import WorkerFailure, interrupts_raise, is_launched
from scripts.cli.help import train_help
from scripts.cli.overrides import PARSER, as_typed, in_grammar, quote, text_keys, values_of
from scripts.cli.sweeps import count_jobs, launch_line, silence_optuna
from training.checkpoint.manifest import CHECKPOINTS
from training.config import Config, RunConfig
from training.owner import SWEEP_RECORD, RunOwner
from training.run import save_config, save_result

CONF = Path(__file__).resolve().parents[2] / "conf"
INTERRUPTED, UNREAD = 130, 141
"""Exit statuses as a shell gives them: after Ctrl-C (128 + SIGINT), and if the reader of stdout has ended
(128 + SIGPIPE), as in `| head`."""
MAX_MESSAGE = 4000
"""The most characters of the line about a mistake. Names and values in it can come from a file."""
MAX_BRACKETS = 10_000
"""The most brackets of a preset that is not YAML."""
PRESETS = ("*.yaml", "*/*.yaml", "*/*/*.yaml")
"""Where presets are below `--config-dir`."""
PATIENCE_S = 3.0
"""Seconds that other ranks wait before they exit, so that local rank 0 can print the mistake that all of them make."""
T = TypeVar("T")
COMMON_HELP = "Every tool also takes plugins=[...] (docs/extending.md) and --config-dir DIR with more presets."


@dataclass(frozen=True)
class _Plugins:
    plugins: tuple[str, ...] = ()


def take_flag(arguments: Sequence[str], *flags: str) -> tuple[str | None, list[str]]:
    """Separate a flag, written as `--flag VALUE` or `--flag=VALUE`, from the other arguments.

    Args:
        flags: the spellings of the flag.

    Returns:
        The flag's last value (None without the flag, empty if no value follows it), and the other arguments.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*flags, dest="value", nargs="?", const="")
    known, others = parser.parse_known_args(arguments)
    return known.value, others


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without `--local_rank N`, which deepspeed adds. The environment's LOCAL_RANK is read."""
    return take_flag(arguments, "--local_rank", "--local-rank")[1]


def to_overrides(arguments: Sequence[str], cls: type, *, multirun: bool = False, exact: bool = False) -> list[str]:
    """Return `key=value` arguments as overrides in Hydra's grammar (`scripts.cli.overrides`).

    The plugins that `plugins=[...]` names are loaded first, because they can add keys.

    Args:
        cls: the configuration dataclass that the command line is for.
        multirun, exact: as in `in_grammar`.

    Raises:
        ConfigError: an argument is not UTF-8, or a plugin cannot be loaded.
    """
    for argument in arguments:
        if argument.lstrip("+").startswith("plugins="):
            override = in_grammar(argument, text_keys(_Plugins), multirun=multirun)
            load_named_plugins({key.lstrip("+"): value for key, value in values_of([override]).items()})
    keys = text_keys(_Plugins) | text_keys(cls)
    return [in_grammar(argument, keys, multirun=multirun, exact=exact) for argument in arguments]


def job_command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `train.py` with its flags first, and then its overrides in Hydra's grammar.

    Raises:
        ConfigError: an unknown flag, or as `to_overrides`.
    """
    parsed, unknown = get_args_parser().parse_known_intermixed_args(list(arguments))
    require(not unknown, ConfigError, _unknown_flag(unknown[0], Config) if unknown else "")
    flags = [argument for argument in arguments if argument not in parsed.overrides]
    return [*flags, *to_overrides(parsed.overrides, Config, multirun=is_multirun(parsed))]


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return whether `--help` or `-h` is among the arguments."""
    return bool({"-h", "--help"} & set(arguments))


def show_train_help(arguments: Sequence[str]) -> None:
    """Print the groups, presets and keys of `train.py`, with the values that the other arguments choose."""
    parsed, _ = get_args_parser().parse_known_intermixed_args(list(arguments))
    raw = compose_config("config", to_overrides(parsed.overrides, Config), parsed.config_dir)
    load_named_plugins(raw)
    print(train_help(Config, raw, [CONF, *([Path(parsed.config_dir)] if parsed.config_dir else [])]))


def is_multirun(parsed: Namespace) -> bool:
    """Return whether the parsed arguments of `train.py` ask for a sweep."""
    return bool(parsed.multirun) or "hydra.mode=MULTIRUN" in parsed.overrides


def compose_config(name: str, overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """Compose `conf/<name>.yaml` and the presets that it and the overrides choose.

    Args:
        overrides: `key=value` arguments in Hydra's grammar.
        config_dir: a directory with more presets, as `--config-dir` gives it to train.py.

    Raises:
        ConfigError: `config_dir` is not a directory.
        HydraException, OmegaConfBaseException: an override cannot be used. `user_message` explains both.
    """
    return plain(_compose(name, overrides, config_dir))


def _compose(name: str, overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    """Do the same as `compose_config`, and return Hydra's own section, too."""
    if config_dir is not None:
        check_presets(config_dir)
        overrides = [f"hydra.searchpath=[{quote(f'file://{Path(config_dir).resolve()}')}]", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True)


def plain(
    cfg: DictConfig, sweep_dir: Path | None = None, number: int | None = None, *, resolve: bool = True
) -> dict[str, Any]:
    """Return a composed configuration as dicts, lists and scalars.

    A configuration is saved with the run and sent to trackers. It must not read the environment, which has secrets.

    If `run.experiment` is null, it becomes the name of the model: that of `run.init_from`, or of the model's preset.

    Args:
        cfg: the configuration, inside a Hydra job or with Hydra's own section `hydra`, which is left out.
        sweep_dir, number: the directory of a sweep and the number of the job in it. They determine `run.name`.
        resolve: whether interpolations are resolved.

    Raises:
        ConfigError: a value has an interpolation of the resolver `oc.env`.
        OmegaConfBaseException: an interpolation cannot be resolved.
    """
    with _without_environment():
        container = OmegaConf.to_container(
            OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=resolve
        )
    assert isinstance(container, dict)
    raw: dict[str, Any] = {str(name): value for name, value in container.items()}
    if isinstance(raw.get("run"), dict) and raw["run"].get("experiment", "") is None:
        choices = (cfg.hydra if "hydra" in cfg else HydraConfig.get()).runtime.choices
        raw["run"]["experiment"] = _model_name(raw["run"].get("init_from"), choices.get("model"))
    if sweep_dir is not None:
        raw["run"]["name"] = f"{os.path.relpath(sweep_dir, raw['run']['root'])}/{number}"
    return raw


@contextmanager
def _without_environment() -> Iterator[None]:
    """Refuse interpolations such as `${oc.env:WANDB_API_KEY}`."""

    refused = []

    def refuse(name: str, *default: Any) -> NoReturn:
        refused.append(f"${{oc.env:{name}}}")
        raise ConfigError(refused[0])

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    except OmegaConfBaseException as error:
        require(
            not refused,
            ConfigError,
            f"{error.full_key}={''.join(refused)}: expected a value that does not read the environment, because runs "
            "save their configuration",
        )
        raise
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _model_name(init_from: Any, preset: str | None) -> str | None:
    """The name of the model that a run trains: that of the run or directory `init_from`, or of the preset."""
    if not isinstance(init_from, str):
        return preset and preset.rpartition("/")[2]
    directory = Path(init_from).resolve()
    # A run's checkpoint is <run>/checkpoints/step-<n>.
    return (directory.parents[1] if directory.parent.name == CHECKPOINTS else directory).name


def load_named_plugins(raw: Mapping[str, Any]) -> None:
    """Load the modules that the key `plugins` of a composed configuration names.

    The sections can only be validated after this, because plugins register the kinds that the sections choose from.

    Raises:
        ConfigError: `plugins` is not a list of strings, or one of the modules cannot be imported.
    """
    load_plugins(from_dict(_Plugins, {"plugins": raw.get("plugins", [])}).plugins)


def sweep_directory(arguments: Sequence[str], owner: RunOwner) -> Path | None:
    """Choose and create the directory of the sweep that the arguments ask for. Return None for a single run.

    The directory of a sweep that was interrupted is chosen again if `run.name` names it.

    Args:
        owner: claims the directory.

    Raises:
        ConfigError: torchrun or deepspeed started this process. Each of its ranks would run the whole sweep.
        RunError: the directory cannot be claimed.
    """
    parsed = get_args_parser().parse_args(list(arguments))
    if not is_multirun(parsed):
        return None
    require(
        not is_launched(),
        ConfigError,
        "--multirun: expected no torchrun or deepspeed around a sweep; use: "
        "python train.py -m launch.nproc=<processes of one job> <overrides>",
    )
    first_job, overrides = [], PARSER.parse_overrides(parsed.overrides)
    for override in overrides:
        if not override.is_sweep_override():
            first_job.append(str(override.input_line))
        elif override.is_discrete_sweep():
            first_job.append(f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}")
    composed = _compose("config", first_job, parsed.config_dir)
    run = from_dict(RunConfig, plain(composed)["run"], "run")
    directory = Path(run.root) / (run.name or "")
    require(
        run.name is None or (directory / SWEEP_RECORD).is_file() or not any(directory.glob("[0-9]*")),
        RunError,
        f"run.name={run.name}: expected a free name for a sweep, or that of one to continue; {directory} has jobs "
        f"already, and no {SWEEP_RECORD}",
    )
    owner.claim(run)
    silence_optuna(composed.hydra)
    owner.append(SWEEP_RECORD, launch_line(parsed.overrides, count_jobs(overrides, composed.hydra)))
    return owner.directory


def current_job() -> tuple[Path | None, int | None]:
    """Inside a Hydra job, return the sweep's directory and the job's number, or (None, None) if there is no sweep."""
    hydra = HydraConfig.get()
    return (Path(hydra.sweep.dir), int(hydra.job.num)) if hydra.mode is RunMode.MULTIRUN else (None, None)


def job_arguments() -> list[str]:
    """Inside a Hydra job, return the arguments that compose this job alone, as a user would type them."""
    hydra = HydraConfig.get()
    directories = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    keys = text_keys(Config)
    overrides = [as_typed(override, keys) for override in hydra.overrides.task]
    return [*(f"--config-dir={directory}" for directory in directories), *overrides]


def record_failure(
    error: Exception, arguments: Sequence[str], cfg: DictConfig, sweep_dir: Path, number: int | None
) -> None:
    """Print why a job of a sweep failed, and write its configuration and `result.json` for its row of the table.

    Args:
        arguments: the job's, as `job_arguments` returned them.
        cfg: what Hydra composed for the job.
        sweep_dir, number: as in `plain`.
    """
    if user_message(error, arguments) is None:
        print(details(error), file=sys.stderr)
    message = last_line(error, arguments)
    print(f"error: job {number}: {escaped(message)}", file=sys.stderr)
    try:
        raw = plain(cfg, sweep_dir, number)
    except (ConfigError, OmegaConfBaseException):  # This is why the job failed.
        raw = plain(cfg, sweep_dir, number, resolve=False)
    # The table would show a key that only some jobs have as if the sweep had changed it.
    for section, cls in get_type_hints(Config).items():
        if is_dataclass(cls) and isinstance(raw.get(section), dict):
            defaults = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
            raw[section] = defaults | raw[section]
    run = RunConfig(experiment=sweep_dir.name, name=f"{sweep_dir.name}/{number}", root=str(sweep_dir.parent))
    try:
        with RunOwner() as owner, disk_errors(sweep_dir):
            owner.claim(run)
            assert owner.directory is not None
            save_config(owner.directory, raw)
            save_result(owner.directory, {"status": "failed", "error": message})
    except RunError as refused:
        print(f"error: job {number}: {refused}", file=sys.stderr)  # Its files may be those of another launch's run.


def end(error: BaseException, arguments: Sequence[str], cls: type = Config) -> NoReturn:
    """End the process: with status 2 and one line if the user can correct the mistake, else with 1 and a traceback.

    The status is 1 after one line if training cannot go on (`TrainingFailure`), or if a signal killed a worker. After
    Ctrl-C the status is 130, and if the reader of stdout has ended it is 141. Nothing is printed then.

    Under a launcher only local rank 0 prints a line about a mistake, because every rank makes the same one.
    """
    unread = discard_unread_output()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # A second Ctrl-C would print a traceback of Python's exit.
        raise SystemExit(INTERRUPTED)
    if (unread and isinstance(error, BrokenPipeError)) or getattr(error, "exitcode", None) == UNREAD:
        raise SystemExit(UNREAD)
    message = user_message(error, arguments, cls)
    if message is None:
        print(details(error), file=sys.stderr)
        raise SystemExit(1)
    if not is_launched() or os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "alone", False):
        print(f"error: {escaped(message)}", file=sys.stderr)
    else:
        # A launcher kills the other ranks as soon as one has exited. Local rank 0 has to print first.
        time.sleep(PATIENCE_S)
    failed = isinstance(error, TrainingFailure) or getattr(error, "exitcode", 2) != 2
    raise SystemExit(1 if failed else 2)


def discard_unread_output() -> bool:
    """Return whether the reader of stdout has ended, as in `| head`. What is printed from then on is discarded."""
    poll = select.poll()
    poll.register(sys.__stdout__ or sys.stderr, 0)
    unread = any(event & select.POLLERR for _, event in poll.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return unread


def user_message(error: BaseException, arguments: Sequence[str], cls: type = Config) -> str | None:
    """Return the line about a mistake that the user can correct, or about a failure that needs no traceback. Else None.

    Args:
        arguments: the command line. It has the value of a key that Hydra refused.
        cls: the configuration dataclass that the command line is for.
    """
    if isinstance(error, WorkerFailure):
        return error.message if error.exitcode == 2 or "\n" not in error.message.strip() else None
    if isinstance(error, UserError | TrainingFailure):
        return shorten(one_line(str(error)), MAX_MESSAGE)
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = sorted(error.options)
        near = nearest_presets(option, options)
        hint = f"; the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""
        if group in ("hydra/sweeper", "hydra/launcher"):
            hint = " (more with: pip install 'mixwright[sweep]')"
        return f"{group}={option}: expected one of {', '.join(options)}{hint}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected key=value (a key is names joined by dots)"
    if isinstance(error, HydraException | OmegaConfBaseException):
        text = str(error) or str(error.__cause__)
        refused = re.search(r"Could not override '([^']+)'", text)
        return _refused_key(refused[1], arguments, cls) if refused else one_line(text)
    return _unreadable_preset(arguments) if isinstance(error, YAMLError | ValueError | RecursionError) else None


def _unreadable_preset(arguments: Sequence[str]) -> str | None:
    """Return the line about the first file below `--config-dir` that is not YAML, or None if all are."""
    directory, _ = take_flag(arguments, "--config-dir", "-cd")
    for file in _presets(directory) if directory else []:
        try:
            OmegaConf.load(file)
        except Exception as error:  # Besides YAMLError, the constructors of numbers and dates raise many types.
            return f"--config-dir={directory}: {file}: expected YAML ({shorten(one_line(str(error)), 200)})"
    return None


def _presets(directory: str) -> list[Path]:
    return sorted(file for pattern in PRESETS for file in Path(directory).glob(pattern))


def check_presets(directory: str) -> None:
    """Check that the presets below `--config-dir` are files which can be parsed in bounded time.

    Raises:
        ConfigError: `directory` is not a directory, or a preset is not a regular file, is too long or is nested too
            deeply.
    """
    require(os.path.isdir(directory), ConfigError, f"--config-dir={directory}: expected a directory")
    for file in _presets(directory):
        try:
            text = read_file(file, MAX_YAML).decode("utf-8", errors="replace")
            check_yaml(text, aliases=True)
        except YAMLError:
            # If the preset is chosen, the error of Hydra is explained. Its parser is slower than that of `check_yaml`.
            deep = text.count("[") + text.count("{") > MAX_BRACKETS
            require(not deep, ConfigError, f"--config-dir={directory}: {file}: expected YAML with fewer brackets")
        except OSError as error:
            raise ConfigError(f"--config-dir={directory}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"--config-dir={directory}: {file}: {error}") from error


def last_line(error: BaseException, arguments: Sequence[str]) -> str:
    """Return the line about an error that the user can correct, else the last line of the traceback."""
    return user_message(error, arguments) or details(error).strip().splitlines()[-1]


def details(error: BaseException) -> str:
    """Return the traceback. That of a worker's failure comes from the worker process."""
    return error.message if isinstance(error, WorkerFailure) else "".join(traceback.format_exception(error))


def _refused_key(key: str, arguments: Sequence[str], cls: type) -> str:
    """The line about a key that Hydra did not find in the composed configuration."""
    pairs = [argument.partition("=") for argument in arguments]
    value = next((text for name, _, text in pairs if name.lstrip("+") == key), "")
    keys = list(leaf_keys(cls))
    if key in keys:
        refused = f"{key}={value}"
        return f"{refused}: expected a key of the chosen presets; +{refused} adds it, another preset may have it"
    # Hydra composes the configuration before a plugin is loaded, so it knows only the keys of presets.
    has_plugins = any(name == "plugins" for name, _, _ in pairs)
    return f"{unknown_key(key, value, keys)}{f' (a key of a plugin: +{key}={value})' if has_plugins else ''}"


def _unknown_flag(argument: str, cls: type) -> str:
    """The line about a flag that the command does not have."""
    meant = suggested_key(argument.partition("=")[0].lstrip("-"), leaf_keys(cls))
    near = f"; the nearest valid key is {meant}" if meant else ""
    return f"{argument}: expected key=value, or --help for the keys{near}"


def run_tool(name: str, cls: type[T], function: Callable[[T], Any]) -> NoReturn:
    """Run a tool from its command line and end the process.

    The arguments override `conf/<name>.yaml`, the result is converted to `cls`, and `function` is called with it. The
    exit status is 0, or 2 after one line about a mistake that the user can correct, or 1 after any other error; `end`
    has the others.

    Every tool also takes `plugins=[...]` and `--config-dir DIR` (`COMMON_HELP`).

    Args:
        cls: the dataclass that `conf/<name>.yaml` mirrors.
    """
    interrupts_raise()
    arguments = without_local_rank(sys.argv[1:])
    try:
        if asks_for_help(arguments):
            print(f"{sys.modules[cls.__module__].__doc__}\n{(CONF / f'{name}.yaml').read_text()}\n{COMMON_HELP}")
            raise SystemExit(0)
        config_dir, others = take_flag(arguments, "--config-dir")
        unwanted = next((argument for argument in others if argument.startswith("-")), None)
        require(unwanted is None, ConfigError, _unknown_flag(unwanted or "", cls))
        # No tool's YAML has `plugins`.
        others = [f"++{argument}" if argument.startswith("plugins=") else argument for argument in others]
        overrides = to_overrides(others, cls, exact=True)
        values = [override for override in overrides if _is_value_named_like_a_group(override, cls)]
        raw = compose_config(name, [override for override in overrides if override not in values], config_dir)
        raw |= values_of(values)
        load_named_plugins(raw)
        function(from_dict(cls, {key: value for key, value in raw.items() if key != "plugins"}))
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        end(error, arguments, cls)
    raise SystemExit(0)


def _is_value_named_like_a_group(override: str, cls: type) -> bool:
    """Whether Hydra would look for a preset where the tool has a plain value, as in `checkpoint=runs/x`."""
    key = override.partition("=")[0]
    return (CONF / key).is_dir() and key in leaf_keys(cls)
