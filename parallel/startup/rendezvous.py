"""The key-value store that ranks share before a process group exists, at the address that the launcher sets.

If all ranks are on one host, its sockets listen on the loopback interface only. torch's own servers listen on all
interfaces and ask nobody who they are: whoever reaches them can write what the ranks read.
"""

import contextlib
import errno
import ipaddress
import os
import socket
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
START_TIMEOUT_S = 300.0
"""Seconds that the ranks of a tool wait for each other. A run has the key `parallel.timeout_s`."""
LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
BACKLOG = 2048
"""Connections of other ranks that the kernel keeps until the store accepts them, if its own limit is not lower."""


def open_store(world: World, timeout_s: float) -> dist.Store:
    """Connect to the store that the ranks of this launch share. A single process gets a store in memory.

    This function does not wait for the other ranks. `check_ranks_agree` does, and reports which ranks are missing.
    Where all ranks are on this host, gloo is told to use the loopback interface, unless `GLOO_SOCKET_IFNAME` is set.

    Args:
        timeout_s: how long to wait for rank 0, and the timeout of the store's operations.

    Raises:
        ConfigError: there are several ranks, and the environment has no address.
        PreflightError: there is no store at the launcher's address, or rank 0 cannot use the port.
    """
    one_host = world.local_world_size == world.world_size
    if one_host and LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    if world.world_size == 1:
        return dist.HashStore()
    address, port_text = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    set_by = "in the environment (torchrun and deepspeed set it with RANK)"
    require(address, ConfigError, f"MASTER_ADDR=: expected the address of rank 0 {set_by}")
    is_port = port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 2**16
    require(is_port, ConfigError, f"MASTER_PORT={port_text}: expected a port {set_by}")
    port = int(port_text)
    # Under torchrun, its agent serves the store, unless the environment disables that.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if one_host and not of_agent:
        address = LOOPBACK
    is_server = world.rank == 0 and not of_agent
    timeout = timedelta(seconds=timeout_s)
    deadline = time.monotonic() + min(timeout_s, PORT_TIMEOUT_S)
    while True:
        try:
            store = _serve(address, port, timeout) if is_server else _connect(address, port, timeout)
            break
        except (dist.DistNetworkError, OSError) as error:
            if not is_server:
                raise PreflightError(
                    f"rank 0 did not start within {timeout_s:g} s at {address}:{port} (parallel.start_timeout_s)"
                ) from error
            # Another process may have taken the port since the launcher found it free, and may free it again.
            if time.monotonic() > deadline:
                raise PreflightError(f"MASTER_PORT={port}: expected a port that is free on this host") from error
            time.sleep(0.5)
    # The agent's store survives a restart of the workers, and the prefix separates the keys of each attempt. Rank 0's
    # store ends with it. It must have no prefix, because each agent counts the restarts for itself: the counts differ
    # if a node has joined later, or if an agent restarts its workers because those of another one have failed.
    return dist.PrefixStore(f"attempt-{world.restart_count}", store) if of_agent else store


def exposure(world: World) -> str | None:
    """Return a warning if the ranks of several hosts meet at an address of the public internet; None otherwise."""
    name = os.environ.get("MASTER_ADDR", "")
    if world.local_world_size == world.world_size:
        return None
    with contextlib.suppress(OSError, UnicodeError):
        for *_, (address, *_) in socket.getaddrinfo(name, None):
            if ipaddress.ip_address(str(address).partition("%")[0]).is_global:
                return (
                    f"warning: MASTER_ADDR={name} is a public address ({address}): whoever reaches the ports of a run "
                    "over several nodes can run code in it; use a private interface (docs/clusters.md)"
                )
    return None


def _connect(address: str, port: int, timeout: timedelta) -> dist.Store:
    return dist.TCPStore(address, port, None, False, timeout, wait_for_workers=False, multi_tenant=True)


def _serve(address: str, port: int, timeout: timedelta) -> dist.Store:
    """Serve the store, on the interface of `address` only if that is an IP address and not a name.

    A name can stand for another address on another node. An address that no interface of this host has is translated
    on the way. In both cases the store listens on all interfaces, as torch's default is.
    """
    listener = _listen(address, port)
    if listener is None:
        return dist.TCPStore(address, port, None, True, timeout, wait_for_workers=False, multi_tenant=True)
    # torch owns the socket from here on.
    descriptor = listener.detach()
    return dist.TCPStore(
        address, port, None, True, timeout, wait_for_workers=False, multi_tenant=True, master_listen_fd=descriptor
    )


def _listen(address: str, port: int) -> socket.socket | None:
    """Return a socket that listens at this IP address; None if it is a name, or no address of this host."""
    try:
        version = ipaddress.ip_address(address).version
    except ValueError:
        return None
    listener = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise
    return listener


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
