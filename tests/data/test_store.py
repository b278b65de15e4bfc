import gzip
import json
import math
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.files import sha256_of
from data.config import DataConfig
from data.packing import IGNORE
from data.tokens import build
from data.tokens.build import baselines, manifest_sha256
from data.tokens.store import Store, prepare


@pytest.mark.parametrize("seq_len", [7, 64, 100_000])
def test_every_heldout_token_that_has_a_predecessor_is_a_label_once(store: Store, seq_len: int) -> None:
    split = store.heldout
    stream = split.tokens(0, split.num_tokens)
    rows = [split.row(i, seq_len) for i in range(split.num_rows(seq_len))]
    labels = np.concatenate([row.labels_S for row in rows])
    assert labels[labels != IGNORE].tolist() == stream[stream != store.tokenizer.bos_id].tolist()
    inputs = np.concatenate([row.tokens_S[row.documents_S >= 0] for row in rows])
    assert inputs.tolist() in (stream.tolist(), stream[:-1].tolist())


def test_bytes_of_the_labels_are_the_bytes_of_the_heldout_text(store: Store) -> None:
    rows = [store.heldout.row(i, 50) for i in range(store.heldout.num_rows(50))]
    labels, domains = (np.concatenate([getattr(row, name) for row in rows]) for name in ("labels_S", "domains_S"))
    for number, row in enumerate(store.summary()):
        kept = labels[(labels != IGNORE) & (domains == number)]
        assert store.tokenizer.token_bytes()[kept].sum() == row["heldout_bytes"] > 0


def test_train_rows_are_whole_and_follow_each_other(store: Store) -> None:
    split, seq_len = store.train, 33
    assert split.num_rows(seq_len) == (split.num_tokens - 1) // seq_len
    rows = [split.row(i, seq_len, cross_documents=True) for i in range(split.num_rows(seq_len))]
    stream = split.tokens(0, split.num_tokens)[: len(rows) * seq_len + 1]
    assert np.concatenate([row.tokens_S for row in rows]).tolist() == stream[:-1].tolist()
    assert np.concatenate([row.labels_S for row in rows]).tolist() == stream[1:].tolist()


def test_shards_are_one_stream(tiny: DataConfig, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARD_TOKENS", 1000)
    small = prepare(replace(tiny, cache=str(tmp_path)))
    assert len(small.manifest["splits"]["train"]["shards"]) == -(-store.train.num_tokens // 1000)
    tokens = store.train.tokens(0, store.train.num_tokens)
    assert small.train.tokens(0, store.train.num_tokens).tolist() == tokens.tolist()
    assert small.train.tokens(999, 3001).tolist() == tokens[999:3001].tolist()


def test_a_second_call_opens_what_is_there(tiny: DataConfig, store: Store) -> None:
    reports: list[str] = []
    again = prepare(replace(tiny, cross_documents=True), verify=False, report=reports.append)
    assert (again.directory, reports) == (store.directory, [])
    assert {path.name for path in store.directory.iterdir()} == {*store.manifest["files"], "manifest.json"}
    assert prepare(replace(tiny, heldout_fraction=0.2)).directory != store.directory


def test_summary_and_baselines(store: Store) -> None:
    rows = store.summary()
    assert [row["domain"] for row in rows] == ["code", "prose", "arithmetic"] == list(store.domains)
    assert sum(row["tokens"] for row in rows) == store.train.num_tokens + store.heldout.num_tokens
    for row in rows:
        assert 1 < row["gzip_bits_per_byte"] < row["unigram_bits_per_byte"] < 6
    text = b"aab" * 100
    expected = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert baselines(text)["unigram_bits_per_byte"] == pytest.approx(expected, abs=1e-12)
    assert baselines(text)["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, mtime=0)) / 300
    assert baselines(b"") == {"gzip_bits_per_byte": None, "unigram_bits_per_byte": None}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("name", "harm", "verify", "message"),
    [
        (
            "train-00000.bin",
            flip_bit,
            True,
            "train-00000.bin: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}; delete",
        ),
        ("heldout-starts.npy", flip_bit, True, "heldout-starts.npy: expected sha256"),
        ("tokenizer.model", flip_bit, True, "tokenizer.model: expected sha256"),
        ("manifest.json", flip_bit, False, "manifest.json: expected "),
        ("train-00000.bin", truncate, False, r"train-00000.bin: expected \d+ bytes, found \d+; delete"),
        ("heldout-00000.bin", Path.unlink, False, "heldout-00000.bin: expected a file, found none; delete"),
        ("manifest.json", Path.unlink, False, "manifest.json: expected a file that can be read"),
    ],
)
def test_damage_is_named(
    store: Store, tmp_path: Path, name: str, harm: Callable[[Path], None], verify: bool, message: str
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store.directory, copy)
    harm(copy / name)
    with pytest.raises(DataError, match=f"^{copy}/{message}[^\n]*$"):
        Store(copy, verify=verify)


def test_a_token_beyond_the_vocabulary_is_named(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store.directory, copy)
    tokens = np.fromfile(copy / "train-00000.bin", dtype="<u2")
    tokens[5] = 500
    tokens.tofile(copy / "train-00000.bin")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["train-00000.bin"]["sha256"] = sha256_of(copy / "train-00000.bin")
    manifest["sha256"] = manifest_sha256(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"train-00000.bin: expected token ids below vocab_size 500, found 500$"):
        Store(copy)


def prepare_and_send_reports(config: DataConfig, queue: "multiprocessing.Queue[list[str]]") -> None:
    reports: list[str] = []
    prepare(config, report=reports.append)
    queue.put(reports)


def test_of_two_processes_one_builds_and_the_other_waits(tiny: DataConfig, tmp_path: Path) -> None:
    config = replace(tiny, cache=str(tmp_path), code_bytes=0)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[list[str]] = context.Queue()
    processes = [context.Process(target=prepare_and_send_reports, args=(config, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    reports = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert Counter(map(bool, reports)) == {True: 1, False: 1}
    assert [process.exitcode for process in processes] == [0, 0]


def test_debris_of_a_killed_builder_is_no_hindrance(tiny: DataConfig, store: Store, tmp_path: Path) -> None:
    debris = tmp_path / f".{store.directory.name}.tmp"
    debris.mkdir()
    (debris / "train-00000.bin").write_bytes(b"half")
    rebuilt = prepare(replace(tiny, cache=str(tmp_path)))
    # The manifest contains the hash of every file, so equal manifests mean that a second build gives the same bytes.
    assert rebuilt.manifest["sha256"] == store.manifest["sha256"] and not debris.exists()
