"""Checks that all ranks run the same thing, through the launcher's key-value store, before a collective could hang.

Every rank publishes a hash of its properties: versions, source files, configuration, device. Rank 0 compares the hashes
and publishes a verdict. If hashes differ, one rank with another hash publishes its properties in full, so that rank 0
can name the first one that differs. Each rank exchanges a constant number of small messages with the store, and rank 0
one more per rank.
"""

import contextlib
import hashlib
import platform
import time
from collections.abc import Container, Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.errors import PreflightError
from common.text import parse_json, show_ranges, to_json
from parallel.startup.launch import World

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "train.py",
    *(f"{package}/**/*.py" for package in ("common", "data", "moe", "parallel", "scripts", "training")),
)
"""Source files, below `ROOT`, that must be the same on all nodes."""
LIBRARIES = ("torch", "numpy")
"""Libraries that must have the same version on all nodes: arithmetic and collectives, and the order of the data."""
MAY_DIFFER = {
    "launch": "the number of processes and threads of one node; nodes can have different numbers of cores",
    "data.cache": "may be a disk of the node; a hash checks that the tokens in it are the same",
    "data.paths": "the text may be at another path on another node; the hash of the tokens covers it",
    "data.tokenizer": "may be at another path, like the text; its content is part of that hash",
    "plugins": "may be at other paths on another node; the SHA-256 of each plugin is compared",
}
"""Keys and sections of the configuration that may differ between nodes, with the reason. `run.root` and `run.init_from`
must not: all ranks write to, or read from, the path that rank 0 has checked."""
GRACE_S = 10.0
"""Seconds that the ranks wait until all of them have read the verdict. The other ranks also wait this much longer than
`timeout_s` for the verdict, because rank 0 may wait for missing ranks in between."""


def check_ranks_agree(store: dist.Store, world: World, properties: Mapping[str, Any], timeout_s: float) -> None:
    """Return when all ranks have called this function with equal properties. Otherwise raise, on every rank that has.

    Args:
        store: shared by the ranks of this attempt (`parallel.startup.rendezvous.open_store`).
        properties: dotted key -> a value that can be written as JSON. The first key, in the order of rank 0, that
            differs is named in the error.
        timeout_s: how long rank 0 waits for the other ranks, and they for rank 0.

    Raises:
        PreflightError: names the first key that differs, with its values on a rank and on rank 0, or the ranks that
            did not call this function in time.
    """
    if world.world_size == 1:
        return
    store = dist.PrefixStore("agreement", store)
    agree = _compare_ranks if world.rank == 0 else _await_verdict
    try:
        refusal = agree(store, world, properties, timeout_s)
    except dist.DistError as error:
        raise PreflightError(
            "a rank ended while the ranks compared how they were started: see the output of that rank"
        ) from error
    if refusal:
        raise PreflightError(refusal)


