"""Learning rate as a pure function of the step."""

import math

from training.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step `step` (0 to `steps - 1`): linear warm-up, then the schedule, ending at `min_lr_ratio * lr`.

    `cosine`: half a cosine over the rest (SGDR, arXiv 1608.03983). `wsd`: constant, then linear decay over the last
    `decay_steps` (warmup-stable-decay, arXiv 2404.06395). `constant`: no decay.
    """
    warmup = steps // 20 if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    floor = config.min_lr_ratio
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if config.schedule == "wsd":
        decay = max(1, steps // 10) if config.decay_steps is None else config.decay_steps
        remaining = (steps - 1 - step) / decay if decay else 1.0
        return config.lr * (floor + (1 - floor) * min(1.0, remaining))
    return config.lr
