"""Time to quality: how its rates are chosen, when a curve crosses, and the passes that it counts."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import default_run
import quality
from quality import AUTHORS, DEFAULTS, PILOTS, RATES

from espo_lightning.lab.choice import EdgeChoice


def test_the_choice_is_that_of_all_pilots_run_to_their_end():
    draw = random.Random(0)
    for _ in range(300):
        needed = {(rate, seed): draw.choice([math.inf, draw.uniform(0, 12)]) for rate in RATES for seed in PILOTS}
        spent = 0

        def pilot(rate, seed, limit, needed=needed):
            nonlocal spent
            spent += limit
            return needed[rate, seed] if needed[rate, seed] <= limit else None

        sums = {
            rate: sum(needed[rate, seed] if needed[rate, seed] <= 10 else math.inf for seed in PILOTS) for rate in RATES
        }
        best = min(RATES, key=sums.__getitem__)
        found = quality.scores(pilot, 10, RATES)
        if best in (min(RATES), max(RATES)) and sums[best] < math.inf:
            with pytest.raises(EdgeChoice, match=f"a side: learning rate {best!r} is the"):
                quality.rate_of("a side", found)
        else:
            assert quality.rate_of("a side", found) == (best if sums[best] < math.inf else None)
        assert spent <= 10 * len(RATES) * len(PILOTS)


def test_the_stored_rates_are_chosen_by_the_stored_pilots_and_lie_on_no_edge():
    stored = json.loads((Path(__file__).parents[1] / "benchmarks/results/quality.json").read_text())

    def done(side, rate, seed, limit):
        return stored["runs"][f"{side} lr={rate:g} seed={seed}"]

    assert quality.rates_of(done, 30) == stored["rates"]
    best = stored["runs"]["library, authors' settings lr=3e-05 seed=101"]
    best |= {"rollouts": 0.5}
    stored["runs"]["library, authors' settings lr=3e-05 seed=102"] = best
    with pytest.raises(EdgeChoice, match="library, authors' settings: learning rate 3e-05 is the smallest"):
        quality.rates_of(done, 30)


def test_the_moment_lies_between_two_looks_and_is_unknown_without_them():
    curve = [(0.0, 0.1), (2.0, 0.4), (6.0, 0.6)]
    assert quality.moment(curve) == pytest.approx({"seconds": 4.0, "rollouts": 1.5})
    assert quality.moment(curve[:2]) == {"seconds": None, "rollouts": None}


def test_pilots_have_seeds_of_their_own():
    assert not set(PILOTS) & set(range(10, 20))
    assert not set(default_run.SEEDS) & {*range(5), *range(10, 20), *PILOTS}


def test_passes_by_counting():
    """Decoding is nearly free at 8 steps: what the authors' settings take over the defaults, by denoising steps."""

    def ratio(steps: int) -> float:
        return replace(AUTHORS, steps=steps).passes(spared=False) / replace(DEFAULTS, steps=steps).passes(spared=True)

    assert [round(ratio(steps), 1) for steps in (8, 128, 256)] == [6.5, 2.0, 1.5]
    notes = (Path(__file__).parents[1] / "benchmarks/NOTES.md").read_text().split("## Time to quality")[1]
    assert "6.5 at 8 denoising steps, where decoding is nearly free; 2.0 at 128, 1.5 at" in " ".join(notes.split())


@pytest.mark.parametrize("side", ["library, defaults", "straightforward, defaults"])
def test_passes_are_those_that_run(side, monkeypatch):
    """Rows through the network of one rollout, trained ones three times. The library leaves out empty halves, too."""
    rows = {True: 0, False: 0}
    load, policies = quality.load_policy, []

    def counting(path):
        policies.append(load(path))
        policies[0].model.model.register_forward_pre_hook(note, with_kwargs=True)
        return policies[0]

    def note(module, arguments, keywords):
        ids = arguments[0] if arguments else keywords["input_ids"]
        rows[torch.is_grad_enabled()] += len(ids)

    monkeypatch.setattr(quality, "load_policy", counting)
    monkeypatch.setattr(quality, "exact", lambda policy: 0.0)
    monkeypatch.setattr(quality, "PROMPTS", 2)
    trainer, recipe = quality.SIDES[side]
    recipe = replace(recipe, steps=2, group=4, beta=0.0)  # the reference is a network of its own
    trainer(recipe, 1e-4, 0, 1)
    counted = (rows[False] + 3 * rows[True]) / (2 * recipe.group)
    spared = side.startswith("library")
    assert counted == pytest.approx(recipe.passes(spared=spared), rel=0.15 if spared else 1e-9)


def test_a_gain_has_the_interval_of_students_t():
    middle, half = default_run.gain([0.01, 0.03, 0.02, 0.00, 0.04])
    assert middle == pytest.approx(0.02)
    assert half == pytest.approx(0.01963, abs=1e-5)
