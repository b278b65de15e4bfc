"""The evaluation of a model on the held-out part of a token store."""

import torch

from data.loader import evaluation_batches
from data.tokens.store import Store
from training.step import Evaluated, Evaluation, evaluate


class Evaluator:
    """Evaluates a model on the held-out rows of `store`.

    Args:
        seq_len: tokens of a row.
        batch_rows: rows of a batch on each data-parallel rank.
        cross_documents: as in `DataConfig`.
    """

    def __init__(self, model: Evaluated, store: Store, *, seq_len: int, batch_rows: int, cross_documents: bool) -> None:
        self.model, self.store = model, store
        self.seq_len, self.batch_rows, self.cross_documents = seq_len, batch_rows, cross_documents
        tokenizer = store.tokenizer
        self.token_bytes_V = torch.from_numpy(tokenizer.token_bytes()).to(model.mesh.device)
        self.prefix_bytes_V = torch.zeros_like(self.token_bytes_V)
        if tokenizer.bos_id is not None:
            self.prefix_bytes_V[tokenizer.bos_id] = len(tokenizer.prefix)

    def evaluate(self) -> Evaluation:
        """Evaluate on every held-out row once. Collective."""
        layout = self.model.mesh.layout
        batches = evaluation_batches(
            self.store.heldout,
            seq_len=self.seq_len,
            batch_rows=self.batch_rows,
            rank=layout.data_rank(self.model.mesh.rank),
            world_size=layout.data,
            cross_documents=self.cross_documents,
        )
        return evaluate(self.model, batches, self.store.domains, self.token_bytes_V, self.prefix_bytes_V)
