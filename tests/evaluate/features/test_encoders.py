"""What is judged: every form of naming an encoder, digests, twins, and weights that change on the way."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from tensors import assert_near
from tiny_encoder import BANDS, DIMS, tiny_encoder, tiny_statistics

from mmearth_ray.checkpoints.load import load_encoder
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.features.encoders import ImageEncoder, build, open_subject, random_twin
from mmearth_ray.model.dense import DenseEncoder
from mmearth_ray.model.encoder import SIZES, build_encoder
from mmearth_ray.model.mpmae import build_mpmae, initialise


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def test_an_exported_encoder_is_what_was_exported(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "run" / "exported", statistics=tiny_statistics(BANDS), patch=16)
    for spec in (folder, folder.parent):
        subject = open_subject(str(spec))
        assert (subject.name, subject.kind, subject.spec) == ("run", "pretrained", str(spec))
        assert (subject.bands, subject.missing, subject.patch, subject.width) == (BANDS, (0,), 16, DIMS[-1])
        assert (subject.size, subject.seed, subject.structure.dims) == (None, None, DIMS)
        assert subject.statistics == tiny_statistics(BANDS)
        own, image = load_encoder(folder), draw(2, 12, 32, 48)
        assert subject.parameters == sum(p.numel() for p in own.parameters())
        module = build(subject)
        assert not module.training
        encoder = cast(ImageEncoder, module)
        assert torch.equal(encoder(image), own(image))
        assert torch.equal(encoder.maps(image)[-1], encoder.forward_features(image))
        assert encoder.forward_features(image).shape == (2, DIMS[-1], 2, 3)
    assert open_subject(str(folder), "ours").name == "ours"


def test_bands_of_another_modality_are_named_with_it(tmp_path: Path) -> None:
    subject = open_subject(str(tiny_encoder(tmp_path / "e", ["asc_VV", "asc_VH"], modality="sentinel1")))
    assert subject.bands == ("sentinel1.asc_VV", "sentinel1.asc_VH")


def test_a_digest_is_that_of_weights_bands_and_statistics(tmp_path: Path) -> None:
    moments = tiny_statistics(BANDS)
    other = {**moments, "l2a": {**moments["l2a"], "mean": [1.0] * 12}}
    first = open_subject(str(tiny_encoder(tmp_path / "a", statistics=moments)))
    assert open_subject(str(tiny_encoder(tmp_path / "b", statistics=moments)), "x").digest == first.digest
    for i, (bands, seed, statistics, stem) in enumerate([
        (BANDS, 1, moments, "modified"), (BANDS[::-1], 0, moments, "modified"), (BANDS, 0, other, "modified"),
        (BANDS, 0, None, "modified"), (BANDS, 0, moments, "original"),
    ]):  # fmt: skip
        folder = tiny_encoder(tmp_path / str(i), bands, seed=seed, statistics=statistics, stem=stem)
        assert open_subject(str(folder)).digest != first.digest


def test_weights_that_were_replaced_after_opening_are_refused(tmp_path: Path) -> None:
    subject = open_subject(str(tiny_encoder(tmp_path / "e")))
    build(subject)
    tiny_encoder(tmp_path / "e", seed=1)
    with pytest.raises(DataError, match=r"weights of encoder 'e' \(.*/e\) are no longer those that it was opened with"):
        build(subject)


def test_random_encoders_start_as_a_pretraining_does() -> None:
    subject = open_subject("random:atto/8/5")
    assert (subject.kind, subject.seed, subject.size, subject.patch, subject.bands) == ("random", 5, "atto", 8, BANDS)
    assert (subject.width, subject.name, subject.missing) == (SIZES["atto"].dims[-1], "random-atto-8", (0,))
    model = build_mpmae(size="atto", in_channels=12, image_size=16, patch_size=8, targets=(), decoder_width=8)
    initialise(model, "uniform", torch.Generator().manual_seed(5))
    state, module = model.encoder.state_dict(), cast(DenseEncoder, build(subject))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert subject.parameters == sum(p.numel() for p in build_encoder("atto", 12, 8).parameters())
    assert open_subject("random:atto/8/5").digest == subject.digest != open_subject("random:atto/8").digest
    assert open_subject("random:atto/8").digest == open_subject("random:atto/8/0").digest


def test_a_twin_has_fresh_weights_and_nothing_else_new(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "e", statistics=tiny_statistics(BANDS), stem="original", patch=16)
    subject = open_subject(str(folder), "mine")
    twin = random_twin(subject, 3)
    same = ("bands", "missing", "patch", "width", "parameters", "size", "statistics", "structure")
    assert all(getattr(twin, name) == getattr(subject, name) for name in same)
    assert (twin.kind, twin.seed, twin.name, twin.weights) == ("random", 3, "random-4x6x8x10-16", "")
    assert random_twin(subject, 3) == random_twin(twin, 3) == twin
    assert len({subject.digest, twin.digest, random_twin(subject, 4).digest}) == 3
    image = draw(2, 12, 16, 16)
    assert_near(build(twin)(image), build(twin)(image), 0)
    assert not torch.allclose(build(twin)(image), build(subject)(image))
    assert random_twin(open_subject("random:atto/8"), 3) == open_subject("random:atto/8/3")
    for found in (subject, twin, random_twin(twin, 4)):
        assert replace(open_subject(found.spec), name=found.name) == found
        assert pickle.loads(pickle.dumps(found)) == found


def test_nobody_elses_random_numbers_are_used_up(tmp_path: Path) -> None:
    folder = str(tiny_encoder(tmp_path / "e"))
    before = torch.get_rng_state()
    for spec in (folder, "random:atto/8/5", f"twin:1:{folder}"):
        build(open_subject(spec))
        assert torch.equal(torch.get_rng_state(), before)


def test_statistics_are_an_encoder_without_weights() -> None:
    subject = open_subject("statistics")
    assert (subject.name, subject.kind, subject.bands, subject.parameters, subject.patch) == ("statistics",) * 2 + ((), 0, 8)
    with pytest.raises(UsageError, match="no module"):
        build(subject)
    with pytest.raises(UsageError, match="no weights"):
        random_twin(subject, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("weights/x.pth", "import it first: python -m mmearth_ray.checkpoints import weights/x.pth OUT"),
        ("nowhere", "there is no encoder 'nowhere', nor a folder of that name; name a run"),
        ("random:atto", "must be random:SIZE/PATCH"),
        ("random:giant/8", "size of atto, femto"),
        ("random:atto/9", "a patch of 8, 16, 32"),
        ("twin:x:random:atto/8", "must be twin:SEED:SPEC"),
        ("timm:convnextv2_atto", "names no weights, and none are downloaded"),
        ("timm:", "timm:MODEL=FILE"),
    ],
)
def test_what_names_no_encoder_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_subject(spec)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no exported model"):
        open_subject(str(tmp_path))
