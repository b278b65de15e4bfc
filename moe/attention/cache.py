"""The key/value cache for generation: what attention needs of earlier tokens, in buffers of fixed size.

That is a key and a value for each key/value head, or one latent, from which latent attention computes the keys and
values of all heads (`ModelConfig.cached`). The words *keys and values* below mean either.

Shapes: B batch (rows), S tokens of a chunk, W slots of a buffer, X keys that a block of queries attends to,
m = min(S, W) slots written, H query heads, G key/value heads, C head dim.

A layer with a window W stores exactly its last W keys and values (Mistral 7B, arXiv 2310.06825): the token at position
p is stored in slot p % W, where it replaces a token that no later query attends to. A layer without a window stores
`max_len` of them. Rows are independent: each has its own length, and a chunk can contain fewer tokens of one row than
of another.

`Cache.begin` derives masks and slots from the positions of a chunk, once for all layers with the same window.
Each layer then reads and writes its own buffers. `Cache.advance` counts the chunk as stored, after the last layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig

EMPTY = -1
"""The position that is recorded for an empty slot."""
MIN_QUERIES = 64
"""The smallest number of queries of a block. A long chunk is divided into blocks as wide as the window, or this wide if
the window is smaller."""


class Cache:
    """The buffers of a whole model. `Transformer.forward` calls `begin` before its first layer and `advance` after its
    last one.

    Attributes:
        lengths_B: number of tokens stored for each row, int64.
        layers: the `LayerCache` of each layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        max_len: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate all buffers.

        Args:
            max_len: the largest number of tokens of a row. It applies to layers without a window only.
            dtype: of keys and values, the model's compute dtype.

        Raises:
            ValueError: a layer has no window, and `max_len` is None or below 1.
        """
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._longest = 0
        self._slots: dict[int | None, _Slots] = {}
        self._chunk: _Chunk | None = None
        self.layers: list[LayerCache] = []
        for layer in range(config.num_layers):
            window = config.window(layer)
            size = max_len if window is None else window
            if size is None or size < 1:
                raise ValueError(f"max_len={max_len}: expected an integer >= 1, because layer {layer} has no window")
            if window not in self._slots:
                self._slots[window] = _Slots(window, torch.full((batch, size), EMPTY, device=device))
            shapes = [(batch, heads, size, width) for heads, width in config.cached]
            buffers = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
            self.layers.append(LayerCache(self._slots[window], buffers))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers)

    def next_positions(self, length: int) -> Tensor:
        """Return the positions [B, length] of the next `length` tokens of each row."""
        return self.lengths_B.unsqueeze(1) + torch.arange(length, device=self.lengths_B.device)

    def begin(self, positions_BS: Tensor, valid_BS: Tensor | None = None) -> None:
        """Prepare the layers for a chunk of tokens. The buffers do not change until the layers attend to the chunk.

        Args:
            positions_BS: positions of the tokens. Each row continues at its length, as `next_positions` does.
            valid_BS: False on padding, which comes after a row's tokens; None: no padding.

        Raises:
            ValueError: padding before tokens, positions that do not continue a row, or more tokens than `max_len`.
        """
        length = positions_BS.shape[1]
        if valid_BS is None:
            valid_BS = torch.ones_like(positions_BS, dtype=torch.bool)
        counts_B = valid_BS.sum(dim=1)
        after_padding = (valid_BS[:, 1:] & ~valid_BS[:, :-1]).any()
        jumps = (valid_BS & (positions_BS != self.next_positions(length))).any()
        # One transfer from the device for all three numbers.
        has_inner_padding, has_jumps, longest = torch.stack(
            (after_padding.long(), jumps.long(), (self.lengths_B + counts_B).max())
        ).tolist()
        if has_inner_padding:
            raise ValueError("valid_BS: expected padding only after the tokens of a row")
        if has_jumps:
            raise ValueError(f"positions_BS: expected each row to continue at its length, {self.lengths_B.tolist()}")
        limit = next((slots.size for slots in self._slots.values() if slots.window is None), None)
        if limit is not None and longest > limit:
            raise ValueError(f"max_len={limit}: expected at least {longest}, the tokens of the longest row")
        self._chunk = _Chunk(positions_BS, valid_BS, counts_B, self.lengths_B, self._longest, longest)
        for slots in self._slots.values():
            slots.begin(self._chunk)

    def advance(self) -> None:
        """Count the tokens of the chunk as stored. Every layer must have attended to the chunk."""
        assert self._chunk is not None, "begin comes first"
        for slots in self._slots.values():
            slots.advance()
        self.lengths_B = self.lengths_B + self._chunk.counts_B
        self._longest, self._chunk = self._chunk.longest_after, None


class LayerCache:
    """Keys and values of one layer.

    Attributes:
        buffers: [B, G, W, C] each: the keys and the values, or the latents.
    """

    def __init__(self, slots: "_Slots", buffers: tuple[Tensor, ...]) -> None:
        self.slots = slots
        self.buffers = buffers

    def attend(self, mix: Callable[..., Tensor], q_BHSC: Tensor, *chunk: Tensor) -> Tensor:
        """Attend to the stored keys and to those of the chunk, then store the chunk. No gradient reaches the buffers.

        Args:
            mix: computes attention, as `moe.attention.masked.masked_attention` does: from queries, the tensors in
                place of the keys and values, and a mask.
            chunk: of the new tokens, one tensor [B, G, S, C] for each of the buffers.

        Returns:
            What `mix` returns, [B, H, S, ...].
        """
        plan = self.slots.plan
        assert plan is not None, "Cache.begin comes first"
        if plan.write_first:
            self._write(chunk, plan)
        mixed = [self._attend_block(mix, q_BHSC, chunk, block) for block in plan.blocks]
        if not plan.write_first:
            self._write(chunk, plan)
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)

    def _attend_block(
        self, mix: Callable[..., Tensor], q: Tensor, chunk: tuple[Tensor, ...], block: "_Block"
    ) -> Tensor:
        sources = zip(self.buffers, chunk, strict=True)
        keys = (_concatenate(buffer[:, :, : block.slots], new[:, :, block.keys]) for buffer, new in sources)
        return mix(q[:, :, block.queries], *keys, block.mask_B1SX)

    def _write(self, chunk: tuple[Tensor, ...], plan: "_Plan") -> None:
        for buffer, new in zip(self.buffers, chunk, strict=True):
            shape = (-1, buffer.shape[1], -1, buffer.shape[3])
            token, slot, has_token = (
                x[:, None, :, None].expand(shape) for x in (plan.token_Bm, plan.slot_Bm, plan.has_token_Bm)
            )
            # The m slots of a row are distinct. A slot for which the chunk has no token is written with its old value.
            kept = buffer.gather(2, slot)
            buffer.scatter_(2, slot, torch.where(has_token, new.detach().gather(2, token), kept))


class _Chunk(NamedTuple):
    """The tokens of one forward pass."""

    positions_BS: Tensor
    valid_BS: Tensor
    counts_B: Tensor
    """Number of tokens of each row in this chunk."""
    lengths_B: Tensor
    """Number of tokens of each row before this chunk."""
    longest: int
    """Length of the longest row before this chunk."""
    longest_after: int
    """Length of the longest row including this chunk."""


class _Block(NamedTuple):
    """Consecutive queries of a chunk, and the keys that they attend to: slots of the buffer, then keys of the chunk."""

    queries: slice
    slots: int
    """The first `slots` slots of the buffer are among the keys."""
    keys: slice
    """The keys of the chunk."""
    mask_B1SX: Tensor


class _Plan(NamedTuple):
    """How a layer processes a chunk: which query attends to which key, and which token is stored in which slot."""

    write_first: bool
    """Whether the chunk is stored before its queries attend."""
    blocks: list[_Block]
    token_Bm: Tensor
    """The last m tokens of each row, as indices into the chunk, the last token first."""
    slot_Bm: Tensor
    """The slot of each of these tokens."""
    has_token_Bm: Tensor
    """False where the row has fewer than m tokens in this chunk."""
    stored_BW: Tensor
    """`_Slots.stored_BW` after the chunk has been stored."""


class _Slots:
    """The position that each slot stores; the same for all layers with the same window.

    Attributes:
        stored_BW: position of the token in each slot, or `EMPTY`.
        plan: what the layers do with the chunk between `begin` and `advance`; None outside.
    """

    def __init__(self, window: int | None, stored_BW: Tensor) -> None:
        self.window = window
        self.stored_BW = stored_BW
        self.plan: _Plan | None = None

    @property
    def size(self) -> int:
        """W."""
        return self.stored_BW.shape[1]

    def begin(self, chunk: _Chunk) -> None:
        length = chunk.positions_BS.shape[1]
        last_first_m = torch.arange(min(length, self.size), device=chunk.positions_BS.device)
        token_Bm = chunk.counts_B.unsqueeze(1) - 1 - last_first_m
        has_token_Bm = token_Bm >= 0
        position_Bm = chunk.lengths_B.unsqueeze(1) + token_Bm
        slot_Bm = position_Bm % self.size
        stored_BW = self.stored_BW.scatter(
            1, slot_Bm, torch.where(has_token_Bm, position_Bm, self.stored_BW.gather(1, slot_Bm))
        )
        # A single token replaces one that it does not attend to. It can be stored first, and its query then attends to
        # the buffer alone.
        write_first = length == 1
        if write_first:
            slots = min(self.size, chunk.longest_after)
            blocks = [self._block(chunk, stored_BW[:, :slots], slice(0, 1), slice(0, 0))]
        else:
            blocks = self._blocks(chunk)
        self.plan = _Plan(write_first, blocks, token_Bm.clamp(min=0), slot_Bm, has_token_Bm, stored_BW)

    def advance(self) -> None:
        assert self.plan is not None
        self.stored_BW, self.plan = self.plan.stored_BW, None

    def _blocks(self, chunk: _Chunk) -> list[_Block]:
        """Divide the queries of a long chunk into blocks that are at least as wide as the window.

        Each block attends to its own keys and to the W - 1 keys before its first query. Only the first block can find
        some of these in the buffer, so the other blocks do not read it.
        """
        length = chunk.positions_BS.shape[1]
        width = length if self.window is None else max(self.window, MIN_QUERIES)
        stored_BX = self.stored_BW[:, : min(self.size, chunk.longest)]
        blocks = []
        for start in range(0, length, width):
            end = min(start + width, length)
            low = 0 if self.window is None else max(0, start + 1 - self.window)
            blocks.append(
                self._block(chunk, stored_BX[:, :0] if start else stored_BX, slice(start, end), slice(low, end))
            )
        return blocks

    def _block(self, chunk: _Chunk, stored_BX: Tensor, queries: slice, keys: slice) -> _Block:
        chunk_BX = chunk.positions_BS.where(chunk.valid_BS, EMPTY)[:, keys]
        key_B1X = torch.cat((stored_BX, chunk_BX), dim=1).unsqueeze(1)
        query_BS1 = chunk.positions_BS[:, queries].unsqueeze(2)
        mask_BSX = (key_B1X != EMPTY) & (key_B1X <= query_BS1)
        if self.window is not None:
            mask_BSX &= key_B1X > query_BS1 - self.window
        # Padding attends to every key: its output is not used, and the softmax over no keys would be NaN.
        mask_BSX |= ~chunk.valid_BS[:, queries].unsqueeze(2)
        return _Block(queries, stored_BX.shape[1], keys, mask_BSX.unsqueeze(1))


def _concatenate(stored: Tensor, chunk: Tensor) -> Tensor:
    """Concatenate keys or values along the sequence, without a copy if one of the two is empty."""
    if stored.shape[2] and chunk.shape[2]:
        return torch.cat((stored, chunk), dim=2)
    return stored if stored.shape[2] else chunk
