"""How the world of processes is cut into axes, mirrored by `conf/parallel`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes; ranks that no key claims are plain data parallel."""

    expert: Literal["auto"] | int = "auto"
    """Ranks over which one set of experts is spread. `auto`: the largest that the world and num_experts allow."""
    start_timeout_s: float = 300.0
    """Seconds that start-up (rendezvous, first collective) may take."""
    timeout_s: float = 100.0
    """Seconds a collective may wait during training before the run ends."""

    def __post_init__(self) -> None:
        if self.expert != "auto" and self.expert < 1:
            raise ValueError(f"expert={self.expert}: expected an integer >= 1, or auto")
        for field in ("start_timeout_s", "timeout_s"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field}={getattr(self, field)}: expected seconds > 0")

    def expert_size(self, world_size: int, num_experts: int | None) -> int:
        """The expert-parallel degree for this world.

        Raises:
            ValueError: the degree does not divide the world size or the number of experts.
        """
        if num_experts is None:
            if self.expert not in ("auto", 1):
                raise ValueError(f"expert={self.expert}: expected 1 or auto in a dense model (num_experts is null)")
            return 1
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0 and num_experts % n == 0]
        if self.expert == "auto":
            return fitting[-1]
        if self.expert not in fitting:
            raise ValueError(
                f"expert={self.expert}: expected a divisor of both model.num_experts={num_experts} and the world size "
                f"{world_size}, one of {', '.join(map(str, fitting))}"
            )
        return self.expert
