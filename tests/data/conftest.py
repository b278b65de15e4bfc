from pathlib import Path

import pytest

from data.config import DataConfig
from data.tokens.store import Store, prepare


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A small embedded corpus. The tests of this directory share its token store and do not write to it."""
    return DataConfig(
        kind="embedded",
        cache=str(tmp_path_factory.mktemp("data")),
        vocab_size=500,
        heldout_fraction=0.1,
        code_bytes=60_000,
        prose_bytes=40_000,
        arithmetic_bytes=30_000,
    )


@pytest.fixture(scope="session")
def store(tiny: DataConfig) -> Store:
    return prepare(tiny)


@pytest.fixture
def two_domains(tmp_path: Path) -> tuple[str, ...]:
    """Globs for two folders of text with 30 files each."""
    for domain in ("north", "south"):
        (tmp_path / domain).mkdir()
        for i in range(30):
            lines = "".join(f"{domain} wind {i} blows {i * j} leaves over the {domain}ern hill\n" for j in range(20))
            (tmp_path / domain / f"{i:02d}.txt").write_text(lines)
    return (f"{tmp_path}/north/*.txt", f"{tmp_path}/south/*.txt")
