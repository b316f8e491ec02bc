"""The files that start a fleet on many machines fit Ray, each other, and what docs/fleet.md says of them."""

import importlib.metadata
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import pytest

from fleet.options import parse
from tests.helpers import ROOT

RAY = importlib.util.find_spec("ray")  # to import it takes a second
if RAY is None:
    pytest.skip("ray is not installed", allow_module_level=True)
jsonschema, yaml = pytest.importorskip("jsonschema"), pytest.importorskip("yaml")

VERSION = re.search(r"^ray\S*==(\S+)$", (ROOT / "fleet/requirements.txt").read_text(), re.MULTILINE)[1]


def read(name: str) -> dict:
    """Read a YAML file of the fleet."""
    return yaml.safe_load((ROOT / "fleet" / name).read_text())


def test_rays_launcher_takes_the_cluster():
    """By its own schema; and a VM that is taken away is replaced, because there are never to be fewer."""
    cluster, schema = read("cluster.yaml"), Path(RAY.origin).parent / "autoscaler/ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    types = cluster["available_node_types"]
    head, tpu = types[cluster["head_node_type"]], types["tpu"]
    assert set(types) == {cluster["head_node_type"], "tpu"}
    assert "scheduling" not in head["node_config"] and tpu["node_config"]["schedulingConfig"] == {"spot": True}
    assert tpu["min_workers"] == tpu["max_workers"] == cluster["max_workers"]
    assert tpu["node_config"]["acceleratorType"] == f"v6e-{tpu['resources']['TPU']}"
    assert "~/.ray/auth_token" in cluster["file_mounts"].values()
    assert any("RAY_AUTH_MODE=token" in command for command in cluster["initialization_commands"])


def test_the_job_for_kuberay():
    """Its hosts are those of the topology, all pods see the bucket, and its command is one that KubeRay can pass on."""
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] and workers["numOfHosts"] == 1
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], workers)]
    for pod in pods:
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert pods[0]["volumes"] == pods[1]["volumes"]
    sides = pods[1]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(pods[1]["containers"][0]["resources"]["limits"]["google.com/tpu"])
    assert math.prod(map(int, sides)) == chips
    # KubeRay puts the command into a line of a shell that runs in another pod.
    assert not re.search(r"[;&|<>$`'\"\n]", job["spec"]["entrypoint"])


def test_the_version_of_ray_is_the_same_everywhere():
    image = re.search(r"^FROM rayproject/ray:([\d.]+)-py3\d+$", (ROOT / "fleet/Dockerfile").read_text(), re.MULTILINE)
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == image[1] == VERSION
    assert importlib.metadata.version("ray") == VERSION


def test_both_run_the_fleet_in_the_checkout():
    """Where the files put it, with the folder that all machines see."""
    cluster, job = read("cluster.yaml"), read("rayjob.yaml")
    checkout = next(path for path, source in cluster["file_mounts"].items() if source == ".")
    for command in (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]):
        assert f"~/{Path(checkout).name}" in command
    start, _, command = job["spec"]["entrypoint"].partition(" python -m fleet ")
    assert start.split()[0] == "env" and "--chdir=/home/ray/cogvideox-tpu" in start.split()
    assert f"/home/ray/{Path(checkout).name}" in (ROOT / "fleet/Dockerfile").read_text()
    mount = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]
    options = parse(shlex.split(command)).options
    for path in (options.prompt_file, options.model_id, options.output_dir, options.compilation_cache):
        assert str(path).startswith(f"{mount['mountPath']}/")
    assert options.address == "auto"
