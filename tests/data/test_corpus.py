import ast
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DataError
from data.config import DataConfig
from data.corpora.corpus import open_corpus
from data.corpora.embedded import EmbeddedCorpus, docstrings, without_docstrings, without_repeats
from data.corpora.files import FilesCorpus
from data.corpora.formats import PIECE_CHARS
from data.tokens.heldout import HeldoutChoice
from data.tokens.store import Store, prepare

MODULE = '''"""Module words."""
import os

class A:
    """Class words that are long enough to be kept as prose."""

def f(): """Words é of one line that are long enough to be kept."""; return 1

def g():
    """
    Indented words that are
    long enough to be kept.
    """
    return "kept"
'''


def read(*paths: Path | str, **keys: str) -> list[tuple[str, str]]:
    corpus = FilesCorpus(tuple(map(str, paths)), keys.get("text_key", "text"), keys.get("domain_key"), None)
    return [(document.text, document.domain) for document in corpus.documents()]


def test_docstrings_go_to_prose_and_not_to_code() -> None:
    code = without_docstrings(MODULE, ast.parse(MODULE))
    assert "words" not in code.lower() and 'return "kept"' in code
    assert [type(node).__name__ for node in ast.parse(code).body] == [
        "Import",
        "ClassDef",
        "FunctionDef",
        "FunctionDef",
    ]
    prose = docstrings(ast.parse(MODULE))
    assert prose.startswith("Module words.\n\nA: Class words") and prose.endswith("\n\ng: " + GDOC + "\n")


GDOC = "Indented words that are\nlong enough to be kept."


def test_a_long_paragraph_is_kept_once() -> None:
    long, seen = "wind " * 20, set[str]()
    assert without_repeats(f"Short.\n\n{long}", seen) == f"Short.\n\n{long.strip()}\n"
    assert without_repeats(f"Short.\n\n  {long}\n\nOther.", seen) == "Short.\n\nOther.\n"


def test_embedded_domains_keep_their_sizes() -> None:
    sizes = dict.fromkeys(("code", "prose", "arithmetic"), 0)
    for document in EmbeddedCorpus(50_000, 0, 20_000).documents():
        sizes[document.domain] += len(document.text.encode())
    assert 40_000 < sizes["code"] <= 50_000 and sizes["prose"] == 0 and 19_000 <= sizes["arithmetic"] <= 20_000


def test_arithmetic_is_right() -> None:
    lines = [line for document in EmbeddedCorpus(0, 0, 50_000).documents() for line in document.text.splitlines()]
    equations = [line.split(" = ") for line in lines if re.fullmatch(r"[\d +*()=-]+", line)]
    divisions = [re.fullmatch(r"(\d+) / (\d+) = (\d+) remainder (\d+)", line) for line in lines]
    checked = [tuple(map(int, division.groups())) for division in divisions if division]
    assert len(equations) > 100 and all(len(set(map(eval, sides))) == 1 for sides in equations)
    assert len(checked) > 50 and all(divmod(a, b) == (quotient, rest) for a, b, quotient, rest in checked)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"body": f"text {i}\nwith é and lines", "from": f"d{i % 2}", "n": i} for i in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines + "\n")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = [(row["body"], row["from"]) for row in rows]
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        assert read(tmp_path / name, text_key="body", domain_key="from") == expected
    assert {domain for _, domain in read(tmp_path / "rows.jsonl", text_key="body")} == {tmp_path.name}


def test_a_large_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraph = "".join(f"line {i} of a paragraph\n" for i in range(100)) + "\n"
    text = paragraph * 40 + "x" * 100_000
    (tmp_path / "big.md").write_text(text)
    documents = [text for text, _ in read(tmp_path / "big.md")]
    assert "".join(documents) == text
    assert len(documents) > 5 and max(map(len, documents)) <= 3 * PIECE_CHARS
    assert all(document.endswith("\n\n") for document in documents[:4])


