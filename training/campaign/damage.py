"""The campaign that damages files, and reads them as a run does that continues. No process is started."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from common.errors import UserError
from data.tokens.store import Store
from training.agree import find_checkpoint
from training.campaign.config import CampaignConfig
from training.campaign.runs import EVERY, STEPS, Reference, Tally, configuration, rows_of
from training.checkpoint.manifest import CHECKPOINTS, step_directories, step_of
from training.checkpoint.peers import ALONE
from training.report.metrics import METRICS_FILE, MetricsRecord, MetricsWriter
from training.report.terminal import show_table
from training.resume import resumable_state, saved_values

NEWEST = 3
"""The number of checkpoints that the damaged run has."""
RUN, STORE, METRICS = "run", "store", f"run/{METRICS_FILE}"
OUTCOMES = ("refused", "older checkpoint", "rows restored", "not noticed")
Files: TypeAlias = Mapping[str, bytes]
"""Path below the working directory -> content."""


class Resumption(NamedTuple):
    """What a run that continues has found."""

    said: tuple[str, ...]
    """The lines that the user sees."""
    step: int | None
    """The step of the checkpoint that it continues from; None: it refuses to continue."""


def damage(config: CampaignConfig, root: Path, reference: Reference) -> Tally:
    """Damage files `config.damages` times, always from the same intact state, and print what was noticed.

    Each time, a file is chosen that a run reads when it continues: a file of a checkpoint (of the newest, or of the two
    or three newest), metrics.jsonl, or a file of the token store. A damage counts as noticed if the run says so.
    """
    tally, choose = Tally("damage"), random.Random(config.seed)
    work = root / "damage"
    before = intact_files(reference.directory, next((root / "cache").glob("embedded-*")))
    counts: dict[str, Counter[str]] = {name: Counter() for name in DAMAGES}
    for number in range(config.damages):
        restore(work, before)
        name = choose.choice(sorted(DAMAGES))
        chosen = choose_files(before, choose)
        for path in chosen:
            if (work / path).exists():  # The checkpoint of an earlier one may have been renamed to this one's.
                DAMAGES[name](work, path, choose)
        after = read_files(work)
        if _first_read(after) == _first_read(before):
            continue  # Equal files were exchanged, or two exchanges have left only older checkpoints changed.
        what = f"damage {number}: {name} {', '.join(chosen)}"
        expected = newest_intact(before, after)
        tally.tried += 1
        counts[name][check(config, work, what, before, expected, reference, tally)] += 1
    rows = [[name, *(str(counts[name][outcome]) for outcome in OUTCOMES)] for name in DAMAGES]
    show_table("Damages", ("damage", *OUTCOMES), rows)
    return tally


def check(
    config: CampaignConfig,
    work: Path,
    what: str,
    before: Files,
    expected: int | None,
    reference: Reference,
    tally: Tally,
) -> str:
    """Continue from the damaged files, and note in `tally` what is not as it should be. Return one of `OUTCOMES`.

    Args:
        what: the damage, for the notes.
        expected: the step of the newest checkpoint that is intact; None: there is none.
    """
    try:
        found = resume(config, work)
    except Exception as error:
        tally.unnoticed.append(f"{what}: not one line, but {type(error).__name__}: {error}")
        return "not noticed"
    long = [line for line in found.said if "\n" in line]
    if long:
        tally.unnoticed.append(f"{what}: not one line, but {long[0]!r}")
    if found.step is None:
        return "refused"
    if found.step != expected:
        tally.lost.append(f"{what}: continues after step {found.step}, expected {expected}")
    used = {path for path in before if path.startswith((f"{RUN}/{CHECKPOINTS}/step-{found.step}/", f"{STORE}/"))}
    after = read_files(work)
    different = sorted(path for path in used if after.get(path) != before[path])
    if different:
        tally.corrupted.append(f"{what}: {different[0]} is used although it is damaged; said: {found.said}")
    rows = {step: row for step, row in reference.rows.items() if step <= found.step}
    if rows_of(work / RUN) != rows:
        tally.lost.append(f"{what}: metrics.jsonl has other rows than the run had up to step {found.step}")
    if not found.said:
        tally.unnoticed.append(f"{what}: nothing is said")
        return "not noticed"
    return "older checkpoint" if found.step < STEPS else "rows restored"


def resume(config: CampaignConfig, work: Path) -> Resumption:
    """Read everything that a run reads before it continues, in the same order and with the same functions."""
    run = configuration(work, RUN, ranks=config.ranks, seed=config.seed)
    directory = work / RUN
    said: list[str] = []
    try:
        Store(work / STORE, verify=True)
        checkpoint = find_checkpoint(run, directory, ALONE, restarted=False, warn=said.append)
        assert checkpoint is not None
        state = resumable_state(checkpoint, STEPS)
        saved_values(state, directory, checkpoint)
        record = MetricsRecord.from_state(state.get("metrics"))
        writer = MetricsWriter(directory / METRICS_FILE, state["step"], record)
        writer.close()
    except UserError as error:
        return Resumption((*said, str(error)), None)
    return Resumption((*said, *writer.problems), step_of(Path(checkpoint)))


def intact_files(run: Path, store: Path) -> Files:
    """Return the files that are damaged: those of the newest checkpoints of a run, its metrics.jsonl, its token store.

    Files that a run which continues does not read are left out: config.yaml, result.json, plots.
    """
    newest = [path for path in step_directories(run / CHECKPOINTS) if step_of(path) % EVERY == 0][:NEWEST]
    files = {METRICS: (run / METRICS_FILE).read_bytes()}
    for directory, name in [(path, f"{RUN}/{CHECKPOINTS}/{path.name}") for path in newest] + [(store, STORE)]:
        files |= {f"{name}/{file.name}": file.read_bytes() for file in sorted(directory.iterdir())}
    return files


def restore(work: Path, files: Files) -> None:
    """Make the working directory contain exactly these files."""
    shutil.rmtree(work, ignore_errors=True)
    for name, data in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(data)


def read_files(work: Path) -> Files:
    """Return all files below the working directory."""
    return {str(path.relative_to(work)): path.read_bytes() for path in work.rglob("*") if path.is_file()}


def newest_intact(before: Files, after: Files) -> int | None:
    """Return the step of the newest checkpoint of which all files are what they were; None if there is none."""
    steps = sorted((STEPS - EVERY * number for number in range(NEWEST)), reverse=True)
    for step in steps:
        prefix = f"{RUN}/{CHECKPOINTS}/step-{step}/"
        if all(after.get(path) == data for path, data in before.items() if path.startswith(prefix)):
            return step
    return None


def _first_read(files: Files) -> Files:
    """Return the files that a run reads if the newest checkpoint is intact."""
    older = tuple(f"{RUN}/{CHECKPOINTS}/step-{STEPS - EVERY * number}/" for number in range(1, NEWEST))
    return {path: data for path, data in files.items() if not path.startswith(older)}


def choose_files(files: Files, choose: random.Random) -> list[str]:
    """Choose what to damage: metrics.jsonl, a file of the token store, or a file of each of the newest checkpoints."""
    kind = choose.choice(("metrics", "store", "checkpoint", "checkpoint"))
    if kind == "metrics":
        return [METRICS]
    if kind == "store":
        return [choose.choice(sorted(path for path in files if path.startswith(f"{STORE}/")))]
    chosen = []
    for number in range(choose.choice((1, 1, 2, NEWEST))):
        prefix = f"{RUN}/{CHECKPOINTS}/step-{STEPS - EVERY * number}/"
        chosen.append(choose.choice(sorted(path for path in files if path.startswith(prefix))))
    return chosen


def flip(work: Path, path: str, choose: random.Random) -> None:
    """Change one bit."""
    data = bytearray((work / path).read_bytes())
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    (work / path).write_bytes(data)


def truncate(work: Path, path: str, choose: random.Random) -> None:
    """Cut off the end."""
    data = (work / path).read_bytes()
    (work / path).write_bytes(data[: choose.randrange(len(data))])


def delete(work: Path, path: str, choose: random.Random) -> None:
    """Delete the file."""
    (work / path).unlink()


def swap(work: Path, path: str, choose: random.Random) -> None:
    """Exchange the content with that of another file, which has the same kind of name if there is one."""
    others = [other for other in sorted(read_files(work)) if other != path]
    alike = [other for other in others if Path(other).suffix == Path(path).suffix]
    other = choose.choice(alike or others)
    data = (work / path).read_bytes()
    (work / path).write_bytes((work / other).read_bytes())
    (work / other).write_bytes(data)


def rename(work: Path, path: str, choose: random.Random) -> None:
    """Rename the file, or its checkpoint: to another step, which is a later one or that of another checkpoint."""
    file = work / path
    if not path.startswith(f"{RUN}/{CHECKPOINTS}/") or choose.random() < 0.5:
        file.rename(file.with_name(f"{file.name}.old"))
        return
    directory = file.parent
    others = [other for other in step_directories(directory.parent) if other != directory]
    other = choose.choice([*others, directory.with_name(f"step-{STEPS + EVERY}")])
    if other.exists():
        aside = directory.with_name("aside")
        other.rename(aside)
        directory.rename(other)
        aside.rename(directory)
    else:
        directory.rename(other)


DAMAGES: Mapping[str, Callable[[Path, str, random.Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "delete": delete,
    "swap": swap,
    "rename": rename,
}
