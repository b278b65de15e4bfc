"""Tiny Hugging Face models with random weights, on which imports and exports are tested."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe.config import RouterConfig
from moe.model import ModelInputs, Transformer
from training.formats.families import FAMILIES
from training.formats.foreign_tensors import Format, list_pieces, split_halves, tensor_shapes
from training.formats.reader import ModelReader, open_model

VOCAB = 53
DENSE = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Prefixes of transformers' classes of dense models."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True, "rope_theta": 5e5}),
    "llama-geglu": ("Llama", {"hidden_act": "gelu"}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0}}),
    "llama-3.1": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mixtral-yarn": ("Mixtral", {"rope_parameters": YARN}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "mistral-mqa-odd": (
        "Mistral",
        {"sliding_window": None, "num_key_value_heads": 1, "hidden_size": 25, "head_dim": 6},
    ),
    "mixtral": ("Mixtral", {"sliding_window": None}),
    "mixtral-window": ("Mixtral", {"sliding_window": 4, "num_local_experts": 5, "num_experts_per_tok": 3}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 3, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 6}),
    "qwen3-bias": ("Qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "llama-bias": ("Llama", {"attention_bias": True, "num_key_value_heads": 3}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 3}),
    "olmoe-normalised": ("Olmoe", {"norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 6}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 11,
            "shared_expert_intermediate_size": 7,
        },
    ),
    "qwen2-moe-dense-layer": (
        "Qwen2Moe",
        {"mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False, "moe_intermediate_size": 9},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 6,
            "moe_intermediate_size": 11,
        },
    ),
    "qwen3-moe-dense-layers": (
        "Qwen3Moe",
        {"num_hidden_layers": 4, "mlp_only_layers": [0, 2], "moe_intermediate_size": 9, "tie_word_embeddings": True},
    ),
    "mixtral-tied": ("Mixtral", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
}
"""Case -> (prefix of transformers' classes, differences from the common sizes). Theta and epsilon are each family's
defaults."""
_SLOW = """
llama-linear mixtral-yarn llama-bias qwen2-yarn-tied qwen3-bias olmoe-normalised qwen2-moe-dense-layer
qwen3-moe-dense-layers
"""
SLOW_CASES = frozenset(_SLOW.split())
"""Cases that the quick tests leave out. Another case has the same family, or another family the same part."""


def cases(names: Iterable[str] = CASES) -> list[Any]:
    """Return the names of cases as parameters of a test, the slow ones with their mark."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CASES else name for name in names]


_NOT_IN_MISTRALS_FORMAT = {"rope_parameters", "attention_bias", "hidden_act"}
MISTRAL_CASES = [
    case
    for case, (family, changes) in CASES.items()
    if family in ("Llama", "Mistral", "Mixtral") and not _NOT_IN_MISTRALS_FORMAT & changes.keys()
]
"""Cases that Mistral's own format describes."""


def reference_model(case: str, vocab: int = VOCAB) -> Any:
    """Return transformers' model of `case`. Its weights are large enough that every part of the network matters."""
    import transformers

    family, changes = CASES[case]
    common = {
        "vocab_size": vocab, "hidden_size": 24, "intermediate_size": 19, "num_hidden_layers": 2, "head_dim": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "attn_implementation": "eager",
    }  # fmt: skip
    if family not in DENSE:
        experts = "num_local_experts" if family == "Mixtral" else "num_experts"
        common |= {experts: 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    if family == "Olmoe":
        del common["head_dim"]
        common |= {"eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{family}Config")(**common | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if parameter.dim() == 1 else 0.25 * drawn)
    return model


def save_reference(case: str, directory: Path, vocab: int = VOCAB) -> Any:
    """Save transformers' model of `case` in `directory`, and return it."""
    model = reference_model(case, vocab)
    model.save_pretrained(directory)
    return model


def load_reference(directory: Path) -> Any:
    """Load the model in `directory` with transformers."""
    import transformers

    # transformers' grouped experts need rows of a multiple of 16 bytes. The odd widths do not have such rows.
    config = transformers.AutoConfig.from_pretrained(directory)
    eager = {"experts_implementation": "eager"} if FAMILIES[config.model_type].moe else {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **eager)


def load_model(source: ModelReader | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Return Mixwright's model with the weights of `source`. An element that the reader does not fill is NaN."""
    reader = open_model(source) if isinstance(source, Path) else source
    model = Transformer(reader.model, reader.router, dtype).to(dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    reader.fill(model)
    return model


def random_tokens(length: int, rows: int = 2, seed: int = 1) -> torch.Tensor:
    """Return token ids [rows, length]."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Transformer, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return Mixwright's logits [B, S, V]. Each row is one document."""
    return model(ModelInputs(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS))).logits_BSV


def gradients_by_our_names(reference: Any, model: Transformer, form: Format) -> dict[str, torch.Tensor]:
    """Return the gradients of `reference`, whose parameters have the names of `form`, under Mixwright's names."""
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in reference.named_parameters()
    }
    result = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for piece in list_pieces(tensor_shapes(model.config, RouterConfig()), form, model.config.head_dim):
        ours = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        shape = piece.shape[len(piece.shape) - len(piece.foreign_shape) :]
        theirs = tuple(slice(o, o + n) for o, n in zip(piece.foreign_offset, shape, strict=True))
        gradient = gradients[piece.foreign_name][theirs].reshape(piece.shape)
        result[piece.name][ours] = gradient if piece.pairs is None else split_halves(gradient, piece.pairs)
    return result


def assert_trains_as(reference: Any, model: Transformer, form: Format, length: int = 17) -> None:
    """Check that `model` has the logits and gradients of `reference`, and its losses over ten steps of AdamW.

    Args:
        reference: a model whose call returns an object with `logits`, in fp32 or fp64.
        form: the names of its parameters.
        length: of the rows of tokens.
    """
    tokens = random_tokens(length)
    logits_BSV = logits_of(model, tokens)
    torch.testing.assert_close(logits_BSV.double(), reference(tokens).logits.double(), rtol=0, atol=1e-5)

    weight_BSV = torch.randn(logits_BSV.shape, generator=torch.Generator().manual_seed(2))
    (logits_BSV * weight_BSV).sum().backward()
    (reference(tokens).logits * weight_BSV).sum().backward()
    expected = gradients_by_our_names(reference, model, form)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm(), (name, error)

    optimizers = [torch.optim.AdamW(trained.parameters(), lr=3e-3) for trained in (model, reference)]
    losses = []
    for _ in range(10):
        row = []
        for forward, optimizer in zip(
            (lambda x: logits_of(model, x), lambda x: reference(x).logits), optimizers, strict=True
        ):
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            row.append(loss.item())
        losses.append(row)
    actual, theirs = torch.tensor(losses).T
    torch.testing.assert_close(actual, theirs, rtol=0, atol=2e-5)
    assert actual[-1] < actual[0] - 0.5
