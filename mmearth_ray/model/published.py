"""Names and layouts of the published checkpoints (github.com/vishalned/MMEarth-train), to ours and back, bit for bit.

The published encoder keeps MinkowskiEngine's layouts: kernels (k k, in, out), or (k k, channels) where depthwise, whose
first index is row + k column, a kernel of one cell without that index, and biases and GRN in rows.  The decoder is dense.
One decoder block serves all modalities, and the state dict repeats it under the name of each.

Shapes: k side of a kernel, I input and O output channels, D channels, E channels of the decoder, P side of a patch, px.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

from torch import Tensor

from mmearth_ray.errors import DataError
from mmearth_ray.model.encoder import SIZES, Stem
from mmearth_ray.model.layers import CELLS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """What the names and shapes of a published checkpoint tell.

    `outputs`: the tasks in the run's own order, with the outputs of their heads (per patch where the task is a map).
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_channels: int
    patch_size: int
    stem: Stem
    decoder_width: int
    decoder_depth: int
    outputs: dict[str, int]
    uncertainty: bool

    @property
    def size(self) -> str | None:
        """The published size of this depth and width, if it is one."""
        return next((name for name, s in SIZES.items() if (s.depths, s.dims) == (self.depths, self.dims)), None)


def read_structure(state: Mapping[str, Tensor]) -> Structure:
    """The structure of a published state dict.  Raises DataError for one that is not MP-MAE's."""
    original = "encoder.stem_orig.0.kernel" in state
    first = _shape(state, "encoder.stem_orig.0.kernel" if original else "encoder.initial_conv.0.kernel")
    stem = first if original else _shape(state, "encoder.stem.0.kernel")
    if len(first) not in (2, 3) or len(stem) not in (2, 3):
        raise DataError(f"the kernels of the stem have shapes {first} and {stem}, which are not those of MP-MAE")
    side = isqrt(stem[0]) if len(stem) == 3 or not original else 1
    blocks = _numbers(state, r"encoder\.stages\.(\d+)\.(\d+)\.")
    stages = sorted({stage for stage, _ in blocks}, key=int)
    tasks = list(dict.fromkeys(name.split(".")[1] for name in state if name.startswith("pred_dict.")))
    if not (tasks and stages):
        raise DataError("the checkpoint has no heads (pred_dict...) or no stages, so it is not one of MP-MAE pretraining")
    return Structure(
        depths=tuple(len({block for s, block in blocks if s == stage}) for stage in stages),
        dims=tuple(_shape(state, f"encoder.stages.{stage}.0.norm.ln.weight")[0] for stage in stages),
        in_channels=first[-2],
        patch_size=CELLS * side,
        stem="original" if original else "modified",
        decoder_width=_shape(state, "proj.weight")[0],
        decoder_depth=len(_numbers(state, rf"decoder_dict\.({tasks[0]})\.(\d+)\.norm\.weight")),
        outputs={task: _shape(state, f"pred_dict.{task}.bias")[0] for task in tasks},
        uncertainty="loss_fn.log_vars" in state,
    )


