"""`scripts/merge.py`: a run with adapters as a model without them, and runs whose base is missing or another one."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from moe.config import AdapterConfig
from moe.model import ModelInputs
from moe.region import Region
from scripts import export_hf, import_hf, merge
from tests.adapters import write_run
from tests.foreign import VOCAB, load_model, save_reference
from training.formats.merge import MergedReader
from training.formats.reader import ReadRequest, open_model

LORA = AdapterConfig(kind="lora", rank=3, alpha=5.0, targets=("*",))
DORA = AdapterConfig(kind="lora", rank=3, alpha=5.0, targets=("attention", "router"), dora=True)
INPUTS = ModelInputs(torch.arange(22).view(2, 11) % VOCAB, torch.arange(11).expand(2, 11))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("merge") / "base"
    save_reference("mixtral", directory)
    return directory


def run(monkeypatch, capsys, tool, *arguments: str) -> tuple[int, str]:
    """Run a tool. Return its exit status, and what it printed as an error."""
    capsys.readouterr()  # What transformers has printed.
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_the_merged_model_computes_what_the_run_does(adapter, base, tmp_path, monkeypatch, capsys):
    """Also as exported, with and without a merge before, byte for byte; twice merged, the same bytes."""
    tuned = write_run(base, adapter, tmp_path / "tuned")
    for out in ("merged", "again"):
        assert run(monkeypatch, capsys, merge, f"run={tuned}", f"out={tmp_path / out}", "dtype=fp32")[0] == 0
    first, second = (next((tmp_path / out).rglob("*.safetensors")).read_bytes() for out in ("merged", "again"))
    assert first == second
    with torch.no_grad():
        expected = load_model(tuned, torch.float64)(INPUTS).logits_BSV
        found = load_model(tmp_path / "merged", torch.float64)(INPUTS).logits_BSV
        without = load_model(base, torch.float64)(INPUTS).logits_BSV
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # The merged weights are rounded to fp32.
    assert (expected - without).abs().max() > 0.5
    for name in ("tuned", "merged"):
        arguments = f"checkpoint={tmp_path / name}", f"out={tmp_path / f'{name}-hf'}", "dtype=fp32"
        assert run(monkeypatch, capsys, export_hf, *arguments)[0] == 0
    exported = [(tmp_path / f"{name}-hf" / "model.safetensors").read_bytes() for name in ("tuned", "merged")]
    assert exported[0] == exported[1]


def test_a_part_of_a_merged_weight_is_that_of_the_whole(base, tmp_path):
    merged = MergedReader(open_model(write_run(base, LORA, tmp_path / "tuned")))
    for name, part in (
        ("layers.0.attention.wq.weight", Region((3, 5), (7, 2))),
        ("layers.1.ffn.experts.w_up", Region((1, 2, 4), (2, 5, 9))),
    ):
        whole = Region.whole(merged.shapes[name])
        expected = merged.read(name, whole, torch.float32)[part.slices(whole)]
        target = torch.empty(part.shape)
        merged.copy([ReadRequest(name, part, target)])
        assert torch.equal(target, expected) and torch.equal(merged.read(name, part, torch.float32), expected)


def test_a_base_that_is_gone_or_another_is_told_and_a_moved_one_can_be_given(base, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own"
    shutil.copytree(base, own)
    tuned = write_run(own, LORA, tmp_path / "tuned")
    own.rename(tmp_path / "moved")
    arguments = f"run={tuned}", f"out={tmp_path / 'merged'}"
    code, line = run(monkeypatch, capsys, merge, *arguments)
    assert code == 2 and f"base={own}, the base of the adapters in {tuned}" in line and line.count("\n") == 1
    other = tmp_path / "other"
    save_reference("mixtral-window", other)
    code, line = run(monkeypatch, capsys, merge, *arguments, f"base={other}")
    assert code == 2 and f"base={other}: expected the weights that the adapters in" in line and line.count("\n") == 1
    assert not (tmp_path / "merged").exists()
    assert run(monkeypatch, capsys, merge, *arguments, f"base={tmp_path / 'moved'}")[0] == 0


def test_models_without_adapters_and_adapters_without_a_base_are_refused(base, tmp_path, monkeypatch, capsys):
    for tool, arguments, expected in (
        (merge, (f"run={base}", "out=x"), f"run={base}: expected a run with adapters; found a model without any"),
        (export_hf, (f"checkpoint={base}", "out=x", "format=peft"), "expected a run with adapters with format=peft"),
        (import_hf, (f"source={base}", f"base={base}", "out=x"), "expected an adapter (adapter_config.json)"),
    ):
        code, line = run(monkeypatch, capsys, tool, *arguments)
        assert code == 2 and expected in line and line.count("\n") == 1
    tuned = write_run(base, LORA, tmp_path / "tuned")
    assert run(monkeypatch, capsys, export_hf, f"checkpoint={tuned}", f"out={tmp_path / 'a'}", "format=peft")[0] == 0
    code, line = run(monkeypatch, capsys, import_hf, f"source={tmp_path / 'a'}", "out=x")
    assert code == 2 and f"source={tmp_path / 'a'} base=DIR out=DIR reads an adapter" in line
