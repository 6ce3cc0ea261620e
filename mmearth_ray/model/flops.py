"""The work of one training step, counted from the shape of the model: FLOPs per tile, and what they are spent on.

It describes the mathematics, not an implementation.  A multiplication with its addition is two FLOPs; only convolutions and
matrix products count, as in PyTorch's own counter (torch.utils.flop_counter), with which the numbers agree but for one thing:
for the weight gradient of a convolution in groups, PyTorch's counter multiplies by the number of groups once too often.

The backward pass takes as many FLOPs again for the gradient of the weights, and as many for that of the input, which the
first convolution does not need.  Depthwise convolutions count where they are wanted, on visible cells, with all places of
their kernel; with `dense` they count on the whole map, which an implementation that fills in zeros works through.

Shapes: R x S patches in the grid of an image, V of them visible, N = R S - V hidden, Q cells along the side of a block.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mmearth_ray.modalities import Level, Modality
from mmearth_ray.model.encoder import SIZES, Stem, check_image_size
from mmearth_ray.model.layers import CELLS, MLP_RATIO
from mmearth_ray.model.mpmae import MPMAE

Part = Literal["stem", "depthwise", "matrices", "decoder", "heads"]

PARTS: tuple[Part, ...] = ("stem", "depthwise", "matrices", "decoder", "heads")
"""Depthwise convolutions and matrices are those of the encoder's stages; the decoder is its projection and its blocks."""

STEM_KERNEL, KERNEL = 3, 7  # along the side: the modified stem (arXiv:2405.02771), the blocks of ConvNeXt (arXiv:2201.03545)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All that the work follows from.  `maps`, `scalars`: outputs of every head, per pixel and per image."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    bands: int
    patch_size: int
    grid: tuple[int, int]
    visible: int
    maps: tuple[int, ...]
    scalars: tuple[int, ...]
    stem: Stem = "modified"
    decoder_width: int = 512
    decoder_depth: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.visible <= self.grid[0] * self.grid[1]:
            raise ValueError(f"of {self.grid[0]} x {self.grid[1]} patches 1 to all can be visible; got {self.visible}")


@dataclass(frozen=True)
class Layer:
    """One convolution or matrix, in its work on one tile: `outputs` numbers at every place, each of `inputs` products.

    `map_places`: places of the whole map, where that is more than is wanted.  `first`: the input is data, so it needs no
    gradient.
    """

    part: Part
    places: int
    inputs: int
    outputs: int
    groups: int = 1
    map_places: int = 0
    first: bool = False

    def forward(self, dense: bool = False) -> int:
        """FLOPs of the forward pass."""
        places = max(self.places, self.map_places) if dense else self.places
        return 2 * places * self.inputs * self.outputs

    def training(self, dense: bool = False) -> int:
        """FLOPs of the forward and the backward pass."""
        return self.forward(dense) * (2 if self.first else 3)

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return (self.inputs + 1) * self.outputs

    @property
    def values(self) -> int:
        """Numbers that come out of the forward pass."""
        return self.places * self.outputs


@dataclass(frozen=True)
class Flops:
    """FLOPs per tile, by part: of the forward pass, and of the forward and the backward pass of a training step."""

    forward: Mapping[Part, int]
    training: Mapping[Part, int]

    @property
    def step(self) -> int:
        """Of the whole training step."""
        return sum(self.training.values())


def shape(
    *,
    size: str,
    in_channels: int,
    image_size: int,
    patch_size: int,
    visible: int,
    targets: tuple[Modality, ...],
    stem: Stem = "modified",
    decoder_width: int = 512,
    decoder_depth: int = 1,
) -> Shape:
    """The shape of what `build_mpmae` builds from the same words, with `visible` patches of an image shown."""
    check_image_size((image_size,), patch_size)
    across = image_size // patch_size
    return Shape(
        depths=SIZES[size].depths, dims=SIZES[size].dims, bands=in_channels, patch_size=patch_size,
        grid=(across, across), visible=visible, stem=stem,
        maps=tuple(m.width for m in targets if m.level is Level.PIXEL),
        scalars=tuple(m.width for m in targets if m.level is Level.IMAGE),
        decoder_width=decoder_width, decoder_depth=decoder_depth,
    )  # fmt: skip


