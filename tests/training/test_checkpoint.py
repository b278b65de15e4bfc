"""Checkpoints of one process: round trip, damage, kills, full disks. tests/distributed has those of several ranks."""

import errno
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import CheckpointError
from training.checkpoint import manifest, shards
from training.checkpoint.checkpoint import load, save
from training.checkpoint.manifest import committed, newest_verified, read_state, verify
from training.checkpoint.peers import NotFiniteError


def tensors_of(step: int) -> dict[str, Tensor]:
    """Return one tensor of each kind that a run saves. All values depend on `step`."""
    matrix = torch.arange(12.0).reshape(3, 4) + step
    return {
        "float32": matrix,
        "transposed": matrix.t(),
        "float64": matrix.double() / 3,
        "bfloat16": matrix.bfloat16(),
        "bool": matrix > 5,
        "int64": torch.tensor([2**62, -step]),
        "scalar": torch.tensor(float(step)),
        "empty": torch.empty(0, 4),
        "shares storage": matrix[1:],
    }


def zeros_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def assert_saved(path: Path, step: int) -> None:
    """Assert that the checkpoint `path` is undamaged and has exactly `tensors_of(step)`."""
    verify(path)
    expected = tensors_of(step)
    loaded = zeros_like(expected)
    load(path, loaded)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert read_state(path) == {"step": step}


def save_step(root: Path, step: int, keep: int = 2) -> Path:
    return save(root, step, tensors_of(step), {"step": step}, keep=keep)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    state = {"step": 7, "loader": {"cursor": 2**60, "loss": 0.1 + 0.2}, "layers": [1, None, "x"]}
    path = save(tmp_path, 7, tensors_of(7), state, keep=2)
    assert path == tmp_path / "step-7"
    assert read_state(path) == state
    loaded = zeros_like(tensors_of(7))
    storage = {name: tensor.data_ptr() for name, tensor in loaded.items()}
    load(path, loaded)
    for name, tensor in tensors_of(7).items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].data_ptr() == storage[name], "not loaded in place"


def test_the_safetensors_package_reads_a_shard(tmp_path: Path) -> None:
    (shard,) = save_step(tmp_path, 3).glob("*.safetensors")
    content = load_file(shard)
    assert torch.equal(content["float32[0:3,0:4]"], tensors_of(3)["float32"])
    assert torch.equal(content["scalar[]"], torch.tensor(3.0))


def test_parameters_that_require_grad_are_filled(tmp_path: Path) -> None:
    path = save(tmp_path, 0, {"w": torch.nn.Parameter(torch.arange(4.0))}, {}, keep=1)
    parameter = torch.nn.Parameter(torch.zeros(4))
    load(path, {"w": parameter})
    assert parameter.tolist() == [0, 1, 2, 3]


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 10, 9):
        save_step(tmp_path, step, keep=2)
    # Step 10 is undamaged but later than the last save, so it is not counted and not deleted. Steps 9 and 5 are kept.
    assert [path.name for path in committed(tmp_path)] == ["step-10", "step-9", "step-5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-5", "step-9"]


def test_saving_an_earlier_step_deletes_a_damaged_later_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    flip_byte(next(save_step(tmp_path, 10).glob("*.safetensors")), 0)
    save_step(tmp_path, 6)
    assert [path.name for path in committed(tmp_path)] == ["step-6", "step-1"]


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step, keep=3)
    flip_byte(next((tmp_path / "step-3").glob("*.safetensors")), 30)
    save_step(tmp_path, 4, keep=2)
    assert [path.name for path in committed(tmp_path)] == ["step-4", "step-2"]
    assert_saved(tmp_path / "step-2", 2)


