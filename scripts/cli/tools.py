"""`run_tool`: the `main` of every tool in scripts/."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser

from common.errors import ConfigError
from common.strict import from_dict, leaf_keys
from scripts.cli.errors import end
from scripts.cli.hydra import CONF, compose_config, load_named_plugins, quote, take_flag, without_local_rank

T = TypeVar("T")

COMMON_HELP = "Every tool also takes plugins=[...] (docs/extending.md) and --config-dir DIR with more presets."


def run_tool(name: str, cls: type[T], function: Callable[[T], Any], *, free_text: Sequence[str] = ()) -> NoReturn:
    """Run a tool from its command line and end the process.

    The arguments override `conf/<name>.yaml`, the result is converted to `cls`, and `function` is called with it. The
    exit status is 0, or 2 after one line about a mistake that the user can correct, or 1 after any other error.

    Every tool also takes `plugins=[...]` and `--config-dir DIR` (`COMMON_HELP`).

    Args:
        cls: the dataclass that `conf/<name>.yaml` mirrors.
        free_text: keys whose values are used exactly as they were typed. A prompt, for example, is not an expression
            of Hydra's grammar.
    """
    arguments = without_local_rank(sys.argv[1:])
    try:
        if {"-h", "--help"} & set(arguments):
            print(f"{sys.modules[cls.__module__].__doc__}\n{(CONF / f'{name}.yaml').read_text()}\n{COMMON_HELP}")
            raise SystemExit(0)
        config_dir, others = take_flag(arguments, "--config-dir")
        unwanted = next((argument for argument in others if argument.startswith("-")), None)
        if unwanted is not None:
            raise ConfigError(f"{unwanted}: expected key=value, or --help for the keys")
        overrides = [_in_grammar(argument, free_text) for argument in others]
        values = [override for override in overrides if _is_value_named_like_a_group(override, cls)]
        raw = compose_config(name, [override for override in overrides if override not in values], config_dir)
        for override in OverridesParser.create().parse_overrides(values):
            raw[override.key_or_group] = override.value()
        load_named_plugins(raw)
        function(from_dict(cls, {key: value for key, value in raw.items() if key != "plugins"}))
    except Exception as error:
        end(error, arguments, cls)
    raise SystemExit(0)


def _is_value_named_like_a_group(override: str, cls: type) -> bool:
    """Whether Hydra would look for a preset where the tool has a plain value, as in `checkpoint=runs/x`."""
    key = override.partition("=")[0]
    return (CONF / key).is_dir() and key in leaf_keys(cls)


def _in_grammar(argument: str, free_text: Sequence[str]) -> str:
    """The argument as an override of Hydra's: free text is quoted, and `plugins` is added, which no tool's YAML has."""
    key, _, value = argument.partition("=")
    if key in free_text:
        return f"{key}={quote(value)}"
    return f"++{argument}" if key == "plugins" else argument
