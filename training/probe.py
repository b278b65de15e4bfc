"""Routes a fixed set of held-out tokens after some of the steps of a run, to show how the routing changes.

The tokens pass through the model in evaluation mode, without gradients, jitter or drops. A probe changes nothing that
training reads. `training.report.probe` writes and reads the files.

Shapes: B batch, S sequence, L MoE layers, T tokens of the probe, K top-k, P places in the rows of all ranks, C columns
of a place: K experts, K weights and the margin.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from data.batch import Batch
from data.loader import numbers_of_rank
from data.packing import Row, pack_excerpts, pack_row, padding_row
from data.tokens.split import Excerpt
from data.tokens.store import Store
from data.tokens.tokenizer import token_texts
from moe.generation.generate import generating
from training.agree import AgreedRun
from training.engine import Engine
from training.report.metrics import Row as Metrics
from training.report.metrics import telemetry_metrics
from training.report.probe import ProbeRouting, ProbeTokens, ProbeWriter
from training.step import move_to_device

EXCERPT = 128
"""The most tokens of an excerpt."""


class Prober:
    """Probes the routers of a run. Rank 0 writes the files (`ProbeWriter`).

    Args:
        resume_step: the step that the run continues from; None for a new run.
        note: receives lines for the user, on rank 0.
    """

    def __init__(self, run: AgreedRun, engine: Engine, resume_step: int | None, note: Callable[[str], None]) -> None:
        config, mesh, layout = run.config, engine.mesh, run.plan.layout
        self.engine, self.model, self._note = engine, run.model, note
        seq_len, num_tokens = config.train.seq_len, config.telemetry.probe_tokens if run.model.is_moe else 0
        excerpts = run.tokens.heldout.excerpts(num_tokens, min(EXCERPT, seq_len))
        rows = excerpt_rows(excerpts, seq_len)
        self.batches = probe_batches(
            rows,
            most_rows=config.train.global_batch // config.train.accumulation // layout.data,
            rank=layout.data_rank(mesh.rank),
            world_size=layout.data,
        )
        self.used_P = np.array([row.documents_S >= 0 for row in rows], dtype=bool).ravel()
        self.writer: ProbeWriter | None = None
        if mesh.rank == 0:
            tokens = probe_tokens(excerpts, run.tokens) if excerpts else None
            self.writer = ProbeWriter(run.directory, tokens, resume_step, note)

    def probe(self, step: int) -> Metrics:
        """Route the tokens and write the file of `step`. Collective.

        Returns:
            On rank 0 the churn since the last probe, as metrics of the step. Empty at the first probe, and on other
            ranks.
        """
        if not self.batches:
            return {}
        columns_LPC = route(self.engine, self.batches, len(self.used_P))
        if self.writer is None:
            return {}
        routing = as_routing(columns_LPC.cpu().numpy()[:, self.used_P], self.model.num_experts or 0)
        if (routing.experts_LTK >= routing.num_experts).any():
            self._note(
                f"warning: step {step} is not probed: its routers do not give every token {self.model.top_k} experts"
            )
            return {}
        churn_L = self.writer.write(step, routing)
        return {} if churn_L is None else telemetry_metrics({"churn": churn_L.tolist()})

    def go_back(self, step: int) -> None:
        """Remove what was probed after `step`, from which the run continues."""
        if self.writer is not None:
            self.writer.go_back(step)


def excerpt_rows(excerpts: Sequence[Excerpt], seq_len: int) -> list[Row]:
    """Pack the excerpts, in their order, into rows of S = `seq_len`. Each excerpt is a separate document."""
    rows = []
    for numbers in pack_excerpts([len(excerpt.tokens_T) for excerpt in excerpts], seq_len):
        packed = [excerpts[number] for number in numbers]
        ends = np.cumsum([len(excerpt.tokens_T) for excerpt in packed])
        tokens_T = np.concatenate([excerpt.tokens_T for excerpt in packed])
        domain_ids = np.array([excerpt.domain for excerpt in packed])
        rows.append(pack_row(tokens_T, ends[:-1], domain_ids, seq_len, cross_documents=False))
    return rows


def probe_batches(rows: Sequence[Row], *, most_rows: int, rank: int, world_size: int) -> list[Batch]:
    """Return the batches of data rank `rank`, each of at most `most_rows` rows. Their numbers are those of places.

    The ranks together get every row once, and every rank gets the same number of batches.
    """
    batch_rows = min(most_rows, -(-len(rows) // world_size))
    if not rows:
        return []
    padding = padding_row(len(rows[0].tokens_S))
    return [
        Batch.stack([rows[i] if i < len(rows) else padding for i in numbers], numbers)
        for numbers in numbers_of_rank(len(rows), batch_rows, rank, world_size)
    ]


def probe_tokens(excerpts: Sequence[Excerpt], store: Store) -> ProbeTokens:
    """Return the tokens of the excerpts with their text."""
    ids = [excerpt.tokens_T.tolist() for excerpt in excerpts]
    sizes = [len(excerpt) for excerpt in ids]
    return ProbeTokens(
        store.domains,
        np.concatenate(ids).astype(np.int32),
        np.repeat([excerpt.document for excerpt in excerpts], sizes).astype(np.int32),
        np.repeat([excerpt.domain for excerpt in excerpts], sizes).astype(np.int32),
        np.repeat(np.arange(len(ids)), sizes).astype(np.int32),
        tuple(text for excerpt in ids for text in token_texts(store.tokenizer, excerpt)),
    )


def route(engine: Engine, batches: Sequence[Batch], num_places: int) -> Tensor:
    """Route the tokens of every batch. Collective.

    Args:
        batches: this rank's, equally many on every rank. `numbers_BS` are the numbers of the places.
        num_places: P.

    Returns:
        The columns of each place, fp32 [L, P, C], on every rank; 0 on padding.
    """
    mesh, config = engine.mesh, engine.parts[0].config
    top_k = config.top_k or 0
    columns_LPC = torch.zeros(config.num_moe_layers, num_places, 2 * top_k + 1, device=mesh.device)
    with ExitStack() as stack:
        for model in engine.parts:
            stack.enter_context(generating(model))
        for batch in batches:
            inputs, batch = move_to_device(batch, mesh)
            for model, output in engine.forward(inputs, lambda x_BSD, _: x_BSD):
                if output.stats is None:
                    continue
                # Every token is routed by one of the ranks of `mesh.sequence`.
                assert batch.numbers_BS is not None
                valid_BS = model.slice_local(batch.documents_BS >= 0)
                places_N = model.slice_local(batch.numbers_BS)[valid_BS]
                experts_LNK, weights_LNK, margin_LN = (
                    figures[:, valid_BS].float()
                    for figures in (output.stats.experts_BSK, output.stats.weights_BSK, output.stats.margin_BS)
                )
                # A plugin's router can give a token another number of experts than K. E stands for none.
                missing = (0, top_k - experts_LNK.shape[-1])
                experts_LNK, weights_LNK = (
                    pad(experts_LNK, missing, value=config.num_experts),
                    pad(weights_LNK, missing),
                )
                columns_LPC[model.moe_layers, places_N] = torch.cat(
                    (experts_LNK, weights_LNK, margin_LN.unsqueeze(-1)), dim=-1
                )
    dist.all_reduce(columns_LPC, group=mesh.world)
    return columns_LPC


def as_routing(columns_LTC: np.ndarray, num_experts: int) -> ProbeRouting:
    """Return what `route` has found for the tokens of the probe."""
    top_k = columns_LTC.shape[2] // 2
    margin_LT = columns_LTC[..., -1] if top_k < num_experts else np.full(columns_LTC.shape[:2], np.nan)
    experts_LTK = columns_LTC[..., :top_k].astype(np.int32)
    return ProbeRouting(experts_LTK, columns_LTC[..., top_k:-1], margin_LT, num_experts)
