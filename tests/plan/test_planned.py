"""The plan's command: the words of a run in; engines and micro-batches that fit, and what pretrain understands, out."""

import re
import shlex
from pathlib import Path

import pytest

from mmearth_ray.config import load, load_as, steps_of
from mmearth_ray.errors import UsageError
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.plan.__main__ import main
from mmearth_ray.plan.fit import of
from mmearth_ray.plan.passes import follow
from mmearth_ray.plan.planned import Options, plan
from mmearth_ray.plan.report import report
from mmearth_ray.stream.plan import MicroBatches

SHAPE = ["model.image_size=16", "model.patch_size=8", "train.global_batch=4096", "train.workers=8"]


def options(*words: str) -> Options:
    return load_as(Options, [*SHAPE, *words])


def test_the_plan_covers_the_global_batch_and_the_tiles() -> None:
    planned = plan(options("train.global_batch=480", "train.workers=6", "plan.memory_gb=0.5"), "atto")
    fit = planned.chosen
    assert fit is not None
    assert fit.micro_batch * fit.micro_batches * 6 == 480
    assert fit.memory.total <= 0.45e9
    batches = MicroBatches(1, 1, global_batch=480, workers=6, rank=0, micro_batch=fit.micro_batch)
    assert batches.per_step == fit.micro_batches
    assert steps_of(options("train.epochs=200").train, 1_200_000) == 58_594
    assert steps_of(options("train.epochs=0.5", "train.global_batch=64").train, 100) == 1


def test_the_simplest_engine_that_fits_is_chosen() -> None:
    names = "plan.engines=[zero3,zero1,ddp]"
    roomy = plan(options(names), "atto")
    assert list(roomy.fits) == ["ddp", "zero1", "zero3"]
    assert roomy.chosen == roomy.fits["ddp"]
    passes = follow(options())
    needs = {name: of(name, passes, 1, 512, 8).memory.total for name in ("zero1", "ddp")}
    assert needs["zero1"] < needs["ddp"]
    between = (needs["zero1"] + needs["ddp"]) / 2
    tight = plan(options(names, f"plan.memory_gb={between / 1e9}", "plan.spare=0"), "atto").chosen
    assert tight is not None
    assert tight.engine == "zero1"


def test_an_engine_that_a_run_names_is_the_one_that_is_planned() -> None:
    assert list(plan(options("train.engine=zero2"), "atto").fits) == ["zero2"]
    assert list(plan(options("train.engine=zero2", "plan.engines=[zero2,zero3]"), "atto").fits) == ["zero2", "zero3"]
    assert list(plan(options("train.compile=true"), "atto").fits) == ["ddp"]


def test_what_is_offloaded_leaves_room_on_the_gpu() -> None:
    words = ["train.engine=zero3", "train.workers=2", "train.micro_batch=64", "plan.spare=0"]
    memory = plan(options(*words), "atto").fits["zero3"].memory
    between = memory.total - memory.optimizer / 2
    words.append(f"plan.memory_gb={between / 1e9}")
    assert plan(options(*words), "atto").chosen is None
    asked = options(*words, "train.offload=true")
    found = plan(asked, "atto")
    assert found.fits["zero3"].memory == memory
    said = report(asked, [found], [])
    assert "on the host" in said[8]
    assert said[9].split()[-2:] == [f"{size / 1e9:.2f}" for size in (memory.total - memory.optimizer, memory.optimizer)]


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["model.size=pico"], ["pico"]),
        (["plan.sizes=huge"], ["huge"]),
        (["plan.sizes=[base,tiny,base]"], ["base", "tiny"]),
        (["plan.sizes=all"], list(SIZES)),
    ],
)
def test_the_sizes_that_are_planned(words: list[str], sizes: list[str]) -> None:
    assert options(*words).sizes == sizes


def test_the_command_prints_a_plan_that_pretrain_understands(capsys: pytest.CaptureFixture[str]) -> None:
    length = ["plan.tiles=1000", "train.epochs=3", "train.global_batch=64", "train.workers=2", "log.peak_tflops=10"]
    assert main([*SHAPE[:2], "plan.sizes=[femto]", *length, "data.where=split == 'train'"]) == 0
    said = capsys.readouterr().out
    assert "47 steps of 64 tiles, 3.01 epochs of 1,000 tiles" in said
    assert len(re.findall(r"^femto +(?:ddp|zero[123]) ", said, re.MULTILINE)) == 4
    command = next(line for line in said.splitlines() if line.startswith("python -m mmearth_ray.pretrain "))
    config = load(shlex.split(command)[3:])
    assert (config.train.workers, config.train.micro_batch, config.train.engine) == ([2], 32, "ddp")
    assert (config.model.size, config.model.image_size, config.train.epochs) == ("femto", 16, 3)
    assert config.data.where == "split == 'train'"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_planned_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "plan.engines=ddp"]) == 0
    said, config = capsys.readouterr().out, load([str(path)])
    assert f"steps of {config.train.global_batch:,} tiles" in said
    assert f"python -m mmearth_ray.pretrain {path} model.size={config.model.size} train.engine=ddp" in said


def test_a_file_whose_name_begins_like_a_key_stays_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text("train: {steps: 7}\nmodel: {patch_size: 5}\n")
    assert main(["plan.yaml", *SHAPE[:2], "plan.engines=[ddp]"]) == 0  # the file alone does not fit together
    assert "python -m mmearth_ray.pretrain plan.yaml model.image_size" in capsys.readouterr().out
    Path("plan.yaml").write_text("plan: {tiles: 7}\n")
    with pytest.raises(UsageError, match=r"^plan\.yaml: there is no key 'plan'"):
        main(["plan.yaml", *SHAPE[:2]])


def test_a_gpu_whose_peak_is_not_known_gets_no_time() -> None:
    asked = options("plan.gpu=a new one")
    assert any("give log.peak_tflops=" in line for line in report(asked, [plan(asked, "atto")], []))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan.sizes=[giant]"], "must be one of atto"),
        (["model.patch_size=16", "model.image_size=50"], "model.patch_size=16 does not divide model.image_size=50; use 48 px"),
        (["train.global_batch=100", "train.workers=8"], "train.global_batch=100 is not divisible by train.workers=8"),
        (["train.micro_batch=3"], "train.micro_batch=3 does not divide"),
        (["plan.engines=[zero1]", "model.image_sizes=[56,112]"], "plan.engines=['zero1']: model.image_sizes is for ddp alone"),
        (["plan.engines=[zero1]", "train.engine=zero2", "train.offload=true"], "train.offload=true is for zero2 and zero3"),
        (["model.image_sizes=[100]"], "model.image_sizes=[100]: must be model.image_size=56 and others"),
        ([*SHAPE, "plan.memory_gb=0.01"], "nothing fits: atto with zero3 needs 0.1 GB for micro-batches of 1, and a GPU has "
         "room for 0.0 GB; give more plan.memory_gb, more train.workers, train.activation_checkpointing=true, "),
        (["train.workers=0"], "train.workers=[0]: must be at least 1"),
        (["size=atto"], "there is no key 'size'; did you mean model.size?"),
        (["memory_gb=40"], "there is no key 'memory_gb'; did you mean plan.memory_gb?"),
    ],
)  # fmt: skip
def test_bad_values_are_answered_in_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        main(arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_holds_only_what_pretrain_takes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("plan:\n  memory_gb: 40\n")
    with pytest.raises(UsageError, match=r"there is no key 'plan'.*; pretrain has to take the same files, so give plan\.\* as"):
        main([str(tmp_path / "a.yaml")])
