"""What stands in a run folder beside its checkpoints: small files, sample completions."""

import json
import os
import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

RESUME = "python -m {command} --config {folder}/config.yaml --ckpt_path {checkpoint}"


def replace(new: Path, old: Path) -> None:
    """Give a file or folder that is complete its name, in the place of what has it."""
    if old.is_dir():
        shutil.rmtree(old)
    os.replace(new, old)


def write_text(path: Path, text: str) -> None:
    """Write a small file that is never seen half written."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    replace(part, path)


class SampleLog(Callback):
    """Writes sample completions with their verdicts to a JSONL file, and shows a few now and then.

    Args:
        path: the file; lines are appended.
        count: completions per rollout.
        show_every: rollouts between two tables on the screen; 0 = never.
    """

    def __init__(self, path: Path, count: int = 8, show_every: int = 20):
        self.path, self.count, self.show_every = path, count, show_every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        rollout = pl_module.last_rollout
        group = len(rollout.texts) // len(batch)
        rows = [
            {"rollout": pl_module.rollouts, "prompt": batch[i // group].prompt, "completion": text, "verdict": verdict}
            for i, (text, verdict) in enumerate(zip(rollout.texts[: self.count], rollout.verdicts))
        ]
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.show_every and batch_idx % self.show_every == 0:
            shown = [(r["verdict"]["reward"], *(_line(r[k]) for k in ("prompt", "completion"))) for r in rows[:4]]
            table = [f"  {reward:6.2f}  {prompt:<40}  {completion}" for reward, prompt, completion in shown]
            pl_module.print("\n".join([f"rollout {pl_module.rollouts}: reward, prompt, completion", *table]))


def _line(text, width: int = 40) -> str:
    text = " ".join((text if isinstance(text, str) else text[-1]["content"]).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."
