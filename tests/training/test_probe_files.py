"""The files of a probe, and what is computed from them: each figure equals a count in plain Python."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import RunError
from tests.mutations import mutated_bytes
from tests.probes import synthetic_routing, synthetic_tokens, write_synthetic_probe
from training.report.probe import (
    TOKENS_FILE,
    ProbeRouting,
    ProbeWriter,
    churn,
    coactivation,
    path_of,
    probed_steps,
    read_probe,
    read_routing,
    saturation,
    specialisation,
    step_file,
    write_routing,
    write_tokens,
)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 1), (8, 2), (9, 9), (64, 6), (300, 3)])
def test_a_routing_is_read_as_it_was_written(tmp_path: Path, num_experts: int, top_k: int) -> None:
    tokens = synthetic_tokens(13)
    routing = synthetic_routing(tokens, layers=3, num_experts=num_experts, top_k=top_k)
    path = tmp_path / "step-7.safetensors"
    write_routing(path, routing, tokens.digest())
    read = read_routing(path, tokens)
    assert (read.experts_LTK == routing.experts_LTK).all() and read.num_experts == num_experts
    for layer in range(3):
        weights = routing.weights_LTK[layer]
        assert np.abs(read.weights_LTK[layer] - weights).max() <= np.ptp(weights) / 509
    np.testing.assert_allclose(read.margin_LT, routing.margin_LT, rtol=1e-3, atol=1e-7)
    assert np.isnan(read.margin_LT).all() == (top_k == num_experts)


def test_a_file_takes_a_few_bytes_per_token_and_layer(tmp_path: Path) -> None:
    tokens = synthetic_tokens(2048)
    for num_experts, top_k, each in ((8, 2, 0.75 + 2 + 2), (64, 8, 6 + 8 + 2)):
        routing = synthetic_routing(tokens, layers=4, num_experts=num_experts, top_k=top_k)
        write_routing(tmp_path / "step", routing, tokens.digest())
        assert 0 <= (tmp_path / "step").stat().st_size - each * 4 * 2048 < 700


def test_weights_of_a_diverged_model_are_written(tmp_path: Path) -> None:
    tokens = synthetic_tokens(8)
    routing = synthetic_routing(tokens, layers=2)
    routing.weights_LTK[0, 0], routing.weights_LTK[1], routing.margin_LT[1] = np.nan, np.inf, np.inf
    write_routing(tmp_path / "step", routing, tokens.digest())
    read = read_routing(tmp_path / "step", tokens)
    assert np.abs(read.weights_LTK[0, 1:] - routing.weights_LTK[0, 1:]).max() < 0.01
    assert np.isfinite(read.weights_LTK).all() and np.isfinite(read.margin_LT).all()


def test_a_probe_is_read(tmp_path: Path) -> None:
    assert read_probe(tmp_path) is None
    routings = write_synthetic_probe(tmp_path, steps=(0, 1, 2, 10))
    (tmp_path / "probe" / ".step-3.safetensors.17").write_bytes(b"left by a killed process")
    probe = read_probe(tmp_path)
    assert probe is not None and probe.steps == [0, 1, 2, 10]
    expected = synthetic_tokens()
    assert probe.domains == expected.domains and probe.pieces == expected.pieces
    assert [probe.text(t) for t in range(3)] == ["def", ":", "+"]
    for name in ("tokens_T", "documents_T", "domain_T", "excerpts_T"):
        assert (getattr(probe, name) == getattr(expected, name)).all()
    for step, routing in routings.items():
        assert (probe.routing(step).experts_LTK == routing.experts_LTK).all()


def test_a_writer_removes_later_steps_and_compares_with_the_last_one_that_stays(tmp_path: Path) -> None:
    tokens, notes = synthetic_tokens(), []
    writer = ProbeWriter(tmp_path, tokens, None, notes.append)
    routings = [synthetic_routing(tokens, settled=0.5, seed=seed) for seed in range(5)]
    assert writer.write(0, routings[0]) is None
    for step in (1, 2):
        assert (writer.write(step, routings[step]) == churn(routings[step - 1], routings[step])).all()
    writer.go_back(1)
    assert probed_steps(tmp_path / "probe") == [0, 1]
    assert (writer.write(2, routings[3]) == churn(routings[1], routings[3])).all()

    resumed = ProbeWriter(tmp_path, tokens, 1, notes.append)
    assert (resumed.write(4, routings[4]) == churn(routings[1], routings[4])).all()
    assert probed_steps(tmp_path / "probe") == [0, 1, 4]
    step_file(tmp_path / "probe", 1).write_bytes(b"damaged")
    assert ProbeWriter(tmp_path, tokens, 1, notes.append).write(2, routings[2]) is None
    assert len(notes) == 1 and "step-1.safetensors is damaged" in notes[0]
    ProbeWriter(tmp_path, None, 1, notes.append)  # without a probe
    assert probed_steps(tmp_path / "probe") == [0, 1]
    ProbeWriter(tmp_path, tokens, None, notes.append)
    assert probed_steps(tmp_path / "probe") == [] and len(notes) == 1


def test_a_damaged_file_is_one_line_or_left_out_with_a_note(tmp_path: Path) -> None:
    write_synthetic_probe(tmp_path, steps=(0, 1, 2, 3))
    probe = read_probe(tmp_path)
    assert probe is not None
    content = step_file(probe.directory, 1).read_bytes()
    step_file(probe.directory, 1).write_bytes(content[:-1])
    step_file(probe.directory, 3).unlink()
    write_routing(step_file(probe.directory, 2), synthetic_routing(synthetic_tokens()), "of other tokens")
    notes: list[str] = []
    assert [step for step, _ in probe.routings(notes)] == [0]
    assert len(notes) == 3 and all("\n" not in note for note in notes)
    assert "step-1.safetensors is damaged" in notes[0] and "others" in notes[1] and "step-3" in notes[2]

    def read(path: Path) -> None:
        try:
            read_routing(path, probe.tokens) if path.name.startswith("step") else read_probe(tmp_path)
        except RunError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            raise AssertionError("damage was not noticed")

    for path in (step_file(probe.directory, 0), probe.directory / TOKENS_FILE):
        content = path.read_bytes()
        for damaged in mutated_bytes(content, seed="0", count=100):
            path.write_bytes(damaged)
            if damaged != content:
                read(path)
        path.write_bytes(content)


def loops(routing: ProbeRouting) -> list[list[set[int]]]:
    """The experts of each layer and token."""
    return [[set(experts) for experts in layer] for layer in routing.experts_LTK.tolist()]


def test_churn_and_saturation_equal_a_count() -> None:
    tokens = synthetic_tokens(40)
    a, b = (synthetic_routing(tokens, layers=3, settled=0.7, seed=seed) for seed in (1, 2))
    assert churn(a, a).tolist() == [0] * 3 and saturation(a, a).tolist() == [1] * 3
    swapped = a._replace(experts_LTK=a.experts_LTK[..., ::-1])
    assert churn(a, swapped).tolist() == [0] * 3 and saturation(swapped, a).tolist() == [1] * 3
    for layer, (ours, theirs) in enumerate(zip(loops(a), loops(b), strict=True)):
        pairs = list(zip(ours, theirs, strict=True))
        assert 0 < churn(a, b)[layer] < 1
        assert churn(a, b)[layer] == pytest.approx(sum(x != y for x, y in pairs) / 40, abs=1e-12)
        assert saturation(a, b)[layer] == pytest.approx(sum(len(x & y) / 2 for x, y in pairs) / 40, abs=1e-12)


def test_coactivation_equals_a_count() -> None:
    routing = synthetic_routing(synthetic_tokens(40), layers=2, num_experts=6, top_k=3)
    routing.experts_LTK[routing.experts_LTK == 5] = 4  # No token chooses expert 5.
    routing = routing._replace(
        experts_LTK=np.array([[[e, (e + 1) % 5] for e in layer[:, 0]] for layer in routing.experts_LTK])
    )
    found = coactivation(routing)
    assert found.shape == (2, 6, 6)
    for layer, sets in enumerate(loops(routing)):
        for i in range(6):
            chose_i = [chosen for chosen in sets if i in chosen]
            for j in range(6):
                if not chose_i:
                    assert i == 5 and math.isnan(found[layer, i, j])
                else:
                    assert found[layer, i, j] == pytest.approx(sum(j in chosen for chosen in chose_i) / len(chose_i))


def test_specialisation_equals_a_count_for_domains_and_token_ids() -> None:
    tokens = synthetic_tokens(40)
    routing = synthetic_routing(tokens, layers=2, settled=0.5)
    for labels, size in ((tokens.domain_T, 4), (tokens.tokens_T, 12)):
        found = specialisation(routing, labels, size)
        assert found.shape == (2, 8, size)
        for layer, sets in enumerate(loops(routing)):
            for label in range(size):
                mine = [chosen for chosen, other in zip(sets, labels.tolist(), strict=True) if other == label]
                for expert in range(8):
                    value = found[layer, expert, label]
                    if not mine:
                        assert label == 3 and math.isnan(value)
                    else:
                        share = sum(expert in chosen for chosen in mine) / (2 * len(mine))
                        assert value == pytest.approx(share / (1 / 8), abs=1e-12)


def test_the_path_of_a_token() -> None:
    routing = synthetic_routing(synthetic_tokens(8), layers=2)
    path = path_of(routing, 3)
    assert len(path) == 2
    for layer, chosen in enumerate(path):
        assert [expert for expert, _ in chosen] == routing.experts_LTK[layer, 3].tolist()
        assert [weight for _, weight in chosen] == routing.weights_LTK[layer, 3].tolist()


def test_the_reader_does_not_import_torch(tmp_path: Path) -> None:
    write_synthetic_probe(tmp_path)
    code = (
        "import sys, pathlib; from training.report.probe import read_probe, churn; "
        f"p = read_probe(pathlib.Path({str(tmp_path)!r})); churn(p.routing(0), p.routing(1)); "
        "print('torch' in sys.modules, len(p.steps))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "6"]


def test_bounds_are_checked(tmp_path: Path) -> None:
    tokens = synthetic_tokens(8)
    path = tmp_path / TOKENS_FILE
    for wrong, what in (
        (tokens._replace(domain_T=tokens.domain_T + 3), "ranges"),
        (tokens._replace(documents_T=tokens.documents_T[:-1]), "length"),
    ):
        write_tokens(path, wrong)
        (tmp_path / "probe").mkdir(exist_ok=True)
        path.rename(tmp_path / "probe" / TOKENS_FILE)
        with pytest.raises(RunError, match=what):
            read_probe(tmp_path)
    routing = synthetic_routing(tokens, layers=1, num_experts=6)
    write_routing(tmp_path / "step", routing._replace(experts_LTK=routing.experts_LTK + 2), tokens.digest())
    with pytest.raises(RunError, match="experts"):
        read_routing(tmp_path / "step", tokens)
    write_routing(tmp_path / "step", routing, tokens.digest())
    with pytest.raises(RunError, match="others"):
        read_routing(tmp_path / "step", synthetic_tokens(9))
