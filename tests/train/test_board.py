"""What workers tell the driver: warnings arrive once and in order, whatever is said twice on the way."""

from mmearth_ray.train.board import Board


def test_warnings_are_handed_on_once_though_an_answer_is_lost() -> None:
    board = Board()
    assert board.exchange({"step": 1}, ["a", "b"], 0) is False
    assert board.exchange(None, ["a", "b", "c"], 0) is False  # the first answer did not arrive
    assert board.look(False, 0) == ({"step": 1}, "", ["a", "b", "c"])
    assert board.look(True, 3) == ({"step": 1}, "", [])
    assert board.exchange({"step": 2}, ["d"], 3) is True
    assert board.look(False, 3) == ({"step": 2}, "", ["d"])


def test_the_first_final_error_stays() -> None:
    board = Board()
    board.fail("first")
    board.fail("second")
    assert board.look(False, 0)[1] == "first"
