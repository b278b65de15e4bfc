"""Layouts to compare with one process: which there are in a world of some size, and how one writes them.

A layout is written `tensor=2+expert=4`: keys of `parallel` and their values, joined by `+` (numbers of `stage_layers`
by `:`). What it does not name is 1, and `replicate` takes the ranks that are left.
"""

from common.errors import ConfigError
from common.strict import from_dict
from parallel.config import ParallelConfig

AXES = ("replicate", "shard", "expert", "expert_tensor", "tensor", "context", "pipeline")


def layouts_for(world_size: int) -> dict[str, list[str]]:
    """Groups of layouts; each fits some model in a world of this size, as far as the number of ranks goes.

    `single`: every axis alone, at every size. `pairs`: every sensible two. `triples`: of the main three. `schedules`:
    of pipelines, and stages of several lengths. `memory`: what is computed again or kept elsewhere, with each axis.
    """
    sizes = [size for size in range(2, world_size + 1) if world_size % size == 0]
    groups = {
        "single": ["replicate=" + str(world_size)]
        + [f"{axis}={size}" for axis in AXES if axis != "replicate" for size in sizes],
        "pairs": [],
        "triples": [],
        "schedules": [],
        "memory": [],
    }
    if not sizes:
        return groups
    a = sizes[0]
    b = _smallest_factor(world_size // a)
    c = _smallest_factor(world_size // (a * b)) if b > 1 else 1
    # Experts may lie on the very ranks that another axis uses, and on more.
    folded = [f"{axis}={a}+expert={size}" for axis in ("tensor", "context", "shard") for size in (a, a * b)]
    groups["pairs"] = list(dict.fromkeys(folded))
    groups["pairs"] += [f"{axis}={a}+expert_tensor={a}" for axis in ("tensor", "context", "shard")]
    groups["schedules"] = [f"pipeline={a}+schedule={name}" for name in ("interleaved", "zero_bubble")]
    if a == 2:
        groups["schedules"].append("pipeline=2+stage_layers=1:3")
    groups["memory"] = [f"{axis}={a}+recompute=full" for axis in AXES[1:]]
    groups["memory"] += [f"{axis}={a}+recompute=selective" for axis in ("expert", "expert_tensor", "shard")]
    groups["memory"] += [f"shard={a}+offload=true", f"shard={a}+expert={a}+offload=true"]
    if b == 1:
        return groups
    groups["pairs"] += [f"expert={a}+expert_tensor={b}"]
    groups["pairs"] += [
        f"pipeline={a}+{axis}={b}" for axis in ("shard", "expert", "expert_tensor", "tensor", "context")
    ]
    groups["pairs"] += [f"tensor={a}+context={b}", f"shard={a}+tensor={b}", f"shard={a}+context={b}"]
    groups["pairs"] += [f"replicate={world_size // a}+shard={a}"]
    groups["schedules"] += [
        f"pipeline={a}+{axis}={b}+schedule={name}"
        for axis, name in (("expert", "zero_bubble"), ("shard", "interleaved"), ("tensor", "zero_bubble"))
    ]
    if c == 1:
        return groups
    for three in (
        "shard={}+context={}+tensor={}",
        "pipeline={}+context={}+tensor={}",
        "pipeline={}+shard={}+tensor={}",
        "pipeline={}+shard={}+context={}",
    ):
        named = three.format(a, b, c)
        stage = a * b * c if "pipeline" not in three else b * c
        groups["triples"] += [named, f"{named}+expert={stage}"]
    groups["triples"] += [
        f"shard={a}+expert={b}+expert_tensor={c}",
        f"tensor={a}+expert={b}+expert_tensor={c}",
        f"pipeline={a}+expert={b}+expert_tensor={c}",
        f"pipeline={a}+tensor={b}+expert={b * c}+schedule=zero_bubble",
        f"pipeline={a}+shard={b}+expert={b * c}+schedule=interleaved+recompute=full",
        f"shard={a * b}+expert={c}",
        f"shard={a}+tensor={b}+expert={a * b * c}+recompute=full",
    ]
    return groups


def parse_layout(text: str) -> ParallelConfig:
    """`tensor=2+expert=4` as a configuration.

    Raises:
        ConfigError: an unknown key, or a value that it cannot have.
    """
    values: dict[str, object] = {"expert": 1}
    for item in text.split("+"):
        key, _, value = item.partition("=")
        if key == "stage_layers":
            values[key] = [int(number) if number.isdecimal() else number for number in value.split(":")]
        else:
            values[key] = int(value) if value.isdecimal() else value == "true" if value in ("true", "false") else value
    return from_dict(ParallelConfig, values, "parallel")


def chosen(selection: str, world_size: int) -> list[str]:
    """The layouts that `layouts=<selection>` means: `all`, groups, axes and single layouts, separated by commas.

    An axis stands for the layouts of all groups that name it, a single layout for itself.

    Raises:
        ConfigError: a word that stands for nothing, or a layout that cannot be read.
    """
    groups = layouts_for(world_size)
    everything = list(dict.fromkeys(name for names in groups.values() for name in names))
    found: dict[str, None] = {}
    for word in selection.split(","):
        if "=" in word:
            parse_layout(word)
            found[word] = None
        elif word == "all":
            found |= dict.fromkeys(everything)
        elif word in groups:
            found |= dict.fromkeys(groups[word])
        elif word in AXES:
            found |= dict.fromkeys(name for name in everything if f"+{word}=" in f"+{name}")
        else:
            words = ", ".join(("all", *groups, *AXES))
            raise ConfigError(f"layouts={word}: expected one of {words}, or a layout like tensor=2+expert=4")
    return list(found)


def _smallest_factor(number: int) -> int:
    return next((size for size in range(2, number + 1) if number % size == 0), 1)
