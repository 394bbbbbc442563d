"""Wrong words on the command line: what is wrong, where it came from, what to type next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults_kit import DIGITS, Command, command, run_dir

__all__ = ["command"]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("pretrain --method simclrr", 3, ["'simclrr'", "did you mean 'simclr'", "sslbench list methods"]),
        ("pretrain optim.nmae=sgd train.epochs=x foo.a=1", 2, ["3 problems", "'name'", "'x'", "[command line]"]),
        ("pretrain --recipe nope", 2, ["'nope'", "sslbench list recipes"]),
        ("pretrain --nope", 2, ["No such option: --nope"]),
        ("pretrain epochs", 2, ["'epochs' is not an option", "section.key=value"]),
        ("pretrain --config nope.yaml", 2, ["nope.yaml", "No such file"]),
        ("pretrain --seeds 1,1", 2, ["--seeds 1,1", "--seeds 1,2,3"]),
        ("pretrain --seeds 1,2 --resume last", 2, ["drop one"]),
        ("pretrain --resume last", 5, ["no run in runs", "sslbench pretrain"]),
        ("-p missing.py list", 3, ["missing.py", "no such file"]),
        ("--registry nope.yaml list recipes", 2, ["nope.yaml", "--registry"]),
        ("list nope", 2, ["'nope'", "methods"]),
        ("eval linear", 5, ["no run", "sslbench pretrain"]),
        ("sync", 5, ["no run", "sslbench pretrain"]),
        (f"pretrain {DIGITS} train.batch_size=9999", 2, ["1438 training images", "train.batch_size=359"]),
        (f"pretrain {DIGITS} run.evals=[nope]", 3, ["'nope'", "sslbench list evals"]),
        (f"pretrain {DIGITS} --init-from nope", 5, ["no run"]),
    ],
)
def test_a_wrong_word_is_named_with_its_exit_code(
    command: Command, line: str, code: int, words: list[str]
) -> None:
    done = command(line, code)
    for word in words:
        assert word in done.err, done.err
    assert not Path("runs").exists(), "nothing was started"


@pytest.mark.parametrize("name", ["..", "../up", "a/b", "last", "-x", "a=b", "x" * 101])
def test_names_that_would_break_folders_or_commands_are_refused(command: Command, name: str) -> None:
    for option in ("run.name", "run.experiment"):
        assert option in command(f"pretrain {DIGITS} '{option}={name}'", 2).err


def test_a_name_stands_for_one_run(command: Command) -> None:
    for _ in range(2):
        command(f"pretrain {DIGITS} --limit 1 --no-evals run.name=twin")
    command(f"pretrain {DIGITS} --limit 1 --no-evals run.name=many --seeds 1,2")
    names = [run["name"] for run in json.loads(command("list runs --json").out)]
    assert names == ["twin", "twin-2", "many", "many-2"]
    assert len({run_dir(name) for name in names}) == 4


def test_commands_about_a_run(command: Command) -> None:
    command(f"pretrain {DIGITS} --limit 1 --no-evals run.name=one")
    changed = command("pretrain --resume one optim.lr=3", 2).err
    assert "--resume one" in changed
    assert "optim.lr: 0.001 -> 3.0" in changed
    assert "all its 1 steps already" in command("pretrain --resume one").err
    before = command("eval test one", 5).err
    assert "sslbench eval linear" in before
    assert "unknown key; did you mean 'lrs'" in command("eval linear one lr=3", 2).err
    assert "list datasets" in command("eval linear one --dataset nope", 3).err
    assert "'one'" in command("eval linear onne", 5).err


def test_a_backbone_plugin_that_is_not_given_is_asked_for(command: Command) -> None:
    Path("mine.py").write_text(
        "from sslbench.plugin.hooks import hookimpl\n"
        "from sslbench_plugins.backbones.conv4 import Conv4\n"
        "class Mine(Conv4):\n    name = 'mine'\n"
        "@hookimpl\ndef sslbench_backbones():\n    return [Mine]\n"
    )
    command(f"-p mine.py pretrain {DIGITS} --backbone mine --limit 1 --no-evals run.name=own")
    error = command("eval knn own", 3).err
    assert "'mine'" in error
    command("-p mine.py eval knn own")


def test_a_failing_evaluation_keeps_the_model_and_the_others(command: Command) -> None:
    Path("broken.py").write_text(
        "from sslbench.plugin.api import EvalProtocol, Options\n"
        "from sslbench.plugin.hooks import hookimpl\n"
        "class Broken(EvalProtocol):\n"
        "    name, version, Config, metrics, primary = 'broken', 1, Options, {'x': 'max'}, 'x'\n"
        "    splits = frozenset({'val'})\n"
        "    def run(self, job):\n        raise ZeroDivisionError('oops')\n"
        "@hookimpl\ndef sslbench_evals():\n    return [Broken]\n"
    )
    done = command(f"-p broken.py pretrain {DIGITS} --limit 1 run.evals=[broken,knn] run.name=kept --json", 1)
    assert [e["protocol"] for e in json.loads(done.out)["evals"]] == ["knn"]
    for word in ("broken failed", "oops", "SSLBENCH_DEBUG=1", "error.json"):
        assert word in done.err, done.err
    command("eval linear kept")


def test_a_resumed_run_keeps_the_evaluations_it_has(command: Command) -> None:
    command(f"pretrain {DIGITS} --limit 1 run.evals=[knn] run.name=had")
    result = run_dir("had") / "evals" / "digits" / "knn" / "result.json"
    before = result.stat().st_mtime_ns
    done = command("pretrain --resume had run.evals=[knn,linear] --json")
    assert [e["protocol"] for e in json.loads(done.out)["evals"]] == ["knn", "linear"]
    assert result.stat().st_mtime_ns == before
