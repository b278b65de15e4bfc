"""Hold the code against docs/architecture.md: imports between rooms, import circles, seams, and the names it gives."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

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
HEAVY = {
    "datasets",
    "wandb",
    "wandb_workspaces",
    "tensorboard",
    "matplotlib",
    "transformers",
    "sentencepiece",
    "tokenizers",
    "jinja2",
    "plotly",
    "deepspeed",
    "fsspec",
    "bitsandbytes",
}
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
    """Return, for every wing (a package inside a room), the other wings that its modules import."""
    wings = [f"{room}.{path.parent.name}" for room in OURS for path in (ROOT / room).glob("*/__init__.py")]
    graph: dict[str, set[str]] = {wing: set() for wing in wings}
    for module, imported in imported_modules().items():
        node, *others = (".".join(name.split(".")[:2]) for name in (module, *imported))
        if node in graph:
            graph[node] |= {*others} & graph.keys() - {node}
    return graph


def test_no_import_circle_between_wings() -> None:
    assert circle(imported_wings()) == []


def test_the_page_has_every_wing_and_the_wings_that_it_may_import() -> None:
    graph = {wing: others for wing, others in imported_wings().items() if room_of(wing) in ROOMS}
    rows = {row[0].strip("`/").replace("/", "."): row[2].replace("/", ".") for row in rows_of("Wings")}
    assert rows.keys() == graph.keys()
    wrong = {wing: [name for name in others if f"`{name}.`" not in rows[wing]] for wing, others in graph.items()}
    assert wrong == {wing: [] for wing in graph}


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


# ------------------------------------------------------------------------------------------------------------- seams
# A seam is an attribute of a module in moe/ that code outside of the module's `__init__` replaces, or an argument with
# a function as its default. Both are found in the syntax trees, so that no seam can be forgotten.


def functions_of(path: Path) -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Yield (class, place, function) for every function of the file, with an empty class, and for every method.

    The place is `file:function` or `file:class.method`.
    """
    file = path.relative_to(ROOT)
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef):
            yield "", f"{file}:{node.name}", node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield node.name, f"{file}:{node.name}.{member.name}", member


@cache
def names_used_in(function: ast.FunctionDef) -> set[str]:
    """Return the variables and the string constants in the function."""
    constants = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} | {str(value) for value in constants}


