"""Models of other makers with random weights, tiny, on disk: what imports are tested on."""

from pathlib import Path
from typing import Any

import torch

from moe.model import ModelInputs, Transformer
from training.formats.reader import ModelReader, open_model

VOCAB = 53

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True, "rope_theta": 5e5}),
    "llama-geglu": ("Llama", {"hidden_act": "gelu"}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "mistral-mqa-odd": (
        "Mistral",
        {"sliding_window": None, "num_key_value_heads": 1, "hidden_size": 25, "head_dim": 6},
    ),
    "mixtral": ("Mixtral", {"sliding_window": None}),
    "mixtral-window": ("Mixtral", {"sliding_window": 4, "num_local_experts": 5, "num_experts_per_tok": 3}),
    "mixtral-tied": ("Mixtral", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
}
"""Class of transformers, and what differs from the common sizes. Rotary bases and epsilons are the families' own."""


def reference(case: str, vocab: int = VOCAB) -> Any:
    """transformers' model of `case`, with weights large enough that every part of the network matters."""
    import transformers

    family, changes = CASES[case]
    common = {
        "vocab_size": vocab, "hidden_size": 24, "intermediate_size": 19, "num_hidden_layers": 2, "head_dim": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "attn_implementation": "eager",
    }  # fmt: skip
    if family == "Mixtral":
        common |= {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    config = getattr(transformers, f"{family}Config")(**common | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if parameter.dim() == 1 else 0.25 * drawn)
    return model


def saved(case: str, directory: Path, vocab: int = VOCAB) -> Any:
    """`reference(case, vocab)`, after it was saved by transformers in `directory`."""
    model = reference(case, vocab)
    model.save_pretrained(directory)
    return model


def loaded(directory: Path) -> Any:
    """The model in `directory` as transformers finds it."""
    import transformers

    # Its grouped experts want rows of whole 16 bytes, which odd widths have not.
    config = transformers.AutoConfig.from_pretrained(directory)
    eager = {"experts_implementation": "eager"} if config.model_type == "mixtral" else {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **eager)


def filled(source: ModelReader | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Our model with the weights of `source`; NaN wherever it gave none."""
    if isinstance(source, Path):
        source = open_model(source)
    model = Transformer(source.model, source.router, dtype).to(dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    source.fill(model)
    return model


def tokens_of(length: int, rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Transformer, tokens_BS: torch.Tensor) -> torch.Tensor:
    return model(ModelInputs(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS))).logits_BSV
