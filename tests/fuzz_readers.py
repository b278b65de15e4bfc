"""Give damaged files to every reader, and watch what the process does: python -m tests.fuzz_readers DIRECTORY COUNT

The files are made in DIRECTORY, COUNT damaged versions of each. An audit hook (`sys.addaudithook`) sees every file that
is opened, every process that is started, every connection, and all code that is compiled or run. Outside of DIRECTORY,
nothing may be opened but Python's own modules, and no code may run that is not theirs or this project's. Every reader
must return, or raise an error that is one line for the user. The last line of the output is JSON: the number of files
of each reader, and what went wrong.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import struct
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import yaml
from safetensors.torch import save_file

import training.loop  # noqa: F401 - what a run imports is imported before the hook is set
from common.errors import UserError
from common.strict import to_dict
from data.config import DataConfig
from data.corpora.corpus import open_corpus
from data.tokens.files import given_tokenizer
from data.tokens.store import Store, prepare
from data.tokens.tokenizer import train_tokenizer
from moe.config import ModelConfig, RouterConfig
from scripts.cli.command_line import MAX_MESSAGE, user_message
from tests.mutations import mutated_bytes, mutated_values
from tests.probes import synthetic_tokens, write_synthetic_probe
from tests.tokenizers import byte_level, write_tokenizer
from training.checkpoint import checkpoint
from training.checkpoint.manifest import MANIFEST, verify
from training.config import RunConfig
from training.deepspeed.settings import _read as read_deepspeed
from training.formats.foreign_tensors import TensorDirectory
from training.formats.reader import read_run_config
from training.generation.request import _read_json as read_messages
from training.owner import LAUNCH_FILE, RunOwner, _find, launch_identity
from training.report.metrics import MetricsRecord, MetricsWriter, read_metrics
from training.report.probe import read_probe, read_routing
from training.report.sweep import result_rows
from training.report.wandb_files import read_records
from training.resume import _read_config, resumable_state
from training.run import CONFIG_FILE, RESULT_FILE, finished_result

OURS = tuple(
    os.path.realpath(path)
    for path in (Path(__file__).parents[1], sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"))
)
FORBIDDEN = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pickle.find_class",
             "pty.spawn", "socket.connect", "socket.bind", "subprocess.Popen", "urllib.Request", "ctypes.dlopen",
             "code.__new__", "marshal.loads", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate",
             "os.symlink", "os.link", "shutil.rmtree")  # fmt: skip
"""Events that may only name paths in the directory of the files, or may not happen at all."""


class Watch:
    """Records what the process does while `active`, apart from its work in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = os.path.realpath(directory)
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2]
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            allowed = self._is_inside(path) or (not writes and path.startswith((*OURS, "/proc/self", "/dev/null")))
            if not allowed:
                self.seen.append(f"open {path} {flags}")
        elif event == "exec":
            file = getattr(arguments[0], "co_filename", "?")
            if not file.startswith("<frozen") and (file[:1] == "<" or not os.path.realpath(file).startswith(OURS)):
                self.seen.append(f"exec {file}")
        elif event in FORBIDDEN and not (event == "os.truncate" and isinstance(arguments[0], int)):
            paths = [os.path.realpath(os.fsdecode(item)) for item in arguments if isinstance(item, str | bytes | Path)]
            if not paths or not all(map(self._is_inside, paths)):
                self.seen.append(f"{event} {str(arguments)[:200]}")

    def _is_inside(self, path: str) -> bool:
        return path == self.directory or path.startswith(f"{self.directory}/")


