"""The order in which a rank gives received rows to its experts."""

import pytest
import torch

from moe.expert_loop import aligned_counts
from parallel.expert import _orders, _Permute


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("received", [[[3, 0, 20], [1, 0, 17]], [[16, 32, 0], [0, 0, 16]], [[0, 0, 0], [0, 0, 0]]])
def test_rows_go_to_their_experts_and_back(received, align):
    received_Qe = torch.tensor(received)
    rows = int(received_Qe.sum())
    counts, by_expert, by_source = _orders(received_Qe, rows, align)
    assert counts.equal(aligned_counts(received_Qe.sum(0)) if align else received_Qe.sum(0))
    expert_of_row = torch.tensor([e for source in received for e, number in enumerate(source) for _ in range(number)])
    x = (torch.arange(1.0, rows + 1).unsqueeze(1) * torch.ones(1, 3)).requires_grad_()
    by_expert_rows = _Permute.apply(x, by_expert, by_source)
    assert len(by_expert_rows) == counts.sum()
    for expert, part in enumerate(by_expert_rows.split(counts.tolist())):
        mine = x[expert_of_row == expert] if rows else x
        assert part[: len(mine)].equal(mine) and not part[len(mine) :].any()
    weight = torch.randn_like(by_expert_rows)
    back = _Permute.apply(by_expert_rows * weight, by_source, by_expert)
    assert back.equal(x * weight[by_source])
    grad = torch.randn_like(back)
    assert torch.autograd.grad(back, x, grad)[0].equal(grad * weight[by_source])
