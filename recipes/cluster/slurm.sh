#!/bin/bash
# Slurm: one task per machine starts accelerate, which starts one process per GPU.
#
#   sbatch --nodes 2 recipes/cluster/slurm.sh prune MODEL --experts 40 -o out
#
# MODEL and out lie on a file system that all machines share. --requeue is safe: a run that was
# preempted or killed goes on from its last saved chunk, also with another number of machines.
#SBATCH --job-name=moe-fair
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

config=recipes/cluster/two-machines.yaml
nodes=${SLURM_NNODES:?start it with sbatch}
per_node=${SLURM_GPUS_ON_NODE:-8}
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${names%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one machine do not meet

# SLURM_NODEID is another number in every task: it is read there, not here
export first port nodes per_node config
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$config" \
        --num_machines "$nodes" --num_processes $((nodes * per_node)) \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$first" --main_process_port "$port" \
        -m moe_fair "$@"' moe-fair "$@"
