"""Test problems are distinct, and intervals are as wide as what repeats makes them."""

import json
import math
import random

import pytest
from conftest import Letters, small_policy

from espo_lightning import Countdown, Decoding, Sudoku, evaluate
from espo_lightning.tasks.base import Distinct
from espo_lightning.tasks.rows import Rows
from espo_lightning.tasks.statistics import cluster_of, constant, interval, summarise, wilson

# ---- what is tested -------------------------------------------------------------------------------------------------


TASKS = [Countdown(10, 50), Countdown(), Countdown(99, 99), Sudoku(), Sudoku(empty=1), Sudoku(empty=12)]


@pytest.mark.parametrize("task", TASKS, ids=repr)
@pytest.mark.parametrize("seed", [0, 3])
def test_256_test_problems_are_all_different(task, seed):
    problems = [task.problem("test", seed, i) for i in range(256)]
    assert len({p.prompt for p in problems}) == 256
    if isinstance(task, Countdown):  # also when the order of the numbers does not count
        items = {(tuple(sorted(p.prompt.partition("=")[0].split(","))), p.prompt.partition("=")[2]) for p in problems}
        assert len(items) == 256
        assert all(p.verify(p.answer)["exact"] == 1 for p in problems[::16])


def test_the_first_different_draws_come_in_their_order_and_then_again():
    draws = [3, 1, 3, 1, 2, 1, 4, 1, 5]
    values = Distinct(lambda n: draws[n % len(draws)], patience=20)
    assert [values[i] for i in range(12)] == [3, 1, 2, 4, 5, 3, 1, 2, 4, 5, 3, 1]
    assert values.drawn == 9 + 21
    even = Distinct(lambda n: draws[n % len(draws)], key=lambda value: value % 2, patience=20)
    assert [even[i] for i in range(3)] == [3, 2, 3]


def test_the_default_puzzles_are_what_they_were():
    """The first 256 draws of Sudoku were different already, so that numbers of earlier runs compare."""
    from espo_lightning.tasks.sudoku import draw_puzzle

    for index in range(0, 256, 15):
        assert Sudoku().problem("test", 0, index).prompt == draw_puzzle(8, "test", 0, index)[0]


def test_problems_of_one_solution_or_numbers_or_prompt_share_a_cluster(tmp_path):
    puzzles = [Sudoku().problem("test", 0, i) for i in range(256)]
    assert len({p.cluster for p in puzzles}) == 69
    assert all(p.cluster == p.answer for p in puzzles)
    items = [Countdown(10, 50).problem("test", 0, i) for i in range(256)]
    numbers = [p.prompt.partition("=")[0].split(",") for p in items]
    assert [p.cluster for p in items] == [repr(sorted(map(int, three))) for three in numbers]
    assert len({p.cluster for p in items}) < 256
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n % 3}"}) + "\n" for n in range(9)))
    task = Rows(path=str(tmp_path / "rows.jsonl"), held_out=1.0, verifier=lambda row, text: {"reward": 0.0})
    keys = {cluster_of(p.prompt, p.cluster) for p in (task.problem("test", 0, i) for i in range(9))}
    assert len(keys) == 3
    assert cluster_of([{"role": "user", "content": "a"}]) != cluster_of("a") == cluster_of("a") != cluster_of("a", "b")


# ---- intervals ------------------------------------------------------------------------------------------------------


def rows(values) -> list[dict[str, float]]:
    return [{"x": value} for value in values]


def test_clusters_of_one_change_nothing():
    draw = random.Random(0)
    for values in ([draw.random() for _ in range(20)], [float(draw.random() < 0.3) for _ in range(20)]):
        alone, keyed = summarise(rows(values)), summarise(rows(values), list("abcdefghijklmnopqrst"))
        assert alone == keyed
        assert (alone["n"], alone["clusters"]) == (20, 20)
    assert summarise(rows([0.0, 1.0, 1.0]))["ci95"]["x"] == pytest.approx(wilson(2 / 3, 3))


