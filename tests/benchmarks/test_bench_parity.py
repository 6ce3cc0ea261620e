"""Parity with the published code: its golden cases pass, other structures import, differences are noticed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_case import SMALL, STRUCTURES, make_case, write_case

from benchmarks.bench_parity import TOLERANCES, build_objective, compare, main, make_batch
from benchmarks.golden_case import load_case
from benchmarks.masked_dense import encode
from mmearth_ray.errors import DataError, run_command
from mmearth_ray.modalities import Level

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
needs_golden = pytest.mark.skipif(not CASES, reason=f"outputs of the published code are not at {GOLDEN}")


@needs_golden
@pytest.mark.parametrize("name", CASES)
def test_published_numbers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", str(GOLDEN / name)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["passed"]
    assert all(result[quantity] <= tolerance for quantity, tolerance in TOLERANCES.items())


@needs_golden
@pytest.mark.parametrize("name", CASES)
def test_a_case_is_rebuilt_as_its_makers_do(name: str) -> None:
    spec = importlib.util.spec_from_file_location("golden_rebuild", GOLDEN / "rebuild.py")
    assert spec is not None
    assert spec.loader is not None
    theirs: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    _, state, inputs, _ = theirs.load(name)
    case = load_case(GOLDEN / name)
    for ours, expected in ((case.state, state), (case.inputs, inputs)):
        assert list(ours) == list(expected)
        assert all(np.array_equal(ours[key].numpy(), value) for key, value in expected.items())


@pytest.mark.parametrize("name", STRUCTURES)
def test_other_structures_import_and_their_encoder_is_that_of_plain_convolutions(name: str) -> None:
    case = make_case(STRUCTURES[name])
    objective, description = build_objective(case, "packed")
    batch = make_batch(case, objective)
    assert [m.name for m in objective.targets] == case.meta["modalities"]
    assert description.stem == STRUCTURES[name].get("stem", "modified")
    seen = torch.from_numpy(1 - case.expected["mask"])
    parameters = dict(objective.model.encoder.named_parameters())
    dense = encode(parameters, batch["sentinel2"], seen, description.patch_size, tuple(SMALL["depths"]), batch_wide=True)
    case.expected["encoder"][:] = dense.detach().numpy()
    result = compare(case)
    assert result["encoder"] <= 4e-6
    assert all(result[quantity] > 1e-3 for quantity in ("predictions", "losses", "total"))  # what was made up is noticed
    assert not result["passed"]
    maps = [m for m in objective.targets if m.level is Level.PIXEL]
    assert {f"pixel_heads.{m.name}.weight" for m in maps} <= dict(objective.model.decoder.named_parameters()).keys()


def test_a_number_that_is_none_never_passes() -> None:
    case = make_case(STRUCTURES["one band"])
    case.expected["encoder"][:] = np.nan
    case.meta["grad_norm"]["mask_token"] = float("nan")
    result = compare(case)
    assert result["encoder"] > 1e300
    assert result["gradient_norms"] > 1e300
    json.dumps(result, allow_nan=False)


def test_differences_past_a_tolerance_exit_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case(STRUCTURES["one band"])
    write_case(tmp_path, case.meta, case.expected)
    assert main(["--case", str(tmp_path / "made.json")]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_cases_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--case", str(tmp_path / "none")]) == 1
    assert "the case" in capsys.readouterr().err
    case = make_case(STRUCTURES["one band"])
    meta = {k: v for k, v in case.meta.items() if k != "salt"}
    partial = write_case(tmp_path, meta, {k: v for k, v in case.expected.items() if k != "mask"})
    with pytest.raises(DataError, match=r"lacks salt, mask"):
        load_case(partial)
    (tmp_path / "made.json").write_text("[]")
    with pytest.raises(DataError, match="holds no settings"):
        load_case(partial)
    (tmp_path / "made.npz").write_bytes((tmp_path / "made.npz").read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read"):
        load_case(partial)
    case.expected["mask"][0, :] = 1
    with pytest.raises(DataError, match="hides different numbers of patches"):
        compare(case)
