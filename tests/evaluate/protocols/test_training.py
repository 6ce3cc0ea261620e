"""Schedules, batches, layer decay, drop path, turns and losses, by their numbers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from timm_import import timm
from torch import nn
from torch.nn import functional

from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.features.encoders import build, open_subject
from mmearth_ray.evaluate.protocols.pictures import turned
from mmearth_ray.evaluate.protocols.recipes import probe_recipe, tuning_recipe
from mmearth_ray.evaluate.protocols.targets import Target, target_of
from mmearth_ray.evaluate.protocols.training import DivergedError, draw_batches, learning_rate, train
from mmearth_ray.evaluate.protocols.tunable import DropPath, add_drop_path, layer_groups


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rates_warm_up_to_the_peak_and_fall_to_the_minimum() -> None:
    plan = tuning_recipe("converged", Goal.SINGLE)
    rates = [learning_rate(step, 100, 1e-3, plan) for step in range(1, 101)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) * 1e-4)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert 1e-6 <= rates[-1] < 2e-6
    published = probe_recipe("published")
    assert learning_rate(1, 50, 1e-3, published) == 1e-3
    assert learning_rate(26, 50, 1e-3, published) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(1, 1, 1e-3, plan) > 0


def test_every_image_comes_once_in_a_pass() -> None:
    found = list(draw_batches(10, 4, 7, generator()))
    assert [len(part) for part in found] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(torch.cat(found[:3]).tolist()) == sorted(torch.cat(found[3:6]).tolist()) == list(range(10))
    assert torch.cat(found[:3]).tolist() != torch.cat(found[3:6]).tolist()


def test_the_best_weights_on_validation_come_back() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    plan = probe_recipe("converged")
    scores = iter([1.0, 3.0, 3.0, 2.0])
    seen = []

    def validate() -> tuple[float, float]:
        seen.append(float(layer.weight.detach()))
        return next(scores), -len(seen)

    best = train(layer, [{"params": list(layer.parameters())}], lambda *_: -layer.weight.sum(), images=4, batch=4, steps=4,
                 rate=0.1, recipe=plan, generator=generator(), validate=validate)  # fmt: skip
    assert best.step == 2
    assert float(layer.weight.detach()) == seen[1]


def test_a_loss_that_is_not_finite_ends_training() -> None:
    layer = nn.Linear(1, 1)
    with pytest.raises(DivergedError, match="step 1"):
        train(layer, [{"params": list(layer.parameters())}], lambda *_: layer.weight.sum() * float("nan"), images=2, batch=2,
              steps=3, rate=0.1, recipe=probe_recipe("published"), generator=generator(), validate=None)  # fmt: skip


def test_layer_decay_is_the_published_one() -> None:
    encoder = build(open_subject("random:atto/16"))  # blocks 2, 2, 6, 2
    groups = layer_groups(encoder, 0.9, 0.3)
    names = {id(p): name for name, p in encoder.named_parameters()}
    share = {names[id(p)]: group["share"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert share.keys() == dict(encoder.named_parameters()).keys()
    assert share["stages.0.0.dwconv.weight"] == pytest.approx(0.9**12)
    assert share["stages.3.1.dwconv.weight"] == pytest.approx(0.9)
    assert share["downsample_layers.0.1.weight"] == pytest.approx(0.9**12)  # published: one stage too early
    assert share["downsample_layers.2.1.weight"] == pytest.approx(0.9**8)
    assert share["stem.0.weight"] == share["initial_conv.0.weight"] == 1
    assert decay["stages.0.0.norm.weight"] == decay["stages.0.0.pwconv1.bias"] == 0
    assert decay["stages.0.0.pwconv1.weight"] == 0.3
    assert timm.is_model("convnextv2_atto")
    found = layer_groups(build(open_subject("timm:convnextv2_atto=random")), 0.9, 0.3)
    assert {round(np.log(group["share"]) / np.log(0.9)) for group in found} == set(range(13))


def test_drop_path_leaves_out_branches_and_keeps_the_mean() -> None:
    path = DropPath(0.25, generator())
    x = torch.ones(4000, 1, 2, 2, 3)
    found = path(x).flatten(1)
    assert ((found == 0).all(1) | (found - 1 / 0.75).abs().lt(1e-6).all(1)).all()
    assert float(found.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(path.eval()(x), x)


@pytest.mark.parametrize("spec", ["random:atto/8", "timm:convnextv2_atto=random"])
def test_drop_path_changes_training_alone_and_is_drawn_by_the_seed(spec: str) -> None:
    subject = open_subject(spec)
    plain, images = build(subject), torch.randn(2, len(subject.bands), 32, 32, generator=generator())
    models = [build(subject) for _ in range(2)]
    for model in models:
        assert add_drop_path(model, 0.5, generator(3)) == 12
    with torch.no_grad():
        assert torch.equal(models[0](images), plain(images))
        found = [model.train()(images) for model in models]
        assert torch.equal(*found)
        assert not torch.equal(found[0], plain(images))


def test_losses_are_those_of_pytorch_with_published_smoothing() -> None:
    outputs, labels = torch.randn(6, 4, generator=generator()), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = functional.cross_entropy(outputs, labels, label_smoothing=0.2)
    assert float(Target(Goal.SINGLE, 0.2).loss(outputs, labels)) == pytest.approx(float(expected))
    several = (torch.randn(6, 4, generator=generator(1)) > 0).int()
    soft = 0.8 * several + 0.2 * (1 - several)
    expected = functional.binary_cross_entropy_with_logits(outputs, soft)
    assert float(Target(Goal.MULTI, 0.2).loss(outputs, several)) == pytest.approx(float(expected))
    maps, masks = torch.randn(2, 3, 4, 4, generator=generator()), torch.randint(-1, 3, (2, 4, 4), generator=generator())
    expected = functional.cross_entropy(maps, masks, ignore_index=-1)
    assert float(Target(Goal.SEGMENTATION, 0).loss(maps, masks)) == pytest.approx(float(expected))
    assert float(Target(Goal.SEGMENTATION, 0).loss(maps, torch.full_like(masks, -1))) == 0
    values = np.array([10.0, 14.0])
    target = target_of(Goal.REGRESSION, values, 0.2)
    assert float(target.loss(torch.tensor([[-1.0], [1.0]]), torch.tensor(values))) == 0
    assert target.predict(torch.tensor([[-1.0], [1.0]])) == pytest.approx(values)
    assert target_of(Goal.REGRESSION, np.array([3.0]), 0).std == 1


def test_turns_move_images_and_masks_together_and_come_in_all_eight_ways() -> None:
    images = np.arange(64 * 2 * 3 * 3).reshape(64, 2, 3, 3)
    found, masks = turned(images, images[:, 0], Goal.SEGMENTATION, generator())
    assert np.array_equal(found[:, 0], masks)
    assert np.array_equal(found[:, 1], masks + 9)
    assert np.array_equal(np.sort(found.reshape(64, -1)), images.reshape(64, -1))
    assert len({tuple((f[0] - i[0].min()).ravel()) for f, i in zip(found, images, strict=True)}) == 8
    long = np.arange(64 * 6).reshape(64, 1, 2, 3)
    found, labels = turned(long, np.arange(64), Goal.SINGLE, generator())
    assert len({tuple((f - i.min()).ravel()) for f, i in zip(found, long, strict=True)}) == 4
    assert np.array_equal(labels, np.arange(64))
