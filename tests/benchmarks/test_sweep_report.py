"""The report of a sweep: it holds every point, needs nothing beside itself, and is made from the points' files alone."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_sweep import ABOUT, NUMBERS, POINTS, Runner, make_record

from benchmarks.sweep import BATCHES, complete, main
from benchmarks.sweep_figures import draw, series
from benchmarks.sweep_report import write_report
from benchmarks.sweep_store import Store, read, read_all
from mmearth_ray.errors import DataError, run_command


def test_the_report_holds_every_point_and_needs_nothing_beside_itself(tmp_path: Path) -> None:
    store, odd = Store(tmp_path, ABOUT), ABOUT | {"command": 'python -m benchmarks.sweep <script>alert("x")</script> & more'}
    complete(POINTS, store, odd, Runner(failing=["pico"]))
    assert run_command(main, ["report_only=true", f"directory={tmp_path}"]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; more" in html
    assert "failed: its process &lt;died&gt; | twice" in html
    assert all(f"<td>{point.size}</td>" in html for point in POINTS)
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert html.count("data:image/png;base64,") == len(draw(read_all(tmp_path))) == 4
    results = json.loads((tmp_path / "results.json").read_text())
    assert [entry["point"]["size"] for entry in results] == ["atto", "femto", "pico"]
    assert results[0]["result"] == asdict(NUMBERS)
    table = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert (tmp_path / "rate.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no points"):
        write_report(tmp_path, read_all(tmp_path))
    assert run_command(main, ["report_only=true", f"directory={tmp_path / 'none'}"]) == 1


def test_of_a_point_measured_twice_on_a_machine_the_newest_counts(tmp_path: Path) -> None:
    records = [
        make_record(2, tiles_per_second=9.0, torch="2"),
        make_record(1, tiles_per_second=7.0, torch="1"),
        make_record(1, cores=1000, tiles_per_second=0.1),
        make_record(1, size="huge"),
    ]
    for number, record in enumerate(records):
        (tmp_path / "points").mkdir(exist_ok=True)
        (tmp_path / "points" / f"{number}.json").write_text(json.dumps(asdict(record)))
        assert read(tmp_path / "points" / f"{number}.json") == record
    found = {(r.machine, r.point.size): r.result.tiles_per_second for r in read_all(tmp_path) if r.result}
    assert sorted(found.values()) == [0.1, 8.0, 9.0]
    write_report(tmp_path, read_all(tmp_path))
    assert "| machine |" in (tmp_path / "table.md").read_text()


def test_lines_of_the_figures_are_named_by_what_differs() -> None:
    by_size = [make_record(size=size, batch=batch) for size, batch in BATCHES.items()]
    assert {label: len(records) for label, records in series(by_size).items()} == {"": 8}
    bf16 = [make_record(precision="bf16"), make_record(precision="fp32", image=56)]
    assert list(series(bf16)) == ["16/8, bf16", "56/8, fp32"]
    assert list(series([make_record(batch=1), make_record(batch=2)])) == ["batch 1", "batch 2"]
    assert "ratio.png" not in draw([make_record(plain_ratio=None)])
