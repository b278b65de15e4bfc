"""Files that would make a reader wait, need gigabytes or seconds, or fail with a traceback: one line refuses them."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import CheckpointError, ConfigError, DataError, UserError
from common.files import read_file, sha256_of
from common.text import MAX_YAML, parse_yaml
from data.config import DataConfig
from data.corpora import formats
from data.corpora.corpus import open_corpus
from data.tokens.files import given_tokenizer
from scripts.cli.command_line import check_presets, compose_config, end, user_message
from tests.commands import ROOT
from training.checkpoint import checkpoint
from training.checkpoint.inspection import found_in
from training.checkpoint.manifest import MANIFEST, committed
from training.config import RunConfig
from training.deepspeed.settings import _read as read_deepspeed
from training.formats.foreign_tensors import read_header, read_json
from training.formats.reader import open_model, read_run_config
from training.generation.request import _read_json as read_messages
from training.owner import _find, launch_identity
from training.report.checkpoints import show_checkpoints, show_differences
from training.report.metrics import read_metrics
from training.report.run_report import show_finished
from training.report.sweep import sweep_table
from training.report.wandb_files import read_records
from training.resume import _read_config, resumable_state
from training.run import CONFIG_FILE, RESULT_FILE, finished_result


@pytest.fixture(autouse=True)
def a_few_seconds() -> Iterator[None]:
    """A reader that waits for a named pipe would wait for ever."""

    def give_up(number: int, frame: Any) -> None:
        raise AssertionError("a reader takes more than 60 s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read_corpus(path: Path) -> list[Any]:
    corpus = open_corpus(DataConfig(kind="files", paths=(str(path),)))
    corpus.fingerprint()
    return list(corpus.documents())


def checkpoint_of(directory: Path, state: dict[str, Any]) -> Path:
    return checkpoint.save(directory / "checkpoints", 2, {"model.a": torch.zeros(2)}, state, keep=1)


READERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: read_file(path, 10),
    "hash": sha256_of,
    "metrics": read_metrics,
    "configuration of a run": read_run_config,
    "safetensors": read_header,
    "JSON of a model": read_json,
    "tokenizer": lambda path: given_tokenizer(str(path)).open(),
    "messages": lambda path: read_messages(str(path)),
    "DeepSpeed": lambda path: read_deepspeed(str(path)),
    "W&B": lambda path: list(read_records(path)),
    "text": read_corpus,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["named pipe", "device"])
def test_what_is_no_file_is_refused(tmp_path: Path, reader: str, kind: str) -> None:
    path = tmp_path / "file"
    os.mkfifo(path) if kind == "named pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError) as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value) and "regular file" in str(caught.value)


def test_pipes_in_a_run_directory_are_not_waited_for(tmp_path: Path) -> None:
    job = tmp_path / "sweep" / "0"
    job.mkdir(parents=True)
    for name in (RESULT_FILE, CONFIG_FILE, "launch.json"):
        os.mkfifo(job / name)
    assert finished_result(job, 1) is None and _read_config(job) == {}
    assert sweep_table(tmp_path / "sweep")[0]["status"] == "missing"
    assert _find(RunConfig("0", root=str(tmp_path / "sweep")), launch_identity()) is None
    path = checkpoint_of(tmp_path, {})
    shard = next(path.glob("*.safetensors"))
    for file in (shard, path / MANIFEST):
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(CheckpointError, match=r"regular file"):
            checkpoint.load(path, {"model.a": torch.zeros(2)})
    assert committed(path.parent) == []


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{" * 100_000, "- " * 50_000, "? " * 50_000, "[" * 90 + "[1]," * 200_000, "a: 1\n" * 10**7]
)
def test_yaml_has_a_limit_of_depth_and_length(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 210 and "\n" not in str(caught.value)


def test_presets_are_checked_before_they_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "mine.yaml"
    for text in ("[" * 100_000, "- " * 50_000, "a: 1\n" * MAX_YAML):
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"^--config-dir={tmp_path}: {file}"):
            compose_config("config", ["run=mine"], str(tmp_path))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="is a named pipe, not a regular file"):
        check_presets(str(tmp_path))
    file.unlink()
    file.write_text("a: &x [1]\nb: *x\n")
    check_presets(str(tmp_path))


def test_a_preset_cannot_read_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "run").mkdir()
    for value, key in (
        ("{experiment: x, prompt: 'a ${oc.env:SECRET}'}", "run.prompt"),
        ("{experiment: x, prompt: '${oc.decode:${oc.env:SECRET}}'}", "run.prompt"),
        ("{experiment: env, root: '${oc.${run.experiment}:SECRET,y}'}", "run.root"),
    ):
        (tmp_path / "run" / "mine.yaml").write_text(value)
        with pytest.raises(ConfigError) as caught:
            compose_config("config", ["run=mine"], str(tmp_path))
        line = f"{key}=${{oc.env:SECRET}}: expected a value that does not read the environment, because runs save"
        assert str(caught.value).startswith(line) and "hunter2" not in str(caught.value)
    # Afterwards the resolver is as before, and text on the command line is no interpolation at all.
    from omegaconf import OmegaConf

    assert OmegaConf.create({"a": "${oc.env:SECRET}"}).a == "hunter2"


def test_a_result_without_figures_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"status": "finished", "step": 3}
    (tmp_path / RESULT_FILE).write_text(json.dumps(good))
    result = finished_result(tmp_path, 3)
    assert result == good
    show_finished(tmp_path, result)
    assert "is finished at step 3 (held-out loss -)" in capsys.readouterr().out
    for change in (
        {"step": True},
        {"step": "3"},
        {"step": 1e9},
        {"eval/loss": "x"},
        {"eval/loss": [1]},
        {"status": []},
    ):
        (tmp_path / RESULT_FILE).write_text(json.dumps(good | change))
        assert finished_result(tmp_path, 1) is None


def test_a_sweep_does_not_count_up_to_the_name_of_a_directory(tmp_path: Path) -> None:
    for name in ("0", "2", "9" * 30):
        (tmp_path / name).mkdir()
    assert [row["job"] for row in sweep_table(tmp_path)] == [0, 1, 2]


def rehash(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest, and write it with the hash of its new content."""
    body = json.loads((path / MANIFEST).read_text())
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(body, sort_keys=True, separators=(",", ":")))


