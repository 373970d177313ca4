"""``python -m espo_lightning.sample``: look on while policies unmask completions, or talk to one.

By default two policies solve the same held-out Sudoku side by side: the bundled one, and what the default run of
``espo_lightning.fit`` made of it. What is shown is in the decoder's trace, so that it costs no forward pass.
"""

import json as jsonlib
import sys
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TextIO

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.keys import fold_in
from espo_lightning.lab.evaluation import as_json, place
from espo_lightning.lab.terminal import coloured, play, verdicts
from espo_lightning.lab.unmasking import Unmasking, fitting, keys_of, record, unmask
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.ranges import check_counts
from espo_lightning.tasks.base import Messages, Task
from espo_lightning.tasks.judge import judge
from espo_lightning.tasks.sudoku import Sudoku
from espo_lightning.training.command_line import run
from espo_lightning.training.threads import choose_threads, computing_with

BEFORE, AFTER = "bundled:sudoku", "bundled:sudoku_espo"
NAMES = {BEFORE: "before RL", AFTER: "after RL"}
PAGE = Path(__file__).parent / "lab" / "unmasking.html"
AGAIN = "/new"  # begins another conversation


def sample(
    policies: str | list[str] = [BEFORE, AFTER],  # noqa: B006, as it is only read
    task: Task = Sudoku(),
    problem: int = 1,
    split: Literal["test", "train"] = "test",
    prompt: str | None = None,
    samples: int = 1,
    decoding: Decoder | None = None,
    seed: int = 0,
    columns: int | None = None,
    colour: Literal["certainty", "step"] = "certainty",
    pause: float = 0.2,
    html: str | None = None,
    json: str | None = None,
    chat: bool = False,
    device: str = "auto",
    settings: dict | None = None,
) -> None:
    """Decode a problem, or a prompt of your own, with one or several policies, and show every denoising step.

    Args:
        policies: a folder, hub id or ``bundled:NAME``, or a list of them, ``[bundled:sudoku,RUN/policy]``.
        task: where the problem comes from.
        problem: its number; the default is the first one that only the trained of the two policies solves.
        split: of the problem.
        prompt: another prompt than the problem's; then nothing is judged.
        samples: completions of every policy; with one, they are greedy.
        decoding: as in `espo_lightning.evaluate`; null = the kind that the policy needs, 16 tokens and as many steps.
        seed: of the decoding noise; completions are those of `espo_lightning.evaluate` with the same seed.
        columns: tokens of a line; null = 4 for a Sudoku, else as the text flows.
        colour: what colours say: how certain the policy was of a token, or in which step it came.
        pause: seconds between two steps on a terminal.
        html: write a page with a slider over the steps to this file.
        json: write all tokens, steps and certainties to this file.
        chat: talk to one policy instead: every line of the standard input is a turn, ``/new`` begins anew.
        device: "auto" is a GPU, or the CPU if there is none.
        settings: stored in the files.

    Raises:
        ValueError: a number out of range, a file that exists, arguments that contradict each other, or a policy that
            cannot be decoded this way.
    """
    names = [policies] if isinstance(policies, str) else list(policies)
    check_counts(0, problem=problem, seed=seed)
    check_counts(1, samples=samples, columns=columns)
    _check(names, samples, decoding, pause, [html, json], chat)
    facts = {"version": version("espo-lightning"), "settings": settings}
    if chat:
        policy = _open(names[0], device)
        with computing_with(choose_threads(None, policy)):
            return converse(policy, decoding or fitting(policy, 0.0), seed, sys.stdin, colour=colour, pause=pause)
    if (size := task.size(split)) is not None and problem >= size:
        raise ValueError(f"problem must be below {size}, as {type(task).__name__} has so many; got {problem}")
    posed = task.problem(split, 0, problem)
    asked, judged = (posed.prompt, partial(judge, posed)) if prompt is None else (prompt, lambda text: {})
    if columns is None and isinstance(task, Sudoku) and prompt is None and task.prompt == "compact":
        columns = 4
    found: list[Unmasking] = []
    for name in names:
        policy = _open(name, device)
        how = decoding or fitting(policy, float(samples > 1))
        how.check(policy)
        with computing_with(choose_threads(None, policy)):
            made = unmask(policy, NAMES.get(name, name), asked, how, keys_of(seed, problem, samples), judged)
        found += made if samples == 1 else [u._replace(policy=f"{u.policy} {i}") for i, u in enumerate(made, 1)]
    right = posed.answer if prompt is None else ""
    content = record(found, asked, right, columns, decoding=as_json(how), **facts)
    sys.stdout.write(f"prompt: {_plain(asked)}\n" + (f"a right answer: {right}\n" if right else "") + "\n")
    play(found, columns, colour, pause)
    sys.stdout.write("\n".join([*verdicts(found), ""]))
    for path, text in ((json, partial(jsonlib.dumps, content, indent=1)), (html, partial(page, content))):
        if path is not None:
            Path(path).write_text(text() + "\n", encoding="utf-8")
            sys.stdout.write(f"written to {path}\n")


def _check(
    names: list[str], samples: int, decoding: Decoder | None, pause: float, files: list[str | None], chat: bool
) -> None:
    if not names:
        raise ValueError("policies is empty: name at least one, such as --policies=bundled:sudoku")
    if chat and len(names) > 1:
        raise ValueError(f"chat is with one policy: name it, such as --policies={names[-1]}")
    if chat and (samples > 1 or any(files)):
        raise ValueError("chat shows one completion at a time, and writes no file: drop samples, html and json")
    if decoding is not None and samples > 1 and decoding.temperature == 0:
        raise ValueError(f"samples={samples} at temperature 0 would all be equal: set decoding.temperature above 0")
    if not pause >= 0:
        raise ValueError(f"pause must be 0 or a number of seconds, got {pause}")
    if taken := [path for path in files if path is not None and Path(path).exists()]:
        raise ValueError(f"{taken[0]} exists already: name another file, or remove it")


def _open(name: str, device: str) -> Policy:
    policy = load_policy(name, dtype="auto")
    place(policy, device)
    return policy


def _plain(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def page(content: dict) -> str:
    """A page that needs nothing else, from what `record` made."""
    data = jsonlib.dumps(content).replace("<", "\\u003c")  # no text can end the script that holds it
    return PAGE.read_text(encoding="utf-8").replace("__DATA__", data).rstrip()


def converse(
    policy: Policy,
    decoding: Decoder,
    seed: int,
    lines: Iterable[str],
    out: TextIO | None = None,
    colour: str = "certainty",
    pause: float = 0.0,
) -> None:
    """Answer lines as turns of a conversation until they end; `AGAIN` begins another one.

    On a terminal every answer is shown being unmasked, elsewhere only when it is complete.
    """
    out = out or sys.stdout
    decoding.check(policy)
    turns, alive = [], coloured(out)
    for number, line in enumerate(lines):
        if not (text := line.strip()) or text == AGAIN:
            turns = [] if text == AGAIN else turns
            continue
        turns.append({"role": "user", "content": text})
        (one,) = unmask(policy, "", turns, decoding, keys=fold_in(seed, number).view(1))
        if alive:
            play([one], colour=colour, pause=pause, out=out)
        out.write(f"{one.text}\n")
        out.flush()
        turns.append({"role": "assistant", "content": one.text})


def main(argv: list[str] | None = None) -> None:
    try:
        run(sample, "espo_lightning.sample", argv)
    except KeyboardInterrupt:
        sys.stdout.write("\033[0m\n" if coloured(sys.stdout) else "\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
