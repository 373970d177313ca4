"""GSM8K and MATH: gold answers, adversarial texts, splits."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from maths_cases import DATA, GSM8K_ROWS, MATH_ROWS, RIGHT

from espo_lightning.tasks.maths import GSM8K, INSTRUCTION, MATH, verify_math


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first comparison of each of the two workers waits for it to import sympy."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: verify_math("\\boxed{9^{9^{9^{9}}}}", "7"), range(2)))


@pytest.mark.parametrize("task", [GSM8K_ROWS, MATH_ROWS], ids=["gsm8k", "math"])
def test_gold_answers_score_one_and_others_zero(task):
    for index in range(len(task.rows("test"))):
        problem = task.problem("test", 0, index)
        gold = problem.verify.keywords["gold"]
        assert problem.prompt.endswith(INSTRUCTION)
        for text in [problem.answer, *(form.format(gold) for form in RIGHT)]:
            assert problem.verify(text)["reward"] == 1.0, (text[-80:], gold)
        for wrong in (
            "",
            "no idea",
            "\\boxed{}",
            "\\boxed{98765}",
            "The answer is 98765.",
            "\\boxed{x^7+1}",
            "\\boxed{",
        ):
            assert problem.verify(wrong)["reward"] == 0.0, (wrong, gold)


# (text, gold, reward, reason); "numbers" of GSM8K is on for the first table and off for the second
GSM8K_TABLE = [
    ("The answer is 42", "42", 1, "official regex needs a character after the number: 4"),
    ("\\boxed{1,000}", "1000", 1, "official regex reads 000"),
    ("\\boxed{18.0}", "18", 1, "official regex reads 0"),
    ("The answer is 42.0.", "42", 1, "official compares strings"),
    ("it is 3.5", "3.5", 1, "official reads 5"),
    ("5-3", "3", 1, "a hyphen between digits is no sign: official reads -3"),
    ("between 3-5", "5", 1, "official reads -5"),
    ("The answer is 7. The answer is 42.", "42", 1, "the last statement counts, official takes the first"),
    ("The answer is 7. The answer is 42.", "7", 0, "a corrected answer is not the answer"),
    ("#### 7\n#### 42", "42", 1, "the last marker counts"),
    ("so 42 at 7 pm", "42", 1, "a time of day is not the answer"),
    ("\\boxed{1,200}", "1200", 1, "thousands comma"),
    ("\\boxed{1{,}200}", "1200", 1, "TeX thousands comma"),
    ("\\boxed{\\$18}", "18", 1, "currency"),
    ("\\boxed{$18}", "18", 1, "bare dollar sign"),
    ("\\boxed{18 dollars}", "18", 1, "unit"),
    ("\\boxed{18\\text{ apples}}", "18", 1, "unit in \\text"),
    ("\\boxed{18\\%}", "18", 1, "per cent sign, as in MATH's own convention"),
    ("\\boxed{ 18 }", "18", 1, "spaces"),
    ("\\boxed {18}", "18", 1, "space before the brace"),
    ("\\boxed{\\text{18}}", "18", 1, "number in \\text"),
    ("\\boxed{+18}", "18", 1, "explicit plus"),
    ("\\boxed{018}", "18", 1, "leading zero"),
    ("\\boxed{18.}", "18", 1, "trailing point"),
    ("\\boxed{36/2}", "18", 1, "fraction that is the number"),
    ("\\boxed{17.999999999}", "18", 0, "no rounding for plain numbers"),
    ("\\boxed{7} ... wait, \\boxed{18}", "18", 1, "last box"),
    ("\\boxed{18} ... wait, \\boxed{7}", "18", 0, "first box does not count"),
    ("\\boxed{18} then \\boxed{", "18", 1, "a box cut off at the end is not an answer"),
    ("The answer is 7. \\boxed{18}", "18", 1, "a box beats a sentence"),
    ("\\boxed{18}. The answer is 7.", "18", 1, "a box beats a sentence, also a later one"),
    ("\\boxed{17, 18, 19}", "18", 0, "a list of guesses"),
    ("\\boxed{17 or 18}", "18", 0, "a hedge"),
    ("\\boxed{18 or 17}", "18", 0, "a hedge, right one first"),
    ("\\boxed{x}\\boxed{}", "18", 0, "an empty box"),
    ("18 18 18 \\boxed{7}", "18", 0, "numbers outside the box"),
    ("\\boxed{-18}", "18", 0, "sign"),
    ("\\boxed{−18}", "-18", 1, "Unicode minus"),
    ("\\boxed{18 million}", "18", 0, "a factor is not a unit"),
    ("\\boxed{18 pi}", "18", 0, "pi is not a unit"),
    ("\\boxed{1800\\%}", "18", 0, "per cent is dropped, not divided"),
    ("The answer is $18$.", "18", 1, "mathematics in a sentence"),
    ("The answer is $18.", "18", 1, "a price in a sentence"),
    ("The answer is 18 apples, because 3 are left.", "18", 1, "text after the number"),
    ("The answer is: **18**", "18", 1, "Markdown"),
    ("ANSWER: 18", "18", 1, "capitals"),
    ("The answer is eighteen", "18", 0, "words are not read"),
    ("#### 18\n", "18", 1, "the data set's own format"),
    ("####", "18", 0, "nothing after the marker"),
    ("10 + 8 = 18", "18", 1, "last number"),
    ("x18", "18", 0, "part of a word"),
    ("٤٢", "42", 0, "other digits are not ASCII digits"),
    ("²", "2", 0, "a superscript passes isdigit"),
    ("\\boxed{1e1}", "10", 0, "no scientific notation in plain numbers"),
    ("\\boxed{1/0}", "0", 0, "division by zero"),
    ("9" * 5000, "9", 0, "a number of 5000 digits"),
    ("\\boxed{" + "9" * 5000 + "}", "9", 0, "a box of 5000 digits"),
]
MATH_TABLE = [
    ("\\boxed{\\frac{1}{2}}", "0.5", 1, "fraction and decimal"),
    ("\\boxed{\\dfrac12}", "\\frac{1}{2}", 1, "short form"),
    ("\\boxed{x>3}", "(3,\\infty)", 0, "official argument order makes this 1; gold first 0"),
    ("\\boxed{(3,\\infty)}", "(3,\\infty)", 1, "interval"),
    ("\\boxed{[3,\\infty)}", "(3,\\infty)", 0, "closed is not open"),
    ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3, \\pi/2)", 1, "tuple with \\left and \\right"),
    ("\\boxed{(\\frac{\\pi}{2}, 3)}", "(3, \\frac{\\pi}{2})", 0, "order of a tuple"),
    ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", 1, "sets have no order"),
    ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", 1, "surds"),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", 1, "expansion"),
    ("\\boxed{(x+1)^2}", "x^2+2x", 0, "not equal"),
    ("\\boxed{x=5}", "5", 1, "assignment"),
    ("\\boxed{\\text{Even}}", "\\text{even}", 1, "the case of words does not count"),
    ("\\boxed{even}", "\\text{even}", 1, "\\text is presentation"),
    ("\\boxed{30}", "30^\\circ", 1, "degrees"),
    ("\\boxed{10080}", "10,\\!080", 1, "TeX thousands separator"),
    ("\\boxed{1 \\pm \\sqrt{19}}", "1 \\pm \\sqrt{19}", 1, "plus-minus"),
    ("\\boxed{1 + \\sqrt{19}}", "1 \\pm \\sqrt{19}", 0, "half of the solutions"),
    (
        "\\boxed{\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}}",
        "\\begin{pmatrix} 0.2 \\\\ -3.6 \\end{pmatrix}",
        1,
        "matrix",
    ),
    ("so we get 7", "7", 0, "MATH wants a marked answer: the last number of a derivation is mostly not it"),
    ("\\boxed{" + "{" * 200 + "}" * 200 + "}", "7", 0, "nested braces"),
    ("\\boxed{\\boxed{7}}", "7", 1, "nested boxes"),
    ("\\boxed{7}}}}", "7", 1, "too many braces"),
    ("\\boxed{__import__('os').system('true')}", "0", 0, "code in the answer is not executed"),
    ("\\boxed{\\input{/etc/passwd}}", "0", 0, "nor is TeX"),
    ("\\boxed{\\frac{\\frac{\\frac{1}{2}}{3}}{4}}", "\\frac{1}{24}", 1, "nested fractions"),
    ("\\boxed{0}", "x", 0, "number for a symbol"),
    ("\\boxed{x}", "0", 0, "symbol for a number"),
    ("\\boxed{nan}", "0", 0, "nan"),
    ("\\boxed{\\infty}", "0", 0, "infinity"),
    ("", "7", 0, "empty"),
    ("\0\ud800\\boxed{\ud800}", "7", 0, "NUL and a lone surrogate"),
]


def test_table_is_large_enough():
    assert len(GSM8K_TABLE) + len(MATH_TABLE) >= 60


@pytest.mark.parametrize(("text", "gold", "reward", "reason"), GSM8K_TABLE, ids=[row[3] for row in GSM8K_TABLE])
def test_gsm8k_adversarial(text, gold, reward, reason):
    assert verify_math(text, gold, numbers=True)["reward"] == reward, reason


@pytest.mark.parametrize(("text", "gold", "reward", "reason"), MATH_TABLE, ids=[row[3] for row in MATH_TABLE])
def test_math_adversarial(text, gold, reward, reason):
    assert verify_math(text, gold)["reward"] == reward, reason


def test_problems_pickle_and_streams_are_functions_of_seed_and_index():
    for task in (GSM8K_ROWS, MATH_ROWS):
        problem = pickle.loads(pickle.dumps(task.problem("test", 3, 5)))
        assert problem.verify(problem.answer)["reward"] == 1.0
        assert problem.prompt == task.problem("test", 3, 5).prompt
        size = len(task.rows("test"))
        epochs = [[task.problem("test", seed, i).prompt for i in range(size)] for seed in (0, 1)]
        assert epochs[0] != epochs[1]
        assert sorted(epochs[0]) == sorted(epochs[1])


def test_splits(tmp_path):
    task = GSM8K(path=str(DATA / "gsm8k_60.jsonl"))
    train, test = task.rows("train"), task.rows("test")
    assert (len(train), len(test)) == (54, 6)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "so\n#### 1,234"}))
    named = GSM8K(path=str(tmp_path / "{split}.jsonl"))
    assert named.problem("test", 0, 7).prompt.startswith("test")
    assert named.problem("train", 0, 0).verify("\\boxed{1234}")["reward"] == 1.0
    with pytest.raises(ValueError, match="held_out"):
        GSM8K(path=str(DATA / "gsm8k_60.jsonl"), held_out=0.0).problem("test", 0, 0)


def test_gold_from_the_solution(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}."}))
    problem = MATH(path=str(tmp_path / "m.jsonl"), held_out=0.0).problem("train", 0, 0)
    assert problem.verify("\\boxed{0.5}")["reward"] == 1.0
