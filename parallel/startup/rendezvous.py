"""Agreement between ranks before a process group exists: a key-value store that the launcher's address names."""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from common.errors import PreflightError
from parallel.startup.launch import World

PORT_TIMEOUT_S = 20.0
"""Seconds that rank 0 waits for a port that the launcher found free and somebody else has taken since."""


def open_store(world: World, timeout_s: float) -> dist.Store:
    """The store that the ranks of this launch share; a private one in a world of one.

    It does not wait for the other ranks: `check_ranks_agree` does, and can say which one is missing.

    Raises:
        PreflightError: nobody serves the store at the launcher's address.
    """
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent serves it, unless told not to
    serves = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    deadline = time.monotonic() + min(timeout_s, PORT_TIMEOUT_S)
    while True:
        try:
            store = dist.TCPStore(address, port, None, serves, timeout, wait_for_workers=False, multi_tenant=True)
            break
        except dist.DistNetworkError as error:
            if not serves:
                raise PreflightError(
                    f"rank 0 did not start within {timeout_s:g} s at {address}:{port} (parallel.start_timeout_s)"
                ) from error
            # The launcher found the port free; somebody may have taken it since, and give it back.
            if time.monotonic() > deadline:
                raise PreflightError(f"MASTER_PORT={port}: expected a port that is free on this host") from error
            time.sleep(0.5)
    # torchrun's own store outlives a restart of its workers, and so would what they told each other before.
    return dist.PrefixStore(f"attempt-{world.restart_count}", store)


def share(store: dist.Store, world: World, key: str, choose: Callable[[], Any]) -> Any:
    """What `choose()` returns on rank 0 (JSON-able), on every rank. Other ranks wait; they never call it."""
    if world.rank == 0:
        value = choose()
        store.set(key, json.dumps(value))
        return value
    return json.loads(store.get(key))


def wait_for_all(store: dist.Store, world: World, key: str) -> None:
    """Rank 0, which may be the one that hosts the store, leaves only after every rank has come here."""
    arrived = store.add(key, 1)
    while world.rank == 0 and arrived < world.world_size:
        time.sleep(0.05)
        arrived = store.add(key, 0)
