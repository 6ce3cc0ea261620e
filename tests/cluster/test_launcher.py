"""The launcher files: Ray's own validators, what they miss, and what Ray's autoscaler would start for a run."""

import copy
import importlib.util
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

ROOT = Path(__file__).parents[2]
CLOUDS = ("aws", "gcp")
LOCKED = dict(
    line.split(";")[0].strip().split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line
)
GCP_NODE: dict[str, Any] = {  # of the fields of a Compute Engine instance (REST v1), those that the file uses
    "machineType": str,
    "disks": [
        {"boot": bool, "autoDelete": bool, "type": str, "initializeParams": {"diskSizeGb": int, "sourceImage": str}},
    ],
    "serviceAccounts": [{"email": str, "scopes": [str]}],
    "metadata": {"items": [{"key": str, "value": str}]},
    "scheduling": {
        "provisioningModel": str, "instanceTerminationAction": str, "onHostMaintenance": str, "automaticRestart": bool,
    },
}  # fmt: skip

PROVIDER: dict[str, dict[str, Any]] = {  # of the keys that Ray reads, those that the files use: Ray's schema allows any other
    "aws": {"type": str, "region": str, "availability_zone": str, "cache_stopped_nodes": bool},
    "gcp": {"type": str, "region": str, "availability_zone": str, "project_id": str, "cache_stopped_nodes": bool},
    "local": {"type": str, "head_ip": str, "worker_ips": [str]},
}  # fmt: skip


def from_file(path: Path) -> ModuleType:
    """A module that is no part of a package: the head has only this file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


score = from_file(ROOT / "cluster" / "spot_first.py").score


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())


def problems(config: dict[str, Any]) -> list[str]:
    """What is wrong with a launcher file beyond what Ray's validators find."""
    expected = PROVIDER[config["provider"]["type"]]
    found = list(misfits(config["provider"], expected, "provider"))
    found += [f"provider.{key} is missing" for key in expected if key not in config["provider"]]
    region, zones = (config["provider"].get(key, "") for key in ("region", "availability_zone"))
    found += [f"provider: {zone} is no zone of its region" for zone in zones.split(",") if not zone.startswith(region)]
    return found + (node_type_problems(config) if "available_node_types" in config else [])


def node_type_problems(config: dict[str, Any]) -> list[str]:
    types, head = config["available_node_types"], config["head_node_type"]
    found = [f"{head}: GPU on the head" for _ in [0] if types[head]["resources"].get("GPU")]
    found += [f"{head}: CPU on the head" for _ in [0] if types[head]["resources"].get("CPU") != 0]
    for name, node in types.items():
        if name != head and not 0 <= node.get("min_workers", 0) <= node.get("max_workers", -1):
            found.append(f"{name}: min_workers and max_workers")
        found += [f"{name}: {k}={v!r} is no whole number" for k, v in node["resources"].items() if type(v) is not int or v < 0]
        image = node.get("docker", {}).get("worker_image", config["docker"]["image"])
        if not image.startswith(f"rayproject/ray:{LOCKED['ray']}-py311-"):
            found.append(f"{name}: image {image} is not of the locked Ray")
        if ("GPU" in node["resources"]) != image.endswith("-gpu"):
            found.append(f"{name}: image {image} does not fit its resources")
        found += [f"{name}: {text}" for text in node_config_problems(config["provider"]["type"], node["node_config"])]
    most = sum(node.get("max_workers", 0) for node in types.values())
    if config["max_workers"] != most:
        found.append(f"max_workers={config['max_workers']}, node types together {most}")
    return found


def node_config_problems(provider: str, node: dict[str, Any]) -> list[str]:
    if provider == "gcp":
        return list(misfits(node, GCP_NODE, "node_config"))
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape)
    return [report.generate_report()] if report.has_errors() else []


