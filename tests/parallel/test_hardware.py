import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import HydraException

from common.errors import ConfigError
from common.strict import from_dict
from parallel.planning.hardware import Hardware, with_rates
from scripts.cli.command_line import CONF, compose_config, user_message
from training.device import PEAK_TFLOPS

FILES = sorted((CONF / "gpu").glob("*.yaml"))
PRESETS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES}
MEMORY_GB = {"a100-40": 40, "a100-80": 80, "h100": 80, "h800": 80, "h200": 141, "b200": 180, "l40s": 48, "a6000": 48,
             "rtx4090": 24, "rtx3090": 24, "v100-32": 32, "mi300x": 192, "cpu": 12}  # fmt: skip
"""Preset -> the gigabytes in the name of the product, in thousands or in powers of 2."""
RATES = {
    "matmul": 7e14, "grouped_matmul_forward": 6e14, "grouped_matmul_backward": 5e14, "attention_forward": 5e14,
    "copy": 2.6e12, "launch": 2.5e5, "adamw": 2.5e12,
}  # fmt: skip


def preset(name: str) -> Hardware:
    return from_dict(Hardware, PRESETS[name], "gpu")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_plausible(name: str) -> None:
    hardware = preset(name)
    assert MEMORY_GB[name] * 1e9 * 0.95 < hardware.memory < MEMORY_GB[name] * 2**30
    # No rate is above what the device can do, and none is so low that a unit is wrong.
    for rate in ("matmul", "grouped_matmul", "attention_forward", "attention_backward"):
        assert 0.2 * hardware.peak < getattr(hardware, rate) <= hardware.peak, rate
    assert hardware.attention_backward < hardware.attention_forward or name == "cpu"
    assert hardware.network <= hardware.link < hardware.bandwidth
    assert hardware.price is None and (hardware.capability is None) == (name == "cpu")
    # torch.cuda.is_bf16_supported: from 8.0 on.
    assert hardware.capability is None or (hardware.precision == "bf16") == (hardware.capability >= 8)
    known = next((peak for part, peak in PEAK_TFLOPS.items() if part in hardware.name), None)
    assert known is None or hardware.peak == known * 1e12


def test_hydra_composes_a_preset_and_an_unknown_one_names_the_nearest() -> None:
    assert from_dict(Hardware, compose_config("config", ["+gpu=a100-80"])["gpu"]) == preset("a100-80")
    for unknown, near in (("A100", "are a100-40, a100-80"), ("rtx_4090", "is rtx4090")):
        with pytest.raises(HydraException) as caught:
            compose_config("config", [f"+gpu={unknown}"])
        line = f"gpu={unknown}: expected one of {', '.join(sorted(PRESETS))}; the nearest {near}"
        assert user_message(caught.value, []) == line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"link": 0.0}, "link=0.0: expected a number > 0"),
        ({"link_latency_s": -1.0}, "link_latency_s=-1.0: expected a number >= 0"),
        ({"reserved": 9e10}, "reserved=90000000000.0: expected less than memory=85020000000.0"),
        ({"gpus_per_node": 0}, "gpus_per_node=0: expected an integer >= 1"),
        ({"capability": 0}, "capability=0: expected an integer >= 1 or null"),
        ({"price": 0.0}, "price=0.0: expected a number > 0 or null"),
        ({"sources": {}}, "sources.attention_backward=: expected a source for each figure"),
    ],
)
def test_a_figure_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(preset("h100"), **changes)
    assert str(caught.value) == line


def test_measured_rates_replace_those_of_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps({"about": {"device": "X", "date": "2026-01-02"}, "rates": RATES, "measured": {}}))
    before, after = preset("h100"), with_rates(preset("h100"), path)
    changed = {"matmul": 7e14, "attention_forward": 5e14, "bandwidth": 2.6e12, "launch_s": 4e-6}
    # A step of 1 and 2 FLOPs takes 1/6e14 + 2/5e14 seconds.
    changed["grouped_matmul"] = 5.2941176e14
    for field in dataclasses.fields(Hardware):
        expected = changed.get(field.name, getattr(before, field.name))
        if field.name != "sources":
            found = getattr(after, field.name)
            assert found == (pytest.approx(expected) if isinstance(expected, float) else expected), field.name
    assert after.sources["matmul"] == f"measured on X, 2026-01-02 ({path})"
    assert after.sources["link"] == before.sources["link"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "expected the hardware.json of benchmarks/gpu.py stages=calibrate (No such file or directory)"),
        ('{"about": {}, "rates": {"matmul": 7e1', "expected the hardware.json of .* (not JSON: Expecting .*)"),
        ("[1]", "expected the hardware.json of .* (expected a JSON object, found [1])"),
        ('{"rows": [], "about": {}}', "expected the hardware.json of .*, found no `rates` and `about`"),
        ('{"about": {}, "rates": {"matmul": "x\\ny"}}', r"rates.matmul='x\ny': expected a number > 0"),
        ('{"about": {}, "rates": {"matmul": true}}', "rates.matmul=True: expected a number > 0"),
        ('{"about": {}, "rates": {"copy": -1}}', "rates.copy=-1: expected a number > 0"),
        (
            '{"about": {}, "rates": {"other": 1}}',
            "expected the rates of benchmarks/gpu.py stages=calibrate",
        ),
    ],
)
def test_a_file_that_is_no_calibration_is_one_line(content: str | None, line: str, tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        with_rates(preset("h100"), path)
    message = str(caught.value)
    start, _, end = line.partition(".*")
    assert message.startswith(f"calibration={path}: {start}") and message.count("\n") == 0
    assert all(part in message for part in end.split(".*"))
    assert user_message(caught.value, []) == message
