"""cluster/kuberay: the manifests fit KubeRay's and Kubernetes' schemas, unknown fields refused, and give no rights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jsonschema.exceptions import best_match

from distft.serving.app import Settings, build
from tests.support import ROOT

FOLDER = ROOT / "cluster" / "kuberay"
RAY = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml", "RayService": "rayservice.yaml"}


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def ray_object(kind: str) -> dict[str, Any]:
    (found,) = objects(RAY[kind])
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", kind)
    return found


def cluster_of(found: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = found["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods_of(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = cluster_of(found)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """By kind, KubeRay's schema as an API server with ``fieldValidation=Strict`` takes it."""
    data = json.loads((Path(__file__).with_name("fixtures") / "kuberay_crds.json").read_text())
    strict(data)
    return {kind: {**schema, "definitions": data["definitions"]} for kind, schema in data["kinds"].items()}


def check(found: dict[str, Any], schema: dict[str, Any]) -> None:
    """Without looking whether the schema, which is large, is one."""
    error = best_match(jsonschema.Draft7Validator(schema).iter_errors(found))
    if error:
        raise error


def strict(node: Any) -> None:
    if isinstance(node, dict):
        if "properties" in node and isinstance(node["properties"], dict):
            node.setdefault("additionalProperties", False)
        for value in node.values():
            strict(value)
    elif isinstance(node, list):
        for value in node:
            strict(value)


@pytest.mark.parametrize("kind", RAY)
def test_ray_manifests_fit_kuberay(kind: str, schemas: dict[str, Any]) -> None:
    check(ray_object(kind), schemas[kind])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "autOptions"], {}),
        (["spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePul"], "Always"),
    ],
)
def test_a_planted_typo_is_found(path: list[Any], value: Any, schemas: dict[str, Any]) -> None:
    planted = copy.deepcopy(ray_object("RayCluster"))
    place: Any = planted
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=str(path[-1])):
        check(planted, schemas["RayCluster"])


def test_core_objects_fit_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for found in objects("base.yaml"):
        validate(found, "1.37", strict=True)
    for kind in RAY:
        for pod in pods_of(ray_object(kind)):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
            validate(whole, "1.37", strict=True)


@pytest.mark.parametrize("kind", RAY)
def test_containers_have_no_rights_and_the_cluster_wants_a_token(kind: str) -> None:
    found = ray_object(kind)
    assert cluster_of(found)["authOptions"] == {"mode": "token", "secretName": "distft-token"}
    for pod in pods_of(found):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_nothing_comes_in_but_from_the_cluster_its_operator_and_who_measures_it() -> None:
    (policy,) = [found for found in objects("base.yaml") if found["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {}
    rules = policy["spec"]["ingress"]
    assert all("ipBlock" not in source for rule in rules for source in rule["from"])
    assert [[port["port"] for port in rule.get("ports", [])] for rule in rules] == [[], [8000], [8080]]


def test_the_cluster_grows_from_no_gpu_on_spot_first() -> None:
    groups = {group["groupName"]: group for group in cluster_of(ray_object("RayCluster"))["workerGroupSpecs"]}
    assert {name: group["minReplicas"] for name, group in groups.items()} == {"gpu-spot": 0, "gpu-on-demand": 0}
    assert groups["gpu-spot"]["priority"] > groups["gpu-on-demand"]["priority"]
    assert groups["gpu-spot"]["labels"] == {"ray.io/market-type": "spot"}


def test_kueue_starts_the_job_with_all_of_its_pods() -> None:
    job, queues = ray_object("RayJob"), {found["kind"]: found for found in objects("queue.yaml")}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queues["LocalQueue"]["metadata"]["name"]
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # Kueue refuses a job without
    assert not cluster_of(job).get("enableInTreeAutoscaling")
    covered = set(queues["ClusterQueue"]["spec"]["resourceGroups"][0]["coveredResources"])
    for pod in pods_of(job):
        assert pod["containers"][0]["resources"]["requests"].keys() <= covered


def test_the_service_is_what_distft_builds() -> None:
    serve = yaml.safe_load(ray_object("RayService")["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == (build.__module__, build.__name__)
    settings = Settings.model_validate(application["args"])
    assert not settings.insecure
    head = cluster_of(ray_object("RayService"))["headGroupSpec"]["template"]["spec"]
    mounted = [mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]]
    assert str(Path(settings.key_file or "").parent) in mounted  # the gateway runs on any node, the proxy on the head
