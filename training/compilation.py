"""Whether a run compiles its blocks (`train.compile`), and what it prints about it."""

import os
import shutil
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from common.errors import ConfigError, require
from moe.compiled import CompiledBlocks, compile_clock
from moe.model import Transformer
from parallel.layout import Layout
from parallel.startup.launch import World
from training.config import Config

AXES_IN_BLOCKS = ("tensor", "context", "shard", "expert", "expert_tensor")
"""Axes whose ranks communicate within a block. torch.compile would divide such a block into many graphs."""


class Compilation(NamedTuple):
    """Whether the blocks of a run are compiled."""

    on: bool
    note: str | None = None
    """One line for the user if they are not, although the configuration or the device suggests it."""


def choose_compilation(config: Config, layout: Layout, device: torch.device) -> Compilation:
    """Return whether the blocks of a run are compiled.

    Raises:
        ConfigError: `train.compile=true`, and what torch.compile needs is missing.
    """
    wanted = config.train.compile
    if wanted is False or (wanted == "auto" and device.type == "cpu"):
        return Compilation(False)
    eager = _keeps_eager(config, layout)
    if eager is not None:
        return Compilation(False, f"{eager}: the blocks run without torch.compile (train.compile)")
    missing = _missing_compiler(device)
    if missing is None:
        return Compilation(True)
    require(wanted == "auto", ConfigError, f"train.compile=true: expected {missing} on {device.type}")
    return Compilation(False, f"the blocks run without torch.compile (train.compile), which needs {missing}")


def _keeps_eager(config: Config, layout: Layout) -> str | None:
    """Return the key and the value for which blocks are not compiled, or None."""
    if config.engine.kind != "native":
        return f"engine.kind={config.engine.kind}"  # DeepSpeed's hooks act within blocks.
    if layout.pipeline > 1 and config.parallel.schedule == "zero_bubble":
        return "parallel.schedule=zero_bubble"  # It divides a backward pass in two, which a compiled one is not.
    return next(
        (f"parallel.{axis}={getattr(layout, axis)}" for axis in AXES_IN_BLOCKS if getattr(layout, axis) > 1), None
    )


def _missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile needs and this machine lacks, or None."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "Triton"
    # Triton compiles its launcher in C, and torch compiles kernels for CPUs in C++.
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    named = os.environ.get(variable)
    if not any(map(shutil.which, (named,) if named else names)):
        language = "C" if device.type == "cuda" else "C++"
        return f"a {language} compiler ({f'{variable}={named}' if named else ' or '.join(names)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the header files of Python (Python.h)"
    return None


def separate_caches(world: World) -> None:
    """Give every process of this machine its own cache of compiled code.

    Processes that compile the same code at the same time can read each other's unfinished files in a shared one.
    """
    directory, own = Path(cache_dir()), f"rank-{world.local_rank}"
    if world.local_world_size > 1 and directory.name != own:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory / own)


class CompilationReport:
    """What torch.compile has done since the last line about it."""

    def __init__(self, parts: Sequence[Transformer]) -> None:
        """
        Args:
            parts: the model's parts on this rank.
        """
        self._blocks = [part.run_block for part in parts if isinstance(part.run_block, CompiledBlocks)]
        self._graphs, self._seconds, self._refused = compile_clock().graphs, compile_clock().seconds, False

    def lines(self) -> list[str]:
        """Return a line if blocks were compiled since the last call, and one if they cannot be compiled."""
        if not self._blocks:
            return []
        clock, lines = compile_clock(), []
        if clock.graphs > self._graphs:
            graphs = clock.graphs - self._graphs
            lines.append(
                f"torch.compile: {graphs} graph{'s' * (graphs > 1)} of blocks in {clock.seconds - self._seconds:.0f} s"
            )
        refusals = [blocks.refusal for blocks in self._blocks if blocks.refusal is not None]
        if refusals and not self._refused:
            lines.append(f"warning: the blocks run without torch.compile, which cannot compile one: {refusals[0]}")
        self._graphs, self._seconds, self._refused = clock.graphs, clock.seconds, bool(refusals)
        return lines
