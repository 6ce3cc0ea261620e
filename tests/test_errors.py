"""Errors of users become one line and an exit code; errors of ours stay visible."""

import subprocess
import sys

import pytest

from mmearth_ray.errors import DataError, UsageError, run_command


def raising(error: BaseException):
    def main(arguments: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("seed=-1: must be at least 0"), 2, "error: seed=-1: must be at least 0\n"),
        (DataError("the shard a.parquet is missing"), 1, "error: the shard a.parquet is missing\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_a_users_error_is_one_line_on_stderr_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error), []) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", line)


def test_the_commands_own_exit_code_and_arguments_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(len, ["a", "b", "c"]) == 3
    assert capsys.readouterr() == ("", "")


def test_an_error_of_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()), [])


def test_both_errors_are_value_errors_with_distinct_exit_codes() -> None:
    assert issubclass(UsageError, ValueError)
    assert issubclass(DataError, ValueError)
    assert (UsageError.exit_code, DataError.exit_code) == (2, 1)


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    program = (
        "import sys; from mmearth_ray.errors import run_command\n"
        "def main(arguments):\n    while True:\n        print('line after line')\n"
        "sys.exit(run_command(main, []))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"line after line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 0