def test_a_damaged_checkpoint_is_not_deleted_before_there_are_enough_intact_ones(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    flip_byte(next((tmp_path / "step-1").glob("*.safetensors")), 30)
    save_step(tmp_path, 2)
    assert [path.name for path in committed(tmp_path)] == ["step-2", "step-1"]
    save_step(tmp_path, 3)
    assert [path.name for path in committed(tmp_path)] == ["step-3", "step-2"]


def test_files_that_were_found_intact_are_read_again_only_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "SETTLED_NS", -1)  # The files of this test are young.
    read: list[Path] = []
    sha256_of = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda file, progress: read.append(file) or sha256_of(file, progress))
    for step in range(1, 6):
        save_step(tmp_path, step, keep=3)
    assert [path.parent.name for path in read] == ["step-1", "step-2", "step-3", "step-4"]
    (shard,) = (tmp_path / "step-4").glob("*.safetensors")
    flip_byte(shard, 30)
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    save_step(tmp_path, 6, keep=3)
    assert [path.name for path in committed(tmp_path)] == ["step-6", "step-5", "step-3"]
    assert [path.parent.name for path in read[4:]] == ["step-5", "step-4"]
    verify(tmp_path / "step-3")
    assert read[-1].parent.name == "step-3", "verify trusted the file"


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    (tmp_path / "step-1").rename(tmp_path / "step-30")
    warnings: list[str] = []
    assert newest_verified(tmp_path, warnings.append) == tmp_path / "step-2"
    (line,) = warnings
    assert line.endswith(
        "manifest.json: found the checkpoint of step 1, expected that of step 30, as its directory says"
    )


def test_the_nth_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 1.5, 60: 2.5}
    for step, loss in losses.items():
        save(tmp_path, step, tensors_of(step), {"step": step, "heldout_loss": loss}, keep=9)
    manifest.delete_old_checkpoints(tmp_path, 60, manifest.Retention(2, every=30, best=1))
    assert [path.name for path in committed(tmp_path)] == ["step-60", "step-50", "step-30", "step-20"]
    flip_byte(next((tmp_path / "step-20").glob("*.safetensors")), 30)
    manifest.delete_old_checkpoints(tmp_path, 60, manifest.Retention(1, best=2))
    assert [path.name for path in committed(tmp_path)] == ["step-60", "step-50", "step-30"]


