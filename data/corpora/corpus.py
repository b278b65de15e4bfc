"""The registry of the kinds of corpora, and the function that opens a corpus from the configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

from common.registry import Registry
from data.config import DataConfig
from data.corpora.document import Corpus
from data.corpora.embedded import EmbeddedCorpus
from data.corpora.files import FilesCorpus
from data.corpora.hub import HubCorpus
from data.corpora.sft import SftCorpus


class CorpusKind(NamedTuple):
    """One kind of corpus."""

    open: Callable[[Any], Corpus]
    """Returns the corpus for a configuration, which is an instance of the kind's class in `CORPUS_CONFIGS`."""
    source_key: str
    """The configuration key that a message names when the corpus has too little text."""


CORPORA: Registry[CorpusKind] = Registry("data.kind")
"""Kinds of corpora, by the name that `data.kind` takes."""


def open_corpus(config: DataConfig) -> Corpus:
    """Return the corpus that `config.kind` names.

    Raises:
        ConfigError: no such kind is registered.
        DataError: files that do not exist.
    """
    return CORPORA[config.kind].open(config)


def _open_embedded(config: DataConfig) -> Corpus:
    return EmbeddedCorpus(config.code_bytes, config.prose_bytes, config.arithmetic_bytes)


def _open_files(config: DataConfig) -> Corpus:
    return FilesCorpus(
        config.paths, config.text_key, config.domain_key, config.max_documents, config.format, config.on_error
    )


def _open_hub(config: DataConfig) -> Corpus:
    assert config.hub_path is not None
    return HubCorpus(
        config.hub_path,
        config.hub_name,
        config.hub_split,
        config.hub_revision,
        config.text_key,
        config.domain_key,
        config.max_documents,
        config.on_error,
    )


def _open_sft(config: DataConfig) -> Corpus:
    return SftCorpus(
        config.paths,
        config.messages_key,
        config.domain_key,
        config.max_documents,
        config.ignore_keys,
        config.format,
        config.on_error,
    )


CORPORA.add("embedded", CorpusKind(_open_embedded, source_key="code_bytes"))
CORPORA.add("files", CorpusKind(_open_files, source_key="paths"))
CORPORA.add("hub", CorpusKind(_open_hub, source_key="hub_path"))
CORPORA.add("sft", CorpusKind(_open_sft, source_key="paths"))
