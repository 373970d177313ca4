"""Sample completions of a run: every rollout's in a file, and now and then a table that a person can read."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from espo_lightning.tasks.base import Problem


class SampleLog(Callback):
    """Writes the best and the worst completion of some prompts, with their verdicts, to a JSONL file.

    Now and then they are shown as a table on the screen, and given to every logger that takes tables or text.

    Args:
        path: the file; lines are appended.
        prompts: of each rollout, so many.
        show_every: rollouts between two tables; 0 = never.
    """

    def __init__(self, path: Path, prompts: int = 4, show_every: int = 20):
        self.path, self.prompts, self.show_every = path, prompts, show_every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        rollout, number = pl_module.last_rollout, pl_module.rollouts
        chosen = extremes([v["reward"] for v in rollout.verdicts], len(batch), self.prompts)
        made = [(batch[q], rollout.texts[i], rollout.verdicts[i]) for q, i in chosen]
        rows = [{"rollout": number, "prompt": p.prompt, "completion": text, "verdict": v} for p, text, v in made]
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.show_every and (number - 1) % self.show_every == 0:
            cells = [[_plain(p.prompt), _plain(p.answer), v["reward"], text] for p, text, v in made]
            pl_module.print(shown(number, made))
            to_loggers(trainer, number, cells)


def extremes(rewards: list[float], prompts: int, most: int) -> list[tuple[int, int]]:
    """(prompt, completion) of the best and the worst completion of the first ``most`` prompts, in their order."""
    group = len(rewards) // prompts
    found = []
    for q in range(min(prompts, most)):
        own = range(q * group, (q + 1) * group)
        best = max(own, key=rewards.__getitem__)
        worst = min((i for i in own if i != best), key=rewards.__getitem__)
        found += [(q, best), (q, worst)]
    return found


def shown(number: int, made: list[tuple[Problem, str, dict]]) -> str:
    """A table of different prompts with what was right, and the best and the worst completion of each."""
    lines = [f"rollout {number}: the best and the worst completion of {len(made) // 2} prompts, by reward"]
    for (problem, best, high), (_, worst, low) in zip(made[::2], made[1::2]):
        lines.append(f"  prompt  {_line(problem.prompt, 96)}")
        if problem.answer:
            lines.append(f"  right   {_line(problem.answer, 96)}")
        lines += [f"  {high['reward']:6.2f}  {_line(best, 96)}", f"  {low['reward']:6.2f}  {_line(worst, 96)}", ""]
    return "\n".join(lines[:-1])


COLUMNS = ["prompt", "right", "reward", "completion"]


def to_loggers(trainer: Trainer, number: int, cells: list[list]) -> None:
    """Give the table to loggers that show one: W&B's way, which others imitate, or TensorBoard's text."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table("samples", columns=["rollout", *COLUMNS], data=[[number, *row] for row in cells])
        elif hasattr(logger.experiment, "add_text"):
            rows = [
                "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in cells
            ]
            head = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|"]
            logger.experiment.add_text("samples", "\n".join([*head, *rows]), number)


def _plain(prompt) -> str:
    """A prompt as text; of a conversation, its last message."""
    return prompt if isinstance(prompt, str) or prompt is None else prompt[-1]["content"]


def _line(prompt, width: int) -> str:
    text = " ".join((_plain(prompt) or "").split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."
