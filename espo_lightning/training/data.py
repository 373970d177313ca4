"""Problems as Lightning batches, in an order that depends on (seed, index) only."""

from collections.abc import Iterator

from lightning.pytorch import LightningDataModule

from espo_lightning.ranges import check_counts
from espo_lightning.tasks.base import Problem, Task
from espo_lightning.tasks.sudoku import Sudoku


class ProblemLoader:
    """Batches of consecutive problems of a task; every rank gets its own part of each batch.

    Resumable: Lightning stores ``state_dict`` in its checkpoints.

    Args:
        batch_size: problems per batch over all ranks.
        batches: number of batches; the last one is cut to ``total`` problems, if that is given.
    """

    def __init__(self, task: Task, split: str, seed: int, batch_size: int, batches: int, rank: int, world: int):
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} is not a multiple of the {world} processes")
        self.task, self.split, self.seed = task, split, seed
        self.per_rank, self.batch_size, self.batches, self.rank = batch_size // world, batch_size, batches, rank
        self.position = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Problem]]:
        if self.position == self.batches:
            self.position = 0
        while self.position < self.batches:
            start = self.position * self.batch_size + self.rank * self.per_rank
            self.position += 1
            yield [self.task.problem(self.split, self.seed, start + i) for i in range(self.per_rank)]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class PromptDataModule(LightningDataModule):
    """Problems for RL (their prompts and verifiers) or supervised training (their answers).

    Args:
        task: where problems come from.
        batch_size: problems per batch over all processes; in RL, prompts per rollout.
        batches: training batches; in RL, rollouts.
        eval_problems: problems of the test split for validation, decoded greedily.
        eval_batch_size: of these, decoded at once over all processes.
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
        if eval_problems % eval_batch_size:
            raise ValueError(f"eval_problems {eval_problems} is not a multiple of eval_batch_size {eval_batch_size}")
        self.task, self.batch_size, self.batches, self.seed = task, batch_size, batches, seed
        self.eval_problems, self.eval_batch_size = eval_problems, eval_batch_size

    def _loader(self, split: str, seed: int, batch_size: int, batches: int) -> ProblemLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return ProblemLoader(self.task, split, seed, batch_size, batches, rank, world)

    def train_dataloader(self) -> ProblemLoader:
        return self._loader("train", self.seed, self.batch_size, self.batches)

    def val_dataloader(self) -> ProblemLoader:
        return self._loader("test", 0, self.eval_batch_size, self.eval_problems // self.eval_batch_size)
