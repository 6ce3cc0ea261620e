"""Values that mean the same in YAML and without it: how settings are read where there is no omegaconf."""

import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

QUOTED = re.compile(r"""(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*")""")
"""One whole string in YAML's quotes."""

_WORD = "an item of a list of text"

_LOOKS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: (r"-?(?:0|[1-9][0-9]*)", int),
    float: (r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE]-?[0-9]+)?", float),
    bool: (r"true|false", lambda text: text == "true"),
    _WORD: (r"(?i:(?!(?:true|false|yes|no|on|off|null)$)[a-z][\w./+-]*)|[0-9]+/[0-9]+|0|[1-9][0-9]*", str),
}
"""What each type looks like, where YAML cannot mean anything else by it."""


def plain_value(text: str, wanted: Any, *, one: bool = False) -> Any:
    """The value of a text as the wanted type, `one` item as a list of it.  Raises ValueError where it is not a plain one."""
    if isinstance(wanted, UnionType):
        if text in ("", "null"):
            return None
        wanted = next(iter(set(get_args(wanted)) - {NoneType}))
    if get_origin(wanted) is list:
        return _items(text, *get_args(wanted), one=one)
    if wanted is str and text != "null" and "$" not in text and not QUOTED.fullmatch(text):
        return text
    look, convert = _LOOKS.get(wanted, ("(?!)", str))
    if not re.fullmatch(look, text):
        raise ValueError(text)
    return convert(text)


def _items(text: str, inner: Any, *, one: bool) -> list[Any]:
    kind = _WORD if inner is str else inner
    if one and re.fullmatch(_LOOKS[kind][0], text) and not (inner is str and text.isdecimal()):
        text = f"[{text}]"
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(text)
    items = text[1:-1].split(",") if text[1:-1].strip() else []
    return [plain_value(item.strip(), kind) for item in items]
