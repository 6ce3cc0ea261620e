"""Starting from earlier weights: what is copied, what is left, what is refused."""

from pathlib import Path

import pytest
import torch
from processes import settings, train
from safetensors.torch import save_file
from tiny_earth import make_data_set
from torch import Tensor, nn

from mmearth_ray.errors import DataError
from mmearth_ray.experiment import open_experiment
from mmearth_ray.objective import ENCODER
from mmearth_ray.train.initial import check_initial, load_initial


class Net(nn.Module):
    """An encoder and a head, by the names that they have in an objective."""

    def __init__(self, width: int = 4, head: int = 2) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.encoder = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width))
        self.head = nn.Linear(width, head)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("form", ["checkpoint", "file", "exported"])
def test_initial_weights_come_from_a_checkpoint_a_file_or_an_exported_encoder(form: str, tmp_path: Path) -> None:
    donor, module = Net(), Net()
    given, before = weights_of(donor), weights_of(module)
    if form == "exported":
        given = {name.removeprefix(ENCODER): t for name, t in given.items() if name.startswith(ENCODER)}
        save_file(given, tmp_path / "encoder.safetensors")
    else:
        save_file(given, tmp_path / "model.safetensors")
    path = {"file": tmp_path / "model.safetensors", "exported": tmp_path / "encoder.safetensors"}.get(form, tmp_path)
    used = load_initial(module, path)
    assert used == sorted(n for n in before if form != "exported" or n.startswith(ENCODER))
    for name, tensor in weights_of(module).items():
        assert torch.equal(tensor, weights_of(donor)[name] if name in used else before[name])


def test_heads_that_the_file_lacks_stay_and_tensors_that_the_module_lacks_are_ignored(tmp_path: Path) -> None:
    module = Net()
    before = weights_of(module)
    given = {n: t for n, t in weights_of(Net()).items() if n.startswith(ENCODER)} | {"other_head.weight": torch.ones(2)}
    save_file(given, tmp_path / "model.safetensors")
    assert all(name.startswith(ENCODER) for name in load_initial(module, tmp_path))
    assert torch.equal(module.head.weight, before["head.weight"])
    assert torch.equal(module.get_parameter("model.encoder.0.weight"), given["model.encoder.0.weight"])


def test_initial_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    module = Net()
    before = weights_of(module)
    nowhere, empty, wide, partial = (tmp_path / name for name in ("nowhere", "empty", "wide", "partial"))
    for folder in (empty, wide, partial):
        folder.mkdir()
    save_file(weights_of(Net(width=6)), wide / "model.safetensors")
    save_file({"model.encoder.0.weight": torch.ones(4, 3)}, partial / "model.safetensors")
    for path, message in [
        (nowhere, f"model.init={nowhere}: neither a safetensors file nor a folder with "),
        (empty, f"model.init={empty}: neither a safetensors file nor a folder with "),
        (wide, f"model.init={wide}: model.encoder.0.bias has shape (6,), this model needs (4,); model.size, "),
        (partial, f"model.init={partial}: 3 tensors of the encoder are not in it, the first is model.encoder.0.bias"),
    ]:
        with pytest.raises(DataError) as caught:
            load_initial(module, path)
        assert str(caught.value).startswith(message)
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(module).items())


def test_heads_of_another_shape_and_the_weights_of_losses_stay_as_they_are(tmp_path: Path) -> None:
    module = Net()
    module.register_parameter("log_variances", nn.Parameter(torch.zeros(2)))
    before = weights_of(module)
    given = weights_of(Net()) | {"head.weight": torch.ones(9, 9), "log_variances": torch.ones(2)}
    save_file(given, tmp_path / "model.safetensors")
    used = load_initial(module, tmp_path)
    assert not {"head.weight", "log_variances"} & set(used)
    assert torch.equal(module.head.weight, before["head.weight"])
    assert torch.equal(module.get_parameter("log_variances"), torch.zeros(2))


def test_weights_of_other_input_bands_are_refused_before_training(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", tiles=8, size=32).directory
    train(data, tmp_path / "first", "train.steps=1", "model.bands.sentinel2=[B2,B3,B4]")
    for place in ("first", "first/exported", "first/checkpoints/step-00000001"):
        init = f"model.init={tmp_path / place}"
        alike = settings(data, tmp_path / "second", init, "model.bands.sentinel2=[B2,B3,B4]")
        check_initial(open_experiment(alike, data))
        turned = settings(data, tmp_path / "second", init, "model.bands.sentinel2=[B4,B3,B2]")
        with pytest.raises(DataError, match="its input is sentinel2 with bands B2, B3, B4, this model's is sentinel2 with B4"):
            check_initial(open_experiment(turned, data))
