"""Figures: every row of the table gets its panel, missing data is said, and a PNG is whole or not there."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from mmearth_ray.modalities import TABLE, ClassCode, Kind, Level, Modality, get, tasks
from mmearth_ray.report.colours import class_colours
from mmearth_ray.report.reconstruction import build_reconstruction, draw_reconstruction
from mmearth_ray.report.tile import build_tile, draw_tile

SIDE, PATCH = 64, 8
INPUT = tasks()[0]
SOIL = Modality(
    name="soil", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=("moisture",), dtype="float32", units=("%",), source="test"
)  # fmt: skip
ROCK = Modality(
    name="rock", level=Level.PIXEL, kind=Kind.CATEGORICAL, bands=("type",), dtype="uint8", missing=(0,), source="test",
    classes=(ClassCode(3, "granite"), ClassCode(7, "basalt"), ClassCode(9, "chalk")),
)  # fmt: skip
MOOD = Modality(
    name="mood", level=Level.IMAGE, kind=Kind.CATEGORICAL, bands=("mood",), dtype="int16", source="test",
    classes=(ClassCode(0, "calm"), ClassCode(1, "wild")),
)  # fmt: skip


def relief(seed: int, side: int = SIDE) -> np.ndarray:
    """(side, side) float64 in 0..1: a smooth random surface with some detail."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    surface = np.zeros((side, side))
    for wave in range(1, 9):
        for _ in range(3):
            ky, kx = rng.normal(size=2) * wave * 3
            surface += np.cos(ky * y + kx * x + rng.uniform(0, 6.28)) / wave
    return (surface - surface.min()) / np.ptp(surface)


def values(m: Modality, seed: int) -> np.ndarray:
    """Plausible physical values or class labels of one modality, following a relief shared by all layers of the seed."""
    rng = np.random.default_rng(seed)
    land = relief(seed)
    if m.kind is Kind.CATEGORICAL and m.level is Level.PIXEL:
        return np.digitize(land, np.quantile(land, np.linspace(0, 1, min(6, len(m.classes)) + 1)[1:-1])).astype(np.int64)
    if m.kind is Kind.CATEGORICAL:
        return np.asarray(seed % len(m.classes))
    bounds = m.bounds or ((0, 100),) * len(m.bands)
    if m.level is Level.IMAGE:
        return np.array([rng.uniform(max(low, -1), min(high, 300)) for low, high in bounds], np.float32)
    layers = []
    for place, (low, high) in enumerate(bounds):
        low, high = max(low, -25), min(high, 3000)
        mixed = 0.2 + 0.5 * land + (0.1 + 0.02 * place) * relief(seed + place + 1)
        layers.append(low + (high - low) * (mixed + rng.normal(0, 0.02, land.shape)))
    return np.stack(layers)


def raw_tile(table: tuple[Modality, ...], seed: int = 1) -> dict[str, np.ndarray]:
    """A tile as stored: raw codes, native types, a corner without data."""
    tile = {}
    for m in table:
        found = values(m, seed) if m.kind is not Kind.FLAGS else np.where(relief(seed) > 0.8, m.classes[0].code, 0)
        if m.kind is Kind.CATEGORICAL and m.level is Level.PIXEL:
            found = np.array([entry.code for entry in m.classes])[found]
        if m.level is Level.PIXEL:
            found = np.clip(found, *((0.0, 65535.0) if m.kind is not Kind.CONTINUOUS or not m.bounds else m.bounds[0]))
            found = np.broadcast_to(found, (len(m.bands), SIDE, SIDE)).astype(m.dtype)
            found[:, :12, 50:] = m.missing[0] if m.missing else np.nan
        tile[m.name] = found.astype(m.dtype)
    return tile


def make_sample(targets: tuple[Modality, ...], seed: int) -> dict[str, Any]:
    """A sample whose predictions are the truth with noise; a corner of every map is without truth."""
    rng = np.random.default_rng(seed)
    grid = SIDE // PATCH
    visible = np.zeros(grid * grid, bool)
    visible[rng.permutation(grid * grid)[: int(0.4 * grid * grid)]] = True
    sample: dict[str, Any] = {
        "id": f"tile {seed:05d}", "visible": visible.reshape(grid, grid), "truth": {}, "prediction": {}, "valid": {},
    }  # fmt: skip
    for m in targets:
        truth = values(m, seed)
        guess: Any = truth
        valid = np.ones(truth.shape, bool)
        if m.kind is Kind.CONTINUOUS:
            guess = truth + rng.normal(0, 0.05 * (np.std(truth) + 0.1), truth.shape)
        elif m.level is Level.PIXEL:
            guess = np.where(rng.random(truth.shape) < 0.85, truth, rng.integers(0, len(m.classes), truth.shape))
        else:
            odds = rng.exponential(0.1, len(m.classes)) / len(m.classes)
            odds[int(truth)] += 0.5
            guess = odds / odds.sum()
        if m.level is Level.PIXEL:
            valid[..., :10, 44:] = False
        sample["truth"][m.name], sample["prediction"][m.name], sample["valid"][m.name] = truth, guess, valid
    return sample


