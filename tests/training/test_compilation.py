"""`train.compile`: when a run compiles its blocks, and the line that it prints if it does not."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from moe.compiled import CompiledBlocks
from moe.config import RouterConfig
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.startup.launch import World
from tests.moe.test_compiled import build, inputs, losses_and_gradients
from tests.training.test_resume import config_of
from training import compilation
from training.compilation import CompilationReport, choose_compilation
from training.config import Config, EngineConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def config() -> Config:
    return config_of()


@pytest.fixture(autouse=True)
def _has_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_missing_compiler", lambda device: None)


def wanted(config: Config, value: bool) -> Config:
    return replace(config, train=replace(config.train, compile=value))


def test_auto_compiles_on_gpus_only(config: Config) -> None:
    assert choose_compilation(config, Layout(), GPU) == (True, None)
    assert choose_compilation(config, Layout(), CPU) == (False, None)
    assert choose_compilation(wanted(config, False), Layout(), GPU) == (False, None)
    assert choose_compilation(wanted(config, True), Layout(replicate=2, pipeline=2), CPU) == (True, None)


@pytest.mark.parametrize("axis", ["tensor", "context", "shard", "expert"])
def test_blocks_that_communicate_stay_eager_and_a_line_says_so(config: Config, axis: str) -> None:
    layout = Layout(**{"replicate": 2, axis: 2})
    on, note = choose_compilation(wanted(config, True), layout, CPU)
    assert not on and note == f"parallel.{axis}=2: the blocks run without torch.compile (train.compile)"
    assert choose_compilation(config, layout, GPU) == (False, note)


def test_zero_bubble_and_deepspeed_stay_eager(config: Config) -> None:
    zero_bubble = replace(config, parallel=ParallelConfig(schedule="zero_bubble"))
    assert str(choose_compilation(zero_bubble, Layout(pipeline=2), GPU).note).startswith(
        "parallel.schedule=zero_bubble:"
    )
    deepspeed = replace(config, engine=EngineConfig(kind="deepspeed"))
    assert str(choose_compilation(deepspeed, Layout(), GPU).note).startswith("engine.kind=deepspeed:")


def test_a_missing_compiler_is_one_line(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"^train.compile=true: expected a C\+\+ compiler \(CXX=no-such-compiler\)"):
        choose_compilation(wanted(config, True), Layout(), CPU)
    monkeypatch.setattr(compilation, "find_spec", lambda name: object())
    on, note = choose_compilation(config, Layout(), GPU)
    assert not on and "needs a C compiler (CC=no-such-compiler)" in str(note)
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert "needs Triton" in str(choose_compilation(config, Layout(), GPU).note)


def test_the_report_has_a_line_for_new_graphs_and_for_a_block_that_cannot_be_compiled() -> None:
    model = build(RouterConfig())
    assert CompilationReport([model]).lines() == []
    blocks = CompiledBlocks("eager")
    model.run_block = blocks
    report = CompilationReport([model])
    compilation.compile_clock().graphs += 2
    compilation.compile_clock().seconds += 31
    assert report.lines() == ["torch.compile: 2 graphs of blocks in 31 s"]
    blocks.refusal = "an operator"
    assert report.lines() == ["warning: the blocks run without torch.compile, which cannot compile one: an operator"]
    assert report.lines() == []


def test_processes_of_one_machine_have_separate_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compilation.separate_caches(World())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    for _ in range(2):  # the second run of a sweep
        compilation.separate_caches(World(rank=1, local_rank=1, world_size=2, local_world_size=2))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "rank-1")


def test_a_compiler_that_fails_on_one_of_several_ranks_is_an_error() -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left")

    model = build(RouterConfig())
    model.run_block = CompiledBlocks(broken)
    losses_and_gradients(model, inputs(0))
    assert "no space left" in str(model.run_block.refusal)
    model.run_block = CompiledBlocks(broken, alone=False)
    with pytest.raises(Exception, match="no space left"):
        losses_and_gradients(model, inputs(0))