def assignments(body: ast.AST | list[ast.stmt]) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield (target, value) of the assignments in a function, or in the statements of a class or a module."""
    for node in body if isinstance(body, list) else ast.walk(body):
        if isinstance(node, ast.Assign):
            yield from ((part, node.value) for target in node.targets for part in ast.walk(target))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value


def replaced_attributes(path: Path, function: ast.FunctionDef) -> Iterator[tuple[str, str, str]]:
    """Yield (object, attribute, value), as source text, wherever the function assigns or replaces an attribute.

    It does so by `=`, `setattr` or `add_module`. `setattr(x.layers, <computed name>, value)` replaces an item of
    `x.layers`. Elsewhere the attribute of a computed name is the empty string. A computed name whose value is an
    `nn.Parameter` is left out: there, a weight is replaced by the part that this rank stores.
    """
    constants = {ast.unparse(target): value for target, value in assignments(tree_of(path).body)}
    for target, value in assignments(function):
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
            yield ast.unparse(target.value), target.attr, ast.unparse(value)
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name(id="setattr"), args=[owner, name, value]):
                pass
            case ast.Call(func=ast.Attribute(value=owner, attr="add_module" | "register_module"), args=[name, value]):
                pass
            case _:
                continue
        name = constants.get(ast.unparse(name), name)
        if isinstance(name, ast.Constant):
            yield ast.unparse(owner), str(name.value), ast.unparse(value)
        elif isinstance(owner, ast.Attribute):
            yield ast.unparse(owner.value), owner.attr, ast.unparse(value)
        elif not ast.unparse(value).startswith("nn.Parameter("):
            yield ast.unparse(owner), "", ast.unparse(value)


class ModuleClass(NamedTuple):
    """A subclass of `nn.Module` in moe/."""

    bases: set[str]
    """Its base classes in moe/, and itself."""
    attributes: dict[str, str]
    """The attributes that its body or its `__init__` assigns, with their values as source text."""


@cache
def modules_of_moe() -> dict[str, ModuleClass]:
    """Return every subclass of `nn.Module` in moe/ by its name."""
    files = sorted((ROOT / "moe").rglob("*.py"))
    classes = {node.name: node for path in files for node in tree_of(path).body if isinstance(node, ast.ClassDef)}

    def bases_of(name: str) -> set[str]:
        node = classes.get(name)
        return {name}.union(*(bases_of(ast.unparse(base)) for base in node.bases)) if node else {name}

    modules = {}
    for name, node in classes.items():
        if any(base.startswith("nn.") for base in bases_of(name)):
            attributes = {ast.unparse(target): ast.unparse(value) for target, value in assignments(node.body)}
            modules[name] = ModuleClass(bases_of(name) & classes.keys(), attributes)
    for path in files:
        for owner, _, function in functions_of(path):
            if owner in modules and function.name == "__init__":
                replaced = replaced_attributes(path, function)
                modules[owner].attributes.update({name: value for of, name, value in replaced if of == "self"})
    return modules


def replaced_seams(files: list[Path]) -> dict[str, set[str]]:
    """Return `Class.attribute` -> the places that replace it from outside of `__init__`.

    Every module in moe/ that has an attribute of this name counts, unless the function names some of these classes. An
    attribute of a computed name counts as the class attribute that the function names and that the name comes from.
    """
    modules = modules_of_moe()
    seams = defaultdict(set)
    for path in files:
        for owner, place, function in functions_of(path):
            names = names_used_in(function)
            named = set[str]().union(*(module.bases for name, module in modules.items() if name in names))
            for of, attribute, _ in replaced_attributes(path, function):
                if of == "ctx" or (of == "self" and (owner not in modules or function.name == "__init__")):
                    continue  # `ctx` is the context of an autograd function
                wanted = {attribute} if attribute else names
                found = {(name, key) for name, module in modules.items() for key in module.attributes.keys() & wanted}
                assert found or attribute, f"{place} replaces an attribute, and its name cannot be found out"
                if of == "self":
                    found = {(owner, attribute)}
                for name, key in {(name, key) for name, key in found if name in named} or found:
                    seams[f"{name}.{key}"].add(place)
    return dict(seams)


@cache
def functions_as_defaults() -> dict[str, tuple[set[str], str]]:
    """Return `function.argument` and `Class.field` in moe/ -> the places that pass another value, and the default.

    These are the arguments and fields that are annotated as callables and have a default.
    """
    seams = {}

    def add(name: str, argument: str, annotation: ast.expr | None, default: ast.expr | None) -> None:
        if annotation is not None and default is not None and ast.unparse(annotation).startswith("Callable["):
            seams[f"{name}.{argument}"] = set(places_that_pass(argument, name)), ast.unparse(default)

    for path in sorted((ROOT / "moe").rglob("*.py")):
        for _, _, function in functions_of(path):
            positional, keyword = function.args.args, function.args.kwonlyargs
            defaults = [*[None] * (len(positional) - len(function.args.defaults)), *function.args.defaults]
            for argument, default in zip([*positional, *keyword], [*defaults, *function.args.kw_defaults], strict=True):
                add(function.name, argument.arg, argument.annotation, default)
        for node in tree_of(path).body:
            for field in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(field, ast.AnnAssign):
                    add(node.name, ast.unparse(field.target), field.annotation, field.value)
    return seams


def places_that_pass(argument: str, called: str) -> Iterator[str]:
    """Yield the places that name the function or class `called` and call something with the keyword `argument`."""
    for path in SOURCES:
        for _, place, function in functions_of(path):
            if called not in names_used_in(function):
                continue
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            if argument in {key.arg for call in calls for key in call.keywords}:
                yield place


def test_the_page_has_every_seam_and_who_installs_it() -> None:
    documented = {row[0].strip("`"): set(re.findall(r"`([\w/]+\.py:[\w.]+)`", row[2])) for row in rows_of("Seams")}
    assert documented == replaced_seams(SOURCES) | {
        seam: places for seam, (places, _) in functions_as_defaults().items()
    }


def test_the_page_has_the_default_of_every_seam() -> None:
    defaults = {seam: default for seam, (_, default) in functions_as_defaults().items()}
    for name, module in modules_of_moe().items():
        defaults |= {f"{name}.{attribute}": value for attribute, value in module.attributes.items()}
    for seam, default, *_ in rows_of("Seams"):
        named = re.findall(r"`([^`]+)`", default)
        assert named and all(name in defaults[seam.strip("`")] for name in named), (seam, defaults[seam.strip("`")])


def test_seams_are_found_however_they_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = modules_of_moe() | {"Other": ModuleClass({"Other"}, {"lookup": "1", "METHOD": "2"})}
    assert modules["Attention"].attributes["gather"] == "nn.Identity()"
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    monkeypatch.setattr("tests.test_architecture.modules_of_moe", lambda: modules)
    file = tmp_path / "bad.py"
    file.write_text(
        "NAME = 'slice_local'\n"
        "def install(model: Transformer) -> None:\n"
        "    for module in model.modules():\n"
        "        if isinstance(module, Attention | FeedForward):\n"
        "            module.gather, module.other = 1, 2\n"
        "            module.add_module('core', 3)\n"
        "    def inner():\n"
        "        setattr(model, NAME, 4)\n"
        "        setattr(model.layers, str(5), 5)\n"
        "        setattr(model, name, nn.Parameter(6))\n"
        "    model.layers[0].dispatcher = 7\n"
        "def set_mode(model: nn.Module) -> None:\n"
        "    for module in model.modules():\n"
        "        name = getattr(module, 'METHOD')\n"
        "        setattr(module, name, 8)\n"
        "        module.lookup: int = 9\n"
        "class Elsewhere:\n"
        "    def change(self, other: Other) -> None:\n"
        "        self.gather, other.lookup = 10, 11\n"
        "class Other(nn.Module):\n"
        "    def change(self) -> None:\n"
        "        self.gather = 12\n"
    )
    installed = {
        "bad.py:install": "Attention.gather FeedForward.gather Transformer.gather Attention.core "
        "Transformer.slice_local Transformer.layers MoELayer.dispatcher",
        "bad.py:set_mode": "Other.METHOD Other.lookup Transformer.lookup",
        "bad.py:Elsewhere.change": "Other.lookup",
        "bad.py:Other.change": "Other.gather",
    }
    expected = defaultdict(set)
    for place, seams in installed.items():
        for seam in seams.split():
            expected[seam].add(place)
    assert replaced_seams([file]) == expected
    hidden = tmp_path / "hidden.py"
    hidden.write_text("def hide(module: nn.Module, name: str) -> None:\n    setattr(module, name, 1)\n")
    with pytest.raises(AssertionError, match=r"hidden.py:hide replaces an attribute"):
        replaced_seams([hidden])


# ------------------------------------------------------------------------------- protocols, registries and the mesh


def classes() -> Iterator[ast.ClassDef]:
    """Yield every class that stands at the top level of a file."""
    yield from (node for path in SOURCES for node in tree_of(path).body if isinstance(node, ast.ClassDef))


def test_the_page_has_every_protocol() -> None:
    protocols = {node.name for node in classes() if "Protocol" in map(ast.unparse, node.bases)}
    assert {row[0].strip("`") for row in rows_of("Protocols")} == protocols


def test_the_page_has_every_registry() -> None:
    registries = {
        f"{path.relative_to(ROOT)}:{ast.unparse(target)}"
        for path in SOURCES
        for target, value in assignments(tree_of(path).body)
        if ast.unparse(value).startswith("Registry(")
    }
    assert {name for row in rows_of("Plugins") for name in re.findall(r"`([^`]+)`", row[0])} == registries


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
    folders = "|".join([*OURS - {"train"}, "conf", "docs", "examples"])
    found = re.findall(rf"`((?:{folders})/[\w/.*-]*|train\.py)(?::([\w.]+))?`", page.read_text(encoding="utf-8"))
    assert len(found) > 20
    assert [path for path, _ in found if not any(ROOT.glob(path.rstrip("/")))] == []
    missing = [(path, name) for path, name in found if name and not set(name.split(".")) <= names_in(ROOT / path)]
    assert missing == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []
