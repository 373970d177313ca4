"""docs/findings.md: every number is one of a stored result, and every question of the reviewers has an answer."""

import re
from pathlib import Path

import pytest
from findings_numbers import (
    apart,
    board,
    bound,
    compute,
    correlation,
    differs,
    direction,
    divided,
    drowned,
    far,
    gains,
    horizon,
    idle,
    jump,
    kept,
    losing,
    modes,
    noise,
    penalised,
    puzzles,
    rare,
    result,
    reuse,
    spread,
    spreading,
    tightness,
    wider,
)

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "findings.md").read_text()
SECTIONS = {part.split("\n", 1)[0].strip(): part for part in re.split(r"^#{2,3} ", PAGE, flags=re.M)[1:]}
QUESTIONS = {int(title.split(".")[0]): part for title, part in SECTIONS.items() if title[0].isdigit()}
DECIMAL = re.compile(r"[-+]?\d+\.\d+")
GAP = 0.05  # nats, of which it says that puzzles' gaps are below

NUMBERS = {
    1: lambda: [spread(jump(prior, "cell")) for prior in ("30%", "5%", "1%")],
    2: lambda: [board(contest, "diffu-GRPO") for contest in ("Sudoku", "Countdown")],
    4: lambda: [
        spread(idle("5%", "cell")),
        *(apart(jump(prior, "cell"), jump(prior, "all or nothing")) for prior in ("5%", "1%")),
    ],
    5: lambda: [
        spread(penalised("none", "exact")),
        apart(penalised("k2", "exact"), penalised("none", "exact")),
        "β = 0.1 costs",
        *(differs("14", f"end with penalty less without, {level}") for level in ("sequence", "token")),
        *(differs("14", f"on new seeds, {limit} less plain") for limit in ("penalty", "clip")),
    ],
    6: lambda: [
        *(spread(tightness(stage, "cosine_decoder", s)) for stage in range(3) for s in ("ELBO", "log p^U")),
        f"{min(state['cosine_decoder']['ELBO'] for state in puzzles()):.2f}",
    ],
    7: lambda: [apart(reuse("cosine", "token"), reuse("cosine", "sequence")), spread(wider())],
    8: lambda: [*far(), *(differs("15", f"sequence less token, ELBO, {length} tokens") for length in (16, 64, 128))],
    9: lambda: [
        differs("14", "on new seeds, penalty less plain"),
        differs("14", "gain of the penalty, long less short, sequence"),
        differs("14", "on new seeds, the first less the second"),
        differs("14", "on new seeds, clip less penalty"),
    ],
    11: lambda: [
        *(spread(direction(kl)) for kl in ("k1", "k2", "k3")),
        apart(penalised("k1", "gap"), penalised("none", "gap")),
    ],
    12: lambda: [f"{GAP}", spread(gains())],
    13: lambda: [apart(reuse("cosine", "sequence", "causal"), reuse("cosine", "token", "causal"))],
    14: lambda: [
        f"{GAP} nats",
        correlation("gap and relative one-step gain", len(gains())),
        bound("rank correlation of the loss with the gap"),
        *(f"{kept(gaps)} " for gaps in ("0.1 to 0.5", "0.5 to 2", "2 to 20")),
    ],
    15: lambda: [board(contest, method) for method in ("RTB", "SEPO") for contest in ("Sudoku", "Countdown")],
    16: lambda: [
        *(apart(divided(arm, "far"), divided("1/L", "far")) for arm in ("1/|y|", "none", "1/|y|, same")),
        apart(divided("1/|y|", "wrong_extra"), divided("1/L", "wrong_extra")),
    ],
}
OTHERS = {
    "What nobody asked": lambda: [
        *(apart(rare(f"{level}, mean field"), rare(f"{level}, ELBO")) for level in ("token", "sequence")),
        apart(rare("token, ELBO"), rare("sequence, ELBO")),
        *(apart(compute(arm), compute("default")) for arm in ("M = 4", "M = 2", "T = 8")),
        apart(compute("once, μ = 8"), compute("fresh, μ = 8")),
        spread(noise("sequence", "coupled", 1, 0)),
        *(spread(noise(level, "coupled", 1, 16)) for level in ("token", "sequence")),
        *(modes(what) for what in ("correlation", "additive")),
        spreading("largest"),
        spreading("sequence"),
        spread(drowned(128)),
        "0.05 cuts fewer",
        *(
            horizon(what)
            for what in ("the same less that on the shortest", "share cut at 0.05, sequence, longest less shortest")
        ),
        *(losing(level, what) for level in ("token", "sequence") for what in ("updates", "learning rate", "canvas")),
        differs("14", "loss on 64 tokens, token less sequence"),
        *(
            differs("15", f"{what}, 64 tokens")
            for what in (
                "token, mean field less ELBO",
                "token, mean field, less the base",
                "sequence, mean field less ELBO",
                "clip carried in nats less in the unit",
            )
        ),
        bound("kept with M = 2 less with M = 1, gaps below 0.5"),
        bound("kept if tight less as it is, gaps below 0.5"),
    ],
}


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("section", [*range(1, 17), "What nobody asked"])
def test_numbers_are_those_of_the_results(section):
    """All that the results say is there, and no decimal is there that they do not say."""
    text = flat(QUESTIONS[section] if isinstance(section, int) else SECTIONS[section])
    expected = (NUMBERS | OTHERS).get(section, list)()
    for number in expected:
        assert number in text, f"{number} is not in section {section}"
    for number in expected:
        text = text.replace(number, "")
    assert DECIMAL.findall(re.sub(r"\]\([^)]*\)", "]", text)) == []


