"""When and how a run saves its checkpoints: what is refused, what is kept, and what happens after a failure."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.region import LocalShard
from training.checkpoint.checkpoint import Assignment, assign, prune, write
from training.checkpoint.manifest import Retention
from training.checkpoint.peers import Peers
from training.checkpoint.shards import NotFiniteError, as_shard
from training.config import CheckpointConfig


class Saver:
    """Saves the checkpoints of one run. All ranks call its methods alike.

    Args:
        root: the directory of the checkpoints.
        newest: the checkpoint that the run continues from.
        note: receives lines for the user.
    """

    def __init__(
        self, root: Path, config: CheckpointConfig, peers: Peers, newest: str | None, note: Callable[[str], None]
    ) -> None:
        self.newest = newest
        """The newest checkpoint that was saved or that the run continues from."""
        self._root, self._config, self._peers, self._note = root, config, peers, note
        self._assignment: Assignment | None = None

    def refuse(self, step: int, reason: str) -> None:
        """Say that the checkpoint of `step` is not saved."""
        kept = "there is no checkpoint yet" if self.newest is None else f"the newest checkpoint is still {self.newest}"
        self._note(f"step {step} is not saved: {reason}; {kept}")

    def save(self, step: int, tensors: Mapping[str, Tensor | LocalShard], state: dict[str, Any]) -> None:
        """Save a checkpoint of `step`, unless a tensor is not finite, and delete those that are not kept. Collective.

        Args:
            tensors: name -> a whole tensor, or this rank's shard: the same names and regions at every call.
            state: JSON-serialisable.

        Raises:
            CheckpointError: on all ranks, if any rank failed.
        """
        shards = {name: as_shard(tensor) for name, tensor in tensors.items()}
        if self._assignment is None:
            self._assignment = assign(self._root, shards, self._peers)
        try:
            parts = self._assignment.choose(shards)
            path = write(self._root, step, self._assignment, parts, state, self._peers)
        except NotFiniteError as error:
            self.refuse(step, str(error))
            return
        self.newest = str(path)
        self._note(f"saved {path}")
        prune(self._root, step, Retention(self._config.keep), self._peers)
