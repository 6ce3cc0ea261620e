"""The objective: missing data, splitting of batches, counts, figures, an invented modality."""

from typing import Any

import pytest
import torch
from tensors import assert_near
from tiny_objective import INPUT, PATCH, SIDE, TARGETS, make_batch, make_objective, make_statistics
from torch import Tensor

from mmearth_ray.modalities import TABLE, ClassCode, Kind, Level, Modality, get
from mmearth_ray.objective import Normaliser, Objective, Weighting

INVENTED = Modality(
    name="soil",
    level=Level.PIXEL,
    kind=Kind.CATEGORICAL,
    bands=("soil",),
    dtype="uint8",
    classes=tuple(ClassCode(10 * i, f"soil {i}") for i in range(5)),
    source="test",
)


def _step(objective: Objective, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch that is the whole global batch.  Every parameter must have taken part."""
    objective.zero_grad()
    loss, _ = objective(batch, objective.valid_counts(batch).sum(0), 1.0)
    loss.backward()
    gradients = {}
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    return loss.detach(), gradients


def _assert_untrained(gradients: dict[str, Tensor], missing: Modality) -> None:
    """The head and the log-variance of the modality have exactly zero gradient; everything is finite; others learn."""
    assert all(g.isfinite().all() for g in gradients.values())
    assert gradients["log_variances"][TARGETS.index(missing)] == 0
    for name, gradient in gradients.items():
        if f"heads.{missing.name}." in name:
            assert (gradient == 0).all(), name
        elif "heads" in name:
            assert (gradient != 0).any(), name


# --- what is missing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [m.name for m in TARGETS if m.kind is Kind.CONTINUOUS])
def test_an_absent_quantity_has_zero_gradient(name: str) -> None:
    batch = make_batch()
    batch[get(name).present_column] = torch.zeros(4, dtype=torch.bool)
    loss, gradients = _step(make_objective(), batch)
    assert loss.isfinite()
    _assert_untrained(gradients, get(name, TARGETS))


@pytest.mark.parametrize("name", [m.name for m in TARGETS if m.kind is Kind.CATEGORICAL])
def test_absent_labels_have_zero_gradient(name: str) -> None:
    batch = make_batch()
    batch[name] = torch.full_like(batch[name], -1)
    loss, gradients = _step(make_objective(), batch)
    assert loss.isfinite()
    _assert_untrained(gradients, get(name, TARGETS))


@pytest.mark.parametrize("how", ["values", "statistics"])
def test_a_missing_band_trains_no_output(how: str) -> None:
    radar = get("sentinel1", TARGETS)
    objective, batch = make_objective(), make_batch()
    band = radar.bands.index("asc_HH")
    if how == "values":
        batch[radar.name][:, band] = float("-inf")
    else:
        mean, std = make_statistics(TARGETS)[radar.name]
        mean[:, band], std[:, band] = torch.nan, torch.nan
        objective.readers[radar.name] = Normaliser(radar, mean, std)
    _, gradients = _step(objective, batch)
    assert all(g.isfinite().all() for g in gradients.values())
    bias_PC = gradients[f"model.decoder.pixel_heads.{radar.name}.bias"].view(-1, len(radar.bands))
    assert (bias_PC[:, band] == 0).all()
    assert (bias_PC[:, [b for b in range(len(radar.bands)) if b != band]] != 0).all()


def test_a_no_data_input_pixel_is_filled_and_not_a_target() -> None:
    objective, batch = make_objective(), make_batch()
    full = objective.valid_counts(batch)[:, 0]
    place = int(batch["hidden"][0, 0])
    batch[INPUT.name][0, :, place // 3 * PATCH, place % 3 * PATCH] = torch.tensor(0).to(torch.uint16)
    seen = int(batch["visible"][0, 0])
    batch[INPUT.name][0, :, seen // 3 * PATCH, seen % 3 * PATCH] = torch.tensor(0).to(torch.uint16)
    lost = full - objective.valid_counts(batch)[:, 0]
    assert 0 < lost[0] <= len(INPUT.bands)
    assert (lost[1:] == 0).all()
    values, valid = objective.read(batch)[INPUT.name]
    assert (values[~valid] == 0).all()
    loss, gradients = _step(objective, batch)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


def test_a_step_leaves_its_batch_alone() -> None:
    objective, batch = make_objective(), make_batch()
    before = {name: tensor.clone() for name, tensor in batch.items()}
    _step(objective, batch)
    assert all(torch.equal(batch[name].nan_to_num(), before[name].nan_to_num()) for name in ("sentinel1", "era5"))
    assert torch.equal(batch[INPUT.name].int(), before[INPUT.name].int())


def test_class_zero_is_a_class_like_any_other() -> None:
    cover = get("esa_worldcover", TARGETS)
    batch = make_batch()
    batch[cover.name].zero_()  # label 0: tree cover everywhere
    objective = make_objective()
    counts = objective.valid_counts(batch)[:, TARGETS.index(cover)]
    assert counts.tolist() == [5 * PATCH**2] * 4
    _, gradients = _step(objective, batch)
    assert (gradients[f"model.decoder.pixel_heads.{cover.name}.bias"].view(-1, cover.width)[:, 0] < 0).all()


def test_a_batch_with_nothing_at_all_gives_zero_and_a_graph() -> None:
    batch = make_batch()
    for m in TARGETS:
        if m.kind is Kind.CONTINUOUS:
            batch[m.present_column] = torch.zeros(4, dtype=torch.bool)
        else:
            batch[m.name] = torch.full_like(batch[m.name], -1)
    loss, gradients = _step(make_objective(), batch)
    assert loss == 0
    assert all((g == 0).all() for g in gradients.values())


# --- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uncertainty", "unweighted"])
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_add_up_to_the_batch(parts: int, weighting: Weighting) -> None:
    objective, batch = make_objective(weighting=weighting), make_batch(8)
    batch[get("sentinel1").present_column][:4] = False  # a modality that only some parts have
    expected_loss, expected = _step(objective, batch)
    totals = objective.valid_counts(batch).sum(0)
    objective.zero_grad()
    total, sums = torch.zeros(()), torch.zeros(len(TARGETS))
    for part in range(parts):
        rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
        loss, errors = objective({name: tensor[rows] for name, tensor in batch.items()}, totals, 1 / parts)
        loss.backward()
        total, sums = total + loss.detach(), sums + errors
    assert_near(total, expected_loss, 1e-5, "loss")
    assert_near(sums, objective(batch, totals, 1.0)[1], 1e-5, "sums")
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None
        assert_near(parameter.grad, expected[name], 1e-5, name)


def test_valid_counts_agree_with_counting_pixel_by_pixel() -> None:
    objective, batch = make_objective(), make_batch()
    batch[get("aster").present_column][1] = False
    batch["aster"][2, 1] = -32768
    counts = objective.valid_counts(batch)
    for t, m in enumerate(TARGETS):
        raw = batch[m.name].float().numpy()
        ok = raw >= 0 if m.kind is Kind.CATEGORICAL else m.valid(raw)
        if m.kind is Kind.CONTINUOUS:
            ok = ok & batch[m.present_column].numpy().reshape(-1, *[1] * (ok.ndim - 1))
        for b in range(4):
            blocks = [ok[b]]
            if m.level is Level.PIXEL:
                corners = [(n // 3 * PATCH, n % 3 * PATCH) for n in batch["hidden"][b].tolist()]
                blocks = [ok[b][..., y : y + PATCH, x : x + PATCH] for y, x in corners]
            assert counts[b, t] == sum(int(block.sum()) for block in blocks), m.name


@pytest.mark.parametrize("weighting", ["uncertainty", "unweighted"])
def test_errors_of_images_add_up_to_those_of_the_batch_and_are_each_one_s_own(weighting: Weighting) -> None:
    objective, batch = make_objective(weighting=weighting), make_batch(4)
    errors_BT = objective.errors_of_images(batch)
    _, errors_T = objective(batch, objective.valid_counts(batch).sum(0), 1.0)
    assert torch.allclose(errors_BT.sum(0), errors_T, rtol=1e-5)
    for i, errors_T in enumerate(errors_BT):
        alone = {name: values[i : i + 1] for name, values in batch.items()}
        assert torch.allclose(errors_T, objective(alone, objective.valid_counts(alone).sum(0), 1.0)[1], rtol=1e-4, atol=1e-4)
    assert not errors_BT.requires_grad


def test_forward_never_waits_for_the_device() -> None:
    """A meta device has no values to read back: any step that looked at one would raise."""
    objective, batch = make_objective(), make_batch()
    totals = objective.valid_counts(batch).sum(0)
    meta = {name: tensor.to("meta") for name, tensor in batch.items()}
    loss, sums = objective.to("meta")(meta, totals.to("meta"), 1.0)
    loss.backward()
    assert loss.shape == ()
    assert sums.shape == totals.shape


def test_autocast_keeps_losses_in_float32() -> None:
    objective, batch = make_objective(), make_batch()
    totals = objective.valid_counts(batch).sum(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, sums = objective(batch, totals, 1.0)
    loss.backward()
    assert loss.dtype == sums.dtype == torch.float32
    assert_near(loss, objective(batch, totals, 1.0)[0], 2e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_statistics_follow_the_product() -> None:
    mean = torch.tensor([[1.0] * 12, [3.0] * 12])
    normalise = Normaliser(INPUT, mean, torch.tensor([[2.0] * 12, [4.0] * 12]))
    batch = {INPUT.name: torch.full((2, 12, 8, 8), 11).to(torch.uint16), "product": torch.tensor([0, 1]).to(torch.int8)}
    batch[INPUT.present_column] = torch.ones(2, dtype=torch.bool)
    values, valid = normalise(batch, batch[INPUT.name])
    assert (values[0] == 5).all()
    assert (values[1] == 2).all()
    assert valid.all()
    assert (normalise.undo(batch, values) == 11).all()
    assert not normalise.state_dict()


def test_the_input_and_its_target_are_one_tensor() -> None:
    objective, batch = make_objective(), make_batch()
    seen: list[Tensor] = []
    objective.model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = objective.read(batch)[INPUT.name].truth
    _step(objective, batch)
    assert torch.equal(seen[0], before)  # the encoder did not write into it


# --- figures, new rows, errors -----------------------------------------------------------------------------------------


def test_reconstruction_is_in_physical_units() -> None:
    objective, batch = make_objective(), make_batch()
    shown = objective.reconstruct(batch)
    for m in TARGETS:
        entry = shown[m.name]
        assert entry["valid"].shape == entry["truth"].shape == batch[m.name].shape
        if (m.level, m.kind) == (Level.IMAGE, Kind.CATEGORICAL):
            assert_near(entry["prediction"].sum(1), torch.ones(4), 1e-5)
        else:
            assert entry["prediction"].shape == batch[m.name].shape
        assert entry["prediction"].isfinite().all()


def test_a_perfect_model_reconstructs_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = make_objective(), make_batch()
    everywhere = torch.arange(9).expand(4, -1)
    truths = objective._truths(batch, everywhere)
    perfect = {}
    for m in TARGETS:
        truth = truths[m.name].truth
        one_hot = m.kind is Kind.CATEGORICAL
        perfect[m.name] = 50.0 * torch.nn.functional.one_hot(truth[..., 0].clamp(min=0), m.width) if one_hot else truth
    monkeypatch.setattr(objective.model, "forward", lambda *args: perfect)
    for m in TARGETS:
        entry = objective.reconstruct(batch)[m.name]
        prediction = entry["prediction"]
        if (m.level, m.kind) == (Level.IMAGE, Kind.CATEGORICAL):
            prediction = prediction.argmax(1)
        assert_near(prediction[entry["valid"]].float(), entry["truth"].float()[entry["valid"]], 1e-4, m.name)


def test_an_invented_row_needs_no_other_edit() -> None:
    targets = (*TARGETS, INVENTED)
    objective, batch = make_objective(targets), make_batch(targets=targets)
    loss, gradients = _step(objective, batch)
    assert loss.isfinite()
    assert (gradients[f"model.decoder.pixel_heads.{INVENTED.name}.bias"] != 0).all()
    assert objective.reconstruct(batch)[INVENTED.name]["prediction"].shape == (4, SIDE, SIDE)


def test_errors_name_value_bound_and_remedy() -> None:
    model = make_objective().model

    def build(**changes: Any) -> Objective:
        good: dict[str, Any] = {"input": INPUT, "targets": TARGETS, "statistics": make_statistics(TARGETS)}
        return Objective(model, **{**good, **changes})

    with pytest.raises(ValueError, match="no weighting 'equal'; use one of uncertainty, unweighted"):
        build(weighting="equal")
    with pytest.raises(ValueError, match="targets must be distinct and at least one"):
        build(targets=())
    with pytest.raises(ValueError, match="sentinel2 has no statistics"):
        build(statistics={})
    with pytest.raises(ValueError, match="must have the same bands"):
        build(input=INPUT.select(("B2", "B3")))
    with pytest.raises(ValueError, match="can be normalised; got biome"):
        build(normalise_targets=frozenset({"biome"}))
    with pytest.raises(ValueError, match="holds flags, which cannot be trained on"):
        build(targets=(get("sentinel2_cloudmask", TABLE),))
    with pytest.raises(ValueError, match="the input must be a continuous map; esa_worldcover is not"):
        build(input=get("esa_worldcover"))
