"""Programs of this checkout import its own modules, also if another copy of the project comes first on the path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "data", "moe", "parallel", "scripts", "training")
PROGRAMS = ["train.py", *(f"{path.parent.name}/{path.name}" for folder in ("scripts", "benchmarks")
                          for path in sorted(ROOT.glob(f"{folder}/*.py")) if path.name != "__init__.py")]  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with another copy of the project, of which every import fails."""
    directory = tmp_path_factory.mktemp("elsewhere")
    for package in PACKAGES:
        (directory / package).mkdir()
        (directory / package / "__init__.py").write_text("raise SystemExit('another copy was imported')")
    (directory / "train.py").write_text("raise SystemExit('another copy was imported')")
    return directory


def run(elsewhere: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python there, with that directory first on the path and without the directory of the script (-P)."""
    environment = os.environ | {"PYTHONPATH": str(elsewhere)}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)


def test_a_tool_imports_its_checkout(elsewhere: Path) -> None:
    done = run(elsewhere, str(ROOT / "scripts/export_hf.py"), "chekpoint=x")
    assert (done.returncode, done.stderr) == (
        2, "error: chekpoint=x: unknown key; the nearest valid key is checkpoint\n"
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_imports_its_checkout(elsewhere: Path, program: str) -> None:
    done = run(elsewhere, str(ROOT / program), "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_workers_import_the_checkout_of_their_launcher(elsewhere: Path) -> None:
    done = run(
        elsewhere, str(ROOT / "scripts/parity.py"), "layouts=expert=2", "models=mixtral", "steps=2", "launch.nproc=2"
    )
    assert done.returncode == 0, done.stderr
