"""What a configuration computes, for the check that another format describes the same model.

Two configurations can be different and compute the same: a list of equal windows and one window, `normalize: auto` and
`normalize: true`. A format computes a model if the configuration that is written in this format and read again has the
same meaning. A key that the format has no place for is read back with another value, so it cannot be lost in silence.
"""

from dataclasses import fields
from typing import Any

from common.errors import ModelError, require
from moe.config import ModelConfig, RouterConfig
from training.formats.fields import shown

WITHOUT_MEANING = frozenset({"expert_kernel", "init_std"})
"""Keys of `ModelConfig` that do not change what trained weights compute."""
LAYER_KEYS = ("model.first_k_dense", "model.moe_every")
"""Keys that say together which layers are MoE layers."""
SHARED_KEYS = ("model.num_shared_experts", "model.shared_hidden_dim")
"""Keys that say together how wide the network of the shared experts is."""


def meaning(model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    """Return key -> value for every key that determines what the model computes.

    Keys with different values and one meaning have one value here. `router.capacity_factor` and `router.jitter` are not
    among the keys, because generation uses neither.
    """
    values = {f"model.{field.name}": getattr(model, field.name) for field in fields(model)}
    values = {key: value for key, value in values.items() if key.removeprefix("model.") not in WITHOUT_MEANING}
    windows = [model.window(layer) for layer in range(model.num_layers)]
    values["model.sliding_window"] = windows[0] if len(set(windows)) == 1 else windows
    values |= {"model.rotary_dim": model.rotary_width, "model.v_head_dim": model.value_dim}
    if model.top_k is None:
        return values
    layers = list(filter(model.is_moe_layer, range(model.num_layers)))
    values |= dict.fromkeys(LAYER_KEYS, layers) | dict.fromkeys(SHARED_KEYS, model.shared_width)
    values |= {"model.expert_hidden_dim": model.expert_width, "model.expert_ffn": model.expert_kind}
    if len(layers) == model.num_layers:  # No layer is dense.
        del values["model.hidden_dim"], values["model.ffn"]
    values |= {f"router.{key}": getattr(router, key) for key in router.MEANING}
    values["router.normalize"] = router.normalizes(model.top_k)
    if router.num_groups == router.topk_groups:  # A token that can use all groups is not limited by them.
        values |= {"router.num_groups": None, "router.topk_groups": None}
    return values


def differences(
    model: ModelConfig, router: RouterConfig, read: tuple[ModelConfig, RouterConfig], format_name: str
) -> list[str]:
    """Return one message for each key in which a model and the one that a format describes are different.

    Args:
        read: the configuration that was written in the format, and read again.
        format_name: the name of the format, for the messages.
    """
    ours, theirs = meaning(model, router), meaning(*read)
    messages = []
    # A key that only one of them has depends on another key, which is then different too.
    for key in (key for key in ours if key in theirs and ours[key] != theirs[key]):
        section, _, field = key.partition(".")
        found = getattr(model if section == "model" else router, field)
        expected = theirs[key]
        if key in LAYER_KEYS + SHARED_KEYS:
            expected = getattr(read[0], field)
            if found == expected:  # The other of the two keys is different.
                continue
        messages.append(f"{key}={shown(found)}: expected {shown(expected)}, as in {format_name}")
    return messages


def expect_key(holds: bool, key: str, value: object, expected: str, format_name: str) -> None:
    """Raise ModelError for a key of Mixwright's configuration that a format cannot describe, unless `holds`."""
    require(holds, ModelError, f"{key}={shown(value)}: expected {expected}, as in {format_name}")
