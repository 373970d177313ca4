"""Methods at equal compute: how they are tuned, compared and entered, and what the terms of the leaderboard are."""

import json
import math
import re
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import pytest
import torch
from study_cases import Inline

from espo_lightning import Decoding, left_to_right, load_policy, low_confidence, notebooks, random_order
from espo_lightning import contest as program
from espo_lightning.contest import enter, plan, presets
from espo_lightning.keys import fold_in
from espo_lightning.lab.evidence import interval
from espo_lightning.lab.leaderboard import at_edge, best, beyond, boards, difference, ends, order, page, title
from espo_lightning.lab.methods import make_method, method_settings, read_method
from espo_lightning.lab.studies import leaderboard as study
from espo_lightning.lab.studies.compute import Measured
from espo_lightning.lab.studies.leaderboard import CONTESTS, entered, on_equal_terms, path_kl, step_flops
from espo_lightning.lab.studies.states import train
from espo_lightning.leaderboard import main

ROOT = Path(__file__).parents[1]
METHODS = presets(ROOT / "experiments" / "methods")
RESULT = json.loads((ROOT / "notebooks" / "results" / "09_leaderboard" / "result.json").read_text())

# ---- tuning and comparing --------------------------------------------------------------------------------


def test_the_best_learning_rate_and_what_lies_beyond():
    pilots = [{"lr": 1e-4, "score": 0.2}, {"lr": 3e-4, "score": 0.5}, {"lr": 9e-4, "score": 0.5}]
    assert best(pilots) == 3e-4  # of equal ones the smallest
    assert not at_edge(pilots)
    assert at_edge(pilots[:2])
    assert beyond(pilots[:2], 3) == 9e-4
    assert beyond(pilots[1:], 3) == 1e-4
    assert beyond([{"lr": 1e-4, "score": 1}, {"lr": 3e-4, "score": 0}], 3) == 3.3e-5


def test_differences_are_paired_by_seed():
    entries = {name: {"runs": [{"exact": x} for x in values]} for name, values in RUNS.items()}
    better = difference(entries["better"], entries["ESPO"])
    assert better["shown"] == "above"  # by seed, although the seeds themselves differ far more
    assert better["mean"] == pytest.approx(0.1)
    assert better["interval"] == pytest.approx(interval([0.1, 0.11, 0.09]))
    assert difference(entries["ESPO"], entries["better"])["shown"] == "below"
    assert difference(entries["noisy"], entries["ESPO"])["shown"] == "not shown"
    assert difference({**entries["better"], "edge": True}, entries["ESPO"])["shown"] == "not shown"
    assert difference(entries["better"], {**entries["ESPO"], "edge": True})["shown"] == "not shown"
    assert order(entries) == ["noisy", "better", "ESPO"]


RUNS = {"ESPO": [0.1, 0.5, 0.9], "better": [0.2, 0.61, 0.99], "noisy": [0.9, 0.8, 0.1]}


def test_every_method_has_the_same_tuning_budget(monkeypatch):
    """The same grid and seeds; a pilot more only beyond an edge, and only so often; then the best rate's final runs."""
    jobs = []

    def over_arms(run, arms, seeds, **settings):
        jobs.extend((run.__name__, arm["method"]["peak"], arm["lr"], seed) for arm in arms.values() for seed in seeds)
        rows = {name: {"score": -abs(arm["lr"] - arm["method"]["peak"]), "exact": 0, "seconds": 1}
                for name, arm in arms.items()}  # fmt: skip
        return {name: [row for _ in seeds] for name, row in rows.items()}

    monkeypatch.setattr(program, "over_arms", over_arms)
    monkeypatch.setattr(program, "plan", lambda methods, *_: {key: {"rollouts": 7, "flops": 1} for key in methods})
    peaks = {"inside": 3e-4, "above": 2.7e-3, "far": 1.0}
    terms = {"rollouts": 1, "learning_rates": [1e-4, 3e-4, 9e-4], "extra": 2, "pilots": 2, "seeds": 3}
    found = enter(
        {name: {"peak": peak} for name, peak in peaks.items()}, "Sudoku", **terms, prompts=1, points=1, problems=1
    )
    rates = {name: [pilot["lr"] for pilot in entry["pilots"]] for name, entry in found.items()}
    assert rates["inside"] == [1e-4, 3e-4, 9e-4]
    assert rates["above"] == rates["far"] == [1e-4, 3e-4, 9e-4, 2.7e-3, 8.1e-3]
    assert {name: (entry["lr"], entry["edge"]) for name, entry in found.items()} == {
        "inside": (3e-4, False),
        "above": (2.7e-3, False),
        "far": (8.1e-3, True),
    }
    pilots = {job[1:] for job in jobs if job[0] == "pilot_run"}
    assert {seed for *_, seed in pilots} == {6000, 6001}
    assert len(pilots) == 2 * (3 + 5 + 5) == sum(job[0] == "pilot_run" for job in jobs)
    finals = [job[1:] for job in jobs if job[0] == "final_run"]
    assert finals == [(peak, found[n]["lr"], 7000 + i) for n, peak in peaks.items() for i in range(3)]


