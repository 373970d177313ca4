"""Every row of a finite data set is looked at before anything is written: what a task can say, and what tokens can."""

from collections.abc import Iterable, Sequence

from espo_lightning.policies.policy import Policy
from espo_lightning.tasks.base import Messages, Problem, Task
from espo_lightning.tasks.files import BadRows
from espo_lightning.tasks.messages import prompt_of

BATCH = 256  # prompts that are tokenised at once
Placed = tuple[str, Problem]


def check_data(
    task: Task,
    policy: Policy,
    splits: Sequence[str],
    *,
    seed: int = 0,
    max_prompt_length: int | None = None,
    answer_length: int | None = None,
) -> None:
    """Refuse data that would end a run in its middle, or silently spoil it; say how many problems splits share.

    Of a task that draws its problems without end, the first of each split is looked at.

    Args:
        max_prompt_length: longest prompt in tokens, chat template included.
        answer_length: width of the canvas that answers are taught on; None if they are not used.

    Raises:
        ValueError: rows are no problems (`Task.inspect`), their prompts are no text or the chat template refuses them,
            a prompt or an answer has too many tokens, an answer to learn from is missing. The first ten are named.
    """
    faults: dict[int, tuple[str, str]] = {}
    prompts: dict[str, list[str | Messages]] = {}
    number = 0
    for split in splits:
        found = list(task.inspect(split)) or [(f"{split} problem 0", task.problem(split, seed, 0))]
        usable: dict[int, Placed] = {}
        for place, problem in found:
            if reason := fault_of(problem, task, answer_length is not None):
                faults[number] = place, reason
            else:
                usable[number] = place, problem
            number += 1
        for key, reason in token_faults(policy, usable, max_prompt_length, answer_length):
            faults[key] = usable[key][0], reason
        prompts[split] = [problem.prompt for _, problem in usable.values()] if len(found) > 1 else []
    if faults:
        raise BadRows([faults[key] for key in sorted(faults)])
    if {"train", "test"} <= prompts.keys() and (shared := shared_problems(prompts["train"], prompts["test"])):
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # seconds that no other run waits for

        rank_zero_warn(
            f"{shared} of {len(prompts['test'])} test problems of {type(task).__name__} are training problems, too: "
            f"what is measured on them is not held out"
        )


def shared_problems(train: Iterable[str | Messages], test: Iterable[str | Messages]) -> int:
    """How many of the test prompts are training prompts, but for blanks and case."""

    def plain(prompt: str | Messages) -> str:
        text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
        return " ".join(text.split()).casefold()

    known = set(map(plain, train))
    return sum(plain(prompt) in known for prompt in test)


def fault_of(problem: Problem | Exception, task: Task, learns: bool) -> str:
    """Why a problem cannot be used, as far as that shows without a tokenizer; "" if it can."""
    if isinstance(problem, ValueError) and type(problem) is ValueError:
        return str(problem)
    if isinstance(problem, Exception):
        return f"makes no problem of {type(task).__name__}: {type(problem).__name__}: {problem}"
    try:
        plain = prompt_of(problem.prompt)
    except ValueError as error:
        return str(error)
    if plain != problem.prompt:  # `Rows` writes parts out; a task of the user's own may not
        return "has a 'prompt' in parts: a problem's is a text, or messages of a role and a text each"
    return f"has no {task.DEMONSTRATION} to learn from" if learns and not problem.answer.strip() else ""


def token_faults(
    policy: Policy, problems: dict[int, Placed], max_prompt_length: int | None, answer_length: int | None
) -> Iterable[tuple[int, str]]:
    """(key, what is wrong) of the problems whose prompt or answer the policy cannot take."""
    keys = list(problems)
    for first in range(0, len(keys), BATCH):
        batch = {key: problems[key][1] for key in keys[first : first + BATCH]}
        try:
            rows = dict(zip(batch, policy.tokens([problem.prompt for problem in batch.values()])))
        except Exception:  # templates raise what they like: find the one
            rows = {}
        for key, problem in batch.items():
            try:
                row = rows[key] if rows else policy.tokens([problem.prompt])[0]
            except Exception as error:
                yield key, f"is refused by the policy's chat template: {error}"
                continue
            if max_prompt_length is not None and len(row) > max_prompt_length:
                yield key, f"a prompt has {len(row)} tokens, more than max_prompt_length={max_prompt_length}"
            elif answer_length is not None:
                tokens = policy.answer_tokens([problem.answer])[0]
                if len(tokens) > answer_length:
                    yield key, f"an answer has {len(tokens)} tokens, more than length={answer_length}"
