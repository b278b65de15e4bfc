"""What holds for all tests, before any module of the project is imported."""

import os
import signal
from pathlib import Path

# A shell that starts the tests in the background ignores these signals for them. Tests send them to processes.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Without an NVIDIA GPU, Triton's interpreter runs the kernels. Triton reads the variable when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
