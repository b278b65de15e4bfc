"""Low-rank adapters in the model: their start, their product, which weights have them, and what trains beside them.

Shapes: R rows, I input and O output width of a weight, r rank, E experts.
"""

from dataclasses import replace
from math import sqrt

import pytest
import torch

from common.errors import ConfigError
from moe.accounting.flops import meta_model
from moe.config import AdapterConfig, ModelConfig, RouterConfig, split_adapter_name
from moe.init import init_parameters
from moe.low_rank import LowRank
from moe.model import ModelInputs, Transformer
from moe.noise import noise_keys

MODEL = ModelConfig(
    dim=12, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=4, hidden_dim=10, num_experts=4, top_k=2, vocab_size=20,
    first_k_dense=1, num_shared_experts=1, expert_hidden_dim=6, init_std=0.3,
)  # fmt: skip
ROUTER = RouterConfig(kind="sigmoid_topk", bias_update_rate=0.01)
EVERYTHING = AdapterConfig(kind="lora", rank=3, alpha=5.0, targets=("*",))
DORA = replace(EVERYTHING, targets=("attention", "router", "shared", "ffn.w_*"), scaling="rslora", dora=True)
INPUTS = ModelInputs(torch.arange(14).view(2, 7), torch.arange(7).expand(2, 7))


def built(adapter: AdapterConfig | None, dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    model = Transformer(replace(MODEL, adapter=adapter, **changes), ROUTER, dtype).to(dtype)
    init_parameters(model, 3)
    return model


def randomize(model: Transformer) -> None:
    """Give the factors B and the magnitudes random values."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if split_adapter_name(name)[1] in ("b", "magnitude"):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data += 0.2 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("adapter", [EVERYTHING, DORA], ids=["lora", "dora"])
def test_the_first_output_is_that_of_the_model_without_adapters_bit_for_bit(adapter, dtype):
    # The model with adapters never uses kernels that read several weights of the experts at once.
    plain = built(None, dtype, expert_kernel="loop")
    adapted = built(adapter, dtype, expert_kernel="loop")
    weights = dict(plain.named_parameters())
    assert all(torch.equal(weights[n], p) for n, p in adapted.named_parameters() if n in weights)
    assert torch.equal(plain(INPUTS).logits_BSV, adapted(INPUTS).logits_BSV)
    for first, second in zip(plain(INPUTS).stats, adapted(INPUTS).stats, strict=True):
        assert torch.equal(first, second)


def merged_by_hand(model: Transformer, scale: float) -> dict[str, torch.Tensor]:
    """Return all weights without adapters, W + s B A computed element by element."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    merged = {name: p.clone() for name, p in parameters.items() if split_adapter_name(name)[1] is None}
    for name, a in parameters.items():
        weight, part = split_adapter_name(name)
        if part != "a":
            continue
        b, magnitude = parameters[name[:-1] + "b"], parameters.get(name[:-1] + "magnitude")
        stacks = [(merged[weight], a, b)] if a.dim() == 2 else list(zip(merged[weight], a, b, strict=True))
        for matrix_OI, a_rI, b_Or in stacks:
            for o in range(len(matrix_OI)):
                for i in range(matrix_OI.shape[1]):
                    matrix_OI[o, i] += scale * sum(b_Or[o, k] * a_rI[k, i] for k in range(len(a_rI)))
                if magnitude is not None:
                    matrix_OI[o] *= magnitude[o] / sqrt(sum(x * x for x in matrix_OI[o].tolist()))
    return merged


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [(EVERYTHING, 5 / 3), (replace(EVERYTHING, scaling="rslora"), 5 / sqrt(3)), (DORA, 5 / sqrt(3))],
    ids=["lora", "rslora", "dora"],
)
def test_the_output_and_the_routing_are_those_of_the_merged_weights(adapter, scale):
    """fp64, every kind of weight; the balancing bias is not 0."""
    adapted, plain = built(adapter, torch.float64), built(None, torch.float64)
    randomize(adapted)
    for model in (adapted, plain):
        for name, buffer in model.named_buffers():
            if name.endswith("router.bias"):
                buffer.copy_(torch.tensor([0.1, -0.2, 0.05, 0.0]))
    plain.load_state_dict(merged_by_hand(adapted, scale), strict=False)
    expected, found = plain(INPUTS), adapted(INPUTS)
    torch.testing.assert_close(found.logits_BSV, expected.logits_BSV, rtol=1e-11, atol=1e-12)
    assert torch.equal(found.stats.experts_BSK, expected.stats.experts_BSK)
    assert (found.logits_BSV - built(None, torch.float64)(INPUTS).logits_BSV).abs().max() > 0.1


def test_equal_experts_stay_equal_until_their_adapters_differ():
    """Rows of the router that are equal, with equal rows of B, tie exactly; with other rows of B they do not."""
    model = built(replace(EVERYTHING, targets=("router",)), torch.float32)
    router = model.layers[1].ffn.router
    router.weight.data[2] = router.weight.data[0]
    randomize(model)
    x_BSD = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))
    router.adapter.b.data[2] = router.adapter.b.data[0]
    logits_BSE = router.compute_logits(x_BSD, None)
    assert torch.equal(logits_BSE[..., 0], logits_BSE[..., 2])
    router.adapter.b.data[2] += 0.5
    logits_BSE = router.compute_logits(x_BSD, None)
    weight_ED = router.weight + router.adapter.scale * router.adapter.b @ router.adapter.a
    torch.testing.assert_close(logits_BSE, x_BSD @ weight_ED.T)
    assert not torch.equal(logits_BSE[..., 0], logits_BSE[..., 2])


