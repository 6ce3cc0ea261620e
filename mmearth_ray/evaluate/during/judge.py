"""The process that judges an encoder while its training goes on: `python -m mmearth_ray.evaluate.during.judge FOLDER PARENT`.

FOLDER holds `request.json` and the encoder as an exported model.  What is found goes into its `result.json`, complete or not at
all.  The process is of low priority from its first moment on, and ends when the one that asked for it, PARENT, is gone.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from mmearth_ray.errors import run_command
from mmearth_ray.evaluate.during.requests import RESULT
from mmearth_ray.files import atomic_text

NICE = 10
"""How far the process stands back behind those that train."""

LOOK_SECONDS = 1.0
"""Between two looks at whether the parent is still there."""


def end_with(parent: int) -> None:
    """End this process at once when its parent has ended.  Called in a thread of its own."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Judge what a folder asks for.  Returns the exit code."""
    folder, parent = Path(arguments[0]), int(arguments[1])
    for number in (signal.SIGTERM, signal.SIGINT):  # of a group that is ended as a whole: the next start wants the request
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    os.nice(NICE)
    from mmearth_ray.evaluate.during.verdict import verdict_on  # PyTorch takes seconds to import: as quietly as all the rest

    found = verdict_on(folder) | {"cpu_seconds": round(time.process_time(), 3)}
    atomic_text(folder / RESULT, json.dumps(found, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
