"""Options of the commands that compute: features, score, label-efficiency."""

from dataclasses import dataclass

from mmearth_ray.evaluate.protocols.names import NORMALISATIONS, PRECISIONS, PROTOCOLS, USUAL
from mmearth_ray.evaluate.protocols.recipes import RECIPES
from mmearth_ray.settings import key

CACHE = "runs/features"


@dataclass(frozen=True)
class FeaturesOptions:
    encoder: str = key("", "a run, an exported or imported model, random:SIZE/PATCH, timm:MODEL=FILE, statistics")
    dataset: str = key("", "the labelled data set, a folder that convert-... wrote")
    normalisation: str = key("dataset", "whose mean and std the bands are normalised by", among=NORMALISATIONS)
    batch: int = key(32, "images at once", at_least=1)
    workers: int | None = key(
        None, "Ray tasks at once; null: as many as Ray has CPUs for; 0: in this process, no Ray", at_least=0
    )
    threads: int = key(1, "CPUs of a task", at_least=1)
    gpus: bool = key(False, "compute on GPUs, one for each task")
    out: str = key(CACHE, "where features are kept, in a folder for each encoder, data set and normalisation")


@dataclass(frozen=True)
class ScoringOptions:
    """What `score` and `label-efficiency` have in common."""

    dataset: str = key("", "the labelled data set, a folder that convert-... wrote")
    recipe: str = key("converged", "how probes and fine-tuning are trained", among=RECIPES)
    normalisation: str = key("dataset", "whose mean and std the bands are normalised by", among=NORMALISATIONS)
    steps: int | None = key(None, "steps of a fine-tuning at most; null: those of the recipe", at_least=1)
    precision: str = key("fp32", "of finetune and decoder; bf16: autocast with float32 weights", among=PRECISIONS)
    k: int = key(5, "neighbours of the knn protocol", at_least=1)
    bootstrap: int = key(1000, "resamples of the test images for intervals", at_least=10)
    workers: int | None = key(None, "points at once; null: as many as Ray has CPUs for; 0: in this process, no Ray", at_least=0)
    threads: int = key(1, "CPUs of a point", at_least=1)
    gpus: bool = key(False, "compute features and fine-tune on GPUs, one for each task")
    cache: str = key(CACHE, "where features are kept, for other commands too")


@dataclass(frozen=True)
class ScoreOptions(ScoringOptions):
    encoder: str = key("", "a run, an exported or imported model, random:SIZE/PATCH, timm:MODEL=FILE, statistics")
    protocols: list[str] = key(["knn", "logistic"], "how the encoder is scored", among=PROTOCOLS)
    seeds: int = key(1, "times that a protocol runs which draws anything: weights, batches", at_least=1)
    csv: str = key("", "a file to write the scores to as well, in torchgeo-bench's column names")


@dataclass(frozen=True)
class LabelEfficiencyOptions(ScoringOptions):
    encoders: list[str] = key([], "what is compared: runs, exported or imported models, random:SIZE/PATCH, timm:MODEL=FILE")
    names: list[str] = key([], "what reports call the encoders; empty: by their folders")
    fractions: list[float] = key([0.01, 0.05, 0.1, 0.5, 1.0], "shares of the training labels", above=0, at_most=1)
    seeds: int = key(5, "times that every point is computed, each with labels (and weights) of its own", at_least=1)
    protocols: list[str] = key(list(USUAL), "how encoders are scored", among=PROTOCOLS)
    supervised: bool = key(True, "train the same encoders from scratch as a baseline, without the finetune protocol too")
    out: str = key("runs/label-efficiency", "where points, table and report are kept")
