"""Without an NVIDIA GPU, Triton's interpreter runs the kernels. Triton reads the variable when it is first imported."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