# ---- the terms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contest", CONTESTS)
def test_all_decode_alike_unless_they_score_the_trace(contest):
    length = CONTESTS[contest].length
    own = {"AGRPO": random_order, "RTB": random_order, "JustGRPO": left_to_right}
    for name, settings in METHODS.items():
        method = on_equal_terms(settings, contest)
        assert method.decoding == Decoding(length, length, length, order=own.get(name, low_confidence))
        assert getattr(method.likelihood, "temperature", 1.0) == 1.0
        preset = make_method(settings)
        assert (method.objective, method.advantage, method.updates) == (
            preset.objective,
            preset.advantage,
            preset.updates,
        )
        if name in own:
            entered(settings, contest, 0, 1e-3)  # is not refused


def test_the_default_is_espo():
    assert make_method(program.ESPO) == make_method(METHODS["ESPO"]) == read_method(PRESET)


PRESET = ROOT / "experiments" / "methods" / "espo.yaml"


def test_rollouts_have_equal_flops():
    few = {name: METHODS[name] for name in ("ESPO", "GDSD", "RTB", "wd1")}
    planned, budget = plan(few, "Countdown", 22, 2), 22 * sum(step_flops({}, "Countdown", 2).values())
    assert planned["ESPO"] == {"rollouts": 22, "flops": 1.0}
    for name, settings in few.items():
        n, one = planned[name]["rollouts"], sum(step_flops(settings, "Countdown", 2).values())
        assert n * one / budget == pytest.approx(planned[name]["flops"])
        assert abs(n * one - budget) <= one / 2
    assert planned["GDSD"]["rollouts"] < planned["RTB"]["rollouts"] < planned["wd1"]["rollouts"] < 22


@pytest.mark.slow
@pytest.mark.parametrize(("name", "contest"), list(zip(METHODS, cycle(CONTESTS))))
def test_flops_are_those_that_torch_counts(name, contest):
    prompts, rollouts = 3, 2
    module = entered(METHODS[name], contest, 0, 1e-4, Measured, skip_equal_groups=False)
    train(module, CONTESTS[contest].task, 0, rollouts, batch=prompts)
    predicted = step_flops(METHODS[name], contest, prompts)
    assert sum(module.flops.values()) / rollouts == pytest.approx(sum(predicted.values()), rel=0.06)
    # the model takes the width of the first prompt, and Countdown's prompts differ by a few tokens
    assert module.flops["rollout"] / rollouts == pytest.approx(predicted["rollout"], rel=0.04)


# ---- measures --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_kl_to_the_base_is_that_of_its_paths():
    """Zero for the base; for another policy near the mean, over the same paths, of each step's exact KL."""
    base, other = (load_policy(CONTESTS["Countdown"].policy) for _ in range(2))
    assert path_kl(base, "Countdown", 4) == pytest.approx(0, abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator) * (weight.dim() > 1)
        problems = [CONTESTS["Countdown"].task.problem("test", 0, i).prompt for i in range(256)]
        prompts, length = other.encode(problems), CONTESTS["Countdown"].length
        keys = fold_in(study.UNSEEN, torch.arange(256))
        completion, trace = Decoding(length, length, length, order=random_order).decode(other, prompts, keys)
        attention, exact = prompts.seen_by(other, length), 0.0
        for step in range(length):
            ids = torch.cat([prompts.ids, completion.masked_fill(trace.steps >= step, other.mask_id)], 1)
            select = torch.nn.functional.pad(trace.steps == step, (prompts.ids.shape[1], 0))
            laws = [policy(ids, attention, select, partial(log_law, policy.mask_id)) for policy in (other, base)]
            exact += float((laws[0].exp() * (laws[0] - laws[1]).nan_to_num()).sum(1).mean())
    assert exact > 0.01
    assert path_kl(other, "Countdown", 256) == pytest.approx(exact, rel=0.15)


