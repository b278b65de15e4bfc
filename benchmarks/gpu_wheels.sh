#!/usr/bin/env bash
# Collect in .whl/ the wheels that `train.py` needs on a machine without a network: Python 3.12, Linux, x86-64.
#
#     benchmarks/gpu_wheels.sh              hydra and what it needs (0.4 MB)
#     benchmarks/gpu_wheels.sh deepspeed    also DeepSpeed and what it needs (5 MB); PYTHON must have torch
#
# torch, numpy, sentencepiece, safetensors, filelock, PyYAML, rich and matplotlib are expected on that machine.
# PYTHON is the Python that runs pip here; its version does not matter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
target=.whl
mkdir -p "$target"

fetch() {
  "$python" -m pip download --quiet --dest "$target" --only-binary=:all: \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any "$@"
}

fetch --no-deps hydra-core==1.3.8 omegaconf==2.3.1
# These exist as source packages only. They contain no compiled code, so a wheel built by any Python works.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$target" antlr4-python3-runtime==4.9.3
if [ "${1:-}" = deepspeed ]; then
  fetch hjson==3.1.0 pydantic
  DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$target" deepspeed==0.19.8
fi

ls -l "$target"
echo "Install there: python3 -m pip install --no-index --no-deps --target /tmp/site $target/*.whl"
echo "Then: export PYTHONPATH=/tmp/site:."
