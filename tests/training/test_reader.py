"""Model directories of every kind: filling whole models and shards, errors, round trips."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from common.strict import to_dict
from moe.config import ROUTER_CONFIGS, ModelConfig, RouterConfig
from moe.experts import Experts
from moe.init import init_parameters
from moe.model import Transformer
from moe.region import LocalShard, Region, whole_shard
from tests.distributed.harness import run_ranks
from tests.foreign import MISTRAL_CASES, cases, load_model, logits_of, random_tokens, save_reference
from training.checkpoint import checkpoint, manifest
from training.formats.export import export_model, import_model, parse_size
from training.formats.foreign_tensors import TensorDirectory
from training.formats.model_directory import group_by_size
from training.formats.reader import ReadRequest, open_model, read_run_config
from training.run import save_config

EVERYTHING = ModelConfig(
    dim=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12, num_experts=6, top_k=2, vocab_size=11,
    expert_hidden_dim=5, num_shared_experts=2, first_k_dense=1, ffn="geglu", sliding_window=(3, None, 4),
)  # fmt: skip
SIGMOID = RouterConfig(kind="sigmoid_topk", scale=2.5, num_groups=3, topk_groups=2)


def run_directory(root, model, *, steps=(3,), config=EVERYTHING, router=SIGMOID):
    """Write a run's directory as train.py does: checkpoints have weights and moments."""
    save_config(root, {"run": {"name": "x"}, "model": to_dict(config), "router": to_dict(router)})
    for step in steps:
        tensors = {f"model.{name}": tensor + step for name, tensor in model.state_dict().items()}
        tensors |= {f"exp_avg.{name}": tensor for name, tensor in model.state_dict().items()}
        checkpoint.save(root / "checkpoints", step, tensors, {"step": step}, keep=5)


def everything(seed=0):
    model = Transformer(EVERYTHING, SIGMOID, torch.float32)
    init_parameters(model, seed)
    for name, buffer in model.named_buffers():
        buffer.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def export(reader, out, form="hf", dtype="fp32", shard_bytes=10**9):
    export_model(reader, out, form=form, dtype=dtype, shard_bytes=shard_bytes, positions=64)
    return out


def test_a_run_is_opened_at_its_newest_undamaged_checkpoint_or_at_a_given_one(tmp_path):
    model = everything()
    run_directory(tmp_path, model, steps=(3, 7))
    reader = open_model(tmp_path)
    assert (reader.kind, reader.model, reader.router, reader.tokenizer) == ("run", EVERYTHING, SIGMOID, None)
    assert reader.path == tmp_path / "checkpoints" / "step-7"
    assert torch.equal(load_model(reader).embedding, model.embedding + 7)
    older = open_model(tmp_path / "checkpoints" / "step-3")
    assert torch.equal(load_model(older).layers[1].ffn.router.bias, model.layers[1].ffn.router.bias + 3)

    shard = next((tmp_path / "checkpoints" / "step-7").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    lines = []
    assert open_model(tmp_path, warn=lines.append).path.name == "step-3"
    assert len(lines) == 1 and "skipping checkpoint step-7" in lines[0]
    with pytest.raises(ModelError, match="found sha256"):
        open_model(tmp_path / "checkpoints" / "step-7")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ModelError, match="expected a checkpoint; found none"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "without aliases"),
        ("model: [", "cannot be read as YAML"),
        ("[]", "expected the sections model and router"),
        ("model: {dim: 8}\nrouter: {}\n", "model.num_layers=.*expected an integer"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_a_damaged_configuration_is_an_error(tmp_path, text, message):
    run_directory(tmp_path, everything())
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path)


REQUEST = "; it was written with plugins=[noisy_topk.py]: name them again on the command line"


