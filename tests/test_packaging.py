"""The wheel that setuptools builds from this project, and the targets of the Makefile."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "runs", "wandb", "build", "dist", "*.egg-info", "__pycache__")
BUILD = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
IMPORT = """
import importlib
import sys

sys.path[:0], names = sys.argv[1:3], sys.argv[3:]
for name in names:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), (name, module.__file__)
print(len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the project, without the network, and unpack it into the returned directory."""
    directory = tmp_path_factory.mktemp("wheel")
    source, unpacked = directory / "source", directory / "unpacked"
    shutil.copytree(ROOT, source, ignore=NOT_COPIED)
    command = [sys.executable, "-c", BUILD, str(directory)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    zipfile.ZipFile(directory / built.stdout.split()[-1]).extractall(unpacked)
    return unpacked


def test_every_package_is_in_the_wheel_and_no_test(wheel: Path) -> None:
    packages = {path.parent for path in ROOT.glob("*/__init__.py")} - {ROOT / "tests"}
    modules = {path.relative_to(ROOT) for package in packages for path in package.rglob("*.py")} | {Path("train.py")}
    assert {path.relative_to(wheel) for path in wheel.rglob("*.py")} == modules
    folders = {path.parent.relative_to(ROOT) for package in packages for path in package.rglob("*.py")}
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_the_files_of_the_report_are_in_the_wheel(wheel: Path) -> None:
    page = Path("training/report/page")
    names = {path.name for path in (ROOT / page).iterdir() if path.suffix in (".css", ".jinja", ".js")}
    assert names == {path.name for path in (wheel / page).iterdir()} - {
        path.name for path in (ROOT / page).glob("*.py")
    }
    assert len(names) == 5


def test_the_changelog_begins_with_the_version_of_the_wheel(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    version = re.search(r"^Version: (.+)$", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None and newest is not None and version[1] == newest[1]


@pytest.mark.slow
def test_every_module_imports_from_the_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    """In a fresh interpreter that cannot see this checkout.

    `-S` leaves out the `.pth` files of site-packages, one of which points an editable installation to the checkout.
    """
    names = [".".join(path.relative_to(wheel).with_suffix("").parts) for path in sorted(wheel.rglob("*.py"))]
    names = [name.removesuffix(".__init__") for name in names]
    if find_spec("triton") is None:
        names = [name for name in names if not name.startswith("moe.kernels.")]
    command = [sys.executable, "-I", "-S", "-c", IMPORT, str(wheel), sysconfig.get_paths()["purelib"], *names]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) == len(names) > 100


def test_make_help_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)
    helped = subprocess.run(["make", "--silent"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in helped.splitlines() if line.startswith("  ")]
    assert phony is not None and [line[0] for line in lines] == phony[1].split() and all(map(len, lines))
    assert all(len(line) == 2 for line in lines)
