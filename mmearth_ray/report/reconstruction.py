"""The figure of reconstructions: input, visible patches, then truth beside prediction for every target.

Shapes: C bands, H W pixels of a tile, h w pixels of a crop, 4 = red, green, blue, opacity in 0..1.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmearth_ray.modalities import Kind, Level, Modality
from mmearth_ray.report.colours import Array, Scale, class_colours, label_paint, plain, scale_of
from mmearth_ray.report.page import (
    BAR_FOOT,
    GAP,
    HEAD,
    INK,
    MARGIN,
    SOFT,
    Card,
    Page,
    column_count,
    legend,
    number,
    save,
    table,
)

CROP_SIDE, PAIR_GAP = 1.5, 0.06  # inches
MAX_SAMPLES, TOP_CLASSES = 4, 3
HIDDEN, RIGHT, WRONG = "#8c8c8c", "#9fd3a6", "#c9d3e0"


@dataclass(frozen=True)
class _Pair:
    """Two maps side by side: titles, colours, a caption below the right one, and the scale if there is one to show."""

    title: str
    truth_HW4: Array
    prediction_HW4: Array
    caption: str = ""
    scale: Scale | None = None
    right_title: str = "predicted"


def _parts(modality: Modality, sample: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Truth, prediction and where the truth is known, all of the prediction's shape; no truth at all is allowed."""
    prediction = np.asarray(sample["prediction"][modality.name])
    categorical = modality.kind is Kind.CATEGORICAL
    truth = np.broadcast_to(sample["truth"].get(modality.name, -1 if categorical else np.nan), prediction.shape)
    known = truth >= 0 if categorical else np.isfinite(truth)
    given = sample["valid"].get(modality.name, True)
    return truth, prediction, (known & given).reshape(known.shape)


def _quantity_pair(modality: Modality, sample: Mapping[str, Any], hidden_HW: Array) -> _Pair:
    truth_CHW, prediction_CHW, valid_CHW = _parts(modality, sample)
    finite_CHW = np.isfinite(prediction_CHW)
    seen = (truth_CHW, valid_CHW) if valid_CHW.any() else (prediction_CHW, finite_CHW)
    scale = scale_of(modality, *seen)
    scored = (valid_CHW & finite_CHW & hidden_HW)[scale.bands]
    error = (prediction_CHW.astype(np.float64) - np.where(valid_CHW, truth_CHW, 0))[scale.bands][scored]
    caption = f"RMSE {number(float(np.sqrt(np.mean(error**2))))} {scale.unit}".strip() if error.size else "no truth"
    return _Pair(scale.title, scale.paint(truth_CHW, valid_CHW), scale.paint(prediction_CHW, finite_CHW), caption, scale)


def _class_pair(modality: Modality, sample: Mapping[str, Any], hidden_HW: Array) -> _Pair:
    truth_HW, prediction_HW, valid_HW = _parts(modality, sample)
    hits = (prediction_HW == truth_HW)[valid_HW & hidden_HW]
    truth_HW4 = label_paint(modality, np.where(valid_HW, truth_HW, -1))
    caption = f"accuracy {hits.mean():.0%}" if hits.size else "no truth"
    return _Pair(plain(modality.name), truth_HW4, label_paint(modality, prediction_HW), caption)


def _quantity_card(modality: Modality, sample: Mapping[str, Any]) -> Card:
    truth_C, prediction_C, valid_C = _parts(modality, sample)
    units = modality.units or ("",) * len(modality.bands)
    rows = [("", "truth", "predicted", "")]
    for band, true, guess, valid, unit in zip(modality.bands, truth_C, prediction_C, valid_C, units, strict=True):
        shown = number(float(true)) if valid else "absent"
        rows.append((plain(band), shown, number(float(guess)), "" if unit == "1" else unit))
    return plain(modality.name), len(rows), table(rows, (0.66, 0.9, 1.0))


def _class_card(modality: Modality, sample: Mapping[str, Any]) -> Card:
    truth = int(sample["truth"].get(modality.name, -1))
    chances = np.asarray(sample["prediction"][modality.name])
    known = truth >= 0 and bool(np.all(sample["valid"].get(modality.name, True)))
    best = [int(label) for label in np.argsort(-chances, kind="stable")[:TOP_CLASSES]]
    true_name = modality.classes[truth].name if known else "absent"

    def draw(axes: Axes) -> None:
        table([(f"true: {textwrap.shorten(true_name, 52, placeholder='…')}",)], ())(axes)
        for line, label in enumerate(best, 1):
            colour = RIGHT if known and label == truth else WRONG
            width = 0.88 * max(0.005, float(chances[label]))  # the percentage has the rest of the line
            axes.add_patch(Rectangle((0, line + 0.12), width, 0.86, color=colour, linewidth=0))
            name = textwrap.shorten(modality.classes[label].name, 44, placeholder="…")
            axes.text(0.015, line + 0.55, name, va="center", fontsize=7.5, color=INK, parse_math=False)
            axes.text(1, line + 0.55, f"{chances[label]:.0%}", ha="right", va="center", fontsize=7.5, color=INK)

    return plain(modality.name), 1 + len(best), draw


_PAIRS = {Kind.CONTINUOUS: _quantity_pair, Kind.CATEGORICAL: _class_pair}
_CARDS = {Kind.CONTINUOUS: _quantity_card, Kind.CATEGORICAL: _class_card}


