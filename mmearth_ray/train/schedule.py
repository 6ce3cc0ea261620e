"""The learning rate of a step: linear warm-up, then half a cosine (published: MMEarth-train, lr_sched, per iteration)."""

import math


def learning_rate(step: int, *, steps: int, peak: float, minimum: float, warmup_fraction: float) -> float:
    """Learning rate of 1-based `step` of `steps`.

    As published the rate is that of the moment before the step, so the very first one is zero when there is a warm-up.
    """
    done, warmup = step - 1, warmup_fraction * steps
    if done < warmup:
        return peak * done / warmup
    progress = (done - warmup) / max(steps - warmup, 1e-12)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
