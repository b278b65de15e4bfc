"""Model directories of every kind: filled whole, by parts, or refused; round trips."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from common.strict import to_dict
from moe.config import ModelConfig, RouterConfig
from moe.experts import Experts
from moe.init import init_parameters
from moe.model import Transformer
from moe.region import LocalShard, Region, whole_shard
from tests.distributed.harness import run_ranks
from tests.foreign import CASES, filled, logits_of, saved, tokens_of
from training.checkpoint import checkpoint
from training.formats.export import export_model, import_model
from training.formats.model_directory import grouped, parse_size
from training.formats.reader import Fill, open_model
from training.formats.safetensors import TensorDirectory
from training.run import save_config

EVERYTHING = ModelConfig(
    dim=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12, num_experts=6, top_k=2, vocab_size=11,
    expert_hidden_dim=5, num_shared_experts=2, first_k_dense=1, ffn="geglu", sliding_window=(3, None, 4),
)  # fmt: skip
SIGMOID = RouterConfig(kind="sigmoid_topk", scale=2.5, num_groups=3, topk_groups=2)


def run_directory(root, model, *, steps=(3,), config=EVERYTHING, router=SIGMOID):
    """A run's directory as train.py leaves it: weights beside an optimizer's moments."""
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


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def export(source, out, form="hf", dtype="fp32", shard_bytes=10**9):
    export_model(source, out, form=form, dtype=dtype, shard_bytes=shard_bytes, positions=64)
    return out


def test_a_run_is_opened_at_its_newest_whole_checkpoint_or_at_the_one_named(tmp_path):
    model = everything()
    run_directory(tmp_path, model, steps=(3, 7))
    source = open_model(tmp_path)
    assert (source.kind, source.model, source.router, source.tokenizer) == ("run", EVERYTHING, SIGMOID, None)
    assert source.path == tmp_path / "checkpoints" / "step-7"
    assert torch.equal(filled(source).embedding, model.embedding + 7)
    older = open_model(tmp_path / "checkpoints" / "step-3")
    assert torch.equal(filled(older).layers[1].ffn.router.bias, model.layers[1].ffn.router.bias + 3)

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
def test_a_configuration_that_is_none_is_refused(tmp_path, text, message):
    run_directory(tmp_path, everything())
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_with_the_names(tmp_path):
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


def part_of(config, router, first, held):
    """This model as one rank of expert parallelism holds it, every number NaN."""
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
                setattr(module, name, torch.nn.Parameter(parameter.detach()[first : first + held].clone()))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    return model


@pytest.mark.parametrize("layout", ["per expert", "fused", "mistral", "run"])
def test_a_rank_reads_its_experts_only_and_never_more_than_a_tensor_at_once(layout, tmp_path, monkeypatch):
    whole = filled_from(layout, tmp_path)
    source = open_model(tmp_path / "model")
    reads = []
    original = TensorDirectory.read

    def counted(self, name, offset, shape):
        reads.append((name, torch.Size(shape).numel()))
        return original(self, name, offset, shape)

    monkeypatch.setattr(TensorDirectory, "read", counted)
    part = part_of(source.model, source.router, 2, 2)
    source.fill(part)
    for name, tensor in part.state_dict().items():
        expected = whole.state_dict()[name]
        assert torch.equal(tensor, expected[2:4] if ".experts." in name else expected), name
    if layout != "run":
        elements = sum(tensor.numel() for tensor in part.state_dict().values())
        assert sum(size for _, size in reads) == elements
        assert max(size for _, size in reads) == max(t.numel() for t in part.state_dict().values() if t.dim() == 2)
        assert not any(f"experts.{other}." in name for name, _ in reads for other in (0, 1, 4))


def filled_from(layout, root):
    """Write `root/model` in the layout, and return the model that lies there."""
    saved("mixtral-window", root / "theirs")
    source = open_model(root / "theirs")
    if layout == "fused":
        fuse(root / "theirs", root / "model")
    elif layout == "run":
        import_model(source, root / "model", "fp32", 10**9)
    else:
        export(source, root / "model", "mistral" if layout == "mistral" else "hf", shard_bytes=9000)
    return filled(source)


def fuse(directory, out):
    """Write the model again under the names that transformers 5 has in memory."""
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    fused = {name.replace("block_sparse_moe", "mlp"): x for name, x in tensors.items() if ".experts." not in name}
    for n in range(config["num_hidden_layers"]):
        old = f"model.layers.{n}.block_sparse_moe.experts"
        experts = range(config["num_local_experts"])
        both = [torch.cat([tensors[f"{old}.{e}.{w}.weight"] for w in ("w1", "w3")]) for e in experts]
        fused[f"model.layers.{n}.mlp.experts.gate_up_proj"] = torch.stack(both)
        fused[f"model.layers.{n}.mlp.experts.down_proj"] = torch.stack(
            [tensors[f"{old}.{e}.w2.weight"] for e in experts]
        )
    out.mkdir()
    save_file(fused, out / "model.safetensors")
    shutil.copy(directory / "config.json", out)


def _fill_a_shard(rank, world_size, path):
    from moe.dispatch import LocalDispatcher
    from parallel.apply import build_model
    from parallel.layout import Layout
    from parallel.mesh import build_mesh

    source = open_model(path)
    mesh = build_mesh(torch.device("cpu"), Layout(replicate=world_size, expert=world_size))
    model = build_model(source.model, source.router, mesh, compute_dtype=torch.float32, seed=None)
    source.fill(model)
    assert not isinstance(model.layers[0].ffn.dispatcher, LocalDispatcher)
    with torch.no_grad():
        return logits_of(model, tokens_of(12, seed=rank))


def test_expert_parallel_ranks_together_are_the_model(tmp_path):
    theirs = saved("mixtral", tmp_path)
    for rank, logits in enumerate(run_ranks(_fill_a_shard, 2, tmp_path)):
        torch.testing.assert_close(logits, theirs(tokens_of(12, seed=rank)).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_round_trips_are_bit_exact(case, tmp_path):
    saved(case, tmp_path / "theirs")
    first = open_model(tmp_path / "theirs")
    import_model(first, tmp_path / "ours", "fp32", 8000)
    ours = open_model(tmp_path / "ours")
    assert ours.kind == "run" and (ours.model, ours.router) == (first.model, first.router)
    assert len(list((tmp_path / "ours" / "checkpoints" / "step-0").glob("*.safetensors"))) > 1
    back = load_all(export(ours, tmp_path / "back", shard_bytes=20_000))
    original = load_all(tmp_path / "theirs")
    assert original.keys() - back.keys() <= ({"lm_head.weight"} if first.model.tie_embeddings else set())
    assert all(torch.equal(back[name], original[name]) for name in back)
    again = open_model(tmp_path / "back")
    assert (again.model, again.router) == (first.model, first.router)
    assert same(filled(again), filled(ours))
    if first.model.ffn == "swiglu":
        official = open_model(export(ours, tmp_path / "official", "mistral"))
        assert official.kind == "mistral" and (official.model, official.router) == (first.model, first.router)
        assert same(filled(official), filled(ours))


def load_all(directory):
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


def test_bf16_stays_as_it_is_with_keep_and_becomes_fp32_without(tmp_path):
    saved("mixtral", tmp_path / "theirs")
    bf16 = open_model(export(open_model(tmp_path / "theirs"), tmp_path / "bf16", dtype="bf16"))
    import_model(bf16, tmp_path / "kept", "keep", 10**9)
    import_model(bf16, tmp_path / "wide", "fp32", 10**9)
    kept, wide = open_model(tmp_path / "kept"), open_model(tmp_path / "wide")
    assert {kept.dtype(name) for name in kept.shapes} == {torch.bfloat16}
    assert {wide.dtype(name) for name in wide.shapes} == {torch.float32}
    assert same(filled(kept), filled(wide))
    again = load_all(export(kept, tmp_path / "again", dtype="bf16"))
    assert all(torch.equal(x, again[name]) for name, x in load_all(tmp_path / "bf16").items())
    target = torch.empty(1, 3)
    wide.copy([Fill("embedding", checkpoint_region((2, 1), (1, 3)), target)])
    assert torch.equal(target, filled(wide).embedding[2:3, 1:4])


def checkpoint_region(offset, shape):

    return Region(offset, shape)


def damage(directory, change, keep_config=True):
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
def test_a_directory_with_other_tensors_is_refused_with_their_names(change, message, tmp_path):
    saved("mixtral", tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_rotary_buffers_are_ignored_and_a_tied_head_must_be_the_embedding(tmp_path):
    theirs = saved("llama-gqa-tied", tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    extra["lm_head.weight"] = theirs.model.embed_tokens.weight.detach().clone()
    damage(tmp_path, lambda tensors: tensors.update(extra))
    assert torch.equal(filled(tmp_path).embedding, theirs.model.embed_tokens.weight)
    extra["lm_head.weight"][-1, -1] += 1
    damage(tmp_path, lambda tensors: tensors.update(extra))
    with pytest.raises(ModelError, match=r"lm_head.weight: expected model.embed_tokens.weight again"):
        open_model(tmp_path)


def test_absurd_values_are_refused_before_anything_is_built(tmp_path):
    saved("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 10**9}, "1000000000 layers and 4 experts, and only"),
        ({"num_local_experts": 10**9}, "2 layers and 1000000000 experts, and only"),
        ({"hidden_size": 2**40}, "of another shape|config.json: "),
        ({"vocab_size": 2**47, "hidden_size": 2**47}, "of another shape|config.json: "),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]: expected one of silu"),
        ({"model_type": "a\x1b[2J\nb"}, r"model_type='a\\x1b\[2J b': expected one of"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            open_model(tmp_path)


def test_pickles_are_never_opened_and_other_directories_are_told_apart(tmp_path):
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


def test_a_model_is_not_filled_with_another_ones_weights(tmp_path):
    saved("mixtral", tmp_path)
    source = open_model(tmp_path)
    for change, message in (
        ({"num_layers": 3}, "missing: layers.2"),
        ({"tie_embeddings": True}, "no place for: head.weight"),
        ({"vocab_size": 60}, r"embedding: found \[53, 24\], expected \[60, 24\]"),
    ):
        other = Transformer(dataclasses.replace(source.model, **change), source.router, torch.float32)
        with pytest.raises(ModelError, match=message):
            source.fill(other)


def test_an_output_is_whole_or_not_there(tmp_path, monkeypatch):
    saved("mixtral", tmp_path / "theirs")
    source = open_model(tmp_path / "theirs")
    (tmp_path / "there").mkdir()
    for write in (lambda out: import_model(source, out, "fp32", 10**9), lambda out: export(source, out)):
        with pytest.raises(ModelError, match="there: expected a path that does not exist yet"):
            write(tmp_path / "there")
        with monkeypatch.context() as patch:
            patch.setattr(TensorDirectory, "read", lambda *_: (_ for _ in ()).throw(ModelError("gone")))
            with pytest.raises(ModelError, match="gone"):
                write(tmp_path / "new")
        with pytest.raises(ModelError, match="expected a path that can be written"):
            write(tmp_path / "theirs" / "config.json" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs", "there"]
    assert not any((tmp_path / "there").iterdir())


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
    assert grouped([3, 3, 9, 1, 2], lambda size: size, 6) == [[3, 3], [9], [1, 2]]
