"""What workers tell the driver: warnings arrive once and in order, whatever is said twice on the way."""

import signal
import subprocess
import sys

import pytest

from mmearth_ray.train.board import Board, progress_text


def test_warnings_are_handed_on_once_though_an_answer_is_lost() -> None:
    board = Board()
    assert board.exchange({"step": 1}, ["a", "b"], 0) is False
    assert board.exchange(None, ["a", "b", "c"], 0) is False  # the first answer did not arrive
    assert board.look(False, 0) == ({"step": 1}, "", ["a", "b", "c"])
    assert board.look(True, 3) == ({"step": 1}, "", [])
    assert board.exchange({"step": 2}, ["d"], 3) is True
    assert board.look(False, 3) == ({"step": 2}, "", ["d"])


def test_a_score_is_shown_where_it_is_new() -> None:
    progress = {"step": 3, "loss": 1.5, "tiles_per_second": 12.0, "data_wait": 0.0}
    assert "kNN" not in progress_text(progress, 3, (0.0, 1))
    for told, shown in (({"knn": 0.625}, "loss 1.5000  kNN 0.625"), ({"failed": "a hang"}, "loss 1.5000  12 tiles/s")):
        assert shown in progress_text({**progress, "evaluation": told}, 3, (0.0, 1))


def test_the_first_final_error_stays() -> None:
    board = Board()
    board.fail("first")
    board.fail("second")
    assert board.look(False, 0)[1] == "first"


ASKED = """
import sys, time
from contextlib import nullcontext
from mmearth_ray.train import board

class Exchange:
    def remote(*given):
        return True

class Wished:
    exchange = Exchange()

board.ray.get = lambda answer: answer
line = board.BoardLine(Wished, patience=1.0)
with line.waiting():
    pass
with line.waiting() if sys.argv[1] == "data" else nullcontext():
    time.sleep(4)
assert line.should_stop()
line.close()
print("saved")
"""


@pytest.mark.parametrize(("what", "code", "said"), [("data", -signal.SIGKILL, ""), ("a store", 0, "saved\n")])
def test_a_worker_that_is_to_stop_is_killed_where_it_waits_for_data_and_not_while_it_saves(
    what: str, code: int, said: str
) -> None:
    done = subprocess.run([sys.executable, "-c", ASKED, what], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
