"""A choice on a grid: an edge is refused, and the walk that chooses goes on until the best is surrounded."""

import ast
import json
import math
import subprocess
from pathlib import Path

import nbformat
import pytest

from espo_lightning.lab.choice import EdgeChoice, beside, best, choose, open_sides, walk
from espo_lightning.notebooks import SETTINGS

RESULTS = Path(__file__).parents[1] / "notebooks" / "results"
RATES, CLIPS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2], [0.01, 0.05, 0.2, 0.8, None]


def test_a_choice_inside_of_the_grid_is_taken():
    scores = {(lr,): score for lr, score in ((1e-5, 0.2), (1e-4, 0.5), (1e-3, 0.4))}
    assert choose(scores, ["learning rate"]) == (1e-4,)
    assert open_sides(scores) == []


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({(1e-5,): 0.5, (1e-4,): 0.4}, "learning rate 1e-05 is the smallest .* try a smaller one"),
        ({(1e-5,): 0.4, (1e-4,): 0.5}, "learning rate 0.0001 is the largest .* try a larger one"),
        ({(1e-4,): 0.5}, "learning rate 0.0001 is the smallest"),
    ],
)
def test_an_edge_is_refused(scores, message):
    with pytest.raises(EdgeChoice, match=message):
        choose(scores, ["learning rate"])


def test_the_choice_that_made_a_headline_is_refused():
    """The smallest rate and the widest clip of the grid, in both values: token + ELBO at 32 updates, once."""
    scores = dict(zip([(1.5e-5, 0.05), (1.5e-5, 0.2), (5e-5, 0.05), (5e-5, 0.2), (1.5e-4, 0.05), (1.5e-4, 0.2)],
                      [0.59, 0.77, 0.63, 0.74, 0.75, 0.76]))  # fmt: skip
    assert open_sides(scores) == [(0, -1), (1, 1)]
    with pytest.raises(EdgeChoice):
        choose(scores, ["learning rate", "clip"])


def test_no_clip_is_a_natural_end():
    cross = {(1e-5, None): 0.5, (1e-6, None): 0.4, (1e-4, None): 0.3, (1e-5, 0.8): 0.45}
    assert choose(cross, ["learning rate", "clip"]) == (1e-5, None)
    del cross[1e-5, 0.8]
    with pytest.raises(EdgeChoice, match="clip None is the smallest"):
        choose(cross, ["learning rate", "clip"])
    with pytest.raises(EdgeChoice, match=r"clip 0\.8 is the largest"):
        choose({(1e-5, 0.8): 0.6, (1e-5, 0.2): 0.5, (1e-6, 0.8): 0.5, (1e-4, 0.8): 0.4}, ["learning rate", "clip"])


def test_a_neighbour_differs_in_one_value_only():
    diagonal = {(1e-5, 0.2): 0.5, (1e-6, 0.05): 0.4, (1e-4, 0.8): 0.4, (1e-6, 0.8): 0.4, (1e-4, 0.05): 0.4}
    assert len(open_sides(diagonal)) == 4


def test_of_equal_scores_the_first_counts():
    assert best({(2,): 0.5, (1,): 0.5, (3,): 0.5}) == (2,)


def hill(lr, clip):
    """Scores whose top is anywhere."""
    height = {setting: i for i, setting in enumerate(CLIPS)}

    def score(setting):
        return -abs(math.log10(setting[0] / lr)) - abs(height[setting[1]] - height[clip])

    return score


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.8, None])
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
def test_a_walk_ends_at_the_top(lr, clip):
    asked = []

    def measure(wanted):
        asked.extend(wanted)
        return {(arm, setting): hill(lr, clip)(setting) for arm, setting in wanted}

    found = walk(["a", "b"], (RATES, CLIPS), measure)
    assert asked[:2] == [("a", (1e-4, 0.2)), ("b", (1e-4, 0.2))]  # the middle, for every arm
    assert len(asked) == len(set(asked)) == sum(map(len, found.values()))
    assert found["a"] == found["b"]
    assert choose(found["a"], ["learning rate", "clip"]) == (lr, clip)
    assert beside(found["a"], (RATES, CLIPS)) == []


