"""cluster/*.yaml of ``ray up``: Ray's own checks, and what Google's and Azure's interfaces say of every field."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _resource_based_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support import ROOT

FOLDER = ROOT / "cluster"
CLOUDS = ["aws", "gcp", "azure"]
FILES = ["onprem", *CLOUDS]


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name: str) -> None:
    config = prepare_config(load(name))
    validate_config(config)
    assert not any("pip install" in command for key in config if key.endswith("_commands") for command in config[key])


@pytest.mark.parametrize("name", FILES)
def test_nodes_get_the_package_and_the_token_and_one_script_starts_them(name: str) -> None:
    config = prepare_config(load(name))
    assert config["file_mounts"] == load("onprem")["file_mounts"]
    mounts = dict(config["file_mounts"])
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert all((ROOT / local).exists() for local in mounts.values())
    for kind in ("head", "worker"):
        assert config[f"{kind}_setup_commands"][0].startswith("~/distft/cluster/node.sh setup")
        (start,) = config[f"{kind}_start_ray_commands"]
        assert start.endswith(f"~/distft/cluster/node.sh {kind}")


def test_the_script_starts_ray_with_a_token_and_its_dashboard_on_loopback() -> None:
    script = (FOLDER / "node.sh").read_text()
    assert "export RAY_AUTH_MODE=token" in script
    assert "--dashboard-host=127.0.0.1" in script
    assert "0.0.0.0" not in script


@pytest.mark.parametrize("name", CLOUDS)
def test_gpus_come_on_spot_and_on_demand_where_there_is_no_spot(name: str) -> None:
    """By Ray's own choice, in its former autoscaler; the default one goes by ``priority``."""
    types = prepare_config(load(name))["available_node_types"]
    assert {key: kind["min_workers"] for key, kind in types.items() if key != "head"} == {
        "gpu-spot": 0,
        "gpu-on-demand": 0,
    }
    assert types["gpu-spot"]["labels"] == {"ray.io/market-type": "spot"}
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    assert not types["head"]["resources"]["CPU"]
    most = types["gpu-spot"]["max_workers"]

    def wanted(there: int) -> dict[str, int]:
        def score(resources: Any, demands: Any, _: str) -> Any:
            return _resource_based_utilization_scorer(
                resources, demands, node_availability_summary=NodeAvailabilitySummary({})
            )

        nodes, unmet = get_nodes_for(types, {"gpu-spot": there}, "head", 1, [{"GPU": 1, "CPU": 1}], score)
        assert not unmet
        return dict(nodes)

    assert wanted(0) == {"gpu-spot": 1}
    assert wanted(most) == {"gpu-on-demand": 1}


# Google: the discovery document that its own client library carries.


def google_problems(value: Any, kind: dict[str, Any], schemas: dict[str, Any], where: str) -> list[str]:
    """What Compute Engine would refuse: unknown names, other types, values that are not in a list."""
    kind = schemas[kind["$ref"]] if "$ref" in kind else kind
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    if isinstance(value, bool) != (kind["type"] == "boolean") or not isinstance(value, types[kind["type"]]):
        return [f"{where}: {value!r} is no {kind['type']}"]
    if isinstance(value, list):
        found = [google_problems(one, kind["items"], schemas, f"{where}[]") for one in value]
    elif isinstance(value, dict) and "properties" in kind:
        unknown = [f"{where}.{name}: unknown" for name in value.keys() - kind["properties"].keys()]
        known = value.keys() & kind["properties"].keys()
        found = [google_problems(value[name], kind["properties"][name], schemas, f"{where}.{name}") for name in known]
        found.append(unknown)
    else:
        found = [[f"{where}: {value!r} is none of {kind['enum']}"]] if value not in kind.get("enum", [value]) else []
    return [problem for problems in found for problem in problems]


@pytest.fixture(scope="module")
def google() -> dict[str, Any]:
    client = pytest.importorskip("googleapiclient", reason="google-api-python-client is not installed")
    document = Path(client.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    schemas: dict[str, Any] = json.loads(document.read_text())["schemas"]
    return schemas


@pytest.mark.parametrize("node", ["head", "gpu-spot", "gpu-on-demand"])
def test_google_takes_every_field(node: str, google: dict[str, Any]) -> None:
    config = load("gcp")["available_node_types"][node]["node_config"]
    assert google_problems(config, {"$ref": "Instance"}, google, node) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"machineTyp": "x"}, "machineTyp: unknown"),
        ({"scheduling": [{"preemptible": True}]}, "is no object"),  # as in Ray's own example
        ({"scheduling": {"provisioningModel": "SPOTT"}}, "is none of"),
    ],
)
def test_a_planted_mistake_is_found(change: dict[str, Any], says: str, google: dict[str, Any]) -> None:
    config = load("gcp")["available_node_types"]["gpu-spot"]["node_config"] | change
    (problem,) = google_problems(config, {"$ref": "Instance"}, google, "gpu-spot")
    assert says in problem


def test_google_gives_no_node_an_address_outside_and_spot_is_spot() -> None:
    config = load("gcp")
    assert config["provider"]["use_internal_ips"] is True
    types = {name: kind["node_config"] for name, kind in config["available_node_types"].items()}
    assert all("accessConfigs" not in network for kind in types.values() for network in kind["networkInterfaces"])
    models = {name: kind.get("scheduling", {}).get("provisioningModel", "STANDARD") for name, kind in types.items()}
    assert models == {"head": "STANDARD", "gpu-on-demand": "STANDARD", "gpu-spot": "SPOT"}


# Azure: the template that Ray's provider fills in.


def azure_problems(config: dict[str, Any], provider: dict[str, Any]) -> list[str]:
    template = Path(ray.autoscaler.__file__).parent / "_private" / "_azure" / "azure-vm-template.json"
    parameters = json.loads(template.read_text())["parameters"]
    # What AzureNodeProvider._create_node adds; availability_zone is taken out there.
    ray_adds = {"vmName", "provisionPublicIp", "vmTags", "vmCount", "msi", "nsg", "subnet", "zones"}
    ray_adds |= {"adminUsername", "publicKey"}  # by _configure_key_pair
    types = {"string": str, "securestring": str, "int": int, "bool": bool, "object": dict, "array": list}
    problems = [f"{name}: unknown" for name in config.keys() - parameters.keys() - {"availability_zone"}]
    problems += [
        f"{name}: {value!r} is no {parameters[name]['type']}"
        for name, value in config.items()
        if name in parameters and not isinstance(value, types[parameters[name]["type"]])
    ]
    needed = {name for name, kind in parameters.items() if "defaultValue" not in kind}
    return problems + [f"{name}: missing" for name in needed - config.keys() - ray_adds]


def test_azure_takes_every_field_and_gives_no_node_an_address_outside() -> None:
    config = load("azure")
    assert config["provider"]["use_internal_ips"] is True
    assert config["provider"]["use_external_head_ip"] is False
    for name, kind in config["available_node_types"].items():
        parameters = kind["node_config"]["azure_arm_parameters"]
        assert azure_problems(parameters, config["provider"]) == []
        assert (parameters.get("priority") == "Spot") == (name == "gpu-spot")
    planted = copy.deepcopy(parameters) | {"vmSiz": "x", "osDiskSize": "300"}
    del planted["vmSize"]
    assert sorted(azure_problems(planted, {})) == ["osDiskSize: '300' is no int", "vmSiz: unknown", "vmSize: missing"]
