"""A router, a feed-forward kind, an optimizer and a schedule of a user, on every axis of two processes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, ModelError
from common.plugins import load_plugins
from moe.config import FEED_FORWARDS
from moe.router import ROUTERS
from parallel.apply import build_model
from parallel.mesh import mesh_of_one
from tests.distributed.harness import run_ranks
from training.config import OptimConfig
from training.parity.config import MIXTRAL, ONE_PROCESS, Case, configuration, rows_for
from training.parity.driver import TOLERANCES, run_jobs
from training.parity.jobs import Job, parse_layout
from training.parity.trial import Trial
from training.report.tables import show_model
from training.trainable import Trainable

NOISY_TOPK = str(Path(__file__).parents[2] / "examples" / "noisy_topk" / "noisy_topk.py")
LAYOUTS = ("expert=2", "tensor=2", "pipeline=2", "context=2", "shard=2")
EVERYTHING_ELSE = """
import torch
from moe.feedforward import register_feed_forward
from training.optimizer import OPTIMIZERS, OptimizerSpec
from training.schedule import SCHEDULES

register_feed_forward("relu2", lambda x: torch.relu(x).square(), gated=False, label="squared ReLU")


def build(groups, config):
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)


OPTIMIZERS.add("momentum", OptimizerSpec(build, moments=("momentum_buffer",)))


@SCHEDULES.register("halving")
def halving(at):
    return 0.5 ** (at.step - at.warmup)
"""


def noisy_case() -> Case:
    load_plugins([NOISY_TOPK])
    from mixwright_plugin_noisy_topk import NoisyTopKConfig

    router = NoisyTopKConfig(z_coef=0.01, balance_coef=0.02)
    return replace(MIXTRAL, router=router, last_expert_idle=False)


def parity_on(rank: int, world_size: int) -> list:
    jobs = [Job("noisy", layout, parse_layout(layout)) for layout in LAYOUTS]
    return list(run_jobs(jobs, torch.device("cpu"), cases={"noisy": noisy_case()}, steps=3))


@pytest.mark.slow
def test_noisy_topk_has_the_numbers_of_one_process_on_every_axis():
    results = run_ranks(parity_on, 2)[0]
    assert [result.job.layout for result in results] == list(LAYOUTS)
    for result in results:
        assert result.why_skipped is None and result.differences.within(TOLERANCES["fp64"]), result


def expect_hidden_weight_error(case: Case) -> None:
    """Build a router whose ``__init__`` creates a weight that its configuration does not name."""
    router = ROUTERS["noisy_topk"]
    init = router.__init__

    def with_hidden_weight(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        self.hidden = torch.nn.Parameter(torch.empty(2, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "__init__", with_hidden_weight)
        with pytest.raises(ModelError, match=r"^layers.0.ffn.router.hidden: expected no parameter of this name"):
            build_model(case.model, case.router, mesh_of_one(torch.device("cpu")), compute_dtype=torch.float64, seed=0)


def everything_else_on(rank: int, world_size: int, plugin: str) -> tuple:
    load_plugins([plugin, NOISY_TOPK])
    case = replace(noisy_case(), model=replace(MIXTRAL.model, expert_ffn="relu2"))
    expect_hidden_weight_error(case)
    config = configuration(case, ONE_PROCESS, rows=rows_for(1))
    config = replace(config, optim=OptimConfig(lr=0.1, kind="momentum", schedule="halving", warmup_steps=0))
    mesh = mesh_of_one(torch.device("cpu"))
    trial = Trial(case, config, mesh)
    history = [trial.train(0, 1)[0] for _ in range(3)]  # The same rows, so that the loss falls.
    router = trial.engine.parts[0].layers[0].ffn.router
    trained = dict(Trainable(trial.engine.parts, "all").weights)
    chosen = dict(Trainable(trial.engine.parts, ("router",)).weights)
    unclaimed = torch.nn.Parameter(torch.zeros(1))
    trial.engine.parts[0].layers[0].ffn.router.register_parameter("forgotten", unclaimed)
    with pytest.raises(ModelError, match=r"layers.0.ffn.router.forgotten: expected a parameter of the configured"):
        Trainable(trial.engine.parts, "all")
    # A parameter that a forward pass creates is found at the next optimizer step.
    with pytest.raises(ModelError, match=r"layers.0.ffn.router.forgotten: expected a parameter of the configured"):
        trial.engine.step(0.1)
    del trial.engine.parts[0].layers[0].ffn.router.forgotten
    # A checkpoint would not contain state that the plugin has not named.
    trial.engine.moments = ()
    with pytest.raises(ConfigError, match=r"^optim.kind=momentum: .* `moments` \[\], found \['momentum_buffer'\]$"):
        trial.train(2, 3)
    trial.engine.moments = ("momentum_buffer",)
    show_model(
        case.model, total_params=1, active_params=1, vocab_size=1, tokenizer="none", precision="fp64", device="cpu"
    )
    return (
        [step.loss for step in history],
        [step.router for step in history],
        {name: len(values) for name, values in history[0].telemetry.items()},
        sorted(trial.engine.tensors()),
        [name for name in trained if ".router." in name],
        sorted({name.rpartition(".")[2] for name in chosen}),
        float(router.noise_weight.detach().abs().sum()),
    )


def test_every_kind_of_plugin_trains_and_no_new_weight_is_frozen(tmp_path: Path):
    plugin = tmp_path / "everything_else.py"
    plugin.write_text(EVERYTHING_ELSE)
    losses, terms, telemetry, tensors, routers, chosen, moved = run_ranks(everything_else_on, 1, str(plugin))[0]
    layers = MIXTRAL.model.num_layers
    assert losses[2] < losses[0] and all(term > 0 for term in terms)
    assert telemetry == {"noise_std": layers}
    assert "momentum_buffer.layers.0.ffn.router.noise_weight" in tensors
    assert not any(name.startswith("exp_avg") for name in tensors)
    assert len(routers) == 2 * layers and chosen == ["noise_weight", "weight"]
    assert moved > 0  # it starts at 0
    assert "relu2" not in FEED_FORWARDS  # the plugin was loaded in the other process
