"""`train.py --help`: the groups with their presets, and every key with its value and the first sentence about it."""

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from common.strict import describe_type, leaf_hints
from common.text import flat, one_line, show_value

USAGE = """\
python train.py [<group>=<preset> ...] [<key>=<value> ...] [flags]

flags:
  -m, --multirun      train every combination of values: optim.lr=1e-3,3e-3
  --config-dir DIR    a directory with more presets
  --cfg job           print the whole configuration, and do not train
  --hydra-help        the other flags, which are Hydra's
  +<key>=<value>      a key that the chosen presets do not have
"""

OF_TOOLS = {"gpu"}
"""The groups of presets that `train.py` does not have."""


def train_help(config: type, raw: Mapping[str, Any], directories: Sequence[Path]) -> str:
    """Return the help text of `train.py`.

    Args:
        config: the dataclass of the whole configuration.
        raw: the composed configuration, whose values are shown.
        directories: the directories of the presets.
    """
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    lines = [USAGE, "presets, each a file conf/<group>/<preset>.yaml:"]
    groups = {path.name for directory in directories for path in directory.iterdir() if path.is_dir()} - OF_TOOLS
    for group in sorted(groups):
        presets = sorted({path.stem for directory in directories for path in directory.glob(f"{group}/*.yaml")})
        lines += textwrap.wrap(f"  {group + '=':<18}{', '.join(presets)}", width, subsequent_indent=" " * 20)
    lines += ["", "keys, with the values of this command line (a key without a value: other presets have it):"]
    for key, doc in _keys(config, raw):
        start = f"  {key:<38}" if key else "\n "
        lines.append(f"{start} {textwrap.shorten(doc, max(20, width - len(start) - 1), placeholder=' ...')}".rstrip())
    return "\n".join(lines)


def field_docs(cls: type) -> dict[str, str]:
    """Return the first sentence of the docstring after each field of a dataclass, and of the sections that can be the
    value of a field."""
    docs: dict[str, str] = {}
    for parent in reversed([each for each in cls.__mro__ if dataclasses.is_dataclass(each)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body  # type: ignore[attr-defined]
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(field.target, ast.Name):
                docs[field.target.id] = first_sentence(ast.literal_eval(after.value))
    for name, hint in get_type_hints(cls).items():
        for section in get_args(hint):
            if dataclasses.is_dataclass(section):
                docs |= {f"{name}.{key}": doc for key, doc in field_docs(cast(type, section)).items()}
    return docs


def first_sentence(text: str) -> str:
    """`text` up to its first full stop before a space and a capital letter, on one line.

    >>> first_sentence("Steps, e.g. ten. More\\n text.")
    'Steps, e.g. ten'
    """
    return re.split(r"\.(?:\s+(?=[A-Z`])|$)", one_line(text))[0]


def _keys(config: type, raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key=value, first sentence) for every key, and ("", first sentence) before each section."""
    hints, docs = get_type_hints(config), field_docs(config)
    for name, hint in hints.items():
        if not isinstance(hint, type) or not dataclasses.is_dataclass(hint):
            yield f"{name}={show_value(raw.get(name))}", docs.get(name, "")
            continue
        values = raw.get(name) or {}
        # The subclass of a plugin, if the section chooses one.
        section: type = hint.class_for(values) if hasattr(hint, "class_for") else hint
        yield "", f"{name}: {first_sentence(inspect.getdoc(section) or '')}"
        section_docs, values = field_docs(section), dict(flat(values))
        for key, annotation in leaf_hints(section):
            shown = f"={show_value(values[key])}" if key in values else ""
            yield f"{name}.{key}{shown}", section_docs.get(key) or describe_type(annotation)
