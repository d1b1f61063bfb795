#!/bin/bash
# launch/elastic.sh --config configs/mine.yaml --data DATA --out runs/mine
#
# torchrun that starts again what has died, up to RESTARTS times, and goes on from the last state.
# On several machines run it on each, with the same values and --out in a folder that all share:
#   MACHINES=1:4 MEETING=host0:29400 RUN=mine launch/elastic.sh ...
# starts with one to four of them, and starts again with those left, or with one more that comes.
# From the environment:
#   PROCESSES  a machine (default: gpu, which is one a GPU; say 2 on CPUs)
#   RESTARTS   of all processes, when one has died (default: 3)
#   MACHINES   how many, MIN:MAX (default: 1)
#   MEETING    HOST:PORT of one machine; port 0 is a free one, for a machine that is alone
#   RUN        name of the run, the same on all machines, of no other run at that meeting point
#   PYTHON     the interpreter (default: python)
set -euo pipefail

# how long torchrun, told to stop, lets its processes finish the step and save (30 by default)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# A new meeting store for each start. torchrun 2.14 keeps one for all of them (2.11 to 2.13 not
# tried), where the processes started again find the addresses of the dead ("Gloo connectFullMesh
# failed ... Connection refused")
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# exec: SIGTERM reaches torchrun itself, which hands it on
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${MACHINES:-1}" \
  --nproc-per-node "${PROCESSES:-gpu}" \
  --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${MEETING:-localhost:0}" \
  --rdzv-id "${RUN:-distcls}" \
  -m distcls.train "$@" --resume auto