def test_no_other_section_has_numbers_of_its_own():
    for title, text in SECTIONS.items():
        if not title[0].isdigit() and title not in OTHERS:
            assert not DECIMAL.search(text.replace("--parameters.rollouts=10", "")), title


def test_gaps_are_as_small_as_it_says():
    assert max(state["gap"] for state in puzzles()) < GAP
    assert len(gains()) == 15  # named in question 14
    assert idle("1%", "cell") == idle("1%", "all or nothing") == [1, 1, 1]  # in question 4, "all are idle"


def test_every_question_has_an_answer_and_what_would_change_it():
    assert list(QUESTIONS) == list(range(1, 17))
    for number, text in QUESTIONS.items():
        question, answer = text.split("\n\n")[:2]
        assert question.endswith(("?", ")")), number
        answer = re.split(r"\*Would\s+change\s+our\s+mind\*", answer)[0]
        assert 1 <= len(re.findall(r"[.:?](?=\s|\*\*|$)", re.sub(r"\d\.\d|\.\*\* ", "x", answer))) <= 5, number
        assert re.search(r"\*Would\s+change\s+our\s+mind\*:", text), number
        unanswered = "**Not answered yet**" in text
        assert unanswered or re.search(r"\(\.\./notebooks/\d\d_", text), number
        assert unanswered or ".png)" in text, number
    assert sum("**Not answered yet**" in text for text in QUESTIONS.values()) == 4  # as it says above them


def test_what_a_notebook_costs_is_what_it_took():
    minutes = {}
    for name in re.findall(r"\]\(\.\./notebooks/(\d\d)_\w+\.ipynb\) \| ", PAGE):
        (cost,) = re.findall(rf"\[{name}\].*\| (\d+) min \|", PAGE)
        minutes[name] = round(result(name)["seconds"] / 60)
        assert int(cost) == minutes[name]
    assert len(minutes) >= 9
    total = sum(minutes.values())
    (said, hours) = re.findall(
        r"without `--name` all: (\d+) minutes of one core, ([\d½]+) hours\s+on\s+two", flat(PAGE)
    )[0]
    assert abs(int(said) - total) <= 5
    assert abs(float(hours.replace("½", ".5")) - total / 120) <= 0.3
    core = sum(cost for name, cost in minutes.items() if name <= "13")
    assert f"the core, 01 to 13, is {core} minutes, {round(core / 120)} hours on two" in flat(PAGE)
    assert core <= 360  # 3 hours on two cores
