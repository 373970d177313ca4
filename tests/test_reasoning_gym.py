"""reasoning-gym's data sets as tasks, where the package is installed: ``make reasoning-gym`` does that."""

import os
import pickle
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from espo_lightning import fit, new_policy
from espo_lightning.lab.task_gallery import gym_entries, section
from espo_lightning.tasks import ReasoningGym
from espo_lightning.tasks.gym_inner import EVALUATE, PARSE

ROOT = Path(__file__).parents[1]
INSTALL = "reasoning-gym is not installed; `make reasoning-gym` does that (its pycosat needs a C compiler)"
pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason=INSTALL)

SETS = ["mini_sudoku", "basic_arithmetic", "chain_sum", "gcd", "countdown", "letter_counting", "word_sorting", "maze"]
SETS += [
    "spiral_matrix",
    "n_queens",
    "simple_equations",
    "number_sorting",
    "base_conversion",
    "tower_of_hanoi",
]


@pytest.mark.parametrize("name", SETS)
def test_answers_of_reasoning_gym_score_1(name):
    task, compact = ReasoningGym(name), ReasoningGym(name, prompt="compact", reward="exact")
    for split, index in (("train", 0), ("train", 40), ("test", 0), ("test", 3)):
        each = task.problem(split, 1, index)
        assert each.verify(each.answer) == {"reward": 1.0, "exact": 1.0, "score": 1.0, "failed": 0.0, "timeout": 0.0}
        assert pickle.loads(pickle.dumps(each)).verify("") == dict.fromkeys(each.verify(""), 0.0)
        assert each.verify("<answer>no idea</answer>")["exact"] == 0
        bare = compact.problem(split, 1, index)
        assert each.prompt == f"{bare.prompt}\n\n{each.prompt.rpartition(chr(10))[2]}"
        assert bare.verify(bare.answer)["reward"] == 1.0
        assert bare.verify(f"Hm. {bare.answer} or 7")["reward"] == 0.0


def test_questions_of_reasoning_gym_belong_to_one_split_and_depend_on_seed_and_index():
    task = ReasoningGym("chain_sum", options={"min_terms": 2, "max_terms": 2, "max_digits": 1})
    drawn = {split: [task.problem(split, 0, i).prompt for i in range(80)] for split in ("train", "test")}
    assert not set(drawn["train"]) & set(drawn["test"])
    assert [task.problem("test", 0, i).prompt for i in reversed(range(80))] == drawn["test"][::-1]
    assert [task.problem("train", 1, i).prompt for i in range(80)] != drawn["train"]
    with pytest.raises(ValueError, match='split must be "train" or "test"'):
        task.problem("validation", 0, 0)


def test_reasoning_gym_draws_the_same_in_another_process():
    program = (
        "from espo_lightning.tasks import ReasoningGym\n"
        f"print([ReasoningGym(n).problem('test', 2, 1)[::2] for n in {SETS}])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    there = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str([ReasoningGym(name).problem("test", 2, 1)[::2] for name in SETS])


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("minisudoku", {}, "'minisudoku' is none of the 1.. data sets of reasoning-gym, such as mini_sudoku"),
        ("mini_sudoku", {"empty": 3}, "do not suit 'mini_sudoku'.*empty"),
        ("mini_sudoku", {"min_empty": 99}, "do not suit 'mini_sudoku'"),
        ("mini_sudoku", {"seed": 3}, "'seed' is chosen by this library"),
        ("composite", {}, "do not suit 'composite'"),
        (
            "word_ladder",
            {},
            "'word_ladder' of reasoning-gym draws other questions in every process: set PYTHONHASHSEED",
        ),
    ],
)
def test_what_reasoning_gym_does_not_have(name, options, sentence, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match=sentence):
        ReasoningGym(name, options=options)


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ValueError, match=r"pip install 'espo-lightning\[reasoning-gym\]'"):
        ReasoningGym("gcd", options={"value": 1})


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("n_queens", "__import__('os').system('touch {0}')"),
        ("spiral_matrix", "[open('{0}', 'w')]"),
        ("string_insertion", "[open('{0}', 'w').name]"),
        ("binary_matrix", "[[open('{0}', 'w').fileno()]]"),
        ("puzzle24", "open('{0}', 'w').fileno()"),
        ("countdown", 'exec(\'open("{0}", "w")\')'),
        ("simple_integration", "open(chr(47) + '{0}', 'w')"),
        ("polynomial_multiplication", "x.__class__.__base__"),
        ("puzzle24", "exec(chr(49))"),
        ("countdown", "(lambda: 1)()"),
    ],
)
def test_no_answer_is_executed_by_the_scorers_of_reasoning_gym(name, attack, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    verdict = ReasoningGym(name).problem("train", 0, 0).verify(attack.format(tmp_path / "door"))
    assert verdict["exact"] == 0
    assert not (tmp_path / "door").exists()


def test_an_answer_that_never_ends_costs_its_reward():
    verdict = ReasoningGym("puzzle24").problem("train", 0, 0).verify("9**9**9**9")
    assert (verdict["reward"], verdict["failed"]) == (0.0, 1.0)


def test_all_places_of_reasoning_gym_that_evaluate_answers_are_known():
    """A new version may have more of them."""
    import reasoning_gym

    package = Path(reasoning_gym.__file__).parent
    found = {"eval": set(), "parse": set()}
    for path in package.rglob("*.py"):
        source, name = path.read_text(), ".".join(path.relative_to(package).with_suffix("").parts)
        if re.search(r"\b(?:eval|exec)\((?:answer|user|response|solution)", source):
            found["eval"].add(name)
        if "sympy_parser import parse_expr" in source:
            found["parse"].add(name)
        assert "sympify(" not in source
    assert found == {"eval": set(EVALUATE), "parse": set(PARSE)}


def test_reasoning_gym_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).save(tmp_path / "tiny")
    flags = ["--data.batches=2", "--data.batch_size=2", "--data.eval_problems=2", "--data.eval_batch_size=2"]
    flags += ["--model.group_size=2", "--trainer.accelerator=cpu", "--run_dir=run"]
    task = ["--data.task=ReasoningGym", "--data.task.name=mini_sudoku", "--data.task.prompt=compact"]
    fit.main([*flags, *task, "--model.policy.path=tiny"])
    columns = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"reward/exact", "reward/score", "val/score"} <= set(columns)


def test_the_gallery_shows_its_sets_as_they_are():
    text = (ROOT / "docs" / "tasks.md").read_text()
    for entry in gym_entries():
        verify = entry.task.problem("train", 0, 0).verify
        assert verify(entry.right)["exact"] == 1
        assert verify(entry.wrong)["exact"] == 0
        assert section(entry) in text