@pytest.mark.parametrize(
    ("model", "router", "message"),
    [
        ({}, {"kind": "noisy_topk", "noise_std": 0.5}, "router.kind=noisy_topk: an unknown kind"),
        ({}, {"noise_std": 0.5}, "router.noise_std=0.5: unknown key; the nearest valid key is router.jitter"),
        (
            {"ffn": "noisy"},
            {},
            "model.ffn=noisy: expected one of swiglu, geglu, relu, gelu, "
            "or a name that a module in plugins=[...] registers",
        ),
    ],
)
def test_a_run_that_needs_a_plugin_asks_for_it_and_never_loads_it(model, router, message, tmp_path, monkeypatch):
    """The directory's own plugin file would end the test if it were imported."""
    run_directory(tmp_path, everything())
    plugin = tmp_path / "noisy_topk.py"
    plugin.write_text("raise SystemExit('the plugin was imported')")
    sections = {"model": to_dict(EVERYTHING) | model, "router": to_dict(SIGMOID) | router}
    save_config(tmp_path, {"plugins": [str(plugin)]} | sections)
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.yaml'}: {message}{REQUEST}"

    # The plugin is loaded, but it does not register what the run needs: there is nothing to ask for.
    monkeypatch.setattr("common.plugins._loaded", {"/elsewhere/noisy_topk.py": ("noisy_topk.py", "0")})
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.yaml'}: {message}"


def test_a_run_with_plugins_that_the_model_does_not_need_is_opened(tmp_path):
    model = everything()
    run_directory(tmp_path, model)
    plugins = {"plugins": ["my_corpus.py"]}
    save_config(tmp_path, plugins | {"model": to_dict(EVERYTHING), "router": to_dict(SIGMOID)})
    assert torch.equal(load_model(tmp_path).embedding, model.embedding + 3)


def test_a_router_that_a_loaded_plugin_registers_is_read(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class NoisyConfig(RouterConfig):
        noise_std: float = 1.0

    monkeypatch.setitem(ROUTER_CONFIGS._entries, "noisy_topk", NoisyConfig)
    router = NoisyConfig(kind="noisy_topk", noise_std=0.5)
    save_config(tmp_path, {"plugins": ["noisy_topk.py"], "model": to_dict(EVERYTHING), "router": to_dict(router)})
    assert read_run_config(tmp_path / "config.yaml") == (EVERYTHING, router)


@pytest.mark.parametrize("kind", ["['a']", "null", "3", '"a\\e[2J\\nb"'])
def test_a_kind_or_a_plugin_that_is_not_a_name_is_an_error_of_one_line(kind, tmp_path):
    save_config(tmp_path, {"model": to_dict(EVERYTHING)})
    with (tmp_path / "config.yaml").open("a") as file:
        file.write(f'router: {{kind: {kind}}}\nplugins: ["a\\e[2J\\nb.py", [1], null]\n')
    with pytest.raises(
        ModelError, match=r"config.yaml: router.kind=.*: an unknown kind; .*it was written with"
    ) as caught:
        read_run_config(tmp_path / "config.yaml")
    assert str(caught.value).isprintable()


def test_a_written_model_directory_records_the_loaded_plugins(tmp_path, monkeypatch):
    save_reference("mixtral", tmp_path / "reference")
    monkeypatch.setattr("common.plugins._loaded", {"/elsewhere/noisy_topk.py": ("noisy_topk.py", "ab")})
    import_model(open_model(tmp_path / "reference"), tmp_path / "imported", "fp32", 10**9)
    assert "plugins:\n- noisy_topk.py\n" in (tmp_path / "imported" / "config.yaml").read_text()
    assert manifest.read_state(open_model(tmp_path / "imported").path)["plugins"] == {"noisy_topk.py": "ab"}


def test_a_checkpoint_of_another_model_is_an_error_that_lists_the_tensors(tmp_path):
    run_directory(tmp_path, everything(), config=dataclasses.replace(EVERYTHING, num_shared_experts=0))
    with pytest.raises(
        ModelError, match=r"6 tensors that the model has no place for: layers.1.ffn.shared.w_down.weight"
    ):
        open_model(tmp_path)
    save_config(tmp_path, {"model": to_dict(dataclasses.replace(EVERYTHING, num_layers=6)), "router": to_dict(SIGMOID)})
    with pytest.raises(ModelError, match=r"tensors missing: layers.3"):
        open_model(tmp_path)
    save_config(tmp_path, {"model": to_dict(dataclasses.replace(EVERYTHING, dim=4)), "router": to_dict(SIGMOID)})
    with pytest.raises(ModelError, match=r"of another shape: embedding \(found \[11, 8\], expected \[11, 4\]\)"):
        open_model(tmp_path)
    save_config(tmp_path, {"model": to_dict(dataclasses.replace(EVERYTHING, dim=2**63)), "router": to_dict(SIGMOID)})
    with pytest.raises(ModelError, match=r"config.yaml: "):
        open_model(tmp_path)


def expert_shard(config, router, first, count):
    """Return the model as one rank of expert parallelism stores it, with NaN in all elements."""
    model = Transformer(config, router, torch.float32)

    def locate_shard(name, tensor):
        if ".experts." not in name:
            return whole_shard(name, tensor)
        rest = tuple(tensor.shape[1:])
        return LocalShard(
            tensor.detach(), (config.num_experts, *rest), Region((first, *[0] * len(rest)), tuple(tensor.shape))
        )

    model.local_shard = locate_shard
    for module in model.modules():
        if isinstance(module, Experts):
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, torch.nn.Parameter(parameter.detach()[first : first + count].clone()))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    return model


