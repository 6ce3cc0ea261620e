"""Records: what they name, tables with empty cells, JSON and Markdown side by side."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import record
from benchmarks.record import circumstances, hardware, table, write

CPUINFO = """processor\t: 0
model name\t: A Processor, 2 GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile

processor\t: 1
model name\t: A Processor, 2 GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile
"""


def test_circumstances_name_command_hardware_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "size=atto"])
    about = circumstances("benchmarks.bench_step")
    assert about["command"] == "python -m benchmarks.bench_step size=atto"
    assert about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert list(about)[:4] == ["date", "command", "commit", "device"]
    assert all(about[name] not in ("", None) for name in about)
    assert "numpy" in about


def test_versions_are_of_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "triton", "MinkowskiEngine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert not {"ray", "triton", "MinkowskiEngine"} & circumstances("x").keys()
    monkeypatch.setitem(sys.modules, "ray", torch)  # any module: the version is that of the distribution
    assert circumstances("x")["ray"].count(".") >= 1


def test_a_processor_is_told_by_name_and_by_what_matters_to_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    known = record._processor(tmp_path / "cpuinfo")
    assert known == {"device": "A Processor, 2 GHz", "instructions": "avx2 avx512f avx512_bf16 amx_bf16"}
    assert record._processor(tmp_path / "nowhere")["instructions"] == "none of note"


def test_a_gpu_is_told_by_name_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(record, "_output", lambda *command: "999.1\n999.1" if command[0] == "nvidia-smi" else "abc")
    about = circumstances("x")
    assert (about["device"], about["driver"], about["commit"]) == ("A GPU", "999.1", "abc")
    assert "processor" in about
    assert hardware() == "gpu"


def test_a_table_leaves_cells_empty_that_a_row_lacks() -> None:
    assert table([{"a": 1, "b": 0.123456}, {"a": "x", "b": None}, {"c": True}]) == [
        "| a | b | c |", "|---|---|---|", "| 1 | 0.1235 |  |", "| x |  |  |", "|  |  | True |",
    ]  # fmt: skip


def test_a_result_is_written_twice_with_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    about, rows = {"date": "2026-01-02", "device": "a processor"}, [{"size": "atto", "tiles/s": 1.5}]
    path = write("step", about, rows, {"parts": [{"stem": 2.0}], "nothing": []})
    assert path == tmp_path / "results" / f"step_{hardware()}_2026-01-02.md"
    content = json.loads(path.with_suffix(".json").read_text())
    assert content == {"about": about, "rows": rows, "tables": {"parts": [{"stem": 2.0}]}}
    text = path.read_text()
    assert text.startswith("# step\n\n- date: 2026-01-02\n- device: a processor\n\n| size | tiles/s |\n")
    assert text.endswith("\n## parts\n\n| stem |\n|---|\n| 2 |\n")
    assert sorted(p.name for p in path.parent.iterdir()) == [path.with_suffix(".json").name, path.name]
