"""Generate text from a trained model: continue a prompt, or answer in a conversation.

    python scripts/generate.py checkpoint=runs/quickstart-1 prompt="def main("
    python scripts/generate.py checkpoint=DIR 'prompts=["one text", "another"]' temperature=0.8 top_p=0.95 seed=1
    python scripts/generate.py checkpoint=DIR chat=true prompt="What is a router?" launch.nproc=2
    python scripts/generate.py checkpoint=DIR messages=conversation.json format=json
    python scripts/generate.py checkpoint=DIR quantize=nf4 prompt="The capital of France is"

docs/generation.md explains the keys.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from common.errors import expect, expect_fields
from common.strict import FreeText
from moe.quantization import FULL_PRECISION, QuantizeConfig
from training.config import LaunchConfig

if TYPE_CHECKING:
    from moe.generation.sampling import Sampling

STDIN = "-"
"""The value of `prompt` and of `messages` that stands for standard input."""


@dataclass(frozen=True)
class GenerateConfig:
    """The keys of `scripts/generate.py`. conf/generate.yaml has the same keys and explains each."""

    checkpoint: str
    prompt: FreeText | None = None
    prompts: tuple[FreeText, ...] = ()
    chat: bool = False
    messages: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: FreeText | None = None
    stops: tuple[FreeText, ...] = ()
    format: Literal["text", "json"] = "text"
    prefill_chunk: int = 512
    precision: Literal["auto", "fp64", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantize: QuantizeConfig = FULL_PRECISION
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        expect_fields(
            self,
            max_tokens=(self.max_tokens >= 1, "an integer >= 1"),
            prefill_chunk=(self.prefill_chunk >= 1, "an integer >= 1"),
        )
        has_prompt = self.prompt is not None or bool(self.prompts)
        expect(
            has_prompt != (self.messages is not None),
            "prompt",
            self.prompt if self.prompt is not None else list(self.prompts) or None,
            'a text ("-" for lines of stdin), prompts=[...], or messages=FILE alone',
        )
        expect("" not in self.all_stops, "stop", "''", "a text of at least one character")
        self.sampling()  # Raises ConfigError if a value is out of range.

    @property
    def all_stops(self) -> tuple[str, ...]:
        """The stop strings of `stop` and `stops` together."""
        return (*self.stops, *(() if self.stop is None else (self.stop,)))

    def sampling(self) -> "Sampling":
        """The sampling parameters, as `moe.generation.generate.generate` takes them."""
        # Imports torch, which --help and a mistake in another key do not wait for.
        from moe.generation.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)
