"""The numbers of docs/findings.md, from the stored results: for every section the strings that it may hold."""

import json
from functools import cache
from math import log
from pathlib import Path
from statistics import mean

from espo_lightning.lab.evidence import Interval, correlation_interval, interval, paired

RESULTS = Path(__file__).parents[1] / "notebooks" / "results"


@cache
def result(name: str) -> dict:
    (folder,) = RESULTS.glob(f"{name}_*")
    return json.loads((folder / "result.json").read_text())


def seeds(name: str) -> list[dict]:
    return result(name)["per_seed"]


def between(found: Interval, digits: int = 2) -> str:
    low, high = (round(x, digits) + 0.0 for x in found)
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def spread(values: list[float]) -> str:
    """Mean and interval."""
    return f"{mean(values):.2f} {between(interval(values))}"


def apart(a: list[float], b: list[float], sign: str = "+") -> str:
    """Mean difference and interval, paired by seed."""
    return f"{mean(x - y for x, y in zip(a, b)):{sign}.2f} {between(paired(a, b))}"


# ---- by notebook ---------------------------------------------------------------------------------------------------


def tightness(stage: int, *path: str) -> list[float]:
    """One number of notebook 01's gradients of all puzzles, for every seed."""
    found = [row["sudoku"][stage]["batch"] for row in seeds("01")]
    for key in path:
        found = [value[key] for value in found]
    return found


def gap(stage: int) -> list[float]:
    return [mean(row["sudoku"][stage]["gaps"]["own"]["gap"]) for row in seeds("01")]


def puzzles() -> list[dict]:
    return [state for row in seeds("01") for stage in row["sudoku"] for state in stage["states"]]


def gains() -> list[float]:
    """One step along the ELBO's gradient over one along the exact one, where the exact one gains something."""
    steps = [state["improvement"] for state in puzzles()]
    return [step["ELBO"] / step["decoder: true"] for step in steps if step.get("decoder: true", 0) > 1e-4]


def correlation(what: str, pairs: int) -> str:
    rho = result("01")["summary"]["rank_correlation"][what]
    return f"{rho:+.2f} {between(correlation_interval(rho, pairs))}"


def reuse(key: str, level: str, which: str = "stages") -> list[float]:
    """Notebook 02 after the most updates, without a clip; of the causal policy if ``which`` is "causal"."""
    likelihood = "" if which == "causal" else ", ELBO M=1"
    last = result("02")["parameters"]["warm"][-1], result("02")["parameters"]["updates"][-1]
    stages = [s for row in seeds("02") for s in row[which] if (s["rollout"], s["updates"]) == last]
    return [stage["batch"][key][f"{level}{likelihood}, inf"] for stage in stages]


def wider() -> list[float]:
    last = result("02")["parameters"]["warm"][-1], result("02")["parameters"]["updates"][-1]
    stages = [s for row in seeds("02") for s in row["stages"] if (s["rollout"], s["updates"]) == last]
    return [stage["canvas"]["sd"]["token"] / stage["canvas"]["sd"]["sequence"] for stage in stages]


def direction(kl: str) -> list[float]:
    """Notebook 03: cosine of an estimator's gradient with the exact one, farthest from the base."""
    return [row["stages"][-1]["batch"]["cosine"][f"{kl}, M=2"] for row in seeds("03")]


def penalised(arm: str, key: str) -> list[float]:
    return [row["training"][arm]["curve"][-1][key] for row in seeds("03")]


def ablation(arm: str) -> list[float]:
    return [row["arms"][arm]["curve"][-1]["exact"] for row in seeds("04")]


def compute(arm: str) -> list[float]:
    return [row["runs"][arm]["curve"][-1]["exact"] for row in seeds("05")]


def jump(prior: str, reward: str) -> list[float]:
    return [row["bases"][prior]["arms"][reward]["held_out"]["exact"] for row in seeds("06")]


