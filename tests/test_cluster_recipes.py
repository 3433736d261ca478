"""The files of recipes/cluster: accelerate reads them, and Slurm's script starts what it says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from places import ROOT

CLUSTER = ROOT / "recipes" / "cluster"


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("one-machine", 1, 8), ("two-machines", 2, 16)]
)
def test_accelerate_reads_them(name: str, machines: int, processes: int) -> None:
    file = str(CLUSTER / f"{name}.yaml")
    config = load_config_from_file(file)
    assert (config.num_machines, config.num_processes) == (machines, processes)
    parsed = launch_command_parser().parse_args(
        ["--config_file", file, "--machine_rank", str(machines - 1), "-m", "moe_fair", "prune"]
    )
    given, _, _ = _validate_launch_command(parsed)
    assert given.multi_gpu
    assert not given.use_cpu
    assert given.machine_rank == machines - 1
    assert given.training_script == "moe_fair"


def test_slurm_starts_one_launcher_per_machine(tmp_path: Path) -> None:
    """srun and scontrol answer as on two machines; accelerate notes how it was called."""
    programs = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "accelerate": f'echo "$@" >> {tmp_path}/calls',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "123456"}
    environment = {
        **os.environ, **slurm, "SLURM_JOB_NODELIST": "node-[a-b]",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    command = ["prune", "a model", "--experts", "40", "-o", "out"]
    subprocess.run([CLUSTER / "slurm.sh", *command], cwd=ROOT, env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    for rank, call in enumerate(calls):
        assert f"--machine_rank {rank} --main_process_ip node-a --main_process_port 23456" in call
        assert "--num_machines 2 --num_processes 8" in call
        assert call.endswith("-m moe_fair prune a model --experts 40 -o out")
