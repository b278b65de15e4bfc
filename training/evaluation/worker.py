"""What one rank does to evaluate a model directory, and what rank 0 prints."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from common.errors import ConfigError, require
from common.text import show_value, to_json
from data.config import DataConfig
from data.tokens.store import Store, prepare
from moe.linear import Predict, linear
from moe.model import ModelInputs, Output, Transformer
from parallel.mesh import Mesh, close_process_group, init_process_group
from parallel.startup.launch import world_from_env
from parallel.startup.rendezvous import START_TIMEOUT_S, choose_on_rank0, open_store
from training.device import compute_dtype, pick_device
from training.evaluation.config import EvaluateConfig
from training.evaluation.evaluator import Evaluator
from training.formats.loading import load_model
from training.formats.model_directory import open_given_tokenizer
from training.formats.reader import ModelReader, open_model, open_model_for_key
from training.report.metrics import max_vio
from training.report.tables import baselines_of, show_evaluation
from training.step import Evaluation

EVERYTHING = 2**62
"""More bytes than any text has."""
TITLES = {"all": "text", "heldout": "held-out text"}


class WholeModel:
    """A model that only computes: the parts of an engine that `training.step.evaluate` uses."""

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self.parts, self.mesh = [model], mesh

    def forward(self, inputs: ModelInputs, predict: Predict = linear) -> list[tuple[Transformer, Output]]:
        """Run a batch through the model."""
        return [(model, model(inputs, predict=predict)) for model in self.parts]


def text_to_evaluate(config: EvaluateConfig, source: ModelReader) -> DataConfig:
    """Return the section `data` whose held-out part is the text to evaluate, with the tokenizer of the model."""
    data = replace(config.data, tokenizer=str(source.directory))
    if config.split == "all":
        return replace(data, heldout_fraction=1.0, heldout_max_bytes=EVERYTHING)
    return data


def read_text(config: EvaluateConfig, report: Callable[[str], None] | None = None) -> str:
    """Check the model directory, and tokenize the text. Return the path of the model; for a run, of the checkpoint.

    Raises:
        ConfigError: `data.tokenizer` is given, but the model has its own.
        ModelError: the model directory or its tokenizer cannot be read.
        DataError: the text cannot be read or used.
    """
    require(
        config.data.tokenizer is None,
        ConfigError,
        f"data.tokenizer={show_value(config.data.tokenizer)}: expected null, for the tokenizer of "
        f"checkpoint={config.checkpoint}",
    )
    source = open_model_for_key("checkpoint", config.checkpoint)
    open_given_tokenizer(source)
    prepare(text_to_evaluate(config, source), verify=False, report=report)
    return str(source.path)


def evaluate_on_rank(config: EvaluateConfig, path: str | None = None) -> None:
    """Load this rank's part of the model, evaluate, and print on rank 0. All ranks of the launch must call it.

    The experts are spread over the ranks; everything else is replicated. Each rank evaluates a part of the rows.

    Args:
        path: the model directory. With None, rank 0 checks the configuration and tokenizes the text.
    """
    world = world_from_env()
    rendezvous = open_store(world, START_TIMEOUT_S)
    if path is None:
        path = str(choose_on_rank0(rendezvous, world, "text", lambda: read_text(config)))
    device = pick_device(config.device, world.local_rank, world.local_world_size)
    source = open_model(path, check=False)
    store = prepare(text_to_evaluate(config, source), verify=world.rank == 0)
    init_process_group(rendezvous, world.rank, world.world_size, device, START_TIMEOUT_S)
    model, mesh = load_model(source, device, compute_dtype(config.precision, device), config.quantize)
    evaluator = Evaluator(
        WholeModel(model, mesh),
        store,
        seq_len=config.seq_len,
        batch_rows=config.batch_rows,
        cross_documents=config.data.cross_documents,
    )
    found = evaluator.evaluate()
    if world.rank == 0:
        _show(found, store, config)
    close_process_group()


def _show(found: Evaluation, store: Store, config: EvaluateConfig) -> None:
    if config.format == "text":
        show_evaluation(found.bits_per_byte, found.loss, baselines_of(store.summary()), TITLES[config.split])
        return
    parts, domains = store.manifest["splits"]["heldout"]["domains"], {}
    for domain, sums in found.sums.items():
        if sums.labels:
            domains[domain] = {
                "documents": parts[domain]["documents"],
                "tokens": sums.labels,
                "bytes": sums.bytes,
                "loss": sums.loss,
                "bits_per_byte": sums.bits_per_byte,
                "gzip_bits_per_byte": parts[domain]["gzip_bits_per_byte"],
                "unigram_bits_per_byte": parts[domain]["unigram_bits_per_byte"],
            }
    result: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "split": config.split,
        "seq_len": config.seq_len,
        "tokens": sum(sums.labels for sums in found.sums.values()),
        "loss": found.loss,
        "perplexity": None if found.loss is None else math.exp(found.loss),
        "domains": domains,
    }
    if found.load_GLE is not None:
        result["router"] = {"max_vio": max_vio(found.load_GLE.sum(dim=0))}
    print(to_json(result, ensure_ascii=False, indent=2))
