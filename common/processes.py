"""What the kernel says about the processes of this host."""

import os
from pathlib import Path


def process_stat(pid: int) -> list[str]:
    """Return the fields of a process in proc_pid_stat(5) from the third on; empty if it is gone or there is no /proc.

    The first of them is the state, such as `T` if the process is stopped. The start time has index 19.
    """
    try:
        # The command name, the second field, is in parentheses and can contain spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def process_state(pid: int) -> str:
    """Return the state of a process, such as `T` if it is stopped; empty if it is gone or there is no /proc."""
    return next(iter(process_stat(pid)), "")


def has_ended(pid: int) -> bool:
    """Return whether a process of this host has ended; False where there is no /proc to tell."""
    return process_state(pid) in ("", "Z", "X") and process_stat(os.getpid()) != []
