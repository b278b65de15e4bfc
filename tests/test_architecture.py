"""Hold the code against docs/architecture.md: imports between rooms, import circles, seams, and the names it gives."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
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
SOURCES = [*[path for _, path in FILES], *sorted((ROOT / "scripts").rglob("*.py")), ROOT / "train.py"]


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Yield the dotted names of all modules and members that the file imports, with relative names made absolute."""
    tree = tree_of(path)
    package = path.relative_to(ROOT).parent.parts
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """Return the first part of a dotted name."""
    return name.split(".")[0]


def forbidden(room: str, path: Path) -> list[str]:
    """Return the names that the file imports although its room must not."""
    wrong = [name for name in imports(path) if room_of(name) in OURS - ROOMS[room] - {room}]
    wrong += [name for name in imports(path) if room_of(name) in ("hydra", "omegaconf")]
    if room == "common":
        wrong += [name for name in imports(path) if room_of(name) == "torch"]
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
    (tmp_path / "common").mkdir()
    file = tmp_path / "common" / "bad.py"
    file.write_text("def f():\n    from torch import nn\n    from moe import config\nfrom . import errors\n")
    assert set(forbidden("common", file)) == {"torch.nn", "moe.config"}


@pytest.mark.parametrize("path", [*[path for _, path in FILES], ROOT / "train.py"], ids=lambda path: path.stem)
def test_heavy_libraries_load_where_they_are_used(path: Path) -> None:
    assert [name for name in imports(path, top_level_only=True) if room_of(name) in HEAVY] == []


def test_only_the_command_line_imports_hydra() -> None:
    files = [*SOURCES, *(ROOT / "benchmarks").rglob("*.py")]
    using = [path for path in files if {"hydra", "omegaconf"} & set(map(room_of, imports(path)))]
    assert {path.relative_to(ROOT).parts[0] for path in using} == {"scripts", "train.py"}


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of every row of the tables in the section `heading` of the page, without the tables' heads."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_has_every_room_and_what_it_may_import() -> None:
    allowed = {
        row[0].strip("`/"): {name.strip("/") for name in re.findall(r"`(\w+/)`", row[2])} for row in rows_of("Rooms")
    }
    assert {room: allowed.get(room) for room in ROOMS} == ROOMS
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {*ROOMS, "scripts", "tests"} and packages < allowed.keys()


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the nodes of a circle in the graph, the first one twice, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def imported_modules() -> dict[str, set[str]]:
    """Return, for every module of the project, the project's modules that it imports anywhere in its file."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}

    def module_of(name: str) -> str:
        return name if name in names or not name else module_of(name.rpartition(".")[0])

    return {module: {module_of(name) for name in imports(path)} - {"", module} for module, path in names.items()}


def test_no_import_circle_between_modules() -> None:
    assert circle(imported_modules()) == []


def imported_wings() -> dict[str, set[str]]:
    """Return the graph of `imported_modules` in which every wing, a package inside a room, is one node.

    A module that stands directly in its room is a node of its own.
    """
    wings = [f"{room}.{path.parent.name}" for room in OURS for path in (ROOT / room).glob("*/__init__.py")]
    graph = defaultdict(set)
    for module, imported in imported_modules().items():
        node, *others = (
            next((wing for wing in wings if f"{name}.".startswith(f"{wing}.")), name) for name in (module, *imported)
        )
        graph[node] |= {*others} - {node}
    return dict(graph)


def test_no_import_circle_between_wings() -> None:
    assert circle(imported_wings()) == []


def test_the_page_has_every_wing_and_the_wings_that_it_may_import() -> None:
    wings = {f"{room}.{path.parent.name}" for room in ROOMS for path in (ROOT / room).glob("*/__init__.py")}
    rows = {row[0].strip("`/").replace("/", "."): row[2].replace("/", ".") for row in rows_of("Wings")}
    assert rows.keys() == wings
    graph = imported_wings()
    wrong = {wing: [name for name in graph[wing] & wings if f"`{name}.`" not in rows[wing]] for wing in wings}
    assert wrong == {wing: [] for wing in wings}


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


# ------------------------------------------------------------------------------------------------------------- seams
# A seam is an attribute of a module in moe/ that code outside of the module's `__init__` replaces, or an argument with
# a function as its default. Both are found in the syntax trees, so that no seam can be forgotten.


def functions_of(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function of the file with an empty name, and every method with the name of its class."""
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            yield from ((node.name, member) for member in node.body if isinstance(member, ast.FunctionDef))