def panel(figure: Figure, title: str) -> Axes:
    found = [axes for axes in figure.axes if axes.get_title(loc="left").split(" · ")[0] == title]
    assert len(found) == 1, f"{title}: {len(found)} panels"
    return found[0]


def words(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in [*axes.texts, *(legend.get_texts() if legend else [])]]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from the header, after decoding the whole file."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert imread(path).shape[:2] == (height, width)
    return width, height


FACTS = {"id": "T31UFT_00042", "date": "2020-07-14", "product": "l2a", "latitude": "46.52 N", "longitude": "6.63 E"}


def test_tile_png_has_a_panel_for_every_row(tmp_path: Path) -> None:
    draw_tile(tmp_path / "tile.png", raw_tile(TABLE), TABLE, "A tile", FACTS)
    width, height = png_size(tmp_path / "tile.png")
    assert width > height > 500
    figure = build_tile(raw_tile(TABLE), TABLE, "A tile", FACTS)
    for m in TABLE:
        assert "absent" not in words(panel(figure, m.name.replace("_", " "))), m.name
    assert any("product: l2a" in word for axes in figure.axes for word in words(axes))
    assert sum(bool(axes.get_title(loc="left")) for axes in figure.axes) == len(TABLE)


def test_values_units_and_classes_are_written() -> None:
    tile = raw_tile(TABLE)
    vector = next(m for m in TABLE if m.level is Level.IMAGE and len(m.bands) == 12)
    tile[vector.name] = np.array([281.25, *[np.nan] * 11], np.float32)
    many = next(m for m in TABLE if m.level is Level.IMAGE and len(m.classes) > 256)
    tile[many.name] = np.asarray(845, np.int16)
    shown = build_tile(tile, TABLE, "t", {})
    assert "281.2 K" in words(panel(shown, vector.name))
    assert words(panel(shown, vector.name)).count("absent") == 11
    assert many.classes[845].name in words(panel(shown, many.name.replace("_", " ")))
    tile[many.name] = np.asarray(-1, np.int16)
    assert "absent" in words(panel(build_tile(tile, TABLE, "t", {}), many.name.replace("_", " ")))


