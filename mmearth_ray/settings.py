"""Settings of a command: a frozen dataclass owns every default, YAML and key=value arguments change them.

Each field is declared with `key(default, "meaning", ...)`, so that `--help`, the check of values and the error for a wrong
key all come from the declaration.  No omegaconf object leaves this module, and where omegaconf is not installed, arguments of
plain values are read without it.
"""

import difflib
import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from mmearth_ray.errors import UsageError
from mmearth_ray.plain import QUOTED, plain_value

T = TypeVar("T")


def key(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    among: Sequence[Any] | None = None,
) -> Any:
    """Declare one setting: its default, what it means, and what values are allowed."""
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"meaning": meaning, "limits": {k: v for k, v in limits.items() if v is not None}, "among": among}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """Declare a group of settings that all have their defaults."""
    return field(default_factory=kind)


def load(kind: type[T], files: Sequence[Path], arguments: Sequence[str]) -> T:
    """The settings of `kind` with YAML files, then key=value arguments, laid over the defaults.

    Raises UsageError for a file that cannot be read, an unknown key, a value of the wrong type or out of bounds.
    """
    if not files and not _has_omegaconf():
        return load_plain(kind, arguments)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(kind)
    for source, layer in [*((str(f), _yaml(f)) for f in files), *((a, _argument(kind, a)) for a in arguments)]:
        try:
            merged = OmegaConf.merge(merged, _listed(kind, layer))
        except (OmegaConfBaseException, TypeError) as error:
            raise UsageError(_explain(kind, source, str(getattr(error, "full_key", source.partition("=")[0]) or ""))) from error
    try:
        settings: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UsageError(f"a reference ${{...}} cannot be resolved: {' '.join(str(error).split())}") from error
    check(settings)
    return settings


def _has_omegaconf() -> bool:
    try:
        importlib.import_module("omegaconf")
    except ImportError:
        return False
    return True


def load_plain(kind: type[T], arguments: Sequence[str]) -> T:
    """The settings of `kind` with arguments of plain values: decimal numbers, true, false, null, text, lists of plain words.

    What it takes it reads as `load` does; for anything else it raises UsageError.
    """
    settings: T = kind()
    entries = {name: entry for name, entry, _ in walk(kind)}
    for argument in arguments:
        name, value = _split(argument)
        if name not in entries:
            raise UsageError(_explain(kind, argument, name))
        try:
            settings = _with(settings, name, plain_value(value, entries[name].type, one=_takes_one(entries[name])))
        except ValueError as error:
            hint = "without omegaconf only decimal numbers, true, false, null, text and lists of plain words are read"
            raise UsageError(f"{_explain(kind, argument, name)}; {hint}") from error
    check(settings)
    return settings


def _with(settings: Any, name: str, value: Any) -> Any:
    """The settings with one of them, by its dotted name, set to a value."""
    head, _, rest = name.partition(".")
    return replace(settings, **{head: _with(getattr(settings, head), rest, value) if rest else value})


def check(settings: Any) -> None:
    """Raise UsageError for the first value that its declaration does not allow."""
    for name, entry, value in walk(settings):
        among, values = entry.metadata.get("among"), value if isinstance(value, list) else [value]
        if isinstance(value, list) and any(isinstance(v, list | dict) for v in value):
            raise UsageError(f"{name}={value}: must be a list of plain values")
        if any(isinstance(v, float) and not math.isfinite(v) for v in values):
            raise UsageError(f"{name}={value}: must be a finite number")
        if among is not None and any(v not in among for v in values):
            raise UsageError(f"{name}={value}: must be one of {', '.join(map(str, among))}")
        for limit, bound in entry.metadata.get("limits", {}).items():
            if value is not None and not all(_COMPARE[limit](v, bound) for v in values):
                raise UsageError(f"{name}={value}: must be {limit} {bound:g}")


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "at least": lambda v, b: v >= b,
    "above": lambda v, b: v > b,
    "at most": lambda v, b: v <= b,
    "below": lambda v, b: v < b,
}


