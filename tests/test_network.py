"""Runs over two nodes: two network namespaces of this machine, connected by a pair of virtual interfaces."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_clusters import NODE, clean_environment
from tests.test_train import TINY, cache, numbers, run  # noqa: F401

LIMIT_S = 12
IN_NODE = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
"""What runs in a namespace first, so that the names of both nodes have addresses."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Nodes:
    """Two nodes, `a` with rank 0 and `b` with rank 1."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.agents: list[subprocess.Popen[str]] = []
        self.names = {node: f"mixwright-{os.getpid()}-{node}" for node in "ab"}
        (directory / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n")

    def connect(self) -> None:
        for name in self.names.values():
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "link-a",
            "netns",
            self.names["a"],
            "type",
            "veth",
            "peer",
            "link-b",
            "netns",
            self.names["b"],
        )
        for number, (node, name) in enumerate(self.names.items(), start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", f"link-{node}")
            ip("-n", name, "link", "set", "lo", "up")
            self.set_link(node, "up")

    def set_link(self, node: str, state: str) -> None:
        ip("-n", self.names[node], "link", "set", f"link-{node}", state)

    def start(self, node: str, *arguments: str) -> subprocess.Popen[str]:
        number = list(self.names).index(node) + 1
        place = {"HEAD": "10.77.0.1", "NODES": "2", "JOB": "two", "NPROC": "1", "ADDRESS": f"10.77.0.{number}"}
        place |= {"GLOO_SOCKET_IFNAME": f"link-{node}", "RESTARTS": "0", "PYTHON": sys.executable}
        inside = ("ip", "netns", "exec", self.names[node], "unshare", "--uts", "bash", "-c", IN_NODE, "bash")
        agent = subprocess.Popen(
            [*inside, str(self.directory / "hosts"), f"node-{node}", NODE, *TINY, *arguments],
            env=clean_environment() | place,
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / f"errors-{node}").open("w"),
            text=True,
        )
        self.agents.append(agent)
        return agent

    def errors(self, node: str) -> list[str]:
        lines = (self.directory / f"errors-{node}").read_text().splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    def remove(self) -> None:
        for agent in self.agents:
            agent.kill()
            agent.wait()
        for name in self.names.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    if not all(map(shutil.which, ("ip", "unshare", "mount", "hostname"))):
        pytest.skip("iproute2 and util-linux are not installed")
    nodes = Nodes(tmp_path)
    try:
        try:
            nodes.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces: {error.stderr.strip()}")
        yield nodes
    finally:
        nodes.remove()


def wait_for_row(directory: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait for the end of this step."""
    end, metrics = time.monotonic() + 120, directory / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= step):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
def test_a_link_that_is_cut_ends_the_run_on_both_nodes_and_it_continues_bit_for_bit(
    tmp_path: Path,
    cache: str,  # noqa: F811
    nodes: Nodes,
) -> None:
    # Four steps take more than a second, so the link is cut in a step and not in a save.
    arguments = ("train.global_batch=64", "train.steps=8", "checkpoint.every=4", "tracking=disabled")
    on_nodes = (*arguments, cache, f"run.root={tmp_path}", "run.name=cut", f"parallel.timeout_s={LIMIT_S}")
    agents = [nodes.start(node, *on_nodes) for node in "ab"]
    wait_for_row(tmp_path / "cut", 5, agents[0])
    nodes.set_link("b", "down")
    start = time.monotonic()
    while not (nodes.errors("a") and nodes.errors("b")):
        assert time.monotonic() - start < LIMIT_S + 25  # On a quiet machine: limit + 5.
        time.sleep(0.1)
    assert agents[0].wait(60) == 1
    agents[1].kill()  # torch's agent waits for its rendezvous on the other node, without a limit of its own.
    waited = rf"rank %d waited {LIMIT_S} s in gloo:\w+ of step \d+"
    [at_a], [at_b] = nodes.errors("a"), nodes.errors("b")
    assert re.match(
        waited % 0 + r" for rank 1 \(node-b\), which gives no answer \(blocked, or its host is down, or ", at_a
    )
    assert re.match(waited % 1 + r" and does not reach rank 0 \(node-a\): .* this host \(node-b\) is cut; ", at_b)
    assert len(list((tmp_path / "cut" / "collectives").iterdir())) == 2
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-4"]
    nodes.set_link("b", "up")
    agents = [nodes.start(node, *on_nodes) for node in "ab"]
    assert [agent.wait(180) for agent in agents] == [0, 0], nodes.errors("a")
    run(tmp_path, cache, *arguments, "launch.nproc=2", "run.name=whole")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
