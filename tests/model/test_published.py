"""Published names and layouts: there and back bit for bit, structure from shapes, what does not fit is named."""

import pytest
import torch
from published_case import STRUCTURES, make_case
from torch import Tensor

from mmearth_ray.checkpoints.assemble import parameter_shapes
from mmearth_ray.checkpoints.pth import Published
from mmearth_ray.checkpoints.recognise import import_published
from mmearth_ray.errors import DataError
from mmearth_ray.model.published import from_published, read_structure, to_published

SMALL_DIMS = (8, 16, 16, 24)


@pytest.mark.parametrize("name", STRUCTURES)
def test_there_and_back_is_the_same_bit_for_bit(name: str) -> None:
    structure = STRUCTURES[name]
    case = make_case(structure)
    given = {"sentinel2": case.bands}
    description, tensors = import_published(Published(case.state, {}, None), given)
    back = to_published(tensors, description.targets)
    assert set(back) == set(case.state)
    assert all(torch.equal(back[key], value) and back[key].shape == value.shape for key, value in case.state.items())
    assert description == import_published(Published(back, {}, None), given)[0]


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_is_read_from_names_and_shapes(name: str) -> None:
    wanted, found = STRUCTURES[name], read_structure(make_case(STRUCTURES[name]).state)
    assert found.dims == SMALL_DIMS
    assert found.depths == (1, 1, 1, 1)
    assert found.size is None
    assert found.patch_size == wanted.get("patch_size", 8)
    assert found.stem == wanted.get("stem", "modified")
    assert found.decoder_width == 20
    assert found.decoder_depth == wanted.get("decoder_depth", 1)
    assert list(found.outputs) == wanted.get("targets", ["sentinel2", "era5", "aster"])
    assert found.in_channels == len(wanted.get("bands", range(12)))
    assert found.uncertainty == (wanted.get("weighting") != "unweighted")


def test_a_kernel_has_its_index_row_first() -> None:
    """Index row + 3 column, then input, then output channel; a block of one cell has no index."""
    kernel = torch.arange(9 * 2 * 3.0).view(9, 2, 3)
    ours = from_published({"encoder.initial_conv.0.kernel": kernel}, {"model.encoder.initial_conv.0.weight": (3, 2, 3, 3)}, ())
    (weight,) = ours.values()
    for row in range(3):
        for column in range(3):
            assert torch.equal(weight[:, :, row, column], kernel[row + 3 * column].T)
    point, shape = torch.randn(2, 3), {"model.encoder.stem_orig.0.weight": (3, 2, 1, 1)}
    (weight,) = from_published({"encoder.stem_orig.0.kernel": point}, shape, ()).values()
    assert torch.equal(weight[:, :, 0, 0], point.T)
    (weight,) = from_published({"encoder.stem_orig.0.kernel": point[None]}, shape, ()).values()
    assert torch.equal(weight[:, :, 0, 0], point.T)
    channels = torch.randn(4, 5)
    (weight,) = from_published({"encoder.stem.0.kernel": channels}, {"model.encoder.stem.0.weight": (5, 1, 2, 2)}, ()).values()
    assert torch.equal(weight[:, 0, 1, 0], channels[1])


def _broken(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {key: value for key, value in state.items() if key != "encoder.stages.2.0.grn.gamma"}
    if how == "more":
        return state | {"encoder.norm.weight": torch.ones(3)}
    if how == "shape":
        return state | {"encoder.stages.2.0.grn.gamma": torch.ones(1, 5)}
    if how == "decoder":
        return state | {"decoder_dict.era5.0.norm.bias": torch.full((20,), 9.0)}
    if how == "heads":
        return {key: value for key, value in state.items() if not key.startswith("pred_dict")}
    return {key.replace("kernel", "weight"): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no tensor encoder.stages.2.0.grn.gamma"),
        ("more", "1 tensors that MP-MAE has not, the first is encoder.norm.weight"),
        ("shape", r"encoder.stages.2.0.grn.gamma has shape \(1, 5\); the rest of the checkpoint calls for \(1, 64\)"),
        ("decoder", "decoder_dict.era5.0.norm.bias differs from decoder_dict.sentinel2.0.norm.bias"),
        ("heads", "has no heads"),
        ("names", "no tensor encoder.initial_conv.0.kernel, so it is not one of MP-MAE"),
    ],
)
def test_what_is_not_mp_mae_is_refused_by_name(how: str, message: str) -> None:
    state = _broken(make_case({}).state, how)
    with pytest.raises(DataError, match=message):
        import_published(Published(state, {}, None), {})


def test_heads_keep_the_order_of_the_log_variances() -> None:
    case = make_case(STRUCTURES["a choice of tasks in an order of its own"])
    description, tensors = import_published(Published(case.state, {}, None), {})
    assert description.targets == case.meta["modalities"]
    assert parameter_shapes(description).keys() == tensors.keys()
    heads = [key.split(".")[1] for key in to_published(tensors, description.targets) if key.startswith("pred_dict.")]
    assert list(dict.fromkeys(heads)) == case.meta["modalities"]
