"""Our parameter names and those of timm's convnextv2_*, where both describe the same network: original stem, 32 px patches.

The numbers agree as well: LayerNorm and GRN have an eps of 1e-6 in both.  Checked with timm 1.0.31, timm/models/convnext.py.

Shapes: D channels, F = 4 D.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from mmearth_ray.model.encoder import SIZES

# timm's smaller models hold the two matrices of a block as 1x1 convolutions, (F, D, 1, 1).
CONVOLVING = tuple(SIZES[name].dims[0] for name in ("atto", "femto", "pico", "nano"))

STEM = "stem_orig.0.weight"  # (D, C, 4, 4) where timm has the same stem

# (pattern, replacement) from ours to timm's; `IN` goes the other way.
OUT = (
    (r"^stem_orig\.", "stem."),
    (r"^downsample_layers\.(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.{m[2]}."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
)
IN = (
    (r"^(stem|stages)_(\d+)\.", r"\1.\2."),  # features_only in timm
    (r"^stem\.", "stem_orig."),
    (r"^stages\.(\d+)\.downsample\.(\d+)\.", lambda m: f"downsample_layers.{int(m[1]) - 1}.{m[2]}."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
)


def to_timm(state: Mapping[str, Tensor], *, features_only: bool = False) -> dict[str, Tensor]:
    """A state dict of our encoder, with or without a head, for timm's model of the same size.

    `features_only`: for a timm model made so, whose names differ slightly.  timm keeps a norm after its pooling even
    without classes, which we have not: without a head, load with strict=False and compare `forward_features`.
    Raises ValueError where timm has no such network.
    """
    if STEM not in state:
        raise ValueError(
            "timm's ConvNeXt V2 has no stem like the modified one of MP-MAE; use create_encoder or load_encoder, "
            "or pretrain with model.stem=original model.patch_size=32"
        )
    width, _, stride, _ = state[STEM].shape
    if stride != 4:
        raise ValueError(
            f"timm's ConvNeXt V2 takes patches of 32 pixels; these weights are for {8 * stride}; use create_encoder or "
            "load_encoder, or pretrain with model.stem=original model.patch_size=32"
        )
    found = {}
    for name, value in state.items():
        if width in CONVOLVING and re.search(r"\.pwconv[12]\.weight$", name):
            value = value[..., None, None]
        name = _rename(name, OUT)
        found[re.sub(r"^(stem|stages)\.(\d+)\.", r"\1_\2.", name) if features_only else name] = value
    return found


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm's convnextv2_*, also made with features_only, for our encoder (original stem, 32 px patches).

    Without a classifier the norm after timm's pooling is left out: ours has none there.  Raises ValueError for weights of
    another network.
    """
    odd = [name for name in state if name.endswith(".gamma") and "grn" not in name]
    stem = next((state[name] for name in ("stem.0.weight", "stem_0.weight") if name in state), None)
    if odd or stem is None or stem.shape[2:] != (4, 4) or not any("mlp.grn" in name for name in state):
        raise ValueError("these are not weights of timm's convnextv2_* models; other models of timm have other layers")
    found = {}
    for name, value in state.items():
        if name.startswith("head.norm.") and "head.fc.weight" not in state:
            continue
        name = _rename(name, IN)
        found[name] = value.flatten(1) if re.search(r"\.pwconv[12]\.weight$", name) else value
    return found


def _rename(name: str, rules: tuple) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
