"""Sharded checkpoints, saved and loaded by all ranks of a run.

In reading order:

- `checkpoint`: `save` and `load`, the collective operations.
- `manifest`: the file that makes a directory a checkpoint, and the checkpoints of a run: finding the newest one that is
  not damaged, deleting old ones.
- `remote`: copies of the checkpoints in a store. `remote_files`: the files of a store, through fsspec.
- `shards`: which rank writes which region, and how regions are written to and read from safetensors files.
"""
