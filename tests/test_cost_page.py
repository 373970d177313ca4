"""The command line of costs, and the page whose tables and sentences are what it computes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from espo_lightning import (
    ELBO,
    Decoding,
    PolicyGradient,
    TimeELBO,
    Weighted,
)
from espo_lightning import cost as calculator
from espo_lightning.cost import cost
from espo_lightning.decoding.block import BlockDecoding
from espo_lightning.lab.costs import Hardware
from espo_lightning.lab.flops_blocks import block_decoding_passes
from espo_lightning.lab.network import LLADA_8B, SDAR_8B

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

ROOT = Path(__file__).parents[1]
FORMULAS = ROOT / "docs" / "cost_model.md"
sys.path.insert(0, str(ROOT / "website"))
import scaling  # noqa: E402

PAGE = scaling.PAGE.read_text()
TEXT = " ".join(PAGE.split())
DECODING = Decoding(length=16, block_length=8, steps=8)


# ---- the command line and the page ----------------------------------------------------------------------------------


BASE = {"decoding": DECODING, "likelihood": ELBO(), "updates": 3, "gpus": (2, 16), "shards": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "Dream-org/Dream-v0-Instruct-7B"},
        {"decoding": replace(DECODING, steps=4)},
        {"decoding": replace(DECODING, block_length=4)},
        {"likelihood": TimeELBO()},
        {"prompt_length": 399},
        {"prompts_per_gpu": 3},
        {"group_size": 7},
        {"updates": 2},
        {"fresh_masks": False},
        {"objective": PolicyGradient(beta=0.0)},
        {"objective": Weighted()},
        {"micro_batch": 2},
        {"view_by_view": True},
        {"lora_rank": 64},
        {"dtype": "float32"},
        {"gradient_checkpointing": True},
        {"gpus": (2, 8)},
        {"shards": None},
        {"zero": 1},
        {"zero": 2},
        {"gather_rollouts": False},
        *(
            {"hardware": Hardware(**{key: 1})}
            for key in ("tflops", "utilisation", "node", "nvlink", "network", "memory")
        ),
    ],
    ids=lambda change: "-".join(f"{k}" for k in change),
)
def test_every_option_has_an_effect(change):
    assert cost(**BASE)["table"] != cost(**BASE | change)["table"]


def test_json_holds_the_table(tmp_path, capsys):
    calculator.main([f"--output={tmp_path / 'cost.json'}", "--gpus=[8]"])
    written = json.loads((tmp_path / "cost.json").read_text())
    assert written["table"]["completions per rollout"][""] == [96]
    assert written["network"]["hidden_size"] == 4096
    assert "completions per rollout                 96" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # an earlier result is never overwritten
        calculator.main([f"--output={tmp_path / 'cost.json'}"])


@pytest.mark.parametrize(
    "flags", [["--updates=0"], ["--lora_rank=0"], ["--gpus=[]"], ["--gpus=[8,12]", "--shards=8"], ["--shards=0"]]
)
def test_impossible_settings_are_errors_that_name_them(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        calculator.main(flags)
    assert stop.value.code == 2
    assert flags[-1][2:].partition("=")[0] in capsys.readouterr().err


def test_the_comparison_with_the_papers_formula():
    """FLOPs per completion in units of N D, at the paper's T = 256 and mu = 8."""
    for draws, published in ((1, 608), (2, 704), (4, 896)):
        ours = []
        for tuning in ("$FULL", "--lora_rank=null --dtype=float32", ""):
            result = scaling.table_of(scaling.plain(f"$CODE {tuning} --likelihood.draws={draws}", PAGE))
            table, unit = result["table"]["PFLOP per GPU"], result["parameters"] * 656 * 20 / 1e15
            ours.append(table["total"][0] / unit)
            assert table["paper, 2ND(T + 6 mu M)"][0] / unit == pytest.approx(published)
        cells = [str(draws), str(published), f"{2 * (256 + 80 * draws)}", *(f"{x:.0f}" for x in ours)]
        assert f"| {' | '.join(cells)} |" in FORMULAS.read_text().splitlines()


@pytest.mark.slow
def test_the_tables_of_the_page_are_what_its_commands_compute():
    assert scaling.written(PAGE) == PAGE, "python website/scaling.py"
    assert len(scaling.ROW.findall(PAGE)) >= 30
    assert len(scaling.OUTPUT.findall(PAGE)) == 1


# ---- the sentences of the page --------------------------------------------------------------------------------------


def of(shown: str) -> dict:
    return scaling.table_of(scaling.plain(shown, PAGE))["table"]


def spent(shown: str) -> dict[str, float]:
    return scaling.seconds(scaling.plain(shown, PAGE))


def exchanged(shown: str, column: int = 0) -> float:
    return sum(values[column] for name, values in of(shown)["seconds"].items() if name.startswith("collectives"))


def gigabytes(shown: str, column: int = 0) -> float:
    held = of(shown)["GB of memory per GPU"]
    return max(held["total"][column], held["total in the rollout"][column])


def pflop(shown: str, phase: str = "total") -> float:
    return of(shown)["PFLOP per GPU"][phase][0]


def computed(shown: str) -> float:
    parts = spent(shown)
    return parts["rollout"] + parts["scores"] + parts["updates"]


CODE, BLOCKS = "$CODE $FULL --shards=null --micro_batch=5", "$BLOCKS"


