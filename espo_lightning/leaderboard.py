"""``python -m espo_lightning.leaderboard``: enter a method into the leaderboard, and write its page.

Without ``--method`` the page is written anew from the stored numbers. With it, a YAML file like those in
``experiments/methods`` is tuned and run on the terms of the stored result, and nothing else is run again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from espo_lightning.lab.leaderboard import at_edge, best, beyond, check, page
from espo_lightning.lab.methods import method_settings
from espo_lightning.lab.studies.leaderboard import final_run, on_equal_terms, pilot_run, step_flops
from espo_lightning.notebooks import over_arms, rounded, versions
from espo_lightning.training.command_line import run

ESPO = {}  # the defaults of `ESPOModule`, which `experiments/methods/espo.yaml` spells out
PILOTS, FINALS = 6000, 7000  # the first seeds of pilots and of final runs, which nothing else has


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


# ---- the program ----------------------------------------------------------------------------------------------------


def title(path: Path) -> str:
    """A method's name: what its file says before the first colon of a comment in its first line, or the file's name."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    name, colon, _ = first.removeprefix("#").partition(":")
    return name.strip() if first.startswith("#") and colon else path.stem


def presets(folder: str | Path) -> dict[str, dict]:
    """The settings of all methods in a folder of YAML files, by their `title`."""
    return {title(path): method_settings(path) for path in sorted(Path(folder).glob("*.yaml"))}


def leaderboard(
    method: str | None = None,
    results: str = "notebooks/results/09_leaderboard",
    output: str = "docs/leaderboard.md",
    processes: int = 2,
    cache: str = "runs/leaderboard",
) -> str:
    """Write the leaderboard's page, after a method was entered or from what is stored.

    Args:
        method: a YAML file like those in experiments/methods; its row is tuned and run with the parameters of the
            stored result, and kept in RESULTS/entries.
        results: folder of notebook 09's result.json.
        output: the page to write.
        processes: runs at once.
        cache: folder of finished runs: interrupted, the same command goes on.

    Returns:
        The page.

    Raises:
        ValueError: the method's name is taken, it is none for masked diffusion policies, or what is stored does not
            belong together. Nothing is written.
    """
    folder = Path(results)
    result = json.loads((folder / "result.json").read_text())
    parameters, own = result["parameters"], None if method is None else Path(method)
    entered = {path: json.loads(path.read_text()) for path in sorted((folder / "entries").glob("*.json"))}
    if own is not None:
        name, settings, target = title(own), method_settings(own), folder / "entries" / f"{own.stem}.json"
        check(name, result, parameters)
        for contest in parameters["rollouts"]:
            on_equal_terms(settings, contest)
        if name in {one["name"] for path, one in entered.items() if path != target}:
            raise ValueError(f"{name} was entered from another file: name your method otherwise, in its first line")
        rest = {k: v for k, v in parameters.items() if k not in ("rollouts", "methods")}
        rest |= {"processes": processes, "cache": cache}
        entries = {
            contest: enter({name: settings}, contest, rollouts=rollouts, **rest)[name]
            for contest, rollouts in parameters["rollouts"].items()
        }
        one = {"name": name, "file": own.read_text(encoding="utf-8"), "parameters": parameters, "entries": entries}
        entered[target] = rounded({**one, "versions": versions()})
    text = page(result, list(entered.values()))
    if own is not None:
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(entered[target], indent=1) + "\n")
    Path(output).write_text(text)
    return text


def main(argv: list[str] | None = None) -> None:
    text = run(leaderboard, "espo_lightning.leaderboard", argv)
    sys.stdout.write(text[text.index("## ") :])


if __name__ == "__main__":
    main()
