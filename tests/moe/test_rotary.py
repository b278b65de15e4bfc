"""Rotary frequencies against transformers' functions, partial rotation, and what the configuration refuses."""

import re

import pytest
import torch

from common.errors import ConfigError
from common.strict import from_dict, to_dict
from moe.config import ModelConfig, RopeScaling
from moe.token_context import apply_rotary, rotary_frequencies, rotary_table

CPU = torch.device("cpu")
YARN = {"kind": "yarn", "factor": 40.0, "original_positions": 4096}
SCALINGS = [
    {"kind": "linear", "factor": 4.0},
    {"kind": "llama3", "factor": 8.0, "original_positions": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"kind": "llama3", "factor": 3.0, "original_positions": 64, "low_freq_factor": 0.5, "high_freq_factor": 5.5},
    YARN,
    YARN | {"factor": 1.0},
    YARN | {"mscale": 0.707, "mscale_all_dim": 0.9, "beta_fast": 20.0, "beta_slow": 2.5},
    YARN | {"original_positions": 8, "truncate": False},
    YARN | {"original_positions": 7, "attention_factor": 0.7},
    YARN | {"original_positions": 1_000_000, "factor": 2.0},
]
FOREIGN = {"kind": "rope_type", "original_positions": "original_max_position_embeddings"}
"""Keys that transformers calls by other names."""


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(map(str, scaling.values())))
@pytest.mark.parametrize(("width", "theta"), [(64, 1e4), (22, 5e5), (2, 1e4)])
def test_frequencies_and_factor_equal_those_of_transformers(scaling, width, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {FOREIGN.get(key, key): value for key, value in scaling.items()} | {"rope_theta": theta}
    config = transformers.LlamaConfig(head_dim=width, rope_parameters=rope, max_position_embeddings=160_000)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["kind"]](config, CPU)
    ours = RopeScaling(**scaling)
    found = rotary_frequencies(width, theta, ours, torch.float32, CPU)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert ours.rotary_factor == pytest.approx(factor, rel=1e-12)

    positions_BS = torch.tensor([[0, 3, 999]])
    cos, sin = rotary_table(positions_BS, width, theta, torch.float64, ours)
    angles = torch.outer(positions_BS[0].double(), rotary_frequencies(width, theta, ours, torch.float64, CPU))
    torch.testing.assert_close(cos, torch.cat((angles, angles), 1).cos()[None, None] * factor)
    torch.testing.assert_close(sin, torch.cat((angles, angles), 1).sin()[None, None] * factor)


def test_the_magnitude_of_deepseek():
    """mscale 0.1 · 0.707 · ln 40 + 1 of DeepSeek-V2's code, whose square is a factor of its softmax scale."""
    scaling = RopeScaling(**YARN, mscale=0.707, mscale_all_dim=0.707)
    assert scaling.magnitude(0.707) == pytest.approx(1.2608038, rel=1e-7)
    assert scaling.rotary_factor == 1.0


def test_only_the_first_numbers_of_a_head_turn():
    x_BHSC = torch.randn(2, 3, 5, 10, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.randint(0, 100, (2, 5)), 4, 100.0, torch.float64)
    expected = torch.cat((apply_rotary(x_BHSC[..., :4], table), x_BHSC[..., 4:]), -1)
    found = apply_rotary(x_BHSC, table)
    assert torch.equal(found, expected) and not torch.equal(found[..., :4], x_BHSC[..., :4])
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, x_BHSC, weight)[0] for y in (found, expected)]
    assert torch.equal(*gradients)


MODEL = ModelConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=6, hidden_dim=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 3}, "rotary_dim=3: expected an even number from 2 to head_dim=6, or null"),
        ({"rotary_dim": 8}, "rotary_dim=8: expected an even number from 2"),
        ({"rope_scaling": {"kind": "dynamic", "factor": 2}}, "rope_scaling.kind=dynamic: expected one of linear, "),
        ({"rope_scaling": {"kind": "longrope", "factor": 2}}, "rope_scaling.kind=longrope: expected one of linear, "),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "rope_scaling.factor=0.5: expected a number >= 1"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2}}, "rope_scaling.original_positions=null: expected a number"),
        ({"rope_scaling": SCALINGS[0] | {"mscale": 1.0}}, "rope_scaling.mscale=1.0: expected null with kind=linear"),
        ({"rope_scaling": SCALINGS[0] | {"truncate": False}}, "rope_scaling.truncate=false: expected true with"),
        ({"rope_scaling": SCALINGS[1] | {"low_freq_factor": 4}}, "rope_scaling.low_freq_factor=4.0: expected less"),
        ({"rope_scaling": YARN | {"beta_slow": 32}}, "rope_scaling.beta_slow=32.0: expected less than beta_fast=32"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "rope_scaling.mscale_all_dim=null: expected a number > 0 beside"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, "rope_scaling.beta_fast=0.0: expected a number > 0"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta=1.0: expected a number > 1 with"),
        ({"rope_scaling": YARN | {"facor": 2}}, "rope_scaling.facor=2: unknown key; the nearest valid key is model."),
        ({"rope_scaling": 3}, "rope_scaling=3: expected a section of keys or null"),
    ],
)
def test_what_the_configuration_refuses(changes, message):
    with pytest.raises(ConfigError, match=f"^model.{re.escape(message)}"):
        from_dict(ModelConfig, to_dict(MODEL) | changes, "model")
