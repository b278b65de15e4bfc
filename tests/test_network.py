"""Runs over two nodes: two network namespaces of this machine, connected by a pair of virtual interfaces."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_clusters import NODE, clean_environment
from tests.test_train import TINY, cache, numbers, run  # noqa: F401

LIMIT_S = 12
LIMIT_RATE = ("tc", "qdisc", "add", "dev", "link-b", "root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "1s")
IN_NODE = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
"""What runs in a namespace first, so that the names of both nodes have addresses."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Nodes:
    """Two nodes, `a` with rank 0 and `b` with rank 1."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.agents: list[subprocess.Popen[bytes]] = []
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

    def start(self, node: str, *arguments: str) -> subprocess.Popen[bytes]:
        number = list(self.names).index(node) + 1
        place = {"HEAD": "10.77.0.1", "NODES": "2", "JOB": "two", "NPROC": "1", "ADDRESS": f"10.77.0.{number}"}
        place |= {"GLOO_SOCKET_IFNAME": f"link-{node}", "RESTARTS": "0", "PYTHON": sys.executable}
        inside = ("ip", "netns", "exec", self.names[node], "unshare", "--uts", "bash", "-c", IN_NODE, "bash")
        agent = subprocess.Popen(
            [*inside, str(self.directory / "hosts"), f"node-{node}", NODE, *TINY, *arguments],
            env=clean_environment() | place,
            stdout=(self.directory / f"output-{node}").open("w"),
            stderr=(self.directory / f"errors-{node}").open("w"),
        )
        self.agents.append(agent)
        return agent

    def output(self, node: str) -> str:
        return (self.directory / f"output-{node}").read_text()

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
    if not all(map(shutil.which, ("ip", "tc", "unshare", "mount", "hostname"))):
        pytest.skip("iproute2 and util-linux are not installed")
    nodes = Nodes(tmp_path)
    try:
        try:
            nodes.connect()
            for change in ("add", "delete"):
                ip("netns", "exec", nodes.names["b"], *(change if word == "add" else word for word in LIMIT_RATE))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces, or no tbf: {error.stderr.strip()}")
        yield nodes
    finally:
        nodes.remove()


def wait_for_rows(directory: Path, process: subprocess.Popen[bytes], enough: Callable[[int], bool]) -> int:
    """Wait until `enough(steps)` is true, with the number of steps that have rows. Return this number."""
    end, metrics = time.monotonic() + 120, directory / "metrics.jsonl"
    while True:
        done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        if enough(done):
            return done
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
def test_a_slow_link_is_named_and_one_that_is_cut_ends_the_run_which_continues_bit_for_bit(
    tmp_path: Path,
    cache: str,  # noqa: F811
    nodes: Nodes,
) -> None:
    arguments = ("train.steps=50", "telemetry.forecast=false", "checkpoint.every=20", "tracking=disabled")
    on_nodes = (*arguments, cache, f"run.root={tmp_path}", "run.name=cut", f"parallel.timeout_s={LIMIT_S}")
    agents = [nodes.start(node, *on_nodes) for node in "ab"]
    rows = wait_for_rows(tmp_path / "cut", agents[0], lambda done: done > 0)
    ip("netns", "exec", nodes.names["b"], *LIMIT_RATE)
    warning = ": the network from rank 1 (node-b) to rank 0 (node-a) is slow: 1 MiB takes 0."
    warned = wait_for_rows(tmp_path / "cut", agents[0], lambda done: warning in nodes.output("a"))
    assert warned <= rows + 22  # Two steps can pass until the rate is set, and until the line is found.
    # A step takes a third of a second now, so the link is cut in a step and not in a save.
    wait_for_rows(tmp_path / "cut", agents[0], lambda done: 1 < done % 20 < 17)
    nodes.set_link("b", "down")
    start = time.monotonic()
    while not (nodes.errors("a") and nodes.errors("b")):
        assert time.monotonic() - start < LIMIT_S + 25  # On a quiet machine: limit + 5.
        time.sleep(0.1)
    assert agents[0].wait(60) == 1
    agents[1].kill()  # torch's agent would wait without a limit for the rendezvous, which is on the other node.
    waited = rf"rank %d waited {LIMIT_S} s in gloo:\w+ of step \d+"
    [at_a], [at_b] = nodes.errors("a"), nodes.errors("b")
    assert re.match(
        waited % 0 + r" for rank 1 \(node-b\), which gives no answer \(blocked, or its host is down, or ", at_a
    )
    assert re.match(waited % 1 + r" and does not reach rank 0 \(node-a\): .* this host \(node-b\) is cut; ", at_b)
    assert len(list((tmp_path / "cut" / "collectives").iterdir())) == 2
    saved = range(20, warned + 1, 20)
    assert {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()} >= {f"step-{step}" for step in saved}
    nodes.set_link("b", "up")
    ip("netns", "exec", nodes.names["b"], "tc", "qdisc", "delete", "dev", "link-b", "root")
    agents = [nodes.start(node, *on_nodes) for node in "ab"]
    assert [agent.wait(180) for agent in agents] == [0, 0], nodes.errors("a")
    assert "continued from step-" in nodes.output("a")
    run(tmp_path, cache, *arguments, "launch.nproc=2", "run.name=whole")
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