@pytest.mark.parametrize("layout", ["per expert", "fused", "mistral", "run"])
def test_a_rank_reads_only_its_experts_and_at_most_one_tensor_at_a_time(layout, tmp_path, monkeypatch):
    whole = write_model_directory(layout, tmp_path)
    reader = open_model(tmp_path / "model")
    reads = []
    original = TensorDirectory.read

    def counted(self, name, offset, shape):
        reads.append((name, torch.Size(shape).numel()))
        return original(self, name, offset, shape)

    monkeypatch.setattr(TensorDirectory, "read", counted)
    shard = expert_shard(reader.model, reader.router, 2, 2)
    reader.fill(shard)
    for name, tensor in shard.state_dict().items():
        expected = whole.state_dict()[name]
        assert torch.equal(tensor, expected[2:4] if ".experts." in name else expected), name
    if layout != "run":
        elements = sum(tensor.numel() for tensor in shard.state_dict().values())
        assert sum(size for _, size in reads) == elements
        assert max(size for _, size in reads) == max(t.numel() for t in shard.state_dict().values() if t.dim() == 2)
        assert not any(f"experts.{other}." in name for name, _ in reads for other in (0, 1, 4))


def write_model_directory(layout, root):
    """Write the model directory `root/model` in this layout, and return its model."""
    save_reference("mixtral-window", root / "reference")
    reader = open_model(root / "reference")
    if layout == "fused":
        fuse(root / "reference", root / "model")
    elif layout == "run":
        import_model(reader, root / "model", "fp32", 10**9)
    else:
        export(reader, root / "model", "mistral" if layout == "mistral" else "hf", shard_bytes=9000)
    return load_model(reader)


