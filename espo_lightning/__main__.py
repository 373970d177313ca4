"""``espo PROGRAM ...`` and ``python -m espo_lightning PROGRAM ...``: the programs of this library under one name."""

import difflib
import sys
from importlib import import_module
from importlib.metadata import version

PROGRAMS = {  # module -> what it does
    "fit": "reinforcement learning of a policy on a task, measured before and after",
    "sft": "supervised training on a task's answers",
    "evaluate": "how well a policy does on a task, as one JSON file",
    "sample": "look on while policies unmask completions, or talk to one",
    "export": "merge adapters, and write a checkpoint for other programs",
    "push": "a run's model card, and its upload to the Hugging Face hub",
    "cost": "FLOPs, bytes and memory of a step, without a GPU",
    "notebooks": "run the notebooks",
    "leaderboard": "methods at equal compute, and your own among them",
}
USAGE = "usage: espo PROGRAM [--help] [--config FILE] [--KEY=VALUE ...]"


def main(argv: list[str] | None = None) -> None:
    """Hand the arguments to a program, which is the module ``espo_lightning.PROGRAM``; exit code 2 if there is none."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {program:12} {what}" for program, what in PROGRAMS.items()]
        sys.stdout.write("\n".join([USAGE, "", *lines, "", "espo PROGRAM --help lists its flags."]) + "\n")
    elif name == "--version":
        sys.stdout.write(f"espo_lightning {version('espo-lightning')}\n")
    elif name in PROGRAMS:
        import_module(f"espo_lightning.{name}").main(rest)
    else:
        near = difflib.get_close_matches(name, PROGRAMS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(PROGRAMS)}"
        sys.stderr.write(f"{USAGE}\nerror: {name!r} is no program of espo: {hint}\n")
        raise SystemExit(2)


if __name__ == "__main__":
    main()