def replaced(function: ast.FunctionDef) -> Iterator[tuple[str, str, str]]:
    """Yield (object, attribute, value), as source text, wherever the function assigns an attribute.

    `setattr` and `add_module` with a literal name are such places. `setattr(x.layers, name, value)` replaces an item of
    `x.layers`. `setattr(x, name, value)` with a computed name is left out: it stores the local part of a weight.
    """
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=targets, value=value) | ast.AnnAssign(target=ast.expr() as targets, value=value):
                for target in targets if isinstance(targets, list) else [targets]:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and value is not None:
                            yield ast.unparse(part.value), part.attr, ast.unparse(value)
            case ast.Call(func=ast.Name(id="setattr"), args=[owner, ast.Constant(value=str(name)), value]):
                yield ast.unparse(owner), name, ast.unparse(value)
            case ast.Call(func=ast.Name(id="setattr"), args=[ast.Attribute(value=owner, attr=name), _, value]):
                yield ast.unparse(owner), name, ast.unparse(value)
            case ast.Call(
                func=ast.Attribute(value=owner, attr="add_module" | "register_module"),
                args=[ast.Constant(value=str(name)), value],
            ):
                yield ast.unparse(owner), name, ast.unparse(value)


@cache
def modules_of_moe() -> dict[str, tuple[set[str], dict[str, str]]]:
    """Return every subclass of `nn.Module` in moe/ with its base classes, and its attributes and their first values.

    Base classes are those in moe/, the class itself included. An attribute belongs to the class whose `__init__`
    assigns it. Values are source text.
    """
    files = sorted((ROOT / "moe").rglob("*.py"))
    classes = {node.name: node for path in files for node in tree_of(path).body if isinstance(node, ast.ClassDef)}

    def bases_of(name: str) -> set[str]:
        node = classes.get(name)
        return {name}.union(*(bases_of(ast.unparse(base)) for base in node.bases)) if node else {name}

    modules: dict[str, tuple[set[str], dict[str, str]]] = {
        name: (bases & classes.keys(), {})
        for name, bases in ((name, bases_of(name)) for name in classes)
        if any(base.startswith("nn.") for base in bases)
    }
    for path in files:
        for owner, function in functions_of(path):
            if owner in modules and function.name == "__init__":
                modules[owner][1].update({name: value for of, name, value in replaced(function) if of == "self"})
    return modules


def replaced_seams(files: list[Path]) -> dict[str, set[str]]:
    """Return `Class.attribute` -> the places, as `file:function`, that replace it from outside of `__init__`.

    Every module in moe/ that has an attribute of this name counts, unless the function names some of these classes.
    """
    modules = modules_of_moe()
    seams = defaultdict(set)
    for path in files:
        for owner, function in functions_of(path):
            words = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            named = set[str]().union(*(bases for name, (bases, _) in modules.items() if name in words))
            for of, attribute, _ in replaced(function):
                having = {name for name, (_, attributes) in modules.items() if attribute in attributes}
                if of == "self":
                    having &= {owner} if function.name != "__init__" else set()
                elif of == "ctx":  # the context of an autograd function is no module
                    having = set()
                for name in having & named or having:
                    seams[f"{name}.{attribute}"].add(f"{path.relative_to(ROOT)}:{function.name}")
    return dict(seams)


def argument_seams() -> dict[str, tuple[set[str], str]]:
    """Return `function.argument` -> the places that pass it, and its default, for every callable with a default."""
    seams = {}
    for path in sorted((ROOT / "moe").rglob("*.py")):
        for _, function in functions_of(path):
            positional, keyword = function.args.args, function.args.kwonlyargs
            defaults = [*[None] * (len(positional) - len(function.args.defaults)), *function.args.defaults]
            for argument, default in zip([*positional, *keyword], [*defaults, *function.args.kw_defaults], strict=True):
                if default is not None and ast.unparse(argument.annotation or default).startswith("Callable["):
                    places = set(places_that_pass(argument.arg, function.name))
                    seams[f"{function.name}.{argument.arg}"] = places, ast.unparse(default)
    return seams


def places_that_pass(argument: str, called: str) -> Iterator[str]:
    """Yield the places, as `file:function`, that call the function `called` with the keyword `argument`."""
    for path in SOURCES:
        for _, function in functions_of(path):
            for node in ast.walk(function):
                is_call = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == called
                if is_call and argument in {keyword.arg for keyword in node.keywords}:
                    yield f"{path.relative_to(ROOT)}:{function.name}"