def test_the_factors_start_as_documented_and_depend_on_names_only():
    model, other = built(EVERYTHING), built(replace(EVERYTHING, targets=("experts.w_up", "router")))
    for name, parameter in model.named_parameters():
        if split_adapter_name(name)[1] == "a":
            bound = 1 / sqrt(parameter.shape[-1])
            assert parameter.abs().max() <= bound and parameter.std().item() == pytest.approx(
                bound / sqrt(3), rel=0.25
            ), name
        elif split_adapter_name(name)[1] == "b":
            assert not parameter.any(), name
    experts_ErI = model.get_parameter("layers.1.ffn.experts.adapters.w_up.a")
    assert not torch.equal(experts_ErI[0], experts_ErI[1])
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], p) for name, p in other.named_parameters())
    norms_O = torch.linalg.vector_norm(built(DORA).layers[0].attention.wq.weight, dim=1)
    assert torch.equal(built(DORA).layers[0].attention.wq.adapter.magnitude, norms_O)


def adapted_weights(*targets: str) -> set[str]:
    model = meta_model(replace(MODEL, adapter=replace(EVERYTHING, targets=targets)), ROUTER)
    return {split_adapter_name(name)[0] for name, _ in model.named_parameters() if split_adapter_name(name)[1] == "a"}


def test_patterns_choose_weights_by_parts_of_their_names():
    def attention(*names: str, layers: str = "012") -> set[str]:
        return {f"layers.{layer}.attention.{name}.weight" for layer in layers for name in names}

    assert adapted_weights("attention") == attention("wq", "wk", "wv", "wo")
    assert adapted_weights("attention.wq", "wv") == attention("wq", "wv")
    assert adapted_weights("router") == {f"layers.{layer}.ffn.router.weight" for layer in (1, 2)}
    assert adapted_weights("experts.w_up") == {f"layers.{layer}.ffn.experts.w_up" for layer in (1, 2)}
    assert adapted_weights("layers.2.*.w[qk]") == attention("wq", "wk", layers="2")
    matrices = ("w_gate", "w_up", "w_down")
    assert adapted_weights("0.ffn") == {f"layers.0.ffn.{name}.weight" for name in matrices}
    assert adapted_weights("shared") == {f"layers.{n}.ffn.shared.{name}.weight" for n in (1, 2) for name in matrices}
    everything = {
        name for name, p in meta_model(MODEL, ROUTER).named_parameters() if p.dim() > 1 and name.startswith("layers")
    }
    assert adapted_weights("*") == everything


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("attention", "rooter")}, "^adapter.targets=rooter: .*matches nothing.*the nearest is router$"),
        ({"targets": ("head",)}, "^adapter.targets=head: .*matches nothing"),
        ({"targets": ("experts",), "dropout": 0.1}, "^adapter.dropout=0.1: expected 0 with an adapter of layers.1.ffn"),
        ({"targets": ("experts",), "dora": True}, "^adapter.dora=true: expected false with an adapter of layers.1.ffn"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        meta_model(replace(MODEL, adapter=replace(EVERYTHING, **changes)), ROUTER)


def test_dropout_is_drawn_for_each_token_and_only_in_training():
    """Each weight of each layer has its own; the mean of the outputs is that without dropout."""
    adapter = replace(EVERYTHING, targets=("attention", "router", "shared", "ffn.w_*"), dropout=0.25)
    model, plain = built(adapter, torch.float64), built(replace(adapter, dropout=0.0), torch.float64)
    randomize(model)
    randomize(plain)
    keys_BS = noise_keys(7, torch.arange(14).view(2, 7))
    with pytest.raises(ValueError, match=r"^adapter.dropout=0.25: expected noise keys of the tokens in training"):
        model(INPUTS)
    first = model(INPUTS._replace(noise_keys_BS=keys_BS)).logits_BSV
    assert torch.equal(first, model(INPUTS._replace(noise_keys_BS=keys_BS)).logits_BSV)
    assert not torch.equal(first, model(INPUTS._replace(noise_keys_BS=keys_BS + 1)).logits_BSV)
    assert torch.equal(model.eval()(INPUTS).logits_BSV, plain.eval()(INPUTS).logits_BSV)
    masks = []
    for layer in (0, 1):
        map_ = model.train().layers[layer].attention.wq
        x_BSD = torch.ones(1, 4000, 12, dtype=torch.float64)
        low = map_(x_BSD, noise_keys(7, torch.arange(4000).view(1, -1)))
        expected = map_.eval()(x_BSD)
        torch.testing.assert_close(low.mean(dim=1), expected.mean(dim=1), rtol=0, atol=0.03)
        masks.append(low - expected)
    assert (masks[0][0, 0] - masks[0][0, 1]).abs().max() > 0.01
    assert not torch.equal(masks[0].abs() > 0.1, masks[1].abs() > 0.1)


def test_adapters_with_the_same_values_draw_other_dropout_by_their_names():
    keys_BS, x_BSD = noise_keys(7, torch.arange(8).view(1, -1)), torch.ones(1, 8, 6)
    config, outputs = replace(EVERYTHING, dropout=0.5), []
    for name in ("layers.0.attention.wq", "layers.1.attention.wq", "layers.0.attention.wq"):
        adapter = LowRank((5, 6), config, name)
        for parameter in adapter.parameters():
            torch.nn.init.ones_(parameter)
        outputs.append(adapter(x_BSD, torch.zeros(1, 8, 5), torch.zeros(5, 6), noise_keys_BS=keys_BS))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("rank", 2**31), ("alpha", 0.0), ("dropout", 1.0), ("targets", ()), ("targets", ("",))],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"^{field}=.*: expected "):
        AdapterConfig(**{field: value})
