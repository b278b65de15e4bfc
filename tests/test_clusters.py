"""The launchers for several nodes, run on one machine."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from scripts.cli.command_line import CONF
from tests.test_train import TINY, numbers
from training.checkpoint.manifest import newest_committed, read_state

ROOT = CONF.parent
NODE, SLURM, KUBERNETES = (ROOT / "scripts" / name for name in ("node.sh", "slurm.sbatch", "kubernetes.yaml"))
SIGNALS = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
DOCS = (ROOT / "docs" / "clusters.md").read_text()


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def wait_for(path: Path) -> str:
    wait_until(lambda: path.exists() and bool(path.read_text()))
    return path.read_text()


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def clean_environment() -> dict[str, str]:
    names = ("NPROC", "PORT", "ADDRESS", "RESTARTS", "PYTHON", "HEAD", "NODES", "JOB", "OMP_NUM_THREADS", "NCCL_DEBUG")
    return {name: value for name, value in os.environ.items() if name not in names}


@pytest.mark.slow
def test_two_agents_on_one_machine_train_one_run(tmp_path):
    port = free_port()
    place = {"HEAD": "localhost", "NODES": "2", "JOB": "two", "NPROC": "1", "PORT": port, "ADDRESS": "localhost"}
    environment = clean_environment() | place | {"PYTHON": sys.executable}
    overrides = (*TINY, f"data.cache={tmp_path}/cache", f"run.root={tmp_path}/runs", "train.steps=2")
    # The second node has another cache, which is allowed.
    agents = [
        subprocess.Popen([NODE, *overrides, *extra], env=environment, stderr=subprocess.PIPE, text=True)
        for extra in ((), (f"data.cache={tmp_path}/another",))
    ]
    ended = [(agent.communicate(timeout=180)[1], agent.returncode) for agent in agents]
    assert [status for _, status in ended] == [0, 0], ended
    [directory] = (tmp_path / "runs").iterdir()
    result = json.loads((directory / "result.json").read_text())
    assert directory.name == "mixtral_tiny-two" and result["step"] == 2
    assert [row["experts"] for row in result["ranks"]] == [[0, 1], [2, 3]]


@pytest.mark.slow
def test_a_run_goes_on_while_a_node_leaves_and_comes_back(tmp_path):
    """fp64: 2 nodes, 1, and 2 again, compared with one process that does the same steps."""
    directory, errors, port = tmp_path / "elastic", tmp_path / "errors", free_port()
    place = {"HEAD": "localhost", "NODES": "1:2", "JOB": "elastic", "NPROC": "1", "PORT": port, "ADDRESS": "localhost"}
    waits = "last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=3"
    environment = clean_environment() | place | {"PYTHON": sys.executable, "PET_RDZV_CONF": waits}
    # A step takes a moment, so that there are few. The schedule does not depend on their number.
    arguments = (
        *TINY, f"data.cache={tmp_path}/cache", f"run.root={tmp_path}", "train.precision=fp64", "train.seq_len=256",
        "train.accumulation=2", "checkpoint.every=2", "checkpoint.keep=99", "checkpoint.at_end=true",
        "optim.schedule=constant", "optim.warmup_steps=0",
    )  # fmt: skip

    def start_node() -> subprocess.Popen[bytes]:
        command = [NODE, *arguments, "run.name=elastic", "train.steps=100000", "telemetry.forecast=false"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors.open("a"))

    def wait_for_ranks(ranks: int, after: int) -> int:
        """Wait for a checkpoint that this number of ranks has written after this step. Return its step."""
        end = time.monotonic() + 150
        while True:
            newest = newest_committed(directory / "checkpoints")
            if newest is not None:
                state = read_state(newest)
                if state["step"] > after and state["config"]["parallel"]["replicate"] == ranks:
                    return int(state["step"])
            assert time.monotonic() < end and stays.poll() is None, errors.read_text()
            time.sleep(0.1)

    stays = start_node()
    wait_until(lambda: is_open(int(port)))  # This agent serves the rendezvous.
    leaves = start_node()
    step = wait_for_ranks(2, after=0)
    leaves.kill()  # Its worker dies with it.
    step = wait_for_ranks(1, after=step)
    comes = start_node()
    wait_for_ranks(2, after=step)
    for agent in (stays, comes):
        agent.send_signal(signal.SIGTERM)
    for agent in (stays, comes):
        agent.wait(120)
    rows = numbers(directory)
    last = rows[-1]["step"]
    command = [sys.executable, "train.py", *arguments, "run.name=whole", f"train.steps={last}"]
    subprocess.run(command, cwd=ROOT, env=clean_environment(), check=True, stdout=subprocess.DEVNULL)
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    for mine, other in zip(rows, numbers(tmp_path / "whole"), strict=True):
        for key in mine.keys() & other.keys():
            if "rank_load_max" not in key:  # The load of a rank depends on the number of ranks.
                assert mine[key] == pytest.approx(other[key], rel=1e-9), (mine["step"], key)
    elastic, whole = (read_state(tmp_path / name / "checkpoints" / f"step-{last}") for name in ("elastic", "whole"))
    assert elastic["loader"] == whole["loader"] and elastic["config"]["parallel"]["replicate"] == 2


def test_node_script_names_what_is_missing_and_keeps_arguments_whole(tmp_path):
    python = executable(tmp_path / "python", 'printf "%s\\n" "$@" "$OMP_NUM_THREADS" "$NCCL_DEBUG"')
    one = clean_environment() | {"PYTHON": str(python)}
    environment = one | {"HEAD": "node1", "NODES": "4"}
    refused = subprocess.run([NODE], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: JOB=: expected a value")
    elastic = environment | {"JOB": "j", "NODES": "1:4"}
    refused = subprocess.run([NODE, "a=1"], env=elastic, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: run.name=: expected a name")
    arguments = ["data.paths=[a b.txt]", "run.prompt='x y'"]
    done = subprocess.run(
        [NODE, *arguments], env=environment | {"JOB": "j"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "-m", "torch.distributed.run", "--nnodes", "4", "--nproc-per-node", "gpu", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "node1:29400", "--rdzv-id", "j", *SIGNALS, "--max-restarts", "3", "train.py",
        *arguments, "1", "WARN",
    ]  # fmt: skip
    # One node meets nobody: no server listens.
    done = subprocess.run([NODE, "a=1"], env=one | {"NPROC": "2"}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-conf", "store_type=file", *SIGNALS, "--max-restarts", "3", "train.py", "a=1", "1", "WARN",
    ]  # fmt: skip


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """An environment in which `srun` runs one task on this machine, and `scontrol` writes its arguments to a file."""
    executable(tmp_path / "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    executable(
        tmp_path / "scontrol",
        f'if [[ $1 == show ]]; then printf "n7\\nn8\\n"; else echo "$@" >> {tmp_path}/requests; fi',
    )
    job = {"JOB_ID": "41234", "JOB_NODELIST": "n[7-8]", "JOB_NUM_NODES": "2", "SUBMIT_DIR": str(ROOT)}
    path = f"{tmp_path}:{os.environ['PATH']}"
    return clean_environment() | {f"SLURM_{name}": value for name, value in job.items()} | {"PATH": path}


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_starts_the_node_script_and_ends_with_its_status(tmp_path, slurm, status):
    python = executable(tmp_path / "python", f'echo "$@"; exit {status}')
    environment = slurm | {"PYTHON": str(python), "SLURM_RESTART_COUNT": "2"}
    ended = subprocess.run(
        ["bash", SLURM, "train.steps=9"], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == status, ended.stderr
    assert "--nnodes 2 " in ended.stdout and "--rdzv-endpoint n7:21234 --rdzv-id slurm-41234-2" in ended.stdout
    assert ended.stdout.endswith("train.py run.name=slurm-41234 run.resume=auto train.steps=9\n")


def test_slurm_requeues_before_the_time_limit_and_keeps_waiting(tmp_path, slurm):
    python = executable(tmp_path / "python", f"trap 'exit 5' USR1; echo on > {tmp_path}/started; sleep 1.5; exit 6")
    batch = subprocess.Popen(["bash", SLURM], env=slurm | {"PYTHON": str(python)}, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "started")
    batch.send_signal(signal.SIGUSR1)
    assert wait_for(tmp_path / "requests") == "requeue 41234\n"
    assert "requeueing job 41234" in batch.communicate(timeout=20)[1] and batch.returncode == 5


def test_kubernetes_manifest_starts_the_node_script_the_same_way_in_every_pod():
    [job] = yaml.safe_load_all(KUBERNETES.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1 and replicas["Master"]["template"] == replicas["Worker"]["template"]
    spec = replicas["Master"]["template"]["spec"]
    [container] = spec["containers"]
    assert container["name"] == "pytorch" and os.access(ROOT / container["command"][0], os.X_OK)
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["HEAD"] == f"{job['metadata']['name']}-master-0"
    assert int(environment["NODES"]) == 1 + replicas["Worker"]["replicas"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in spec["volumes"]} and mounts["shm"] == "/dev/shm"
    assert f"run.root={mounts['runs']}" in container["args"] and f"data.cache={mounts['cache']}" in container["args"]
    known = set(re.findall(r"^# ([A-Z]+) ", NODE.read_text(), re.MULTILINE))
    assert {name for name in environment if "_" not in name} <= known


def test_scripts_parse_and_the_page_explains_every_variable():
    for script in (NODE, SLURM):
        subprocess.run(["bash", "-n", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--shell=bash", script], check=True)
    exported = re.findall(r"^export (\w+)=", NODE.read_text(), re.MULTILINE)
    [job] = yaml.safe_load_all(KUBERNETES.read_text())
    pod = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    for name in {*exported, *(entry["name"] for entry in pod["env"] if "_" in entry["name"])}:
        assert f"| `{name}` |" in DOCS, name