def log_law(mask_id: int, logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities without the mask token."""
    return logits.index_fill(-1, torch.tensor(mask_id), -math.inf).log_softmax(-1)


def test_a_run_and_its_pilot(monkeypatch):
    monkeypatch.setattr(study, "SAMPLES", 4)
    monkeypatch.setattr(study, "PATHS", 4)
    terms = {"method": METHODS["RTB"], "contest": "Countdown", "lr": 1e-3, "rollouts": 2, "prompts": 1}
    run = study.final_run(0, **terms, points=2, problems=4)
    assert [point["rollout"] for point in run["curve"]] == [1, 2]
    assert set(run) == {"curve", "exact", "own", "kl", "reward", "idle", "diverged", "wall", "cpu"}
    assert run["kl"] > 0
    assert len(run["reward"]) == len(run["idle"]) == 2
    pilot = study.pilot_run(0, **terms)
    assert set(pilot) == {"score", "diverged", "wall", "cpu"}
    assert 0 <= pilot["score"] <= 1
    assert "own" not in study.final_run(0, **terms | {"method": METHODS["wd1"], "rollouts": 1}, points=1, problems=2)
    base = study.base_run(0, contest="Countdown", problems=4)
    assert set(base) == {"exact", "few", "random_order", "left_to_right", "reward"}


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_prints_nothing(capfd):
    terms = {"method": {}, "contest": "Countdown", "lr": 1e-3, "rollouts": 1, "prompts": 1}
    assert 0 <= notebooks.over_seeds(study.pilot_run, [0], cache=None, **terms)[0]["score"] <= 1
    assert capfd.readouterr() == ("", "")


def test_a_run_that_diverges_is_told(monkeypatch):
    def diverge(module, task, seed, rollouts, at, batch):
        snapshots = study.Snapshots([0])
        snapshots.policies[0] = module.policy
        return snapshots, True

    monkeypatch.setattr(study, "train_or_diverge", diverge)
    monkeypatch.setattr(study, "PATHS", 4)
    terms = {"method": {}, "contest": "Countdown", "lr": 1e-3, "rollouts": 2, "prompts": 1}
    assert study.pilot_run(0, **terms)["score"] == 0
    run = study.final_run(0, **terms, points=2, problems=2)
    assert run["diverged"]
    assert run["kl"] == pytest.approx(0, abs=1e-9)


# ---- the page, and the command that adds a row -----------------------------------------------------------


def test_the_page_is_that_of_the_stored_result():
    folder = ROOT / "notebooks" / "results" / "09_leaderboard"
    others = [json.loads(path.read_text()) for path in sorted((folder / "entries").glob("*.json"))]
    assert (ROOT / "docs" / "leaderboard.md").read_text() == page(RESULT, others)


def test_the_board_has_every_preset():
    for board in boards(RESULT).values():
        assert set(board) == {*METHODS, "ESPO, M = 2"}
        for entry in board.values():
            assert entry["runs"][0]["seed"] == program.FINALS
            assert len(entry["runs"]) == RESULT["parameters"]["seeds"] >= 5
            assert entry["lr"] == best(entry["pilots"])
            assert entry["edge"] == at_edge(entry["pilots"])
            assert 0.9 < entry["flops"] < 1.1


def test_the_numbers_of_the_prose_are_those_of_the_result():
    """Every decimal number of the notebook's conclusions is a rounded number of the stored result."""
    cells = json.loads((ROOT / "notebooks" / "09_leaderboard.ipynb").read_text())["cells"]
    prose = next(text for cell in cells if (text := "".join(cell["source"])).startswith("## What it means"))
    correlations = RESULT["summary"]["rank_correlation"]
    known = {*RESULT["summary"]["chance"].values(), *correlations["rollouts"].values(), *correlations["tasks"]}
    for contest, board in boards(RESULT).items():
        known.add(RESULT["summary"]["base"][contest]["exact"])
        for entry in board.values():
            known |= summary_of([ends(entry, key) for key in ("exact", "own", "kl") if key in entry["runs"][0]])
            against = difference(entry, board["ESPO"])
            known |= {against["mean"], *against["interval"]}
            scores = {pilot["lr"]: pilot["score"] for pilot in entry["pilots"]}
            known.add(scores[3e-4] - scores[1e-4])
        later = RESULT["summary"]["look_back"][contest]["exact"]
        against = difference({"runs": [{"exact": x} for x in later]}, board["ESPO"])
        known |= summary_of([later]) | {against["mean"], *against["interval"]}
    numbers = re.findall(r"-?\d+\.\d+", prose)
    assert len(numbers) > 20
    for number in numbers:
        digits = len(number.partition(".")[2])
        assert number in {f"{value:.{digits}f}" for value in known}, number


def summary_of(lists: list[list[float]]) -> set[float]:
    """Median and range of each list."""
    return {f(values) for values in lists for f in (median, min, max)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A stored result with one method, at a scale of seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebooks, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(study, "SAMPLES", 4)
    monkeypatch.setattr(study, "PATHS", 4)
    run = {"exact": 0.5, "kl": 1.0, "cpu": 1.0, "wall": 1.0, "diverged": False, "curve": [], "seconds": 1.0}
    entry = {"rollouts": 1, "flops": 1.0, "pilots": [{"lr": 1e-4, "score": 1.0}], "lr": 1e-4, "edge": True}
    base = {"exact": 0.1, "few": 0.1, "random_order": 0.1, "left_to_right": 0.2, "reward": 0.3}
    parameters = {"seeds": 2, "rollouts": {"Countdown": 1}, "learning_rates": [1e-4, 3e-4], "extra": 0, "pilots": 1}
    parameters |= {"prompts": 1, "points": 1, "problems": 4, "methods": []}
    summary = {"entries": {"Countdown": {"ESPO": entry}}, "base": {"Countdown": base}, "chance": {"Countdown": 0.04}}
    rows = [{"seed": i, "seconds": 1.0, "runs": {"Countdown": {"ESPO": run}}} for i in range(2)]
    stored = {"parameters": parameters, "summary": summary | {"group_size": 8}, "per_seed": rows}
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "result.json").write_text(json.dumps(stored))
    (tmp_path / "mine.yaml").write_text("# Mine: wd1 with one update.\nmodel:\n  updates: 1\n  objective: Weighted\n")
    return tmp_path


FLAGS = ["--results=board", "--output=board.md", "--processes=1", "--cache=cache"]


def test_a_method_of_ones_own_gets_a_row_and_no_other_runs_again(folder, capsys):
    main(FLAGS)
    before = (folder / "board.md").read_text()
    assert before.count("\n| 1 | ESPO |") == 1
    main(["--method=mine.yaml", *FLAGS])
    text = (folder / "board.md").read_text()
    assert re.search(r"\n\| \d \| Mine \| .*(above|below|not shown)", text)
    assert next(line for line in before.splitlines() if "| ESPO |" in line)[5:] in text  # as it was
    kept = json.loads((folder / "board" / "entries" / "mine.json").read_text())
    assert kept["name"] == "Mine"
    assert kept["file"] == (folder / "mine.yaml").read_text()
    assert [run["seed"] for run in kept["entries"]["Countdown"]["runs"]] == [7000, 7001]
    assert len(list((folder / "cache").rglob("seed_*.json"))) == 2 + 2  # its pilots and final runs, nothing else
    assert "| Mine |" in capsys.readouterr().out
    main(FLAGS)  # and the row stays
    assert (folder / "board.md").read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# ESPO: again\nmodel: {updates: 1}\n", "ESPO is the name of a preset on the board"),
        ("# Old: causal\nmodel: {decoding: AutoregressiveDecoding}\n", "decoding must be Decoding, got Autoreg"),
        ("# Odd: x\nmodel: {updatez: 1, updates: [1]}\n", "updates"),
    ],
)
def test_a_method_that_does_not_belong_there_is_refused(folder, capsys, text, message):
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as error:
        main(["--method=mine.yaml", *FLAGS])
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "board.md").exists()
    assert not (folder / "board" / "entries").exists()


