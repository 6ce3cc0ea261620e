"""Who takes part: every structure has its baselines once, and names tell contenders apart."""

from pathlib import Path

import pytest
from tiny_encoder import tiny_encoder, tiny_statistics

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.compare.contenders import STATISTICS, Role, contenders_of, open_all
from mmearth_ray.evaluate.datasets.task import Goal
from mmearth_ray.evaluate.features.encoders import Subject, open_subject
from mmearth_ray.evaluate.protocols.names import USUAL


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return open_all(["random:atto/8/5", "random:atto/8/6", "random:atto/16"], ["one", "two", "coarse"])


def test_every_structure_has_its_baselines_once_and_bands_are_always_there(subjects: list[Subject]) -> None:
    found = contenders_of(subjects, USUAL, 2, "dataset")
    assert [(c.name, c.role, c.protocols) for c in found] == [
        ("one", Role.ENCODER, USUAL), ("two", Role.ENCODER, USUAL), ("coarse", Role.ENCODER, USUAL),
        ("random atto/8", Role.RANDOM, ("knn", "logistic", "probe")), ("supervised atto/8", Role.SUPERVISED, ("finetune",)),
        ("random atto/16", Role.RANDOM, ("knn", "logistic", "probe")), ("supervised atto/16", Role.SUPERVISED, ("finetune",)),
        (STATISTICS, Role.STATISTICS, ("knn", "logistic")),
    ]  # fmt: skip
    assert found[0].baseline == {"knn": "random atto/8", "logistic": "random atto/8", "probe": "random atto/8",
                                 "finetune": "supervised atto/8"}  # fmt: skip
    assert found[2].baseline["knn"] == "random atto/16"
    random = found[3]
    assert random.subject(0).digest != random.subject(1).digest
    assert random.subject(0).bands == subjects[0].bands
    assert len({c.subject(0).digest for c in found[:3]}) == 3


def test_baselines_are_there_whatever_the_protocols(subjects: list[Subject]) -> None:
    found = {c.name: c for c in contenders_of(subjects[:1], ["knn"], 1, "dataset")}
    assert found["supervised atto/8"].protocols == ("finetune",)
    assert found[STATISTICS].protocols == ("knn", "logistic")
    less = {c.name: c for c in contenders_of(subjects[:1], ["knn"], 1, "dataset", supervised=False)}
    assert "supervised atto/8" not in less
    tuned = {c.name: c for c in contenders_of(subjects[:1], ["finetune"], 1, "dataset", supervised=False)}
    assert "supervised atto/8" in tuned
    assert "random atto/8" not in tuned


def test_what_cannot_differ_is_computed_once(subjects: list[Subject]) -> None:
    found = {c.name: c for c in contenders_of(subjects[:1], USUAL, 3, "dataset")}
    one, random = found["one"], found["random atto/8"]
    assert list(one.seeds("knn", 1.0, 3, Goal.SINGLE)) == [0]
    assert list(one.seeds("knn", 0.5, 3, Goal.SINGLE)) == [0, 1, 2]
    assert list(one.seeds("probe", 1.0, 3, Goal.SINGLE)) == [0, 1, 2]
    assert list(one.seeds("knn", 1.0, 3, Goal.SEGMENTATION)) == [0, 1, 2]
    assert list(random.seeds("knn", 1.0, 3, Goal.SINGLE)) == [0, 1, 2]


def test_statistics_that_are_named_take_part_once_under_their_name() -> None:
    found = contenders_of(open_all(["statistics", "random:atto/8"], ["plain", "ours"]), ["knn"], 1, "dataset")
    assert [c.name for c in found if c.role is Role.STATISTICS] == ["plain"]
    named = contenders_of(open_all(["random:atto/8"], ["random atto/8"]), ["knn"], 1, "dataset")
    assert len({c.name for c in named}) == len(named)


@pytest.mark.parametrize(
    ("encoders", "names", "said"),
    [
        ([], [], "name at least one"),
        (["random:atto/8"], ["a", "b"], "1 encoders need as many names"),
        (["random:atto/8", "random:atto/8/1"], [], "are called 'random-atto-8'"),
        (["random:atto/8", "random:atto/8/0"], ["a", "b"], "are the same, weight by weight"),
    ],
)
def test_encoders_that_cannot_be_told_apart_are_refused(encoders: list[str], names: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_all(encoders, names)


def test_baselines_do_not_depend_on_the_order_of_the_encoders(tmp_path: Path) -> None:
    """Encoders that differ in statistics alone share theirs, so a comparison that gains an encoder computes none again."""
    bands = ("B2", "B3")
    folders = [
        tiny_encoder(tmp_path / str(n), bands, seed=n, statistics=tiny_statistics(bands) if n == 1 else None) for n in (1, 2)
    ]
    first, second = (open_subject(str(folder), f"e{n}") for n, folder in enumerate(folders))

    def baselines(subjects: list[Subject], normalisation: str) -> set[str]:
        found = contenders_of(subjects, ["knn"], 1, normalisation)
        return {c.subjects[0].digest for c in found if c.role is Role.RANDOM}

    assert baselines([first], "dataset") == baselines([second, first], "dataset")
    assert len(baselines([second, first], "pretraining")) == 2


def test_an_encoder_may_be_called_like_a_baseline() -> None:
    found = contenders_of([open_subject("random:atto/8", "band statistics")], ["knn"], 1, "dataset")
    assert len({contender.name for contender in found}) == len(found)
