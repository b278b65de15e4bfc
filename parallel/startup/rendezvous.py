"""The key-value store that ranks share before a process group exists, at the address that the launcher sets."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from common.errors import ConfigError, PreflightError, require
from common.text import parse_json, to_json
from parallel.startup.launch import World

PORT_TIMEOUT_S = 20.0
"""Seconds that rank 0 waits for its port, if another process has taken it since the launcher found it free."""


def open_store(world: World, timeout_s: float) -> dist.Store:
    """Connect to the store that the ranks of this launch share. A single process gets a store in memory.

    This function does not wait for the other ranks. `check_ranks_agree` does, and reports which ranks are missing.

    Args:
        timeout_s: how long to wait for rank 0, and the timeout of the store's operations.

    Raises:
        ConfigError: there are several ranks, and the environment has no address.
        PreflightError: there is no store at the launcher's address, or rank 0 cannot use the port.
    """
    if world.world_size == 1:
        return dist.HashStore()
    address, port_text = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    set_by = "in the environment (torchrun and deepspeed set it with RANK)"
    require(address, ConfigError, f"MASTER_ADDR=: expected the address of rank 0 {set_by}")
    is_port = port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 2**16
    require(is_port, ConfigError, f"MASTER_PORT={port_text}: expected a port {set_by}")
    port = int(port_text)
    # Under torchrun, its agent serves the store, unless the environment disables that.
    is_server = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    deadline = time.monotonic() + min(timeout_s, PORT_TIMEOUT_S)
    while True:
        try:
            store = dist.TCPStore(address, port, None, is_server, timeout, wait_for_workers=False, multi_tenant=True)
            break
        except dist.DistNetworkError as error:
            if not is_server:
                raise PreflightError(
                    f"rank 0 did not start within {timeout_s:g} s at {address}:{port} (parallel.start_timeout_s)"
                ) from error
            # Another process may have taken the port since the launcher found it free, and may free it again.
            if time.monotonic() > deadline:
                raise PreflightError(f"MASTER_PORT={port}: expected a port that is free on this host") from error
            time.sleep(0.5)
    # torchrun's store survives a restart of the workers. The prefix separates the keys of each attempt.
    return dist.PrefixStore(f"attempt-{world.restart_count}", store)


def choose_on_rank0(store: dist.Store, world: World, key: str, choose: Callable[[], Any]) -> Any:
    """Call `choose()` on rank 0 only, and return its result on every rank. The other ranks wait for it.

    Args:
        key: name of the result in the store; each name can be used once.
        choose: returns a value that can be written as JSON.
    """
    if world.rank == 0:
        value = choose()
        store.set(key, to_json(value))
        return value
    return parse_json(store.get(key))


def wait_for_all(store: dist.Store, world: World, key: str) -> None:
    """Make rank 0 wait until every rank has called this function. Other ranks do not wait.

    Rank 0 may host the store, and must not end while other ranks still use it.
    """
    arrived = store.add(key, 1)
    while world.rank == 0 and arrived < world.world_size:
        time.sleep(0.05)
        arrived = store.add(key, 0)
