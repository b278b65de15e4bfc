"""What `optim.train` chooses, and that nothing else moves.

Shapes: E experts, F expert hidden, D model.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from common.errors import ConfigError
from data.batch import Batch
from moe.accounting.flops import count_parameters, meta_model
from moe.config import AdapterConfig, ModelConfig, RouterConfig, split_adapter_name
from parallel.apply import build_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.distributed.harness import run_ranks
from training.checkpoint import checkpoint
from training.config import OptimConfig
from training.engine import NativeEngine
from training.step import train_step
from training.trainable import choose_trainable, describe_choice, trained_elements

MODEL = ModelConfig(
    dim=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12, num_experts=4, top_k=2, vocab_size=20,
    first_k_dense=1, num_shared_experts=1, expert_hidden_dim=6, init_std=0.3,
)  # fmt: skip
ROUTER = RouterConfig(kind="sigmoid_topk", bias_update_rate=0.01)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.5, max_grad_norm=1e-3)
WEIGHTS = ("w_gate", "w_up", "w_down")
MOE_LAYERS = (1, 2)
OF_EXPERT_3 = {f"layers.{layer}.ffn.experts.{weight}.3" for layer in MOE_LAYERS for weight in WEIGHTS}
ROUTERS = {f"layers.{layer}.ffn.router.weight" for layer in MOE_LAYERS}
STACKED = {name.removesuffix(".3") for name in OF_EXPERT_3}

CHOICES: dict[str, tuple[str | tuple[str, ...], set[str]]] = {
    "router": ("router", ROUTERS),
    "experts": ("experts", STACKED),
    "one expert": ("expert:3", OF_EXPERT_3),
    "router and one expert": (("router", "expert:3"), ROUTERS | OF_EXPERT_3),
    "glob": ("layers.*.attention.w[qk].*", {f"layers.{n}.attention.w{w}.weight" for n in range(3) for w in "qk"}),
    "one expert of one layer": ("layers.2.ffn.experts.w_up.1", {"layers.2.ffn.experts.w_up.1"}),
    "exact name": ("norm.weight", {"norm.weight"}),
    "all experts one by one": (tuple(f"expert:{e}" for e in range(4)), STACKED),
    "an expert and all of them": (("experts", "expert:1"), STACKED),
    "shared": ("*.shared.*", {f"layers.{n}.ffn.shared.{w}.weight" for n in MOE_LAYERS for w in WEIGHTS}),
}  # fmt: skip


def chosen(train: str | tuple[str, ...]) -> set[str]:
    choice = choose_trainable(meta_model(MODEL, ROUTER), train)
    return choice.whole | {f"{name}.{expert}" for name, some in choice.experts.items() for expert in some}


@pytest.mark.parametrize("case", CHOICES)
def test_patterns_choose_parameters_and_parts_of_stacked_ones(case):
    train, expected = CHOICES[case]
    assert chosen(train) == expected


def test_elements_that_train():
    model = meta_model(MODEL, ROUTER)
    assert trained_elements(model, choose_trainable(model, "all")) == count_parameters(model).total
    assert trained_elements(model, choose_trainable(model, ("router", "expert:3"))) == 2 * (4 * 8 + 3 * 6 * 8)


@pytest.mark.parametrize(
    ("train", "nearest"),
    [
        ("rooter", "router"),
        ("expert:4", "expert:[0-3]"),
        (("router", "layer.1.attention.wq.weight"), "layers.1.attention.wq.weight"),
        ("layers.*.atention.*", "layers.[012].attention.[a-z.]+"),
        ("expert:", "expert:0"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_name(train, nearest):
    pattern = train if isinstance(train, str) else train[1]
    with pytest.raises(ConfigError, match=r"expected all, router, experts, expert:<index> or a glob") as caught:
        choose_trainable(meta_model(MODEL, ROUTER), train)
    assert str(caught.value).startswith(f"optim.train={pattern}: ") and "\n" not in str(caught.value)
    assert re.search(f"the nearest is {nearest}$", str(caught.value)), caught.value


def test_a_dense_model_has_no_router():
    dense = replace(MODEL, num_experts=None, top_k=None, first_k_dense=0, num_shared_experts=0, expert_hidden_dim=None)
    for train in ("router", "experts", "expert:0"):
        with pytest.raises(ConfigError, match=f"^optim.train={train}: expected "):
            choose_trainable(meta_model(dense, RouterConfig()), train)


@pytest.mark.parametrize("value", ["", (), ("router", "")])
def test_an_empty_choice_is_refused(value):
    with pytest.raises(ValueError, match=r"^train=.*: expected all, router, experts"):
        OptimConfig(lr=1.0, train=value)


class Outcome(NamedTuple):
    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    moments: dict[str, torch.Size]
    norm: float
    norm_by_hand: float
    norms_2LF: torch.Tensor
    norms_2LF_by_hand: torch.Tensor
    gradients_left: int


def train_all_cases(rank: int, world: int) -> dict[str, Outcome]:
    return {case: steps_of(train) for case, (train, _) in CHOICES.items()}


def steps_of(train: str | tuple[str, ...]) -> Outcome:
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=1, expert=1))

    def engine_of(choice: str | tuple[str, ...]) -> NativeEngine:
        model = build_model(MODEL, ROUTER, mesh, compute_dtype=torch.float64, seed=1)
        return NativeEngine([model], replace(OPTIM, train=choice), mesh)

    engine = engine_of(train)
    initial = {name: tensor.clone() for name, tensor in engine.parts[0].state_dict().items()}
    first = train_step(engine, [batch(0)], ROUTER, 1e-2, measured=True)
    for step in (1, 2):
        assert train_step(engine, [batch(step)], ROUTER, 1e-2).norms_2LF is None
    final = {name: tensor.clone() for name, tensor in engine.parts[0].state_dict().items()}
    moments = {name: held.local.shape for name, held in engine.tensors().items() if not name.startswith("model.")}
    left = sum(parameter.grad is not None for parameter in engine.parts[0].parameters())
    return Outcome(
        initial, final, moments, first.grad_norm, *norms_by_hand(engine_of("all"), train, first.norms_2LF), left
    )


def norms_by_hand(
    engine: NativeEngine, train: str | tuple[str, ...], measured_2LF: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """From the gradients of a model of which everything trains, caught before the step uses them.

    Returns:
        The norm of all gradients, `measured_2LF`, and the expected norms of routers and experts.
    """
    caught = {}
    engine.step = lambda lr, squares: (
        caught.update({n: p.grad for n, p in engine.parts[0].named_parameters()}) or torch.zeros(())
    )
    train_step(engine, [batch(0)], ROUTER, 1e-2)
    total, squares_2LF = 0.0, torch.zeros(2, len(MOE_LAYERS), 1 + MODEL.num_experts, dtype=torch.float64)
    trains = chosen(train)
    for name, weight in engine.parts[0].named_parameters():
        for expert in range(4) if name in STACKED else [None]:
            part = name if expert is None else f"{name}.{expert}"
            gradient, value = (x if expert is None else x[expert] for x in (caught[name], weight.detach()))
            square = gradient.square().sum().item() if {name, part} & trains else 0.0
            total += square
            if name in STACKED | ROUTERS:
                layer, column = MOE_LAYERS.index(int(name[7])), 0 if expert is None else 1 + expert
                squares_2LF[:, layer, column] += torch.tensor([value.square().sum(), square])
    return total**0.5, measured_2LF, squares_2LF.sqrt()


def batch(step: int) -> Batch:
    tokens = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(step))
    zeros = torch.zeros(2, 8, dtype=torch.int64)
    positions = torch.arange(8).expand(2, 8).contiguous()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, zeros.int(), zeros.to(torch.uint8))


def test_only_what_was_chosen_changes_and_only_that_has_moments():
    """Three clipped steps with heavy weight decay, fp64: everything else is bitwise what it was."""
    [outcomes] = run_ranks(train_all_cases, 1)
    for case, outcome in outcomes.items():
        expected = CHOICES[case][1]
        for name, before in outcome.initial.items():
            after = outcome.final[name]
            if name in STACKED and name not in expected:
                for expert in range(4):
                    same = torch.equal(before[expert], after[expert])
                    assert same == (f"{name}.{expert}" not in expected), (case, name, expert)
            elif name.endswith("router.bias"):
                assert torch.equal(before, after) == (name.replace("bias", "weight") not in expected), (case, name)
            else:
                assert torch.equal(before, after) == (name not in expected), (case, name)
        shapes = {
            name: outcome.initial[name].shape if name in outcome.initial else outcome.initial[name[:-2]].shape[1:]
            for name in expected
        }
        assert outcome.moments == {
            f"{moment}.{name}": shape for name, shape in shapes.items() for moment in ("exp_avg", "exp_avg_sq")
        }, case
        assert outcome.norm == pytest.approx(outcome.norm_by_hand, rel=1e-12) and outcome.norm > OPTIM.max_grad_norm
        torch.testing.assert_close(outcome.norms_2LF, outcome.norms_2LF_by_hand, rtol=1e-12, atol=0)
        assert outcome.gradients_left == 0


ADAPTERS = {
    "attention and norms": (("attention.w[qv]",), ("norm.weight",), {"norm.weight"}),
    "router": (("router",), "all", set()),
    "shared": (("shared", "ffn.w_*"), "all", set()),
    "experts": (("experts",), "all", set()),
    "all and an expert": (("*",), ("expert:3",), OF_EXPERT_3),
}  # fmt: skip
"""Case -> `adapter.targets`, `optim.train`, and what trains besides the adapters."""


def train_adapters(rank: int, world: int, root: Path) -> dict[str, tuple]:
    """Train, save, and load into another model with the same base, which must then have the same weights."""
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=1, expert=1))
    found = {}
    for number, (case, (targets, train, _)) in enumerate(ADAPTERS.items()):
        adapter = AdapterConfig(kind="lora", rank=2, targets=targets)

        def engine_of(
            adapter: AdapterConfig = adapter, train: str | tuple[str, ...] = train, seed: int = 1
        ) -> NativeEngine:
            config = replace(MODEL, adapter=adapter)
            model = build_model(config, ROUTER, mesh, compute_dtype=torch.float64, seed=seed)
            return NativeEngine([model], replace(OPTIM, lr=0.1, train=train, weight_decay=0.5), mesh)

        engine = engine_of()
        initial = {name: tensor.clone() for name, tensor in engine.parts[0].state_dict().items()}
        train_step(engine, [batch(0)], ROUTER, 0.1)
        collect, with_gradient = engine.trainable.collect_gradients, set()

        def caught(collect=collect, with_gradient=with_gradient, engine=engine) -> None:
            with_gradient |= {name for name, p in engine.parts[0].named_parameters() if p.grad is not None}
            collect()

        engine.trainable.collect_gradients = caught
        train_step(engine, [batch(1)], ROUTER, 0.1)
        final = {name: tensor.clone() for name, tensor in engine.parts[0].state_dict().items()}
        saved = engine.tensors()
        path = checkpoint.save(root / str(number), 2, saved, {}, keep=1)
        resumed = engine_of()
        tensors = resumed.tensors()
        checkpoint.load(path, tensors)
        loaded = {name: tensor.clone() for name, tensor in resumed.parts[0].state_dict().items()}
        found[case] = initial, final, set(saved), with_gradient, loaded
    return found


def test_adapters_train_and_what_they_are_added_to_does_not(tmp_path):
    """Every trained weight moves; every other one stays, bitwise, has no gradient, and is in no checkpoint."""
    [outcomes] = run_ranks(train_adapters, 1, tmp_path)
    for case, (initial, final, saved, with_gradient, loaded) in outcomes.items():
        adapters = {name for name in initial if split_adapter_name(name)[1] is not None}
        named = ADAPTERS[case][2]
        stacked = {name.removesuffix(".3") for name in named if name.endswith(".3")}
        trained = adapters | stacked | (named - OF_EXPERT_3)
        buffers = {name for name in initial if name.endswith("router.bias")}
        assert adapters and with_gradient == trained, case
        assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == trained | buffers, case
        moments = {name.removeprefix("exp_avg.") for name in saved if name.startswith("exp_avg.")}
        assert moments == adapters | named, case
        for name, before in initial.items():
            moved = not torch.equal(before, final[name])
            if name in buffers:
                assert moved == any("router.adapter" in adapter for adapter in adapters), (case, name)
            elif name in stacked:
                same = [torch.equal(a, b) for a, b in zip(before, final[name], strict=True)]
                assert same == [True, True, True, False], (case, name)
            else:
                assert moved == (name in trained), (case, name)
            assert torch.equal(final[name], loaded[name]), (case, name)


def test_the_start_says_what_trains_and_what_does_not():
    adapter = AdapterConfig(kind="lora", rank=2, targets=("attention.wq", "experts.w_up"))
    model = meta_model(replace(MODEL, adapter=adapter), ROUTER)
    trains, frozen = describe_choice(model, choose_trainable(model, ("norm.weight", "expert:1")))
    experts, others = 2 * 6 * 8, 3 * 2 * 6 * 8
    assert trains == (
        f"trains: attention.wq.adapter {3 * 2 * 16}, ffn.experts.w_gate {experts}, ffn.experts.w_up {experts}, "
        f"ffn.experts.w_down {experts}, ffn.experts.adapters.w_up {2 * 4 * 2 * 14}, norm 8: 616 of "
        f"{count_parameters(model).total:,} parameters (20.10%)"
    )
    assert f"attention.wq {3 * 64}, " in frozen and f"ffn.experts.w_up {others}" in frozen
    assert "adapter" not in frozen and ", norm" not in frozen


def test_a_pattern_does_not_choose_parameters_of_adapters():
    model = meta_model(replace(MODEL, adapter=AdapterConfig(kind="lora", targets=("attention",))), ROUTER)
    with pytest.raises(ConfigError, match=r"^optim.train=\*.adapter.a: expected "):
        choose_trainable(model, ("*.adapter.a",))
