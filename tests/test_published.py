import dataclasses

import pytest

from benchmarks.gpu_stages.models import MODELS
from benchmarks.published import COSTS, RUNS, Prediction, PublishedRun, by_formula, compare, show
from parallel.config import ParallelConfig
from parallel.planning.check import check_layout
from parallel.planning.workload import Workload
from tests.parallel.test_hardware import PRESETS

BY_NAME = {run.name: run for run in RUNS}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_is_one_that_this_project_could_run(run: PublishedRun) -> None:
    model, router = run.configs()
    parallel = ParallelConfig(**run.parallel)  # type: ignore[arg-type]
    workload = Workload(model, router, run.global_batch, run.accumulation, run.seq_len)
    layout = parallel.layout(run.gpus, model, run.seq_len)
    check_layout(layout, parallel, workload)
    assert (layout.world, layout.data, workload.rows(layout)) == (run.gpus, run.data, run.micro_batch)
    assert run.data * run.accumulation * run.micro_batch == run.global_batch
    assert run.gpu in PRESETS and run.precision == "bf16"
    assert sum(figure is not None for figure in (run.tflops, run.tokens_per_s, run.step_ms)) == 1
    least, most = run.step_s()
    assert 0.01 < least <= most < 200


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(RUNS)


def test_seconds_of_a_step_by_hand() -> None:
    # Mixtral 8x22B: 39.15 B active parameters, of which the embedding is no matmul, and the norms; S = 4,096 pairs.
    active = 39_152_031_744 - 32_000 * 6144 - (2 * 56 + 1) * 6144
    flops = 6 * active + 12 * 56 * 48 * 128 * 4096
    run = BY_NAME["Mixtral 8x22B, folded"]
    causal = 6 * active + 12 * 56 * 48 * 128 * 4097 / 2
    speed = 128 * 0.493 * 989.5e12
    assert run.step_s() == pytest.approx((256 * 4096 * causal / speed, 256 * 4096 * flops / speed), rel=1e-12)
    assert dataclasses.replace(run, all_pairs=True).step_s() == pytest.approx((run.step_s()[1],) * 2)
    assert BY_NAME["gpt-oss 120B, H100"].step_s() == pytest.approx((1280 * 4096 / 64 / 5993,) * 2)


def test_model_a_is_that_of_the_stage_step() -> None:
    config, _ = BY_NAME["model A, one H100"].configs()
    assert dataclasses.replace(config, rope_theta=MODELS["A"].rope_theta) == MODELS["A"]


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.model)
def test_published_flops_are_those_of_the_preset(cost: PublishedRun) -> None:
    assert cost.computed() == pytest.approx(cost.flops, rel=0.05)  # Without cross-attention, and with the router.


def test_the_planner_is_close_to_published_runs() -> None:
    # FSDP with one row per micro-batch gathers the weights four times a step; the paper does not give its rows.
    # DeepSeek-V3 and Qwen3 ran in FP8; the authors of DeepSeek-V3 send fewer copies of a token, and hide that.
    far = {"Mixtral 8x22B, FSDP + EP", "gpt-oss 120B, H100", "gpt-oss 120B, B200"}
    far |= {"DeepSeek-V3, its authors", "DeepSeek-V3, H100", "Qwen3-30B-A3B, H100, dropless"}
    for comparison in compare(by_formula):
        assert comparison.ratio is not None
        least, most = comparison.ratio
        factor = 2.2 if comparison.run.name in far else 1.35
        assert most > 1 / factor and least < factor, (comparison.run.name, comparison.ratio)
    ((_, own),) = [each.ratio for each in compare(by_formula) if each.run.source.startswith("benchmarks/")]
    assert own == pytest.approx(1, abs=0.1)


def test_the_table_has_predictions_and_what_a_plan_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [BY_NAME["model A, one H100"], BY_NAME["gpt-oss 120B, B200"]]
    predictions = iter([Prediction(2 * 0.2757, 71.6e9), None])
    found = compare(lambda run: next(predictions), runs)
    assert found[0].ratio == pytest.approx((2, 2)) and found[1].ratio is None
    show(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-4:] == ["0.28", "0.55", "2.00", "72"]
    assert lines[2].split()[-4:] == ["10.18", "-", "-", "-"]
    show(compare(lambda run: Prediction(4.0, 1e10), [BY_NAME["Mixtral 8x22B, folded"]]))
    assert "  4.07 - 4.21   4.00          0.95 - 0.98  10" in capsys.readouterr().out
