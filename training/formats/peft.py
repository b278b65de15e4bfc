"""Adapters in peft's format, in both directions: `adapter_config.json` and `adapter_model.safetensors`.

A linear map has `<module>.lora_A.weight` [r, I], `<module>.lora_B.weight` [O, r] and with DoRA
`<module>.lora_magnitude_vector` [O]. The names of modules are those in transformers 5. peft 0.17 and later also adapts
parameters that are no linear maps (`target_parameters`): routers, and the stacked matrices of a layer's experts. The
factors of all experts are then one A [E·r, I] and one B [O, r·E]. If a module has several such parameters, peft nests
wrappers: all but the last one have a `.base_layer` more in their names.

transformers stacks the experts' gate and up projections in one parameter, whose adapter has one A. Two factors A are
written as one of twice the rank, with a block-diagonal B. Files with one tensor per expert, the names before
transformers 5, are read too.

Shapes: E experts, r rank, I input and O output width of a matrix, F expert hidden.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import ModelError, expect_no_tensors, require
from common.files import fsync, write_atomically
from common.text import printable, to_json
from moe.accounting.flops import meta_model
from moe.adapter import adaptable_weights
from moe.config import AdapterConfig, ModelConfig, RouterConfig, matches_any, split_adapter_name
from moe.experts import Experts
from moe.region import Region
from training.checkpoint.shards import LazyTensor, write_safetensors
from training.formats.families import FAMILIES
from training.formats.families.experts import FUSED, FUSED_PARTS
from training.formats.fields import Fields
from training.formats.foreign_tensors import Shape, TensorDirectory, read_json
from training.formats.huggingface import write_config
from training.formats.model_directory import Block, new_directory, write_model
from training.formats.reader import ModelReader, RunReader, describe_base

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT = "base_fingerprint"
"""Key of the metadata of a file that Mixwright writes: the base's fingerprint (`training.formats.fingerprint`)."""
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(lora_(?P<factor>[AB])\.weight|lora_magnitude_vector)")
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "bias",
}
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "target_parameters", "exclude_modules", "lora_dropout", "megatron_core", "qalora_group_size"),
}
"""Keys that do not change what the file's tensors mean. The tensors say which modules have adapters, and their rank."""
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mpt")
"""Values of `init_lora_weights` with which training begins without changing the base."""


class Place(NamedTuple):
    """Where a matrix of a foreign parameter is in Mixwright's model."""

    weight: str
    """Mixwright's name of the parameter."""
    expert: int | None
    """The index in a stack, if each matrix of it is a foreign parameter."""
    part: int
    parts: int
    """The matrix is this one of so many equal parts of the foreign one, along the rows."""


def foreign_names(model: ModelConfig, router: RouterConfig) -> dict[str, str]:
    """Return Mixwright's name of a weight, with `N` for the layer -> its name in transformers, with `{n}`.

    Raises:
        ModelError: no family of transformers has the model, or only remote code computes it.
    """
    raw = write_config(model, router, "float32", 1)
    family = FAMILIES[raw["model_type"]]
    require(
        family.model_type != "deepseek",
        ModelError,
        f"format=peft: expected a model that transformers has; {family.architecture} is remote code",
    )
    return family.NAMES | (FUSED if family.moe else {})


def _places(model: ModelConfig, router: RouterConfig, shapes: Mapping[str, Shape]) -> dict[str, list[Place]]:
    """Return the name of each parameter in transformers -> its matrices. Names before transformers 5 are included."""
    fused = foreign_names(model, router)
    family = FAMILIES[write_config(model, router, "float32", 1)["model_type"]]
    found: dict[str, list[Place]] = {}
    for name, shape in shapes.items():
        key = re.sub(r"^layers\.\d+\.", "layers.N.", name)
        layer = name.split(".")[1] if key != name else ""
        for foreign in {fused.get(key), family.NAMES.get(key)} - {None}:
            assert foreign is not None
            if "{e}" in foreign:
                for expert in range(shape[0]):
                    found.setdefault(foreign.format(n=layer, e=expert), []).append(Place(name, expert, 0, 1))
            else:
                part, parts = FUSED_PARTS.get(key, (0, 1)) if foreign == FUSED.get(key) else (0, 1)
                found.setdefault(foreign.format(n=layer), []).append(Place(name, None, part, parts))
    return found


