"""cluster/aws.yaml and its stack in moto's AWS: Ray gets as far as instances that run, and nobody else gets in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import botocore.exceptions
import pytest
import yaml
from moto import mock_aws

from tests.support import ROOT

#: What moto's CloudFormation needs is heavy: it is not among the packages for development.
pytest.importorskip("cfnlint", reason="cfn-lint is not installed; pip install 'moto[cloudformation]'")
pytestmark = pytest.mark.slow  # half a minute on a free machine: moto loads all of AWS's managed policies

FOLDER = ROOT / "cluster"
#: moto takes a parameter's default from its own parameter store, where names of AWS may not be put.
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """cluster/aws.yaml as ``ray up`` has it, once the stack is there."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-west-2",
            "HOME": str(tmp_path_factory.mktemp("home")),  # where Ray puts the key pair that it makes
        }.items():
            patch.setenv(name, value)
        with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
            image = boto3.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
            boto3.client("ssm").put_parameter(Name="image", Value=image, Type="String")
            template = (FOLDER / "aws-stack.yaml").read_text()
            assert IMAGE in template
            boto3.client("cloudformation").create_stack(
                StackName="distft", TemplateBody=template.replace(IMAGE, "image"), Capabilities=["CAPABILITY_IAM"]
            )
            found = prepare_config(yaml.safe_load((FOLDER / "aws.yaml").read_text()))
            validate_config(found)
            yield bootstrap_aws(found)


def create(config: dict[str, Any], node: str, **change: Any) -> dict[str, Any]:
    """An instance as Ray starts it, and as AWS describes it."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {"ray-node-kind": "head" if node == "head" else "worker", "ray-user-node-type": node, "ray-node-name": node}
    node_config = config["available_node_types"][node]["node_config"] | change
    (instance,) = provider.create_node(node_config, tags | {"ray-launch-config": "hash"}, 1)
    found = boto3.client("ec2").describe_instances(InstanceIds=[instance])
    described: dict[str, Any] = found["Reservations"][0]["Instances"][0]
    return described


@pytest.mark.parametrize(
    ("node", "kind", "market"),
    [("head", "m7i.xlarge", None), ("gpu-spot", "g6.12xlarge", "spot"), ("gpu-on-demand", "g6.12xlarge", None)],
)
def test_ray_starts_the_instances(node: str, kind: str, market: str | None, config: dict[str, Any]) -> None:
    made = create(config, node)
    assert (made["InstanceType"], made.get("InstanceLifecycle")) == (kind, market)
    tags = {tag["Key"]: tag["Value"] for tag in made["Tags"]}
    assert (tags["ray-cluster-name"], tags["ray-user-node-type"]) == ("distft", node)
    role = "HeadProfile" if node == "head" else "WorkerProfile"
    assert role in made["IamInstanceProfile"]["Arn"]


def test_nobody_outside_gets_in(config: dict[str, Any]) -> None:
    """Ray would make a group of its own, with port 22 open to the world, where it is not given one."""
    groups = {
        group["GroupId"]
        for node in config["available_node_types"]
        for interface in create(config, node)["NetworkInterfaces"]
        for group in interface["Groups"]
    }
    (group,) = boto3.client("ec2").describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
    (rule,) = group["IpPermissions"]
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group["GroupId"]]
    assert not rule["IpRanges"]
    assert not rule["Ipv6Ranges"]


def test_a_field_that_aws_does_not_know_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(botocore.exceptions.ParamValidationError, match="InstanceTyp"):
        create(config, "gpu-spot", InstanceTyp="g6.12xlarge")


def test_workers_may_use_the_bucket_and_nothing_else(config: dict[str, Any]) -> None:
    iam = boto3.client("iam")
    roles = {role["RoleName"]: role for role in iam.list_roles()["Roles"]}
    (worker,) = [name for name in roles if "WorkerRole" in name]
    assert iam.list_role_policies(RoleName=worker)["PolicyNames"] == []
    (attached,) = iam.list_attached_role_policies(RoleName=worker)["AttachedPolicies"]
    version = iam.get_policy_version(PolicyArn=attached["PolicyArn"], VersionId="v1")["PolicyVersion"]
    actions = [statement["Action"] for statement in version["Document"]["Statement"]]
    assert all("s3:" in str(action) and "*" not in str(action) for action in actions)


def test_cfn_lint_finds_nothing_in_the_stack() -> None:
    from cfnlint.api import lint_file

    assert [str(match) for match in lint_file(FOLDER / "aws-stack.yaml")] == []