def rehashed(content: bytes) -> bytes:
    """Return a manifest with the hash of its content, so that what it says is read."""
    try:
        body = json.loads(content)
        body.pop("sha256", None)
        text = json.dumps(body, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (ValueError, AttributeError, RecursionError):
        return content
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def cases(root: Path) -> Iterator[tuple[str, Path, Callable[[], Any], bool]]:
    """Yield the name of a reader, a file that it can read, a call that reads it, and whether the file is JSON."""
    rows = [{"text": f"words {number} of é\nand lines", "n": number, "a": {"b": [number]}} for number in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    csv = b"text,n\n" + b"".join(b'"words ""%d""",%d\n' % (number, number) for number in range(8))
    contents = {"rows.jsonl": lines, "rows.json": json.dumps(rows).encode(), "rows.csv": csv,
                "rows.parquet": table.getvalue(), "text.txt": b"A text of lines.\n\n" * 40,
                "rows.jsonl.gz": gzip.compress(lines, mtime=0), "rows.jsonl.bz2": bz2.compress(lines),
                "rows.jsonl.xz": lzma.compress(lines),
                "rows.jsonl.zst": pyarrow.compress(lines, codec="zstd", asbytes=True)}  # fmt: skip
    for name, content in contents.items():
        file = root / "data" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)

        def read_corpus(file: Path = file) -> None:
            corpus = open_corpus(DataConfig(kind="files", paths=(str(file),), max_documents=1000))
            corpus.fingerprint()
            for _ in corpus.documents():
                pass

        yield f"corpus: {name}", file, read_corpus, name == "rows.json"

    model = ModelConfig(
        dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12, num_experts=2, top_k=1,
        vocab_size=300,
    )  # fmt: skip
    run = root / "run"
    run.mkdir()
    (run / CONFIG_FILE).write_text(
        yaml.safe_dump({"model": to_dict(model), "router": to_dict(RouterConfig()), "train": {"steps": 3}})
    )

    def read_config() -> None:
        result_rows([run]), _read_config(run)
        read_run_config(run / CONFIG_FILE)

    yield "run: config.yaml", run / CONFIG_FILE, read_config, False
    (run / RESULT_FILE).write_text(json.dumps({"status": "finished", "step": 3, "eval/loss": 1.5, "ranks": [{"a": 1}]}))
    yield "run: result.json", run / RESULT_FILE, lambda: (result_rows([run]), finished_result(run, 1)), True
    writer = MetricsWriter(run / "metrics.jsonl", None)
    for step in (1, 2, 3):
        writer.write({"step": step, "train/loss": 0.5 / step, "router/load": [0.5, 0.5], "x": float("nan")})
    record = writer.record()
    writer.close()
    yield "run: metrics.jsonl", run / "metrics.jsonl", lambda: read_metrics(run / "metrics.jsonl"), False
    copy = run / "copy.jsonl"
    copy.write_bytes((run / "metrics.jsonl").read_bytes())
    yield "run: metrics.jsonl, resumed", copy, lambda: MetricsWriter(copy, 3, record).close(), False
    launch = root / "launches" / "exp-1" / LAUNCH_FILE
    launch.parent.mkdir(parents=True)
    launch.write_text(json.dumps({"run_id": "x", "host": "h", "agent_pid": 1, "agent_start": "2"}))
    identity = launch_identity()
    yield "run: launch.json", launch, lambda: _find(RunConfig("exp", root=str(launch.parents[1])), identity), True
    locked = root / "locked" / "a" / ".lock"
    locked.parent.mkdir(parents=True)
    locked.write_text("token\n")

    def lock() -> None:
        with RunOwner() as owner:
            owner.claim(RunConfig("exp", name="a", root=str(locked.parents[1])))

    yield "run: .lock", locked, lock, False
    packet = b":W&B\0\0\0"
    for content in (b"\x08\x01", b"x" * 300):
        head = struct.pack("<IHB", zlib.crc32(b"\x01" + content), len(content), 1)
        packet += head + content
    wandb = run / "run.wandb"
    wandb.write_bytes(packet)
    write_synthetic_probe(run, steps=(0, 1))
    probe = run / "probe" / "step-1.safetensors"
    yield "run: tokens of the probe", run / "probe" / "tokens.safetensors", lambda: read_probe(run), False
    yield "run: a step of the probe", probe, lambda: read_routing(probe, synthetic_tokens()), False
    yield "run: W&B", wandb, lambda: list(read_records(wandb)), False

    state = {
        "step": 2, "updates": 2, "model": to_dict(model), "router": to_dict(RouterConfig()),
        "loader": {"rows": 4, "corpus": "x", "seed": 0, "seq_len": 8}, "metrics": record.to_state(),
        "health": {"losses": [1.0], "since": None}, "plugins": {}, "config": {"train": {"steps": 3}},
    }  # fmt: skip
    saved = checkpoint.save(run / "checkpoints", 2, {"model.a": torch.zeros(2, 3)}, state, keep=1)

    def load() -> None:
        MetricsRecord.from_state(resumable_state(str(saved), 9).get("metrics"))
        checkpoint.load(saved, {"model.a": torch.ones(2, 3)})

    yield "checkpoint: manifest", saved / MANIFEST, lambda: verify(saved), True
    yield "checkpoint: manifest with its hash", saved / MANIFEST, load, True
    shard = next(saved.glob("*.safetensors"))
    yield "checkpoint: shard", shard, load, False

    foreign = root / "foreign"
    foreign.mkdir()
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, foreign / "model.safetensors")
    (foreign / "index.json").write_text(json.dumps({"weight_map": dict.fromkeys("ab", "model.safetensors")}))
    for name in ("model.safetensors", "index.json"):

        def read_tensors() -> None:
            tensors = TensorDirectory(foreign, "index.json", "model.safetensors")
            for key, stored in tensors.tensors.items():
                tensors.read(key, (0,) * len(stored.shape), stored.shape)

        yield f"foreign: {name}", foreign / name, read_tensors, name == "index.json"
    words = " ".join(f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr")
    sentencepiece = root / "tokenizer.model"
    sentencepiece.write_bytes(train_tokenizer([words] * 9, 300))
    yield "tokenizer: sentencepiece", sentencepiece, lambda: given_tokenizer(str(sentencepiece)).open(), False
    write_tokenizer(root / "hf", byte_level(["<|begin|>"], bos="<|begin|>"), eos_token="<|begin|>")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        yield f"tokenizer: {name}", root / "hf" / name, lambda: given_tokenizer(str(root / "hf")).open(), True
    (root / "messages.json").write_text(json.dumps([{"role": "user", "content": "abc"}]))
    yield "messages", root / "messages.json", lambda: read_messages(str(root / "messages.json")), True
    (root / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "steps_per_print": 10}))
    yield "DeepSpeed", root / "ds.json", lambda: read_deepspeed(str(root / "ds.json")), True
    (root / "corpus.txt").write_text("".join(f"{words[number:]}\n\n" for number in range(300)))
    paths, cache = (str(root / "corpus.txt"),), str(root / "cache")
    config = DataConfig(kind="files", paths=paths, vocab_size=300, heldout_max_bytes=2000, cache=cache)
    store = prepare(config).directory
    for name in ("manifest.json", "train-starts.npy", "train-domains.npy"):
        if (store / name).exists():
            yield f"token store: {name}", store / name, lambda: Store(store), name == "manifest.json"


def main(directory: Path, count: int) -> None:
    """Run all cases, and print the result as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    every = list(cases(directory))
    for _, _, read, _ in every:
        read()  # What a reader imports when it is first used is imported now.
    watch, counts, wrong = Watch(directory), {}, []
    start = time.monotonic()
    for name, file, read, is_json in every:
        original = file.read_bytes()
        versions = [*mutated_bytes(original, name, count)]
        if is_json:
            versions += mutated_values(json.loads(original), name, count)
        if name == "checkpoint: manifest with its hash":
            versions = list(map(rehashed, versions))
        random.Random(name).shuffle(versions)
        for content in versions:
            file.write_bytes(content)
            watch.active = True
            try:
                read()
            except UserError as error:
                line = user_message(error, []) or ""
                if "\n" in line or not 0 < len(line) <= MAX_MESSAGE:
                    wrong.append(f"{name}: {str(error)[:200]!r}")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]} for {content[:200]!r}")
            finally:
                watch.active = False
        file.write_bytes(original)
        counts[name] = len(versions)
    wrong += watch.seen
    print(json.dumps({"counts": counts, "seconds": time.monotonic() - start, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