def fuse(directory, out):
    """Write the model in `directory` to `out`, with the tensor names of transformers 5's modules."""
    mixtral = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    fused, parts = {}, {}
    for name, tensor in load_all(directory).items():
        match = re.fullmatch(r"(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match:
            parts[match[1], int(match[2]), mixtral.get(match[3], match[3])] = tensor
        else:
            fused[name.replace("block_sparse_moe", "mlp")] = tensor
    layers = {layer for layer, _, _ in parts}
    for layer in layers:
        experts = range(len(parts) // len(layers) // 3)
        gate, up, down = (
            torch.stack([parts[layer, e, part] for e in experts]) for part in ("gate_proj", "up_proj", "down_proj")
        )
        fused[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
        fused[f"{layer}.mlp.experts.down_proj"] = down
    out.mkdir()
    save_file(fused, out / "model.safetensors")
    shutil.copy(directory / "config.json", out)


def fill_shards(rank, world_size, root):
    """Return the logits of every model in `root`. Each rank has read the experts that it stores."""
    from moe.dispatch import LocalDispatcher
    from parallel.apply import build_model
    from parallel.layout import Layout
    from parallel.mesh import build_mesh

    mesh = build_mesh(torch.device("cpu"), Layout(replicate=world_size, expert=world_size))
    logits = {}
    for path in sorted(root.iterdir()):
        reader = open_model(path)
        model = build_model(reader.model, reader.router, mesh, compute_dtype=torch.float32, seed=None)
        reader.fill(model)
        assert not isinstance(model.layers[-1].ffn.dispatcher, LocalDispatcher)
        with torch.no_grad():
            logits[path.name] = logits_of(model, random_tokens(12, seed=rank))
    return logits


def test_expert_parallel_ranks_have_the_logits_of_the_whole_model(tmp_path):
    names = ("mixtral", "olmoe-normalised", "qwen2-moe", "qwen3-moe-dense-layers")
    references = {case: save_reference(case, tmp_path / case) for case in names}
    for rank, logits in enumerate(run_ranks(fill_shards, 2, tmp_path)):
        for case in names:
            expected = references[case](random_tokens(12, seed=rank)).logits
            torch.testing.assert_close(logits[case], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", cases())
def test_round_trips_are_bit_exact(case, tmp_path):
    save_reference(case, tmp_path / "reference")
    first = open_model(tmp_path / "reference")
    import_model(first, tmp_path / "imported", "fp32", 8000)
    imported = open_model(tmp_path / "imported")
    assert imported.kind == "run" and (imported.model, imported.router) == (first.model, first.router)
    assert len(list((tmp_path / "imported" / "checkpoints" / "step-0").glob("*.safetensors"))) > 1
    exported = load_all(export(imported, tmp_path / "exported", shard_bytes=20_000))
    original = load_all(tmp_path / "reference")
    assert original.keys() - exported.keys() <= ({"lm_head.weight"} if first.model.tie_embeddings else set())
    assert all(torch.equal(exported[name], original[name]) for name in exported)
    again = open_model(tmp_path / "exported")
    assert (again.model, again.router) == (first.model, first.router)
    assert equal_weights(load_model(again), load_model(imported))
    if first.model.is_moe:
        model = first.model
        names = [name for name in exported if ".experts." in name]
        assert len(names) == 3 * model.num_experts * model.num_moe_layers and len(set(names)) == len(names)
        fuse(tmp_path / "exported", tmp_path / "fused")
        assert equal_weights(load_model(tmp_path / "fused"), load_model(imported))
    if case in MISTRAL_CASES:
        official = open_model(export(imported, tmp_path / "official", "mistral"))
        assert official.kind == "mistral" and (official.model, official.router) == (first.model, first.router)
        assert equal_weights(load_model(official), load_model(imported))


def load_all(directory):
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


def test_keep_keeps_bf16_and_fp32_converts_it(tmp_path):
    save_reference("mixtral", tmp_path / "reference")
    bf16 = open_model(export(open_model(tmp_path / "reference"), tmp_path / "bf16", dtype="bf16"))
    import_model(bf16, tmp_path / "kept", "keep", 10**9)
    import_model(bf16, tmp_path / "wide", "fp32", 10**9)
    kept, wide = open_model(tmp_path / "kept"), open_model(tmp_path / "wide")
    assert {kept.dtype(name) for name in kept.shapes} == {torch.bfloat16}
    assert {wide.dtype(name) for name in wide.shapes} == {torch.float32}
    assert equal_weights(load_model(kept), load_model(wide))
    again = load_all(export(kept, tmp_path / "again", dtype="bf16"))
    assert all(torch.equal(x, again[name]) for name, x in load_all(tmp_path / "bf16").items())
    target = torch.empty(1, 3)
    wide.copy([ReadRequest("embedding", Region((2, 1), (1, 3)), target)])
    assert torch.equal(target, load_model(wide).embedding[2:3, 1:4])


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"), "1 tensor missing: model.layers.1.bl"),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(1)}), "1 tensor that the model has no place for: model.l"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"of another shape: model.norm.weight \(found \[3\]",
        ),
        (lambda t: [t.pop(name) for name in list(t) if ".experts." in name], r"24 tensors missing: .*, and 19 more"),
    ],
)
def test_a_directory_with_other_tensors_is_an_error_that_lists_them(change, message, tmp_path):
    save_reference("mixtral", tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_rotary_buffers_are_ignored_and_a_tied_head_must_be_the_embedding(tmp_path):
    reference = save_reference("llama-gqa-tied", tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    extra["lm_head.weight"] = reference.model.embed_tokens.weight.detach().clone()
    change_tensors(tmp_path, lambda tensors: tensors.update(extra))
    assert torch.equal(load_model(tmp_path).embedding, reference.model.embed_tokens.weight)
    extra["lm_head.weight"][-1, -1] += 1
    change_tensors(tmp_path, lambda tensors: tensors.update(extra))
    with pytest.raises(
        ModelError, match=r"lm_head.weight: expected the same values as model.embed_tokens.weight, because"
    ):
        open_model(tmp_path)


def test_absurd_values_are_an_error_before_a_model_is_built(tmp_path):
    save_reference("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 10**9}, "1000000000 layers and 4 experts, and only"),
        ({"num_local_experts": 10**9}, "2 layers and 1000000000 experts, and only"),
        ({"hidden_size": 2**40}, "of another shape|config.json: "),
        ({"vocab_size": 2**47, "hidden_size": 2**47}, "of another shape|config.json: "),
        ({"hidden_act": ["silu"]}, r"hidden_act=\[silu\]: expected one of silu"),
        ({"model_type": "a\x1b[2J\nb"}, r"model_type='a\\x1b\[2J b': expected one of"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            open_model(tmp_path)


def test_pickles_are_never_opened_and_kinds_of_directories_are_distinguished(tmp_path):
    with pytest.raises(ModelError, match=r"expected a run .config.yaml., a checkpoint"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"found pytorch_model.bin: pickle, which runs code"):
        open_model(tmp_path)
    with pytest.raises(ModelError, match="none found"):
        open_model(tmp_path / "missing")
    with pytest.raises(ModelError, match="not a directory"):
        open_model(tmp_path / "config.json")
    save_file({"a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ModelError, match=r"params.json: .*=null: expected an integer"):
        open_model(tmp_path)


def copy_files(source, out, pattern="*"):
    for file in source.glob(pattern):
        shutil.copy(file, out)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the same model in several formats."""
    root = tmp_path_factory.mktemp("saved")
    save_reference("mixtral", root / "single")
    reader = open_model(root / "single")
    export(reader, root / "sharded", shard_bytes=20_000)
    export(reader, root / "mistral", "mistral", shard_bytes=20_000)
    export(reader, root / "mistral-bf16", "mistral", dtype="bf16")
    import_model(reader, root / "run", "fp32", 10**9)
    return root


@pytest.mark.parametrize(
    ("directory", "added", "message"),
    [
        ("sharded", "model.safetensors", "found model.safetensors and model.safetensors.index.json: expected one"),
        ("single", "model.fp16.safetensors", "found model.fp16.safetensors beside model.safetensors: expected no weig"),
        ("single", "Model.SAFETENSORS", "found Model.SAFETENSORS beside model.safetensors"),
        ("single", "other.safetensors.index.json", "found other.safetensors.index.json beside model.safetensors"),
        (
            "single",
            "adapter_model.safetensors",
            "found adapter_model.safetensors: expected the weights of a model; python",
        ),
        ("single", "adapter_config.json", "found adapter_config.json: expected the weights of a model; python"),
        ("single", "consolidated-00001-of-00002.safetensors", "found consolidated-00001-of-00002.safetensors beside"),
        ("sharded", "model-00009-of-00009.safetensors", "found model-00009-of-00009.safetensors beside model-00001"),
        ("mistral", "lora.safetensors", "found lora.safetensors beside consolidated-00001-of-"),
        ("run", "model.safetensors", "found model.safetensors beside checkpoints: expected no weights that are not"),
        ("run", "checkpoints/step-0/model.safetensors", "step-0: found model.safetensors beside manifest.json"),
    ],
)
def test_weights_that_are_not_read_are_an_error_that_names_the_file(directory, added, message, saved, tmp_path):
    shutil.copytree(saved / directory, tmp_path / "model")
    shutil.copy(saved / "single" / "model.safetensors", tmp_path / "model" / added)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(tmp_path / "model")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        open_model(tmp_path / "model", check=False)


def test_files_that_transformers_does_not_read_either_are_named_and_others_are_no_weights(saved, tmp_path):
    shutil.copytree(saved / "single", tmp_path / "model")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "q4.gguf", "optimizer.pt", "training_args.bin", "._x.safetensors"):  # fmt: skip  # noqa: E501
        (tmp_path / "model" / name).touch()
    (tmp_path / "model" / "original").mkdir()
    (tmp_path / "model" / "original" / "consolidated.00.safetensors").touch()
    lines = []
    open_model(tmp_path / "model", warn=lines.append)
    names = "consolidated.00.pth, pytorch_model.bin, q4.gguf"
    assert lines == [f"{tmp_path / 'model'}: reading model.safetensors, and not {names}"]


def test_a_second_set_of_weights_must_be_the_same(saved, tmp_path):
    """transformers reads the single file of two sets, so reading the shards would be another model."""
    from tests.foreign import load_reference

    both = tmp_path / "both"
    shutil.copytree(saved / "sharded", both)
    save_file({name: x + 1 for name, x in load_all(saved / "single").items()}, both / "model.safetensors", {"format": "pt"})  # fmt: skip  # noqa: E501
    embedding = load_reference(both).model.embed_tokens.weight
    assert torch.equal(embedding, load_file(both / "model.safetensors")["model.embed_tokens.weight"])
    with pytest.raises(ModelError, match="expected one of them"):
        open_model(both)

    for second in ("mistral", "mistral-bf16"):
        shutil.copytree(saved / "single", tmp_path / second)
        copy_files(saved / second, tmp_path / second)
        lines = []
        assert open_model(tmp_path / second, warn=lines.append).kind == "hf"
        assert len(lines) == 1 and "reading model.safetensors, and not consolidated" in lines[0]
    for name in ("layers.1.attention.wk.weight", "layers.0.feed_forward.experts.3.w2.weight", "norm.weight"):
        changed = load_file(saved / "mistral-bf16" / "consolidated.safetensors")
        changed[name] *= 2
        save_file(changed, tmp_path / "mistral-bf16" / "consolidated.safetensors")
        with pytest.raises(ModelError, match=f"{name}: expected the same values as in model.safetensors"):
            open_model(tmp_path / "mistral-bf16")

    index = {"weight_map": dict.fromkeys(load_file(saved / "single" / "model.safetensors"), "model.safetensors")}
    (tmp_path / "mistral" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_model(tmp_path / "mistral").files.files == ["model.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: (path / "model.safetensors.index.json").unlink(),
            "expected model.safetensors or .*; found model-0",
        ),
        (
            lambda path: (path / "model-00002-of-00004.safetensors").unlink(),
            "00002-of-00004.safetensors: cannot be read",
        ),
        (
            lambda path: (path / "model-00002-of-00004.safetensors").write_bytes(b""),
            "00002-of-00004.safetensors: damaged",
        ),
        (lambda path: (path / "model.safetensors.index.json").write_bytes(b""), "index.json: damaged: not JSON"),
    ],
)
def test_an_incomplete_set_of_shards_is_an_error_that_names_a_file(change, message, saved, tmp_path):
    shutil.copytree(saved / "sharded", tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path / "model")


def test_filling_another_model_is_an_error(tmp_path):
    save_reference("mixtral", tmp_path)
    reader = open_model(tmp_path)
    for change, message in (
        ({"num_layers": 3}, "missing: layers.2"),
        ({"tie_embeddings": True}, "no place for: head.weight"),
        ({"vocab_size": 60}, r"embedding: found \[53, 24\], expected \[60, 24\]"),
    ):
        other = Transformer(dataclasses.replace(reader.model, **change), reader.router, torch.float32)
        with pytest.raises(ModelError, match=message):
            reader.fill(other)


def test_an_output_is_complete_or_does_not_exist(tmp_path, monkeypatch):
    save_reference("mixtral", tmp_path / "reference")
    reader = open_model(tmp_path / "reference")
    (tmp_path / "existing").mkdir()
    for write in (lambda out: import_model(reader, out, "fp32", 10**9), lambda out: export(reader, out)):
        with pytest.raises(ModelError, match="existing: expected a path that does not exist yet"):
            write(tmp_path / "existing")
        with monkeypatch.context() as patch:
            patch.setattr(TensorDirectory, "read", lambda *_: (_ for _ in ()).throw(ModelError("gone")))
            with pytest.raises(ModelError, match="gone"):
                write(tmp_path / "new")
        with pytest.raises(ModelError, match="expected a path that can be written"):
            write(tmp_path / "reference" / "config.json" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing", "reference"]
    assert not any((tmp_path / "existing").iterdir())


def test_sizes_and_groups():
    assert [parse_size(text) for text in ("5GB", "500 mb", "2GiB", "7", "1.5KB")] == [
        5 * 10**9,
        5 * 10**8,
        2**31,
        7,
        1500,
    ]
    for text in ("", "5 parsecs", "-1GB", "0", "GB"):
        with pytest.raises(ModelError, match="expected a size"):
            parse_size(text)
    assert group_by_size([3, 3, 9, 1, 2], lambda size: size, 6) == [[3, 3], [9], [1, 2]]
