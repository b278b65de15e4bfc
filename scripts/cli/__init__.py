"""The command line: from arguments to one validated configuration, and from errors to one line.

Module map:

* `overrides`: arguments as the shell gives them -> overrides in Hydra's grammar.
* `help`: the text of `train.py --help`, from the dataclasses and the presets.
* `command_line`: arguments -> composed configuration as plain dicts; the directory and the jobs of a sweep; what the
  user sees when something fails, and the exit status; `run_tool`, the `main` of every tool in scripts/.
* `workers`: runs a function in this process or in worker processes that it starts.

Hydra is used here and in train.py only.
"""