def collect_properties(
    config: Mapping[str, Any], device: str, precision: str, libraries: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the properties that must be equal on all ranks.

    The likeliest cause of a difference comes first: other source files can have other configuration keys.

    Args:
        config: the whole configuration as nested dicts.
        device, precision: the values that `auto` resolved to on this machine. A node without its GPU driver would
            otherwise use gloo where the others use NCCL, and sum its gradients of another precision with theirs.
        libraries: installed packages besides `LIBRARIES` that this run computes with (those of an engine).
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
    """Map each of Mixwright's source files to the first 12 hexadecimal digits of its SHA-256.

    The keys are paths relative to `root`.
    """
    files = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def flatten(tree: Mapping[str, Any], whole: Container[str] = (), prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys. Lists stay values.

    Args:
        whole: dotted keys whose values stay as they are, although they are mappings.

    >>> flatten({"train": {"steps": 3}, "seed": 0})
    {'train.steps': 3, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, whole, f"{key}.") if isinstance(value, Mapping) and key not in whole else {key: value}
    return flat


def _compare_ranks(store: dist.Store, world: World, properties: Mapping[str, Any], timeout_s: float) -> str:
    """Rank 0: collect the hashes, compare them, and publish the verdict. Return the reason to refuse, or "".

    Rank 0 may host the store, so it returns after the other ranks have read the verdict.
    """
    store.set(_key(0), _digest(properties))
    others = range(1, world.world_size)
    all_arrived = _count_up_to(store, "arrived", len(others), timeout_s)
    absent = [] if all_arrived else [rank for rank in others if not store.check([_key(rank)])]
    refusal = _describe_absent(absent, timeout_s) if absent else ""
    if not absent:
        digests = [digest.decode() for digest in store.multi_get([_key(rank) for rank in range(world.world_size)])]
        differing = next((rank for rank in others if digests[rank] != digests[0]), None)
        if differing is not None:
            store.set("verdict", to_json({"show": differing}))
            found = parse_json(_get(store, "properties", timeout_s))
            ranks = [rank for rank in others if digests[rank] == digests[differing]]
            refusal = _describe_difference(dict(properties), found, ranks)
            store.set("refusal", refusal)
    if not store.check(["verdict"]):  # a verdict with "show" is already there, and "refusal" has its line
        store.set("verdict", to_json({"refusal": refusal}))
    _count_up_to(store, "informed", len(others) - len(absent), GRACE_S)
    store.set("end", "")
    return refusal


def _await_verdict(store: dist.Store, world: World, properties: Mapping[str, Any], timeout_s: float) -> str:
    """The other ranks: publish the hash, and wait for rank 0's verdict. Return the reason to refuse, or ""."""
    store.set(_key(world.rank), _digest(properties))
    store.add("arrived", 1)
    try:
        _get(store, _key(0), timeout_s)
    except dist.DistStoreError:
        return _describe_absent([0], timeout_s)
    verdict = parse_json(_get(store, "verdict", timeout_s + GRACE_S))
    if verdict.get("show") == world.rank:
        store.set("properties", to_json(properties))
    refusal = verdict["refusal"] if "refusal" in verdict else _get(store, "refusal", timeout_s + GRACE_S).decode()
    store.add("informed", 1)
    if refusal:
        # All ranks end together: when one process ends, a launcher kills the others of its node, and with them the one
        # that prints the message.
        with contextlib.suppress(dist.DistError):
            store.wait(["end"], timedelta(seconds=GRACE_S))
    return str(refusal)


def _describe_difference(expected: dict[str, Any], found: dict[str, Any], ranks: Sequence[int]) -> str:
    """Name the first key that differs between rank 0 (`expected`) and all of `ranks` (`found`)."""
    key = next(key for key in expected | found if _json(expected, key) != _json(found, key))
    shown_expected, shown_found = (
        _show(properties[key]) if key in properties else "(absent)" for properties in (expected, found)
    )
    if shown_expected == shown_found:  # as for 1 and "1"
        shown_expected, shown_found = _json(expected, key), _json(found, key)
    reasons = {
        "code.": "every node needs the same source files",
        "plugins.": "every rank needs the same plugins, with the same content",
        "": "every node needs the same software and kind of device",
    }
    section = "".join(key.partition(".")[:2]) if "." in key else ""
    why = reasons.get(section, "every rank needs the same command line")
    return f"{key}={shown_found} on {_show_ranks(ranks)}: expected {shown_expected} as on rank 0 ({why})"


def _describe_absent(ranks: Sequence[int], timeout_s: float) -> str:
    return f"{_show_ranks(ranks)} did not start within {timeout_s:g} s (parallel.start_timeout_s)"


def _show_ranks(ranks: Sequence[int]) -> str:
    """Return the ranks as `rank 3` or `ranks 1,8-15`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {show_ranges(ranks)}"


def _show(value: Any) -> str:
    """Return the value as a user writes it on the command line."""
    return value if isinstance(value, str) else to_json(value)


def _json(properties: Mapping[str, Any], key: str) -> str:
    return to_json(properties[key], sort_keys=True) if key in properties else ""


def _digest(properties: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(properties, sort_keys=True).encode()).hexdigest()


def _key(rank: int) -> str:
    return f"rank-{rank}"


def _get(store: dist.Store, key: str, timeout_s: float) -> bytes:
    store.wait([key], timedelta(seconds=timeout_s))
    return store.get(key)


def _count_up_to(store: dist.Store, key: str, target: int, timeout_s: float) -> bool:
    """Return whether the counter `key` reaches `target` in time.

    The counter is polled, because torch's blocking wait prints warnings when it times out.
    """
    end = time.monotonic() + timeout_s
    while store.add(key, 0) < target:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
