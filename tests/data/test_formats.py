"""The choice of a file's format by its name, its content or `data.format`; folders; faults that are skipped."""

import hashlib
import json
from pathlib import Path

import pytest

from common.errors import DataError
from data.config import DataConfig, FileFormat
from data.corpora.document import Document, Fault
from data.corpora.files import FilesCorpus
from data.tokens.store import Store, prepare
from tests.data.test_fuzz import CHATS, COMPRESS, table

ROWS = [{"text": f'"{i}", é\nand; more\tof it', "n": i} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = [row["text"] for row in ROWS]


def read(path: Path, format: FileFormat | None = None) -> list[str]:
    corpus = FilesCorpus((str(path),), "text", None, None, format)
    return [item.text for item in corpus.documents() if isinstance(item, Document)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_format_and_compression_gives_the_same_documents(tmp_path: Path, format: str, compression: str) -> None:
    content = COMPRESS[compression](table(ROWS, format))
    for name in (f"a.{format}{compression}", f"A.{format}{compression}".upper()):
        assert read(write(tmp_path / name, content)) == TEXTS
    if compression:  # The first bytes tell it, too.
        assert read(write(tmp_path / f"b.{format}", content)) == TEXTS


def test_the_content_of_json_files_decides_how_they_are_read(tmp_path: Path) -> None:
    pretty = "\n".join(json.dumps(row, indent=2) for row in ROWS)
    for i, content in enumerate(
        (
            LINES,
            f"\ufeff\n{LINES}",
            pretty,
            json.dumps(ROWS),
            json.dumps(ROWS, indent=3),
            f"[{LINES.replace('}', '},')}]",
        )
    ):
        assert read(write(tmp_path / f"{i}.json", content)) == TEXTS, content
    assert read(write(tmp_path / "one.json", json.dumps(ROWS[0]))) == TEXTS[:1]
    assert read(write(tmp_path / "array.jsonl", json.dumps(ROWS))) == TEXTS
    assert read(write(tmp_path / "none.json", "[]")) == []
    for content, place in (
        ("[{},\n{]", "item 2 in line 2"),
        ('[{"text": "a"} {', "after item 1"),
        ("[{", "item 1"),
        ("[[1]]", "item 1"),
        ("[{}]]", ""),
    ):
        with pytest.raises(DataError, match=rf"^data.paths=\S*/bad.json: {place}[^\n]*expected [^\n]+$"):
            read(write(tmp_path / "bad.json", content.replace("{}", '{"text": "a"}')))


def test_text_is_what_looks_like_text(tmp_path: Path) -> None:
    text = "A {brace} and [{bracket}]: {'x': 1}\n"
    for name in ("a.txt", "a.md", "a", "a.py"):
        for beginning in ("", "[{{ user }}] ", "[{name}](link) "):
            assert read(write(tmp_path / name, beginning + text)) == [beginning + text]
    for content in (LINES, json.dumps(ROWS), json.dumps(ROWS[0], indent=1)):
        path = write(tmp_path / "rows.txt", content)
        with pytest.raises(
            DataError, match=r"rows.txt: expected text, found JSON \(data.format=json .*data.format=text"
        ):
            read(path)
        assert read(path, "text") == [content]
        assert read(path, "json") == (TEXTS if content != json.dumps(ROWS[0], indent=1) else TEXTS[:1])
    for content, found in (
        (text.encode("utf-16"), "UTF-16"), (b"\x89PNG\r\n\x1a\n\0\0", "a zero byte at byte 8"),
        (b"first\nsecond \xe9\n", "the byte 0xe9"),
    ):  # fmt: skip
        with pytest.raises(
            DataError, match=rf"^data.paths=\S*/odd.txt: .*expected (UTF-8 )?text, found {found}[^\n]*$"
        ):
            read(write(tmp_path / "odd.txt", content))
    with pytest.raises(DataError, match=r"odd.txt: line 2: "):
        read(tmp_path / "odd.txt")
    for name in ("a.txt", "a.csv", "a.parquet"):
        with pytest.raises(DataError, match=r": expected data, found a Git LFS pointer \(run git lfs pull\)$"):
            read(write(tmp_path / name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"))


def test_rows_of_another_width_and_text_beyond_the_csv_limit(tmp_path: Path) -> None:
    long = "word " * 50_000
    assert read(write(tmp_path / "a.csv", f'n,text\r\n1,"{long}"\r\n\r\n2,"a\r\nb"\r\n')) == [long, "a\r\nb"]
    for content, complaint in (
        ('text,n\na,1\n"b\nc",2\nd\n', "line 5: expected 2 fields as in the header, found 1"),
        ('text,n\n"a"b,1\n', "line 2: expected csv, found ',' expected after '\"'"),
        ("a,a\n1,2\n", "expected a header with different names"),
        ("n;text\n1;a\n", "line 2: expected a string in data.text_key=text, found the columns n;text"),
    ):
        with pytest.raises(DataError) as caught:
            read(write(tmp_path / "bad.csv", content))
        assert str(caught.value).startswith(f"data.paths={tmp_path}/bad.csv: {complaint}")
    with pytest.raises(DataError, match=r"line 2: expected tsv, found .*expected after"):
        read(write(tmp_path / "bad.tsv", 'text\tn\n"a" b\t1\n'))


def test_a_folder_is_all_its_files_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl", "a/x/3.csv", "c.txt", ".hidden", ".git/config", "a/.x.txt"):
        write(tmp_path / name, {".jsonl": LINES, ".csv": "text\nrow\n"}.get(Path(name).suffix, f"text of {name}"))
    write(tmp_path / "b" / "__init__.py", "")
    corpus = FilesCorpus((str(tmp_path), f"{tmp_path}/b/*"), "text", None, None)
    assert [str(path.relative_to(tmp_path)) for path in corpus.files] == ["a/x/3.csv", "b/1.jsonl", "b/2.txt", "c.txt"]
    found = [(item.text, item.domain) for item in corpus.documents() if isinstance(item, Document)]
    assert found == [
        ("row", "x"),
        *((text, "b") for text in TEXTS),
        ("text of b/2.txt", "b"),
        ("text of c.txt", tmp_path.name),
    ]
    write(tmp_path / "d.jsonl", "")  # Its rows may have been lost.
    with pytest.raises(DataError, match=r"d.jsonl: expected a file with text, found an empty one"):
        list(FilesCorpus((str(tmp_path),), "text", None, None).documents())


def test_several_bad_files_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^data.paths=\[...\]: found 2 files that cannot be used: \S*/x: expected .*; \S*/\*y: "
    ):
        FilesCorpus((f"{tmp_path}/x", f"{tmp_path}/*y"), "text", None, None)
    for i in range(8):
        write(tmp_path / f"{i}.jsonl", LINES + ("{\n{\n" if i != 3 else ""))
    corpus = FilesCorpus((str(tmp_path),), "text", None, None)
    with pytest.raises(DataError) as caught:
        list(corpus.documents())
    message = str(caught.value)
    assert message.startswith("data.paths=[...]: found 7 files that cannot be used: ") and message.endswith(
        "; and 2 more"
    )
    assert message.count(": line 5: ") == 5 and "\n" not in message
    # Rows after the last one that is wanted are not read.
    assert len(list(FilesCorpus((str(tmp_path),), "text", None, 4).documents())) == 4


def test_what_is_skipped_is_counted_listed_and_stays_in_the_store(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"row {i} of words and more words"}) + "\n" for i in range(200))
    write(tmp_path / "in" / "a.jsonl", rows + "{\n" * 150 + '{"text": 3}\n{"text": "\\ud800"}\n')
    write(tmp_path / "in" / "b.jsonl", b"\xff\n" + rows.replace("row", "line").encode())
    write(tmp_path / "in" / "empty.csv", b"")
    write(tmp_path / "in" / "z.jsonl.gz", COMPRESS[".gz"](rows.encode())[:-9])
    keys = {"kind": "files", "cache": str(tmp_path / "cache"), "paths": (str(tmp_path / "in"),), "vocab_size": 300}
    with pytest.raises(
        DataError, match=r"found 4 files that cannot be used: \S*/a.jsonl: line 201: .*; \S*/empty.csv: expected"
    ):
        prepare(DataConfig(**keys))  # type: ignore[arg-type]
    store = prepare(DataConfig(**keys, on_error="skip"))  # type: ignore[arg-type]
    assert sum(row["documents"] for row in store.summary()) >= 400
    listed = store.manifest["skipped"]["listed"]
    assert store.manifest["skipped"]["total"] == 150 + 2 + 1 + 1 + 1 and len(listed) == 100
    assert listed[0] == {"source": str(tmp_path / "in" / "a.jsonl"), "place": "line 201", "reason": listed[0]["reason"]}
    lines = Store(store.directory).skipped(shown=2)
    assert lines[0] == "data.on_error=skip left out 155 places:" and lines[-1].startswith(
        "  and 153 more; manifest.json"
    )
    assert (
        lines[1] == f"  {Fault(**listed[0])}"
        and prepare(DataConfig(**keys, on_error="skip")).directory == store.directory
    )  # type: ignore[arg-type]
    write(tmp_path / "in" / "a.jsonl", "{\n")
    with pytest.raises(DataError, match=r"expected text, found none \(1 skipped: \S*/a.jsonl: line 1: expected"):
        prepare(DataConfig(**{**keys, "paths": (f"{tmp_path}/in/a.jsonl",)}, on_error="skip"))  # type: ignore[arg-type]


def test_conversations_in_every_format_of_rows(tmp_path: Path) -> None:
    from data.corpora.sft import SftCorpus

    expected = None
    for name in ("a.jsonl", "b.json", "c.parquet", "d.ndjson.zst", "e.JSON.gz"):
        content = table(CHATS, "json" if "json." in name.lower() or name.endswith(".json") else name.split(".")[1])
        path = write(tmp_path / name, COMPRESS[Path(name).suffix if len(name.split(".")) > 2 else ""](content))
        found = list(SftCorpus((str(path),), "messages", None, None, ()).documents())
        expected = expected or found
        assert len(found) == len(CHATS) and found == expected
    write(tmp_path / "a.jsonl", json.dumps({"messages": []}) + "\n" + json.dumps(CHATS[0]))
    fault, document = SftCorpus((f"{tmp_path}/a.jsonl",), "messages", None, None, (), None, "skip").documents()
    assert isinstance(fault, Fault) and fault.place == "line 1" and isinstance(document, Document)


def test_stores_of_formats_that_did_not_change_are_found_again(tmp_path: Path) -> None:
    """The fingerprint of version 0.1.0, written out. Whatever is read in another way than then has another one."""

    def old(path: Path) -> str:
        content = f"\n{path.parent.name}/*{''.join(path.suffixes[-2:])} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        return hashlib.sha256(repr(("text", None, None)).encode() + content.encode()).hexdigest()

    def new(path: Path, **keys: str) -> str:
        return FilesCorpus((str(path),), "text", None, None, **keys).fingerprint()  # type: ignore[arg-type]

    files = {"a.txt": b"words", "b": b"words", "c.jsonl": LINES.encode(), "d.jsonl.gz": COMPRESS[".gz"](LINES.encode())}
    for name, content in (files | {"e.txt.gz": COMPRESS[".gz"](b"words"), "f.parquet": table(ROWS, "parquet")}).items():
        path = write(tmp_path / name, content)
        assert new(path) == old(path) != new(path, on_error="skip"), name
    for name in ("rows.json", "rows.ndjson", "ROWS.JSONL", "rows.txt", "rows.csv"):
        path = write(tmp_path / name, LINES)
        assert new(path) != old(path), name
    assert new(path, format="text") == old(path)
