"""The keys and tensor names of MoE layers that several families have in common."""

from collections.abc import Callable, Sequence

from moe.config import ModelConfig
from training.formats.fields import Fields

PER_EXPERT = {
    "layers.N.ffn.router.weight": "model.layers.{n}.mlp.gate.weight",
    "layers.N.ffn.experts.w_gate": "model.layers.{n}.mlp.experts.{e}.gate_proj.weight",
    "layers.N.ffn.experts.w_up": "model.layers.{n}.mlp.experts.{e}.up_proj.weight",
    "layers.N.ffn.experts.w_down": "model.layers.{n}.mlp.experts.{e}.down_proj.weight",
}
"""One tensor per expert: the names in released files since Qwen1.5-MoE."""
FUSED = {
    "layers.N.ffn.router.weight": "model.layers.{n}.mlp.gate.weight",
    "layers.N.ffn.experts.w_gate": "model.layers.{n}.mlp.experts.gate_up_proj",
    "layers.N.ffn.experts.w_up": "model.layers.{n}.mlp.experts.gate_up_proj",
    "layers.N.ffn.experts.w_down": "model.layers.{n}.mlp.experts.down_proj",
}
"""Experts stacked, with the gate's rows before the up projection's: the names in transformers 5's modules. Some files
have them too."""
FUSED_PARTS = {"layers.N.ffn.experts.w_gate": (0, 2), "layers.N.ffn.experts.w_up": (1, 2)}
"""As `training.formats.foreign_tensors.Format.parts`."""
MAX_LAYERS = 10_000
"""The most layers of a model whose file can say for each layer whether it is a MoE layer."""


def shared_names(module: str) -> dict[str, str]:
    """Return the names of the tensors of the shared experts, which are one network: the module `mlp.<module>`."""
    return {
        f"layers.N.ffn.shared.w_{part}.weight": f"model.layers.{{n}}.mlp.{module}.{part}_proj.weight"
        for part in ("gate", "up", "down")
    }


def read_experts(fields: Fields, *keys: str) -> int:
    """Return the number of experts, at the first of `keys` or at another one, which is its alias in transformers."""
    given = [(key, fields.integer(key)) for key in keys if key in fields.raw] or [(keys[0], fields.integer(keys[0]))]
    for key, number in given:
        fields.expect(number == given[0][1], key, number, f"{given[0][1]}, as {given[0][0]}")
    return given[0][1]


def read_top_k(fields: Fields, normalize: bool) -> int:
    """Return the number of experts per token.

    Args:
        normalize: whether the weights are divided by their sum.
    """
    top_k = fields.integer("num_experts_per_tok")
    expected = "at least 2 (weights are renormalised to sum 1)"
    fields.expect(top_k > 1 or not normalize, "num_experts_per_tok", top_k, expected)
    return top_k


def read_moe_layers(fields: Fields, key: str, is_moe: Callable[[int], bool]) -> dict[str, int]:
    """Return `first_k_dense` and `moe_every`.

    Args:
        key: the key that a message names.
        is_moe: whether the layer with this number, from 0, is a MoE layer.

    Raises:
        ModelError: these two keys cannot describe the layers.
    """
    layers = fields.integer("num_hidden_layers")
    fields.expect(layers <= MAX_LAYERS, "num_hidden_layers", layers, f"at most {MAX_LAYERS}")
    pattern = moe_pattern(list(filter(is_moe, range(layers))), layers)
    expected = "that, after some dense layers, every n-th layer is a MoE layer"
    fields.expect(pattern, key, fields.get(key), expected)
    assert pattern is not None
    return dict(zip(("first_k_dense", "moe_every"), pattern, strict=True))


def moe_pattern(layers: Sequence[int], num_layers: int) -> tuple[int, int] | None:
    """Return the `first_k_dense` and `moe_every` with which exactly `layers` are MoE layers, or None if there are none.

    >>> moe_pattern([1, 2, 3], 4), moe_pattern([1, 3], 4), moe_pattern([2, 4], 5), moe_pattern([0, 1, 3], 4)
    ((1, 1), (0, 2), (1, 2), None)

    Args:
        layers: the numbers of the MoE layers, ascending.
    """
    if not layers:
        return None
    first = layers[0]
    every = layers[1] - first if len(layers) > 1 else num_layers - first
    holds = every <= first + 1 and list(layers) == list(range(first, num_layers, every))
    return (first - every + 1, every) if holds else None


def moe_layers(model: ModelConfig) -> tuple[int, int]:
    """Return the `first_k_dense` and `moe_every` of the model, or the smallest ones with the same MoE layers."""
    pattern = moe_pattern(list(filter(model.is_moe_layer, range(model.num_layers))), model.num_layers)
    assert pattern is not None
    return pattern
