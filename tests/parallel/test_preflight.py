"""Ranks that were started differently report one line, the same on every rank, and no rank waits for ever."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from common.errors import PreflightError
from common.strict import leaf_keys
from parallel.startup.launch import World
from parallel.startup.preflight import MAY_DIFFER, check_ranks_agree, collect_properties, flatten, source_hashes
from training.config import Config

PROPERTIES = {
    "python": "3.11",
    "torch": "2.13.0",
    "code.moe/layer.py": "aa",
    "train.global_batch": 16,
    "train.lr": None,
}


def verdicts(store_of, properties: dict[int, dict], world_size: int, timeout_s: float = 20) -> dict[int, str]:
    """The message that each rank in `properties` gets, or "" if all ranks agree. Each rank runs in its own thread."""
    messages: dict[int, str] = {}

    def rank_main(rank: int) -> None:
        try:
            check_ranks_agree(store_of(rank), World(rank, 0, world_size, 1), properties[rank], timeout_s)
            messages[rank] = ""
        except PreflightError as error:
            messages[rank] = str(error)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in properties]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert messages.keys() == properties.keys()
    return messages


def in_memory(properties: dict[int, dict], world_size: int, timeout_s: float = 20) -> set[str]:
    store = dist.HashStore()
    return set(verdicts(lambda rank: store, properties, world_size, timeout_s).values())


def test_equal_properties_pass_in_any_order_of_keys():
    reordered = dict(reversed(PROPERTIES.items()))
    assert in_memory({0: PROPERTIES, 1: reordered, 2: PROPERTIES}, 3) == {""}
    check_ranks_agree(dist.HashStore(), World(), PROPERTIES, 0)


@pytest.mark.parametrize(
    ("others", "line"),
    [
        (
            {1: {"train.global_batch": 8}},
            "train.global_batch=8 on rank 1: expected 16 as on rank 0 (every rank needs the same command line)",
        ),
        (
            {2: {"torch": "2.12.0", "train.global_batch": 8}},
            "torch=2.12.0 on rank 2: expected 2.13.0 as on rank 0 "
            "(every node needs the same software and kind of device)",
        ),
        (
            {1: {"code.moe/layer.py": "bb"}, 3: {"code.moe/layer.py": "bb"}, 4: {"code.moe/layer.py": "bb"}},
            "code.moe/layer.py=bb on ranks 1,3-4: expected aa as on rank 0 (every node needs the same source files)",
        ),
        (
            {2: {"plugins.my_router.py": "bb"}},
            "plugins.my_router.py=bb on rank 2: expected (absent) as on rank 0 "
            "(every rank needs the same plugins, with the same content)",
        ),
        (
            {2: {"train.lr": 1}, 4: {"torch": "2.12.0"}},
            "train.lr=1 on rank 2: expected null as on rank 0 (every rank needs the same command line)",
        ),
        (
            {4: {"train.new": "x"}},
            "train.new=x on rank 4: expected (absent) as on rank 0 (every rank needs the same command line)",
        ),
        (
            {3: {"train.global_batch": "16"}},
            'train.global_batch="16" on rank 3: expected 16 as on rank 0 (every rank needs the same command line)',
        ),
    ],
)
def test_every_rank_names_the_first_difference(others: dict[int, dict], line: str):
    properties = {rank: PROPERTIES | others.get(rank, {}) for rank in range(5)}
    assert in_memory(properties, 5) == {line}


def test_missing_ranks_are_named():
    missing = "did not start within 0.3 s (parallel.start_timeout_s)"
    began = time.monotonic()
    assert in_memory({0: PROPERTIES, 2: PROPERTIES}, 3, 0.3) == {f"rank 1 {missing}"}
    assert in_memory({0: PROPERTIES, 3: PROPERTIES}, 5, 0.3) == {f"ranks 1-2,4 {missing}"}
    assert in_memory({1: PROPERTIES, 2: PROPERTIES}, 3, 0.3) == {f"rank 0 {missing}"}
    assert time.monotonic() - began < 5


def test_over_sockets_each_rank_with_its_own_connection():
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def connect(rank: int) -> dist.Store:
        return dist.TCPStore("localhost", server.port, timeout=timedelta(seconds=20))

    assert set(verdicts(connect, dict.fromkeys(range(4), PROPERTIES), 4).values()) == {""}
    # The next attempt has another prefix, so it does not read the messages of this one.
    properties = {rank: PROPERTIES | ({"torch": "2.11.0"} if rank >= 2 else {}) for rank in range(4)}
    messages = verdicts(lambda rank: dist.PrefixStore("attempt-1", connect(rank)), properties, 4)
    assert len(set(messages.values())) == 1 and messages[0].startswith(
        "torch=2.11.0 on ranks 2-3: expected 2.13.0 as on"
    )


def test_properties_leave_out_what_may_differ_and_contain_resolved_values(tmp_path: Path):
    sections = {"data": {"cache": "here", "paths": ["a"], "kind": "files"}, "launch": {"nproc": 2}, "optim": {"lr": 1}}
    properties = collect_properties(sections, device="cpu", precision="torch.bfloat16")
    assert (
        properties.items()
        >= {"data.kind": "files", "optim.lr": 1, "device": "cpu", "precision": "torch.bfloat16"}.items()
    )
    assert list(properties)[:3] == ["python", "torch", "numpy"] and "deepspeed" not in properties
    assert not properties.keys() & {"data.cache", "data.paths", "launch.nproc"}
    assert {"code.train.py", "code.moe/layer.py", "code.scripts/cli/command_line.py"} <= properties.keys()
    assert not any(key.startswith("code.tests") for key in properties)
    keys = {*leaf_keys(Config), *(key.split(".")[0] for key in leaf_keys(Config))}
    assert keys >= MAY_DIFFER.keys()

    (tmp_path / "moe" / "inner").mkdir(parents=True)
    for name in ("train.py", "moe/a.py", "moe/inner/b.py", "moe/notes.txt"):
        (tmp_path / name).write_text("x = 1\n")
    before = source_hashes(tmp_path)
    assert set(before) == {"train.py", "moe/a.py", "moe/inner/b.py"}
    (tmp_path / "moe" / "inner" / "b.py").write_text("x = 2\n")
    after = source_hashes(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"moe/inner/b.py"}
    assert flatten({"a": {"b": {"c": [1, {"d": 2}]}}, "e": 3}) == {"a.b.c": [1, {"d": 2}], "e": 3}


SCRIPT = """
import sys
from parallel.startup.preflight import check_ranks_agree, collect_properties
from common.errors import PreflightError
from parallel.startup.launch import world_from_env
from parallel.startup.rendezvous import open_store

world = world_from_env()
config = {"train": dict(argument.split("=") for argument in sys.argv[1:])}
try:
    check_ranks_agree(open_store(world, 30), world, collect_properties(config, "cpu", "fp32"), 30)
except PreflightError as error:
    print(error, file=sys.stderr)
    raise SystemExit(2)
"""


@pytest.mark.parametrize(
    ("argument", "status", "line"),
    [
        pytest.param("steps=3", 0, "", marks=pytest.mark.slow),
        ("steps=4", 2, "train.steps=4 on rank 1: expected 3 as on rank 0 (every rank needs the same command line)\n"),
    ],
)
def test_processes_started_by_hand_with_other_arguments(argument: str, status: int, line: str):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, given in enumerate(("steps=3", argument)):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in (place | address).items()}
        ranks.append(
            subprocess.Popen([sys.executable, "-c", SCRIPT, given], env=environment, text=True, stderr=subprocess.PIPE)
        )
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in ranks]
    assert ended == [(line, status)] * 2
