"""The counted work: equal to what PyTorch's own counter sees in a real training step, but for its one known mistake."""

import pytest
import torch
from tensors import draw_patches
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.subject import TARGETS, build, make_batch
from mmearth_ray.modalities import Level
from mmearth_ray.model.encoder import Stem
from mmearth_ray.model.flops import PARTS, Shape, count, layers, shape, shape_of
from mmearth_ray.model.mpmae import MPMAE, build_mpmae

BATCH = 2


def seen_by_torch(model: MPMAE, image_size: int, visible: int, *, backward: bool) -> int:
    """FLOPs per tile that PyTorch counts, where the loss is the sum of all predictions.

    On the meta device nothing is computed, and the layouts take the ordinary convolutions that they take on a GPU.
    """
    bands = next(p for p in model.encoder.parameters() if p.ndim == 4).shape[1]
    patches = (image_size // model.encoder.patch_size) ** 2
    shown, hidden = draw_patches(BATCH, patches, visible, torch.Generator().manual_seed(0))
    image = torch.empty(BATCH, bands, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        predictions = model.to("meta")(image, shown.to("meta"), hidden.to("meta"))
        if backward:
            torch.stack([p.sum() for p in predictions.values()]).sum().backward()
    assert counter.get_total_flops() % BATCH == 0
    return counter.get_total_flops() // BATCH


def too_many_for_groups(work: Shape) -> int:
    """What PyTorch's counter adds: the weight gradient of a convolution in G groups is counted G times."""
    return sum((layer.groups - 1) * layer.forward(dense=True) for layer in layers(work))


CASES = [
    ("atto", 56, 8, "modified", 19, {}),
    ("atto", 112, 16, "modified", 19, {}),
    ("atto", 56, 8, "original", 5, {}),
    ("femto", 64, 32, "original", 1, {"decoder_width": 32}),
    ("huge", 112, 16, "modified", 19, {}),
    ("pico", 32, 16, "modified", 3, {"decoder_width": 48, "decoder_depth": 2}),
]


@pytest.mark.parametrize(("size", "image_size", "patch_size", "stem", "visible", "decoder"), CASES)
def test_the_count_is_that_of_torch(
    size: str, image_size: int, patch_size: int, stem: Stem, visible: int, decoder: dict
) -> None:
    words = {"size": size, "in_channels": 12, "image_size": image_size, "patch_size": patch_size, "targets": TARGETS}
    with torch.device("meta"):
        model = build_mpmae(**words, stem=stem, **decoder)
    work = shape(**words, stem=stem, **decoder, visible=visible)
    assert work == shape_of(model, image_size, visible)
    flops = count(work, dense=True)
    assert sum(flops.forward.values()) == seen_by_torch(model, image_size, visible, backward=False)
    assert flops.step + too_many_for_groups(work) == seen_by_torch(model, image_size, visible, backward=True)


def test_losses_and_normalisation_add_no_convolution_and_no_matrix() -> None:
    objective = build("atto", 56, 8).to("meta")
    batch = {name: values.to("meta") for name, values in make_batch(BATCH, 56, 8).items()}
    work = shape_of(objective.model, 56, batch["visible"].shape[1])
    with FlopCounterMode(display=False) as counter:
        objective(batch, torch.ones(len(TARGETS), device="meta"), 1.0)[0].backward()
    assert counter.get_total_flops() == BATCH * (count(work, dense=True).step + too_many_for_groups(work))


@pytest.mark.parametrize("groups", [1, 8])
def test_torch_counts_the_weight_gradient_of_groups_once_for_each(groups: int) -> None:
    """The difference that `too_many_for_groups` takes off; if it vanishes, PyTorch has mended its counter."""
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 5, 5)
    forward = 2 * 2 * 25 * 9 * 8 * 8 // groups
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        assert counter.get_total_flops() == forward
        y.sum().backward()
    assert counter.get_total_flops() == forward + groups * forward


@pytest.mark.parametrize("stem", ["modified", "original"])
def test_parameters_are_those_of_the_convolutions_and_matrices(stem: Stem) -> None:
    model = build_mpmae(size="atto", in_channels=5, image_size=32, patch_size=16, targets=TARGETS, stem=stem)
    held = sum(p.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters(recurse=False))
    assert sum(layer.parameters for layer in layers(shape_of(model, 32, 2))) == held


def test_only_depthwise_work_grows_where_whole_maps_are_worked_through() -> None:
    work = shape(size="tiny", in_channels=12, image_size=112, patch_size=16, visible=19, targets=TARGETS)
    useful, dense = count(work), count(work, dense=True)
    assert tuple(useful.training) == PARTS
    assert {part for part in PARTS if useful.training[part] != dense.training[part]} == {"depthwise"}
    assert dense.training["depthwise"] * 19 == useful.training["depthwise"] * 49
    assert useful.training["stem"] < 3 * useful.forward["stem"]
    assert all(useful.training[part] == 3 * useful.forward[part] for part in PARTS[1:])


def test_heads_work_at_hidden_patches_and_once_per_image() -> None:
    work = shape(size="atto", in_channels=12, image_size=56, patch_size=8, visible=19, targets=TARGETS)
    maps = sum(m.width for m in TARGETS if m.level is Level.PIXEL)
    scalars = sum(m.width for m in TARGETS if m.level is Level.IMAGE)
    assert count(work).forward["heads"] == 2 * 512 * (30 * 64 * maps + scalars)


@pytest.mark.parametrize("visible", [0, 50])
def test_a_number_of_visible_patches_that_cannot_be_is_refused(visible: int) -> None:
    with pytest.raises(ValueError, match=f"of 7 x 7 patches 1 to all can be visible; got {visible}"):
        shape(size="atto", in_channels=12, image_size=56, patch_size=8, visible=visible, targets=TARGETS)
