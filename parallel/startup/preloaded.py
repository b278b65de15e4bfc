"""The first module that the process of `preload_workers` imports, before torch.

The process dies with the launcher, and the workers that are forked from it die with it. Ctrl-C ends the imports
silently.
"""

import os

from parallel.startup.launch import begin_process, die_with_parent

SERVER_PID = os.getpid()


def die_with_server() -> None:
    """Make a new worker die with the process that it was forked from. The processes of a worker are left alone."""
    global SERVER_PID
    if SERVER_PID:
        die_with_parent(SERVER_PID)
        SERVER_PID = 0


begin_process()
os.register_at_fork(after_in_child=die_with_server)
