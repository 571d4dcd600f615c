"""Wait until every pod of a Deployment is of its newest version, and the last old one has ended.

Only then may the schema be tightened. Asks the Kubernetes API with the token that is mounted into
this container alone.
"""

import json
import ssl
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

API = "https://kubernetes.default.svc"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_TIMEOUT_S = 10.0
POLL_S = 2.0


def get(path: str) -> dict[str, Any]:
    """An object of the API. Raises OSError."""
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    # Read anew each time: it is rotated.
    token = (ACCOUNT / "token").read_text().strip()
    request = urllib.request.Request(API + path, headers={"Authorization": f"Bearer {token}"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S, context=context) as response:  # noqa: S310
        found: dict[str, Any] = json.load(response)
        return found


def unfinished(deployment: dict[str, Any], pods: list[dict[str, Any]]) -> str:
    """What the rollout still waits for; empty when it is done."""
    wanted = deployment["spec"].get("replicas", 1)
    status = deployment.get("status", {})
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return "the Deployment's newest version has not been looked at yet"
    if status.get("updatedReplicas", 0) < wanted:
        return f"{status.get('updatedReplicas', 0)} of {wanted} pods are of the newest version"
    if status.get("replicas", 0) > status.get("updatedReplicas", 0):
        return "old pods run"
    if status.get("availableReplicas", 0) < status.get("updatedReplicas", 0):
        return "new pods are not available"
    # The status does not count pods that drain, and they may be old ones.
    leaving = [pod["metadata"]["name"] for pod in pods if pod["metadata"].get("deletionTimestamp")]
    return f"pods drain: {', '.join(leaving)}" if leaving else ""


def main() -> int:
    """The exit status: 0 when the rollout is done, 1 when the time is over."""
    namespace, name, limit_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    until = time.monotonic() + limit_s
    said = ""
    while True:
        try:
            deployment = get(f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}")
            labels = deployment["spec"]["selector"]["matchLabels"]
            selector = urllib.parse.quote(",".join(f"{key}={labels[key]}" for key in labels))
            pods = get(f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}")["items"]
            waiting = unfinished(deployment, pods)
        except OSError as error:
            waiting = f"the Kubernetes API: {error}"
        if not waiting:
            print("the rollout is done")
            return 0
        if waiting != said:
            print(waiting, flush=True)
            said = waiting
        if time.monotonic() > until:
            print(f"not done after {limit_s:.0f} s", file=sys.stderr)
            return 1
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