def test_a_problem_that_counts_twice_does_not_narrow_the_interval():
    draw = random.Random(1)
    for make in (draw.random, lambda: float(draw.random() < 0.4)):
        values = [make() for _ in range(40)]
        once = summarise(rows(values))
        twice = summarise(rows(values * 2), list(range(40)) * 2)
        assert (twice["n"], twice["clusters"], twice["x"]) == (80, 40, pytest.approx(once["x"]))
        assert twice["ci95"]["x"] == pytest.approx(once["ci95"]["x"], abs=4e-3)  # 40 against 39
        blind = summarise(rows(values * 2))["ci95"]["x"]
        assert blind[1] - blind[0] < 0.75 * (once["ci95"]["x"][1] - once["ci95"]["x"][0])


def test_the_clustered_variance_by_hand():
    values, clusters = [1.0, 0.5, 0.0, 0.25], ["a", "a", "b", "b"]
    mean = 1.75 / 4
    sums = (1.5 - 2 * mean, 0.25 - 2 * mean)
    half = 1.96 * math.sqrt(2 / 1 * (sums[0] ** 2 + sums[1] ** 2)) / 4
    assert interval(values, clusters) == pytest.approx((mean - half, mean + half))
    shares, n = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], 6
    groups = ["a", "a", "b", "b", "c", "c"]  # sums 1, -1, 0
    effect = (3 / 2 * (1 + 1 + 0) / n) / 0.25
    assert interval(shares, groups) == pytest.approx(wilson(0.5, n / effect))


def test_clusters_that_balance_do_not_narrow_the_interval():
    values, clusters = [0.2, 0.4] * 10, [i // 2 for i in range(20)]
    assert interval(values, clusters) == pytest.approx(interval(values, range(20)))
    assert interval([0.0, 1.0] * 10, clusters) == pytest.approx(wilson(0.5, 20))


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_intervals_cover_the_truth(share, clustered):
    """95 % intervals of simulated policies that are right or wrong on a whole cluster, or on each problem."""
    draw, covered, trials = random.Random(5), 0, 400
    clusters = [i // 4 for i in range(240)]
    for _ in range(trials):
        right = [float(draw.random() < share) for _ in range(60)]
        values = [right[c] if clustered else float(draw.random() < share) for c in clusters]
        low, high = interval(values, clusters)
        covered += low <= share <= high
    assert covered / trials > 0.92


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1.0, -0.5, 2.0, 0.1 + 0.2])
@pytest.mark.parametrize("n", [1, 2, 256])
def test_equal_values_have_an_interval(value, n):
    low, high = summarise(rows([value] * n))["ci95"]["x"]
    assert low <= value + 1e-12
    assert high >= value - 1e-12
    assert high - low > 0
    assert high - low == pytest.approx(max(1.0, 2 * abs(value) * (not 0 <= value <= 1)) * wilson(0.0, n)[1])
    if value in (0.0, 1.0):
        assert (low, high) == pytest.approx(wilson(value, n))


def test_one_cluster_says_as_much_as_one_problem():
    assert interval([0.2, 0.9, 0.4], ["a"] * 3) == pytest.approx(constant(0.5, 1))
    assert interval([0.0, 0.0, 0.0, 0.0], ["a", "a", "b", "b"]) == pytest.approx(wilson(0.0, 2))
    with pytest.raises(ValueError, match="one cluster per verdict, got 2 verdicts, 1 clusters"):
        summarise(rows([1.0, 0.0]), ["a"])


def test_evaluations_cluster_their_intervals(tmp_path):
    """Letters has three prompts: twelve problems are three clusters, also with several samples."""
    short = Decoding(length=4, block_length=4, steps=4, temperature=1.0)
    for samples in (1, 2):
        output = str(tmp_path / f"{samples}.json")
        settings = {"problems": 12, "samples": samples, "batch_size": 5, "device": "cpu", "output": output}
        result = evaluate.evaluate(small_policy(), Letters(), short, **settings)
        assert (result["n"], result["clusters"]) == (12, 3)
