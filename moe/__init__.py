"""The model on one device: attention, routers, experts, losses. These modules never import `torch.distributed`.

In reading order:

- `config`: the configuration sections `model`, `router` and `adapter`.
- `model`: the transformer: embedding, blocks, last norm and head.
- `token_context`: the positions, documents and padding of a forward pass, and the rotary embedding.
- `layer`: the transformer block and the MoE layer.
- `attention/`: grouped-query attention, its kernels, and the key/value cache.
- `router`: the base class of the routers. `routers/` has one module per built-in kind.
- `selection`: top-k, group limits, expert choice and expert capacity.
- `dispatch`: copies tokens to the rows of their experts, and combines the experts' outputs.
- `experts`: the experts' feed-forward networks.
- `feedforward`: the dense feed-forward network, and the activation functions.
- `linear`: the linear map without bias, and RMSNorm.
- `low_rank`, `adapter`: low-rank adapters of weights, and which weights have them.
- `losses`: the cross-entropy and the auxiliary losses of the routers.
- `init`: initial weights that are the same on every layout.
- `noise`: random numbers that are the same on every layout.
- `region`: which rectangle of a parameter a rank stores.
- `recompute`: recomputation of activations in the backward pass.
- `generation/`: text generation through the key/value cache.
- `accounting/`: parameters, operations and memory of a model.
- `upcycle`: the weights of a MoE model, made from those of a dense model.
"""
