"""Loading a user's own modules, named by `plugins=[my_router.py]`.

A plugin is a Python module that registers implementations when it is imported: `moe.router.ROUTERS.register` and the
other registries that docs/extending.md lists. Importing runs its code. Plugins are therefore taken from the command
line and from the user's own configuration files only, and never from what a run directory or a checkpoint names.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from common.errors import ConfigError
from common.files import sha256_of
from common.text import first_line

ENTRY_POINTS = "mixwright.plugins"
"""The entry point group in which an installed package can name its plugins."""

_loaded: dict[str, tuple[str, str]] = {}
"""What the user gave -> the plugin's name and the SHA-256 of its file."""


def load_plugins(plugins: Sequence[str]) -> None:
    """Import each plugin once in this process.

    Args:
        plugins: each the path of a `.py` file, the name of an entry point in `mixwright.plugins`, or the dotted name
            of an importable module.

    Raises:
        ConfigError: a plugin cannot be found, or its import fails.
    """
    for given in plugins:
        if given in _loaded:
            continue
        path = Path(given)
        try:
            module = _import_file(path) if given.endswith(".py") else _import_name(given)
        except (Exception, SystemExit) as error:  # A plugin is the user's code and can raise anything.
            raise ConfigError(f"plugins={given}: expected a module that can be imported ({_reason(error)})") from error
        file = Path(module.__file__ or "")
        _loaded[given] = (plugin_name(given), sha256_of(file) if file.is_file() else "")


def plugin_name(given: str) -> str:
    """The name that runs and checkpoints record for a plugin: a file's name is without its directory."""
    return Path(given).name if given.endswith(".py") else given


def given_plugins() -> tuple[str, ...]:
    """What `load_plugins` was given in this process, in the order of loading. A worker process has to load the same."""
    return tuple(_loaded)


def loaded_plugins() -> dict[str, str]:
    """Name -> SHA-256 of the file, for every plugin that this process has loaded. A file's name is without its path."""
    return dict(_loaded.values())


def missing_plugins(recorded: Mapping[str, str]) -> str:
    """A phrase that asks for the plugins in `recorded` that this process has not loaded; empty if there are none.

    Args:
        recorded: name -> SHA-256, as `loaded_plugins` gave them when a run was written.
    """
    missing = [name for name in recorded if name not in loaded_plugins()]
    return f"it was written with plugins=[{','.join(missing)}]: name them again on the command line" if missing else ""


def changed_plugins(recorded: Mapping[str, str]) -> list[str]:
    """Names of loaded plugins whose content is not the one in `recorded`."""
    now = loaded_plugins()
    return [name for name, digest in recorded.items() if now.get(name, digest) != digest]


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"mixwright_plugin_{path.stem}"
    if name in sys.modules:
        raise ImportError(f"another plugin is named {path.name}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look the module up by its name while it runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_name(name: str) -> ModuleType:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        return importlib.import_module(entry.module)
    return importlib.import_module(name)


def _reason(error: BaseException) -> str:
    """The error's first line, and the plugin's line that led to it, even if a library raised the error."""
    # The first frames are those of this file and of Python's import system.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    place = f" in {Path(frames[0].filename).name}, line {lines[-1]}" if frames else ""
    return f"{first_line(error)}{place}"
