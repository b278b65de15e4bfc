"""Which code a run used: the commit of this checkout, and the versions of the packages that a run depends on."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "mixwright",
    "torch",
    "numpy",
    "hydra-core",
    "sentencepiece",
    "tokenizers",
    "datasets",
    "deepspeed",
    "wandb",
)
TIMEOUT_S = 10


def code_state() -> dict[str, Any]:
    """Return the `commit` of this checkout, whether it has uncommitted changes (`dirty`), and `versions` of packages.

    Commit and dirty are None if this is no checkout of git. Files that git does not know are no change.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    # An installed package can lie in the repository of another project, which does not have `train.py`.
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", "train.py") else None
    changes = None if commit is None else _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit and commit.strip(),
        "dirty": None if changes is None else bool(changes),
        "versions": versions,
    }


def uncommitted_changes() -> str | None:
    """Return the changes of this checkout since its commit, as `git diff HEAD` shows them. None: git shows none."""
    return _git("diff", "--no-ext-diff", "HEAD") or None


def _git(*arguments: str) -> str | None:
    """Return the output of git in this checkout, or None if git fails or is not installed."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        output = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.decode(errors="replace")
