"""Keys and values of the tokens so far, in buffers that never grow: what generation remembers.

Shapes: B batch (rows), S tokens of this chunk, W entries of a buffer, X keys in reach, m = min(S, W) entries written,
G key/value heads, C head dim.

A layer with a window W keeps exactly its last W keys and values (Mistral 7B, arXiv 2310.06825): the token at position
p lies in slot p % W, where it replaces the one that no later query can see. A layer without a window keeps `max_len`.
Rows are independent: each has its own length, and a chunk may hold fewer tokens of one row than of another.

What a forward does to the positions (masks, slots to write) is worked out once, in `begin`, for all layers of one
window, and becomes the state once, in `advance`. Between the two, each layer reads and writes its own buffers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.attention.masked import masked_attention
from moe.config import ModelConfig

EMPTY = -1
"""Stored position of a slot that holds nothing."""
MIN_QUERIES = 64
"""Long chunks are attended to in blocks of queries, of the window's width and at least this many."""


class Cache:
    """The buffers of a whole model. `Transformer.forward` calls `begin` first and `advance` last."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        max_len: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """All memory is taken here.

        Args:
            max_len: tokens a row can have, in layers without a window; others take any number.
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
            shape = (batch, config.num_kv_heads, size, config.head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.layers.append(LayerCache(self._slots[window], keys, values))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for layer in self.layers for x in (layer.k_BGWC, layer.v_BGWC))

    def next_positions(self, length: int) -> Tensor:
        """[B, length]: the positions that the next tokens of each row have."""
        return self.lengths_B.unsqueeze(1) + torch.arange(length, device=self.lengths_B.device)

    def begin(self, positions_BS: Tensor, valid_BS: Tensor | None = None) -> None:
        """Announce a chunk; nothing changes before the layers attend to it.

        Args:
            positions_BS: of the tokens, each row going on where it stopped.
            valid_BS: False on padding, which stands behind a row's tokens; None: no padding.

        Raises:
            ValueError: padding before tokens, positions that do not go on, or more tokens than `max_len`.
        """
        length = positions_BS.shape[1]
        if valid_BS is None:
            valid_BS = torch.ones_like(positions_BS, dtype=torch.bool)
        counts_B = valid_BS.sum(dim=1)
        ragged = (valid_BS[:, 1:] & ~valid_BS[:, :-1]).any()
        jumps = (valid_BS & (positions_BS != self.next_positions(length))).any()
        found = torch.stack((ragged.long(), jumps.long(), (self.lengths_B + counts_B).max())).tolist()
        if found[0]:
            raise ValueError("valid_BS: expected padding behind the tokens of a row only")
        if found[1]:
            raise ValueError(f"positions_BS: expected each row to go on at its length, {self.lengths_B.tolist()}")
        limit = next((slots.size for slots in self._slots.values() if slots.window is None), None)
        if limit is not None and found[2] > limit:
            raise ValueError(f"max_len={limit}: expected at least {found[2]}, the tokens of the longest row")
        self._chunk = _Chunk(positions_BS, valid_BS, counts_B, self.lengths_B, self._longest, found[2])
        for slots in self._slots.values():
            slots.begin(self._chunk)

    def advance(self) -> None:
        """The chunk's tokens are part of the past from now on."""
        assert self._chunk is not None, "begin comes first"
        for slots in self._slots.values():
            slots.advance()
        self.lengths_B = self.lengths_B + self._chunk.counts_B
        self._longest, self._chunk = self._chunk.longest_after, None


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, slots: "_Slots", k_BGWC: Tensor, v_BGWC: Tensor) -> None:
        self.slots = slots
        self.k_BGWC, self.v_BGWC = k_BGWC, v_BGWC

    def attend(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor) -> Tensor:
        """The chunk's queries on what the buffer holds and the chunk itself, [B, H, S, C]; then the chunk is kept.

        No gradient flows into the buffers.
        """
        plan = self.slots.plan
        assert plan is not None, "Cache.begin comes first"
        if plan.write_first:
            self._write(k_BGSC, v_BGSC, plan)
        mixed = [self._attend_block(q_BHSC, k_BGSC, v_BGSC, block) for block in plan.blocks]
        if not plan.write_first:
            self._write(k_BGSC, v_BGSC, plan)
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, block: "_Block") -> Tensor:
        sources = ((self.k_BGWC, k), (self.v_BGWC, v))
        parts = [(buffer[:, :, : block.held], chunk[:, :, block.keys]) for buffer, chunk in sources]
        keys, values = (_joined(*part) for part in parts)
        return masked_attention(q[:, :, block.queries], keys, values, block.mask_B1SX)

    def _write(self, k: Tensor, v: Tensor, plan: "_Plan") -> None:
        for buffer, chunk in ((self.k_BGWC, k.detach()), (self.v_BGWC, v.detach())):
            shape = (-1, buffer.shape[1], -1, buffer.shape[3])
            source, slot, fresh = (
                x[:, None, :, None].expand(shape) for x in (plan.source_Bm, plan.slot_Bm, plan.fresh_Bm)
            )
            # The slots of a row are distinct, also those that no token comes for: they get what they had.
            buffer.scatter_(2, slot, torch.where(fresh, chunk.gather(2, source), buffer.gather(2, slot)))


