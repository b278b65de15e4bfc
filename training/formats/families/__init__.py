"""The families of models in Hugging Face's format: one module for each line of models, one class for each family.

In reading order:

- `family`: the base class. It reads and writes what all families have in common.
- `rotary`: the keys of the rotary embedding, in the old and the new spelling.
- `experts`: the keys of MoE layers.
- `llama`: Llama, Mistral and Mixtral.
- `deepseek`: DeepSeekMoE.
"""

from training.formats.families.deepseek import Deepseek
from training.formats.families.family import Family
from training.formats.families.llama import Llama, Mistral, Mixtral

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llama(), Mistral(), Mixtral(), Deepseek())}
"""`model_type` -> family. Export takes the first one that computes the model."""