def export_adapter(reader: ModelReader, out: Path) -> int:
    """Write the adapters of a run in the format of peft. They are stored in fp32.

    Args:
        reader: a reader of a run with adapters.
        out: the directory to write.

    Returns:
        The size of the tensors in bytes.

    Raises:
        ModelError: the format cannot describe what the run has trained, or `out` exists or cannot be written.
    """
    assert isinstance(reader, RunReader) and reader.base is not None and reader.model.adapter is not None
    adapter, base = reader.model.adapter, reader.base
    _check_trained(reader, base)
    names = foreign_names(replace(reader.model, adapter=None), reader.router)
    modules: dict[str, dict[int, str]] = {}
    """Foreign parameter -> the part of it -> Mixwright's name of the weight."""
    numbers: dict[str, int] = {}
    for name in reader.shapes:
        weight, part = split_adapter_name(name)
        if part == "a":
            key = re.sub(r"^layers\.\d+\.", "layers.N.", weight)
            require(key in names, ModelError, f"{weight}: format=peft has no place for an adapter of this weight")
            foreign = names[key].format(n=weight.split(".")[1])
            index, numbers[foreign] = FUSED_PARTS.get(key, (0, 1))
            modules.setdefault(foreign, {})[index] = weight
    linear = [module.removesuffix(".weight") for module, owned in modules.items() if _is_linear(module, owned)]
    parameters = [module for module, owned in modules.items() if not _is_linear(module, owned)]
    if adapter.dora and parameters:
        raise ModelError(f"adapter.dora=true: expected adapters of linear maps only; peft has none for {parameters[0]}")
    ranks = {module: adapter.rank * len(owned) for module, owned in modules.items() if len(owned) > 1}
    rows = adapter.scaling == "rslora"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "r": adapter.rank,
        "lora_alpha": _whole(adapter.alpha),
        "lora_dropout": 0.0,
        "use_rslora": rows,
        "use_dora": adapter.dora,
        "target_modules": linear,
        "target_parameters": parameters or None,
        "rank_pattern": ranks,
        "alpha_pattern": {
            module: _whole(adapter.scale * (math.sqrt(rank) if rows else rank)) for module, rank in ranks.items()
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors = []
    for module, owned in modules.items():
        target = PREFIX + _wrapped(module, parameters)
        make = partial(_factors, reader, owned, numbers[module])
        factors = make()
        kinds = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
        for part, tensor in factors.items():
            lazy = partial(lambda make, part: make()[part], make, part)
            tensors.append(LazyTensor(f"{target}.{kinds[part]}", torch.float32, tuple(tensor.shape), lazy))
    fingerprint = describe_base(base)["fingerprint"]
    with new_directory(out) as directory:
        write_safetensors(directory / WEIGHTS, tensors, {"format": "pt", FINGERPRINT: fingerprint})
        write_atomically(directory / CONFIG, to_json(config, indent=2) + "\n")
        for path in directory.iterdir():
            fsync(path)
    return sum(tensor.nbytes for tensor in tensors)


def _check_trained(reader: RunReader, base: ModelReader) -> None:
    """Raise ModelError if the run has trained anything besides adapters."""
    for name in reader.stored:
        if split_adapter_name(name)[1] is not None:
            continue
        whole = Region.whole(reader.shapes[name])
        same = torch.equal(reader.read(name, whole, torch.float64), base.read(name, whole, torch.float64))
        require(same, ModelError, f"{name}: expected the values of the base; format=peft has adapters alone")


def _is_linear(module: str, owned: Mapping[int, str]) -> bool:
    """Whether a foreign parameter is the weight of a linear map. Routers and stacked experts are not, since
    transformers 5."""
    return module.endswith(".weight") and not any(".router." in weight for weight in owned.values())


def _wrapped(parameter: str, targets: list[str]) -> str:
    """Return the module under whose name peft stores the adapter of a foreign parameter.

    Args:
        targets: all parameters that are adapted as such, in the order of their modules.
    """
    if parameter not in targets:
        return parameter.removesuffix(".weight")
    module = parameter.rpartition(".")[0]
    siblings = [target for target in targets if target.rpartition(".")[0] == module]
    siblings.sort(key=lambda name: not name.endswith("gate_up_proj"))  # the order in transformers' modules
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(parameter))