def test_a_manifest_that_the_disk_does_not_give_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30, 40):
        save_step(tmp_path, step, keep=9)
    (tmp_path / "step-20" / "manifest.json").unlink()
    read = manifest.read_file

    def read_file(path: Path, limit: int) -> bytes:
        if path.parent.name == "step-10":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, limit)

    monkeypatch.setattr(manifest, "read_file", read_file)
    manifest.delete_old_checkpoints(tmp_path, 40, manifest.Retention(2, every=10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-30", "step-40"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_that_are_not_finite_are_not_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    save_step(tmp_path, 1)
    for value in (float("nan"), float("inf"), -float("inf")):
        weight = torch.full((300, 300), torch.finfo(dtype).max, dtype=dtype)
        path = save(tmp_path, 1, {"w": weight}, {"step": 1}, keep=2)  # A sum of it would overflow.
        weight[123, 45] = value
        with pytest.raises(NotFiniteError, match=rf"^w\[0:300,0:300\] has an element that is {value}$"):
            save(tmp_path, 2, {"w": weight}, {"step": 2}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    verify(path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    path = save(tmp_path, 4, {"w": torch.ones(2)}, {"second": True}, keep=2)
    verify(path)
    assert read_state(path) == {"second": True}
    assert len(list(path.iterdir())) == 2
    shard = next(path.glob("*.safetensors"))
    flip_byte(shard, 0)
    save(tmp_path, 4, {"w": torch.ones(2)}, {"second": True}, keep=2)
    verify(path)


def test_a_saved_step_counts_as_saved_if_its_old_files_cannot_be_removed(tmp_path: Path) -> None:
    (save_step(tmp_path, 1) / "directory").mkdir()
    save(tmp_path, 1, tensors_of(2), {"step": 1}, keep=2)
    verify(tmp_path / "step-1")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_of_a_link_to_a_checkpoint_only_the_link_is_deleted(tmp_path: Path) -> None:
    moved = save_step(tmp_path / "other_disk", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-1").symlink_to(moved)
    for step in (2, 3):
        save_step(tmp_path / "run", step)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-2", "step-3"]
    assert_saved(moved, 1)


def flip_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << random.Random(position).randrange(8)
    file.write_bytes(content)


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    draw = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(50):
            flip_byte(file, draw.randrange(len(whole)))
            with pytest.raises(CheckpointError, match=file.name):
                verify(path)
            file.write_bytes(whole)
    verify(path)


def test_damage_is_reported_with_the_actual_and_the_expected_value(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (shard,) = path.glob("*.safetensors")
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: found {size - 1} bytes, expected {size}"):
        verify(path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: cannot be read .*, expected {size} bytes"):
        verify(path)


def test_newest_verified_skips_damaged_ones(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert newest_verified(tmp_path / "none", warnings.append) is None
    for step in (1, 2, 3):
        save_step(tmp_path, step, keep=3)
    flip_byte(next((tmp_path / "step-3").glob("*.safetensors")), 30)
    flip_byte(tmp_path / "step-2" / "manifest.json", 30)
    assert newest_verified(tmp_path, warnings.append) == tmp_path / "step-1"
    assert [line.split(":")[0] for line in warnings] == ["skipping checkpoint step-3", "skipping checkpoint step-2"]
    assert committed(tmp_path) == [tmp_path / "step-3", tmp_path / "step-1"]
    (tmp_path / "step-1" / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"expected an undamaged checkpoint; all are damaged \(step-3, step-2, step-1\)"
    ):
        newest_verified(tmp_path, warnings.append)


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/passwd", "manifest.json", "a/b.safetensors"])
def test_a_manifest_cannot_name_files_outside_its_directory(tmp_path: Path, name: str) -> None:
    """A forged manifest can have the right hash, so the names are checked, too."""
    path = save_step(tmp_path, 1)
    body = manifest.read_manifest(path)
    body["files"][name] = {"size": 1, "sha256": "0" * 64}
    manifest.write_manifest(path, body)
    with pytest.raises(CheckpointError, match="not a checkpoint manifest"):
        verify(path)


def test_loading_other_tensors_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {f"w{i}": torch.ones(2, 3) for i in range(8)}, {}, keep=1)
    right = {f"w{i}": torch.zeros(2, 3) for i in range(8)}
    with pytest.raises(CheckpointError, match=r"7 tensors unexpected: w1, w2, w3, w4, w5, and 2 more"):
        load(path, {"w0": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match="1 tensor missing: other"):
        load(path, right | {"other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"of another shape: w3 \(found \(2, 3\), expected \(3, 2\)\)"):
        load(path, right | {"w3": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match=r"of another dtype: w3 \(found F32, expected F64\)"):
        load(path, right | {"w3": torch.zeros(2, 3, dtype=torch.float64)})
    assert all(not tensor.any() for tensor in right.values()), "a tensor was changed"


def test_state_must_be_strict_json(tmp_path: Path) -> None:
    for state in ({"loss": float("nan")}, {"path": tmp_path}):
        with pytest.raises(CheckpointError, match="state cannot be written as JSON"):
            save(tmp_path, 1, {}, state, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)

    def full(descriptor: int, content: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.os, "write", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device: \d+ bytes are needed, \d+ bytes are free"
    ) as raised:
        save_step(tmp_path, 2)
    monkeypatch.undo()
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert_saved(tmp_path / "step-1", 1)


SYSTEM_CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "write")


def save_until_killed(root: Path, first: int, calls: int) -> None:
    """Save checkpoints until SIGKILL, which is sent just before the `calls`-th call that changes the file system."""
    remaining = calls

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    os.fsync = lambda fd: None  # After SIGKILL, written data is kept even if it was not flushed.
    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    step = first
    while True:
        save_step(root, step)
        # Every third step is saved two more times, so that replacing a checkpoint is also interrupted.
        if step % 3 == 0:
            save(root, step, {"w": torch.ones(2)}, {"step": step}, keep=2)
            save_step(root, step)
        step += 1


def test_a_kill_at_any_point_loses_no_committed_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 0)
    context = multiprocessing.get_context("fork")
    draw = random.Random(0)
    newest = 0
    # The first 40 calls reach every point of one save. The random ones are in later saves.
    for calls in [*range(1, 41), *(draw.randrange(41, 200) for _ in range(20))]:
        process = context.Process(target=save_until_killed, args=(tmp_path, newest, calls))
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        path = newest_verified(tmp_path, lambda line: None)
        assert path is not None
        assert committed(tmp_path)[0] == path, "the newest committed checkpoint is damaged"
        assert manifest.step_of(path) >= newest
        newest = manifest.step_of(path)
        if read_state(path)["step"] == newest and len(manifest.read_manifest(path)["tensors"]) > 1:
            assert_saved(path, newest)
    save_step(tmp_path, newest + 1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert len(committed(tmp_path)) == 2


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    content = json.loads((save_step(tmp_path, 2) / "manifest.json").read_text())
    assert content["format"] == 1
    assert content["torch"] == torch.__version__
    assert content["tensors"]["float32"]["chunks"][0]["shape"] == [3, 4]