def test_class_legend_lists_present_classes_with_shares() -> None:
    raw = np.full((1, SIDE, SIDE), 7, np.uint8)
    raw[0, : SIDE // 4] = 3
    raw[0, :, 0] = 200  # no class: missing
    legend = words(panel(build_tile({ROCK.name: raw}, [ROCK], "t", {}), "rock"))
    assert legend == ["basalt 75%", "granite 25%"]


def test_flags_count_every_bit_among_valid_pixels() -> None:
    m = next(m for m in TABLE if m.kind is Kind.FLAGS)
    raw = np.zeros((1, 4, 4), np.uint16)
    raw[0, 0] = m.missing[0]
    raw[0, 1] = m.classes[0].code
    raw[0, 1, :2] |= m.classes[1].code
    legend = words(panel(build_tile({m.name: raw}, [m], "t", {}), m.name.replace("_", " ")))
    assert legend == [f"{m.classes[0].name} 33%", f"{m.classes[1].name} 17%"]


@pytest.mark.parametrize("m", TABLE, ids=lambda m: m.name)
def test_a_layer_without_data_or_entry_says_absent(m: Modality) -> None:
    assert "absent" in words(panel(build_tile({}, [m], "t", {}), m.name.replace("_", " ")))
    if m.level is Level.PIXEL:
        filler = np.full((len(m.bands), 8, 8), m.missing[0] if m.missing else -np.inf).astype(m.dtype)
        assert "absent" in words(panel(build_tile({m.name: filler}, [m], "t", {}), m.name.replace("_", " ")))


def test_missing_pixels_are_transparent_and_percentiles_ignore_them() -> None:
    raw = np.full((1, 10, 10), np.nan, np.float32)
    raw[0, 5:] = np.linspace(10, 20, 50).reshape(5, 10)
    figure = build_tile({SOIL.name: raw}, [SOIL], "t", {})
    rgba = np.asarray(panel(figure, "soil").images[0].get_array())
    assert (rgba[:5, :, 3] == 0).all()
    assert (rgba[5:, :, 3] == 1).all()
    assert {"10.2", "19.8", "%"} <= {word for axes in figure.axes for word in words(axes)}


def test_reconstruction_png_has_every_target(tmp_path: Path) -> None:
    samples = [make_sample(tasks(), seed) for seed in (1, 2)]
    draw_reconstruction(tmp_path / "r.png", samples, tasks(), INPUT, PATCH, "Reconstructions")
    assert min(png_size(tmp_path / "r.png")) > 700
    assert (tmp_path / "r.png").stat().st_size < 3_000_000
    figure = build_reconstruction(samples[:1], tasks(), INPUT, PATCH, "Reconstructions")
    titles = [axes.get_title(loc="left").split(" · ")[0] for axes in figure.axes]
    for m in tasks():
        keyed = m.level is Level.PIXEL and m.kind is Kind.CATEGORICAL  # its classes have a key at the bottom as well
        assert titles.count(m.name.replace("_", " ")) == 1 + keyed, m.name
    maps = sum(m.level is Level.PIXEL for m in tasks())
    assert sum(bool(axes.patch.get_hatch()) for axes in figure.axes) == 2 * (1 + maps)


def test_hidden_patches_are_grey_and_scores_count_only_them() -> None:
    sample = make_sample((SOIL,), 3)
    hidden = np.kron(~sample["visible"], np.ones((PATCH, PATCH), bool))
    sample["valid"][SOIL.name] = np.ones((SIDE, SIDE), bool)
    sample["prediction"][SOIL.name] = sample["truth"][SOIL.name] + np.where(hidden, 2.5, 99)
    figure = build_reconstruction([sample], [SOIL], SOIL, PATCH, "t")
    assert ["predicted", "RMSE 2.50 %"] in [words(axes) for axes in figure.axes]
    seen = next(axes for axes in figure.axes if any(word.startswith("visible 39%") for word in words(axes)))
    rgba = np.asarray(seen.images[0].get_array())
    assert np.ptp(rgba[hidden], axis=0).max() == 0
    assert np.ptp(rgba[~hidden], axis=0).max() > 0.1


def test_accuracy_counts_hidden_pixels_with_truth() -> None:
    sample = make_sample((ROCK,), 4) | {"input": values(INPUT, 4)}
    hidden = np.kron(~sample["visible"], np.ones((PATCH, PATCH), bool))
    truth = np.where(np.arange(SIDE)[:, None] < SIDE // 2, -1, 1) * np.ones((1, SIDE), int)
    sample["truth"][ROCK.name] = truth
    sample["valid"] = {}
    sample["prediction"][ROCK.name] = np.where(hidden & (truth == 1), 1, 0)
    figure = build_reconstruction([sample], [ROCK], INPUT, PATCH, "t")
    assert ["predicted", "accuracy 100%"] in [words(axes) for axes in figure.axes]


@pytest.mark.parametrize("m", [*tasks()[1:], MOOD], ids=lambda m: m.name)
@pytest.mark.parametrize("how", ["no entry", "never valid"])
def test_a_target_without_truth_says_absent(m: Modality, how: str) -> None:
    sample = make_sample((m,), 5) | {"input": values(INPUT, 5)}
    if how == "no entry":
        sample["truth"] = {}
    else:
        sample["valid"][m.name] = np.zeros_like(sample["valid"][m.name])
    figure = build_reconstruction([sample], [m], INPUT, PATCH, "t")
    shown = next(axes for axes in figure.axes if axes.get_title(loc="left").split(" · ")[0] == m.name.replace("_", " "))
    assert any("absent" in word for word in words(shown))


def test_invented_rows_need_no_other_edit() -> None:
    invented = (SOIL, ROCK, MOOD)
    tile = build_tile(raw_tile(invented), invented, "t", {})
    sample = make_sample(invented, 6) | {"input": values(INPUT, 6)}
    figure = build_reconstruction([sample], invented, INPUT, PATCH, "t")
    for m in invented:
        assert "absent" not in words(panel(tile, m.name))
        assert m.name in [axes.get_title(loc="left") for axes in figure.axes]


@pytest.mark.parametrize("m", [m for m in (*TABLE, ROCK) if m.classes], ids=lambda m: m.name)
def test_class_colours_are_distinct_and_repeatable(m: Modality) -> None:
    names = [entry.name for entry in m.classes][:100]
    assert len(set(class_colours(names))) == len(names)
    assert class_colours(names) == class_colours(names)


def test_water_is_blue_and_trees_are_green() -> None:
    for name, strongest in (("permanent water", 2), ("tree cover", 1), ("built-up", 0)):
        colour = class_colours(["unknown", name])[1]
        parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert max(parts) == parts[strongest], name


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"before")

    def fail(self: Figure, name: Path, **options: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_tile(path, {}, [SOIL], "t", {})
    with pytest.raises(OSError, match="disk full"):
        draw_reconstruction(path, [make_sample((SOIL,), 1)], [SOIL], SOIL, PATCH, "t")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_tile(tmp_path / name, raw_tile((SOIL, ROCK)), (SOIL, ROCK), "t", FACTS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_cannot_be_drawn_is_refused() -> None:
    sample = make_sample((SOIL,), 1)
    flags = next(m for m in TABLE if m.kind is Kind.FLAGS)
    with pytest.raises(ValueError, match="1 to 4 samples; got 0"):
        build_reconstruction([], [SOIL], SOIL, PATCH, "t")
    with pytest.raises(ValueError, match="never predicted"):
        build_reconstruction([sample], [flags], SOIL, PATCH, "t")
    with pytest.raises(ValueError, match="needs an 'input' array"):
        build_reconstruction([sample], [SOIL], get(INPUT.name), PATCH, "t")
    with pytest.raises(ValueError, match=r"cover \(32, 32\) of an image \(64, 64\)"):
        build_reconstruction([sample], [SOIL], SOIL, PATCH // 2, "t")
