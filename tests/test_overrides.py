"""Arguments as the shell gives them: what a configuration gets from each."""

import random
import shlex
from pathlib import Path
from typing import Annotated, Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from common.errors import ConfigError
from common.strict import FREE_TEXT, from_dict, leaf_hints
from scripts.cli.command_line import compose_config, job_command, to_overrides
from scripts.cli.overrides import PARSER, as_typed, in_grammar, quote, split_items, text_keys
from training.config import Config
from training.generation.config import GenerateConfig
from training.report import run_report

TRAIN, GENERATE = text_keys(Config), text_keys(GenerateConfig)
REFUSED = (
    "lr=1e-3/run", "überblick", "日本語", "v(2)", "it's", "a[1]", "x~y", "a#b", "a;b", "a!b", "100%", "[run]", "{a: 1}",
    "a,b", "-x", "--x", "a b", "C:\\runs\\", "back`tick", "$HOME", "<a>", "a&b", '"', "don't 'quote'", "a: b", "👍",
    "a=(b", "20240501", "1e5", "2024_05_01", "007", "1.", "nan", "inf", "true", "False", "[1, 2", "choice(a,b)",
    "range(1,3)",
    "line\nbreak", "trailing\\\n", " spaces ", "a${b", "${", "@x", "a@b:c", "*.txt", "e\u0301", "\\'", "a\\", "'a'b",
)  # fmt: skip


def value_of(override: str) -> Any:
    """The value that Hydra and OmegaConf make of an override, in a configuration whose run.name is N."""
    value = PARSER.parse_override(override).value()
    tree = OmegaConf.create({"run": {"name": "N"}, "value": value})
    container = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(container, dict)
    return container["value"]


def texts(*arguments: str, **flags: bool) -> list[Any]:
    return [value_of(in_grammar(argument, TRAIN | GENERATE, **flags)) for argument in arguments]


@pytest.mark.parametrize("key", ["++data.cache", "run.prompt", "prompt"])
def test_a_key_of_text_gets_what_was_typed(key: str) -> None:
    exact = key == "prompt"
    assert texts(*(f"{key}={text}" for text in REFUSED), exact=exact) == list(REFUSED)
    # A backslash before a comma belongs to the comma.
    listed = [text for text in REFUSED if text == text.strip() and split_items(f"{text},x") == [text, "x"]]
    assert len(listed) > 35 and texts(f"data.paths=[{','.join(listed)},a\\]") == [[*listed, "a\\"]]


def test_what_hydra_gives_a_meaning_keeps_it() -> None:
    kept = {
        "run.init_from=null": None, "run.name='a b'": "a b", 'data.cache="x"': "x", r"data.cache=a\,b": "a,b",
        "data.cache=${run.name}/x": "N/x", "data.cache=ü/${run.name}": "ü/N", "data.cache='${run.name}'": "N",
        "data.paths=[a.txt,'b, c.txt', 7]": ["a.txt", "b, c.txt", "7"], "data.paths=[]": [], "run.name=": "",
        "data.paths=[lr=1e-3/x.jsonl,überblick/*.txt]": ["lr=1e-3/x.jsonl", "überblick/*.txt"],
        "data.paths=[x(1,2).txt,${run.name}=1]": ["x(1,2).txt", "N=1"],
        "optim.train=[router,expert:3]": ["router", "expert:3"],
        "optim.train=expert:3": "expert:3", "run.name=str(3)": "3",
        "train.steps=7": 7, "model.sliding_window=[64,null]": [64, None],
        "run.prompt='The end'": "The end", "run.prompt=null": "null",
    }  # fmt: skip
    assert texts(*kept) == list(kept.values())
    # `null` is no text where a key needs one, and `${` means nothing in a prompt.
    assert texts("run.root=null", "data.paths=[null]", "run.prompt=a ${run.name}", "run.prompt='${x}'") == [
        None, [None], "a ${run.name}", "${x}",
    ]  # fmt: skip
    assert texts("prompts=[${x},it's, 'a, b']", "stops=[1e5]") == [["${x}", "it's", "a, b"], ["1e5"]]
    assert texts("prompt='x'", "prompt=null", "stop=\\", exact=True) == ["'x'", "null", "\\"]


def test_only_a_sweep_reads_commas_and_functions() -> None:
    swept = in_grammar("run.name=1e5, lr=3,'a,b',ü", TRAIN, multirun=True)
    values = [value_of(f"x={item}") for item in PARSER.parse_override(swept).sweep_string_iterator()]
    assert values == ["1e5", "lr=3", "a,b", "ü"]
    lists = in_grammar("data.paths=[a=1,b],[ü]", TRAIN, multirun=True)
    assert [value_of(f"x={item}") for item in PARSER.parse_override(lists).sweep_string_iterator()] == [
        ["a=1", "b"],
        ["ü"],
    ]
    for kept in ("data.cache=choice(a,b)", "model.dim=64,128", "optim.lr=1e-3,3e-3", "run.seed=range(3)"):
        assert in_grammar(kept, TRAIN, multirun=True) == kept
    assert job_command(["a=1", "-m", "run.name=1e5,2", "--config-dir", "a=b"]) == [
        "-m", "--config-dir", "a=b", "a=1", "run.name='1e5','2'",
    ]  # fmt: skip


