"""A plugin adds a kind of corpus in one file."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import plugins
from common.errors import ConfigError, DataError
from common.strict import from_dict, to_dict
from data.config import CORPUS_CONFIGS, DataConfig
from data.corpora.corpus import CORPORA, open_corpus
from data.tokens.store import Store, prepare

PLUGIN = """
import hashlib
from dataclasses import dataclass

from common.errors import expect
from data.config import CORPUS_CONFIGS, DataConfig
from data.corpora.corpus import CORPORA, CorpusKind
from data.corpora.document import Document


@CORPUS_CONFIGS.register("verses")
@dataclass(frozen=True)
class VersesConfig(DataConfig):
    verses: int = 0

    def __post_init__(self):
        super().__post_init__()
        expect(self.verses >= 0, "verses", self.verses, "an integer >= 0")


class Verses:
    def __init__(self, count):
        self.count = count

    def fingerprint(self):
        return hashlib.sha256(f"verses {self.count}".encode()).hexdigest()

    def documents(self):
        for i in range(self.count):
            yield Document(f"Verse {i}: the wind blows {i * i} leaves over hill {i}.", "ab"[i % 2])


CORPORA.add("verses", CorpusKind(lambda config: Verses(config.verses), source_key="verses"))
"""


@pytest.fixture
def verses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Load the plugin, and return the configuration section for it. The registries are restored after the test."""
    for registry in (CORPUS_CONFIGS, CORPORA):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))  # type: ignore[attr-defined]
    monkeypatch.setattr(plugins, "_loaded", {})
    (tmp_path / "verses.py").write_text(PLUGIN)
    plugins.load_plugins([str(tmp_path / "verses.py")])
    yield {"kind": "verses", "cache": str(tmp_path / "cache"), "vocab_size": 300, "verses": 90}
    del sys.modules["mixwright_plugin_verses"]


def test_a_corpus_of_a_plugin_becomes_a_token_store(verses: dict[str, Any]) -> None:
    config = from_dict(DataConfig, verses, "data")
    assert type(config).__name__ == "VersesConfig" and from_dict(DataConfig, to_dict(config)) == config
    store = prepare(config)
    assert store.directory.name.startswith("verses-") and store.domains == ("a", "b")
    assert sum(row["documents"] for row in store.summary()) == 90
    texts = {document.text for document in open_corpus(config).documents()}
    ids = store.heldout.tokens(0, store.heldout.num_tokens)
    heldout = store.tokenizer.decode(ids).replace(".Verse", ".\nVerse").split("\n")
    assert heldout and set(heldout) <= texts
    assert prepare(config, verify=False).directory == store.directory
    assert Store(store.directory).manifest == store.manifest


def test_its_keys_are_checked_like_built_in_ones(verses: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.verses=-1: expected an integer >= 0$"):
        from_dict(DataConfig, verses | {"verses": -1}, "data")
    with pytest.raises(ConfigError, match=r"^data\.verse=1: unknown key"):
        from_dict(DataConfig, verses | {"verse": 1}, "data")
    with pytest.raises(ConfigError, match=r"^data\.verses=1: unknown key"):
        from_dict(DataConfig, {"kind": "embedded", "verses": 1}, "data")
    with pytest.raises(DataError, match=r"^data\.verses=0: expected text, found none$"):
        prepare(from_dict(DataConfig, verses | {"verses": 0}, "data"))


@pytest.mark.usefixtures("verses")
def test_a_kind_without_keys_of_its_own_uses_the_shared_dataclass() -> None:
    CORPUS_CONFIGS.add("plain", DataConfig)
    CORPORA.add("plain", CORPORA["verses"]._replace(open=lambda config: config.vocab_size))
    assert open_corpus(from_dict(DataConfig, {"kind": "plain"})) == 4096


@pytest.mark.parametrize("kind", ["verses", "file", ""])
def test_an_unknown_kind_lists_the_known_ones(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^data\.kind={kind}: expected one of embedded, files, hub, sft, or a name "
    ):
        from_dict(DataConfig, {"kind": kind}, "data")


@pytest.mark.parametrize("kind", [None, 3, ["files"], {}])
def test_a_kind_that_is_no_string_is_refused(kind: object) -> None:
    with pytest.raises(ConfigError, match=r"^data\.kind=[^\n]*: expected a string$"):
        from_dict(DataConfig, {"kind": kind}, "data")


def test_both_registries_have_the_same_kinds() -> None:
    assert list(CORPUS_CONFIGS) == list(CORPORA) == ["embedded", "files", "hub", "sft"]


def test_the_registries_import_no_large_library() -> None:
    program = (
        "import sys; import data.config, data.corpora.corpus;"
        "print(*{'torch', 'numpy', 'datasets', 'pyarrow', 'sentencepiece'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
