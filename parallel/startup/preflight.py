"""Do all ranks run the same thing? Found out through the launcher's key-value store, before any collective could hang.

Every rank publishes a hash of its facts: versions, source files, configuration, device. Rank 0 compares the hashes and
publishes one verdict. Only where they differ does one rank send its facts in full, to name the first that differs.
A rank sends and receives a handful of small messages, rank 0 one more per rank: nothing grows with ranks squared.
"""

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import PreflightError
from parallel.startup.launch import World

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "train.py",
    *(f"{package}/**/*.py" for package in ("common", "data", "moe", "parallel", "scripts", "training")),
)
LIBRARIES = ("torch", "numpy")
"""What computes the numbers: arithmetic and collectives, and the order of the data."""
MAY_DIFFER = {
    "launch": "read only where `python train.py` starts the workers itself, and those share one configuration",
    "data.cache": "may be a disk of the node; that the tokens in it are the same is checked by their hash",
    "data.paths": "the text may lie elsewhere on another node; the same hash of the tokens covers it",
    "data.tokenizer": "as the text: its content is part of that hash",
    "plugins": "paths, which may differ between nodes; the SHA-256 of each plugin's content is a fact of its own",
}
"""Keys (or whole sections) of the configuration that may differ between nodes, and why. `run.root` and `run.init_from`
are not among them: all ranks write to, or read from, what rank 0 found there."""
GRACE_S = 10.0
"""How long ranks wait for each other to take note of a refusal, and for rank 0 once it is known to be there."""


def check_ranks_agree(store: dist.Store, world: World, facts: Mapping[str, Any], timeout_s: float) -> None:
    """Return when all ranks of the world have come here with equal facts; else raise on every rank that came.

    Args:
        store: shared by the ranks of this attempt (`parallel.startup.rendezvous.open_store`).
        facts: flat; values can be written as JSON. The order of rank 0's decides which difference is named.
        timeout_s: how long rank 0 waits for the others, and they for rank 0.

    Raises:
        PreflightError: names the first key that differs, its value there and on rank 0; or the ranks that did not come.
    """
    if world.world_size == 1:
        return
    store = dist.PrefixStore("agreement", store)
    judge = _lead if world.rank == 0 else _follow
    try:
        refusal = judge(store, world, facts, timeout_s)
    except dist.DistError as error:
        raise PreflightError(
            "a rank ended while the ranks compared how they were started: its own output says why"
        ) from error
    if refusal:
        raise PreflightError(refusal)


def collect_facts(
    config: Mapping[str, Any], device: str, precision: str, libraries: Sequence[str] = ()
) -> dict[str, Any]:
    """What all ranks must have in common, the likeliest cause first: other files may mean other keys below them.

    Args:
        config: the whole configuration as nested dicts.
        device, precision: what `auto` became on this machine. A node without its driver would otherwise meet the
            others' NCCL with gloo, and another arithmetic would be summed with theirs, unnoticed.
        libraries: installed packages beside `LIBRARIES` that compute here (an engine's).
    """
    python = ".".join(platform.python_version_tuple()[:2])
    versions = {name: metadata.version(name) for name in (*LIBRARIES, *libraries)}
    sections = {
        key: value
        for key, value in flatten(config).items()
        if not any(f"{key}.".startswith(f"{free}.") for free in MAY_DIFFER)
    }
    machine = {"device": device, "precision": precision}
    return {"python": python} | versions | flatten({"code": source_hashes()}) | sections | machine


def source_hashes(root: Path = ROOT) -> dict[str, str]:
    """Our own Python files below `root`, by relative path: the first 12 hexadecimal digits of their SHA-256."""
    files = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _lead(store: dist.Store, world: World, facts: Mapping[str, Any], timeout_s: float) -> str:
    """Rank 0: collect, judge, and leave only when the others know, since it may host the store."""
    store.set(_key(0), _digest(facts))
    others = range(1, world.world_size)
    all_came = _count_up_to(store, "come", len(others), timeout_s)
    absent = [] if all_came else [rank for rank in others if not store.check([_key(rank)])]
    refusal = _absent(absent, timeout_s) if absent else ""
    if not absent:
        digests = [digest.decode() for digest in store.multi_get([_key(rank) for rank in range(world.world_size)])]
        odd = next((rank for rank in others if digests[rank] != digests[0]), None)
        if odd is not None:
            store.set("verdict", json.dumps({"show": odd}))
            theirs = json.loads(_get(store, "facts", timeout_s))
            refusal = _difference(dict(facts), theirs, [rank for rank in others if digests[rank] == digests[odd]])
            store.set("refusal", refusal)
    if not store.check(["verdict"]):  # else it says who shows, and "refusal" has the line
        store.set("verdict", json.dumps({"refusal": refusal}))
    _count_up_to(store, "known", len(others) - len(absent), GRACE_S)
    store.set("end", "")
    return refusal


def _follow(store: dist.Store, world: World, facts: Mapping[str, Any], timeout_s: float) -> str:
    store.set(_key(world.rank), _digest(facts))
    store.add("come", 1)
    try:
        _get(store, _key(0), timeout_s)
    except dist.DistStoreError:
        return _absent([0], timeout_s)
    verdict = json.loads(_get(store, "verdict", timeout_s + GRACE_S))
    if verdict.get("show") == world.rank:
        store.set("facts", json.dumps(facts))
    refusal = verdict["refusal"] if "refusal" in verdict else _get(store, "refusal", timeout_s + GRACE_S).decode()
    store.add("known", 1)
    if refusal:
        # All ranks end together: a launcher kills those of its node that are left, and one of them has to print.
        with contextlib.suppress(dist.DistError):
            store.wait(["end"], timedelta(seconds=GRACE_S))
    return str(refusal)


def _difference(here: dict[str, Any], there: dict[str, Any], ranks: Sequence[int]) -> str:
    """One line about the first key that differs; `here` is rank 0's, `there` that of all of `ranks`."""
    key = next(key for key in here | there if _json(here, key) != _json(there, key))
    ours, theirs = (_shown(facts[key]) if key in facts else "(absent)" for facts in (here, there))
    if ours == theirs:  # 1 and "1"
        ours, theirs = _json(here, key), _json(there, key)
    if key.startswith("code."):
        why = "every node needs the same source files"
    elif "." in key:
        why = "every rank needs the same command line"
    else:
        why = "every node needs the same software and kind of device"
    return f"{key}={theirs} on {_ranks(ranks)}: expected {ours} as on rank 0 ({why})"


def _absent(ranks: Sequence[int], timeout_s: float) -> str:
    return f"{_ranks(ranks)} did not start within {timeout_s:g} s (parallel.start_timeout_s)"


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 1, 8-15`."""
    # within a run of neighbours, rank minus position is constant
    position = count()
    runs = [list(run) for _, run in groupby(ranks, lambda rank: rank - next(position))]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _shown(value: Any) -> str:
    """The value as one writes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _json(facts: Mapping[str, Any], key: str) -> str:
    return json.dumps(facts[key], sort_keys=True) if key in facts else ""


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _key(rank: int) -> str:
    return f"rank-{rank}"


def _get(store: dist.Store, key: str, timeout_s: float) -> bytes:
    store.wait([key], timedelta(seconds=timeout_s))
    value: bytes = store.get(key)
    return value


def _count_up_to(store: dist.Store, key: str, wanted: int, timeout_s: float) -> bool:
    """Whether the counter reached `wanted` in time. Asked for again and again: a blocking wait of torch's prints
    warnings of its own when it runs out."""
    end = time.monotonic() + timeout_s
    while store.add(key, 0) < wanted:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
