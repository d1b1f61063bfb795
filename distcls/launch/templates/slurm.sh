#!/bin/bash
# SLURM (bash script): two nodes of eight GPUs, in jobs that requeue themselves.
#   sbatch launch/slurm.sh --config configs/mine.yaml --data DATA --out runs/mine
#
# One task per GPU; `sbatch --nodes 4 launch/slurm.sh ...` takes four nodes. Each job ends before its
# time limit with everything saved, requeues itself and continues from there. Submit it from a folder
# on a shared file system. From the environment:
#   PYTHON   the interpreter, such as .venv/bin/python (default: python)
#   SHARED   folder that the preflight checks (default: the one it was submitted from)
#SBATCH --job-name=distcls
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
# USR1 to this script (B:), 300 s before the time limit: enough to finish a step and to save
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# one log for all requeues
#SBATCH --output=distcls-%j.out
#SBATCH --open-mode=append
set -euo pipefail

python=${PYTHON:-python}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*}
# jobs on one node must not collide; below 30000 the system hands out no ports of its own
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# since Slurm 22.05 srun no longer takes this from sbatch: each task would be left with one core
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Single quotes: SLURM_PROCID has a task's own value only on its node. Expanded here it would be this
# script's, and every process would be rank 0 (huggingface/accelerate#2816).
# exec: a signal to the task reaches python itself.
# --wait: a minute after the first task has left, all others are ended. --kill-on-bad-exit would not
# let them leave by themselves, and the step's code would be that of the signal instead of 75.
# shellcheck disable=SC2016
task=(srun --kill-on-bad-exit=0 --wait=60 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  exec "$@"' task)

"${task[@]}" "$python" -m distcls.launch.preflight --processes "$SLURM_NTASKS" --shared "${SHARED:-$PWD}"

"${task[@]}" "$python" -m distcls.train "$@" --processes "$SLURM_NTASKS" --resume auto &
step=$!

# srun passes the signal on to all tasks. TERM is not caught: it comes from scancel, after which the
# job must not requeue itself.
handed_on=no
trap 'handed_on=yes; kill -USR1 "$step" || true' USR1
while true; do
  code=0
  wait "$step" || code=$?
  if [[ $handed_on = no ]]; then break; fi
  handed_on=no # the signal ended `wait`, not the step
done

if [[ $code -eq 75 ]]; then # stopped by a signal, saved, ready to resume
  echo "job $SLURM_JOB_ID queues itself again after turn $((${SLURM_RESTART_COUNT:-0} + 1))"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