def _input_pair(row: Modality, sample: Mapping[str, Any], targets: Sequence[Modality], hidden_HW: Array) -> _Pair:
    """The input image beside what the encoder sees of it: hidden patches are grey."""
    target = next((m for m in targets if m.name == row.name), None)
    if target is not None and (row.name in sample["truth"] or "input" not in sample):
        row, (image_CHW, _, valid_CHW) = target, _parts(target, sample)
    elif "input" in sample:
        image_CHW = np.asarray(sample["input"])
        valid_CHW = np.isfinite(image_CHW) & sample["valid"].get(row.name, True)
    else:
        raise ValueError(f"sample {sample['id']}: {row.name} is no target, so the sample needs an 'input' array (C, h, w)")
    if image_CHW.shape[1:] != hidden_HW.shape:
        raise ValueError(f"sample {sample['id']}: visible patches cover {hidden_HW.shape} of an image {image_CHW.shape[1:]}")
    scale = scale_of(row, image_CHW, valid_CHW)
    whole_HW4 = scale.paint(image_CHW, valid_CHW)
    seen_HW4 = np.where(hidden_HW[..., None], to_rgba(HIDDEN), whole_HW4)
    return _Pair(f"input: {scale.title}", whole_HW4, seen_HW4, right_title=f"visible {1 - hidden_HW.mean():.0%}")


def _draw_pair(page: Page, pair: _Pair, left: float, top: float) -> float:
    page.map(left, top, CROP_SIDE, pair.truth_HW4, pair.title)
    axes = page.map(left + CROP_SIDE + PAIR_GAP, top, CROP_SIDE, pair.prediction_HW4)
    words: dict[str, Any] = {"ha": "right", "fontsize": 7.5, "color": SOFT, "transform": axes.transAxes}
    axes.text(1, 1.02, pair.right_title, va="bottom", **words)
    axes.text(1, -0.03, pair.caption, va="top", **words)
    if pair.scale and max(pair.truth_HW4[..., 3].max(), pair.prediction_HW4[..., 3].max()) > 0:
        page.colour_bar(left, top + CROP_SIDE, CROP_SIDE, pair.scale)
    return top + CROP_SIDE + BAR_FOOT


def _draw_sample_head(page: Page, sample_id: str) -> None:
    axes = page.axes(MARGIN, page.top + 0.05, page.width - 2 * MARGIN, 0.24)
    axes.patch.set_facecolor("#eef1f5")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.text(0.006, 0.46, sample_id, va="center", fontsize=9, weight="bold", color=INK, parse_math=False)
    page.top += 0.33


def _draw_class_key(page: Page, samples: Sequence[Mapping[str, Any]], modality: Modality) -> None:
    """A line of swatches: the classes of a map that occur in any sample's truth or prediction."""
    parts = [np.unique(part) for sample in samples for part in _parts(modality, sample)[:2]]
    seen = [int(label) for label in np.unique(np.concatenate(parts)) if label >= 0]
    names = [entry.name for entry in modality.classes]
    colours = class_colours(names)
    lines = math.ceil(len(seen) / (page.width // 1.45))  # swatches are about as wide as their longest name
    per_line = math.ceil(len(seen) / max(1, lines))
    axes = page.axes(MARGIN, page.top + HEAD - 0.04, page.width - 2 * MARGIN, 0.02, plain(modality.name))
    axes.set_axis_off()
    page.top += HEAD + legend(axes, [(names[i], colours[i]) for i in seen], per_line)


def build_reconstruction(
    samples: Sequence[Mapping[str, Any]], targets: Sequence[Modality], input: Modality, patch_size: int, title: str
) -> Figure:
    """The figure of `draw_reconstruction`."""
    if not 1 <= len(samples) <= MAX_SAMPLES:
        raise ValueError(f"a figure holds 1 to {MAX_SAMPLES} samples; got {len(samples)}")
    untrained = [m.name for m in targets if not m.trainable]
    if untrained:
        raise ValueError(f"flags are stored, never predicted; remove {', '.join(untrained)} from the targets")
    maps = [m for m in targets if m.level is Level.PIXEL]
    columns = column_count(len(maps) + 1, 2, 4)
    pair_width = 2 * CROP_SIDE + PAIR_GAP
    width = 2 * MARGIN + columns * (pair_width + GAP) - GAP
    page = Page(width, title, "scores count hidden patches where truth is known")
    for sample in samples:
        _draw_sample_head(page, str(sample["id"]))
        hidden_HW = np.kron(~np.asarray(sample["visible"], bool), np.ones((patch_size, patch_size), bool))
        pairs = [_input_pair(input, sample, targets, hidden_HW)]
        pairs += [_PAIRS[m.kind](m, sample, hidden_HW) for m in maps]
        free = page.grid(columns, pair_width, [partial(_draw_pair, page, pair) for pair in pairs])
        page.cards(free, pair_width, [_CARDS[m.kind](m, sample) for m in targets if m.level is Level.IMAGE])
        page.top += 0.1
    for m in maps:
        if m.kind is Kind.CATEGORICAL:
            _draw_class_key(page, samples, m)
    return page.close()


def draw_reconstruction(
    path: str | Path,
    samples: Sequence[Mapping[str, Any]],
    targets: Sequence[Modality],
    input: Modality,
    patch_size: int,
    title: str,
) -> None:
    """Write a PNG that shows, for one to four samples, the input, what was visible of it, and truth beside prediction.

    A sample holds "id", "visible" bool (gh, gw) with gh * patch_size = h, and "truth", "prediction" and "valid" by name:
    maps (C, h, w) in the bands' units, class maps (h, w) as labels with -1 for missing, image-level quantities (C,);
    an image-level class is an int label in truth and probabilities (classes,) in prediction.  "input" (C, h, w) is needed
    where the input is no target.  A name that `truth` lacks is drawn as absent; one that `valid` lacks is valid.
    """
    save(build_reconstruction(samples, targets, input, patch_size, title), path)
