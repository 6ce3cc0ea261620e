"""A model for several image sizes: at each it is the model of that size alone, and the others' parameters stay out of it."""

from typing import Any

import pytest
import torch
from tensors import assert_near
from tiny_objective import GRID, INPUT, TARGETS, make_batch, make_objective
from torch import Tensor

from mmearth_ray.modalities import Level
from mmearth_ray.model.encoder import Stem
from mmearth_ray.model.flops import shape_of
from mmearth_ray.model.minkowski import require_minkowski
from mmearth_ray.model.mpmae import FIRST_BIAS, MPMAE, PUBLISHED_WIDE, build_mpmae, initialise
from mmearth_ray.objective import Objective

PRIMARY, OTHERS = 16, (8, 32)
PATCHES = (PRIMARY, *OTHERS)


def own(name: str) -> bool:
    """Whether a parameter of a model of one size depends on that size: part of the stem after its 3x3, or a head of maps."""
    return ".encoder.stem" in name or ".pixel_heads." in name


def alone(objective: Objective, patch_size: int, stem: Stem = "modified") -> Objective:
    """A model of one size, made as such, with a copy of the weights that the objective has for that size."""
    single, given = make_objective(patch_size=patch_size, stem=stem), dict(objective.named_parameters())
    with torch.no_grad():
        for name, parameter in single.named_parameters():
            moved = own(name) and patch_size != PRIMARY
            parameter.copy_(given[name.replace("model.", f"model.sizes.{patch_size}.", 1) if moved else name])
    return single


def step(objective: Objective, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    objective.zero_grad()
    loss, errors = objective(batch, objective.valid_counts(batch).sum(0), 1.0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(objective.named_parameters()).keys()  # every one takes part
    return loss.detach(), errors, gradients


@pytest.mark.parametrize("stem", ["modified", "original"])
@pytest.mark.parametrize("patch_size", PATCHES)
def test_at_each_size_it_is_the_model_of_that_size_alone_bit_for_bit(patch_size: int, stem: Stem) -> None:
    objective = make_objective(patch_size=PRIMARY, others=OTHERS, stem=stem)
    single, batch = alone(objective, patch_size, stem), make_batch(side=GRID * patch_size)
    assert objective.patch_size(batch) == patch_size
    assert torch.equal(objective.valid_counts(batch), single.valid_counts(batch))
    (loss, errors, gradients), (expected_loss, expected_errors, expected) = step(objective, batch), step(single, batch)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(errors, expected_errors)
    for name, gradient in expected.items():
        moved = own(name) and patch_size != PRIMARY
        found = gradients.pop(name.replace("model.", f"model.sizes.{patch_size}.", 1) if moved else name)
        assert torch.equal(found, gradient), name
        assert found.abs().max() > 0, name
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients.values())
    shown, alike = objective.reconstruct(batch), single.reconstruct(batch)
    for m in TARGETS:
        assert torch.equal(shown[m.name]["prediction"].nan_to_num(), alike[m.name]["prediction"].nan_to_num()), m.name


def test_what_lies_idle_cannot_spoil_the_loss() -> None:
    objective, batch = make_objective(patch_size=PRIMARY, others=OTHERS), make_batch(side=GRID * PRIMARY)
    expected = step(objective, batch)[0]
    with torch.no_grad():
        for parameter in objective.model.idle(PRIMARY):
            parameter.fill_(torch.nan)
    assert torch.equal(step(objective, batch)[0], expected)


def test_names_are_those_of_the_primary_size_and_only_stems_and_heads_of_maps_have_others() -> None:
    several, single = make_objective(patch_size=PRIMARY, others=OTHERS), make_objective(patch_size=PRIMARY)
    names, plain = ([name for name, _ in o.named_parameters()] for o in (several, single))
    assert names[: len(plain)] == plain
    mine = [name for name in plain if own(name)]
    maps = [m for m in TARGETS if m.level is Level.PIXEL]
    assert len(mine) == 4 + 2 * len(maps)
    assert names[len(plain) :] == [name.replace("model.", f"model.sizes.{p}.", 1) for p in OTHERS for name in mine]
    idle = {id(p) for p in several.model.idle(8)}
    assert [name for name, p in several.named_parameters() if id(p) in idle] == [
        name for name in names if own(name) and ".sizes.8." not in name
    ]
    assert len(set(map(id, several.parameters()))) == len(names)


def build(patch_size: int = PRIMARY, others: tuple[int, ...] = OTHERS, **options: Any) -> MPMAE:
    return build_mpmae(size="atto", in_channels=len(INPUT.bands), image_size=7 * patch_size, patch_size=patch_size,
                       targets=TARGETS, decoder_width=16, others=others, **options)  # fmt: skip


@pytest.mark.parametrize("scheme", ["uniform", "published"])
def test_the_primary_size_starts_as_if_it_were_alone_and_the_others_by_the_same_table(scheme: str) -> None:
    several, single = build(), build(others=())
    for model in (several, single):
        initialise(model, scheme, torch.Generator().manual_seed(3))
    found = dict(several.named_parameters())
    for name, parameter in single.named_parameters():
        assert torch.equal(found[name], parameter), name
    for name in ("encoder.stem.0.weight", f"decoder.pixel_heads.{INPUT.name}.weight"):
        wide = scheme == "published" and any(name == pattern.replace("*", INPUT.name) for pattern in PUBLISHED_WIDE)
        assert found[f"sizes.32.{name}"].std().item() == pytest.approx(0.88 if wide else 0.02, rel=0.1)
    original = build(stem="original")
    initialise(original, scheme, torch.Generator().manual_seed(3))
    found = dict(original.named_parameters())
    assert FIRST_BIAS[1] == "encoder.stem_orig.0.bias"
    assert all(found[f"{size}{FIRST_BIAS[1]}"].std() > 0.01 for size in ("", "sizes.8.", "sizes.32."))


def test_the_work_is_that_of_the_size_at_hand() -> None:
    several = build()
    for patch_size in PATCHES:
        single = shape_of(build(patch_size, ()), 7 * patch_size, 19)
        assert shape_of(several.at(patch_size), 7 * patch_size, 19) == single


def test_minkowski_convolves_every_size() -> None:
    try:
        require_minkowski()
    except Exception as error:
        pytest.skip(str(error))
    models = build(backend="packed"), build(backend="minkowski")
    for model in models:
        initialise(model, "uniform", torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(49, generator=generator)[None]
    visible, hidden = order[:, :19].sort().values, order[:, 19:].sort().values
    for patch_size in PATCHES:
        image = torch.randn(1, len(INPUT.bands), 7 * patch_size, 7 * patch_size, generator=generator)
        expected, found = (model.at(patch_size)(image, visible, hidden) for model in models)
        for m in TARGETS:
            assert_near(found[m.name], expected[m.name], 1e-5, f"{m.name} at {patch_size}")