def test_sentences_about_full_attention():
    recipes = [
        row for row in scaling.ROW.findall(PAGE.partition("## What dominates")[0]) if row[:5] in ("$SUDO", "$CODE")
    ]
    shares = [pflop(row, "rollout") / pflop(row) for row in recipes]
    assert f"{min(shares):.0%}".strip("%") + f" to {max(shares) * 100:.0f} % of all FLOPs" in TEXT
    times = min(computed(row) / exchanged(row) for row in recipes)
    assert f"at least {times:.0f} times as long as the collectives" in TEXT
    sudoku = spent("$SUDOKU")
    assert f"takes {sudoku['reading'] / sudoku['rollout']:.1%}".replace("%", " %") + " of the time of computing" in TEXT
    received = of("$SUDOKU")["GB received per GPU"]["updates"][0]
    assert f"DDP moves {received:.0f} GB per rollout in {exchanged('$SUDOKU'):.2f} s" in TEXT
    alone = computed("$SUDOKU") / sudoku["rollout"]
    assert f"at best {alone:.1f} times as fast" in TEXT
    assert 1.2 < exchanged(CODE, 1) / exchanged(CODE) < 1.3  # a quarter more
    assert f"code recipe fits with {gigabytes(CODE, 1):.0f} GB, and that of `$BLOCKS` with " in TEXT
    assert f"`$BLOCKS` with {gigabytes(f'{BLOCKS} $FULL --shards=null --micro_batch=6', 1):.0f} GB" in TEXT
    for stage in (1, 2):
        assert gigabytes(f"$SUDOKU $FULL --shards=null --micro_batch=6 --zero={stage}") > 80  # no room
    calls = -(-20 // 5)  # of a micro-batch: 7 old sets, 8 of the reference, 8 forward, backward and reduced
    collectives, hops = 1 + calls * (7 + 8 + 3 * 8), 511
    assert (
        f"the {collectives} collectives per layer of the code run take {collectives * hops * 32 * 1e-5:.0f} s" in TEXT
    )
    assert f"against {computed(CODE):.0f} s of computing" in TEXT
    layer = 2 * LLADA_8B.layer_parameters
    assert f"a layer is {layer / 1e9:.2f} GB, {layer / 512e6:.2f} MB per rank" in TEXT
    hybrid = exchanged(CODE.replace("null", "8"), 2)
    assert f"{hybrid:.1f} s against {exchanged(CODE, 2):.1f} s by bandwidth alone" in TEXT
    n, adapters = LLADA_8B.parameters / 1e9, LLADA_8B.adapters(128) / 1e9
    assert f"{2 * n:.0f} GB with adapters and, in float32 with a frozen reference, {8 * n:.0f} GB" in TEXT
    assert (
        f"{12 * adapters:.0f} GB with adapters (the base, {2 * n:.0f} GB, is not in it), {12 * n:.0f} GB of full"
        in TEXT
    )


def test_sentences_about_blocks():
    parts, lean, large = spent(BLOCKS), spent("$LEAN"), spent("$LEAN --prompts_per_gpu=16")
    rest = parts["scores"] + parts["updates"]
    assert f"computes for {parts['rollout']:.1f} s and reads for {parts['reading']:.1f} s, beside {rest:.1f} s" in TEXT
    share = max(parts["rollout"], parts["reading"])
    assert f"scores and updates: {share / (share + rest) * 100:.0f} % of the whole" in TEXT
    assert f"At most the {share / (share + rest) * 100:.0f} % of above" in TEXT
    bound = max(lean["rollout"], lean["reading"])
    assert f"it is {bound / (bound + lean['updates']) * 100:.0f} %, nearly all of it reading" in TEXT
    decoding = BlockDecoding(1024, 4, 1024)
    passes = block_decoding_passes(decoding, 12, 1424)
    assert passes.calls == 1280
    assert f"{SDAR_8B.parameters * 2 / 1e9:.0f} GB of weights 1,280 times for 12 comp" in TEXT
    assert SDAR_8B.parameters * 2 * 1280 / 3350e9 > 0.8 * lean["reading"]
    assert f"take {max(large['rollout'], large['reading']) / bound:.1f} times as long to decode" in TEXT
    sending = "sending weights to an engine"
    whole = of(f"{BLOCKS} $FULL")["seconds"][sending][0]
    adapters = of(BLOCKS)["seconds"][sending][0]
    assert f"all of SDAR-8B takes {whole:.2f} s at 50 GB/s, adapters of rank 128 take {adapters:.2f} s" in TEXT


def test_sentences_about_what_to_change():
    def saved(change: str, of: str = "$SUDOKU") -> float:
        return 1 - pflop(f"{of} {change}") / pflop(of)

    once = "--fresh_masks=false"
    assert f"{saved(once) * 100:.0f} % less in all, and {saved(once, BLOCKS) * 100:.0f} % with blocks" in TEXT
    assert saved("--decoding.steps=64") == pytest.approx(0.25, abs=0.01)  # a quarter less
    apart = f"{CODE} --gather_rollouts=false"
    more = gigabytes(CODE) - gigabytes(apart)
    assert f"from {exchanged(apart):.1f} s to {exchanged(CODE):.1f} s on 8 GPUs, for {more:.0f} GB more" in TEXT
    for change in ("--view_by_view=true", "--gradient_checkpointing=true"):
        assert f"{-saved(f'--micro_batch=3 {change}') * 100:.0f}" in ("12", "13")
    assert "buys the memory back for 12 % more FLOPs" in TEXT
