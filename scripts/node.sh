#!/usr/bin/env bash
# Start the workers of one node with torchrun. Run it on every node of a run with the same arguments and variables:
#
#   NPROC=2 scripts/node.sh experiment=quickstart                                       one node
#   HEAD=node1 NODES=2 JOB=first scripts/node.sh experiment=quickstart run.name=first   several nodes
#
# NODES    the number of nodes, or the fewest and the most of them as in 1:4; default 1
# HEAD     the name or address of one of several nodes, reachable from all; the agents meet at HEAD:PORT
# JOB      a word that no other launch at this HEAD:PORT uses; one node needs none
# NPROC    the number of processes on this node; default gpu, one per GPU
# PORT     default 29400
# ADDRESS  the name or address under which other nodes reach this node; default its host name
# RESTARTS the number of times that all workers are restarted after one has failed; default 3
# PYTHON   default .venv/bin/python, else python3
#
# slurm.sbatch and kubernetes.yaml in this directory start this script too. docs/clusters.md explains all variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NODES=${NODES:-1}
if [[ $NODES == 1 ]]; then
    # A file of mode 0600, which torchrun creates. Its default is a server on all interfaces.
    rendezvous=(--rdzv-conf store_type=file)
else
    for name in HEAD JOB; do
        if [[ -z ${!name:-} ]]; then
            echo "error: $name=: expected a value in the environment (see scripts/node.sh)" >&2
            exit 2
        fi
    done
    if [[ $NODES == *:* && " $*" != *" run.name="* ]]; then
        echo "error: run.name=: expected a name, because another node can have rank 0 after nodes have come or gone" >&2
        exit 2
    fi
    rendezvous=(--rdzv-endpoint "$HEAD:${PORT:-29400}")
fi
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NODES" \
    --nproc-per-node "${NPROC:-gpu}" \
    --rdzv-backend c10d \
    "${rendezvous[@]}" \
    ${JOB:+--rdzv-id "$JOB"} \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --max-restarts "${RESTARTS:-3}" \
    ${ADDRESS:+--local-addr "$ADDRESS"} \
    train.py "$@"
