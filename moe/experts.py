"""The experts: feed-forward networks with stacked weights, applied to rows that are grouped by expert.

Shapes: B batch, S sequence, R routed rows, D model, F expert hidden width, e experts on this rank, O and I output and
input width of one matmul, G = 2F.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.config import is_gated
from moe.device import cuda_capability, on_gpu
from moe.dispatch import Apply, Dispatcher
from moe.expert_loop import swiglu_loop
from moe.feedforward import ACTIVATIONS, gated
from moe.kernels import use_kernels
from moe.packed import multiply_packed_experts
from moe.quantization import Packing
from moe.router import Routing

GROUPED_WIDTH = 8
"""Grouped matmuls need rows of a multiple of 16 bytes, which is eight bf16 numbers."""

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Computes (rows_RI, weight_eOI, counts_e) -> rows_RO: each row times the transposed weight of its expert. Rows are
grouped by expert, and `counts_e` is the number of rows of each."""


def loop_kernel(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """Multiply with one matmul per expert. This is the readable reference."""
    if torch.compiler.is_compiling():
        y_RO: Tensor = _loop(rows_RI, weight_eOI, counts_e)
        return y_RO
    pairs = list(zip(rows_RI.split(counts_e.tolist()), weight_eOI.unbind(), strict=True))
    if not torch.is_grad_enabled():
        # In generation most experts get no row, and a call costs more than its work. With gradients every expert is
        # called, so that every weight gets a gradient.
        pairs = [pair for pair in pairs if pair[0].shape[0]] or pairs[:1]
    return torch.cat([F.linear(rows, weight) for rows, weight in pairs])


@torch.library.custom_op("mixwright::loop_matmul", mutates_args=())
def _loop(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """Compute `loop_kernel` as one operator of a compiled graph, whose shapes cannot depend on the counts."""
    return loop_kernel(rows_RI, weight_eOI, counts_e)


@torch.library.custom_op("mixwright::loop_matmul_weight", mutates_args=())
def _loop_weight(grad_RO: Tensor, rows_RI: Tensor, counts_e: Tensor) -> Tensor:
    """Return the gradient of the weights [e, O, I] for `_loop`."""
    counts = counts_e.tolist()
    parts = zip(grad_RO.split(counts), rows_RI.split(counts), strict=True)
    return torch.stack([grad.t() @ rows for grad, rows in parts])


@_loop.register_fake
def _(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    return rows_RI.new_empty(rows_RI.shape[0], weight_eOI.shape[1])


@_loop_weight.register_fake
def _(grad_RO: Tensor, rows_RI: Tensor, counts_e: Tensor) -> Tensor:
    return grad_RO.new_empty(counts_e.shape[0], grad_RO.shape[1], rows_RI.shape[1])


def _save_for_loop(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _loop_gradients(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows_RI, weight_eOI, counts_e = ctx.saved_tensors
    of_rows, of_weight, _ = ctx.needs_input_grad
    return (
        _loop(grad_RO, weight_eOI.transpose(1, 2), counts_e) if of_rows else None,
        _loop_weight(grad_RO, rows_RI, counts_e) if of_weight else None,
        None,
    )


_loop.register_autograd(_loop_gradients, setup_context=_save_for_loop)


def grouped_kernel(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """Multiply with one grouped matmul for all experts. The host does not wait for the counts (bf16 and fp32 only)."""
    ends_e = counts_e.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_RI, weight_eOI.transpose(1, 2), offs=ends_e)


def auto_kernel(rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
    """Use `grouped_kernel` where torch has a fused kernel for it, else `loop_kernel` (timings: benchmarks/RESULTS.md).

    torch has one for bf16 on GPUs of compute capability 8 and 9, with rows of a multiple of 16 bytes. (For 10, torch
    issue 172439 reports weight gradients that are not zero for experts without rows.) On CPUs, `Experts` computes
    SwiGLU by `moe.expert_loop` instead.
    """
    fused = (
        rows_RI.dtype == torch.bfloat16
        and all(width > 0 and width % GROUPED_WIDTH == 0 for width in weight_eOI.shape[1:])
        and cuda_capability(rows_RI.device) in (8, 9)
    )
    return (grouped_kernel if fused else loop_kernel)(rows_RI, weight_eOI, counts_e)


KERNELS: dict[str, Kernel] = {"auto": auto_kernel, "grouped": grouped_kernel, "loop": loop_kernel}


class Experts(nn.Module):
    """The experts of one MoE layer on this rank. Each is a feed-forward network (`moe.feedforward.FeedForward`).

    Expert parallelism keeps a contiguous range of the layer's experts on each rank.

    Attributes:
        first_expert: index in the layer of the first expert on this rank.
        kernel: seam: how the experts' matmuls are computed, one of `KERNELS`.
        packings: parameter -> how its matrices are stored, for those that are quantised
            (`moe.model.Transformer.quantize`).
        fused: seam: whether a function may read several weights at once, such as `swiglu_loop`. False: every product
            goes through `multiply`.
        adapters: seam: parameter -> what adds to products with it (`moe.adapter.install_adapters`). None: nothing does.
    """

    RECOMPUTE: ClassVar[dict[str, str]] = {"selective": "apply_to"}

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, kind: str, kernel: str) -> None:
        super().__init__()
        self.first_expert = 0
        self.kind = kind
        self.kernel_name = kernel
        self.kernel: Kernel = KERNELS[kernel]
        self.activation, self.gated = ACTIVATIONS[kind], is_gated(kind)
        self.fused = self.activation is F.silu and self.gated
        self.packings: dict[str, Packing] = {}
        self.adapters: nn.ModuleDict | None = None
        if self.gated:
            self.w_gate = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w_up = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w_down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))

    def forward(self, x_BSD: Tensor, routing: Routing, dispatcher: Dispatcher, shared: Apply | None) -> Tensor:
        """Return what `dispatcher.run` returns for these experts, [B·S, D].

        The weights are used inside of the module's forward pass only, because FSDP and ZeRO gather them for that time.
        A dispatcher can call `apply_to` several times. The weights are still gathered once, and the gradients reduced
        once.
        """
        return dispatcher.run(x_BSD, routing, self.apply_to, shared)

    def apply_to(self, rows_RD: Tensor, counts_e: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows_RD: rows grouped by expert.
            counts_e: number of rows of each expert.

        Returns:
            [R, D], in the same order.
        """

        if self.fused and not on_gpu(rows_RD) and self.kernel is auto_kernel and not torch.compiler.is_compiling():
            return swiglu_loop(rows_RD, counts_e, self.w_gate, self.w_up, self.w_down)
        if self.fused and use_kernels(rows_RD) and self.w_up.dtype != rows_RD.dtype:
            # One matmul with both weights, which need a cast anyway. If they need none, the joined copy would cost more
            # than it saves, and it would keep weights that FSDP has gathered in memory until the backward pass.
            from moe.kernels import join
            from moe.kernels.swiglu import swiglu_joined

            weight_eGD = join.join(self.w_gate, self.w_up, rows_RD.dtype)
            hidden_RF = swiglu_joined(self.kernel(rows_RD, weight_eGD, counts_e))
        elif self.gated:
            gate_RF, up_RF = self._map(rows_RD, "w_gate", counts_e), self._map(rows_RD, "w_up", counts_e)
            hidden_RF = gated(self.activation, gate_RF, up_RF)
        else:
            hidden_RF = self.activation(self._map(rows_RD, "w_up", counts_e))
        return self._map(hidden_RF, "w_down", counts_e)

    def multiply(self, rows_RI: Tensor, name: str, counts_e: Tensor) -> Tensor:
        """Return the product of each row and the transposed weight of its expert, [R, O], in the dtype of the rows.

        This is the product with the stored weight alone, without adapters.

        Args:
            rows_RI: rows grouped by expert.
            name: the parameter: `w_gate`, `w_up` or `w_down`.
            counts_e: number of rows of each expert.
        """
        weight: Tensor = getattr(self, name)
        if name in self.packings:
            return multiply_packed_experts(rows_RI, weight, counts_e, self.packings[name])
        return self.kernel(rows_RI, weight.to(rows_RI.dtype), counts_e)

    def _map(self, rows_RI: Tensor, name: str, counts_e: Tensor) -> Tensor:
        """Return `multiply`, and what the adapter of the parameter adds to it."""
        y_RO = self.multiply(rows_RI, name, counts_e)
        if self.adapters is None or name not in self.adapters:
            return y_RO
        adapted_RO: Tensor = self.adapters[name](
            rows_RI, y_RO, getattr(self, name), lambda x_RI, weight_eOI: self.kernel(x_RI, weight_eOI, counts_e)
        )
        return adapted_RO

    @property
    def num_local(self) -> int:
        """Number of experts on this rank."""
        return self.w_up.shape[0]

    def extra_repr(self) -> str:
        """Return what `repr` shows in the parentheses: the experts, their kind and widths, and the kernel."""
        packing = self.packings.get("w_up")
        width, dim = self.w_up.shape[1:] if packing is None else (packing.rows, packing.columns)
        last = self.first_expert + self.num_local - 1
        shape, how = f"{dim} -> {width} -> {dim}", f"kernel={self.kernel_name}" if packing is None else packing.kind
        return f"experts {self.first_expert}-{last}, {self.kind}, {shape}, {how}"
