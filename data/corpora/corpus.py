"""From the configuration to a corpus: the one place that knows every kind."""

from data.config import DataConfig
from data.corpora.document import Corpus
from data.corpora.embedded import EmbeddedCorpus
from data.corpora.files import FilesCorpus
from data.corpora.hub import HubCorpus
from data.corpora.sft import SftCorpus


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.kind` names.

    Raises:
        DataError: files that are not there.
    """
    match config.kind:
        case "embedded":
            return EmbeddedCorpus(config.code_bytes, config.prose_bytes, config.arithmetic_bytes)
        case "files":
            return FilesCorpus(config.paths, config.text_key, config.domain_key, config.max_documents)
        case "hub":
            assert config.hub_path is not None
            return HubCorpus(
                config.hub_path,
                config.hub_name,
                config.hub_split,
                config.hub_revision,
                config.text_key,
                config.domain_key,
                config.max_documents,
            )
        case "sft":
            return SftCorpus(config.paths, config.messages_key, config.domain_key, config.max_documents)
