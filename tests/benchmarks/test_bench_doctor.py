"""What the doctor prints is what is kept."""

from pathlib import Path

from benchmarks.bench_doctor import findings
from mmearth_ray.doctor.findings import Finding


def test_every_line_of_a_check_is_a_row() -> None:
    found = [
        Finding("ok", "machines", "2 cores"),
        Finding("warning", "a subject of 19", "wide"),
        Finding("failed", "disk", f"1 GB free at {Path.cwd()}/runs, 2 GB are wanted"),
    ]
    said = "\n".join([*map(str, found), "1 failed, 1 warning, 1 ok"])
    rows = [tuple(row.values()) for row in findings(said)]
    assert rows == [*map(tuple, found[:2]), ("failed", "disk", "1 GB free at runs, 2 GB are wanted")]
