"""The parity check: every layout must compute what one process computes. `scripts/parity.py` runs it.

The files, in reading order:

- `cases`: the small models that are trained, and the configuration of their runs. Imports no torch.
- `config`: `ParityConfig`, the keys of the command line, and the model that the user gives. Imports no torch.
- `batches`: the data, with packed rows and uneven padding.
- `layouts`: the layouts that exist for a number of ranks, and how a layout is written.
- `jobs`: which model runs under which layout, and why a job is skipped.
- `trial`: trains one model under one layout, and gathers its shards from all ranks.
- `compare`: the differences between two training runs, and the tolerances.
- `table`: the result of a job, and what rank 0 prints.
- `driver`: what one rank does, from the process group to the verdict.

docs/parity.md is the user's page.
"""
