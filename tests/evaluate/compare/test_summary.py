"""What points say together: means over seeds, pairs on the same images, failures counted; table, figures and notes of it."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_points import contender, outcome, planned, result

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.compare import tables
from mmearth_ray.evaluate.compare.contenders import Role
from mmearth_ray.evaluate.compare.panels import curves, sizes
from mmearth_ray.evaluate.compare.planning import Planned
from mmearth_ray.evaluate.compare.points import Point, Result
from mmearth_ray.evaluate.compare.rows import COLUMNS, partition, to_csv
from mmearth_ray.evaluate.compare.summary import Summary, rivals, summarise
from mmearth_ray.evaluate.compare.telling import absences, unfinished
from mmearth_ray.evaluate.datasets.task import Goal, TaskInfo
from mmearth_ray.evaluate.protocols.metrics import Outcome

OURS = contender("ours", Role.ENCODER, ("knn", "logistic"), knn="random", logistic="random", finetune="supervised")
OTHER = contender("other", Role.ENCODER, ("knn",), knn="random")
RANDOM = contender("random", Role.RANDOM, ("knn", "logistic"))
SUPERVISED = contender("supervised", Role.SUPERVISED, ("finetune",))
PLAIN = contender("bands", Role.STATISTICS, ("knn", "logistic"))
INFO = TaskInfo(name="tiny", goal=Goal.SINGLE, classes=("a", "b", "c"), bands=("B3", "B4", "B8"), product="l2a", dtype="uint16",
                height=16, width=16, mean=(1.0,) * 3, std=(1.0,) * 3, digest="d" * 64)  # fmt: skip

RIGHT = {
    **{(OURS.name, "knn", 0.1, seed): 20 + seed for seed in range(3)}, (OURS.name, "knn", 1.0, 0): 35,
    **{(RANDOM.name, "knn", 0.1, seed): 15 + seed for seed in range(3)},
    **{(RANDOM.name, "knn", 1.0, seed): 30 for seed in range(3)},
    **{(SUPERVISED.name, "finetune", 0.1, seed): 10 for seed in range(3)},
    **{(PLAIN.name, "logistic", 0.1, seed): 21 + seed for seed in range(3)},
    (OTHER.name, "knn", 1.0, 0): 25,
}  # fmt: skip
"""Of 40 test images, how many are right; seed 1 of "other" and all of ours under logistic regression failed."""

PLANNED = [
    *(planned(c, p, f, seed) for c, p, f, seeds in [
        (OURS, "knn", 0.1, 3), (OURS, "knn", 1.0, 1), (OTHER, "knn", 0.1, 2), (OTHER, "knn", 1.0, 1), (RANDOM, "knn", 0.1, 3),
        (RANDOM, "knn", 1.0, 3), (PLAIN, "logistic", 0.1, 3), (OURS, "logistic", 0.1, 1), (SUPERVISED, "finetune", 0.1, 3),
    ] for seed in range(seeds)),
]  # fmt: skip


def right(point: Point) -> int | None:
    return RIGHT.get((point.label, point.protocol, point.fraction, point.seed))


def read(point: Point) -> Result | None:
    found = right(point)
    absent = ("c",) if point.fraction < 1 else ()
    return None if found is None else result(outcome(found), n_train=round(120 * point.fraction), absent=absent)


def outcome_of(point: Point) -> Outcome:
    found = right(point)
    assert found is not None
    return outcome(found)


def failure_of(point: Point) -> str:
    return "features are not finite" if point.label == "ours" else ""


def summary_of(entries: Sequence[Planned] = tuple(PLANNED)) -> Summary:
    return summarise(entries, Goal.SINGLE, 200, read, outcome_of, failure_of)


def test_cells_are_means_over_seeds_and_failures_are_counted() -> None:
    found = summary_of()
    cell = found.cell("ours", "knn", 0.1)
    assert cell is not None
    assert cell.estimate is not None
    assert (cell.estimate.mean, cell.estimate.seeds, cell.train) == (pytest.approx(21 / 40), 3, 12)
    lost = found.cell("other", "knn", 0.1)
    assert lost is not None
    assert (lost.estimate, lost.failures) == (None, {0: "not computed", 1: "not computed"})
    failed = found.cell("ours", "logistic", 0.1)
    assert failed is not None
    assert failed.failures == {0: "features are not finite"}


def test_encoders_are_compared_with_their_baseline_the_rest_and_the_first() -> None:
    everybody = [OURS, OTHER, RANDOM, SUPERVISED, PLAIN]
    assert rivals(OURS, "knn", everybody) == [("random", "knn"), ("supervised", "finetune"), ("bands", "knn")]
    assert rivals(OTHER, "knn", everybody) == [("random", "knn"), ("bands", "knn"), ("ours", "knn")]
    found = {(d.name, d.other, d.fraction): d.estimate for d in summary_of().differences}
    assert found["ours", "random", 0.1].mean == pytest.approx(5 / 40)
    assert found["ours", "random", 1.0].seeds == 3
    assert found["ours", "supervised", 0.1].mean == pytest.approx(11 / 40)
    assert found["other", "ours", 1.0].mean == pytest.approx(-10 / 40)
    assert ("other", "ours", 0.1) not in found


def test_points_of_other_test_images_are_not_mixed() -> None:
    odd = lambda point: outcome(5, images=41 if point.seed else 40)  # noqa: E731
    with pytest.raises(DataError, match="tested on other images"):
        summarise(PLANNED[:3], Goal.SINGLE, 50, read, odd, failure_of)


def test_figures_show_every_contender_with_intervals_and_named_axes() -> None:
    knn, logistic = curves(summary_of(), "accuracy")
    assert [line.label for line in knn.lines] == ["ours", "other", "random", "supervised"]
    assert [line.baseline for line in knn.lines] == [False, False, True, True]
    assert knn.ticks == {12: "12\n10 %", 120: "120\n100 %"}
    assert all(mark.low is not None and mark.low <= mark.y for line in knn.lines for mark in line.marks)
    assert {line.label for line in logistic.lines} == {"supervised", "bands"}
    parameters, seconds = sizes(summary_of(), "accuracy")[:2]
    assert "parameters" in parameters.x_label
    assert seconds.x_label.startswith("CPU-seconds")
    assert parameters.lines[0].marks[0].x == pytest.approx(3.4)


def test_tables_and_sentences_name_failures_and_differences() -> None:
    found = summary_of()
    scores = tables.score_table(found)
    assert scores.head == ["encoder", "protocol", "10 %, 12 images", "100 %, 120 images"]
    shown = {(cells[0], cells[1]): (cells[2:], failure) for cells, failure in scores.rows}
    assert shown["ours", "logistic regression"] == ([], "features are not finite")
    assert shown["other", "k nearest neighbours"][0][0] == "2 failed"
    assert shown["ours", "k nearest neighbours"][0][0].startswith("0.525 [")
    assert shown["ours", "k nearest neighbours"][0][0].endswith("n = 3")
    pairs = {(cells[0], cells[1]): cells[3:] for cells, _ in tables.difference_table(found).rows}
    assert pairs["ours", "less random"][0].startswith("+0.125 [")
    assert pairs["ours", "less supervised, fine-tuning"][0].endswith("*")
    assert "features are not finite (1: ours, logistic regression, 10 %, seed 0)" in tables.failures(found)
    assert tables.findings(found)[0].startswith("K nearest neighbours, 10 % of labels: ours 0.525 [")
    assert "above random" in tables.findings(found)[0]
    assert absences(found)[0].startswith("With 10 % of the labels, in at least one subset no image has a label of: c.")


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"recipe": "converged", "best_step": 40, "steps": 100}, ""),
        ({"recipe": "converged", "best_step": 100, "steps": 100}, "1 of 1 points were best on validation at the last step"),
        ({"recipe": "converged", "best_step": [40, 100], "steps": 100}, "1 of 1 points were best"),
        ({"recipe": "converged", "best_step": [40, 100], "steps": [100, 120]}, ""),
        ({"recipe": "converged", "best_step": 120, "steps": [500, 120]}, "1 of 1 points were best"),
        ({"recipe": "published", "best_step": 100, "steps": 100}, ""),
        ({"best_c": 1.0, "converged": True}, ""),
        ({"best_c": 1.0, "converged": [True, False]}, "1 of 1 points have a fit that ended before it converged"),
        ({"best_c": 1.0, "converged": [True, None]}, ""),
        ({"k": 5}, ""),
    ],
)
def test_trainings_that_might_gain_by_more_steps_are_told(chosen: dict[str, object], said: str) -> None:
    told = lambda point: replace(result(outcome(5)), chosen=chosen)  # noqa: E731
    found = unfinished(summarise(PLANNED[:1], Goal.SINGLE, 50, told, lambda point: outcome(5), failure_of))
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_the_csv_has_torchgeo_benchs_columns_and_a_row_for_every_metric(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(PLANNED, INFO, read, failure_of))))
    assert list(rows[0]) == list(COLUMNS)
    assert ",".join(COLUMNS).startswith(
        "dataset,method,metric_name,metric_value,ci_lower,ci_upper,feature_dim,best_c,best_lr,best_batch_size,n_train,n_val,n_test,"
        "seed,model,name,normalization,image_size,interpolation,partition,bands,c_range_start,c_range_stop,c_range_num,merge_val,"
        "bootstrap,"
    )
    first = rows[0]
    known = {"dataset": "tiny", "method": "knn5", "metric_name": "accuracy", "metric_value": "0.5", "ci_lower": "0.1",
             "n_train": "12", "n_val": "6", "n_test": "40", "seed": "0", "name": "ours", "model": "runs/ours", "partition":
             "own 0.1 of default", "bands": "B4,B3", "absent_classes": "c", "failure": ""}  # fmt: skip
    assert {name: first[name] for name in known} == known
    assert (rows[1]["metric_name"], rows[1]["ci_lower"]) == ("macro_f1", "")
    failed = [row for row in rows if row["failure"]]
    assert [(row["name"], row["method"], row["metric_value"]) for row in failed] == [
        ("other", "knn5", ""), ("other", "knn5", ""), ("ours", "linear", ""),
    ]  # fmt: skip
    linear = next(row for row in rows if row["method"] == "linear" and row["name"] == "bands")
    assert (linear["c_range_start"], linear["c_range_stop"]) == ("-4", "4")


def test_values_that_are_undefined_or_differ_between_folds_are_told_apart() -> None:
    odd = lambda point: replace(result(outcome(5)), metrics={"accuracy": None}, low=None, chosen={"best_c": [0.1, 10.0]})  # noqa: E731
    row = next(csv.DictReader(io.StringIO(to_csv(PLANNED[:1], INFO, odd, failure_of))))
    assert (row["metric_value"], row["ci_lower"], row["best_c"]) == ("", "", "0.1;10.0")


def test_only_a_partition_of_geo_bench_has_its_name() -> None:
    part = replace(INFO, origin={"kind": "geobench", "partition": "0.05x_train"})
    assert [partition(f, INFO) for f in (0.01, 0.005, 1.0)] == ["own 0.01 of default", "own 0.005 of default", "default"]
    assert [partition(f, part) for f in (0.1, 1.0)] == ["own 0.1 of 0.05x_train", "0.05x_train"]
