"""Which frozen weights are stored in 4 or 8 bits, and how the bytes of each matrix are laid out. No torch.

A matrix [O, I] becomes one row of P bytes. Stacked experts [E, O, I] become [E, P], one row per expert, so that the
bytes of an expert do not depend on which rank stores it. `moe.packed` computes with the bytes.

- `nf4`: the 16 values of NormalFloat (QLoRA, arXiv 2305.14314), two per byte, times a scale per block of `block_size`
  consecutive numbers of a row-major matrix. With `double_quant`, the scales less their mean are 8-bit numbers with an
  fp32 scale per 256 of them. A weight then takes 4 + 8/64 + 32/(64·256) = 4.127 bits.
- `int8`: one scale per row of the matrix, the largest magnitude (the vector-wise weights of LLM.int8(),
  arXiv 2208.07339). Activations stay in the compute dtype, so they have no outliers to separate.

Letters: O output and I input width of a matrix, P its bytes, E experts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

from common.errors import expect, expect_defaults, expect_fields

Kind = Literal["nf4", "int8"]
Target = Literal["attention", "dense", "shared", "experts"]
TARGETS: dict[Target, str] = {
    "attention": r"(^|\.)attention\.\w+\.weight",
    "dense": r"(^|\.)ffn\.w_\w+\.weight",
    "shared": r"(^|\.)ffn\.shared\.w_\w+\.weight",
    "experts": r"(^|\.)ffn\.experts\.w_\w+",
}
"""What can be quantised -> the end of the names of its matrices. The embedding, the head, norms and routers cannot."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The sizes of a block that bitsandbytes has."""
SCALES_PER_BLOCK = 256
"""Scales that share an fp32 scale with double quantisation."""
ALIGNMENT = 128
"""Each section of the bytes of a matrix begins at a multiple of this. Kernels load several bytes at once, and FSDP can
divide the bytes of a matrix by any power of two up to this."""


class Packing(NamedTuple):
    """How a matrix [O, I] is stored in P bytes: sections one after the other, each padded to `ALIGNMENT`."""

    kind: Kind
    rows: int
    """O."""
    columns: int
    """I."""
    block_size: int
    """Numbers per scale (`nf4`)."""
    double_quant: bool
    """Whether the scales are quantised, too (`nf4`)."""

    @property
    def numel(self) -> int:
        """The numbers of the matrix."""
        return self.rows * self.columns

    @property
    def sections(self) -> dict[str, tuple[int, int]]:
        """Name -> (offset, length) in bytes.

        - `codes`: the packed numbers.
        - `scales`: fp32, or 8 bits with double quantisation.
        - `outer`: with double quantisation, the mean of the scales, and then the scales of the scales, in fp32.
        """
        if self.kind == "int8":
            lengths = {"codes": self.numel, "scales": 4 * self.rows}
        else:
            blocks = -(-self.numel // self.block_size)
            lengths = {"codes": -(-self.numel // 2), "scales": blocks if self.double_quant else 4 * blocks}
            if self.double_quant:
                lengths["outer"] = 4 * (1 + -(-blocks // SCALES_PER_BLOCK))
        sections, offset = {}, 0
        for name, length in lengths.items():
            sections[name] = offset, length
            offset += _aligned(length)
        return sections

    @property
    def nbytes(self) -> int:
        """P."""
        return sum(_aligned(length) for _, length in self.sections.values())

    def workspace_bytes(self, itemsize: int) -> int:
        """Return the bytes that exist while the matrix is dequantised, besides its own P.

        Args:
            itemsize: bytes of a number in the compute dtype.
        """
        if self.kind == "int8":
            return self.numel * max(8, 4 + itemsize)  # bitsandbytes computes two products in fp32.
        return self.numel * itemsize + 4 * -(-self.numel // self.block_size)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class QuantizeConfig:
    """The weights that are stored in few bits, and never trained (docs/finetuning.md)."""

    kind: Kind | None = None
    """`nf4`: 4 bits (QLoRA); `int8`: 8 bits, one scale per row; `null`: all weights in full precision."""
    block_size: int = 64
    """`nf4` only: consecutive numbers that share a scale."""
    double_quant: bool = True
    """`nf4` only: whether the scales are stored in 8 bits."""
    targets: tuple[Target, ...] = get_args(Target)
    """What is quantised: `attention`, `dense` (networks of dense layers), `shared` and `experts`. The embedding, the
    head, norms and routers never are."""

    def __post_init__(self) -> None:
        expect_fields(
            self,
            block_size=(self.block_size in BLOCK_SIZES, f"one of {', '.join(map(str, BLOCK_SIZES))}"),
            targets=(bool(self.targets), f"a list of some of {', '.join(TARGETS)}"),
        )
        if self.kind is None:
            expect_defaults(self, "quantize.kind=null")

    def packing(self, target: Target | None, shape: Sequence[int]) -> Packing | None:
        """Return how a parameter is stored; None: in full precision.

        Args:
            target: what `target_of` returned for its name.
            shape: [O, I], or [E, O, I] of stacked experts.
        """
        if self.kind is None or target not in self.targets or len(shape) < 2:
            return None
        return Packing(self.kind, shape[-2], shape[-1], self.block_size, self.double_quant)


def target_of(name: str) -> Target | None:
    """Return what `quantize.targets` calls a parameter; None: it is never quantised.

    Args:
        name: its name in `moe.model.Transformer`, or the end of it that begins within the block.
    """
    return next((target for target, pattern in TARGETS.items() if re.search(f"{pattern}$", name)), None)


FULL_PRECISION = QuantizeConfig()


def expect_adapters(config: QuantizeConfig, has_adapters: bool) -> None:
    """Check that something trains beside weights that are stored in few bits, which never train.

    Raises:
        ConfigError: there are such weights, and no adapters.
    """
    expect(
        config.kind is None or has_adapters,
        "quantize.kind",
        config.kind,
        "null, or adapters, which train beside quantised weights (adapter=lora)",
    )


def expect_library(config: QuantizeConfig) -> None:
    """Check that the package that quantises weights is installed, if any are to be quantised.

    Raises:
        ConfigError: it is not.
    """
    expect(
        config.kind is None or find_spec("bitsandbytes") is not None,
        "quantize.kind",
        config.kind,
        "the package bitsandbytes (pip install 'mixwright[quantize]')",
    )
