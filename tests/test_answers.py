"""Final answers: where they stand in a text, and which are equal."""

import pytest
from answer_cases import BOXES

from espo_lightning.tasks.maths import verify_math

# class: (completion, gold answer, 1 or 0)
TEXTS = {
    "below or behind the marker": [
        ("**Answer:**\n\n540 meters", "540", 1),
        ("*Answer:*\n540", "540", 1),
        ("**Answer**: 540", "540", 1),
        ("Answer:\n540", "540", 1),
        ("__Answer:__ 540", "540", 1),
        ("## Answer\n\n540", "540", 1),
        ("**Final Answer**\n\n$540$", "540", 1),
        ("**Answer:** **540**", "540", 1),
        ("The answer is:\n\n\\[\n540\n\\]", "540", 1),
        ("The answer is\n$$540$$", "540", 1),
        ("Answer = 540", "540", 1),
        ("answer: `540`", "540", 1),
        ("The answers are 3 and 5.", "3, 5", 1),
        ("The answer to the question is 540.", "540", 1),
        ("**The answer is 540.**", "540", 1),
        ("**Answer:**\n\n\n\n", "540", 0),
        ("Answer:\n\nit is unclear", "540", 0),
        ("Answer: 540\n\nExplanation: 12 + 3.", "540", 1),
    ],
    "equations behind the marker": [
        ("Answer: 12 apples + 25 apples = 37 apples", "37", 1),
        ("Answer: 12 apples + 25 apples = 37 apples", "12", 0),
        ("Answer: 12 apples + 25 apples = 37 apples", "25", 0),
        ("The answer is $5 + $3 = $8.", "8", 1),
        ("The answer is $5 + $3 = $8.", "5", 0),
        ("The answer is 12 + 25.", "12", 0),
        ("The answer is 12 + 25 = 38.", "38", 0),
        ("The answer is 3 * 6 = 18.", "18", 1),
        ("The answer is x = 18.", "18", 1),
        ("#### 12 - 4 = 8", "12", 0),
    ],
    "hedges": [
        ("The answer is 17 or 18.", "17", 0),
        ("The answer is 17 or 18.", "18", 0),
        ("The answer is 17, or 18.", "17", 0),
        ("#### 17 or 18", "17", 0),
        ("The answer is 17 (or 18).", "17", 0),
        ("The answer is 17, maybe 18.", "17", 0),
        ("The answer is 17. Or 18.", "17", 0),
        ("The answer is 17; 18.", "17", 0),
        ("The answer is either 17 or 18.", "17", 0),
        ("The answer is 17, possibly more.", "17", 0),
        ("The answer is 17. 18.", "17", 0),
        ("The answer is 17\n18", "17", 0),
        ("The answer is 17 and 18.", "18", 0),
        ("The answer is 17/18.", "17", 0),
        ("The answer is 17 - 18.", "18", 0),
        ("The answer is 17 to 18.", "17", 0),
        ("The answer is 17 [18].", "17", 0),
        ("The answer is 17 vs 18.", "17", 0),
        ("\\boxed{17} or \\boxed{18}", "18", 0),
        ("\\boxed{17} or \\boxed{18}", "17", 0),
        ("\\boxed{17}\\boxed{18}", "18", 0),
        ("\\boxed{17} / \\boxed{18}", "18", 0),
        ("\\boxed{17}, or maybe \\boxed{18}", "18", 0),
        ("\\boxed{17} or 18", "17", 0),
        ("\\boxed{17}, perhaps 18", "17", 0),
        ("$\\boxed{17}$, $18$", "17", 0),
        ("\\boxed{17}, \\boxed{18}", "18", 0),
        ("\\boxed{17} \\vee 18", "17", 0),
        ("<answer>17 or 18</answer>", "17", 0),
        ("<answer>17\n18</answer>", "18", 0),
        ("\\boxed{17}{18}", "17", 0),
        ("It is 17 or 18", "18", 0),
        ("The answer is 10! or 9", "9", 0),
        ("\\boxed{\\frac12}, or $0.5$", "\\frac12", 1),
    ],
    "words that change the number": [
        ("The answer is 18 million.", "18", 0),
        ("The answer is 18 million.", "18000000", 1),
        ("The answer is 2 and a half.", "2", 0),
        ("The answer is 2 hours and 30 minutes.", "2", 0),
        ("The answer is 2 thirds.", "2", 0),
        ("The answer is 3 dozen.", "36", 1),
        ("#### 18 thousand", "18", 0),
        ("The answer is 7 less than 9.", "7", 0),
        ("The answer is not 18.", "18", 0),
        ("The answer is 18 squared.", "18", 0),
        ("The answer is 18 degrees below zero.", "18", 0),
        ("The answer is minus 18.", "18", 0),
        ("The answer is 2 times 9.", "2", 0),
        ("The answer is 1 in 5.", "1", 0),
        ("The answer is 18 hundredths.", "18", 0),
    ],
    "remarks behind the answer": [
        ("The answer is 5 cookies per friend, with 2 left over.", "5", 1),
        ("The answer is therefore 17.", "17", 1),
        ("The answer is thus 17 or 18.", "17", 0),
        ("The answer is simply $17$.", "17", 1),
        ("So $\\boxed{17}$. 24 hours are a day.", "17", 1),
        ("The answer is 17. 3 of them are red.", "17", 1),
        ("#### 17 -- done", "17", 1),
        ("#### 17 ✅", "17", 1),
        ("#### 17, as required", "17", 1),
        ("The answer is 17 ✓.", "17", 1),
        ("#### 17 (see above)", "17", 1),
        ("The answer is 17, because 3 are left.", "17", 1),
        ("The answer is 17 (rounded down).", "17", 1),
        ("The answer is 17. I checked it with 3 examples.", "17", 1),
        ("The answer is 17 apples that she bought.", "17", 1),
        ("The answer is 17 as shown above.", "17", 1),
        ("The answer is 17, which is what we wanted.", "17", 1),
        ("#### 17\n\nThat is all.", "17", 1),
        ("The answer is $17$ by symmetry.", "17", 1),
        ("#### 17 (18)", "17", 0),
        ("The answer is 17 (x = 18).", "17", 0),
        ("#### 17 (nine)", "17", 0),
        ("\\boxed{17}. That is all.", "17", 1),
    ],
    "currency and delimiters": [
        ("The answer is $\\$25$.", "25", 1),
        ("The answer is €10", "10", 1),
        ("The answer is €10.", "10", 1),
        ("The answer is $25.", "25", 1),
        ("The answer is \\(25\\).", "25", 1),
        ("The answer is \\$25.50.", "25.5", 1),
        ("The answer is £1,200.", "1200", 1),
        ("The answer is 25$.", "25", 1),
        ("The answer is $\\text{\\$}25$.", "25", 1),
        ("The answer is $1$ $2$.", "12", 0),
        ("The answer is $1$$2$.", "12", 0),
    ],
    "several boxes and boxes without braces": [
        ("\\boxed{3}, \\boxed{5}, \\boxed{7}", "3,5,7", 1),
        ("\\boxed{3}, \\boxed{5} and \\boxed{7}", "3,5,7", 1),
        ("$\\boxed{3}$ and $\\boxed{5}$", "3,5", 1),
        ("\\boxed{3}, \\boxed{5}, \\boxed{7}", "7", 0),
        ("$\\boxed5$", "5", 1),
        ("$\\boxed 2$", "2", 1),
        ("$\\boxed x$", "x", 1),
        ("\\boxed 23", "2", 0),
        ("\\boxed 23", "3", 0),
        ("\\boxed{5} so again \\boxed{5}", "5", 1),
        ("\\boxed{7} ... wait, \\boxed{18}", "18", 1),
        ("\\boxed{5}. Check: \\boxed{5}", "5", 1),
        ("\\fbox{5}", "5", 1),
        ("\\boxed{5}\\%", "5", 1),
        ("\\boxed{5} cm", "5", 1),
        ("\\boxed{5}$ for all $i \\ge 5$", "5", 1),
    ],
    "tags": [
        ("<answer>\n\\frac{1}{4}\n</answer>", "\\frac14", 1),
        ("<answer>7</answer>", "7", 1),
        ("<answer>The answer is 7.</answer>", "7", 1),
        ("<answer>\\boxed{7}</answer>", "7", 1),
        ("\\boxed{9} <answer>7</answer>", "7", 1),
        ("\\boxed{9} <answer>7</answer>", "9", 0),
        ("<ANSWER>7</ANSWER>", "7", 1),
        ("<answer>9</answer> no: <answer>7</answer>", "7", 1),
        ("<answer></answer>", "7", 0),
        ("<answer>7", "8", 0),
        ("<answer>so we get 7 apples and then</answer>", "7", 0),
    ],
    "boxes that never close": [
        ("\\boxed{120\n</answer}", "120", 0),
        ("\\boxed{12", "12", 0),
        ("<answer>\\boxed{12</answer>", "12", 0),
    ],
}
# fmt: on


def rows(table: dict) -> list:
    return [pytest.param(*row, id=f"{kind}: {row[0]!r} for {row[1]}") for kind, found in table.items() for row in found]


@pytest.mark.parametrize(("answer", "gold", "right"), rows(BOXES))
def test_boxes(answer, gold, right):
    verdicts = [verify_math(f"So it is $\\boxed{{{answer}}}$.", gold, numbers) for numbers in (True, False)]
    assert [verdict["reward"] for verdict in verdicts] == [right, right]
    assert all(verdict["failed"] == 0.0 for verdict in verdicts)


@pytest.mark.parametrize(("text", "gold", "right"), rows(TEXTS))
def test_texts(text, gold, right):
    verdicts = [verify_math(text, gold, numbers) for numbers in (True, False)]
    numbers_only = not ("boxed" in text or "nswer" in text or "#" in text or "fbox" in text or "NSWER" in text)
    assert verdicts[0]["reward"] == right
    assert verdicts[1]["reward"] == (0 if numbers_only else right)
