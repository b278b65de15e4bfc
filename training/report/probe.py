"""The probe: where a fixed set of held-out tokens was routed after some of the steps of a run.

The directory `<run>/probe/` has a file `tokens.safetensors` with the tokens, and a file `step-<N>.safetensors` for
every probed step. This module writes and reads the files, and compares routings. It does not import torch, so that a
report needs numpy and safetensors only.

The files take a few bytes per token and layer: k experts of ceil(log2 E) bits each, k weights of a byte each, and a
margin of two bytes.

Shapes: L MoE layers, T tokens of the probe, K top-k, E experts, G labels.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import RunError, require
from common.files import explain_os_error, read_file, write_atomically
from common.text import one_line, parse_json_object, shorten, to_json
from training.config import MAX_PROBE_TOKENS

PROBE = "probe"
"""Name of the directory with the files, in a run's directory."""
TOKENS_FILE = "tokens.safetensors"
STEP_FILE = re.compile(r"step-(0|[1-9][0-9]{0,17})\.safetensors")
FORMAT = 1
"""The version of both files."""
KEY = "probe"
"""Name of the only metadata of a file: the hash of the rest, and a JSON object."""
MAX_BYTES = 2**26
"""The most bytes of a file. Unpacked experts take at most 40 times as many."""
MAX_EXPERTS = 2**14
"""The most experts of a layer, of which a file can have the numbers."""
WEIGHT_LEVELS = 255
"""Steps between the smallest and the largest weight of a layer."""


class ProbeTokens(NamedTuple):
    """The tokens of a probe. They consist of excerpts, each of consecutive tokens of one held-out document."""

    domains: tuple[str, ...]
    """The names of all domains of the run's tokens."""
    tokens_T: np.ndarray
    """Token ids, int32."""
    documents_T: np.ndarray
    """The number of the held-out document of each token, int32."""
    domain_T: np.ndarray
    """Index into `domains`, int32."""
    excerpts_T: np.ndarray
    """The number of each token's excerpt, int32, ascending. A token attends to earlier ones of its excerpt."""
    pieces: tuple[str, ...]
    """The text of each token. If several tokens stand for one character, the first of them has it, and the others have
    the empty string. A token without text, such as <s>, has its name."""

    def digest(self) -> str:
        """Return a hash of the tokens, by which the file of a step says to which tokens it belongs."""
        parts = (self.tokens_T, self.documents_T, self.domain_T, self.excerpts_T)
        return hashlib.sha256(b"".join(part.astype("<i4").tobytes() for part in parts)).hexdigest()[:32]


class ProbeRouting(NamedTuple):
    """Where the tokens of a probe were routed after one step."""

    experts_LTK: np.ndarray
    """The chosen experts, best first, int32."""
    weights_LTK: np.ndarray
    """Their combine weights, fp32. Those that were read are within 1/510 of the range of the layer's weights."""
    margin_LT: np.ndarray
    """Probability of the k-th expert minus that of the next one, fp32; NaN if k = E."""
    num_experts: int


class Probe:
    """The probe of a run. The method `routing` reads the file of a step.

    Attributes:
        steps: the steps of which there is a file, ascending.
    """

    def __init__(self, directory: Path, tokens: ProbeTokens, steps: Sequence[int]) -> None:
        self.directory, self.tokens, self.steps = directory, tokens, list(steps)
        self.domains, self.tokens_T, self.documents_T = tokens.domains, tokens.tokens_T, tokens.documents_T
        self.domain_T, self.excerpts_T, self.pieces = tokens.domain_T, tokens.excerpts_T, tokens.pieces

    def text(self, t: int) -> str:
        """Return the text of token `t` (`ProbeTokens.pieces`)."""
        return self.pieces[t]

    def routing(self, step: int) -> ProbeRouting:
        """Read the routing after `step`, one of `steps`.

        Raises:
            RunError: the file is damaged, or is that of other tokens.
            OSError: the file cannot be read.
        """
        return read_routing(step_file(self.directory, step), self.tokens)

    def routings(self, notes: list[str]) -> Iterator[tuple[int, ProbeRouting]]:
        """Yield every step and its routing.

        Args:
            notes: receives a line for every file that cannot be read. It is left out.
        """
        for step in self.steps:
            try:
                yield step, self.routing(step)
            except (OSError, RunError) as error:
                notes.append(f"left out: {error}")


