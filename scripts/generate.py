"""A model goes on with a text, or answers in a conversation.

    python scripts/generate.py checkpoint=runs/quickstart-1 prompt="def main("
    python scripts/generate.py checkpoint=DIR 'prompts=["one text", "another"]' temperature=0.8 top_p=0.95 seed=1
    python scripts/generate.py checkpoint=DIR chat=true prompt="What is a router?" launch.nproc=2
    python scripts/generate.py checkpoint=DIR messages=conversation.json format=json

docs/generation.md explains the keys.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.checks import expect
from common.errors import ConfigError, DataError
from moe.generation.sampling import Sampling
from parallel.startup.launch import die_with_parent, world_from_env
from scripts.cli.tools import run_tool
from scripts.cli.workers import in_processes
from training.config import LaunchConfig

START_TIMEOUT_S = 300.0
STDIN = "-"


@dataclass(frozen=True)
class GenerateConfig:
    """Mirrored by conf/generate.yaml."""

    checkpoint: str
    prompt: str | None = None
    prompts: tuple[str, ...] = ()
    chat: bool = False
    messages: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: str | None = None
    stops: tuple[str, ...] = ()
    format: Literal["text", "json"] = "text"
    prefill_chunk: int = 512
    precision: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        expect(self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        expect(self.prefill_chunk >= 1, "prefill_chunk", self.prefill_chunk, "an integer >= 1")
        given = self.prompt is not None or bool(self.prompts)
        expect(
            given != (self.messages is not None),
            "prompt",
            self.prompt if self.prompt is not None else list(self.prompts) or None,
            'a text ("-" for lines of stdin), prompts=[...], or messages=FILE alone',
        )
        expect("" not in self.all_stops, "stop", "''", "a text of at least one character")
        self.sampling()

    @property
    def all_stops(self) -> tuple[str, ...]:
        return (*self.stops, *(() if self.stop is None else (self.stop,)))

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def generate_text(config: GenerateConfig) -> None:
    """Read and tokenize what is asked, once; then generate here or in own workers."""
    if "RANK" in os.environ:
        from parallel.startup.rendezvous import choose_on_rank0, open_store

        die_with_parent()
        world = world_from_env()
        store = open_store(world, START_TIMEOUT_S)
        work(config, choose_on_rank0(store, world, "request", lambda: read_request(config)), store)
        return
    in_processes(config.launch, work, config, read_request(config))


def read_request(config: GenerateConfig) -> dict[str, Any]:
    """The model directory (checked), what ends a text, what to call each row, and its token ids; JSON-able.

    Raises:
        ModelError, DataError, ConfigError: whatever of it is not there or not usable.
    """
    from scripts.text import encode_chat, encode_prompt, end_marks, open_text
    from training.formats.reader import open_model_for_key

    source = open_model_for_key("checkpoint", config.checkpoint)
    text = open_text(source)
    about = {"path": str(source.path), "ends": end_marks(source, text)}
    if config.messages is not None:
        messages = _read_messages(config.messages)
        try:
            ids = encode_chat(text, messages)
        except DataError as error:
            raise DataError(f"messages={config.messages}: {error}") from error
        return about | {"titles": [messages[-1]["content"]], "prompts": [ids]}
    titles = list(config.prompts)
    if config.prompt == STDIN:
        titles += [line.rstrip("\r\n") for line in sys.stdin]
    elif config.prompt is not None:
        titles.append(config.prompt)
    if not titles:
        raise ConfigError(f"prompt={STDIN}: expected at least one line on stdin")
    empty = next((number for number, title in enumerate(titles, start=1) if not title), None)
    if empty is not None:
        raise ConfigError(f"prompt='': expected at least one token; prompt {empty} of {len(titles)} is empty")
    if config.chat:
        prompts = [encode_chat(text, [{"role": "user", "content": title}]) for title in titles]
    else:
        prompts = [encode_prompt(text, title) for title in titles]
    return about | {"titles": titles, "prompts": prompts}


def _read_messages(file: str) -> Any:
    try:
        return json.loads(sys.stdin.read() if file == STDIN else Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"messages={file}: expected a JSON file that can be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"messages={file}: expected a JSON list of messages ({reason})") from error


def work(config: GenerateConfig, request: dict[str, Any], store: Any = None) -> None:
    """One rank's life: all ranks compute, rank 0 speaks. `store`: the ranks' key-value store, if it is open already."""
    from moe.generation.generate import generate
    from parallel.apply import build_model
    from parallel.config import ParallelConfig
    from parallel.mesh import broadcast_from_first, build_mesh, close_process_group, init_process_group
    from parallel.startup.rendezvous import open_store
    from scripts.text import open_text
    from training.device import compute_dtype, pick_device
    from training.formats.reader import open_model

    world = world_from_env()
    device = pick_device(config.device, world.local_rank, world.local_world_size)
    dtype = compute_dtype(config.precision, device)
    source = open_model(request["path"], check=False)
    text = open_text(source)
    store = store if store is not None else open_store(world, START_TIMEOUT_S)
    init_process_group(store, world.rank, world.world_size, device, START_TIMEOUT_S)
    mesh = build_mesh(device, ParallelConfig().layout(world.world_size, source.model))
    model = build_model(source.model, source.router, mesh, compute_dtype=dtype, seed=None, inference_weights=True)
    source.fill(model)

    report = Report(config, request, text, speaks=world.rank == 0)
    tokens = generate(
        model,
        request["prompts"],
        max_tokens=config.max_tokens,
        sampling=config.sampling(),
        stop=request["ends"],
        prefill_chunk=config.prefill_chunk,
        on_token=report.on_token,
        on_end=report.on_end,
        agree=lambda logits_BV: broadcast_from_first(logits_BV, mesh),
    )
    report.end(tokens)
    close_process_group()


class Report:
    """What the user sees, and when each row ends: every rank decides, so that all agree, and one shows."""

    def __init__(self, config: GenerateConfig, request: dict[str, Any], text: Any, *, speaks: bool) -> None:
        from scripts.text import StreamedText, Terminal

        self.config, self.request, self.speaks = config, request, speaks
        self.rows = [StreamedText(text.decode, prompt, config.all_stops) for prompt in request["prompts"]]
        self.terminal = Terminal(request["titles"]) if speaks and config.format == "text" else None
        self.began, self.first = time.monotonic(), 0.0

    def on_token(self, row: int, token: int) -> bool:
        self.first = self.first or time.monotonic()
        growing = self.rows[row]
        said = growing.add(token)
        if self.terminal is not None:
            self.terminal.say(row, said)
        return growing.stopped

    def on_end(self, row: int) -> None:
        rest = self.rows[row].end()
        if self.terminal is not None:
            self.terminal.say(row, rest)
            self.terminal.end(row)

    def end(self, tokens: list[list[int]]) -> None:
        """Every row has ended: the figures."""
        if not self.speaks:
            return
        now = time.monotonic()
        first, generated = self.first or now, sum(map(len, tokens))
        # The first tokens come out of the prompts' forward pass.
        steps = generated - sum(map(bool, tokens))
        speed = steps / (now - first) if steps else 0.0
        prompt_tokens = sum(map(len, self.request["prompts"]))
        if self.terminal is not None:
            prompts = f"{prompt_tokens} prompt tokens in {first - self.began:.2f} s"
            print(f"{generated} tokens, {speed:.1f} tokens/s; {prompts}", file=sys.stderr)
            return
        limit = self.config.max_tokens
        results = [
            {
                "prompt": title,
                "text": growing.text,
                "tokens": ids,
                "finish": "stop" if growing.stopped or len(ids) < limit else "length",
            }
            for title, growing, ids in zip(self.request["titles"], self.rows, tokens, strict=True)
        ]
        figures = {
            "prompt_tokens": prompt_tokens,
            "tokens": generated,
            "prompt_s": first - self.began,
            "tokens_per_s": speed,
        }
        print(json.dumps({"results": results, **figures}, ensure_ascii=False, indent=2))


def main() -> None:
    run_tool("generate", GenerateConfig, generate_text, free_text=("prompt", "stop"))


if __name__ == "__main__":
    # Under its own name, so that workers can import what they run.
    from scripts.generate import main as main_of_module

    main_of_module()