def _factors(reader: ModelReader, owned: Mapping[int, str], number: int) -> dict[str, Tensor]:
    """Return the foreign factors of one parameter.

    Args:
        owned: the part of the foreign parameter -> Mixwright's weight, for those with adapters.
        number: parts of the foreign parameter.
    """

    def read(weight: str, part: str) -> Tensor:
        prefix, _, leaf = weight.rpartition(".")
        owner = f"{prefix}.adapter" if leaf == "weight" else f"{prefix}.adapters.{leaf}"
        return reader.read(f"{owner}.{part}", Region.whole(reader.shapes[f"{owner}.{part}"]), torch.float32)

    first = next(iter(owned.values()))
    if len(reader.shapes[first]) == 2:
        parts = ["a", "b"] + (["magnitude"] if reader.model.adapter and reader.model.adapter.dora else [])
        return {part: read(first, part) for part in parts}
    a_ErI = torch.cat([read(weight, "a") for weight in owned.values()], dim=1)
    experts, rank, width = a_ErI.shape
    rows, own = reader.shapes[first][1], rank // len(owned)
    b_EOr = a_ErI.new_zeros(experts, rows * number, rank)
    for column, (part, weight) in enumerate(owned.items()):
        b_EOr[:, part * rows : (part + 1) * rows, column * own : (column + 1) * own] = read(weight, "b")
    return {"a": a_ErI.reshape(-1, width), "b": b_EOr.permute(1, 2, 0).reshape(rows * number, -1)}


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def import_adapter(source: Path, base: ModelReader, out: Path) -> int:
    """Write an adapter in the format of peft as a model directory like that of a run with adapters.

    Args:
        source: the directory with `adapter_config.json`.
        base: the model that the adapter is added to.
        out: the directory to write.

    Returns:
        The size of the weights' files in bytes.

    Raises:
        ModelError: the adapter is for another model, has a key that is not implemented, or a file is damaged; or `out`
            exists or cannot be written.
    """
    fields = Fields(read_json(source / CONFIG), source / CONFIG, {"bias": "none"})
    _check_config(fields)
    files = TensorDirectory(source, f"{WEIGHTS}.index.json", WEIGHTS)
    _check_fingerprint(source, base)
    rank = fields.integer("r")
    rslora, dora = (fields.get(key) is not None and fields.flag(key) for key in ("use_rslora", "use_dora"))
    adapter = AdapterConfig(
        kind="lora", rank=rank, alpha=fields.number("lora_alpha"), dora=dora, scaling="rslora" if rslora else "standard"
    )
    read = _Importer(fields, files, base, adapter)
    factors = read.factors()
    most = max(parts["a"].shape[-2] for parts in factors.values())
    if most != rank:
        adapter = replace(adapter, rank=most, alpha=adapter.scale * (math.sqrt(most) if rslora else most))
    targets = _targets(factors, base)
    model = replace(base.model, adapter=replace(adapter, targets=targets))
    blocks = []
    for weight, parts in factors.items():
        prefix, _, leaf = weight.rpartition(".")
        owner = f"{prefix}.adapter" if leaf == "weight" else f"{prefix}.adapters.{leaf}"
        missing = adapter.rank - parts["a"].shape[-2]
        padded = {
            "a": torch.nn.functional.pad(parts["a"], (0, 0, 0, missing)),
            "b": torch.nn.functional.pad(parts["b"], (0, missing)),
        } | {part: tensor for part, tensor in parts.items() if part == "magnitude"}
        for part, tensor in padded.items():
            shape, make = tuple(tensor.shape), partial(torch.clone, tensor)
            blocks.append(Block(f"{owner}.{part}", shape, Region.whole(shape), torch.float32, make))
    return write_model(out, model, base.router, blocks, base.tokenizer, base=describe_base(base))


def _check_config(fields: Fields) -> None:
    """Raise ModelError for a key that changes what the adapter computes and is not implemented."""
    fields.expect(fields.get("peft_type") == "LORA", "peft_type", fields.get("peft_type"), "LORA")
    fields.expect(fields.get("bias") == "none", "bias", fields.get("bias"), "none")
    start = fields.raw.get("init_lora_weights", True)
    fields.expect(
        start in _HARMLESS_STARTS,
        "init_lora_weights",
        start,
        "true, false or gaussian (others also change the weights that the adapter is added to)",
    )
    for key, value in fields.raw.items():
        neutral = value in (None, False) or value in ([], {})
        known = key in _READ or key in _IGNORED or neutral
        fields.expect(known, key, value, "null; this key can change what the adapter computes")


def _check_fingerprint(source: Path, base: ModelReader) -> None:
    from safetensors import safe_open

    with safe_open(source / WEIGHTS, framework="pt") as file:
        recorded = (file.metadata() or {}).get(FINGERPRINT)
    found = describe_base(base)["fingerprint"]
    require(
        recorded in (None, found),
        ModelError,
        f"{base.shown or base.path}: expected the weights that the adapter in {source} was trained with (fingerprint "
        f"{str(recorded)[:12]}); found {found[:12]}",
    )


