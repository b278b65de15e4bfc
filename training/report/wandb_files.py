"""What W&B has on disk: the rows in the `.wandb` files of a run, read back without its service.

A `.wandb` file is a log in LevelDB's format: 7 bytes of header, then blocks of 32 KiB that contain chunks. W&B writes
whole blocks only, so the last rows of a killed run are missing, and its last record can be incomplete.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.files import open_binary

MAGIC, HEADER_BYTES, BLOCK_BYTES = b":W&B", 7, 32768
CHUNK = struct.Struct("<IHB")
"""Of every chunk: CRC-32 of kind and content, bytes of the content, kind."""
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
"""Kinds of chunks: a whole record, or a part of one."""


def logged_steps(directory: Path, run_id: str) -> set[int]:
    """Return the steps of the rows in all `.wandb` files of a run, up to the first damage in each file.

    A record that a kill has left incomplete at the end of a file is removed. `wandb sync` would stop there, and would
    not upload the files of later launches.

    Args:
        directory: the directory `wandb` of the run, in which no process writes.
    """
    from wandb.proto import wandb_internal_pb2

    steps = set()
    for path in directory.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        for content in read_records(path):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(content)
            names = (item.key or item.nested_key[0] for item in record.history.item)
            # A row with pictures only is not a row of metrics.jsonl.
            if "train/loss" in names:
                steps.add(record.history.step.num)
    return steps


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of the file `path` up to its end or its first damage, and remove an incomplete last record."""
    with open_binary(path) as file:
        if file.read(HEADER_BYTES)[: len(MAGIC)] != MAGIC:
            return
        record, complete = b"", HEADER_BYTES
        while True:
            rest = BLOCK_BYTES - file.tell() % BLOCK_BYTES
            if rest < CHUNK.size:
                file.seek(rest, os.SEEK_CUR)
            head = file.read(CHUNK.size)
            if len(head) < CHUNK.size:
                break
            checksum, size, kind = CHUNK.unpack(head)
            content = file.read(size)
            if len(content) < size:
                break
            if zlib.crc32(head[-1:] + content) != checksum:
                return
            record = content if kind in (FULL, FIRST) else record + content
            if kind in (FULL, LAST):
                complete = file.tell()
                yield record
    if complete < path.stat().st_size:
        os.truncate(path, complete)
