import json
import os
from pathlib import Path

import yaml

from training.run import finished_result, save_config, save_result


def test_finished_result(tmp_path: Path) -> None:
    assert finished_result(tmp_path, 10) is None
    result = {"status": "finished", "step": 10}
    save_result(tmp_path, result)
    assert finished_result(tmp_path, 10) == finished_result(tmp_path, 5) == result
    assert finished_result(tmp_path, 11) is None
    save_result(tmp_path, {"status": "failed", "step": 10})
    assert finished_result(tmp_path, 10) is None
    (tmp_path / "result.json").write_text("{")
    assert finished_result(tmp_path, 10) is None


def test_saved_files_read_back(tmp_path: Path) -> None:
    values = {"run": {"name": None, "lr": 1e-3}, "list": ["ä", 2]}
    assert yaml.safe_load(save_config(tmp_path, values).read_text(encoding="utf-8")) == values
    assert json.loads(save_result(tmp_path, values).read_text()) == values
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "result.json"]
