"""The families of models in Hugging Face's format: one module for each line of models, one class for each family.

In reading order:

- `family`: the base class. It reads and writes what all families have in common.
- `rotary`: the keys of the rotary embedding, in the old and the new spelling.
- `experts`, `softmax`: the keys of MoE layers, and of the router of most families.
- `llama`: Llama, Mistral and Mixtral.
- `qwen`: Qwen2 and Qwen3, dense and with MoE layers.
- `olmoe`: OLMoE.
- `deepseek`: DeepSeekMoE.
- `latent`: DeepSeek-V2 and DeepSeek-V3.
- `fp8`: released weights in FP8.
"""

from training.formats.families.deepseek import Deepseek
from training.formats.families.family import Family
from training.formats.families.latent import DeepseekV2, DeepseekV3
from training.formats.families.llama import Llama, Mistral, Mixtral
from training.formats.families.olmoe import Olmoe
from training.formats.families.qwen import Qwen2, Qwen2Moe, Qwen3, Qwen3Moe

_ALL = (
    *(Llama(), Mistral(), Qwen2(), Qwen3()),
    *(Mixtral(), Olmoe(), Qwen2Moe(), Qwen3Moe(), Deepseek(), DeepseekV2(), DeepseekV3()),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
"""`model_type` -> family. Export takes the first one that computes the model."""
