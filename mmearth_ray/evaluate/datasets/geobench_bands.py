"""What the published GEO-Bench v1 sets call their bands, and what those bands are.

A band's published name is "NUMBER - WORDS" of Sentinel-2 (github.com/ServiceNow/geo-bench, geobench/dataset.py, commit
03c7bd1); in two sets the names are wrong (its issues 28 and 29).  `Slot`s are those of the published evaluation of MMEarth
(github.com/vishalned/MMEarth-train, commit 1f368b3), which reads bands by name and feeds them by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmearth_ray.evaluate.datasets.task import OTHER
from mmearth_ray.modalities import DEFAULT_INPUT, get

SENTINEL2 = {
    "01 - Coastal aerosol": "B1", "02 - Blue": "B2", "03 - Green": "B3", "04 - Red": "B4",
    "05 - Vegetation Red Edge": "B5", "06 - Vegetation Red Edge": "B6", "07 - Vegetation Red Edge": "B7", "08 - NIR": "B8",
    "08A - Vegetation Red Edge": "B8A", "09 - Water vapour": "B9", "10 - SWIR - Cirrus": "B10", "11 - SWIR": "B11",
    "12 - SWIR": "B12",
}  # fmt: skip
"""Published names of Sentinel-2's bands, and which they are where the names are right."""

OTHER_SENSORS = frozenset(("Sentinel1", "Landsat8", "ElevationBand", "MultiBand", "HyperSpectralBands"))
"""Classes of bands that may share a name with one of Sentinel-2's."""

DROPPED = frozenset(("CloudProbability", "Mask"))
"""Classes of bands that are no image of the ground; in m-SA-crop-type it is 0 everywhere."""

FED = ("01", "02", "03", "04", "05", "06", "07", "08", "08A", "09", "11", "12")
"""Numbers of the names that the published evaluation reads, in its order."""

SLOTS = get(DEFAULT_INPUT).default_bands().bands
"""The bands of the published encoders in the order of their input: what each of `FED` is fed as."""


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """One of the published sets.

    `names`: of its folder, and those that its task description may carry.  `true`: bands that are not what their number says.
    `instead`: numbers that the published evaluation reads where the set has no band of that name.  `scale` brings stored values
    to reflectance x 10000; `missing`: those that are no data; `product`: None where the values are no reflectance.
    """

    names: tuple[str, ...]
    product: str | None
    scale: float = 1.0
    missing: tuple[float, ...] = (0,)
    true: dict[str, str] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


PUBLISHED = (
    PublishedSet(
        names=("m-eurosat", "eurosat"), product="l1c",
        true={"08A": "B9", "09": "B10", "10": "B11", "11": "B12", "12": "B8A"},
        notes=("The published names 08A, 09, 10, 11 and 12 are of the bands B9, B10, B11, B12 and B8A; corrected.",),
    ),
    PublishedSet(  # its colour images (TCI) are made with products of surface reflectance alone
        names=("m-brick-kiln", "brick_kiln_v1.0"), product="l2a",
        true={"06": "B7", "07": "B8A", "08": "B8", "08A": "B11", "09": "B12",
              "10": OTHER + "TCI_R", "11": OTHER + "TCI_G", "12": OTHER + "TCI_B"},
        notes=("The published names 06, 07, 08, 08A, 09, 10, 11 and 12 are of the bands B7, B8A, B8, B11, B12 and of the 8-bit "
               "colours R, G, B; corrected. The set has no B6, B9 and B10.",),
    ),
    PublishedSet(
        names=("m-so2sat", "so2sat"), product="l1c", scale=10000.0, instead={"01": "02", "09": "08A"},
        notes=("Stored values are reflectance, pretraining reads reflectance x 10000: the scale is 10000.",),
    ),
    PublishedSet(names=("m-bigearthnet", "bigearthnet"), product="l2a"),
    PublishedSet(
        names=("m-cashew-plant", "m-cashew-plantation", "smallholder_cashew"), product="l2a",
        classes=("no data", "well-managed plantation", "poorly-managed plantation", "non-plantation", "residential",
                 "background", "uncertain"),
        notes=("Its pixels are of 10 m, not of the published 0.5 m. 'no data' and 'uncertain' count as classes, as published. "
               "Its converter cuts images that overlap by half out of one small area and draws splits image by image, so that "
               "test images share ground with training images.",),
    ),
    PublishedSet(
        names=("m-SA-crop-type", "southAfricaCropType"), product=None, missing=(),
        classes=("No Data", "Lucerne/Medics", "Planted pastures (perennial)", "Fallow", "Wine grapes", "Weeds",
                 "Small grain grazing", "Wheat", "Canola", "Rooibos"),
        notes=("Stored values are 0..255, no reflectance: only the statistics of the set itself can normalise them. 'No Data' "
               "counts as a class, as published.",),
    ),
)  # fmt: skip
"""The sets that the published evaluation of MMEarth uses; classes, where the sets name none, from their converters."""

UNKNOWN = PublishedSet(
    names=(), product=None, notes=("No published set of that name is known: bands are what their names say.",)
)


def published_set(*names: str) -> PublishedSet:
    """The set that goes by the first of those names that any goes by, or `UNKNOWN`."""
    return next((known for name in names for known in PUBLISHED if name in known.names), UNKNOWN)


def identity(name: str, kind: str, known: PublishedSet) -> str | None:
    """What the band of that published name and class is; None for one that is left out.

    Names of other sensors stay as they are behind `other.`, without their number.
    """
    if kind in DROPPED or name == "Cloud Probability":
        return None
    if kind in OTHER_SENSORS or name not in SENTINEL2:
        number, dash, words = name.partition(" - ")
        return OTHER + (words if dash and number[:2].isdigit() else name)
    return known.true.get(number_of(name), SENTINEL2[name])


def number_of(name: str) -> str:
    """08A for "08A - Vegetation Red Edge"."""
    return name.partition(" - ")[0]


def corrected(names: Sequence[tuple[str, str]], known: PublishedSet, *, others: bool) -> dict[str, str]:
    """{identity: published name} of the bands to keep, from (name, class) of all, Sentinel-2's in the order of the table.

    With `others`, and of a set without Sentinel-2, what it has beside them comes behind.  Raises LookupError where two bands
    are the same.
    """
    found: dict[str, str] = {}
    for name, kind in names:
        band = identity(name, kind, known)
        if band in found:
            raise LookupError(f"'{found[band]}' and '{name}' are both {band}")
        found |= {band: name} if band else {}
    order = [band for band in get(DEFAULT_INPUT).bands if band in found]
    if others or not order:
        order += [band for band in found if band not in order]
    return {band: found[band] for band in order}


def as_published(names: Sequence[tuple[str, str]], known: PublishedSet) -> dict[str, str]:
    """{identity of the encoder's band: published name that the published evaluation feeds it}.

    Raises LookupError, naming the number, where the set has no such band and nothing stands for it.
    """
    by_number = {number_of(name): name for name, kind in names if name in SENTINEL2 and kind not in OTHER_SENSORS}
    fed: dict[str, str] = {}
    for slot, number in zip(SLOTS, FED, strict=True):
        fed[slot] = by_number[number if number in by_number else known.instead.get(number, number)]
    return fed
