"""Multi-head latent attention (MLA): keys and values of all heads from one small latent per token.

(DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, 2412.19437.) Rotary embedding cannot be applied behind the
map from the latent to the keys, so a key has a second part with rotary embedding, which all heads share. The key/value
cache stores the latent and that part: R + r numbers per token, where grouped-query attention stores 2·G·C.

Shapes: B batch, S sequence, X key positions, D model, H heads, R latent (`kv_lora_rank`), n and r the parts of a head
without and with rotary embedding, C = n + r, c value width, N = R + r numbers of a token in the cache,
E = n + c.
"""

import torch
from torch import Tensor, nn

from moe.attention.attention import Attention, pad_width
from moe.attention.cache import LayerCache
from moe.attention.masked import masked_attention
from moe.config import ModelConfig
from moe.linear import Linear, OutputLinear, RMSNorm
from moe.token_context import TokenContext, apply_rotary


class LatentAttention(Attention):
    """Attention with a latent for keys and values, and another one for queries if `q_lora_rank` is set."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.kv_lora_rank and config.qk_nope_head_dim and config.qk_rope_head_dim and config.v_head_dim
        self.rank, self.value_dim = config.kv_lora_rank, config.v_head_dim
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        width = config.num_heads * config.head_dim
        self.wq_down_norm: nn.Module | None = None
        if config.q_lora_rank is None:
            self.wq = Linear(config.dim, width)
        else:
            self.wq_down = Linear(config.dim, config.q_lora_rank)
            self.wq_down_norm = RMSNorm(config.q_lora_rank, config.norm_eps)
            self.wq_up = Linear(config.q_lora_rank, width)
        self.wkv_down = Linear(config.dim, self.rank + self.rope)
        self.wkv_down_norm = RMSNorm(self.rank, config.norm_eps)
        self.wkv_up = Linear(self.rank, config.num_heads * (self.nope + self.value_dim))
        self.wo = OutputLinear(config.num_heads * self.value_dim, config.dim)

    def mix(self, x_BSD: Tensor, context: TokenContext, cache: LayerCache | None) -> Tensor:
        """Return the mixed values of this rank's heads [B, H, S, c]."""
        assert context.rotary is not None
        keys_BS = context.noise_keys_BS
        if self.wq_down_norm is None:
            q_BHSC = self.split_heads(self.wq(x_BSD, keys_BS))
        else:
            q_BHSC = self.split_heads(self.wq_up(self.wq_down_norm(self.wq_down(x_BSD, keys_BS)), keys_BS))
        q_BHSn, q_BHSr = q_BHSC.split((self.nope, self.rope), dim=-1)
        q_BHSC = torch.cat((q_BHSn, apply_rotary(q_BHSr, context.rotary)), dim=-1)
        latent_BSR, k_BSr = self.wkv_down(x_BSD, keys_BS).split((self.rank, self.rope), dim=-1)
        latent_B1SR = self.wkv_down_norm(latent_BSR).unsqueeze(1)
        k_B1Sr = apply_rotary(k_BSr.unsqueeze(1), context.rotary)
        if cache is not None:
            return cache.attend(self._attend_latents, q_BHSC, torch.cat((latent_B1SR, k_B1Sr), dim=-1))
        # The core computes keys and values, so that context parallelism fetches latents, which are much smaller.
        mixed_BHSc: Tensor = self.core(q_BHSC, latent_B1SR, k_B1Sr, context, self._expand)
        return mixed_BHSc

    def _expand(
        self, latent_B1XR: Tensor, k_B1Xr: Tensor, noise_keys_BX: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the keys [B, H, X, C] and values [B, H, X, c] of this rank's heads."""
        up_BXE = self.wkv_up(latent_B1XR.squeeze(1), noise_keys_BX)
        up_BHXE = torch.unflatten(up_BXE, -1, (-1, self.nope + self.value_dim)).transpose(1, 2)
        k_BHXn, v_BHXc = up_BHXE.split((self.nope, self.value_dim), dim=-1)
        return torch.cat((k_BHXn, k_B1Xr.expand(-1, k_BHXn.shape[1], -1, -1)), dim=-1), v_BHXc

    def _attend_latents(self, q_BHSC: Tensor, tokens_B1XN: Tensor, mask_B1SX: Tensor) -> Tensor:
        """Return the mixed values [B, H, S, c] for latents and rotary parts `tokens_B1XN`, in the cheaper of two ways.

        - Keys and values of all X tokens are computed from their latents.
        - Few queries: `wkv_up` is applied to the queries and to the mixed latents instead, and all heads attend to the
          same N numbers of each token (the absorbed form of arXiv 2405.04434, section 2.1.2).
        """
        queries, places = q_BHSC.shape[2], tokens_B1XN.shape[2]
        per_latent = self.rank * (self.nope + self.value_dim)
        expanded = places * per_latent + queries * places * (self.head_dim + self.value_dim)
        absorbed = queries * per_latent + queries * places * (2 * self.rank + self.rope)
        if expanded < absorbed or not self._has_matrix():
            k_BHXC, v_BHXc = self._expand(*tokens_B1XN.split((self.rank, self.rope), dim=-1))
            mixed_BHSC = masked_attention(q_BHSC, k_BHXC, pad_width(v_BHXc, self.head_dim), mask_B1SX, self.scale)
            return mixed_BHSC[..., : self.value_dim]
        weight_HER = torch.unflatten(self.wkv_up.weight.to(q_BHSC.dtype), 0, (-1, self.nope + self.value_dim))
        of_keys_HnR, of_values_HcR = weight_HER.split((self.nope, self.value_dim), dim=1)
        q_BHSn, q_BHSr = q_BHSC.split((self.nope, self.rope), dim=-1)
        q_BHSN = torch.cat((q_BHSn @ of_keys_HnR, q_BHSr), dim=-1)
        # The mixed rotary parts are not used. As keys and values are the same tensor, a fused kernel can be used.
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        mixed_BHSN = masked_attention(q_BHSN, tokens_B1XN, tokens_B1XN, mask_B1SX, scale)
        mixed_BHSc: Tensor = mixed_BHSN[..., : self.rank] @ of_values_HcR.transpose(1, 2)
        return mixed_BHSc

    def _has_matrix(self) -> bool:
        """Return whether the weight of `wkv_up` can be read as the matrix that the module multiplies by.

        It cannot if it is quantised, if an adapter adds to the product, or if this rank has only a shard of it while
        the module is not called (ZeRO-3).
        """
        up = self.wkv_up
        return not up.packings and up.adapter is None and up.weight.shape[-1] == self.rank
