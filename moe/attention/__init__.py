"""Attention: the module, its kernels for masks and windows, and the key/value cache.

In reading order:

- `attention`: projections, rotary embedding, and the core, which chooses one of the kernels below.
- `latent`: multi-head latent attention.
- `masked`: attention under an explicit mask, for packed rows on CPUs and for generation.
- `window`: sliding-window attention in blocks, on any device and in any precision.
- `varlen`: windowed and packed attention on GPUs in bf16, with FlashAttention 2.
- `flex`: windowed and packed attention on GPUs where `varlen` does not serve, with torch's flex_attention.
- `cache`: keys and values of earlier tokens, for generation.
"""
