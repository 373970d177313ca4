"""Pilots: runs for a score alone, of arms that may have no clip."""

import math

import pytest

from espo_lightning import load_policy
from espo_lightning.lab.evidence import jackknife
from espo_lightning.lab.studies import Arm, pilot_run, states
from espo_lightning.lab.studies.states import SUDOKU, Diverged, Snapshots
from espo_lightning.lab.studies.training import UNSEEN, sampled_reward


def test_no_clip_is_a_plain_value_that_a_result_can_store():
    assert Arm(clip_range=None).module(0).objective.clip_range == math.inf
    assert Arm(clip_range=0.2).module(0).objective.clip_range == 0.2


def test_a_pilot_is_scored_on_puzzles_of_its_own(monkeypatch):
    settings = {"arm": {"likelihood": "mean field", "updates": 1, "lr": 0.0}, "rollouts": 1, "prompts": 1}
    base = load_policy(SUDOKU)
    found = pilot_run(0, **settings, problems=8)
    assert found == {"score": round(sampled_reward(base, UNSEEN + 1, 8), 4), "diverged": False}  # no step was made
    assert found["score"] != round(sampled_reward(base, UNSEEN, 8), 4)

    def diverge(*_):
        raise Diverged(Snapshots([]))

    monkeypatch.setattr(states, "train", diverge)
    assert pilot_run(0, **settings, problems=8) == {"score": 0.0, "diverged": True}


def test_the_jackknife_of_a_mean_is_its_interval():
    rows = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert jackknife(lambda values: sum(values) / len(values), rows) == pytest.approx(
        (3 - 1.9629, 3 + 1.9629), abs=1e-3
    )
