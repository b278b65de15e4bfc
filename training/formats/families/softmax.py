"""What the families have in common that choose a token's experts by the softmax of their logits."""

from typing import Any, ClassVar

from moe.config import ModelConfig, RouterConfig
from training.formats.families.experts import PER_EXPERT, read_experts, read_top_k
from training.formats.families.family import BLOCK, Family
from training.formats.fields import Fields


class SoftmaxMoe(Family):
    """The weights of a token's experts are their probabilities, which `norm_topk_prob` divides by their sum."""

    moe = True
    EXPERTS: ClassVar[tuple[str, ...]] = ("num_experts",)
    """Names of the key with the number of experts. The first one is written."""
    NAMES: ClassVar[dict[str, str]] = BLOCK | PER_EXPERT

    def read_model(self, fields: Fields) -> dict[str, Any]:
        return super().read_model(fields) | {
            "num_experts": read_experts(fields, *self.EXPERTS),
            "top_k": read_top_k(fields, fields.flag("norm_topk_prob")),
        }

    def read_router(self, fields: Fields) -> RouterConfig:
        return RouterConfig(normalize=fields.flag("norm_topk_prob"))

    def write(self, model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
        assert model.top_k is not None
        return super().write(model, router) | {
            self.EXPERTS[0]: model.num_experts,
            "num_experts_per_tok": model.top_k,
            "norm_topk_prob": router.normalizes(model.top_k),
        }
