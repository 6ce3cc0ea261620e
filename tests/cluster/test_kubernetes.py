"""The KubeRay manifests: against KubeRay's own schemas, the lock, the image and each other."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).with_name("kuberay_v1.json")
MANIFESTS = {"raycluster": "RayCluster", "rayjob": "RayJob"}
LOCKED_RAY = next(
    line.split("==")[1] for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("ray==")
)


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "kubernetes" / f"{name}.yaml").read_text())


def cluster_of(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(name: str) -> dict[str, dict[str, Any]]:
    cluster = cluster_of(name)
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def closed(schema: Any) -> Any:
    """The schema with every object closed to unknown fields, as the API server prunes them in silence."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if inner.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(inner.get("properties"), dict) and inner.get("type") == "object":
        inner.setdefault("additionalProperties", bool(inner.get("x-kubernetes-preserve-unknown-fields")))
    return inner


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """{kind: schema of v1}, from the definitions that KubeRay's operator installs."""
    definitions = json.loads(SCHEMAS.read_text())
    shared = {name: closed(schema) for name, schema in definitions["$defs"].items()}
    found = {}
    for kind, schema in definitions["kinds"].items():
        found[kind] = closed(schema) | {"$defs": shared}
        found[kind]["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return found


def errors(document: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(schemas[document["kind"]]).iter_errors(document)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_accepts_the_manifest(name: str, schemas: dict[str, Any]) -> None:
    document = manifest(name)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", MANIFESTS[name])
    assert errors(document, schemas) == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_schemas_find_what_is_wrong(name: str, schemas: dict[str, Any]) -> None:
    def broken(**changes: Any) -> list[str]:
        document = copy.deepcopy(manifest(name))
        cluster = document["spec"].get("rayClusterSpec", document["spec"])
        cluster.update(changes)
        return errors(document, schemas)

    assert any("'manual' is not one of" in message for message in broken(authOptions={"mode": "manual"}))
    assert any("'rayVersoin' was unexpected" in message for message in broken(rayVersoin="2.60.0"))
    assert any("is not of type 'integer'" in m for m in broken(autoscalerOptions={"idleTimeoutSeconds": "600"}))
    assert any("'headGroupSpec' is a required" in m or "not of type" in m for m in broken(headGroupSpec="none"))
    workers = copy.deepcopy(cluster_of(name)["workerGroupSpecs"])
    container(workers[0])["imag"] = "mmearth-ray"
    assert any("'imag' was unexpected" in message for message in broken(workerGroupSpecs=workers))
    workers = copy.deepcopy(cluster_of(name)["workerGroupSpecs"])
    workers[0]["maxReplica"] = workers[0].pop("maxReplicas")
    assert any("'maxReplica' was unexpected" in message for message in broken(workerGroupSpecs=workers))


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_cluster_is_of_the_locked_ray_with_a_token_and_the_second_autoscaler(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == LOCKED_RAY
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert 0 < cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 600


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_container_gets_what_it_asks_for_and_runs_as_no_root(name: str) -> None:
    for group, spec in groups(name).items():
        one, pod = container(spec), spec["template"]["spec"]
        assert one["resources"]["requests"] == one["resources"]["limits"], group
        assert {"cpu", "memory"} <= set(one["resources"]["limits"])
        assert one["resources"]["limits"]["cpu"].isdigit(), "Ray counts whole CPUs"
        gpus = one["resources"]["limits"].get("nvidia.com/gpu", "0")
        assert one["image"].rpartition("-")[2] == ("gpu" if int(gpus) else "cpu")
        assert bool(int(gpus)) == group.startswith("train")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        mounted = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]} == {"shared", "spill"}
        assert spec["rayStartParams"]["object-spilling-directory"] == mounted["spill"]
        assert {"RAY_JOB_STOP_WAIT_TIME_S", "RAY_USAGE_STATS_ENABLED"} == {variable["name"] for variable in one["env"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_nodes_scale_from_none_with_spot_before_on_demand(name: str) -> None:
    found = groups(name)
    assert scaling_problems(found) == []
    spot, on_demand = found["train-spot"], found["train-on-demand"]
    assert "spot" in spot["template"]["spec"]["nodeSelector"].values()
    assert "on-demand" in on_demand["template"]["spec"]["nodeSelector"].values()


def scaling_problems(found: dict[str, dict[str, Any]]) -> list[str]:
    """What the schemas do not see of how many pods there are of each group and which come first."""
    workers = {group: spec for group, spec in found.items() if group != "head"}
    problems = [] if found["head"]["rayStartParams"]["num-cpus"] == "0" else ["CPUs on the head"]
    for group, spec in workers.items():
        least, now, most = spec["minReplicas"], spec["replicas"], spec["maxReplicas"]
        problems += [] if least <= now <= most else [f"{group}: {now} replicas are not from {least} to {most}"]
        problems += [] if least == 0 < most else [f"{group}: does not grow from none"]
    spot, on_demand = workers["train-spot"], workers["train-on-demand"]
    problems += [] if spot["priority"] > on_demand["priority"] else ["on-demand before spot"]
    alike = container(spot)["resources"] == container(on_demand)["resources"]
    return problems + ([] if alike else ["spot and on-demand differ"])


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda g: g["data"].update(minReplicas=5), "data: 0 replicas are not from 5 to 4"),
        (lambda g: g["data"].update(minReplicas=5, replicas=5), "data: 5 replicas are not from 5 to 4"),
        (lambda g: g["train-spot"].update(replicas=9), "train-spot: 9 replicas are not from 0 to 8"),
        (lambda g: g["data"].update(maxReplicas=0), "data: does not grow from none"),
        (lambda g: g["data"].update(minReplicas=1, replicas=1), "data: does not grow from none"),
        (lambda g: g["head"]["rayStartParams"].update({"num-cpus": "4"}), "CPUs on the head"),
        (lambda g: g["train-on-demand"].update(priority=10), "on-demand before spot"),
        (lambda g: container(g["train-spot"]).update(resources={}), "spot and on-demand differ"),
    ],
)
@pytest.mark.parametrize("name", MANIFESTS)
def test_groups_that_scale_wrongly_are_found(
    name: str, broken: Callable[[dict[str, dict[str, Any]]], None], found: str
) -> None:
    changed = json.loads(json.dumps(groups(name)))  # groups share parts by YAML's anchors
    broken(changed)
    assert found in scaling_problems(changed)


def test_the_job_runs_on_the_same_cluster_and_fits_into_it() -> None:
    assert cluster_of("rayjob") == cluster_of("raycluster")
    job = manifest("rayjob")["spec"]
    settings = dict(word.split("=", 1) for word in job["entrypoint"].split() if "=" in word)
    assert yaml.safe_load(settings["train.workers"])[-1] <= groups("rayjob")["train-spot"]["maxReplicas"]
    assert float(settings["train.wait"]) > 600, "on-demand pods go first after 10 minutes of waiting"
    assert settings["train.gpus"] == "true"
    assert settings["run.directory"].startswith("/shared/")
    assert (ROOT / job["entrypoint"].split()[3]).exists()
    assert job["shutdownAfterJobFinishes"] is True
