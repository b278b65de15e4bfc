"""Names that other tests take from here."""

from training.parity_cases import CASES as _CASES
from training.parity_cases import MODEL, OPTIM, part_of
from training.parity_cases import global_batch as _global_batch

CASES = {name: (case.model, case.router) for name, case in _CASES.items()}
ROWS = 16


def global_batch(step):
    return _global_batch(step, ROWS)


__all__ = ["CASES", "MODEL", "OPTIM", "global_batch", "part_of"]
