"""Everything that may happen to a run, one thing after the other, on a cluster of several nodes: the numbers stay the same."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command import SMALL, kill, ledger, losses, metrics, pretrain, pretraining, wait_for
from nodes import Nodes
from tiny_earth import make_data_set

from mmearth_ray.errors import DataError
from mmearth_ray.train.checkpoint import FOLDER, INCOMING, committed, load_state, opened, step_of

pytestmark = [pytest.mark.drill, pytest.mark.long]

KILLS = (
    ("worker",) * 8 + ("command",) * 4
    + ("worker while saving",) * 2 + ("command while saving",) * 2 + ("worker after saving",) * 4
)  # fmt: skip
BESIDE = ("stop", "terminate", "lose a node", "add a node")
APART = 4
"""Steps between two events at least; as checkpoints are twice as close, each finds a new one to go on from."""

STEPS = APART * (len(KILLS) + len(BESIDE) + 2)
RUN = (*SMALL, f"train.steps={STEPS}", "train.ledger=true", "checkpoint.every=2", "validate.tiles=0", "model.targets=[aster]")
ELASTIC = ("train.workers=[1,2]", "train.wait=120", "train.hang_timeout=20")


@dataclass
class Drill:
    """A run on a cluster, with the command in charge of it: the same one again after each that was ended."""

    nodes: Nodes
    run: Path
    command: tuple[str, ...]
    draw: random.Random
    held: ExitStack = field(default_factory=ExitStack)
    second: int = -1
    candidates: list[int] = field(default_factory=list)
    killed: int = 0
    interrupted: int = 0

    def begin(self) -> None:
        self.held.close()
        self.process = self.held.enter_context(pretraining(*self.command))

    def wait(self, condition: Callable[[], object], what: str) -> None:
        wait_for(condition, what, self.process, seconds=400)

    def disturb(self, event: str) -> None:
        """Let that happen now, or as soon as a checkpoint is at the point that it names."""
        self.candidates = self.nodes.workers()
        if event.endswith("while saving"):
            self._at_once(self.saving)
        elif event.endswith("after saving"):
            before = self.newest()
            self._at_once(lambda: self.newest() > before)
        {"worker": self._kill_worker, "command": self._kill_command, "stop": self._stop_worker, "terminate": self._terminate,
         "lose": self._lose_node, "add": self._add_node}[event.split()[0]]()  # fmt: skip
        self.interrupted += event.endswith("while saving") and self.saving()
        ended = event.startswith(("command", "terminate"))
        readable(self.run, all_of_them=ended)
        if ended:
            self.begin()

    def newest(self) -> int:
        found = committed(self.run / FOLDER)
        return step_of(found[-1]) if found else 0

    def saving(self) -> bool:
        """Whether there is an unfinished checkpoint."""
        incoming = self.run / FOLDER / INCOMING
        return incoming.is_dir() and any(not path.name.endswith(".removed") for path in incoming.iterdir())

    def _at_once(self, condition: Callable[[], bool]) -> None:
        """Wait for what does not last."""
        deadline = time.monotonic() + 120
        while not _true(condition):
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.0005)

    def _hit(self, number: int) -> None:
        """Send the signal to a worker that is there."""
        while True:
            try:
                return os.kill(self.draw.choice(self.candidates), number)
            except (IndexError, ProcessLookupError):
                self.wait(self.nodes.workers, "workers")
                self.candidates = self.nodes.workers()

    def _kill_worker(self) -> None:
        self._hit(signal.SIGKILL)
        self.killed += 1

    def _kill_command(self) -> None:
        self.process.kill()
        self.process.wait()
        self.killed += 1

    def _stop_worker(self) -> None:
        self._hit(signal.SIGSTOP)

    def _terminate(self) -> None:
        self.wait(self.nodes.workers, "workers")
        kill(self.process.pid, signal.SIGTERM)
        assert self.process.wait(timeout=200) == 0

    def _lose_node(self) -> None:
        self.nodes.lose(self.second)

    def _add_node(self) -> None:
        self.nodes.add()


def _true(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except FileNotFoundError:  # it came and went
        return False


def readable(run: Path, *, all_of_them: bool) -> None:
    """Checkpoints are what their names say, the newest one or, where a run has ended, all of them.

    Workers that outlive their command for a moment may remove one that is being read: it is then no longer there.
    """
    for path in committed(run / FOLDER)[None if all_of_them else -1 :]:
        try:
            assert load_state(path).step == step_of(path)
            with opened(path) as (weights, moments):
                assert len(weights) > 100
                assert len(moments) >= len(weights)
                for tensors in (weights, moments):
                    assert all(bool(tensors[name].isfinite().all()) for name in tensors)
        except DataError:
            assert path not in committed(run / FOLDER)


def events(draw: random.Random) -> Iterator[tuple[int, float, str]]:
    """(step, seconds after it, what happens), in order; the node is lost before one is added."""
    names = draw.sample([*KILLS, *BESIDE], len(KILLS) + len(BESIDE))
    lost, added = sorted(names.index(name) for name in BESIDE[2:])
    names[lost], names[added] = BESIDE[2:]
    for number, name in enumerate(names):
        yield APART * (1 + number) + draw.randrange(APART), draw.uniform(0, 0.5), name


def test_twenty_kills_a_stop_a_notice_and_a_lost_node_change_nothing(nodes: Nodes, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    data = make_data_set(tmp_path / "data", tiles=90, size=40).directory
    alone, run = tmp_path / "alone", tmp_path / "run"
    done = pretrain(*RUN, f"data.shards={data}", f"run.directory={alone}", "train.workers=2")
    assert done.returncode == 0, done.stderr

    nodes.add()
    command = (*RUN, *ELASTIC, f"data.shards={data}", f"run.directory={run}", f"run.address={nodes.address}")
    drill = Drill(nodes, run, command, random.Random(seed), second=nodes.add())
    with drill.held:
        drill.begin()
        for step, pause, event in events(drill.draw):
            drill.wait(lambda step=step: metrics(run)[-1:] and metrics(run)[-1]["step"] >= step, f"step {step}")
            time.sleep(pause)
            print(f"step {metrics(run)[-1]['step']}: {event}", flush=True)
            drill.disturb(event)
        output = drill.process.communicate(timeout=400)[0]
        assert drill.process.returncode == 0, output
    assert drill.killed == len(KILLS) == 20
    assert drill.interrupted, "no kill met an unfinished checkpoint"
    readable(run, all_of_them=True)
    assert [entry["step"] for entry in metrics(run)] == list(range(1, STEPS + 1))
    assert ledger(run) == ledger(alone)
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
