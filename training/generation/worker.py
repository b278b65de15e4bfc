"""What one rank does to generate text."""

from moe.generation.generate import generate
from parallel.apply import build_model
from parallel.config import ParallelConfig
from parallel.mesh import broadcast_from_first, build_mesh, close_process_group, init_process_group
from parallel.startup.launch import world_from_env
from parallel.startup.rendezvous import choose_on_rank0, open_store
from training.device import compute_dtype, pick_device
from training.formats.reader import open_model
from training.generation.config import GenerateConfig
from training.generation.report import Report
from training.generation.request import Request, open_tokenizer, read_request

START_TIMEOUT_S = 300.0


def generate_on_rank(config: GenerateConfig, request: Request | None = None) -> None:
    """Load this rank's part of the model, generate, and print on rank 0. All ranks of the launch must call it.

    The experts are spread over the ranks; everything else is replicated.

    Args:
        request: what to generate from. With None, rank 0 reads it and sends it to the other ranks.
    """
    world = world_from_env()
    store = open_store(world, START_TIMEOUT_S)
    if request is None:
        request = Request(*choose_on_rank0(store, world, "request", lambda: read_request(config)))
    device = pick_device(config.device, world.local_rank, world.local_world_size)
    source = open_model(request.path, check=False)
    tokenizer = open_tokenizer(source)
    init_process_group(store, world.rank, world.world_size, device, START_TIMEOUT_S)
    mesh = build_mesh(device, ParallelConfig().layout(world.world_size, source.model))
    model = build_model(
        source.model,
        source.router,
        mesh,
        compute_dtype=compute_dtype(config.precision, device),
        seed=None,
        inference_weights=True,
    )
    source.fill(model)

    report = Report(config, request, tokenizer.decode, prints=world.rank == 0)
    tokens = generate(
        model,
        request.prompts,
        max_tokens=config.max_tokens,
        sampling=config.sampling(),
        stop=request.end_ids,
        prefill_chunk=config.prefill_chunk,
        on_token=report.on_token,
        on_end=report.on_end,
        agree=lambda logits_BV: broadcast_from_first(logits_BV, mesh),
    )
    report.end(tokens)
    close_process_group()
