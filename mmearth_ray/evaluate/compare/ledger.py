"""What a comparison in a folder is of, so that another one is not mixed into it: run.json.

Fractions, seeds, protocols and encoders may grow from one start to the next; everything else that decides a score stays.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmearth_ray.errors import DataError, UsageError, one_line
from mmearth_ray.evaluate.features.encoders import Subject
from mmearth_ray.files import atomic_text, write_failure

FORM = 2
RUN = "run.json"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """`fixed`: settings that stay, as they are shown; `growing`: lists that may only gain items; `encoders`: {digest: spec}."""

    fixed: Mapping[str, Any]
    growing: Mapping[str, Sequence[Any]]
    encoders: Mapping[str, str]

    def keep(self, out: Path, about: Mapping[str, Any]) -> None:
        """Write what this comparison is, or compare it with what is there.

        Raises UsageError naming the first setting that differs, DataError if the folder cannot be read or written.
        """
        path = out / RUN
        before = _read(path)
        if before is not None:
            self._compare(before, out)
        body = {"form": FORM, "fixed": dict(self.fixed), "growing": {k: list(v) for k, v in self.growing.items()},
                "encoders": dict(self.encoders), **about}  # fmt: skip
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(write_failure(out, error)) from error
        atomic_text(path, json.dumps(body, indent=1) + "\n")

    def _compare(self, before: Mapping[str, Any], out: Path) -> None:
        again = "or name another folder as out=..."
        for name, value in self.fixed.items():
            if (was := before["fixed"].get(name)) != value:
                now = f"this command says {_shown(value)}"
                raise UsageError(f"{out} was computed with {name}={_shown(was)}, {now}; set it back, {again}")
        for name, values in self.growing.items():
            lost = [_shown(item) for item in before["growing"].get(name, []) if item not in values]
            if lost:
                raise UsageError(f"{out} holds {name} {', '.join(lost)}, which this command leaves out; name "
                                 f"them too (more may be added), {again}")  # fmt: skip
        for digest, spec in before["encoders"].items():
            if digest not in self.encoders:
                changed = spec in self.encoders.values()
                why = "whose weights or statistics are others now" if changed else "which this command leaves out"
                raise UsageError(
                    f"{out} was computed with encoder {spec}, {why}; name what was there (more may be added), {again}"
                )


def encoders_of(subjects: Sequence[Subject]) -> dict[str, str]:
    """{digest: spec} of encoders."""
    return {subject.digest: subject.spec for subject in subjects}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}); name another folder as out=...") from error
    whole = isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in ("fixed", "growing", "encoders"))
    if not whole or found.get("form") != FORM:
        raise DataError(f"{path} is of another form than this version writes ({FORM}); name another folder as out=...")
    return found


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