def test_a_hub_dataset_from_a_local_directory(tmp_path: Path) -> None:
    folder = tmp_path / "stories"
    folder.mkdir()
    rows = [
        {"text": f"Story {i}: the wind blows {i * i} leaves over hill {i}.", "kind": "ab"[i % 2]} for i in range(99)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(kind="hub", cache=str(tmp_path), hub_path=str(folder), domain_key="kind", vocab_size=310)
    store = prepare(config)
    assert store.domains == ("a", "b")
    assert sum(row["documents"] for row in store.summary()) == 99
    limited = DataConfig(kind="hub", hub_path=str(folder), max_documents=7)
    assert len(list(open_corpus(limited).documents())) == 7
    with pytest.raises(
        DataError, match=r"^data.hub_path=.*stories: expected a dataset .* data.hub_split=nosuch \(.*\)$"
    ):
        list(open_corpus(DataConfig(kind="hub", hub_path=str(folder), hub_split="nosuch")).documents())
    with pytest.raises(DataError, match=r"^data.hub_path=.*/none: expected a dataset that can be read .*"):
        list(open_corpus(DataConfig(kind="hub", hub_path=str(tmp_path / "none"))).documents())


def test_heldout_goes_by_content() -> None:
    choice = HeldoutChoice(0.5, max_bytes=100)
    low, high = bytes(32), b"\xff" * 32
    other = b"\x01" + bytes(31)
    choice.add_document(low, "a", 90)
    choice.add_document(other, "a", 20)  # Domain a has no room for it.
    choice.add_document(other, "b", 20)  # A copy of it is not held out either, although b has room.
    choice.add_document(high, "b", 5)
    choice.add_document(high, "c", 5)  # The only document of its domain.
    # No document of b is held out by the fraction, so b's document with the smallest hash is, and so are its copies.
    assert choice.choose() == {low, other}


def test_a_domain_whose_documents_are_equal_is_trained_on_and_has_no_held_out_text(tmp_path: Path) -> None:
    def prepared(*rows: tuple[str, str]) -> Store:
        lines = "".join(json.dumps({"text": text * 9, "d": domain}) + "\n" for text, domain in rows)
        (tmp_path / "rows.jsonl").write_text(lines)
        paths = (str(tmp_path / "rows.jsonl"),)
        return prepare(DataConfig("files", cache=str(tmp_path), paths=paths, domain_key="d", vocab_size=300))

    english = [(f"word {i} of the text that many lines have\n", "en") for i in range(40)]
    for rows in ([("habari ya dunia\n", "sw")], [("habari ya dunia\n", "sw")] * 5):
        en, sw = prepared(*english, *rows).summary()
        assert sw["documents"] == len(rows) and sw["heldout_bytes"] == 0 < en["heldout_bytes"]
        assert sw["gzip_bits_per_byte"] is sw["unigram_bits_per_byte"] is None
    # A name that would break the lines of tables is shown as Python writes it.
    assert prepared(*english, ("habari\n", "s\nw")).domains == ("en", r"'s\nw'")
    # If no domain has two different documents, one document of all is held out.
    for rows in ([(text, str(i)) for i, (text, _) in enumerate(english)], [english[0], ("habari\n" * 40, "sw")]):
        summary = prepared(*rows).summary()
        assert [row["documents"] for row in summary] == [1] * len(rows)
        assert sum(row["heldout_bytes"] > 0 for row in summary) == 1
    with pytest.raises(
        DataError, match=r"expected at least two different documents, .* to hold out, found 5 equal ones$"
    ):
        prepared(*[english[0]] * 5)


def test_splits_share_no_document_and_respect_the_cap(tmp_path: Path, two_domains: tuple[str, ...]) -> None:
    common = {"kind": "files", "cache": str(tmp_path), "paths": two_domains, "vocab_size": 320}
    store = prepare(DataConfig(**common, heldout_fraction=0.4, heldout_max_bytes=3_000))
    train, heldout = (set(documents_of(store, name)) for name in ("train", "heldout"))
    texts = {Path(path).read_text() for pattern in two_domains for path in Path("/").glob(pattern[1:])}
    assert train | heldout == texts and not train & heldout
    for domain in store.domains:
        assert 0 < store.manifest["splits"]["heldout"]["domains"][domain]["bytes"] <= 3_000


def documents_of(store: Store, name: str) -> list[str]:
    split = getattr(store, name)
    documents: list[list[int]] = []
    for token in split.tokens(0, split.num_tokens):
        if token == store.tokenizer.bos_id:
            documents.append([])
        documents[-1].append(int(token))
    return [store.tokenizer.decode(ids) for ids in documents]


def bad_rows(text: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / "bad.jsonl").write_text(text)
        return str(folder / "bad.jsonl")

    return write


def bad_bytes(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda folder: f"{folder}/none.txt",
            "data.paths=.*/none.txt: expected a file or folder of this name, found none",
        ),
        (lambda folder: f"{folder}/*.nix", "data.paths=.*/[*].nix: expected a glob that matches a file, found none"),
        (lambda folder: str(folder), "data.paths=.*: expected a folder with files, found none"),
        (bad_bytes("a.txt", b""), "data.paths=.*/a.txt: expected a file with text, found an empty one"),
        (bad_bytes("a.txt", b" \n \n"), r"data.paths=\[.*/a.txt\]: expected text, found none"),
        (bad_bytes("a.txt", b"alone\n"), r"data.paths=\[.*\]: expected at least two different documents, .*, found 1"),
        (bad_bytes("a.txt", b"\xff\xfe\0"), "data.paths=.*/a.txt: expected UTF-8 text, found UTF-16"),
        (bad_bytes("a.txt.gz", b"plain"), "data.paths=.*/a.txt.gz: expected a file that can be read"),
        (
            bad_bytes("a.parquet", b"plain" * 9),
            "data.paths=.*/a.parquet: expected a file that can be read .ArrowInvalid",
        ),
        (
            bad_rows('{"text": "a"}\n{"text": \n'),
            "data.paths=.*/bad.jsonl: line 2: expected a JSON object, .*: line 2 column 10.$",
        ),
        (bad_rows('["text"]\n'), "data.paths=.*/bad.jsonl: line 1: expected a JSON object, found list"),
        (
            bad_rows('{"body": "a"}\n'),
            "data.paths=.*: line 1: expected a string in data.text_key=text, found the columns body",
        ),
        (
            bad_rows('{"text": "a"}\n{"text": 3}\n'),
            "data.paths=.*: line 2: expected a string in data.text_key=text, found int",
        ),
        (
            bad_rows('{"text": "\\ud800"}\n'),
            "data.paths=.*/bad.jsonl: line 1: expected Unicode text, found .* .surrogates",
        ),
    ],
)
def test_unusable_files_end_in_one_line(tmp_path: Path, write: Callable[[Path], str], message: str) -> None:
    config = DataConfig(kind="files", cache=str(tmp_path / "cache"), paths=(write(tmp_path),))
    with pytest.raises(DataError, match=f"^{message}[^\n]*$"):
        prepare(config)
    assert [path.name for path in (tmp_path / "cache").glob("*") if not path.name.startswith(".")] == []
    assert list(tmp_path.glob("cache/.*.tmp")) == []


