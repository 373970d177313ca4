"""Methods at equal compute: how many rollouts each may take, how it is tuned, and its final runs.

What notebook 09 and ``python -m espo_lightning.leaderboard`` call.
"""

from pathlib import Path
from typing import Any

from espo_lightning.lab.leaderboard import at_edge, best, beyond, title
from espo_lightning.lab.methods import make_method, method_settings
from espo_lightning.lab.studies.leaderboard import belongs, final_run, on_equal_terms, pilot_run, step_flops
from espo_lightning.notebooks import over_arms

ESPO = {}  # the defaults of `ESPOModule`, which `experiments/methods/espo.yaml` spells out
PILOTS, FINALS = 6000, 7000  # the first seeds of pilots and of final runs, which nothing else has


def presets(folder: str | Path) -> dict[str, dict]:
    """The settings of the methods in a folder of YAML files, by their `title`, less those for block-causal policies."""
    found = {title(path): method_settings(path) for path in sorted(Path(folder).glob("*.yaml"))}
    return {name: settings for name, settings in found.items() if belongs(make_method(settings))}


def plan(methods: dict[str, dict], contest: str, rollouts: int, prompts: int) -> dict[str, dict]:
    """How many rollouts of every method take the FLOPs of ``rollouts`` of ESPO, and the share of these that they take.

    Args:
        methods: name -> settings, see `method_settings`.

    Returns:
        For every method "rollouts", at least 1, and "flops", the share: rollouts are whole, so that it is not quite 1.
    """
    budget = rollouts * sum(step_flops(ESPO, contest, prompts).values())
    each = {name: sum(step_flops(settings, contest, prompts).values()) for name, settings in methods.items()}
    counts = {name: max(1, round(budget / flops)) for name, flops in each.items()}
    return {name: {"rollouts": counts[name], "flops": counts[name] * each[name] / budget} for name in methods}


def tune(
    arms: dict[str, dict], *, learning_rates: list[float], extra: int, pilots: int, **settings: Any
) -> dict[str, list[dict]]:
    """Pilots of every arm, sorted by their learning rate: "lr", "score" and "seconds" of each.

    All arms have the same grid. One whose best rate is at an edge gets a further one beyond it, on the same seeds,
    ``extra`` times at most.

    Args:
        arms: name -> what the runs of a method have in common.
        learning_rates: with a constant factor between neighbours.
        pilots: runs of every learning rate; their scores are averaged.
        settings: for `over_arms` and `pilot_run`.
    """
    found: dict[str, list[dict]] = {name: [] for name in arms}
    wanted, factor = {name: list(learning_rates) for name in arms}, learning_rates[1] / learning_rates[0]
    for _ in range(1 + extra):
        each = {f"{name}, {lr}": {**arms[name], "lr": lr} for name, rates in wanted.items() for lr in rates}
        runs = over_arms(pilot_run, each, range(PILOTS, PILOTS + pilots), any_source=True, **settings)
        for name, rates in wanted.items():
            for lr in rates:
                rows = runs[f"{name}, {lr}"]
                totals = {key: sum(row[key] for row in rows) for key in ("score", "seconds")}
                found[name].append({"lr": lr, "score": totals["score"] / pilots, "seconds": totals["seconds"]})
            found[name].sort(key=lambda pilot: pilot["lr"])
        wanted = {name: [beyond(rows, factor)] for name, rows in found.items() if at_edge(rows)}
    return found


def enter(
    methods: dict[str, dict],
    contest: str,
    *,
    rollouts: int,
    learning_rates: list[float],
    extra: int,
    pilots: int,
    seeds: int,
    prompts: int,
    points: int,
    problems: int,
    **how: Any,
) -> dict[str, dict]:
    """Tune and run methods on a task with equal FLOPs.

    Args:
        methods: name -> settings, see `method_settings`.
        contest: a key of `CONTESTS`.
        rollouts: of ESPO, whose FLOPs all get, see `plan`.
        learning_rates, extra, pilots: see `tune`.
        seeds: how many final runs.
        prompts, points, problems: see `final_run`.
        how: "processes" and "cache" of `over_arms`.

    Returns:
        For every method "rollouts" and "flops" of `plan`, the "pilots" of `tune`, the chosen "lr", whether it is at the
        "edge" of all that were tried, and "runs", one of `final_run` per seed.
    """
    planned = plan(methods, contest, rollouts, prompts)
    arms = {name: {"method": methods[name], "rollouts": planned[name]["rollouts"]} for name in methods}
    how |= {"contest": contest, "prompts": prompts}
    tried = tune(arms, learning_rates=learning_rates, extra=extra, pilots=pilots, **how)
    arms = {name: {**arm, "lr": best(tried[name])} for name, arm in arms.items()}
    seeds = range(FINALS, FINALS + seeds)
    runs = over_arms(final_run, arms, seeds, any_source=True, points=points, problems=problems, **how)
    return {
        name: {
            **planned[name],
            "pilots": tried[name],
            "lr": arms[name]["lr"],
            "edge": at_edge(tried[name]),
            "runs": runs[name],
        }
        for name in methods
    }


def enter_file(path: Path, parameters: dict[str, Any], **how: Any) -> dict[str, dict]:
    """What `enter` returns for the method of a YAML file, by the names of the tasks.

    Args:
        parameters: of the result that it is to be compared with.
        how: see `enter`.

    Raises:
        ValueError: it is no method for the policies of these tasks; nothing ran.
        SystemExit: with code 2 and a message, if the file does not fit.
    """
    name, settings = title(path), method_settings(path)
    for contest in parameters["rollouts"]:
        on_equal_terms(settings, contest)
    same = {key: value for key, value in parameters.items() if key not in ("rollouts", "methods")}
    return {
        contest: enter({name: settings}, contest, rollouts=rollouts, **same, **how)[name]
        for contest, rollouts in parameters["rollouts"].items()
    }
