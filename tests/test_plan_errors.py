"""The small part of `benchmarks/plan.py`: predictions of memory and bytes against real steps."""

import json
from pathlib import Path

import pytest

from benchmarks.plan import kendall_tau
from tests.commands import run_python


@pytest.mark.slow
def test_predictions_agree_with_real_steps(tmp_path: Path) -> None:
    run = run_python("benchmarks/plan.py", "--quick", "--json", str(tmp_path / "errors.json"))
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "errors.json").read_text())
    assert {row["world"] for row in rows} == {1, 2}
    for row in rows:
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.05), row["configuration"]
        assert row["sent_predicted"] == row["sent"], row["configuration"]


def test_kendall_tau_is_the_share_of_pairs_in_the_same_order() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
