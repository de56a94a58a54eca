"""The files of examples/deploy and examples/serve_7b.sh give the server options that it has."""

import json
import re
import shlex
import tomllib
from collections.abc import Sequence

import yaml

from megatron_7b.cli.commands.serve import _parser
from megatron_7b.cli.options import parse_arguments
from tests.slurm.test_plan import REPOSITORY, Plan, run_script

DEPLOY = REPOSITORY / "examples" / "deploy"


def accepted(words: Sequence[str]) -> dict[str, object]:
    """Return the flags of a command line; it is refused if there is an unknown one."""
    read = parse_arguments(_parser(), list(words))
    assert read.problems == []
    return vars(read.flags)


def test_docker() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    entry, command = (json.loads(re.search(rf"^{name} (.*)$", text, re.MULTILINE)[1]) for name in ("ENTRYPOINT", "CMD"))  # type: ignore[index]
    assert entry[:2] == ["megatron-7b", "serve"]
    assert accepted([*entry[2:], *command])["api_key_file"] is not None
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (torch,) = (one for one in project["dependencies"] if one.startswith("torch>"))
    assert f'ARG TORCH="{torch} --index-url' in text, "another torch would be replaced by one for GPUs"


def test_kubernetes() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = accepted(container["args"])
    assert pod["terminationGracePeriodSeconds"] > flags["stop_seconds"]  # type: ignore[operator]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_systemd() -> None:
    text = (DEPLOY / "megatron-7b.service").read_text()
    command = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert command is not None
    flags = accepted(shlex.split(command[1])[2:])
    assert int(re.search(r"TimeoutStopSec=(\d+)", text)[1]) > flags["stop_seconds"]  # type: ignore[index, operator]


def test_slurm() -> None:
    environment = {"NODES": "1", "GPUS_PER_NODE": "4"}
    script = REPOSITORY / "examples" / "serve_7b.sh"
    shown = run_script("--dry-run", "--checkpoint", "/runs/a", environment=environment, script=script)
    assert shown.returncode == 0, shown.stderr
    (node,) = Plan(shown.stdout).nodes
    words = " ".join(node).partition(" -m megatron_7b serve ")[2].split()
    assert accepted(words)["nproc"] == 4
    assert "--parallel.tensor-model-parallel-size 4" in " ".join(words)
