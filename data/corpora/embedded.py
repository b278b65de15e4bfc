"""The default corpus, which needs no download: text of the Python installation, and generated exercises.

It has three domains. `code` is the standard library's source code without docstrings. `prose` is the language reference
that `help()` shows, and the docstrings of the standard library (both under the PSF licence). `arithmetic` consists of
generated exercises. The text depends on the Python version.
"""

import ast
import hashlib
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.corpora.arithmetic import exercises
from data.corpora.document import Document

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
"""Installed packages, tests, applications, and character tables, which are mostly digits."""
SHORTEST_BYTES = 200
"""Shorter documents are left out: most of what they teach is where a document starts and ends."""
LONGEST_BYTES = 100_000
"""Longer source files are left out: a single one could fill the held-out part of its domain."""
MACHINE_FILES = ("_sysconfigdata", "_sysconfig_vars")
"""Prefixes of files that are written when Python is built. They differ between machines with one Python version."""


@dataclass
class EmbeddedCorpus:
    """Source code, prose and exercises. The fields are the maximum sizes of the domains; 0 leaves a domain out."""

    code_bytes: int
    prose_bytes: int
    arithmetic_bytes: int

    def fingerprint(self) -> str:
        """Return the SHA-256 of the sizes, of the Python version, and of all source files."""
        sizes = (self.code_bytes, self.prose_bytes, self.arithmetic_bytes)
        digest = hashlib.sha256(repr((sizes, sys.version_info[:3])).encode())
        if self.code_bytes or self.prose_bytes:
            for path in self._sources:
                digest.update(f"{path.relative_to(_library())}\n".encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield the documents of one domain after the other."""
        yield from _within(self.code_bytes, self._code(), "code")
        yield from _within(self.prose_bytes, self._prose(), "prose")
        yield from _within(self.arithmetic_bytes, exercises(), "arithmetic")

    @cached_property
    def _sources(self) -> list[Path]:
        """The source files, sorted by the hash of their name, so that a small size gives a sample of all of them."""
        library, sources = _library(), []
        for folder, folders, files in os.walk(library):
            folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS and not name.startswith("config-")]
            names = [name for name in files if name.endswith(".py") and not name.startswith(MACHINE_FILES)]
            sources += [Path(folder, name) for name in names]
        return sorted(sources, key=lambda path: hashlib.sha256(path.relative_to(library).as_posix().encode()).digest())

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
    except ImportError:  # Some distributions put this module into a separate package.
        return []
    return [topics[name] for name in sorted(topics)]


def _parse(path: Path) -> tuple[str, ast.Module]:
    source = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some files of the library contain deprecated escape sequences.
        return source, ast.parse(source)


def _within(limit: int, texts: Iterator[str], domain: str) -> Iterator[Document]:
    """Yield the texts of at least `SHORTEST_BYTES` as documents, as long as they fit into `limit` bytes.

    Stops when 95 % of `limit` is used, because most further texts would be read and found too long.
    """
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
    """Return `source` without docstrings.

    `...` replaces a docstring that is the only statement of a body or shares a line with other code.
    Docstrings are documents of the domain `prose`. Left in the code, held-out prose would be trained on.
    """
    lines = source.encode().splitlines(keepends=True)  # The column numbers of `ast` count bytes.
    for node in _documented(tree):
        docstring = node.body[0]
        assert docstring.end_lineno is not None and docstring.end_col_offset is not None
        first, last = docstring.lineno - 1, docstring.end_lineno - 1
        before, after = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
        is_alone = not before.strip() and not after.strip()
        is_removable = is_alone and (len(node.body) > 1 or isinstance(node, ast.Module))
        lines[first : last + 1] = [b"" if is_removable else before + b"..." + after] + [b""] * (last - first)
    return b"".join(lines).decode().lstrip("\n")


def docstrings(tree: ast.Module) -> str:
    """Return all docstrings of a module in the order of the source, each after the name of its class or function.

    Docstrings of classes and functions with fewer than 40 characters are left out.
    """
    parts = []
    for node in sorted(_documented(tree), key=lambda node: getattr(node, "lineno", 0)):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if isinstance(node, ast.Module):
            parts.append(text)
        elif len(text) >= 40:
            parts.append(f"{node.name}: {text}")
    return "\n\n".join(parts) + "\n"


def without_repeats(text: str, seen: set[str]) -> str:
    """Return `text` without the long paragraphs that are in `seen`, and add its paragraphs to `seen`.

    The topics of `help()` repeat whole sections of each other. With repeats, held-out text would be trained on.
    """
    kept = []
    for paragraph in text.strip().split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) < 80 or words not in seen:
            kept.append(paragraph)
        seen.add(words)
    return "\n\n".join(kept) + "\n"