def idle(prior: str, reward: str) -> list[float]:
    return [mean(row["bases"][prior]["arms"][reward]["idle"][:5]) for row in seeds("06")]


def noise(level: str, law: str, draws: int, updates: int) -> list[float]:
    """Notebook 07: the masks' share of the variance."""
    key = {"level": level, "law": law, "draws": draws, "updates": updates}
    rows = [x for row in seeds("07") for x in row["rows"] if all(x[k] == v for k, v in key.items())]
    return [x["masks"] / x["variance"] for x in rows]


def rare(arm: str) -> list[float]:
    return [row["arms"][arm]["curve"][-1]["exact"] for row in seeds("08")]


def board(contest: str, method: str) -> str:
    """Notebook 09: minus ESPO, paired by seed."""
    exact = {name: [row["runs"][contest][name]["exact"] for row in seeds("09")] for name in (method, "ESPO")}
    return apart(exact[method], exact["ESPO"])


def far() -> list[str]:
    """Notebook 04: how far its arms are from each other, and the clips of those with ELBOs."""
    token, sequence, best = (ablation(arm) for arm in ("token, ELBO", "sequence, ELBO", "token, mean field"))
    chosen = result("04")["summary"]["chosen"]
    clips = [f"ε = {chosen[arm]['clip_range']:g}" for arm in ("token, ELBO", "sequence, ELBO")]
    return [*clips, apart(sequence, token), apart(best, token), apart(best, sequence)]


def modes(what: str) -> str:
    """Notebook 10: rank correlation of the mean field's cosine with something."""
    found = result("10")["summary"]["rank_correlation"][what]
    return f"{found['rho']:+.2f} {between(found['interval'])}"


def bound(interval_of: str) -> str:
    """Notebook 12: one of its intervals."""
    return between(result("12")["summary"]["intervals"][interval_of])


def kept(gaps: str) -> str:
    """Notebook 12: what the median step along the ELBO keeps of an exact one's gain."""
    return f"{result('12')['summary']['by_gap'][gaps]['improvement']:.2f}"


def divided(arm: str, key: str) -> list[float]:
    """Notebook 13: at the end of every run."""
    return [row["runs"][arm]["curve"][-1][key] for row in seeds("13")]


def spreading(key: str) -> str:
    """Notebook 11: the exponent in the length of something of the ELBO."""
    lengths, last = result("11")["parameters"]["canvases"], result("11")["parameters"]["updates"][-1]
    logs = [log(x) for x in lengths]
    centred = [x - mean(logs) for x in logs]
    slopes = []
    for run in seeds("11"):
        rows = [r for r in run["rows"] if r["likelihood"] == "ELBO" and r["updates"] == last]
        ys = [log(row[key]) for length in lengths for row in rows if row["length"] == length]
        slopes.append(sum(c * y for c, y in zip(centred, ys)) / sum(c * c for c in centred))
    return spread(slopes)


def drowned(length: int) -> list[float]:
    """Notebook 11: ln of the token level's gradient noise over the sequence level's, after the most updates."""
    last = result("11")["parameters"]["updates"][-1]
    wanted = {"likelihood": "ELBO", "updates": last, "length": length}
    rows = [r for run in seeds("11") for r in run["rows"] if wanted.items() <= r.items()]
    return [log(row["token_noise"] / row["sequence_noise"]) for row in rows]


def horizon(interval_of: str) -> str:
    """Notebook 11: one of its intervals."""
    return between(result("11")["summary"]["intervals"][interval_of])


def differs(name: str, what: str) -> str:
    """Notebooks 14 and 15: a difference's interval, with its mean before it."""
    low, high = result(name)["summary"]["differences"][what]
    return f"{(low + high) / 2:+.2f} {between((low, high))}"


def losing(level: str, what: str) -> str:
    """Notebook 14: how much more of the base's reward is lost for a factor of 2."""
    low, high = result("14")["summary"]["slopes"][f"{level}, {what}"]
    return f"{(low + high) / 2:.2f} {between((low, high))}"
