#!/usr/bin/env bash
# This node's part of a run over several nodes. Start it on each of them with the same arguments and variables:
#
#   HEAD=node1 NODES=2 JOB=first scripts/node.sh experiment=quickstart run.name=first
#
# HEAD     name or address of one of the nodes, reachable from all; the agents meet at HEAD:PORT
# NODES    number of nodes
# JOB      a word that no other launch at this HEAD:PORT uses
# NPROC    processes on this node; default gpu, one a GPU
# PORT     default 29400
# ADDRESS  how other nodes reach this one; default its host name
# RESTARTS how often all workers are started again after one has failed; default 3
# PYTHON   default .venv/bin/python, else python3
#
# slurm.sbatch and kubernetes.yaml beside this file start it too. The other variables: docs/clusters.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for name in HEAD NODES JOB; do
    if [[ -z ${!name:-} ]]; then
        echo "error: $name=: expected a value in the environment (see scripts/node.sh)" >&2
        exit 2
    fi
done
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NODES" \
    --nproc-per-node "${NPROC:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:${PORT:-29400}" \
    --rdzv-id "$JOB" \
    --max-restarts "${RESTARTS:-3}" \
    ${ADDRESS:+--local-addr "$ADDRESS"} \
    train.py "$@"
