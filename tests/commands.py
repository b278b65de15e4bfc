"""Running a command of the project in a test, as a user runs it."""

import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` in the project's directory, and return its exit status and output."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def printed_on_terminal(program: str, columns: int = 80) -> str:
    """Run a program under a pseudo-terminal, and return what it printed."""
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=child, stderr=child, env=environment)
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 65536):
            output += chunk
    except OSError:  # Linux raises it when the other end is closed.
        pass
    os.close(parent)
    assert process.wait() == 0, output
    return output.decode()