class ProbeWriter:
    """Writes the probe of a run. If a file cannot be written or removed, one line says so, and the run goes on.

    Args:
        run_directory: the run's directory.
        tokens: the tokens. None: this launch of the run does not probe, and the writer only removes files.
        resume_step: the step that the run continues from. The files of later steps are removed, and those of other
            tokens. None: a new run, and all are removed.
        note: receives lines for the user.
    """

    def __init__(
        self, run_directory: Path, tokens: ProbeTokens | None, resume_step: int | None, note: Callable[[str], None]
    ) -> None:
        self.directory, self.tokens, self._note = run_directory / PROBE, tokens, note
        self._previous: ProbeRouting | None = None
        self._noted = False
        self._digest = "" if tokens is None else tokens.digest()
        if tokens is not None:
            with self._errors():
                self.directory.mkdir(exist_ok=True)
                if not self._has_tokens():
                    write_tokens(self.directory / TOKENS_FILE, tokens)
                    self._remove_others(tokens)
        self.go_back(-1 if resume_step is None else resume_step)

    def write(self, step: int, routing: ProbeRouting) -> np.ndarray | None:
        """Write the file of `step`, and return the churn since the last probe, fp64 [L]; None if this is the first."""
        previous, self._previous = self._previous, routing
        with self._errors():
            write_routing(step_file(self.directory, step), routing, self._digest)
        return None if previous is None else churn(previous, routing)

    def go_back(self, step: int) -> None:
        """Remove the files of steps after `step`, from which the run continues."""
        self._previous = None
        with self._errors():
            steps = probed_steps(self.directory)
            for later in [number for number in steps if number > step]:
                step_file(self.directory, later).unlink()
            earlier = [number for number in steps if number <= step]
            if earlier and self.tokens is not None:
                self._previous = read_routing(step_file(self.directory, earlier[-1]), self.tokens)

    def _has_tokens(self) -> bool:
        try:
            return read_tokens(self.directory / TOKENS_FILE).digest() == self._digest
        except (OSError, RunError):
            return False

    def _remove_others(self, tokens: ProbeTokens) -> None:
        """Remove the files that are not of these tokens."""
        removed = 0
        for path in [step_file(self.directory, step) for step in probed_steps(self.directory)]:
            try:
                read_routing(path, tokens)
            except RunError:
                path.unlink()
                removed += 1
        if removed:
            self._note(f"{self.directory}: the tokens have changed; files of others are removed: {removed}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RunError) as error:
            if not self._noted:
                self._noted = True
                line = explain_os_error(error, self.directory) if isinstance(error, OSError) else str(error)
                self._note(f"warning: the probe has a file missing or damaged: {line}; the run goes on")


def read_probe(run_directory: Path) -> Probe | None:
    """Return the probe of a run, or None if the run has none.

    Raises:
        RunError: the file of the tokens is damaged.
        OSError: it cannot be read.
    """
    directory = run_directory / PROBE
    try:
        tokens = read_tokens(directory / TOKENS_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Probe(directory, tokens, probed_steps(directory))


def probed_steps(directory: Path) -> list[int]:
    """Return the steps of which `directory` has a file, ascending; none if there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(int(found[1]) for path in directory.iterdir() if (found := STEP_FILE.fullmatch(path.name)))


def step_file(directory: Path, step: int) -> Path:
    """Return the path of the routing after `step` in the directory of a probe."""
    return directory / f"step-{step}.safetensors"


def write_tokens(path: Path, tokens: ProbeTokens) -> None:
    """Write the tokens of a probe atomically.

    Raises:
        OSError: the file cannot be written.
    """
    texts = [piece.encode() for piece in tokens.pieces]
    tensors = {
        "tokens": tokens.tokens_T.astype("<i4"),
        "documents": tokens.documents_T.astype("<i4"),
        "domain": tokens.domain_T.astype("<i4"),
        "excerpts": tokens.excerpts_T.astype("<i4"),
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "text_ends": np.cumsum([len(text) for text in texts], dtype=np.int64).astype("<i4"),
    }
    _write(path, tensors, {"domains": tokens.domains})


def read_tokens(path: Path) -> ProbeTokens:
    """Read the tokens of a probe.

    Raises:
        RunError: the file is damaged.
        OSError: it cannot be read.
    """
    check = partial(_require_intact, path)
    vectors = dict.fromkeys(("tokens", "documents", "domain", "excerpts", "text_ends"), ("I32", 1))
    tensors, about = _read(path, vectors | {"text": ("U8", 1)})
    columns = tokens_T, documents_T, domain_T, excerpts_T = [
        tensors[name] for name in ("tokens", "documents", "domain", "excerpts")
    ]
    ends_T, size = tensors["text_ends"], len(tokens_T)
    check(0 < size <= MAX_PROBE_TOKENS and all(len(column) == size for column in (*columns, ends_T)), "length")
    domains = about.get("domains", ())
    check(isinstance(domains, list) and all(isinstance(name, str) for name in domains), "domains")
    check(all(int(column.min()) >= 0 for column in columns) and int(domain_T.max()) < len(domains), "ranges")
    starts_T = np.concatenate([[0], ends_T[:-1]])
    check(bool((starts_T <= ends_T).all()) and ends_T[-1] == len(tensors["text"]), "text_ends")
    text = tensors["text"].tobytes()
    pieces = tuple(
        text[start:end].decode(errors="replace") for start, end in zip(starts_T.tolist(), ends_T.tolist(), strict=True)
    )
    return ProbeTokens(tuple(domains), tokens_T, documents_T, domain_T, excerpts_T, pieces)


def write_routing(path: Path, routing: ProbeRouting, digest: str) -> None:
    """Write the routing after one step atomically.

    A weight that is not finite is written as the smallest of its layer.

    Args:
        digest: `ProbeTokens.digest()` of the tokens.

    Raises:
        OSError: the file cannot be written.
    """
    weights_LTK = routing.weights_LTK.astype(np.float64)
    finite_LTK = np.isfinite(weights_LTK)
    low_L = weights_LTK.min(axis=(1, 2), where=finite_LTK, initial=np.inf)
    high_L = weights_LTK.max(axis=(1, 2), where=finite_LTK, initial=-np.inf)
    range_L2 = np.stack([low_L, high_L], axis=1)
    range_L2[low_L > high_L] = 0
    range_L2 = range_L2.astype("<f4")
    # The reader has the range in fp32, so the levels are those of the rounded range.
    low_L11, span_L11 = range_L2[:, :1, None].astype(np.float64), np.diff(range_L2.astype(np.float64))[..., None]
    levels_LTK = (np.where(finite_LTK, weights_LTK, low_L11) - low_L11) / np.where(span_L11 > 0, span_L11, 1)
    tensors = {
        "experts": _pack(routing.experts_LTK, _bits(routing.num_experts)),
        "weights": np.rint(levels_LTK * WEIGHT_LEVELS).clip(0, WEIGHT_LEVELS).astype(np.uint8),
        "weight_range": range_L2,
        "margin": routing.margin_LT.astype(np.float32).clip(-65504, 65504).astype("<f2"),
    }
    _write(path, tensors, {"num_experts": routing.num_experts, "tokens": digest})


def read_routing(path: Path, tokens: ProbeTokens) -> ProbeRouting:
    """Read the routing after one step.

    Args:
        tokens: those of the probe.

    Raises:
        RunError: the file is damaged, or is that of other tokens.
        OSError: it cannot be read.
    """
    check = partial(_require_intact, path)
    tensors, about = _read(
        path, {"experts": ("U8", 1), "weights": ("U8", 3), "weight_range": ("F32", 2), "margin": ("F16", 2)}
    )
    require(
        about.get("tokens") == tokens.digest(), RunError, f"{path}: expected the tokens of {TOKENS_FILE}, found others"
    )
    weights_LTK, margin_LT, range_L2 = tensors["weights"], tensors["margin"], tensors["weight_range"]
    num_experts = about.get("num_experts", 0)
    check(type(num_experts) is int and 0 < num_experts <= MAX_EXPERTS, "num_experts")
    layers, size, top_k = weights_LTK.shape
    shapes = ((layers, size), (layers, len(tokens.tokens_T)), (layers, 2))
    check((margin_LT.shape, (layers, size), range_L2.shape) == shapes and 0 < top_k <= num_experts, "shapes")
    bits = _bits(num_experts)
    check(len(tensors["experts"]) == -(-weights_LTK.size * bits // 8), "experts")
    experts_LTK = _unpack(tensors["experts"], bits, weights_LTK.shape)
    check(layers == 0 or int(experts_LTK.max()) < num_experts, "experts")
    low_L11, high_L11 = (range_L2[:, column, None, None].astype(np.float64) for column in (0, 1))
    weights_LTK = (low_L11 + weights_LTK * ((high_L11 - low_L11) / WEIGHT_LEVELS)).astype(np.float32)
    return ProbeRouting(experts_LTK, weights_LTK, margin_LT.astype(np.float32), num_experts)


def churn(a: ProbeRouting, b: ProbeRouting) -> np.ndarray:
    """Return the share of the tokens whose set of experts differs between two routings, fp64 [L]."""
    return (np.sort(a.experts_LTK) != np.sort(b.experts_LTK)).any(axis=2).mean(axis=1)


def saturation(a: ProbeRouting, end: ProbeRouting) -> np.ndarray:
    """Return the share of the experts in `end` that `a` has for the same token, mean over tokens, fp64 [L].

    This is the router saturation of OLMoE (arXiv 2409.02060) at the step of `a`, if `end` is the last routing.
    """
    both = [(a.experts_LTK == end.experts_LTK[..., k, None]).any(axis=2) for k in range(end.experts_LTK.shape[2])]
    return np.mean(both, axis=(0, 2))


def coactivation(routing: ProbeRouting) -> np.ndarray:
    """Return for experts i and j the tokens that chose both over the tokens that chose i, fp64 [L, E, E].

    The diagonal is 1. The row of an expert that no token chose is NaN.
    """
    layers, num_experts = len(routing.experts_LTK), routing.num_experts
    both_LEE = np.empty((layers, num_experts, num_experts))
    for experts_TK, both_EE in zip(routing.experts_LTK, both_LEE, strict=True):
        pairs_TKK = experts_TK[:, :, None].astype(np.int64) * num_experts + experts_TK[:, None, :]
        both_EE[:] = np.bincount(pairs_TKK.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)
    return _divide(both_LEE, np.diagonal(both_LEE, axis1=1, axis2=2)[..., None])


def specialisation(routing: ProbeRouting, label_T: np.ndarray, num_labels: int) -> np.ndarray:
    """Return the share of each label's assignments that each expert got, over 1/E: fp64 [L, E, G].

    1 is what a uniform router gives, and E/k the most. A label without tokens has NaN.

    Args:
        label_T: an integer from 0 to G - 1 for each token: its domain, its token id, or another label.
        num_labels: G.
    """
    layers, num_experts, top_k = len(routing.experts_LTK), routing.num_experts, routing.experts_LTK.shape[2]
    counts_LEG = np.empty((layers, num_experts, num_labels))
    for experts_TK, counts_EG in zip(routing.experts_LTK, counts_LEG, strict=True):
        cells_TK = experts_TK.astype(np.int64) * num_labels + label_T[:, None]
        counts_EG[:] = np.bincount(cells_TK.ravel(), minlength=num_experts * num_labels).reshape(counts_EG.shape)
    return num_experts * _divide(counts_LEG, top_k * np.bincount(label_T, minlength=num_labels))


def path_of(routing: ProbeRouting, t: int) -> list[list[tuple[int, float]]]:
    """Return the path of token `t` through the layers: for each layer its experts and their weights, best first."""
    experts_LK, weights_LK = routing.experts_LTK[:, t].tolist(), routing.weights_LTK[:, t].tolist()
    return [list(zip(*layer, strict=True)) for layer in zip(experts_LK, weights_LK, strict=True)]


def _divide(numbers: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return the quotients, NaN where the divisor is 0."""
    return numbers / np.where(by == 0, np.nan, by)


def _bits(num_experts: int) -> int:
    """Return the bits of an expert's index."""
    return (num_experts - 1).bit_length()


def _pack(experts: np.ndarray, bits: int) -> np.ndarray:
    """Return the lowest `bits` bits of each number, one after the other, the lowest first, uint8."""
    flat_N = experts.astype("<u4").ravel()
    planes = (flat_N[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(planes.astype(np.uint8).ravel(), bitorder="little")


def _unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the numbers that `_pack` has packed, int32."""
    size = int(np.prod(shape))
    planes = np.unpackbits(packed, count=size * bits, bitorder="little").reshape(size, bits)
    numbers = np.zeros(size, dtype=np.int32)
    for bit in range(bits):
        numbers |= planes[:, bit].astype(np.int32) << bit
    return numbers.reshape(shape)


def _write(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    described = to_json({"format": FORMAT, **about})
    digest = _hash({name: tensor.tobytes() for name, tensor in contiguous.items()}, described)
    # The library writes several entries in an order that changes from process to process.
    write_atomically(path, save(contiguous, {KEY: f"{digest} {described}"}))


def _read(path: Path, expected: Mapping[str, tuple[str, int]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors of a file, and what it says about them.

    Args:
        expected: name of each tensor -> its dtype and the number of its dimensions.

    Raises:
        RunError: the file is not one that `_write` has written, or has other tensors.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, deserialize

    content = read_file(path, MAX_BYTES)
    try:
        entries: dict[str, Any] = dict(deserialize(content))  # type: ignore[no-untyped-call]
        header = parse_json_object(content[8 : 8 + int.from_bytes(content[:8], "little")])
        digest, _, described = header["__metadata__"][KEY].partition(" ")
        about = parse_json_object(described)
    except (SafetensorError, ValueError, LookupError) as error:
        raise RunError(f"{path} is damaged: {shorten(one_line(str(error)), 100)}") from error
    contents = {name: bytes(entry["data"]) for name, entry in entries.items()}
    _require_intact(path, digest == _hash(contents, described), "sha256")
    require(about.get("format") == FORMAT, RunError, f"{path}: expected a probe of format {FORMAT}")
    found = {name: (entry["dtype"], len(entry["shape"])) for name, entry in entries.items()}
    _require_intact(path, found == dict(expected), "tensors")
    dtypes = {"U8": "u1", "I32": "<i4", "F32": "<f4", "F16": "<f2"}
    tensors = {
        name: np.frombuffer(contents[name], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
    }
    return tensors, about


def _hash(contents: Mapping[str, bytes], described: str) -> str:
    return hashlib.sha256(b"".join([*(contents[name] for name in sorted(contents)), described.encode()])).hexdigest()


def _require_intact(path: Path, holds: bool, what: str) -> None:
    require(holds, RunError, f"{path} is damaged ({what})")