class _Importer:
    """Reads the tensors of an adapter, and puts them where Mixwright has them."""

    def __init__(self, fields: Fields, files: TensorDirectory, base: ModelReader, adapter: AdapterConfig) -> None:
        self.fields, self.files, self.base, self.adapter = fields, files, base, adapter
        chosen = adaptable_weights(meta_model(base.model, base.router))
        weights = {name if isinstance(module, Experts) else f"{name}.{leaf}" for name, module, leaf in chosen}
        shapes = {name: shape for name, shape in base.shapes.items() if name in weights}
        self.places = _places(base.model, base.router, shapes)
        self.alphas = dict(self._alphas())
        ranks = fields.get("rank_pattern") or {}
        whole = isinstance(ranks, dict) and all(type(rank) is int for rank in ranks.values())
        fields.expect(whole, "rank_pattern", ranks, "an object of integers")
        self.ranks = {adapter.rank, *ranks.values()}
        """The ranks that the file says its adapters have."""

    def _alphas(self) -> Iterator[tuple[str, float]]:
        """Yield (the end of the name of a module, its alpha). peft's patterns are expressions; names are enough."""
        patterns = self.fields.get("alpha_pattern") or {}
        self.fields.expect(isinstance(patterns, dict), "alpha_pattern", patterns, "an object")
        for pattern, alpha in patterns.items():
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            name = name.removeprefix("(.*.)?").removeprefix(".*.").removeprefix(".*")
            positive = type(alpha) in (int, float) and alpha > 0
            fits = re.fullmatch(r"[\w.]+", name) is not None and positive
            self.fields.expect(fits, "alpha_pattern", {pattern: alpha}, "names of modules, each with a number > 0")
            yield name, float(alpha)

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """Return Mixwright's weight -> `a`, `b` and with DoRA `magnitude`, in fp32, with the factor of `adapter`.

        Raises:
            ModelError: a tensor has no place in the model, another shape, or lacks another one.
        """
        modules: dict[str, dict[str, str]] = {}
        strange = []
        for name in self.files.tensors:
            match = _TENSOR.fullmatch(name)
            if match is None:
                strange.append(name)
            else:
                dims, shape = (2 if match["factor"] else 1), list(self.files.tensors[name].shape)
                place = f"{self.fields.file.parent / WEIGHTS}: {printable(name)[:200]}"
                require(len(shape) == dims, ModelError, f"{place}: found shape {shape}, expected {dims} dimensions")
                modules.setdefault(match["module"], {})[match["factor"] or "magnitude"] = name
        where = self.fields.file.parent
        expect_no_tensors(where, "that are not those of a LoRA adapter", strange, ModelError)
        require(modules, ModelError, f"{where / WEIGHTS}: expected the factors of an adapter, found none")
        parts = {"A", "B", "magnitude"} if self.adapter.dora else {"A", "B"}
        found: dict[str, dict[str, Tensor]] = {}
        for module, tensors in modules.items():
            for part in parts ^ tensors.keys():
                state = "missing" if part in parts else "that use_dora=false does not have"
                expect_no_tensors(where, state, [f"{PREFIX}{module}.lora_{part}"], ModelError)
            parameter = self._parameter(module, modules)
            places = self.places.get(parameter)
            if places is None:
                raise ModelError(
                    f"{where}: {PREFIX}{module}: the model {self.base.shown or self.base.path} has no weight of this "
                    "name that can have an adapter: expected the adapter of this model"
                )
            self._add(module, parameter, places, {part: self._read(name) for part, name in tensors.items()}, found)
        return found

    def _read(self, name: str) -> Tensor:
        shape = self.files.tensors[name].shape
        return self.files.read(name, (0,) * len(shape), shape).float()

    def _parameter(self, module: str, modules: Mapping[str, object]) -> str:
        """Return the foreign parameter that is adapted under the name `module`."""
        plain = module
        while plain.endswith(".base_layer"):
            plain = plain.removesuffix(".base_layer")
        if f"{plain}.weight" in self.places:
            return f"{plain}.weight"
        owned = [name for name in self.places if name.startswith(f"{plain}.") and "." not in name[len(plain) + 1 :]]
        owned.sort(key=lambda name: not name.endswith("gate_up_proj"))
        if f"{plain}.base_layer" in modules and len(owned) == 2:
            return owned[0] if plain != module else owned[1]
        # The only adapted parameter of its module: which one it is follows from its width.
        width = self.files.tensors[f"{PREFIX}{module}.lora_A.weight"].shape[-1]
        fits = [name for name in owned if self.base.shapes[self.places[name][0].weight][-1] == width]
        targets = self.fields.raw.get("target_parameters") or []
        named = [name for name in fits if isinstance(targets, list) and any(name.endswith(str(t)) for t in targets)]
        return named[0] if len(named) == 1 else fits[0] if len(fits) == 1 else plain

    def _scale(self, parameter: str, rank: int) -> float:
        """Return the factor of the product of an adapter of this rank."""
        module = parameter.removesuffix(".weight")
        ends = [end for end in self.alphas if any(f".{name}".endswith(f".{end}") for name in (module, parameter))]
        alpha = self.alphas[ends[0]] if ends else self.adapter.alpha
        return alpha / (math.sqrt(rank) if self.adapter.scaling == "rslora" else rank)

    def _add(
        self,
        module: str,
        parameter: str,
        places: list[Place],
        tensors: dict[str, Tensor],
        found: dict[str, dict[str, Tensor]],
    ) -> None:
        """Add the adapter of one foreign parameter to `found`."""
        a, b = tensors["A"], tensors["B"]
        shape = self.base.shapes[places[0].weight]
        where = f"{self.fields.file.parent}: {PREFIX}{module}"
        holds = len(shape) == 2 or not self.adapter.dora
        require(holds, ModelError, f"{where}: expected use_dora=false with an adapter of experts")
        stacked = len(shape) == 3 and places[0].expert is None
        experts = shape[0] if stacked else 1
        rank, outputs = a.shape[0] // experts, shape[-2] * places[0].parts
        expected = {"A": (experts * rank, shape[-1]), "B": (outputs, experts * rank), "magnitude": (outputs,)}
        for part, tensor in tensors.items():
            require(
                tuple(tensor.shape) == expected[part] and rank > 0,
                ModelError,
                f"{where}: found {part} {list(tensor.shape)}, expected "
                f"{list(expected[part])} for {self.base.shown or self.base.path}",
            )
        if stacked:
            a, b = a.view(experts, rank, -1), b.view(outputs, rank, experts).permute(2, 0, 1)
        known = ", ".join(map(str, sorted(self.ranks)))
        message = f"{where}: found rank {rank}, expected {known}, as r and rank_pattern say"
        require(rank in self.ranks, ModelError, message)
        scale = self._scale(parameter, rank)
        own = rank // 2
        halves = stacked and places[0].parts == 2 and len(places) == 2 and rank == 2 * own
        if halves:
            top, bottom = b.chunk(2, dim=1)
            halves = not top[..., own:].any() and not bottom[..., :own].any()
        for place in places:
            rows = slice(place.part * shape[-2], (place.part + 1) * shape[-2])
            columns = slice(place.part * own, (place.part + 1) * own) if halves else slice(None)
            part_b = b[..., rows, columns]
            if scale != self.adapter.scale:
                part_b = part_b * (scale / self.adapter.scale)
            part_a = a[..., columns, :]
            if place.expert is None:
                if stacked and not part_b.any():
                    continue  # The file has an adapter of the other half of the parameter alone.
                found[place.weight] = {"a": part_a, "b": part_b}
                if "magnitude" in tensors:
                    found[place.weight]["magnitude"] = tensors["magnitude"]
                continue
            stack = found.setdefault(
                place.weight,
                {"a": a.new_zeros(shape[0], rank, shape[2]), "b": b.new_zeros(shape[0], shape[1], rank)},
            )
            same = stack["a"].shape[1] == rank
            require(same, ModelError, f"{PREFIX}{module}: found rank {rank}, expected that of the other experts")
            stack["a"][place.expert], stack["b"][place.expert] = part_a, part_b


def _targets(factors: Mapping[str, object], base: ModelReader) -> tuple[str, ...]:
    """Return `adapter.targets` that choose exactly the weights in `factors`: ends of names if these are enough."""
    wanted = {name.removesuffix(".weight") for name in factors}
    matrices = {name.removesuffix(".weight") for name, shape in base.shapes.items() if len(shape) > 1}
    ends = tuple(sorted({re.sub(r"^layers\.\d+\.", "", name) for name in wanted}))
    chosen = {name for name in matrices if matches_any(ends, name)}
    return ends if chosen == wanted else tuple(sorted(wanted))