def test_unusable_keys_end_in_one_line(tmp_path: Path, two_domains: tuple[str, ...]) -> None:
    common = {"kind": "files", "cache": str(tmp_path), "paths": two_domains, "vocab_size": 320}
    with pytest.raises(DataError, match=r"^data.heldout_fraction=0.999\d*: expected a fraction that leaves .* all 60$"):
        prepare(DataConfig(**common, heldout_fraction=0.9999999))
    rows = bad_rows('{"text": "a", "d": "x"}\n{"text": "b", "d": null}\n')(tmp_path)
    with pytest.raises(
        DataError, match=r"^data.paths=.*bad.jsonl: line 2: expected a value of data.domain_key=d, found none$"
    ):
        prepare(DataConfig(kind="files", cache=str(tmp_path), paths=(rows,), domain_key="d"))
    rows = bad_rows("".join(json.dumps({"text": "a", "d": i}) + "\n" for i in range(256)))(tmp_path)
    with pytest.raises(DataError, match=r"^data.domain_key=d: expected at most 255 domains, found another: 255$"):
        prepare(DataConfig(kind="files", cache=str(tmp_path), paths=(rows,), domain_key="d"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DataError, match=r"^data.cache=.*/file: expected a directory that can be written \(File exists\)$"
    ):
        prepare(DataConfig(kind="files", cache=str(tmp_path / "file"), paths=two_domains))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "files"}, r"paths=\[\]: expected at least one file, folder or glob"),
        ({"kind": "hub"}, "hub_path=null: expected a dataset's name or directory"),
        ({"kind": "embedded", "vocab_size": 10}, "vocab_size=10: expected an integer >= 300"),
        ({"kind": "embedded", "heldout_fraction": 1.5}, "heldout_fraction=1.5: expected a number above 0, at most 1"),
        ({"kind": "embedded", "code_bytes": -1}, "code_bytes=-1: expected an integer >= 0"),
    ],
)
def test_the_config_checks_itself(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DataConfig(**keys)  # type: ignore[arg-type]
