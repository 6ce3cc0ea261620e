"""timm's models as encoders: their own numbers, files of weights, and what is refused."""

import re
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from timm_import import timm

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.features import timm_models
from mmearth_ray.evaluate.features.encoders import build, open_subject, random_twin
from mmearth_ray.evaluate.features.timm_models import TimmEncoder

NAME = "convnextv2_atto"


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    """A model with a classifier, as its weights are published."""
    model = timm.create_model(NAME, pretrained=False, num_classes=7)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(0.0, 0.1, generator=generator).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model.eval()


def test_features_are_timms_own_whatever_the_file(published: torch.nn.Module, tmp_path: Path) -> None:
    state, image = published.state_dict(), torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"epoch": 3, "model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "c.pth")
    features = cast(timm.models.ConvNeXt, published).forward_features(image)
    pooled = cast(timm.models.ConvNeXt, published).forward_head(features, pre_logits=True)
    digests = set()
    for file in ("a.safetensors", "b.pth", "c.pth"):
        subject = open_subject(f"timm:{NAME}={tmp_path / file}")
        assert (subject.kind, subject.name, subject.bands, subject.seed) == ("timm", NAME, ("B4", "B3", "B2"), None)
        assert (subject.patch, subject.width, subject.size, subject.statistics) == (32, 320, NAME, None)
        encoder = cast(TimmEncoder, build(subject))
        assert not encoder.training
        with torch.no_grad():
            assert torch.equal(encoder(image), pooled)
            assert torch.equal(encoder.forward_features(image), features)
            assert [found.shape[1] for found in encoder.maps(image)] == list(encoder.dims) == [40, 80, 160, 320]
        digests.add(subject.digest)
    assert len(digests) == 1
    twin = random_twin(subject, 1)
    assert (twin.kind, twin.name, twin.spec) == ("random", f"random-{NAME}", f"timm:{NAME}=random/1")
    assert (twin.structure, twin.parameters) == (subject.structure, subject.parameters)
    assert open_subject(twin.spec) == twin != random_twin(subject, 2)


def test_weights_without_the_last_norm_are_those_of_masked_pretraining(published: torch.nn.Module, tmp_path: Path) -> None:
    state = {name: value for name, value in published.state_dict().items() if not name.startswith("head.")}
    save_file(state, tmp_path / "fcmae.safetensors")
    encoder = cast(TimmEncoder, build(open_subject(f"timm:{NAME}={tmp_path / 'fcmae.safetensors'}")))
    assert torch.equal(encoder.model.head.norm.weight, torch.ones(320))


def test_groups_of_parameters_are_named_as_in_the_wrapper() -> None:
    encoder = cast(TimmEncoder, build(open_subject(f"timm:{NAME}=random")))
    names = [name for name, _ in encoder.named_parameters()]
    groups = encoder.group_matcher()
    assert [name for name in names if re.match(groups["stem"], name)] == [n for n in names if n.startswith("model.stem.")]
    matched = {name for pattern, _ in groups["blocks"] for name in names if re.match(pattern, name)}
    assert matched == {name for name in names if name.startswith("model.stages.")}


def test_files_that_are_not_its_weights_are_refused(published: torch.nn.Module, tmp_path: Path) -> None:
    state = published.state_dict()
    cases = {
        "other.safetensors": ({"a": torch.zeros(2)}, "does not hold the weights of timm's convnextv2_atto: see stem.0.weight"),
        "wide.pth": ({**state, "stem.0.weight": torch.zeros(40, 4, 4, 4)}, "see stem.0.weight"),
        "more.pth": ({**state, "extra": torch.zeros(1)}, "see extra; name a file of it"),
        "list.pth": ([1, 2], "holds no weights by name"),
        "code.pth": ({"a": Path("x")}, "holds no plain weights"),
    }
    for file, (content, message) in cases.items():
        if file.endswith("pth"):
            torch.save(content, tmp_path / file)
        else:
            save_file(cast(dict, content), tmp_path / file)
        with pytest.raises(DataError, match=message) as caught:
            open_subject(f"timm:{NAME}={tmp_path / file}")
        assert "\n" not in str(caught.value)
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    for file, message in {"bad.safetensors": "cannot be read as weights", "none.pth": "is not there"}.items():
        with pytest.raises(DataError, match=message):
            open_subject(f"timm:{NAME}={tmp_path / file}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("convnextv2_giant", "timm has no model 'convnextv2_giant'; it has convnextv2_"),
        ("vit_tiny_patch16_224", "gives no maps of images of any size"),
        ("mobilenetv3_small_050", "do not belong together"),
    ],
)
def test_models_that_cannot_be_judged_are_refused(model: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_subject(f"timm:{model}=random")
    assert "\n" not in str(caught.value)


def test_without_timm_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(timm_models.importlib, "import_module", absent)
    with pytest.raises(UsageError, match="timm is not installed; encoders of timm need it: pip install timm"):
        open_subject(f"timm:{NAME}=random")


def test_running_statistics_of_a_batch_norm_stay_those_of_the_file(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", pretrained=False, num_classes=0)
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.fill_(5 if name.endswith("running_mean") else 2)
    save_file(model.state_dict(), tmp_path / "resnet18.safetensors")
    encoder = cast(TimmEncoder, build(open_subject(f"timm:resnet18={tmp_path / 'resnet18.safetensors'}")))
    found = encoder.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