@pytest.mark.parametrize(
    ("size", "shape"),
    [(10**400, [6]), (-1, [6]), (1, [2**62] * 64), (2**62, [2**62])],
    ids=lambda value: str(value)[:9],
)
def test_sizes_of_a_manifest_have_limits(tmp_path: Path, size: int, shape: list[int]) -> None:
    path = checkpoint.save(tmp_path, 1, {"model.a": torch.ones(6)}, {"step": 1}, keep=1)

    def change(body: Any) -> None:
        for record in body["files"].values():
            record["size"] = size
        body["tensors"]["model.a"] |= {"shape": shape, "chunks": []}

    rehash(path, change)
    show_checkpoints(str(path.parent), found_in(path.parent))
    with pytest.raises(CheckpointError) as refused:
        show_differences(path, path, 1)
    assert "\n" not in str(refused.value)


def test_names_in_a_message_have_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end(CheckpointError("model.\x1b[2J: found 0 elements, expected 6"), [])
    assert capsys.readouterr().err == "error: model.\\x1b[2J: found 0 elements, expected 6\n"


STATE = {
    "step": 2, "updates": 2, "model": {}, "router": {},
    "loader": {"rows": 4, "corpus": "x", "seed": 0, "seq_len": 8},
}  # fmt: skip
TYPES: tuple[Any, ...] = (None, True, -1, 1.5, 2**64, "x", "9" * 5000, [], [1], [[]], {}, {"x": []}, [0] * 10**5)


@pytest.mark.parametrize(
    "keys",
    [
        "format", "state", "files", "tensors", "files/*", "files/*/size", "files/*/sha256", "tensors/model.a",
        "tensors/model.a/shape", "tensors/model.a/dtype", "tensors/model.a/chunks", "tensors/model.a/chunks/0",
        "tensors/model.a/chunks/0/file", "tensors/model.a/chunks/0/shape", "tensors/model.a/chunks/0/offset",
    ],
)  # fmt: skip
def test_a_manifest_of_wrong_types_is_one_line(tmp_path: Path, keys: str) -> None:
    path = checkpoint_of(tmp_path, STATE)
    original = (path / MANIFEST).read_bytes()
    for value in TYPES:

        def change(body: Any, value: Any = value) -> None:
            *parents, last = keys.split("/")
            for key in parents:
                body = body[int(key)] if isinstance(body, list) else body[next(iter(body)) if key == "*" else key]
            body[0 if last == "0" else next(iter(body)) if last == "*" else last] = value

        (path / MANIFEST).write_bytes(original)
        rehash(path, change)
        try:
            checkpoint.load(path, {"model.a": torch.ones(2)})
        except CheckpointError as error:
            assert len(str(error)) < 800 and "\n" not in str(error)
        else:
            assert keys == "state" or keys.endswith(("size", "sha256")), value  # `load` does not compare the hashes


@pytest.mark.parametrize(
    "key",
    ["step", "updates", "loader", "loader/rows", "loader/corpus", "loader/seed", "plugins", "config", "health",
     "loader/skipped", "health/losses"],
)  # fmt: skip
def test_a_state_of_wrong_types_is_one_line(tmp_path: Path, key: str) -> None:
    path = checkpoint_of(tmp_path, STATE | {"health": {}})
    original = (path / MANIFEST).read_bytes()
    for value in TYPES:

        def change(body: Any, value: Any = value) -> None:
            *parents, last = key.split("/")
            inner = body["state"]
            for parent in parents:
                inner = inner[parent]
            inner[last] = value

        (path / MANIFEST).write_bytes(original)
        rehash(path, change)
        try:
            state = resumable_state(str(path), 10)
        except CheckpointError as error:
            assert len(str(error)) < 800 and "\n" not in str(error)
        else:
            assert type(value) is {"corpus": str, "plugins": dict, "config": dict, "health": dict}.get(
                key.rpartition("/")[2], list
            ), (value, state)


