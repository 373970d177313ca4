"""docs/faster_decoding.md: its tables are stored results, and its sentences follow from them and the cost model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from espo_lightning import BlockDecoding, Decoding, load_policy
from espo_lightning.keys import fold_in
from espo_lightning.lab.flops import Passes, dense, forward
from espo_lightning.lab.network import LLADA_8B, read_network
from espo_lightning.lab.studies.compute import ATTENTION

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import pareto  # noqa: E402
import rollout_setting  # noqa: E402

PAGE = (ROOT / "docs" / "faster_decoding.md").read_text()
TEXT = " ".join(PAGE.split())
RESULT = json.loads(pareto.RESULTS.read_text())
RUNS = json.loads(rollout_setting.RESULTS.read_text())


@pytest.fixture(scope="module")
def rows() -> dict:
    """Subject -> setting -> row."""
    return {
        name: {row.label: row for row in pareto.rows_of(RESULT["reported"][name], name, len(pareto.SEEDS))}
        for name in pareto.SUBJECTS
    }


def test_the_tables_are_those_of_the_results():
    assert pareto.table(RESULT) in PAGE, "python benchmarks/pareto.py --table"
    assert rollout_setting.table(RUNS) in PAGE, "python benchmarks/rollout_setting.py --table"
    assert RUNS["setting"] == pareto.chosen(RESULT)
    for name in pareto.SUBJECTS:
        assert RESULT["reported"][name].keys() == pareto.settings(name).keys()


DECODINGS = {
    "full": ("Sudoku", Decoding()),
    "threshold": ("Sudoku", Decoding(threshold=0.9)),
    "prefix cache": ("Sudoku", Decoding(prefix_cache=True, refresh=3)),
    "dual cache": ("Sudoku", Decoding(16, 4, 16, prefix_cache=True, dual_cache=True, threshold=0.9)),
    "corrector": ("Sudoku", Decoding(steps=4, corrector=2)),
    "blocks": ("chain", BlockDecoding(128, 8, 64, threshold=0.9)),
}


@pytest.mark.parametrize("name", DECODINGS)
def test_what_is_counted_is_what_runs(name):
    """FLOPs as torch counts them, tokens as the embedding sees them."""
    subject, decoding = DECODINGS[name]
    path, task = pareto.SUBJECTS[subject].policy, pareto.SUBJECTS[subject].task
    policy, tokens = load_policy(path), []
    counter = pareto.Counter(policy, read_network(path))
    prompts = policy.encode([task.problem("test", 0, i).prompt for i in range(3)])
    policy.network.embed_tokens.register_forward_pre_hook(lambda _, ids: tokens.append(ids[0].numel()))
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:
        decoding.generate(counter, prompts, fold_in(0, torch.arange(3)))
    assert counter.flops == pytest.approx(flops.get_total_flops(), rel=1e-12)
    assert (counter.tokens, counter.calls) == (sum(tokens), len(tokens))


def test_the_cheapest_setting_without_a_shown_loss_is_chosen():
    def one(flops: float, right: int) -> dict:
        return {"passes": 1, "tokens": 1, "flops": flops, "points": " ".join(["2"] * right + ["0"] * (256 - right))}

    settings = {"full": one(8, 200), "worse": one(1, 100), "as good": one(3, 200), "better": one(4, 240)}
    assert pareto.chosen({"pilot": {"Sudoku": settings}}) == "as good"
    rows = pareto.rows_of(settings, "Sudoku", 2)
    assert [row.label for row in pareto.on_front(rows)] == ["worse", "as good", "better"]
    assert rows[1].high < 0 < rows[3].low


def test_sentences_about_what_is_exact():
    def share(network) -> float:
        whole = sum(forward(network, Passes(1, 1, 1, 0, 0)))  # of a token, attention and head apart
        return dense(network.attention[:3]) / whole

    small = read_network("bundled:sudoku")
    assert f"{share(LLADA_8B):.1%}".replace("%", " %") + " of LLaDA-8B's linear layers" in TEXT
    assert f"{share(small) * 100:.1f} % of those of bundled:sudoku" in TEXT
    assert f"{7 / (8 * 16) * 100:.1f} % of a default rollout's passes" in TEXT
    assert f"{5 / (6 * 128) * 100:.1f} % of the paper's" in TEXT
    assert f"{(1 - 1 / 16) ** 16 * 100:.0f} % of a row's steps" in TEXT


def change(row) -> str:
    return f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"


def test_sentences_about_sudoku(rows):
    sudoku = rows["Sudoku"]
    for label, words in {
        "8 steps": "Half of the steps cost Sudoku {}",
        "threshold 0.99": "A threshold of 0.99 costs Sudoku {}",
        "threshold 0.95": "at 0.95 it is {}",
        "threshold 0.9": "at 0.9 {}",
        "prefix cache, r 2": "A prefix cache that is refreshed in every other step costs it {}",
        "prefix cache": "one without refresh {}",
        "blocks of 4, dual cache, r 2": "the dual cache costs {}",
        "blocks of 4, prefix cache, r 2": "the prefix cache {}",
        "blocks of 4": "Blocks of 4 alone cost {}",
        "half the steps, corrector 4": "Half of the steps and four passes of the corrector cost {}",
    }.items():
        assert words.format(change(sudoku[label])) in TEXT, label
    assert f"with {sudoku['threshold 0.99'].passes:.2f} of the passes" in TEXT
    assert sudoku["blocks of 4, dual cache, r 2"].flops < sudoku["blocks of 4, prefix cache, r 2"].flops
    assert not any("cache" in row.label for row in pareto.on_front(list(sudoku.values())))
    assert sudoku["half the steps, corrector 4"].high < 0


def test_sentences_about_the_others(rows):
    countdown, chain = rows["Countdown"], rows["chain"]
    assert countdown["early stop"].passes == 1  # in one block nothing is saved
    assert (
        f"Countdown with {countdown['threshold 0.99'].passes:.2f} of them {change(countdown['threshold 0.99'])}" in TEXT
    )
    assert f"Countdown loses at 0.7, {change(countdown['threshold 0.7'])}" in TEXT
    assert countdown["threshold 0.8"].high < 0 < countdown["threshold 0.9"].high
    assert f"the chain with {chain['threshold 0.99'].passes:.2f} {change(chain['threshold 0.99'])}" in TEXT
    assert chain["threshold 0.99"].low <= 0 <= chain["threshold 0.99"].high
    assert f"its half of the steps {change(chain['64 steps'])}" in TEXT
    assert all(
        row.low <= 0 <= row.high for label, row in countdown.items() if "cache" in label and "blocks" not in label
    )
    assert all(rows[name]["early stop"].difference == 0 for name in rows)


def test_sentences_about_training():
    pairs = [(RUNS[f"cheaper, seed {seed}"], RUNS[f"full, seed {seed}"]) for seed in rollout_setting.SEEDS]
    mean, low, high = rollout_setting.interval([cheaper["exact"] - full["exact"] for cheaper, full in pairs])
    assert low < -0.05 < mean < 0.05 < high  # neither a loss nor a gain of 0.05 is excluded
    for key, words in {
        "seconds_of_rollouts": "a rollout takes {:.2f} of its time",
        "seconds": "and training {:.2f}, on one",
    }.items():
        ratio, _, most = rollout_setting.interval([cheaper[key] / full[key] for cheaper, full in pairs])
        assert most < 1
        assert words.format(ratio) in TEXT
    full = [run["exact"] for _, run in pairs]
    assert max(full) - min(full) > 0.05  # "from seed to seed"
    assert f"threshold={RUNS['setting'].removeprefix('threshold ')}`" in TEXT