def walk(settings: Any, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """Every setting as (dotted name, declaration, value).  Takes an object, or a class for its defaults."""
    for entry in fields(settings):
        name = prefix + entry.name
        value = _default(entry) if isinstance(settings, type) else getattr(settings, entry.name)
        if is_dataclass(value):
            yield from walk(value, name + ".")
        else:
            yield name, entry, value


def _default(entry: Field) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def flatten(settings: Any) -> dict[str, Any]:
    """{dotted name: value} of all settings."""
    return {name: value for name, _, value in walk(settings)}


def to_yaml(settings: Any) -> str:
    """The settings as YAML that `load` reads back to the same object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def help_text(kind: type) -> str:
    """Every key with its default and meaning, one to a line, a blank line between sections."""
    rows = list(walk(kind))
    width = max(len(f"{name}={_show(value)}") for name, _, value in rows)
    lines: list[str] = []
    previous = ""
    for name, entry, value in rows:
        head = name.rpartition(".")[0]
        if lines and head != previous:
            lines.append("")
        previous = head
        lines.append(f"  {f'{name}={_show(value)}'.ljust(min(width, 44))}  {entry.metadata['meaning']}{_allowed(entry)}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(entry: Field) -> str:
    among = entry.metadata.get("among")
    return f" ({' | '.join(map(str, among))})" if among else ""


def _yaml(path: Path) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        layer = OmegaConf.create(path.read_text(encoding="utf-8") or "{}")
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(layer):
        raise UsageError(f"{path} must hold keys and values, such as `train: {{steps: 100}}`")
    return layer


def _split(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", name):
        raise UsageError(f"'{argument}' is not of the form key=value; --help lists the keys")
    return name, value


def _listed(kind: type, layer: Any) -> Any:
    """The layer with a list wherever one item stands for a list: data.shards=DIRECTORY, train.workers=4."""
    from omegaconf import OmegaConf

    for name, entry, _ in walk(kind):
        if _takes_one(entry):
            value = OmegaConf.select(layer, name, throw_on_resolution_failure=False)
            if type(value) in get_args(entry.type) or (type(value) is int and entry.type == list[float]):
                OmegaConf.update(layer, name, [value])
    return layer


def _takes_one(entry: Field) -> bool:
    """Whether one item may stand for a list: of a list of text, and of one that has items by default."""
    return get_origin(entry.type) is list and (entry.type == list[str] or bool(_default(entry)))


def _argument(kind: type, argument: str) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name, value = _split(argument)
    try:
        if _is_literal(kind, name, value):
            layer = OmegaConf.create()
            OmegaConf.update(layer, name, value)
            return layer
        return OmegaConf.from_dotlist([argument])
    except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        raise UsageError(f"{argument}: the value cannot be read ({' '.join(str(error).split())})") from error


def _is_literal(kind: type, name: str, value: str) -> bool:
    """Whether the value is text to take as it stands: YAML would make 120 of the tile id 12_0, and null of nothing."""
    wanted = next((entry.type for known, entry, _ in walk(kind) if known == name), None)
    if wanted is not str and not (isinstance(wanted, UnionType) and set(get_args(wanted)) == {str, type(None)}):
        return False
    if value in ("", "null"):
        return wanted is str and not value
    return not (value.startswith("$") or QUOTED.fullmatch(value))


_READABLE = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null", list[str]: "a list of text",
    list[int]: "a list of whole numbers", list[float]: "a list of numbers", dict[str, list[str]]: "lists of text by name",
}  # fmt: skip


def _explain(kind: type, source: str, name: str) -> str:
    """Why a source's value for the key of that dotted name is refused."""
    known = {n: entry for n, entry, _ in walk(kind)}
    if not name or any(n.startswith(name + ".") for n in known):
        return f"{source}: a section holds keys and values, such as train.steps=100; --help lists the keys"
    name = re.sub(r"\[\d+\]$", "", name)  # an item of a list
    name = next((n for n, entry in known.items() if get_origin(entry.type) is dict and name.startswith(n + ".")), name)
    if name in known:
        wanted = known[name].type
        readable = " or ".join(_READABLE[kind] for kind in (get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)))
        return f"{source}: {name} must be {readable}; --help tells what it means"
    given, equals, _ = source.partition("=")
    name = given if equals and given.startswith(name + ".") else name  # of a section that there is not, the whole key
    close = [n for n in known if n.endswith("." + name)] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "--help lists the keys"
    return f"{source}: there is no key '{name}'; {hint}"
