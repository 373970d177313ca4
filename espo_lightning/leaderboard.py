"""``python -m espo_lightning.leaderboard``: enter a method into the leaderboard, and write its page.

Without ``--method`` the page is written anew from the stored numbers. With it, a YAML file like those in
``experiments/methods`` is tuned and run on the terms of the stored result, and nothing else is run again.
"""

import json
import sys
from pathlib import Path

from espo_lightning.lab.leaderboard import check, page, title
from espo_lightning.notebooks import rounded, versions
from espo_lightning.training.command_line import run


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
    entered = {path: json.loads(path.read_text()) for path in sorted((folder / "entries").glob("*.json"))}
    if method is not None:
        from espo_lightning.contest import enter_file  # and with it Lightning, which the page alone does not need

        target = folder / "entries" / f"{Path(method).stem}.json"
        name, parameters = title(Path(method)), result["parameters"]
        check(name, result, parameters)
        if name in {one["name"] for path, one in entered.items() if path != target}:
            raise ValueError(f"{name} was entered from another file: name your method otherwise, in its first line")
        entries = enter_file(Path(method), parameters, processes=processes, cache=cache)
        text = Path(method).read_text(encoding="utf-8")
        entered[target] = {"name": name, "file": text, "parameters": parameters, "entries": rounded(entries)}
        entered[target]["versions"] = versions()
    text = page(result, list(entered.values()))
    if method is not None:
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(entered[target], indent=1) + "\n")
    Path(output).write_text(text)
    return text


def main(argv: list[str] | None = None) -> None:
    text = run(leaderboard, "espo_lightning.leaderboard", argv)
    sys.stdout.write(text[text.index("## ") :])


if __name__ == "__main__":
    main()
