"""The plain baseline computes what the objective computes, and what the published code computed."""

from pathlib import Path

import pytest
import torch
from tensors import assert_near, randomise
from tiny_objective import INPUT, TARGETS, make_statistics
from torch import Tensor, nn

from benchmarks.bench_parity import GRADIENT_FLOOR, TOLERANCES, build_objective
from benchmarks.bench_parity import make_batch as golden_batch
from benchmarks.golden_case import load_case
from benchmarks.plain import MASK, Plain, patchify
from benchmarks.subject import make_batch
from mmearth_ray import losses
from mmearth_ray.modalities import Kind, Level, Missing
from mmearth_ray.model.decoder import Decoder
from mmearth_ray.model.encoder import Encoder, Stem
from mmearth_ray.model.layers import Scope
from mmearth_ray.model.mpmae import DECODER_GRN_EPS, MPMAE
from mmearth_ray.model.published import to_published
from mmearth_ray.objective import Objective, Weighting

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
SHAPES = [(56, 8), (112, 16)]
VARIANTS: list[tuple[Scope, Stem, Weighting, int]] = [
    ("image", "modified", "uncertainty", 1),
    ("batch", "modified", "uncertainty", 1),
    ("image", "original", "unweighted", 2),
]


def make_objective(
    patch: int,
    grn: Scope = "image",
    stem: Stem = "modified",
    weighting: Weighting = "uncertainty",
    depth: int = 1,
    missing: Missing = "ignored",
) -> Objective:
    encoder = Encoder(len(INPUT.bands), (1, 1, 2, 1), (8, 8, 16, 24), patch, stem, grn)
    model = MPMAE(encoder, Decoder(24, patch, TARGETS, 20, depth, DECODER_GRN_EPS))
    objective = Objective(
        model, input=INPUT, targets=TARGETS, statistics=make_statistics(TARGETS), normalise_targets=frozenset({INPUT.name}),
        missing=missing, weighting=weighting,
    )  # fmt: skip
    randomise(objective, torch.Generator().manual_seed(3))
    return objective


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def assert_same_step(plain: Plain, objective: Objective, batch: dict[str, Tensor]) -> None:
    """The same loss, losses by target and gradient of every parameter, to rounding."""
    totals = objective.valid_counts(batch).sum(0)
    expected, sums = objective(batch, totals, 1.0)
    expected.backward()
    loss, losses_T = plain(plain.prepare(batch))
    loss.backward()
    assert_near(loss, expected, 1e-6, "loss")
    assert_near(losses_T, sums / totals, 2e-6, "losses")
    wanted, found = gradients(objective), gradients(plain)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize(("image", "patch"), SHAPES)
@pytest.mark.parametrize(("grn", "stem", "weighting", "depth"), VARIANTS)
def test_a_step_is_that_of_the_objective(
    image: int, patch: int, grn: Scope, stem: Stem, weighting: Weighting, depth: int
) -> None:
    objective = make_objective(patch, grn, stem, weighting, depth)
    assert_same_step(Plain(objective, batch_wide=grn == "batch"), objective, make_batch(2, image, patch))


def test_what_is_missing_is_trained_as_published() -> None:
    """Missing pixels of maps towards the mean; missing numbers of vectors, pixels and images without a class not at all."""
    objective, batch = make_objective(8, missing="mean"), make_batch(3, 24, 8)
    generator = torch.Generator().manual_seed(8)
    for m in TARGETS:
        gone = torch.rand(batch[m.name].shape, generator=generator) < 0.2
        if m.kind is Kind.CATEGORICAL:
            batch[m.name][gone] = losses.MISSING
        elif m.dtype == "float32":
            batch[m.name][gone] = torch.nan
    assert batch["biome"].max() >= 0  # one label at least is left
    assert_same_step(Plain(objective, batch_wide=False), objective, batch)


def test_a_silent_channel_has_finite_gradients() -> None:
    objective = make_objective(8)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "pwconv1" in name:
                parameter[0] = -100.0 if parameter.ndim == 1 else 0.0  # GELU makes it 0 everywhere
    assert_same_step(Plain(objective, batch_wide=False), objective, make_batch(2, 24, 8))


def test_the_norm_over_the_batch_is_another_computation() -> None:
    objective, batch = make_objective(8), make_batch(2, 24, 8)
    wide, each = Plain(objective), Plain(objective, batch_wide=False)
    inputs = wide.prepare(batch)
    assert (wide.features(inputs) - each.features(inputs)).abs().max() > 1e-3


def test_its_parameters_are_copies_and_its_inputs_are_those_of_a_loader() -> None:
    objective, batch = make_objective(8), make_batch(2, 24, 8)
    plain = Plain(objective)
    for (name, ours), theirs in zip(plain.named_parameters(), objective.state_dict().values(), strict=True):
        assert ours.equal(theirs), name
        assert ours.data_ptr() != theirs.data_ptr()
    inputs = plain.prepare(batch)
    assert inputs.keys() == {m.name for m in TARGETS} | {MASK}
    for m in TARGETS:
        assert inputs[m.name].dtype == (torch.float32 if m.kind is Kind.CONTINUOUS else torch.int64)
    assert inputs[MASK].sum(1).tolist() == [batch["hidden"].shape[1]] * 2
    assert (inputs[MASK].gather(1, batch["visible"]) == 0).all()
    prediction = plain.predict(inputs)
    for m in TARGETS:
        assert prediction[m.name].shape == ((2, 64 * m.width, 3, 3) if m.level is Level.PIXEL else (2, m.width))


def test_patches_are_those_of_the_objective() -> None:
    image = torch.arange(2 * 3 * 16 * 24).view(2, 3, 16, 24)
    assert patchify(image, 8).equal(losses.patchify(image, 8).flatten(2))


@pytest.mark.skipif(not CASES, reason=f"outputs of the published code are not at {GOLDEN}")
@pytest.mark.parametrize("name", CASES)
def test_published_numbers(name: str) -> None:
    case = load_case(GOLDEN / name)
    objective, description = build_objective(case, "packed")
    plain = Plain(objective)
    inputs = plain.prepare(golden_batch(case, objective))
    outputs = {"encoder": plain.features(inputs)} | {f"pred/{k}": v for k, v in plain.predict(inputs).items()}
    for key, value in outputs.items():
        wanted = torch.from_numpy(case.expected[key]).flatten(1)
        found = value.detach().flatten(1)[:, : wanted.shape[1]]
        tolerance = TOLERANCES["encoder" if key == "encoder" else "predictions"]
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), key
    loss, losses_T = plain(inputs)
    loss.backward()
    assert loss.item() == pytest.approx(case.meta["loss"], rel=TOLERANCES["total"])
    for m, value in zip(plain.targets, losses_T.tolist(), strict=True):
        assert value == pytest.approx(case.meta["losses"][m.name], rel=TOLERANCES["losses"])
    norms = {key: value.norm().item() for key, value in to_published(gradients(plain), description.targets).items()}
    for key, wanted in case.meta["grad_norm"].items():
        assert norms[key] == pytest.approx(wanted, rel=TOLERANCES["gradient_norms"], abs=GRADIENT_FLOOR), key
