"""The two errors a user can cause, and how a command reports them.

`UsageError` is a wrong command or setting (exit code 2); `DataError` is bad data (exit code 1).  Both carry one line that
gives the value, the bound and what to do; commands print that line and nothing else.
"""

import os
import sys
from collections.abc import Callable


class UsageError(ValueError):
    """A command, key or value that cannot work.  Exit code 2."""

    exit_code = 2


class DataError(ValueError):
    """Data that is missing, damaged or of another kind than expected.  Exit code 1."""

    exit_code = 1


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """What an error says, as one line of at most so many characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def run_command(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command's `main`, turning the user's errors into one line on stderr and an exit code."""
    try:
        return main(arguments)
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