def test_a_walk_begins_where_it_is_told_to():
    asked = []

    def measure(wanted):
        asked.extend(wanted)
        return {(arm, setting): hill(1e-4, 0.2)(setting) for arm, setting in wanted}

    found = walk(["a", "b"], (RATES, CLIPS), measure, {"a": (1e-4, None), "b": (1e-4, 0.2)})
    assert asked[:2] == [("a", (1e-4, None)), ("b", (1e-4, 0.2))]
    assert len(found["a"]) > len(found["b"])
    assert {choose(scores, ["learning rate", "clip"]) for scores in found.values()} == {(1e-4, 0.2)}


def test_a_walk_off_the_ladder_is_no_choice():
    found = walk(["a"], (RATES,), lambda wanted: {job: -job[1][0] for job in wanted})["a"]
    assert best(found) == (1e-6,)
    with pytest.raises(EdgeChoice, match="smallest"):
        choose(found, ["learning rate"])


def tuned(result: dict) -> list[tuple[str, dict, tuple]]:
    """Arms of a stored result with the scores of what they were tried with, and what was chosen."""
    summary = result["summary"]
    if "entries" in summary:  # the leaderboard
        return [
            (f"{contest}, {name}", {(p["lr"],): p["score"] for p in entry["pilots"]}, (entry["lr"],))
            for contest, entries in summary["entries"].items()
            for name, entry in entries.items()
        ]
    if "tried" in summary:  # with settings as words
        chosen = summary.get("chosen") or summary["learning_rates"]
        return [
            (arm, {told(setting): score for setting, score in tried.items()}, told(chosen[arm]))
            for arm, tried in summary["tried"].items()
        ]
    return [
        (arm, {(p["lr"], p["clip_range"]): p["score"] for p in pilots}, tuple(summary["chosen"][arm].values()))
        for arm, pilots in summary["pilots"].items()
    ]


def told(setting: str | float) -> tuple:
    """From "1e-05, 0.03 nats" or "1e-05, no clip", or the learning rate alone."""
    return tuple(None if part == "no clip" else float(part.removesuffix(" nats")) for part in str(setting).split(", "))


# notebook -> its arms
TUNED = {"04_training_ablations": 4, "09_leaderboard": 36, "10_modes": 3, "13_length": 3, "15_arms": 8}


@pytest.mark.parametrize("name", TUNED)
def test_no_stored_choice_lies_at_an_edge(name):
    result = json.loads((RESULTS / name / "result.json").read_text())
    arms = tuned(result)
    assert len(arms) == TUNED[name]
    for arm, scores, chosen in arms:
        assert choose(scores, ["learning rate", "clip"]) == chosen, arm
    assert not result["parameters"].get("edges", False)


def test_every_notebook_that_tunes_is_looked_at():
    texts = {p.stem: p.read_text() for p in RESULTS.parent.glob("[0-9]*.ipynb")}
    results = {name: (RESULTS / name / "result.json").read_text() for name in texts}
    tuning = {name for name in texts if "lab.choice import" in texts[name] or '"pilots"' in results[name]}
    assert tuning == set(TUNED)


def at_commit(commit: str, path: Path) -> dict | None:
    """The parameters of a notebook as it was at a commit; None where the history is not at hand."""
    shown = subprocess.run(
        ["git", "show", f"{commit}:notebooks/{path.name}"], cwd=path.parent, capture_output=True, text=True, check=False
    )
    if shown.returncode:
        return None
    cells = nbformat.reads(shown.stdout, as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.metadata.get("tags") == ["parameters"]]
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}


LATER = {"09_leaderboard": {"rollouts": {"Sudoku": 20}}}  # what the commit had: Countdown came after it, as 09 says


@pytest.mark.parametrize("path", sorted(RESULTS.parent.glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_the_commit_that_a_result_names_has_the_grid_that_ran(path):
    result = json.loads((RESULTS / path.stem / "result.json").read_text())
    assert result["modified"] is False
    found = at_commit(result["commit"], path)
    if found is None:
        pytest.skip("the history of this checkout does not reach back so far")
    found = {key: value for key, value in found.items() if key not in SETTINGS}
    assert found == result["parameters"] | LATER.get(path.stem, {})
