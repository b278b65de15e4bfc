"""Check that every layout computes what one process computes, on the machines at hand.

    python scripts/parity.py layouts=all launch.nproc=4
    python scripts/parity.py layouts=expert,tensor models=mixtral,switch launch.nproc=2
    python scripts/parity.py layouts=tensor=2+expert=4,pipeline=2+schedule=zero_bubble models=all launch.nproc=4
    python scripts/parity.py model=mixtral_tiny router=switch launch.nproc=2
    python scripts/parity.py model=mixtral_tiny router=softmax_topk router.kind=mine plugins=[my_router.py]
    torchrun --nproc-per-node 8 scripts/parity.py layouts=all

Exit status 0: all differences are within the tolerance; 1: some are not. docs/parity.md explains the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from common.checks import expect
from moe.config import ModelConfig, RouterConfig
from training.config import LaunchConfig
from training.parity.cases import CASES, VOCABULARY, Case

COVER, EVERY = "cover", "all"
"""Values of `models` that name no model: one model for each layout in turn, and every model under every layout."""
GIVEN = "given"
"""The name of the model that the user gives with `model=`."""


@dataclass(frozen=True)
class ParityConfig:
    """The keys of `scripts/parity.py`. conf/parity.yaml has the same keys and explains each."""

    layouts: str = "all"
    models: str = COVER
    engines: str = "native"
    precision: Literal["fp64", "fp32"] = "fp64"
    steps: int = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig | None = None
    router: RouterConfig | None = None

    def __post_init__(self) -> None:
        expect(self.steps >= 2, "steps", self.steps, "an integer >= 2")
        size = None if self.model is None else self.model.vocab_size
        expect(
            size is None or size >= VOCABULARY,
            "model.vocab_size",
            size,
            f"an integer >= {VOCABULARY}, the token ids in the data, or null",
        )
        expect(self.router is None or self.model is not None, "model", None, "a preset of conf/model beside router=...")

    def cases(self) -> Mapping[str, Case]:
        """The models to train, by name: the one that `model` and `router` give, or else the built-in ones."""
        if self.model is None:
            return CASES
        model = replace(self.model, vocab_size=self.model.vocab_size or VOCABULARY)
        return {GIVEN: Case(model, self.router or RouterConfig())}
