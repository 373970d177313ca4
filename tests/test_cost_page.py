"""The command line of costs, and the page whose tables are what it prints."""

import json
import re
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
from espo_lightning.lab.costs import Hardware

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
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


VARIABLES = dict(re.findall(r'^([A-Z]+)="(.*)"$', PAGE.read_text(), flags=re.MULTILINE))
COMMANDS = re.findall(r"```\n\$ python -m espo_lightning.cost ?(.*?)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
ROWS = re.findall(r"^\| `(\$.*?)` \|.*$", PAGE.read_text(), flags=re.MULTILINE)


def table_of(flags: str) -> dict:
    """What the command line computes, with the page's variables."""
    for name, value in VARIABLES.items():
        flags = flags.replace(f"${name}", value)
    return calculator.run(cost, "espo_lightning.cost", flags.split())


def overview(flags: str) -> str:
    """A row of the page's overview: the totals of one setting at 8, 64 and 512 GPUs."""
    table = table_of(flags)["table"]
    seconds = table["seconds"]
    computing, collectives = (
        [sum(column) for column in zip(*(values for row, values in seconds.items() if row.startswith(kind)))]
        for kind in ("computing", "collectives")
    )
    memory = " / ".join(
        f"{max(pair):.0f}"
        for pair in zip(*(table["GB of memory per GPU"][t] for t in ("total", "total in the rollout")))
    )
    share = table["PFLOP per GPU"]["rollout"][0] / table["PFLOP per GPU"]["total"][0]
    cells = [
        f"{table['PFLOP per GPU']['total'][0]:.1f}",
        f"{share:.0%}",
        f"{computing[0]:.0f}",
        " / ".join(f"{x:.1f}" for x in collectives),
        memory,
    ]
    return f"| `{flags}` | {' | '.join(cells)} |"


@pytest.mark.parametrize("flags", ROWS)
def test_the_overview_of_the_page_is_what_the_commands_compute(flags):
    assert overview(flags) in PAGE.read_text().splitlines()


def test_the_comparison_with_the_papers_formula():
    """FLOPs per completion in units of N D, at the paper's T = 256 and mu = 8."""
    for draws, published in ((1, 608), (2, 704), (4, 896)):
        ours = []
        for tuning in ("$FULL", "--lora_rank=null --dtype=float32", ""):
            result = table_of(f"$CODE {tuning} --likelihood.draws={draws}")
            table, unit = result["table"]["PFLOP per GPU"], result["parameters"] * 656 * 20 / 1e15
            ours.append(table["total"][0] / unit)
            assert table["paper, 2ND(T + 6 mu M)"][0] / unit == pytest.approx(published)
        cells = [str(draws), str(published), f"{2 * (256 + 80 * draws)}", *(f"{x:.0f}" for x in ours)]
        assert f"| {' | '.join(cells)} |" in PAGE.read_text().splitlines()


@pytest.mark.parametrize(("flags", "table"), COMMANDS, ids=[flags for flags, _ in COMMANDS])
def test_the_tables_of_the_page_are_what_its_commands_print(flags, table, capsys):
    calculator.main(flags.split())
    assert capsys.readouterr().out == table


def test_the_page_has_tables():
    assert len(COMMANDS) >= 2
    assert len(ROWS) >= 12
