"""Problems as Lightning batches, in an order that depends on (seed, index) only."""

from collections.abc import Iterator

from lightning.pytorch import LightningDataModule

from espo_lightning.policies.policy import Policy
from espo_lightning.ranges import check_counts
from espo_lightning.tasks.base import Problem, Task
from espo_lightning.tasks.sudoku import Sudoku


class ProblemLoader:
    """Batches of consecutive problems of a task; every rank gets its own part of each batch.

    Resumable: Lightning stores ``state_dict`` in its checkpoints.

    Args:
        batch_size: problems per batch over all ranks.
        total: problems altogether; the last batch has what is left of them.
    """

    def __init__(self, task: Task, split: str, seed: int, batch_size: int, total: int, rank: int, world: int):
        if batch_size % world or total % world:
            raise ValueError(f"batches of {batch_size} of {total} problems cannot be shared by {world} processes")
        self.task, self.split, self.seed, self.total = task, split, seed, total
        self.batch_size, self.batches, self.rank, self.world = batch_size, -(-total // batch_size), rank, world
        self.position = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Problem]]:
        if self.position == self.batches:
            self.position = 0
        while self.position < self.batches:
            start = self.position * self.batch_size
            own = min(self.batch_size, self.total - start) // self.world
            self.position += 1
            yield [self.task.problem(self.split, self.seed, start + self.rank * own + i) for i in range(own)]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def unknown_tokens(policy: Policy, problems: list[Problem]) -> list[str]:
    """What a policy's tokenizer cannot read in some problems, a sentence each for prompts and answers."""
    tokenizer, sentences = policy.tokenizer, []
    if tokenizer.unk_token_id is None:
        return []
    prompts = [p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"] for p in problems]
    for kind, texts in (("prompts", prompts), ("answers", [p.answer for p in problems if p.answer])):
        encoded = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
        pieces = [
            (i == tokenizer.unk_token_id, text[start:end])
            for text, e in zip(texts, encoded)
            for i, (start, end) in zip(e["input_ids"], e["offset_mapping"])
        ]
        if lost := [piece for unknown, piece in pieces if unknown]:
            such = ", ".join(map(repr, list(dict.fromkeys(lost))[:5]))
            sentences.append(
                f"the policy's tokenizer does not know {100 * len(lost) / len(pieces):.0f} % of the {kind} (such as "
                f"{such}): it reads {tokenizer.unk_token} instead, and can never write them"
            )
    return sentences


class PromptDataModule(LightningDataModule):
    """Problems for RL (their prompts and verifiers) or supervised training (their answers).

    Args:
        task: where problems come from.
        batch_size: problems per batch over all processes; in RL, prompts per rollout.
        batches: training batches; in RL, rollouts.
        eval_problems: problems of the test split for validation, decoded greedily; 0 = no validation.
        eval_batch_size: of these, decoded at once over all processes; the last batch has what is left.
        seed: of the training problems. The test problems are the same for every seed.
    """

    def __init__(
        self,
        task: Task = Sudoku(),
        batch_size: int = 16,
        batches: int = 50,
        eval_problems: int = 256,
        eval_batch_size: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        check_counts(1, batch_size=batch_size, batches=batches, eval_batch_size=eval_batch_size)
        check_counts(0, eval_problems=eval_problems, seed=seed)
        self.task, self.batch_size, self.batches, self.seed = task, batch_size, batches, seed
        self.eval_problems, self.eval_batch_size = eval_problems, eval_batch_size

    def check(self, world: int, *, evaluates: bool) -> None:
        """Raise ValueError for sizes that so many processes cannot share."""
        for name in ("batch_size", *(("eval_batch_size", "eval_problems") if evaluates else ())):
            if (size := getattr(self, name)) % world:
                raise ValueError(f"data.{name} {size} is not a multiple of the {world} processes")

    def _loader(self, split: str, seed: int, batch_size: int, total: int) -> ProblemLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return ProblemLoader(self.task, split, seed, batch_size, total, rank, world)

    def train_dataloader(self) -> ProblemLoader:
        return self._loader("train", self.seed, self.batch_size, self.batch_size * self.batches)

    def val_dataloader(self) -> ProblemLoader:
        return self._loader("test", 0, self.eval_batch_size, self.eval_problems)
