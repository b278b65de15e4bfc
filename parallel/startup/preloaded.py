"""The first module that the process of `preload_workers` imports. After it, Ctrl-C ends the imports silently."""

from parallel.startup.launch import interrupts_end_imports

interrupts_end_imports()
