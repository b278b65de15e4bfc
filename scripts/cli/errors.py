"""What the user sees when something fails: one line for a mistake that can be corrected, a traceback for the rest."""

import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError
from common.strict import leaf_keys, unknown_key
from common.text import nearest, one_line
from parallel.startup.launch import WorkerFailure
from training.config import Config

PATIENCE_S = 3.0
"""Seconds that other ranks wait before they exit, so that local rank 0 can print the mistake that all of them make."""


def end(error: Exception, arguments: Sequence[str], cls: type = Config) -> NoReturn:
    """End the process: with status 2 and one line if the user can correct the mistake, else with 1 and a traceback.

    Under a launcher only local rank 0 prints the line, because every rank makes the same mistake.
    """
    message = user_message(error, arguments, cls)
    if message is None:
        print(details(error), file=sys.stderr)
        raise SystemExit(1)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    else:
        # A launcher kills the other ranks as soon as one has exited. Local rank 0 has to print first.
        time.sleep(PATIENCE_S)
    raise SystemExit(2)


def user_message(error: Exception, arguments: Sequence[str], cls: type = Config) -> str | None:
    """Return the line that tells the user what to change, or None if the user cannot correct the error.

    Args:
        arguments: the command line. It has the value of a key that Hydra refused.
        cls: the configuration dataclass that the command line is for.
    """
    if isinstance(error, WorkerFailure):
        return error.message if error.exitcode == 2 else None
    if isinstance(error, UserError):
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


def details(error: Exception) -> str:
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