def from_published(state: Mapping[str, Tensor], shapes: Mapping[str, Shape], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Our tensors, by the names and shapes of an Objective's parameters.

    Raises DataError unless the published state has just the tensors that those need, and the same shared block under the name
    of every task.
    """
    found, used = {}, set()
    for name, shape in shapes.items():
        keys, layout = _published(name, tasks)
        for key in keys:
            given, wanted = _shape(state, key), layout.shape(shape)
            if given not in (wanted, (1, *wanted)):  # a kernel of one cell may keep its index
                raise DataError(f"{key} has shape {given}; the rest of the checkpoint calls for {wanted}")
            if not state[key].equal(state[keys[0]]):
                raise DataError(f"{key} differs from {keys[0]}; the decoder of MP-MAE is one block that all tasks share")
        found[name] = layout.ours(state[keys[0]], shape)
        used.update(keys)
    unknown = [key for key in state if key not in used]
    if unknown:
        raise DataError(f"the checkpoint has {len(unknown)} tensors that MP-MAE has not, the first is {unknown[0]}")
    return found


def to_published(tensors: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """The published state dict of an Objective's parameters: the inverse of `from_published`.

    Names of heads follow the order of `tasks`, which is that of the log-variances.
    """
    state = {}
    for name, tensor in tensors.items():
        keys, layout = _published(name, tasks)
        state |= dict.fromkeys(keys, layout.published(tensor))
    place = {f"pred_dict.{task}": number for number, task in enumerate(tasks)}
    return dict(sorted(state.items(), key=lambda item: place.get(item[0].rpartition(".")[0], -1)))


class _Layout(NamedTuple):
    """How a published tensor stores one of ours: its shape, and whether it holds a kernel (O, I, row, column) reversed."""

    shape: Callable[[Shape], Shape]
    reversed: bool = False

    def published(self, ours: Tensor) -> Tensor:
        turned = ours.permute(3, 2, 1, 0) if self.reversed else ours
        return turned.reshape(self.shape(tuple(ours.shape))).contiguous()

    def ours(self, published: Tensor, shape: Shape) -> Tensor:
        return (published.reshape(shape[::-1]).permute(3, 2, 1, 0) if self.reversed else published.reshape(shape)).contiguous()


def _kernel(shape: Shape) -> Shape:
    out_channels, in_channels, side, _ = shape
    return (side**2, in_channels, out_channels) if side > 1 else (in_channels, out_channels)


PLAIN = _Layout(lambda shape: shape)
ROW = _Layout(lambda shape: (1, *shape))
MAP = _Layout(lambda shape: (1, 1, 1, *shape))
TOKEN = _Layout(lambda shape: (1, *shape, 1, 1))
POINTWISE = _Layout(lambda shape: (*shape, 1, 1))
KERNEL = _Layout(_kernel, reversed=True)
CHANNELWISE = _Layout(lambda shape: (shape[2] ** 2, shape[0]), reversed=True)

_CONV = r"encoder\.(?:initial_conv\.0|stem\.0|stem_orig\.0|downsample_layers\.\d+\.1|stages\.\d+\.\d+\.dwconv)"
_NORM = r"encoder\.(?:initial_conv\.1|stem\.1|stem_orig\.1|downsample_layers\.\d+\.0|stages\.\d+\.\d+\.norm)"
_NAMES: tuple[tuple[str, str, _Layout], ...] = (  # ours, theirs, layout: the first that fits; TASK stands for every task
    (r"log_variances", "loss_fn.log_vars", PLAIN),
    (r"model\.(encoder\.(?:stem\.0|stages\.\d+\.\d+\.dwconv))\.weight", r"\1.kernel", CHANNELWISE),
    (rf"model\.({_CONV})\.weight", r"\1.kernel", KERNEL),
    (rf"model\.({_CONV})\.bias", r"\1.bias", ROW),
    (rf"model\.({_NORM})\.(\w+)", r"\1.ln.\2", PLAIN),
    (r"model\.(encoder\.stages\.\d+\.\d+\.pwconv\d)\.(\w+)", r"\1.linear.\2", PLAIN),
    (r"model\.(encoder\.stages\.\d+\.\d+\.grn\.\w+)", r"\1", ROW),
    (r"model\.decoder\.mask_token", "mask_token", TOKEN),
    (r"model\.decoder\.projection\.weight", "proj.weight", POINTWISE),
    (r"model\.decoder\.projection\.bias", "proj.bias", PLAIN),
    (r"model\.decoder\.blocks\.(\d+\.grn\.\w+)", r"decoder_dict.TASK.\1", MAP),
    (r"model\.decoder\.blocks\.(.+)", r"decoder_dict.TASK.\1", PLAIN),
    (r"model\.decoder\.image_norm\.(\w+)", r"layer_norm_tmp.\1", PLAIN),
    (r"model\.decoder\.pixel_heads\.(\w+)\.weight", r"pred_dict.\1.weight", POINTWISE),
    (r"model\.decoder\.(?:pixel|image)_heads\.(\w+)\.(\w+)", r"pred_dict.\1.\2", PLAIN),
)


def _published(name: str, tasks: Sequence[str]) -> tuple[list[str], _Layout]:
    """Published names of one of our parameters, several for the shared block, and its layout there."""
    for pattern, theirs, layout in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            key = match.expand(theirs)
            return ([key.replace("TASK", task) for task in tasks] if "TASK" in key else [key]), layout
    raise DataError(f"{name} has no place in a published checkpoint")


def _shape(state: Mapping[str, Tensor], key: str) -> Shape:
    if key not in state:
        raise DataError(f"the checkpoint has no tensor {key}, so it is not one of MP-MAE pretraining")
    return tuple(state[key].shape)


def _numbers(state: Mapping[str, Tensor], pattern: str) -> set[tuple[str, ...]]:
    """What the groups of a pattern match at the beginning of the names."""
    return {match.groups() for match in (re.match(pattern, key) for key in state) if match}
