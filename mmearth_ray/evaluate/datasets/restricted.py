"""Reading the pickles of GEO-Bench v1 without running them.

Unpickling runs whatever the pickle names.  Here it can name little, and nothing of that does anything: classes of GEO-Bench,
coordinate systems and transforms become inert records; dates and numbers are made again from their bytes; every other name is
refused, and said.  What published sets hold: github.com/ServiceNow/geo-bench (geobench/_safe_pickle.py, commit 0051f44).
"""

import ast
import datetime
import io
import pickle
import pickletools
import re
import warnings
from collections import OrderedDict
from functools import cache
from math import prod
from typing import Any

import numpy as np

from mmearth_ray.errors import DataError, one_line

MODULES = frozenset(
    package + inner + part
    for package in ("geobench", "ccb")
    for inner in ("", ".io")
    for part in ("", ".dataset", ".label", ".task")
)
"""Where the classes of GEO-Bench were defined in the versions that sets were written with."""

CLASSES = frozenset((
    "BandInfo", "SpectralBand", "Sentinel1", "Sentinel2", "Landsat8", "Mask", "ElevationBand", "MultiBand",
    "HyperSpectralBands", "CloudProbability", "SegmentationClasses", "Band", "Sample", "Stats", "Partition", "LabelType",
    "Classification", "SemanticSegmentation", "MultiLabelClassification", "Regression", "Detection", "PointAnnotation",
    "TaskSpecifications", "Loss", "Accuracy", "AccuracyTop30", "MultilabelAccuracy", "CrossEntropy", "SegmentationAccuracy",
))  # fmt: skip
"""Classes of bands, labels and tasks there, and of the losses that older task descriptions name."""

PLACES = frozenset(
    {("affine", "Affine"), ("affine.affine", "Affine"), ("rasterio.crs", "CRS"), ("rasterio._crs", "_CRS"),
     ("rasterio.transform", "Affine")}
)  # fmt: skip
"""Where a band lies; nothing here asks."""

NUMBER = re.compile(r"[biuf][1248]|b1|[SU]\d{1,4}")
"""Types of numbers and texts, as a pickled dtype names them; never `O`, whose values are pickles in their turn."""


class Record:
    """What is left of an object: the name of its class, what it was made with, and its attributes."""

    kind = ""

    def __new__(cls, *arguments: Any, **named: Any) -> "Record":
        record = super().__new__(cls)
        record.arguments, record.fields = arguments, dict(named)
        return record

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.fields: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.fields.update({name: value for name, value in part.items() if isinstance(name, str)})

    def get(self, *names: str) -> Any:
        """The first of those attributes that the object has and that is not None, or None."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)


@cache
def _record(name: str) -> type[Record]:
    return type(name, (Record,), {"kind": name})


class _Sealed:
    """A class that a pickle may call, and whose own attributes it cannot set."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"a {type(self).__name__.strip('_')} is given a state that it cannot have")


class _Dtype(_Sealed):
    """What a pickled dtype says of itself, and no dtype: the state of a real one can make it one of objects."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str) or not NUMBER.fullmatch(code):
            raise pickle.UnpicklingError(f"numpy.dtype('{code}') is pickled, of which only those of numbers and texts are read")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise pickle.UnpicklingError("a numpy.dtype of parts is pickled, of which only plain ones are read")
        self.order = state[1]

    def numbers(self, raw: Any, shape: Any, order: Any = "C") -> np.ndarray:
        """Those bytes as an array."""
        known = isinstance(shape, tuple) and all(isinstance(side, int) and side >= 0 for side in shape)
        if not known or order not in ("C", "F") or not isinstance(raw, bytes | bytearray):
            raise pickle.UnpicklingError("an array of numpy is pickled that is not one of numbers or texts")
        dtype = np.dtype(self.order + self.code)
        if len(raw) != prod(shape) * dtype.itemsize:
            raise pickle.UnpicklingError(f"an array of numpy has {len(raw)} bytes, not {prod(shape)} x {dtype.itemsize}")
        return np.frombuffer(bytes(raw), dtype).reshape(shape, order=order)


class _Array(_Sealed):
    """An array on its way: `numpy.ndarray` itself is never called."""

    def __init__(self) -> None:
        self.values = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
            raise pickle.UnpicklingError("an array of numpy is pickled in a form that is not known")
        _, shape, dtype, is_fortran, raw = state
        self.values = dtype.numbers(raw, shape, "F" if is_fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values if dtype is None else self.values.astype(dtype)


class _Reconstruct(_Sealed):
    """Stands for `numpy.core.multiarray._reconstruct`."""

    def __new__(cls, kind: Any, shape: Any = (0,), code: Any = b"b") -> Any:
        if kind is not _Array:
            raise pickle.UnpicklingError("a kind of array is pickled that is not numpy.ndarray")
        return _Array()


class _Scalar(_Sealed):
    """Stands for `numpy.core.multiarray.scalar`."""

    def __new__(cls, dtype: Any, raw: Any = None) -> Any:
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("a number of numpy is pickled without its type")
        return dtype.numbers(raw, ()).item()


class _FromBuffer(_Sealed):
    """Stands for `numpy.core.numeric._frombuffer`, by which newer pickles make arrays."""

    def __new__(cls, raw: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array of numpy is pickled without its type")
        return dtype.numbers(raw, shape, order)


REMADE: dict[tuple[str, str], Any] = {
    **{("datetime", kind.__name__): kind for kind in (
        datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone)},
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("core", "_core")},
}  # fmt: skip
"""What other names stand for.  Real ones are of types that Python makes itself and nobody can change."""


class _Refused(pickle.UnpicklingError):
    """A name that no published set holds."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in REMADE:
            return REMADE[module_name, global_name]
        if (module_name in MODULES and global_name in CLASSES) or (module_name, global_name) in PLACES:
            return _record(global_name)
        raise _Refused(f"{module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("an object outside of the file")


def loads(data: bytes, where: str) -> Any:
    """What a pickle of GEO-Bench holds, its objects as `Record`, its arrays convertible by `np.asarray`.

    Raises DataError, naming the file by `where`, for a pickle that is damaged or that names anything else.
    """
    try:
        _check_memo(data)
        return _Unpickler(io.BytesIO(data)).load()
    except _Refused as error:
        raise DataError(f"{where} is refused: it pickles {_printable(error)}, and unpickling may run code; only classes of "
                        "GEO-Bench, coordinate systems, dates and numbers are read") from error  # fmt: skip
    except Exception as error:  # whatever bytes that are no such pickle make of the unpickler
        raise DataError(f"{where} is refused: it holds no pickle of GEO-Bench ({_printable(error)})") from error


def from_text(text: Any, where: str) -> Any:
    """The same of the text of a bytes literal, the form of the attribute `pickle` of a sample."""
    text = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    data: Any = None
    if isinstance(text, str) and text[:2] in ("b'", 'b"'):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that no literal has
                data = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            data = None
    if not isinstance(data, bytes):
        raise DataError(f"{where} is refused: its attribute 'pickle' is not the text of a bytes literal")
    return loads(data, where)


def _check_memo(data: bytes) -> None:
    """Refuse places in the unpickler's memory that no pickle of that length needs: it would take all there is for them."""
    for code, argument, _ in pickletools.genops(data):
        if code.name.endswith("PUT") and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError(f"it asks for place {argument} of a memo")


def _printable(error: BaseException) -> str:
    return "".join(letter for letter in one_line(error) if letter.isprintable())