def test_rows_of_other_parameters_are_refused(folder):
    stored = json.loads((folder / "board" / "result.json").read_text())
    other = {"name": "Mine", "parameters": stored["parameters"] | {"problems": 5}, "entries": {}}
    with pytest.raises(ValueError, match="Mine was entered with other parameters"):
        page(stored, [other])


def test_a_method_is_called_what_its_file_says(folder):
    assert title(folder / "mine.yaml") == "Mine"
    (folder / "nameless.yaml").write_text("model: {updates: 1}\n")
    assert title(folder / "nameless.yaml") == "nameless"
    assert method_settings(folder / "mine.yaml") == {"updates": 1, "objective": "Weighted"}


def test_kept_runs_may_be_of_any_source(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "ProcessPoolExecutor", Inline)
    for source, calls in (("one", 1), ("two", 1)):
        monkeypatch.setattr(notebooks, "made_of", lambda _, text=source: notebooks.hashlib.sha256(text.encode()))
        notebooks.over_arms(noted, {"": {}}, [0], cache=tmp_path, any_source=True, log=str(tmp_path / "log"))
        assert len((tmp_path / "log").read_text()) == calls


def noted(seed: int, *, log: str) -> dict:
    with open(log, "a") as file:
        file.write(".")
    return {"value": seed}
