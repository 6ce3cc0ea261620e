"""Tells Ray when the cloud is about to take this machine away, so that a run saves and leaves it in time.

    python spot_notice.py aws|gcp

Asks the machine's metadata server every two seconds, and on a notice has Ray drain this node.  It ends when Ray has accepted
that.  Nodes have this file alone, so it imports nothing of the project.
"""

import os
import subprocess
import sys
import time
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

SECONDS = 2.0
"""Between two questions.  A run needs some seconds of the notice itself."""

NOTICE = {"aws": 120, "gcp": 30}
"""Seconds from the notice to the machine's end, by the clouds' documentation."""


def noticed_by_aws() -> bool:
    """Whether EC2 has set a time for this spot instance's end: there is no such entry before (IMDSv2)."""
    server = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    token = _ask(Request(f"{server}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}))
    try:
        _ask(Request(f"{server}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}))
    except HTTPError as error:
        if error.code == 404:
            return False
        raise
    return True


def noticed_by_gcp() -> bool:
    """Whether Compute Engine has begun to preempt this machine."""
    server = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/preempted"
    return _ask(Request(url, headers={"Metadata-Flavor": "Google"})).strip() == "TRUE"


def _ask(request: Request) -> str:
    """What the metadata server answers; no proxy is between."""
    with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
        return answer.read().decode()


def drain(seconds: int) -> bool:
    """Have Ray drain this node; returns whether it accepted."""
    done = subprocess.run(
        ["ray", "drain-node", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the cloud takes the machine back",
         f"--deadline-remaining-seconds={seconds}"], check=False,
    )  # fmt: skip
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in NOTICE:
        print("usage: spot_notice.py aws|gcp", file=sys.stderr)
        return 2
    (cloud,) = arguments
    noticed = {"aws": noticed_by_aws, "gcp": noticed_by_gcp}[cloud]
    while True:
        try:
            if noticed() and drain(NOTICE[cloud]):
                return 0
        except (OSError, HTTPException) as error:  # asked again, as there is no better place to ask
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        time.sleep(SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
