"""The learning rate of a step, as a factor of the peak: a pure function, so that resuming needs no schedule state."""


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, decay: str) -> float:
    """Factor of the peak rate at `step`, counted from 0.

    Rises linearly over `warmup_steps`, then falls linearly so that it would reach 0 at `total_steps`, or stays at 1
    with decay "constant". A run longer than `total_steps` keeps the smallest factor.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay == "constant":
        return 1.0
    left = max(total_steps - step, 1)
    return min(1.0, left / max(total_steps - warmup_steps, 1))
