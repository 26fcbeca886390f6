"""What is wrong with a cluster's nodes, from what they say; and the measuring of networks and shared folders."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from distft.orchestrate.doctor import _lack
from distft.orchestrate.nodes import shared as shared_files
from distft.orchestrate.nodes.facts import Facts, Room, gather, interface_of
from distft.orchestrate.nodes.findings import Finding, Report, Trouble, describe, judge, of_room
from distft.orchestrate.nodes.network import Connection, Link, Listener, Network, rate
from distft.orchestrate.nodes.shared import DRIVER, Shared, trouble_of

VERSIONS = {"python": "3.11.7", "torch": "2.13.0+cpu", "ray": "2.60.0", "distft": "0.1.0", "distft's source": "a1"}
DRIVERS = Facts("head", VERSIONS, "eth0", None, ())
SOUND = Report("10.0.0.2", facts=replace(DRIVERS, host="host2"))


def judged(report: Report) -> list[Finding]:
    return judge(DRIVERS, [SOUND, report])


def test_equal_nodes_leave_nothing_to_say() -> None:
    assert judged(SOUND) == []


def test_a_build_of_torch_for_another_device_is_the_same_version() -> None:
    facts = replace(DRIVERS, versions={**VERSIONS, "torch": "2.13.0+cu130"})
    assert judged(replace(SOUND, facts=facts)) == []


def test_other_versions_are_named_each_beside_the_drivers() -> None:
    there = {**VERSIONS, "torch": "2.12.1", "transformers": "5.0"}
    (found,) = judged(Report("10.0.0.3", facts=replace(DRIVERS, host="host3", versions=there)))
    assert (found.level, found.where) == ("problem", "10.0.0.3 (host3)")
    assert "torch 2.12.1, the driver has 2.13.0;" in found.text
    assert "transformers 5.0, the driver has none" in found.text
    assert "constraints.txt" in found.fix


def test_another_checkout_of_the_same_version_is_told_as_that() -> None:
    facts = replace(DRIVERS, versions={**VERSIONS, "distft's source": "b2"})
    (found,) = judged(replace(SOUND, facts=facts))
    assert found.level == "problem"
    assert "the same commit" in found.fix


def test_a_node_that_does_not_answer_is_a_problem_of_its_own() -> None:
    (found,) = judged(Report("10.0.0.3", error="ModuleNotFoundError: No module named 'distft'"))
    assert found.level == "problem"
    assert str(found).startswith("10.0.0.3: cannot be asked: ModuleNotFoundError: No module named 'distft'\n    see ")


def test_a_folder_that_is_not_shared_is_told_with_the_setting_that_names_it() -> None:
    trouble = Trouble("/data/runs", "--runs or DISTFT_RUNS", "does not see what the driver writes there")
    (found,) = judged(replace(SOUND, troubles=(trouble,)))
    assert found.level == "problem"
    assert found.text == "does not see what the driver writes there: /data/runs"
    assert "--runs or DISTFT_RUNS" in found.fix
    refused = Trouble("s3://states/runs", "checkpoint.storage", "access is refused (403)")
    (found,) = judged(replace(SOUND, troubles=(refused,)))
    assert "credentials, in the environment of `ray start`" in found.fix


@pytest.mark.parametrize(
    ("ahead", "error", "levels"),
    [(0.5, 0.0, []), (-1.5, 0.001, ["note"]), (1.5, 1.0, []), (31.0, 0.01, ["problem"]), (-3600.0, 0.01, ["problem"])],
)
def test_clocks_count_beyond_what_the_round_trip_leaves_open(ahead: float, error: float, levels: list[str]) -> None:
    found = judged(replace(SOUND, clock_seconds=ahead, clock_error_seconds=error))
    assert [one.level for one in found] == levels
    assert all(("ahead of" if ahead > 0 else "behind") in one.text for one in found)


def test_a_node_that_does_not_reach_another_is_named_with_it() -> None:
    (found,) = judged(replace(SOUND, unreached=(("10.0.0.3", "No route to host"),)))
    assert found.level == "problem"
    assert "does not reach 10.0.0.3: No route to host" in str(found)


GB = 10**9


@pytest.mark.parametrize(
    ("room", "levels"),
    [
        (Room("disk", "/runs", 50 * GB, 2000 * GB), []),
        (Room("disk", "/runs", 4 * GB, 100 * GB), ["note"]),
        (Room("disk", "/runs", GB // 10, 100 * GB), ["problem"]),
        (Room("Ray's disk", "/tmp/ray", 50 * GB, 2000 * GB), ["note"]),  # Ray makes no objects at 95 %
        (Room("memory", "memory", GB // 2, 8 * GB), ["note"]),
        (Room("shared memory", "/dev/shm", 64 << 20, 64 << 20), ["note"]),  # a container's
        (Room("shared memory", "/dev/shm", GB, 4 * GB), []),
    ],
)
def test_too_little_room_is_told(room: Room, levels: list[str]) -> None:
    found = list(of_room(room, "10.0.0.2"))
    assert [one.level for one in found] == levels
    assert all(one.fix and one.where == "10.0.0.2" for one in found)


def test_the_cluster_in_a_line_has_its_slowest_link() -> None:
    links = (Link("10.0.0.2", "10.0.0.3", 2e9, 0.0002), Link("10.0.0.3", "10.0.0.2", 12.5e6, 0.02))
    other = Report("10.0.0.3", facts=replace(DRIVERS, interface="ens5"))
    said = describe([SOUND, other], Network(("a", "b"), links))
    assert said == "2 nodes; 12.5 MB/s and 20 ms there and back between them; gloo at ens5, eth0"
    with_gpus = Report("10.0.0.2", facts=replace(DRIVERS, interface="ens5", nccl_interface="ens5"))
    assert describe([with_gpus], None) == "1 node; gloo at ens5, NCCL at ens5"


def test_the_rate_leaves_the_slow_beginning_out() -> None:
    begins_slowly = [(0.0, 1), (1.0, 25), (1.5, 75), (2.0, 100)]
    assert rate(begins_slowly) == pytest.approx(75)
    assert rate([(5.0, 7)]) == 0.0


def test_a_link_is_measured_and_strangers_are_passed_over() -> None:
    listener = Listener(b"our token")
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
    connection = Connection("127.0.0.1", listener.port, b"our token")
    assert 0 < connection.round_trip_seconds() < 1
    assert connection.bytes_per_second() > 1e6
    with pytest.raises(OSError, match=r"refused|reset"):
        Connection("127.0.0.1", listener.port, b"our token").round_trip_seconds()


def test_a_network_is_known_only_between_the_very_nodes_that_it_was_measured_between(tmp_path: Path) -> None:
    file = tmp_path / "network.json"
    assert Network.known(file, ["a", "b"]) is None
    network = Network(("a", "b"), (Link("1", "2", 1.0, 2.0), Link("2", "1", 3.0, 4.0)))
    network.keep(file)
    assert Network.known(file, ["b", "a"]) == network
    assert Network.known(file, ["a", "c"]) is None
    file.write_text("{}")
    assert Network.known(file, ["a", "b"]) is None


def test_nodes_that_see_the_same_folder_find_each_others_files(tmp_path: Path) -> None:
    place = Shared(str(tmp_path / "runs"), "--runs", "0123456789abcdef")
    place.write(DRIVER)
    assert trouble_of(place, "node") is None
    assert place.sees("node")
    place.clear()
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_node_with_another_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_files, "PATIENCE_SECONDS", 0.1)
    here = Shared(str(tmp_path), "--runs", "0123456789abcdef")
    assert trouble_of(here, "node") == "does not see what the driver writes there"
    assert trouble_of(replace(here, address=str(tmp_path / "none")), "node") == "has no such folder"
    (tmp_path / "file").touch()
    beside = replace(here, address=str(tmp_path / "file"))
    assert trouble_of(beside, "node") == "may not read or write there: Not a directory"


def test_a_file_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    place = Shared(str(tmp_path), "--runs", "0123456789abcdef")
    threading.Timer(0.3, place.write, [DRIVER]).start()
    assert place.sees(DRIVER)


def test_an_installation_that_cannot_be_imported_is_told_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
    command = [sys.executable, "-m", "distft", "doctor"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4
    assert "cannot be imported: libcudart.so.13" in done.stderr
    assert "constraints.txt" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the interface has another name elsewhere")
def test_the_interface_is_the_one_that_has_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None


def test_a_machine_says_what_it_is(tmp_path: Path) -> None:
    facts = gather("127.0.0.1", [str(tmp_path / "not" / "yet")], str(tmp_path))
    assert {"python", "torch", "ray", "deepspeed", "transformers", "distft", "distft's source"} <= set(facts.versions)
    assert {room.kind for room in facts.rooms} >= {"memory", "disk", "Ray's disk"}
    assert all(0 <= room.free_bytes <= room.total_bytes for room in facts.rooms)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("pytest>=1", None),
        ("pytest>=999", r"pytest [\d.]+ is installed, and >=999 is wanted"),
        ("no-such-package", "no-such-package is missing"),
    ],
)
def test_what_the_installation_lacks(wanted: str, said: str | None) -> None:
    lack = _lack(Requirement(wanted))
    assert lack is None if said is None else re.fullmatch(said, lack or "")
