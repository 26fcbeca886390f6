"""cluster/onprem.yaml for real: ``ray up`` over SSH on hosts of their own (``host.sh``), and its tear-down."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.test_hosts import SCRIPT, WHY_NOT
from tests.support import ROOT

MISSING = [tool for tool in ("/usr/sbin/sshd", "ssh", "rsync") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
BIN = Path(sys.executable).parent
START_SECONDS = 400


class Machines:
    """Three hosts with an SSH server each, and a copy of the repository to call ``ray up`` in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repository = folder, folder / "repository"
        net = f"10.78.{os.getpid() % 256}"
        self.addresses = [f"{net}.1{number}" for number in range(3)]
        self.environment = {
            **os.environ,
            "HOSTS_DIR": str(folder / "hosts"),
            "HOSTS_NET": net,
            "HOME": str(folder / "client"),
            "RAY_TMPDIR": str(folder / "tmp"),  # where `ray up` remembers what it started
            "PATH": f"{folder / 'bin'}:{BIN}:{os.environ['PATH']}",
        }
        # ssh asks the user's record for the home, not HOME: the hosts that it knows are kept here all the same.
        ssh = folder / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -o UserKnownHostsFile={folder}/known "$@"\n')
        ssh.chmod(0o755)
        (folder / "tmp").mkdir()
        (folder / "shared").mkdir()
        (folder / "client" / ".ray").mkdir(parents=True)
        self.run("ray", "get-auth-token", "--generate")
        self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
        self.copy_repository()
        self.processes = [self.start(number) for number in range(3)]

    def run(self, *command: str, status: int | None = 0, timeout: float = START_SECONDS) -> str:
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.repository if self.repository.exists() else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert status is None or done.returncode == status, f"{command} ended with {done.returncode}\n{done.stdout}"
        return done.stdout

    def copy_repository(self) -> None:
        """With these hosts' addresses; all of them see the same files anyway."""
        for name in ("distft", "cluster"):
            shutil.copytree(ROOT / name, self.repository / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.repository)
        values = self.repository / "cluster" / "values.env"
        values.write_text(values.read_text().replace("/mnt/distft", str(self.folder / "shared")))
        file = self.repository / "cluster" / "onprem.yaml"
        config = yaml.safe_load(file.read_text())
        config["provider"] |= {"head_ip": self.addresses[0], "worker_ips": self.addresses[1:]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.folder / "key")}
        file.write_text(yaml.safe_dump(config, sort_keys=False))

    def start(self, number: int) -> subprocess.Popen[bytes]:
        """A host whose root has a home of its own, with what ``node.sh setup`` would take minutes to install."""
        self.run("bash", SCRIPT, "up", str(number))
        home = self.folder / f"home{number}"
        tools = home / "distft" / ".venv" / "bin"
        tools.mkdir(parents=True)
        for tool in ("python", "ray", "distft"):
            (tools / tool).symlink_to(BIN / tool)
        installed = (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text()
        (home / "distft" / ".venv" / "installed").write_text(installed)
        passwd = self.folder / f"passwd{number}"
        passwd.write_text(Path("/etc/passwd").read_text().replace(":/root:", f":{home}:"))
        self.run("bash", SCRIPT, "run", str(number), "mount", "--bind", str(passwd), "/etc/passwd")
        host_key = self.folder / f"host{number}"
        self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key))
        Path("/run/sshd").mkdir(exist_ok=True)
        keys = f"AuthorizedKeysFile={self.folder / 'key.pub'}"
        options = ["-f", "/dev/null", "-h", str(host_key), "-o", keys, "-o", "StrictModes=no", "-o", "UsePAM=no"]
        command = ["bash", SCRIPT, "run", str(number), "/usr/sbin/sshd", "-D", *options, "-o", "PidFile=none"]
        return subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL)

    def rays(self) -> list[str]:
        """Processes of Ray on all hosts."""
        found = [
            self.run("bash", SCRIPT, "run", str(n), "pgrep", "-af", "^ray::|/site-packages/ray/", status=None)
            for n in range(3)
        ]
        return [line for lines in found for line in lines.splitlines()]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    made = Machines(tmp_path_factory.mktemp("m"))
    try:
        yield made
    finally:
        made.run("bash", SCRIPT, "clean")
        for process in made.processes:
            process.wait(30)


def test_the_cluster_comes_up_whole_and_goes_without_a_trace(machines: Machines) -> None:
    started = time.monotonic()
    machines.run("ray", "up", "--yes", "--no-config-cache", "cluster/onprem.yaml")
    head = machines.addresses[0]
    status = ["env", "RAY_AUTH_MODE=token", "ray", "status", f"--address={head}:6379"]
    until = time.monotonic() + START_SECONDS
    while " 3 local.cluster.node" not in machines.run(*status, status=None):
        assert time.monotonic() < until, machines.run(*status, status=None)
        time.sleep(2)
    print(f"head and two workers after {time.monotonic() - started:.0f} s")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((head, 8265), timeout=5)  # the dashboard: on loopback only
    refused = machines.run("env", "RAY_AUTH_MODE=disabled", *status[2:], status=None)
    assert "local.cluster.node" not in refused
    assert len(machines.rays()) > 10

    machines.run("bash", "cluster/onprem-down.sh")
    assert machines.rays() == []


def test_a_machine_that_does_not_answer_is_named(machines: Machines) -> None:
    """After the test above."""
    machines.run("bash", SCRIPT, "down", "2")
    said = machines.run("bash", "cluster/onprem-down.sh", status=1)
    assert f"{machines.addresses[2]}: not ended" in said
    assert f"{machines.addresses[0]}: no process of Ray is left" in said