class _Chunk(NamedTuple):
    """The tokens of one forward."""

    positions_BS: Tensor
    valid_BS: Tensor
    counts_B: Tensor
    """Tokens of each row."""
    lengths_B: Tensor
    """Tokens of each row before them."""
    longest: int
    """The longest row before them, and with them."""
    longest_after: int


class _Block(NamedTuple):
    """Queries that share a range of keys: the first `held` slots of the buffer, then a part of the chunk."""

    queries: slice
    held: int
    keys: slice
    mask_B1SX: Tensor


class _Plan(NamedTuple):
    """What a layer does with a chunk: who sees whom, and which tokens go to which slots."""

    write_first: bool
    blocks: list[_Block]
    source_Bm: Tensor
    """The row's last m tokens, as indices into the chunk, last first."""
    slot_Bm: Tensor
    fresh_Bm: Tensor
    """Whether there is such a token."""
    stored_BW: Tensor
    """`_Slots.stored_BW` once the chunk has been written."""


class _Slots:
    """Which position lies in which slot: the same for all layers of one window."""

    def __init__(self, window: int | None, stored_BW: Tensor) -> None:
        self.window = window
        self.stored_BW = stored_BW
        self.plan: _Plan | None = None

    @property
    def size(self) -> int:
        return self.stored_BW.shape[1]

    def begin(self, chunk: _Chunk) -> None:
        length = chunk.positions_BS.shape[1]
        last_first_m = torch.arange(min(length, self.size), device=chunk.positions_BS.device)
        source_Bm = chunk.counts_B.unsqueeze(1) - 1 - last_first_m
        fresh_Bm = source_Bm >= 0
        position_Bm = chunk.lengths_B.unsqueeze(1) + source_Bm
        slot_Bm = position_Bm % self.size
        stored_BW = self.stored_BW.scatter(
            1, slot_Bm, torch.where(fresh_Bm, position_Bm, self.stored_BW.gather(1, slot_Bm))
        )
        # A single token replaces what it cannot see: it may be written first, and then the buffer is all there is.
        write_first = length == 1
        if write_first:
            held = min(self.size, chunk.longest_after)
            blocks = [self._block(chunk, stored_BW[:, :held], slice(0, 1), slice(0, 0))]
        else:
            blocks = self._blocks(chunk)
        self.plan = _Plan(write_first, blocks, source_Bm.clamp(min=0), slot_Bm, fresh_Bm, stored_BW)

    def advance(self) -> None:
        assert self.plan is not None
        self.stored_BW, self.plan = self.plan.stored_BW, None

    def _blocks(self, chunk: _Chunk) -> list[_Block]:
        """Windows make long chunks cheap: a block of queries no narrower than the window looks at itself and at the W
        keys before it, of which only the first block finds any in the buffer."""
        length = chunk.positions_BS.shape[1]
        width = length if self.window is None else max(self.window, MIN_QUERIES)
        held_BX = self.stored_BW[:, : min(self.size, chunk.longest)]
        blocks = []
        for start in range(0, length, width):
            end = min(start + width, length)
            low = 0 if self.window is None else max(0, start + 1 - self.window)
            blocks.append(self._block(chunk, held_BX[:, :0] if start else held_BX, slice(start, end), slice(low, end)))
        return blocks

    def _block(self, chunk: _Chunk, held_BX: Tensor, queries: slice, keys: slice) -> _Block:
        own_BX = chunk.positions_BS.where(chunk.valid_BS, EMPTY)[:, keys]
        key_B1X = torch.cat((held_BX, own_BX), dim=1).unsqueeze(1)
        query_BS1 = chunk.positions_BS[:, queries].unsqueeze(2)
        mask_BSX = (key_B1X != EMPTY) & (key_B1X <= query_BS1)
        if self.window is not None:
            mask_BSX &= key_B1X > query_BS1 - self.window
        # Padding sees everything: nobody reads it, and a softmax over nothing would be NaN.
        mask_BSX |= ~chunk.valid_BS[:, queries].unsqueeze(2)
        return _Block(queries, held_BX.shape[1], keys, mask_BSX.unsqueeze(1))


def _joined(held: Tensor, own: Tensor) -> Tensor:
    if held.shape[2] and own.shape[2]:
        return torch.cat((held, own), dim=2)
    return held if held.shape[2] else own