def test_any_text_survives_the_way_through_hydra() -> None:
    """10 characters at a time from those that a grammar uses, and what a resume command prints of them."""
    generator = random.Random(4)
    characters = [*"a1e=()ü日'#~ ,-[]:%\\@!\"{}$.\n*", "${", "${run.name}", "null", "true"]
    for _ in range(60):
        text = "".join(generator.choices(characters, k=generator.randrange(1, 8)))
        assert texts(f"prompt={text}", exact=True) == [text]
        assert value_of(f"x={quote(text)}") == text
        override = in_grammar(f"run.prompt={text}", TRAIN)
        again = in_grammar(as_typed(override, TRAIN), TRAIN)
        assert value_of(again) == value_of(override), (text, override)
        try:
            PARSER.parse_override(f"run.prompt={text}")
        except HydraException:
            assert value_of(override) == text


def test_the_keys_of_text_are_those_of_the_dataclasses() -> None:
    assert {"run.name", "data.cache", "data.paths", "optim.train", "engine.ds_config", "plugins"} <= TRAIN.keys()
    assert not {"train.steps", "train.precision", "model.sliding_window", "router.normalize"} & TRAIN.keys()
    free = {key for key, text in (TRAIN | GENERATE).items() if text.free}
    assert free == {"run.prompt", "tracking.notes", "prompt", "prompts", "stop", "stops"}
    assert dict(leaf_hints(Config))["run.prompt"] == Annotated[str, FREE_TEXT]


def test_a_value_that_no_grammar_takes_is_refused_by_its_type() -> None:
    for argument, line in (
        ("train.steps=(", r"^train\.steps=\(: expected an integer$"),
        ("plugins=ü.py", r"^plugins=ü\.py: expected a list, each item a string$"),
        ("+data.paths=a=b", r"^data\.paths=a=b: expected a list, each item a string$"),
        ("run.name=a//../b", r"^run\.name='a//\.\./b': expected the name of a directory below run\.root"),
        ("run.experiment=/a", r"^run\.experiment='/a': expected the name of a directory"),
    ):
        with pytest.raises(ConfigError, match=line):
            from_dict(Config, compose_config("config", to_overrides([argument], Config)))
    with pytest.raises(ConfigError, match=r"^'run\.root=a\\udcff': expected text in UTF-8$"):
        to_overrides(["run.root=a\udcff"], Config)


def test_text_passes_through_a_whole_composition() -> None:
    names = ["lr=1e-3 überblick (2) it's", "1e5", "日本/x~y", "a,b"]
    for name in names:
        arguments = [f"run.name={name}", f"run.prompt={name} ${{x}}", f"data.cache={name}/${{run.name}}", "model=small"]
        config = from_dict(Config, compose_config("config", to_overrides(arguments, Config)))
        assert (config.run.name, config.run.prompt) == (name, f"{name} ${{x}}")
        assert config.data.cache == f"{name}/{name}"


def test_the_command_that_resumes_a_run_has_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = [
        "run.prompt=it's ${x}, 1e5",
        "data.cache=lr=1e-3/ü",
        "data=files",
        "data.paths=[a=b,'c, d']",
        "run.root=007",
    ]
    overrides = ["data=files", *to_overrides(typed, Config)]
    assert [as_typed(override, TRAIN) for override in overrides[1:3]] == typed[:2]
    monkeypatch.setattr(run_report.sys, "argv", ["train.py", *(as_typed(override, TRAIN) for override in overrides)])
    config = from_dict(Config, compose_config("config", overrides))
    words = shlex.split(run_report.resume_command(config, "lr=1 (2)", 1, 7))
    resumed = from_dict(Config, compose_config("config", to_overrides(words[2:], Config)))
    assert resumed.run.name == "lr=1 (2)" and resumed.run.prompt == "it's ${x}, 1e5"
    assert (resumed.data, resumed.run.root, resumed.train.steps) == (config.data, "007", 7)


def test_the_resume_command_runs_this_python_whatever_the_shell_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict(Config, compose_config("config", []))
    python = tmp_path / "env" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.setattr(run_report.sys, "executable", str(python))
    monkeypatch.setattr(run_report.sys, "argv", ["train.py"])

    def program() -> str:
        return run_report.resume_command(config, "a", 1, 2).split()[0]

    monkeypatch.setenv("PATH", "/usr/bin")  # The environment is not activated.
    assert program() == str(python)
    monkeypatch.setenv("PATH", f"{python.parent}:/usr/bin")
    assert program() == "python3"
    monkeypatch.chdir(tmp_path)
    assert program() == "env/bin/python3"


def test_the_keys_of_a_plugin_take_text_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from common import plugins
    from moe.config import ROUTER_CONFIGS

    monkeypatch.setattr(ROUTER_CONFIGS, "_entries", dict(ROUTER_CONFIGS._entries))
    monkeypatch.setattr(plugins, "_loaded", {})
    plugin = tmp_path / "my=labelled.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom moe.config import ROUTER_CONFIGS, RouterConfig\n"
        "@dataclass(frozen=True)\nclass Labelled(RouterConfig):\n    kind: str = 'labelled'\n    label: str = ''\n"
        "ROUTER_CONFIGS.add('labelled', Labelled)\n"
    )
    overrides = to_overrides([f"plugins=[{plugin}]", "router.kind=labelled", "+router.label=1e5"], Config)
    assert from_dict(Config, compose_config("config", overrides)).router.label == "1e5"  # type: ignore[attr-defined]
