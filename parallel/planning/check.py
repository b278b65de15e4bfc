"""Whether a model, its sequences and its batch can be divided as a layout asks for."""

from common.errors import expect
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.workload import Workload


def check_layout(layout: Layout, parallel: ParallelConfig, workload: Workload) -> None:
    """Refuse a layout that does not divide the model, the sequences or the batch.

    Raises:
        ValueError: the message starts with a field of `parallel`, or with `global_batch`.
    """
    _check_widths(layout, workload)
    if layout.pipeline > 1:
        _check_pipeline(layout, parallel, workload)
    rows, accumulation = workload.global_batch, workload.accumulation
    divisor = accumulation * layout.data
    fewer = rows // divisor * divisor
    nearest = [str(number) for number in (fewer, fewer + divisor) if number]
    expect(
        rows % divisor == 0,
        "global_batch",
        rows,
        f"a multiple of train.accumulation={accumulation} times the {layout.data} data-parallel ranks, the nearest: "
        f"{' or '.join(nearest)}",
    )


def _check_widths(layout: Layout, workload: Workload) -> None:
    """Check that the axes divide the heads and the sequence. Hidden widths and the vocabulary can have uneven parts."""
    model, tensor = workload.model, layout.tensor
    heads, kv_heads = model.num_heads, model.num_kv_heads
    expect(heads % tensor == 0, "tensor", tensor, f"a divisor of model.num_heads={heads}")
    fits = kv_heads % tensor == 0 or tensor % kv_heads == 0
    expect(fits, "tensor", tensor, f"a divisor or a multiple of model.num_kv_heads={kv_heads}")
    expect(
        model.expert_kernel != "grouped" or model.expert_width % (8 * layout.expert_tensor) == 0,
        "expert_tensor",
        layout.expert_tensor,
        f"parts of the experts' hidden width {model.expert_width} that are multiples of 8, with "
        "model.expert_kernel=grouped",
    )
    for axis, parts in (("tensor", tensor), ("expert_tensor", layout.expert_tensor)):
        kind = workload.quantize.kind
        expect(parts == 1 or kind is None, axis, parts, f"1 with quantize={kind} (a matrix is quantised as a whole)")
    expect(
        layout.expert_tensor == 1 or not model.adapts_experts,
        "expert_tensor",
        layout.expert_tensor,
        "1 with adapters of the experts (adapter.targets)",
    )
    if model.adapter is not None:
        whole = "the length of a row needs the whole row"
        expect(tensor == 1 or not model.adapter.dora, "tensor", tensor, f"1 with adapter.dora=true ({whole})")
        dropout = model.adapter.dropout
        expect(tensor == 1 or not dropout, "tensor", tensor, f"1 with adapter.dropout={dropout}")
    for axis, parts in (("context", layout.context), ("tensor", layout.sequence)):
        also = f" (times parallel.context={layout.context})" if axis == "tensor" and layout.context > 1 else ""
        expected = f"a divisor of train.seq_len={workload.seq_len}{also}"
        expect(workload.seq_len % parts == 0, axis, getattr(layout, axis), expected)


def _check_pipeline(layout: Layout, parallel: ParallelConfig, workload: Workload) -> None:
    """Check that there are enough layers and micro-batches for the stages, and that the schedule allows the options."""
    num_layers, ranks, accumulation = workload.model.num_layers, layout.pipeline, workload.accumulation
    expect(
        parallel.num_stages(layout) <= num_layers,
        "pipeline",
        ranks,
        f"at most {num_layers // parallel.stages_per_rank}: {parallel.stages_per_rank} stage(s) per rank, "
        f"model.num_layers={num_layers}",
    )
    layers = parallel.stage_layers
    expect(
        layers is None or sum(layers) == num_layers,
        "stage_layers",
        layers,
        f"numbers that add up to model.num_layers={num_layers}",
    )
    enough = -(-accumulation // ranks) * ranks
    any_number = parallel.schedule == "1f1b"
    expect(
        accumulation >= ranks and (any_number or accumulation % ranks == 0),
        "pipeline",
        ranks,
        f"{'at least one micro-batch' if any_number else 'a whole number of micro-batches'} per pipeline rank, "
        f"train.accumulation={enough} instead of {accumulation}",
    )
    expect(
        not (parallel.schedule == "zero_bubble" and parallel.recompute == "full"),
        "recompute",
        "full",
        "none or selective with parallel.schedule=zero_bubble (it runs a backward pass in two parts)",
    )
    expect(
        workload.router.layer_reduction != "hf_pooled",
        "pipeline",
        ranks,
        "1 with router.layer_reduction=hf_pooled (it pools all layers)",
    )
