"""The parity check: every layout must compute what one process computes. `scripts/parity.py` runs it.

The files, in reading order:

- `config`: `ParityConfig`, the keys of the command line; the small models that are trained, and the configuration of
  their runs. Imports no torch.
- `jobs`: the layouts that exist for a number of ranks, which model runs under which layout, and why a job is skipped.
- `trial`: makes the data, trains one model under one layout, and gathers its shards from all ranks.
- `driver`: what one rank does, from the process group to the verdict: the differences between two training runs, the
  tolerances, and what rank 0 prints.

docs/parity.md is the user's page.
"""