def shape_of(model: MPMAE, image_size: int, visible: int) -> Shape:
    """The shape of a model, for square images with `visible` patches shown, read from its parameters."""
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    dims: list[int] = []
    depths: list[int] = []
    while f"encoder.stages.{len(dims)}.0.dwconv.weight" in sizes:
        stage = f"encoder.stages.{len(dims)}."
        dims.append(sizes[f"{stage}0.dwconv.weight"][0])
        depths.append(sum(name.startswith(stage) and name.endswith(".dwconv.weight") for name in sizes))
    stem: Stem = "modified" if "encoder.initial_conv.0.weight" in sizes else "original"
    first = sizes["encoder.initial_conv.0.weight" if stem == "modified" else "encoder.stem_orig.0.weight"]
    outputs = {
        head: tuple(p[0] for name, p in sizes.items() if name.startswith(f"decoder.{head}.") and name.endswith(".weight"))
        for head in ("pixel_heads", "image_heads")
    }
    patch_size = model.encoder.patch_size
    across = image_size // patch_size
    return Shape(
        depths=tuple(depths), dims=tuple(dims), bands=first[1], patch_size=patch_size, grid=(across, across),
        visible=visible, stem=stem, maps=tuple(n // patch_size**2 for n in outputs["pixel_heads"]),
        scalars=outputs["image_heads"], decoder_width=sizes["decoder.mask_token"][0],
        decoder_depth=sum(name.startswith("decoder.blocks.") and name.endswith(".dwconv.weight") for name in sizes),
    )  # fmt: skip


def count(shape: Shape, *, dense: bool = False) -> Flops:
    """FLOPs per tile of one training step; with `dense` the encoder's depthwise convolutions run over whole maps."""
    forward: Counter[Part] = Counter(dict.fromkeys(PARTS, 0))
    training: Counter[Part] = Counter(dict.fromkeys(PARTS, 0))
    for layer in layers(shape):
        forward[layer.part] += layer.forward(dense)
        training[layer.part] += layer.training(dense)
    return Flops(dict(forward), dict(training))


def layers(shape: Shape) -> Iterator[Layer]:
    """Every convolution and matrix of the model, in the order in which data pass through them."""
    yield from _stem(shape)
    yield from _stages(shape)
    yield from _decoder(shape)


def _stem(shape: Shape) -> Iterator[Layer]:
    cells, width, stride = shape.visible * CELLS**2, shape.dims[0], shape.patch_size // CELLS
    if shape.stem == "modified":
        pixels = shape.visible * shape.patch_size**2
        yield Layer("stem", pixels, shape.bands * STEM_KERNEL**2, width, first=True)
        yield Layer("stem", cells, stride**2, width, groups=width)
    else:
        yield Layer("stem", cells, shape.bands * stride**2, width, first=True)


def _stages(shape: Shape) -> Iterator[Layer]:
    patches = shape.grid[0] * shape.grid[1]
    widths = [(shape.dims[0], shape.dims[0]), *pairwise(shape.dims)]
    for stage, ((narrow, width), depth) in enumerate(zip(widths, shape.depths, strict=True)):
        area = (CELLS >> stage) ** 2
        cells = shape.visible * area
        if stage > 0:
            yield Layer("matrices", cells, narrow * 2 * 2, width)
        for _ in range(depth):
            yield Layer("depthwise", cells, KERNEL**2, width, groups=width, map_places=patches * area)
            yield Layer("matrices", cells, width, MLP_RATIO * width)
            yield Layer("matrices", cells, MLP_RATIO * width, width)


def _decoder(shape: Shape) -> Iterator[Layer]:
    patches, width = shape.grid[0] * shape.grid[1], shape.decoder_width
    yield Layer("decoder", shape.visible, shape.dims[-1], width)
    for _ in range(shape.decoder_depth):
        yield Layer("decoder", patches, KERNEL**2, width, groups=width)
        yield Layer("decoder", patches, width, MLP_RATIO * width)
        yield Layer("decoder", patches, MLP_RATIO * width, width)
    for outputs in shape.maps:
        yield Layer("heads", patches - shape.visible, width, outputs * shape.patch_size**2)
    for outputs in shape.scalars:
        yield Layer("heads", 1, width, outputs)
