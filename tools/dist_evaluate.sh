#!/usr/bin/env bash
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
# Run tools/evaluate.py on N devices of this machine, or of NNODES machines that share --out:
#   bash tools/dist_evaluate.sh CONFIG N [options of evaluate.py]
# A process that dies ends all of them at once; the same command goes on where they were.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: bash tools/dist_evaluate.sh CONFIG N [options of evaluate.py]" >&2
    exit 2
fi
CONFIG=$1
DEVICES=$2
shift 2

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
PORT=${PORT:-29500}
PYTHON=${PYTHON:-python}

exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NNODES" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --master_port="$PORT" \
    --nproc_per_node="$DEVICES" \
    "$(dirname "$0")/evaluate.py" \
    "$CONFIG" --launcher pytorch "$@"
