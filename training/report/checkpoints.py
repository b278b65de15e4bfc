"""The tables of `scripts/checkpoint.py`: the checkpoints of a run, their files, and how two of them differ."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import CheckpointError, require
from common.text import one_line
from training.checkpoint.inspection import Found, compare, read_contents
from training.checkpoint.manifest import Retention, delete_old_checkpoints
from training.checkpoint.peers import RemoteError
from training.report.terminal import human_bytes, human_count, human_time, show_fields, show_line, show_table


def show_checkpoints(where: str, checkpoints: Mapping[int, Found]) -> None:
    """Print one row for each checkpoint: size, files, layout and held-out loss. The files of tensors are not read.

    Args:
        where: the directory or the URL that has the checkpoints.
        checkpoints: by their steps.

    Raises:
        RemoteError: a store refused or did not answer.
    """
    rows, problems = [], []
    for step, checkpoint in checkpoints.items():
        try:
            found = read_contents(checkpoint)
        except RemoteError:
            raise
        except CheckpointError as error:
            problems.append(one_line(str(error)))
            continue
        rows.append(
            [
                str(step),
                "-" if found.saved_at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.saved_at)),
                human_bytes(found.size),
                str(found.files),
                str(len(found.tensors)),
                human_count(found.parameters),
                " ".join(f"{axis}={size}" for axis, size in found.layout.items()) or "-",
                "-" if found.loss is None else f"{found.loss:.4f}",
            ]
        )
    columns = ["step", "saved", "size", "files", "tensors", "parameters", "layout", "held-out loss"]
    show_table(f"Checkpoints in {where}", columns, rows, left=["saved", "layout"])
    for problem in problems:
        show_line(f"damaged: {problem}")


def show_checkpoint(checkpoint: Found) -> None:
    """Print the files of one checkpoint, and the dtype, shape and regions of every tensor.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    body = checkpoint.read_manifest()
    parts: dict[str, int] = dict.fromkeys(body["files"], 0)
    for record in body["tensors"].values():
        for chunk in record["chunks"]:
            parts[chunk["file"]] += 1
    rows = [[name, human_bytes(record["size"]), str(parts[name])] for name, record in sorted(body["files"].items())]
    show_table(f"Files of {checkpoint.where}", ["file", "size", "regions"], rows)
    numbers = {name: str(number) for number, name in enumerate(sorted(body["files"]))}
    rows = [
        [
            name,
            record["dtype"],
            " x ".join(map(str, record["shape"])) or "scalar",
            str(len(record["chunks"])),
            " ".join(sorted({numbers[chunk["file"]] for chunk in record["chunks"]}, key=int)),
        ]
        for name, record in sorted(body["tensors"].items())
    ]
    show_table(
        "Tensors", ["tensor", "dtype", "shape", "regions", "in files"], rows, left=["dtype", "shape", "in files"]
    )


def show_verified(where: str, checkpoints: Mapping[int, Found]) -> None:
    """Verify each checkpoint, and print a line about it.

    Args:
        where, checkpoints: as in `show_checkpoints`.

    Raises:
        CheckpointError: at the end, if one is damaged.
        RemoteError: a store refused or did not answer.
    """
    damaged = []
    for step, checkpoint in checkpoints.items():
        start = time.monotonic()
        try:
            checkpoint.verify()
            size = human_bytes(read_contents(checkpoint).size)
        except RemoteError:
            raise
        except CheckpointError as error:
            damaged.append(f"step-{step}")
            show_line(f"step-{step} is damaged: {one_line(str(error))}")
        else:
            show_line(f"step-{step} is intact: {size} in {human_time(time.monotonic() - start)}")
    require(
        not damaged,
        CheckpointError,
        f"{where}: {len(damaged)} of {len(checkpoints)} checkpoints are damaged: {', '.join(damaged[:10])}",
    )


def show_differences(first: Path, second: Path, limit: int) -> None:
    """Print how many tensors of two checkpoints have the same bits, and the `limit` tensors that differ most.

    Raises:
        CheckpointError: as `compare`.
    """
    differences = list(compare(first, second))
    changed = sorted((d for d in differences if not d.equal), key=lambda d: (-d.relative, d.name))
    show_fields(
        "Difference",
        {
            "from": str(first),
            "to": str(second),
            "equal bits": f"{len(differences) - len(changed)} of {len(differences)}",
        },
    )
    if changed:
        rows = [[d.name, f"{d.relative:.3e}", f"{d.largest:.3e}"] for d in changed[:limit]]
        title = f"Tensors that differ most ({len(rows)} of {len(changed)})"
        show_table(title, ["tensor", "norm of the difference / norm", "largest difference"], rows)


def show_pruned(paths: Sequence[Path], retention: Retention) -> None:
    """Delete the checkpoints that `retention` does not keep, and print which, and how many bytes that frees.

    Raises:
        CheckpointError: no checkpoint is intact, or one cannot be deleted.
    """
    root = paths[0].parent
    size_of = {path: sum(file.stat().st_size for file in path.iterdir()) for path in paths}
    delete_old_checkpoints(root, None, retention)
    deleted = [path for path in paths if not path.exists()]
    for path in deleted:
        show_line(f"deleted {path.name}: {human_bytes(size_of[path])}")
    freed = human_bytes(sum(size_of[path] for path in deleted))
    show_line(f"{len(paths) - len(deleted)} checkpoints are kept in {root}; {freed} are free again")