def documented_seams() -> dict[str, set[str]]:
    """Return the seams of the page in the same form."""
    return {row[0].strip("`"): set(re.findall(r"`([\w/]+\.py:\w+)`", row[2])) for row in rows_of("Seams")}


def test_the_page_has_every_seam_and_who_installs_it() -> None:
    arguments = {seam: places for seam, (places, _) in argument_seams().items()}
    assert documented_seams() == replaced_seams(SOURCES) | arguments


def test_the_page_has_the_default_of_every_seam() -> None:
    defaults = {seam: default for seam, (_, default) in argument_seams().items()}
    defaults |= {
        f"{name}.{attribute}": value
        for name, (_, attributes) in modules_of_moe().items()
        for attribute, value in attributes.items()
    }
    for seam, default, *_ in rows_of("Seams"):
        named = re.findall(r"`([^`]+)`", default)
        assert named and all(name in defaults[seam.strip("`")] for name in named), (seam, defaults[seam.strip("`")])


def test_seams_are_found_however_they_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = modules_of_moe()
    assert modules["Attention"][1]["gather"] == "nn.Identity()"
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    monkeypatch.setattr("tests.test_architecture.modules_of_moe", lambda: modules)
    file = tmp_path / "bad.py"
    file.write_text(
        "def install(model: Transformer) -> None:\n"
        "    for module in model.modules():\n"
        "        if isinstance(module, Attention | FeedForward):\n"
        "            module.gather, module.other = 1, 2\n"
        "            module.add_module('core', 3)\n"
        "    def inner():\n"
        "        setattr(model, 'lookup', 4)\n"
        "        setattr(model, computed, 5)\n"
        "    model.layers[0].dispatcher = 6\n"
        "def set_mode(model: nn.Module) -> None:\n"
        "    for module in model.modules():\n"
        "        module.recompute: str = 'full'\n"
        "class Elsewhere:\n"
        "    def change(self, block: Block) -> None:\n"
        "        self.gather, block.recompute = 7, 8\n"
    )
    installed = {
        "gather": {"Attention", "FeedForward", "Transformer"},
        "core": {"Attention"},
        "lookup": {"Transformer"},
    }
    installed["dispatcher"] = {"MoELayer"}
    expected = {f"{name}.{attribute}": {"bad.py:install"} for attribute, names in installed.items() for name in names}
    having = {name for name, (_, attributes) in modules.items() if "recompute" in attributes}
    assert len(having) > 1
    expected |= {f"{name}.recompute": {"bad.py:set_mode"} for name in having}
    expected["Block.recompute"] = {"bad.py:set_mode", "bad.py:change"}
    assert replaced_seams([file]) == expected


# -------------------------------------------------------------------------------------------- protocols and the mesh


def classes() -> Iterator[ast.ClassDef]:
    """Yield every class that stands at the top level of a file."""
    yield from (node for path in SOURCES for node in tree_of(path).body if isinstance(node, ast.ClassDef))


def test_the_page_has_every_protocol() -> None:
    protocols = {node.name for node in classes() if "Protocol" in map(ast.unparse, node.bases)}
    assert {row[0].strip("`") for row in rows_of("Protocols")} == protocols


def test_the_page_has_every_process_group() -> None:
    (mesh,) = (node for node in classes() if node.name == "Mesh")
    fields = [node for node in mesh.body if isinstance(node, ast.AnnAssign)]
    groups = [ast.unparse(node.target) for node in fields if "ProcessGroup" in ast.unparse(node.annotation)]
    in_tables = [row[0].strip("`") for row in rows_of("The mesh")]
    axes = next(ast.literal_eval(node.value) for node in tree_of(ROOT / "parallel/layout.py").body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "AXES")  # fmt: skip
    assert in_tables == [*in_tables[: len(axes)], *groups] and set(in_tables[: len(axes)]) == set(axes)


# ------------------------------------------------------------------------------------------------- names on the pages
PAGES = [ROOT / name for name in ("docs/architecture.md", "CONTRIBUTING.md")]
LINKED = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]


def names_in(path: Path) -> set[str]:
    """Return the names of all functions, classes, methods and assigned variables of a file."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    folders = "|".join([*OURS - {"train"}, "conf", "docs"])
    found = re.findall(rf"`((?:{folders})/[\w/.*-]*|train\.py)(?::([\w.]+))?`", page.read_text(encoding="utf-8"))
    assert len(found) > 20
    assert [path for path, _ in found if not any(ROOT.glob(path.rstrip("/")))] == []
    missing = [(path, name) for path, name in found if name and not set(name.split(".")) <= names_in(ROOT / path)]
    assert missing == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []
