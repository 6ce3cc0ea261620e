"""docs/fidelity.md says nothing that is not there: rows, tests, switches, configurations and commands exist."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.bench_parity import TOLERANCES
from mmearth_ray.config import load
from mmearth_ray.keys import Config
from mmearth_ray.settings import flatten

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))
TESTS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))
SWITCHES = sorted(set(re.findall(r"`((?:\w+\.)+\w+=[^`]+)`", PAGE)))


def rows(section: str) -> list[list[str]]:
    """Cells of the rows of a section's table, without its head."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_all_22_rows_are_there_in_order_each_with_a_test() -> None:
    table = rows("The 22 quirks and bugs")
    assert [row[0] for row in table] == [str(number) for number in range(1, 23)]
    for row in table:
        assert len(row) == 4, row[0]
        assert all(row), row[0]
        assert "::test_" in row[3], row[0]


def test_every_difference_has_a_reason_a_test_and_a_switch_or_a_reason_for_none() -> None:
    table = rows("What differs on purpose")
    assert len(table) >= 15
    for published, here, why, switch, test in table:
        assert published
        assert here
        assert why
        assert re.fullmatch(r"`[\w.]+=\w+`|none: .+", switch), switch
        assert "::test_" in test, published
    assert all("::test_" in row[1] for row in rows("What is kept on purpose"))


@pytest.mark.parametrize(("file", "function"), TESTS)
def test_every_test_that_is_named_exists(file: str, function: str) -> None:
    assert function.startswith("test_")
    assert function in functions(file)


def test_every_mention_of_a_test_is_checked() -> None:
    assert PAGE.count("::") == len(re.findall(r"`[\w/]+\.py::\w+`", PAGE))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_is_a_setting_and_changes_it(switch: str) -> None:
    name, _, _ = switch.partition("=")
    ours = flatten(Config())
    assert name in ours
    assert flatten(load([switch]))[name] != ours[name]


def test_every_switch_of_the_published_mode_is_explained() -> None:
    ours, theirs = flatten(Config()), flatten(load([str(ROOT / "configs" / "published.yaml")]))
    changed = {f"{name}={value}" for name, value in theirs.items() if value != ours[name]}
    assert changed
    assert changed <= set(SWITCHES)


def test_settings_files_folders_and_commands_exist() -> None:
    names = set(re.findall(r"`((?:data|model|optimizer|schedule|train|validate)\.\w+)", PAGE))
    assert names <= flatten(Config()).keys()
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for module in re.findall(r"`python -m ([\w.]+)", PAGE):
        assert find_spec(module), module


def test_the_tolerances_of_parity_are_those_of_the_benchmark() -> None:
    parity = SECTIONS["Parity, and how it is checked"]
    assert all(f" {value:.0e}".replace("e-0", "e-") + " for" in parity for value in TOLERANCES.values())


@pytest.mark.parametrize("name", ["mmearth64_atto", "mmearth128_atto", "embedded"])
def test_the_published_mode_follows_any_other_configuration(name: str) -> None:
    config = load([str(ROOT / "configs" / f"{name}.yaml"), str(ROOT / "configs" / "published.yaml")])
    assert (config.model.grn, config.train.averaging) == ("batch", "local")
