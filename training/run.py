"""The files in the directory of a run: `<root>/<name>/`, or `<root>/<sweep>/<job>/` for a job of a sweep.

This module does not import torch, so that the command line can use it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import read_file, write_atomically
from common.text import MAX_JSON, MAX_YAML, finite, flat, parse_json, parse_yaml, to_json

INTERRUPTED = "interrupted"
"""The status of a run that a signal has ended."""
RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
FORECAST_FILE = "forecast.json"
FORECAST_STEPS = 10
"""A run with fewer steps makes no forecast: it has too few steps to compare with."""


def finished_result(directory: Path, steps: int) -> dict[str, Any] | None:
    """Return the content of `result.json` if the run in `directory` has finished after at least `steps` steps, else
    None."""
    try:
        result = parse_json(read_file(directory / RESULT_FILE, MAX_JSON))
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or result.get("status") != "finished":
        return None
    step, loss = result.get("step"), result.get("eval/loss")
    if type(step) is not int or step < steps or not (loss is None or type(loss) in (int, float)):
        return None
    return finite(result)


def save_config(directory: Path, config: Mapping[str, Any]) -> Path:
    """Write a configuration of plain containers to `config.yaml` in `directory` atomically, and return the file.

    No configuration dataclass has a field for a secret: keys come from the environment, which a configuration cannot
    read (`scripts.cli.command_line.plain`).
    """
    import yaml

    return write_atomically(directory / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def save_result(directory: Path, result: Mapping[str, Any]) -> Path:
    """Write a result of plain containers to `result.json` in `directory` atomically, and return the file."""
    return write_atomically(directory / RESULT_FILE, to_json(dict(result), indent=2) + "\n")


def read_result(directory: Path) -> dict[str, Any]:
    """Return the content of `result.json`, of a run in any state.

    Without the file the result has the status `missing`, and if it is no JSON object, the status `unreadable`. Both
    have an `error`, which says why.
    """
    path = directory / RESULT_FILE
    if not path.is_file():
        return {"status": "missing", "error": f"no {path.name}"}
    try:
        result = parse_json(read_file(path, MAX_JSON))
    except (OSError, ValueError) as error:
        return {"status": "unreadable", "error": f"{path.name}: {error}"}
    return result if isinstance(result, dict) else {"status": "unreadable", "error": f"{path.name}: no JSON object"}


def read_config(directory: Path) -> dict[str, Any]:
    """Return the values of `config.yaml` by dotted key, or an empty dict if it is missing or not readable."""
    try:
        config = parse_yaml(read_file(directory / CONFIG_FILE, MAX_YAML))
    except (OSError, ValueError):
        return {}
    return dict(flat(config)) if isinstance(config, dict) else {}
