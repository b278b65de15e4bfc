"""Agreement between ranks before a process group exists: a key-value store that the launcher's address names."""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from parallel.launch import World


def open_store(world: World, timeout_s: float) -> dist.Store:
    """The store that the ranks of this launch share; a private one in a world of one."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    timeout = timedelta(seconds=timeout_s)
    store, _, _ = next(rendezvous("env://", world.rank, world.world_size, timeout=timeout))
    store.set_timeout(timeout)
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
