"""The model card of an exported model: what people need to know before they feed it."""

import json
from collections.abc import Mapping
from typing import Any


def model_card(description: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter, as model hubs read it, from a description in its JSON form."""
    d = description
    name = f"ConvNeXt V2 {d['size'] or 'of its own size'}"
    return "\n".join(
        [
            "---\nlibrary_name: mmearth-ray\ntags: [earth-observation, masked-autoencoder, convnextv2, mmearth]\n---",
            f"# {name}, patch {d['patch_size']} px, pretrained as a masked autoencoder\n",
            f"An encoder for {d['input']}, pretrained to predict {_listed(d['targets'])} at hidden patches "
            "(MP-MAE, [arXiv:2405.02771](https://arxiv.org/abs/2405.02771)).\n"
            if d["targets"]
            else f"An encoder for {d['input']}, pretrained on other data than MMEarth: see below.\n",
            _use(d),
            _structure(d),
            _bands(d),
            _origin(d),
        ]
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "nothing"


def _use(d: Mapping[str, Any]) -> str:
    if d["statistics"]:
        product = sorted(d["statistics"])[-1]
        normalise = (
            f'encoder.normalise("{product}")(raw)  # or {_listed(sorted(d["statistics"])[:-1])}, by product of the sensor'
        )
    else:
        normalise = "Normalise(mean, std, missing)(raw)  # from mmearth_ray.model.normalise; statistics were not kept"
    return (
        "## Use\n\n```python\nimport mmearth_ray\n\n"
        'encoder = mmearth_ray.load_encoder("THIS FOLDER").eval()\n'
        f"# raw: (batch, {len(d['bands'])}, height, width), bands as below, sides multiples of {d['patch_size']}\n"
        f"x = {normalise}\n"
        f"features = encoder.forward_features(x)  # (batch, {d['dims'][-1]}, height / {d['patch_size']}, "
        f"width / {d['patch_size']})\n```\n\n"
        "`encoder.safetensors` is the state dict of a plain dense ConvNeXt V2; nothing in it needs this package.\n"
    )


def _structure(d: Mapping[str, Any]) -> str:
    rows = {
        "blocks per stage": _listed([str(n) for n in d["depths"]]),
        "channels per stage": _listed([str(n) for n in d["dims"]]),
        "stem": d["stem"],
        "patch, image side in pretraining": f"{d['patch_size']} px, {d['image_size']} px",
        **_sizes(d),
        "GRN in pretraining": f"over each {d['grn']}",
        "norm at the end": "none",
    }
    return "## Structure\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _sizes(d: Mapping[str, Any]) -> dict[str, str]:
    """Which sizes steps took in turn, where there were several."""
    sizes = _listed([f"{size} px" for size in d["image_sizes"]])
    several = len(set(d["image_sizes"])) > 1
    return {"image sides in turn": f"{sizes}; encoders of the other patch sizes are in patch-N/"} if several else {}


def _bands(d: Mapping[str, Any]) -> str:
    """Bands in the order of the input channels, with the mean and deviation that normalised them, by product."""
    products = sorted(d["statistics"] or {})
    head = ["channel", "band", "unit", *(f"{p} {part}" for p in products for part in ("mean", "std"))]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for i, band in enumerate(d["bands"]):
        numbers = [_number(d["statistics"][p][part][i]) for p in products for part in ("mean", "std")]
        lines.append("| " + " | ".join([str(i), band, d["units"][i] if d["units"] else "", *numbers]) + " |")
    missing = f"Raw values {_listed([str(v) for v in d['missing']])} mean no data; they become 0 after normalisation."
    return "## Bands and normalisation\n\n" + "\n".join(lines) + f"\n\n{missing}\n"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"


def _origin(d: Mapping[str, Any]) -> str:
    """Data, length and recipe of the training, as far as they are known."""
    facts = {"data set": d["data_set"], "steps": d["step"], "tiles seen": d["tiles_seen"]}
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    text = json.dumps(d["origin"], indent=1, sort_keys=True)
    return "## Training\n\n" + "\n".join(lines) + f"\n\n```json\n{text}\n```\n"
