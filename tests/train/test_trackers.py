"""Weights & Biases and TensorBoard hold what metrics.jsonl holds, every step once, and training never waits for them."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import metrics
from matplotlib.image import imsave
from processes import Quiet, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracked import entry, opened, write
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from mmearth_ray.train import trackers
from mmearth_ray.train.journal import METRICS
from mmearth_ray.train.trackers import Metrics, numbers, remember_run


@pytest.fixture(autouse=True)
def _own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the one who runs the tests has set for Weights & Biases does not count, nor how busy the machine is."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 300.0)
    monkeypatch.setattr(trackers, "INIT_SECONDS", 250.0)
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))


def records(path: Path) -> Iterator[Record]:
    """What a file of a run on Weights & Biases holds: a log in LevelDB's format behind seven bytes."""
    data, position, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<4xHB", data[position : position + 7])
        if position + 7 + length > len(data):
            return  # still being written
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def written(path: Path) -> list[Record]:
    """All records of a start that has ended: its own process writes the last of them a moment after it was told of the end."""
    deadline = time.monotonic() + 60
    while not (held := list(records(path))) or held[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)
    return held


def wandb_starts(run: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Of every start: the run's id, its configuration, and the lines."""
    found = []
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        held = written(path)
        (about,) = [r.run for r in held if r.WhichOneof("record_type") == "run"]
        lines = [
            {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
            for r in held
            if r.WhichOneof("record_type") == "history"
        ]
        found.append((about.run_id, {item.key: json.loads(item.value_json) for item in about.config.update}, lines))
    return found


def board(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_both_hold_the_numbers_the_configuration_and_the_figure(shards: Path, tmp_path: Path) -> None:
    arguments = ("log.wandb=offline", "log.tensorboard=true", "log.project=earth", "log.tags=[a,b]", "optimizer.lr=0.125")
    experiment = opened(shards, tmp_path / "run", *arguments)
    figure = tmp_path / "figure.png"
    imsave(figure, np.zeros((5, 9, 3)))
    remember_run(experiment)
    with Metrics(experiment, 0, Quiet().warn) as lines:
        for step in (1, 2, 3):
            lines.write(entry(step))
        lines.figure(figure, 3)

    ((name, config, lines),) = wandb_starts(experiment.run)
    assert name == json.loads((experiment.run / "wandb.json").read_text())["id"]
    assert (config["optimizer"]["lr"], config["train"]["steps"]) == (0.125, 4)
    assert [line["_step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert (line["loss"], line["losses/a"], line["seconds/rest"]) == (line["_step"] + 0.25, line["_step"] * 2.0, 0.5)
        assert "losses/b" not in line
    assert [lines[-1][f"reconstruction.{part}"] for part in ("width", "height")] == [9, 5]
    drawn = next((experiment.run / "wandb").glob("offline-run-*/files")) / lines[-1]["reconstruction.path"]
    assert drawn.read_bytes() == figure.read_bytes()

    shown = board(experiment.run)
    assert [(e.step, e.value) for e in shown.Scalars("losses/a")] == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 1.25), (2, 2.25), (3, 3.25)]
    assert set(shown.Tags()["scalars"]) == {"loss", "losses/a", "seconds/rest", "start"}
    (image,) = shown.Images("reconstruction")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (3, 9, 5, figure.read_bytes())
    (text,) = shown.Tensors("config/text_summary")
    assert b"lr: 0.125" in text.tensor_proto.string_val[0]


def test_a_resumed_run_keeps_its_id_and_every_step_is_held_once_in_order(shards: Path, tmp_path: Path) -> None:
    experiment = opened(shards, tmp_path / "run", "log.wandb=offline", "log.tensorboard=true")
    write(experiment, 0, range(1, 7), start=1)  # lost after step 6, the last checkpoint is of step 3
    write(experiment, 3, range(4, 6), start=2)  # lost again before it comes that far
    write(experiment, 3, range(4, 9), start=3)

    starts = wandb_starts(experiment.run)
    assert len({name for name, _, _ in starts}) == 1
    assert [[line["_step"] for line in lines] for _, _, lines in starts] == [[1, 2, 3, 4, 5, 6], [], [7, 8]]
    shown = board(experiment.run)
    assert [(e.step, e.value) for e in shown.Scalars("start")] == [(s, 1.0 if s <= 3 else 3.0) for s in range(1, 9)]
    assert [json.loads(line)["step"] for line in (experiment.run / METRICS).read_text().splitlines()] == list(range(1, 9))


def test_a_tracker_that_is_asked_for_later_gets_the_steps_before(shards: Path, tmp_path: Path) -> None:
    write(opened(shards, tmp_path / "run"), 0, range(1, 6))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {METRICS}
    experiment = opened(shards, tmp_path / "run", "log.wandb=offline", "log.tensorboard=true")
    write(experiment, 3, range(4, 5), start=2)
    ((_, _, lines),) = wandb_starts(experiment.run)
    assert [(line["_step"], line["start"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert [(e.step, e.value) for e in board(experiment.run).Scalars("start")] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_online_the_service_says_which_steps_it_has(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = opened(shards, tmp_path / "run", "log.wandb=online", "log.entity=me", "log.group=g")
    asked, sent = [], []

    class Run:
        def __init__(self, step: int) -> None:
            self.step = step

        def log(self, values: dict[str, float], step: int) -> None:
            sent.append(step)

        def finish(self, exit_code: int) -> None:
            sent.append(("exit", exit_code))

    def init(**arguments: Any) -> Run:
        asked.append(arguments)
        return Run(0 if len(asked) == 1 else 5)  # it never got steps 5 and 6

    import wandb

    monkeypatch.setattr(wandb, "init", init)
    write(experiment, 0, range(1, 7))
    write(experiment, 6, range(7, 8))
    assert sent == [1, 2, 3, 4, 5, 6, ("exit", 0), 5, 6, 7, ("exit", 0)]
    assert {(a["id"], a["mode"], a["resume"], a["entity"], a["group"]) for a in asked} == {
        (json.loads((experiment.run / "wandb.json").read_text())["id"], "online", "allow", "me", "g")
    }


def test_tensorboard_left_out_for_a_while_holds_every_step_in_the_end(shards: Path, tmp_path: Path) -> None:
    with_it, without = (opened(shards, tmp_path / "run", f"log.tensorboard={on}") for on in ("true", "false"))
    write(with_it, 0, range(1, 7), start=1)
    write(with_it, 3, range(4, 6), start=2)  # what it held of step 6 is taken back
    write(without, 3, range(4, 9), start=3)
    write(with_it, 8, range(9, 11), start=4)
    shown = [(e.step, e.value) for e in board(with_it.run).Scalars("loss")]
    assert shown == [(step, step + 0.25) for step in range(1, 11)]


def test_numbers_have_names_with_slashes_and_null_has_none() -> None:
    line = {"step": 3, "loss": 1.5, "losses": {"a": None, "b": 2.0}, "validation": {"step": 1, "losses": {"b": 4.0}}}
    assert dict(numbers(line)) == {"loss": 1.5, "losses/b": 2.0, "validation/step": 1, "validation/losses/b": 4.0}


@pytest.mark.drill
@pytest.mark.long
def test_a_run_of_two_workers_is_fed_by_one_of_them_and_goes_on_where_it_was(shards: Path, tmp_path: Path) -> None:
    recipe = ("log.wandb=offline", "log.tensorboard=true", "train.workers=2", "figure.tiles=1", "checkpoint.every=2")
    train(shards, tmp_path, *recipe, "train.steps=5", "train.stop_at=3")
    train(shards, tmp_path, *recipe, "train.steps=5")
    held = metrics(tmp_path)
    starts = wandb_starts(tmp_path)
    assert len({name for name, _, _ in starts}) == 1
    assert [[line["_step"] for line in lines] for _, _, lines in starts] == [[1, 2, 3], [4, 5]]
    for line, sent in zip(held, [line for _, _, lines in starts for line in lines], strict=True):
        values = dict(numbers(line))
        assert "seconds/backward" in values
        assert {name: sent[name] for name in values} == pytest.approx(values)
    assert [lines[-1]["reconstruction._type"] for _, _, lines in starts] == ["image-file"] * 2
    shown = board(tmp_path)
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in held
    ]
    assert [image.step for image in shown.Images("reconstruction")] == [3, 5]
