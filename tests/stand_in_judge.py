"""A stand-in for the process that judges encoders: `python stand_in_judge.py FOLDER PARENT`, ready in milliseconds.

What it makes of its life the request says in `do`, or the environment in STAND_IN_STEP: answer, collapse (answer that the
encoder has), hang, crash, vanish (end without a result), kill (itself), or wait (for the file that `until`, or STAND_IN_UNTIL,
names).  Where there is an encoder, the answer holds the digest of its weights.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    do = os.environ.get(f"STAND_IN_{request['step']}", request.get("do", "answer"))
    print("it begins", flush=True)
    if do == "hang":
        time.sleep(3600)
    if do == "crash":
        raise ValueError("a crash of the test's own")
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "vanish":
        return
    while do == "wait" and not Path(request.get("until") or os.environ["STAND_IN_UNTIL"]).exists():
        time.sleep(0.02)
    found = {"step": request["step"], "knn": 0.5, "logistic": 0.25, "collapsed": do == "collapse", "pid": os.getpid()}
    if do == "collapse":
        found["why"] = "all is one"
    weights = folder / "encoder" / "encoder.safetensors"
    if weights.exists():
        data = weights.read_bytes()
        header = int.from_bytes(data[:8], "little")
        found["weights"] = hashlib.sha256(data[8 + header :]).hexdigest()
    (folder / "result.json.tmp").write_text(json.dumps(found))
    (folder / "result.json.tmp").replace(folder / "result.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
