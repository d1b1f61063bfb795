#!/bin/bash
# torchrun (bash script): restarts failed processes from the last state.
#   launch/elastic.sh --config configs/mine.yaml --data DATA --out runs/mine
#
# It restarts them up to RESTARTS times. On multiple machines run it on each, with the same values and
# --out on a shared file system:
#   MACHINES=2 MEETING=host0:29400 RUN=mine launch/elastic.sh ...
# If a machine dies, the others wait for it: start the same command on it again. The machine of MEETING hosts
# the rendezvous; if it dies, all end, and have to be started again.
#   MACHINES=1:4 ...
# runs on one to four of them, and restarts when one leaves or joins.
# From the environment:
#   PROCESSES  per machine (default: gpu, which is one per GPU; 2, for example, on CPUs)
#   RESTARTS   of all processes, when one has died (default: 3), counted on each machine
#   MACHINES   how many, or MIN:MAX (default: 1)
#   MEETING    HOST:PORT of one machine; port 0 is a free one, for a machine that is alone
#   ADDRESS    of this machine, for all others (default: its host name, which they have to resolve);
#              where it is MEETING's host, this machine hosts the rendezvous
#   JOIN       seconds to wait until enough machines are there (default: 600); a dead one's slot is
#              free 15 s after its last heartbeat
#   LAST_CALL  seconds to wait for more once MIN are there, short of MAX (default: 30)
#   RUN        name of the run, the same on all machines, unique at that rendezvous
#   PYTHON     the interpreter (default: python)
set -euo pipefail

# how long torchrun, when stopped, lets its processes finish the step and save (30 by default)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# A new rendezvous store for each start. torchrun 2.14 keeps one for all of them (2.11 to 2.13 not
# tried), where the processes started again find the addresses of the dead ("Gloo connectFullMesh
# failed ... Connection refused")
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

meeting=${MEETING:-localhost:0}
conf=join_timeout=${JOIN:-600},last_call_timeout=${LAST_CALL:-30}
address=()
if [[ -n ${ADDRESS:-} ]]; then
  address=(--local-addr "$ADDRESS")
  # torchrun compares MEETING's host with the host name alone
  if [[ ${meeting%:*} == "$ADDRESS" ]]; then conf+=,is_host=true; else conf+=,is_host=false; fi
fi
# exec: SIGTERM reaches torchrun itself, which passes it on
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${MACHINES:-1}" \
  --nproc-per-node "${PROCESSES:-gpu}" \
  --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$meeting" \
  --rdzv-conf "$conf" \
  --rdzv-id "${RUN:-distcls}" \
  ${address[@]+"${address[@]}"} \
  -m distcls.train "$@" --resume auto
