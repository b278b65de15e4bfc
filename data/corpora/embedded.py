"""The default corpus: text that every Python machine has. Three domains and no download.

`code`: sources of the standard library without docstrings; `prose`: the language reference that `help()` shows, and
the docstrings (all under the PSF licence); `arithmetic`: generated exercises. The text varies with the Python version.
"""

import ast
import hashlib
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from data.corpora.arithmetic import exercises
from data.corpora.document import Document

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
"""Installed packages, tests, applications, and code tables that are mostly digits."""
SHORTEST_BYTES = 200
"""Less than this teaches little beside the document's own start and end marks."""
LONGEST_BYTES = 100_000
"""A longer file would fill the held-out part of its domain alone."""
MACHINE_FILES = ("_sysconfigdata", "_sysconfig_vars")
"""Written when Python was built: they differ between machines of one Python version."""


class EmbeddedCorpus:
    """`code_bytes`, `prose_bytes`, `arithmetic_bytes`: no domain exceeds its size; 0 leaves it out."""

    def __init__(self, code_bytes: int, prose_bytes: int, arithmetic_bytes: int) -> None:
        self.code_bytes = code_bytes
        self.prose_bytes = prose_bytes
        self.arithmetic_bytes = arithmetic_bytes

    def fingerprint(self) -> str:
        """SHA-256 over the sizes asked for, the Python version that parses the sources, and the sources."""
        sizes = (self.code_bytes, self.prose_bytes, self.arithmetic_bytes)
        digest = hashlib.sha256(repr((sizes, sys.version_info[:3])).encode())
        if self.code_bytes or self.prose_bytes:
            for path in self._sources:
                digest.update(f"{path.relative_to(_library())}\n".encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        yield from _within(self.code_bytes, self._code(), "code")
        yield from _within(self.prose_bytes, self._prose(), "prose")
        yield from _within(self.arithmetic_bytes, exercises(), "arithmetic")

    @cached_property
    def _sources(self) -> list[Path]:
        """In the order of their names' hashes, so that a small size takes a sample and not the letter A."""
        library, found = _library(), []
        for folder, folders, files in os.walk(library):
            folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
            names = [name for name in files if name.endswith(".py") and not name.startswith(MACHINE_FILES)]
            found += [Path(folder, name) for name in names]
        return sorted(found, key=lambda path: hashlib.sha256(path.relative_to(library).as_posix().encode()).digest())

    def _code(self) -> Iterator[str]:
        for path in self._sources:
            if "pydoc_data" not in path.parts and path.stat().st_size <= LONGEST_BYTES:
                source, tree = _parse(path)
                yield without_docstrings(source, tree)

    def _prose(self) -> Iterator[str]:
        seen: set[str] = set()
        for topic in _topics():
            yield without_repeats(topic, seen)
        for path in self._sources:
            if "pydoc_data" not in path.parts:
                _, tree = _parse(path)
                yield without_repeats(docstrings(tree), seen)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    return [topics[name] for name in sorted(topics)]


def _parse(path: Path) -> tuple[str, ast.Module]:
    source = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        return source, ast.parse(source)


def _within(limit: int, texts: Iterator[str], domain: str) -> Iterator[Document]:
    """The texts of useful length, up to `limit` bytes; content with 95 % of it: the last small gap is a long search."""
    room = limit
    while room > limit // 20 and (text := next(texts, None)) is not None:
        size = len(text.encode())
        if SHORTEST_BYTES <= size <= room:
            room -= size
            yield Document(text, domain)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.Module) -> Iterator[Documented]:
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None:
            yield node


def without_docstrings(source: str, tree: ast.Module) -> str:
    """`source` with each docstring replaced by `...`: else the prose held out would be read here in training."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    for node in _documented(tree):
        docstring = node.body[0]
        assert docstring.end_lineno is not None and docstring.end_col_offset is not None
        first, last = docstring.lineno - 1, docstring.end_lineno - 1
        before, after = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
        alone = not before.strip() and not after.strip()
        needless = alone and (len(node.body) > 1 or isinstance(node, ast.Module))
        lines[first : last + 1] = [b"" if needless else before + b"..." + after] + [b""] * (last - first)
    return b"".join(lines).decode().lstrip("\n")


def docstrings(tree: ast.Module) -> str:
    """All docstrings of a module in the order of the source, each below the name of what it describes."""
    parts = []
    for node in sorted(_documented(tree), key=lambda node: getattr(node, "lineno", 0)):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if isinstance(node, ast.Module):
            parts.append(text)
        elif len(text) >= 40:
            parts.append(f"{node.name}: {text}")
    return "\n\n".join(parts) + "\n"


def without_repeats(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs already in `seen`, to which its own are added.

    The topics of `help()` quote each other by whole sections: what is held out would be read in training elsewhere.
    """
    kept = []
    for paragraph in text.strip().split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) < 80 or words not in seen:
            kept.append(paragraph)
        seen.add(words)
    return "\n\n".join(kept) + "\n"
