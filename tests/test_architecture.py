"""The arrows between the rooms, as ARCHITECTURE's table draws them, read from the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "common": set[str](),
    "data": {"common"},
    "moe": {"common"},
    "parallel": {"common", "moe"},
    "training": {"common", "data", "moe", "parallel"},
}
OURS = {*ROOMS, "scripts", "train", "tests", "benchmarks"}
HEAVY = {"datasets", "wandb", "matplotlib", "transformers", "sentencepiece", "deepspeed"}
FILES = [(room, path) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of all modules and members that the file imports, relative ones made absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).parent.parts
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    return name.split(".")[0]


def forbidden(room: str, path: Path) -> list[str]:
    wrong = [name for name in imports(path) if room_of(name) in OURS - ROOMS[room] - {room}]
    wrong += [name for name in imports(path) if room_of(name) in ("hydra", "omegaconf")]
    if room == "moe":
        wrong += [name for name in imports(path) if f"{name}.".startswith("torch.distributed.")]
    return wrong


@pytest.mark.parametrize(("room", "path"), FILES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_rooms_import_only_what_the_table_allows(room: str, path: Path) -> None:
    assert forbidden(room, path) == []


def test_the_walk_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    (tmp_path / "moe").mkdir()
    file = tmp_path / "moe" / "bad.py"
    file.write_text(
        "import torch.distributed as dist\nfrom torch import distributed\n"
        "from moe.config import x\nfrom . import model\n"
        "def f():\n    from parallel import mesh\n    import omegaconf\n    from ..training import step\n"
    )
    assert set(forbidden("moe", file)) == {
        "torch.distributed",
        "parallel.mesh",
        "omegaconf",
        "training.step",
    }


@pytest.mark.parametrize("path", [*[path for _, path in FILES], ROOT / "train.py"], ids=lambda path: path.stem)
def test_heavy_libraries_load_where_they_are_used(path: Path) -> None:
    assert [name for name in imports(path, top_level_only=True) if room_of(name) in HEAVY] == []