def test_a_shape_of_a_million_entries_is_not_printed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for shape in ([1] * 10**6, [10**4000], ["x" * 10**6], [-1] * 60):
        header = json.dumps({"a" * 10**6: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(UserError) as caught:
            read_header(file)
        assert len(str(caught.value)) < 800
    with pytest.raises(UserError):
        open_model(tmp_path)
    line = user_message(ConfigError("x" * 10**6), [])
    assert line is not None and len(line) == 4000


BOMB = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from data.corpora.formats import detect, items_of
from common.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = 0
for place, item in items_of(Path(sys.argv[1]), detect(Path(sys.argv[1]))):
    found += 1
    if found == 30 or isinstance(item, DataError):
        break
print(item if isinstance(item, DataError) else "rows")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def expand(path: Path) -> tuple[str, int]:
    """Read the first rows of a file in a new process. Return what the process prints, and its peak memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    line, mebibytes = done.stdout.splitlines()
    return line, int(mebibytes)


@pytest.mark.parametrize(
    "name", ["bomb.jsonl.gz", "bomb.csv.bz2", "bomb.txt.gz", pytest.param("bomb.json.xz", marks=pytest.mark.slow)]
)
def test_a_compressed_bomb_needs_little_memory(tmp_path: Path, name: str) -> None:
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[Path(name).suffix]
    piece = compress(b'{"text": "' + b"x" * (32 << 20))  # Several compressed streams are one file of 1.5 GiB.
    rest = compress(b"x" * (32 << 20))
    (tmp_path / name).write_bytes(piece + rest * 47)
    if name == "bomb.txt.gz":
        (tmp_path / name).write_bytes(rest * 48)
    line, mebibytes = expand(tmp_path / name)
    expected = "rows" if ".txt" in name else "expected"
    assert line.startswith(expected) and mebibytes < (3000 if ".json.xz" in name else 400), (line, mebibytes)


@pytest.mark.parametrize("nested", [False, True])
def test_a_parquet_dictionary_bomb_needs_little_memory(tmp_path: Path, nested: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    large = pyarrow.array(["x" * (24 << 20)])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4000, pyarrow.int32()), large)
    if nested:
        messages = pyarrow.StructArray.from_arrays([column], ["content"])
        column = pyarrow.ListArray.from_arrays(pyarrow.array(range(4001), pyarrow.int32()), messages)
    file = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": column}), file, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False
    )
    assert file.stat().st_size < 100_000
    line, mebibytes = expand(file)
    assert line == "rows" and mebibytes < 500


def test_rows_of_tables_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(formats, "MAX_ROW", 100)
    monkeypatch.setattr(formats, "MAX_JSON_TEXT", 400)
    long = {"text": "y" * 200}
    short = {"text": "x"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (short, long, short)))
    (tmp_path / "a.json").write_text(json.dumps([short, long, long]))
    (tmp_path / "a.csv").write_text(f'text\nx\n"{"y" * 60}\n{"y" * 60}"\nx\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([short, long, short]), tmp_path / "a.parquet")
    expected = {"a.jsonl": [short, DataError], "a.json": [DataError], "a.csv": [short, DataError],
                "a.parquet": [short, DataError, short]}  # fmt: skip
    for name, items in expected.items():
        path = tmp_path / name
        found = [item for _, item in formats.items_of(path, formats.detect(path))]
        assert [DataError if isinstance(item, DataError) else item for item in found] == items, (name, found)
        assert all(
            "at most" in str(item) or "field larger" in str(item) for item in found if isinstance(item, DataError)
        )


def test_xz_files_of_several_streams_are_read_whole_and_large_dictionaries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.xz"
    streams = [f"stream {number} ".encode() * 5000 for number in range(4)]
    path.write_bytes(b"\0\0\0\0".join(map(lzma.compress, streams)) + bytes(8))
    kind = formats.detect(path)
    assert "".join(str(item) for _, item in formats.items_of(path, kind)).encode() == b"".join(streams)
    path.write_bytes(lzma.compress(streams[0])[:-20])
    [*_, (_, last)] = formats.items_of(path, kind)
    assert isinstance(last, DataError) and "before its end marker" in str(last)
    header = lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}])
    path.write_bytes(header)
    with pytest.raises(DataError, match=r"^expected a file that can be read \(LZMAError: Memory usage limit"):
        formats.detect(path)
