"""The launch scripts in scripts/ are valid for their schedulers, for torchrun and for `sightline train`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from sightline.cli.train import parse
from tests.test_commands import check_trainable

SCRIPTS = Path(__file__).parent.parent / "scripts"


def read(name: str) -> Any:
    return pytest.importorskip("yaml").safe_load((SCRIPTS / "kubernetes" / name).read_text())


def container_of(template: dict[str, Any]) -> dict[str, Any]:
    (container,) = template["spec"]["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
    return container


def check(container: dict[str, Any], world: int) -> Any:
    """Parse the command as torchrun and `sightline train` do, for `world` ranks; return the options of torchrun."""
    program, *words = [*container["command"], *container["args"]]
    options = get_args_parser().parse_args(words)
    assert program == "torchrun" and options.module and options.training_script == "sightline"
    command, *rest = options.training_script_args
    run = parse(rest)
    assert command == "train" and run.output_dir.is_relative_to("/shared")
    check_trainable(run, world)
    return options


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurm() -> None:
    script = SCRIPTS / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    for words in ("#SBATCH --signal=TERM@300", '-m sightline train "$@"'):
        assert words in text


def test_pytorchjob() -> None:
    job = read("pytorchjob.yaml")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    container = container_of(worker["template"])
    world = worker["replicas"] * int(job["spec"]["nprocPerNode"])
    assert check(container, world).shutdown_timeout < worker["template"]["spec"]["terminationGracePeriodSeconds"]
    assert container["name"] == "pytorch"  # the operator requires this name
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]


def test_jobset() -> None:
    jobset = read("jobset.yaml")
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    container = container_of(job["template"])
    options = check(container, job["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"])
    assert options.shutdown_timeout < job["template"]["spec"]["terminationGracePeriodSeconds"]
    assert options.nnodes == str(job["parallelism"]) == str(job["completions"])
    assert options.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    first = f"{jobset['metadata']['name']}-{workers['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    assert options.rdzv_endpoint == f"{first}:{container['ports'][0]['containerPort']}"
