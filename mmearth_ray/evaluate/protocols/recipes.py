"""How heads and encoders are trained: the published settings, and settings that converge.

Published: the job scripts of MP-MAE's evaluation (github.com/vishalned/MMEarth-train, arXiv:2405.02771).  With few labels their
probe has taken a hundred steps at a learning rate of 2.5e-5 when it ends, and says more about the optimiser than about the
features.  Hence the second kind, whose steps and rate do not shrink with the labels.  There is no published regression: the
same settings go with squared error.
"""

import math
from dataclasses import dataclass

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.datasets.task import Goal

RECIPES = ("published", "converged")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW with a warm-up and a cosine over all steps.

    `rates`: peak learning rates, of which the best on validation is taken.  `batch`: images of a step (of a probe of maps,
    cells); of fewer training images, all of them.  `least_steps`: steps at least, whatever the labels.  `warmup`: share of
    the steps.  `smoothing`: of labels.  `drop_path`: rate of the last block, growing from 0 at the first.  `layer_decay`:
    factor from a block's rate to that of the one before.  `frozen_share`: share of the steps in which the encoder rests, after
    which it has neither weight decay nor layer decay (published segmentation).  `augment`: flips and quarter turns.
    `best`: keep the weights that are best on validation, not the last.  `standardise`: features of a probe by training's
    mean and deviation, not by LayerNorm per image.  `head_std`: of the head's fresh weights.
    `drop_last`: images of an epoch that fill no batch are left out of it.
    """

    name: str
    rates: tuple[float, ...]
    batch: int
    epochs: int
    least_steps: int = 0
    warmup: float = 0.0
    minimum: float = 1e-6
    weight_decay: float = 0.3
    smoothing: float = 0.0
    drop_path: float = 0.0
    layer_decay: float = 1.0
    frozen_share: float = 0.0
    augment: bool = False
    best: bool = False
    standardise: bool = False
    head_std: float = 2e-5
    drop_last: bool = False

    def steps(self, images: int, batch: int, most: int | None) -> int:
        """Steps of a training on so many images, at most `most`.  Raises UsageError for less than one."""
        if most is not None and most < 1:
            raise UsageError(f"steps={most} must be at least 1, or null for the {self.epochs} epochs of the recipe")
        in_epoch = max(1, images // batch) if self.drop_last else math.ceil(images / batch)
        planned = max(self.epochs * in_epoch, self.least_steps)
        return planned if most is None else min(planned, most)


# Label efficiency in the published scripts: batch 32, lr = 2e-4 x 32 / 256.  Drop path 0.1 is set there as well, and active, as
# the frozen encoder stays in train mode; on features that are computed once it cannot act.
PUBLISHED_FEW = Recipe(name="published", rates=(2e-4 * 32 / 256,), batch=32, epochs=100, smoothing=0.2, drop_last=True)
# With all labels: batch 64 x 16 accumulated, the remainder of an epoch thrown away, lr = 2e-4 x 1024 / 256.
PUBLISHED_PROBE = Recipe(name="published", rates=(2e-4 * 1024 / 256,), batch=1024, epochs=100, smoothing=0.2, drop_last=True)
# Standardised features and a plain linear layer are a convex problem: rates of a decade apart, the best on validation.
CONVERGED_PROBE = Recipe(
    name="converged", rates=(1e-3, 1e-2, 1e-1), batch=256, epochs=100, least_steps=500, warmup=0.1, weight_decay=1e-2,
    best=True, standardise=True,
)  # fmt: skip
# Classification: batch 64 x 16 accumulated, lr = 2e-4 x 1024 / 256.
PUBLISHED_TUNING = Recipe(
    name="published",
    rates=(2e-4 * 1024 / 256,),
    batch=1024,
    epochs=100,
    smoothing=0.2,
    drop_path=0.1,
    layer_decay=0.9,
    drop_last=True,
)
# Segmentation: batch 8 x 4 accumulated, lr = 1e-2 x 32 / 256; 50 epochs of a resting encoder, then 150 of all.
PUBLISHED_MAPS = Recipe(name="published", rates=(1e-2 * 32 / 256,), batch=32, epochs=200, drop_path=0.1, frozen_share=0.25,
                        drop_last=True)  # fmt: skip
# One rate for every number of labels; weight decay as for training ConvNeXt from scratch (arXiv:2201.03545, table 5).
CONVERGED_TUNING = Recipe(
    name="converged", rates=(5e-4,), batch=64, epochs=100, least_steps=300, warmup=0.1, weight_decay=0.05, drop_path=0.1,
    augment=True, best=True, head_std=0.02,
)  # fmt: skip
CONVERGED_MAPS = Recipe(
    name="converged", rates=(5e-4,), batch=16, epochs=100, least_steps=300, warmup=0.1, weight_decay=0.05, drop_path=0.1,
    augment=True, best=True, head_std=0.02,
)  # fmt: skip


def probe_recipe(name: str, *, all_labels: bool = True) -> Recipe:
    """Of a linear layer on frozen features; published ones differ with `all_labels`.  Raises UsageError for another name."""
    published = PUBLISHED_PROBE if all_labels else PUBLISHED_FEW
    return {"published": published, "converged": CONVERGED_PROBE}[_known(name)]


def tuning_recipe(name: str, goal: Goal) -> Recipe:
    """Of an encoder and its head, or its decoder of SEGMENTATION.  Raises UsageError for a recipe there is not."""
    if goal is Goal.SEGMENTATION:
        return {"published": PUBLISHED_MAPS, "converged": CONVERGED_MAPS}[_known(name)]
    return {"published": PUBLISHED_TUNING, "converged": CONVERGED_TUNING}[_known(name)]


def _known(name: str) -> str:
    if name not in RECIPES:
        raise UsageError(f"there is no recipe '{name}'; use one of {', '.join(RECIPES)}")
    return name
