"""The experts: E feed-forward networks with stacked weights, applied to rows that are grouped by expert.

Shapes: R routed rows, D model, F expert hidden, e experts held here, O and I output and input width of one matmul.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import is_gated
from moe.feedforward import hidden
from moe.recompute import Recompute, recomputes

GROUPED_WIDTH = 8
"""Grouped matmuls want rows of whole 16 bytes: eight bf16 numbers."""

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows_RI grouped by expert, weight_eOI, counts_e) -> rows_RO."""


def loop_kernel(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """One matmul an expert: the readable reference, on CPUs as fast as the other. No rows for an expert, none back."""
    pairs = list(zip(rows_RI.split(counts_e.tolist()), weight_eOI.unbind(), strict=True))
    if not torch.is_grad_enabled():
        # One token reaches few experts, and a call costs more than its work. (A gradient wants every weight's part.)
        pairs = [pair for pair in pairs if pair[0].shape[0]] or pairs[:1]
    return torch.cat([F.linear(rows, weight) for rows, weight in pairs])


def grouped_kernel(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """One grouped matmul for all experts, without a look at the counts from the host (bf16 and fp32)."""
    ends_e = counts_e.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_RI, weight_eOI.transpose(1, 2), offs=ends_e)


def auto_kernel(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """Grouped where torch has a fused kernel for it, else the loop (figures: benchmarks/RESULTS.md).

    That is bf16 on GPUs of compute capability 8 and 9, with widths of whole 16 bytes. (On 10, torch issue 172439
    reports weight gradients that are not zero for experts without rows.)
    """
    fused = (
        rows_RI.is_cuda
        and rows_RI.dtype == torch.bfloat16
        and all(width % GROUPED_WIDTH == 0 for width in weight_eOI.shape[1:])
        and torch.cuda.get_device_capability(rows_RI.device)[0] in (8, 9)
    )
    return (grouped_kernel if fused else loop_kernel)(rows_RI, weight_eOI, counts_e)


KERNELS: dict[str, Kernel] = {"auto": auto_kernel, "grouped": grouped_kernel, "loop": loop_kernel}


class Experts(nn.Module):
    """w_down(hidden(x)) for each expert; `kind` says what the hidden layer is (`moe.feedforward.hidden`).

    `first_expert` is the global index of the first expert held here: expert parallelism keeps a contiguous range.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, kind: str, kernel: str) -> None:
        super().__init__()
        self.first_expert = 0
        self.kind = kind
        self.kernel_name = kernel
        self.kernel: Kernel = KERNELS[kernel]
        self.recompute: Recompute = "none"
        if is_gated(kind):
            self.w_gate = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w_up = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w_down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))

    @recomputes("selective")
    def forward(self, rows_RD: Tensor, counts_e: Tensor) -> Tensor:
        def apply(x_RI: Tensor, weight_eOI: Tensor) -> Tensor:
            return self.kernel(x_RI, weight_eOI.to(x_RI.dtype), counts_e)

        hidden_RF = hidden(self.kind, lambda name: apply(rows_RD, getattr(self, name)))
        return apply(hidden_RF, self.w_down)

    @property
    def held(self) -> int:
        """Experts held here."""
        return self.w_up.shape[0]

    def extra_repr(self) -> str:
        held, width, dim = self.w_up.shape
        last = self.first_expert + held - 1
        shape = f"{dim} -> {width} -> {dim}"
        return f"experts {self.first_expert}-{last}, {self.kind}, {shape}, kernel={self.kernel_name}"