def misfits(value: Any, expected: Any, at: str) -> list[str]:
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            return [f"{at} is no mapping"]
        unknown = [f"{at}.{key} is unknown" for key in value if key not in expected]
        return unknown + [text for k, v in value.items() if k in expected for text in misfits(v, expected[k], f"{at}.{k}")]
    if isinstance(expected, list):
        if not isinstance(value, list):
            return [f"{at} is no list"]
        return [text for item in value for text in misfits(item, expected[0], f"{at}[]")]
    return [] if type(value) is expected else [f"{at}={value!r} is no {expected.__name__}"]


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_rays_validators_accept_the_file(name: str) -> None:
    prepared = prepare_config(launcher(name))
    validate_config(prepared)
    assert prepared["setup_commands"]


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_what_rays_validators_miss_is_right_too(name: str) -> None:
    assert problems(launcher(name)) == []


def change(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the value at all but the last of `path` to the last."""

    def apply(config: dict[str, Any]) -> None:
        for key in path[:-2]:
            config = config[key]
        config[path[-2]] = path[-1]

    return apply


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (change("available_node_types", "data", "min_workers", 5), "data: min_workers and max_workers"),
        (change("available_node_types", "data", "resources", "CPU", 15.5), "data: CPU=15.5 is no whole number"),
        (change("available_node_types", "head", "resources", "GPU", 1), "head: GPU on the head"),
        (change("available_node_types", "head", "resources", "CPU", 4), "head: CPU on the head"),
        (change("available_node_types", "train_spot", "docker", {}), "train_spot: image rayproject/ray"),
        (change("docker", "image", "rayproject/ray:2.59.0-py311-cpu"), "head: image rayproject/ray:2.59.0-py311-cpu"),
        (change("available_node_types", "data", "node_config", "InstanceTyp", "big"), "InstanceTyp"),
        (change("max_workers", 3), "max_workers=3"),
        (change("provider", "availability_zone", "mars-1a"), "provider: mars-1a is no zone of its region"),
        (change("provider", "cache_stopped_nodes", "false"), "provider.cache_stopped_nodes='false' is no bool"),
    ],
)
def test_each_of_them_is_found(name: str, broken: Callable[[dict[str, Any]], None], found: str) -> None:
    config = copy.deepcopy(launcher(name))
    broken(config)
    assert any(found in problem for problem in problems(config))


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [("aws", "region", "regoin"), ("gcp", "project_id", "project"), ("gcp", "region", "regions"), ("local", "head_ip", "head"),
     ("local", "worker_ips", "worker_ip")],
)  # fmt: skip
def test_a_misspelt_key_of_the_provider_is_found(name: str, key: str, wrong: str) -> None:
    config = copy.deepcopy(launcher(name))
    config["provider"][wrong] = config["provider"].pop(key)
    found = problems(config)
    assert f"provider.{wrong} is unknown" in found
    assert f"provider.{key} is missing" in found


def test_addresses_of_machines_are_a_list() -> None:
    config = copy.deepcopy(launcher("local"))
    config["provider"]["worker_ips"] = "WORKER_1"
    assert problems(config) == ["provider.worker_ips is no list"]


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_nodes_have_on_demand_nodes_of_the_same_size_behind_them(name: str) -> None:
    types = launcher(name)["available_node_types"]
    spot, on_demand = types["train_spot"], types["train_on_demand"]
    assert spot["resources"] == on_demand["resources"]
    text = {kind: yaml.dump(types[kind]["node_config"]).lower() for kind in types}
    assert [kind for kind in types if "spot" in text[kind]] == ["train_spot"]


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_ray_starts_with_the_token_and_time_to_save_on_every_node(name: str) -> None:
    config = launcher(name)
    options = " ".join(config.get("docker", {}).get("run_options", []))
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        everything = options + " ".join(config[start])
        assert "RAY_AUTH_MODE=token" in everything
        assert "RAY_JOB_STOP_WAIT_TIME_S=300" in everything
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    token = [remote for remote, local in config["file_mounts"].items() if local == "~/.ray/auth_token"]
    assert token in (["~/.ray/auth_token"], ["/home/ray/auth_token"])
    assert token[0].startswith("~/.ray/") or f"RAY_AUTH_TOKEN_PATH={token[0]}" in options
    assert all((ROOT / local).exists() for local in config["file_mounts"].values() if not local.startswith("~"))
    assert any("requirements.lock" in command for command in config["setup_commands"])


def started(name: str, demand: list[dict[str, Any]], *refused: str) -> tuple[dict[str, int], int]:
    """What the autoscaler adds to a lone head for these bundles, where the cloud has refused some types, and what is left."""
    config = prepare_config(launcher(name))
    tracker = NodeProviderAvailabilityTracker(timer=lambda: 100.0)
    for node_type in refused:
        tracker.update_node_availability(node_type, 100, NodeLaunchException("InsufficientInstanceCapacity", "none", None))
    types, head = config["available_node_types"], config["head_node_type"]
    summary = tracker.summary()

    def scorer(node_resources: Any, resources: Any, node_type: str) -> Any:
        return score(node_resources, resources, node_type, node_availability_summary=summary)

    added, residual = get_nodes_for(types, {head: 1}, head, config["max_workers"], demand, scorer)
    return dict(added), len(residual)


TRAIN, DATA = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}


@pytest.mark.parametrize("name", CLOUDS)
def test_the_autoscaler_starts_spot_nodes_first_and_on_demand_nodes_where_there_are_none(name: str) -> None:
    nodes = 8 // launcher(name)["available_node_types"]["train_spot"]["resources"]["GPU"]
    assert started(name, [TRAIN] * 8) == ({"train_spot": nodes}, 0)
    assert started(name, [TRAIN] * 8, "train_spot") == ({"train_on_demand": nodes}, 0)
    assert started(name, [TRAIN] * 8, "train_spot", "train_on_demand") == ({"train_spot": nodes}, 0)
    assert started(name, [TRAIN] * 16) == ({"train_spot": nodes, "train_on_demand": nodes}, 0)
    assert started(name, [TRAIN] * 20)[1] == 4
    assert started(name, [DATA] * 20) == ({"data": 2}, 0)


@pytest.mark.parametrize("name", CLOUDS)
def test_the_published_recipe_fits_into_spot_nodes_alone_with_cpus_left_for_data(name: str) -> None:
    workers = yaml.safe_load((ROOT / "configs" / "mmearth64_atto.yaml").read_text())["train"]["workers"]
    assert workers > 1
    spot = launcher(name)["available_node_types"]["train_spot"]
    assert spot["max_workers"] * spot["resources"]["GPU"] >= workers
    assert spot["max_workers"] * spot["resources"]["CPU"] > workers


def test_the_scorer_leaves_rays_choice_between_unequal_types_alone() -> None:
    summary = NodeProviderAvailabilityTracker().summary()
    assert score({"CPU": 4}, [{"GPU": 1}], "data", node_availability_summary=summary) is None
    cpu = score({"CPU": 4}, [DATA], "data", node_availability_summary=summary)
    gpu = score({"CPU": 4, "GPU": 1}, [DATA], "train_spot", node_availability_summary=summary)
    assert cpu > gpu


def test_the_head_of_aws_finds_the_scorer() -> None:
    config = launcher("aws")
    options = " ".join(config["docker"]["head_run_options"])
    assert "RAY_AUTOSCALER_UTILIZATION_SCORER=spot_first.score" in options
    folder = options.split("PYTHONPATH=")[1].split()[0]
    assert config["file_mounts"][f"{folder}/spot_first.py"] == "cluster/spot_first.py"


def test_the_lock_holds_what_jobs_need() -> None:
    """`ray job submit` needs the packages of ray[default]; a node installs nothing but the lock."""
    marked = [one for one in map(Requirement, requires("ray") or []) if one.marker]
    names = {one.name for one in marked if one.marker and one.marker.evaluate({"extra": "default"})}
    assert "grpcio" in names
    locked = {name.lower().replace("_", "-") for name in LOCKED}
    assert {name.lower().replace("_", "-") for name in names} <= locked
