"""Starting a run on several ranks, up to the point where a process group can exist.

In reading order:

- `launch`: starts worker processes on this machine, and reads a launcher's environment.
- `rendezvous`: the key-value store that the ranks share, and choices that rank 0 makes for all ranks.
- `preflight`: checks that all ranks run the same software and configuration.
"""
