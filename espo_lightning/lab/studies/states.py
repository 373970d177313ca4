"""Training runs for studies, and puzzles small enough to be enumerated."""

import base64
import copy
import tempfile
from collections.abc import Iterable
from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load, save
from torch import Tensor

from espo_lightning.decoding.masked import Decoding
from espo_lightning.keys import fold_in
from espo_lightning.lab.evaluation import solve
from espo_lightning.lab.exact import all_symbols, elbos, enumerate_completions, exact_kl, lattice_edges, log_likelihoods
from espo_lightning.lab.tabular import FreeCells
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.policies.tiny import new_policy
from espo_lightning.scoring.likelihood import ELBO
from espo_lightning.tasks import Countdown, Problem, Sudoku, Task
from espo_lightning.training.data import ProblemLoader, PromptDataModule
from espo_lightning.training.module import ESPOModule
from espo_lightning.training.supervised import SFTModule, encode_answers

SUDOKU, COUNTDOWN = "bundled:sudoku", "bundled:countdown"
SMALL_COUNTDOWN = Countdown(largest=10, largest_target=50)  # what its policy was trained for
TABLE = 100  # a purpose of random keys, apart from those of training
# the settings of `fit`, whose only place is the signature of `ESPOModule`
DEFAULTS = signature(ESPOModule).parameters["optimizer"].default([torch.zeros(1, requires_grad=True)]).defaults
LEARNING_RATE, WEIGHT_DECAY = DEFAULTS["lr"], DEFAULTS["weight_decay"]
LESSONS = ELBO(coupled=False, smallest_count=1)  # how the bundled policies were taught


class Snapshots(Callback):
    """Keeps copies of the policy after some rollouts, the means of every rollout's verdicts, and its logged metrics.

    "idle" among the means is the share of groups whose completions all have the same reward: no policy gradient.
    """

    def __init__(self, at: Iterable[int]):
        self.at, self.policies, self.verdicts, self.metrics = set(at), {}, [], []

    def on_fit_start(self, trainer: Trainer, module: ESPOModule) -> None:
        self.keep(module)

    def on_train_batch_end(self, trainer: Trainer, module: ESPOModule, *_) -> None:
        verdicts, rewards = module.last_rollout.verdicts, module.last_rollout.rewards
        means = {key: sum(v[key] for v in verdicts) / len(verdicts) for key in verdicts[0]}
        self.verdicts.append(means | {"idle": float((rewards == rewards[:, :1]).all(1).float().mean())})
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.keep(module)

    def keep(self, module: ESPOModule) -> None:
        if module.rollouts in self.at:
            self.policies[module.rollouts] = copy.deepcopy(module.policy)

    def means(self, key: str) -> list[float]:
        """Of every rollout: "reward", "exact", ..."""
        return [v[key] for v in self.verdicts]


class Diverged(FloatingPointError):
    """Training ended early, its gradients were not finite. snapshots: those until then."""

    def __init__(self, snapshots: Snapshots):
        super().__init__(f"gradients were not finite after {len(snapshots.verdicts)} rollouts")
        self.snapshots = snapshots


def train(
    module: ESPOModule, task: Task, seed: int, rollouts: int, at: Iterable[int] = (), batch: int = 16
) -> Snapshots:
    """RL as `fit` does it, without a run folder.

    Raises:
        Diverged: see `ESPOModule`'s ``max_skipped``.
    """
    snapshots = Snapshots(at)
    data = PromptDataModule(task, batch_size=batch, batches=rollouts, eval_problems=1, eval_batch_size=1, seed=seed)
    try:
        _fit(module, data, callbacks=snapshots)
    except FloatingPointError as error:
        raise Diverged(snapshots) from error
    return snapshots


def train_or_diverge(
    module: ESPOModule, task: Task, seed: int, rollouts: int, at: Iterable[int], batch: int = 16
) -> tuple[Snapshots, bool]:
    """`train`; if it diverges, its snapshots until then. Returns them and whether it did."""
    try:
        return train(module, task, seed, rollouts, at, batch), False
    except Diverged as error:
        return error.snapshots, True


def teach(policy: Policy, task: Task, seed: int, batches: int, lr: float, batch: int = 128, length: int = 16) -> None:
    """More supervised lessons of a task for a policy, as `sft` gives them."""
    optimizer = partial(torch.optim.AdamW, lr=lr)
    module = SFTModule(policy, length=length, optimizer=optimizer, likelihood=LESSONS, seed=seed)
    _fit(module, ProblemLoader(task, "train", seed, batch, batch * batches, rank=0, world=1))


def _fit(module: LightningModule, data: PromptDataModule | ProblemLoader, **settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
            **settings,
        )
        trainer.fit(module, data)


def new_module(
    policy: Policy, seed: int, kind: type[ESPOModule] = ESPOModule, lr: float = LEARNING_RATE, **changes
) -> ESPOModule:
    """An `ESPOModule` with the settings of `fit`."""
    return kind(policy, seed=seed, optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=WEIGHT_DECAY), **changes)


def untaught(seed: int) -> Policy:
    """The small transformer from scratch, of 130,000 parameters, that notebooks 11 and 13 to 15 teach and train."""
    return new_policy(hidden_size=64, layers=3, heads=4, intermediate_size=128, seed=seed)


def as_text(policy: Policy) -> str:
    """Its weights, so that a stored result can hold them."""
    return base64.b64encode(save({name: tensor.clone() for name, tensor in policy.state_dict().items()})).decode()


def set_weights(policy: Policy, weights: str) -> Policy:
    """The policy, with the weights of `as_text` from now on."""
    policy.load_state_dict(load(base64.b64decode(weights)))
    return policy


def held_out(policy: Policy, task: Task, problems: int) -> dict[str, float]:
    """Greedy exact and cell accuracy on the first test problems."""
    keys = fold_in(0, torch.arange(problems))
    batch = [task.problem("test", 0, i) for i in range(problems)]
    _, verdicts = solve(policy, batch, keys, Decoding(temperature=0.0))
    return {key: sum(v[key] for v in verdicts) / problems for key in ("exact", "cell")}


class State(NamedTuple):
    """A puzzle with n empty cells. prompts: of one row. rewards: float64 [V^n], of every way to fill them."""

    prompts: Prompts
    cells: FreeCells
    rewards: Tensor

    def of(self, policy: Policy) -> "State":
        """The same canvas under another policy."""
        return self._replace(cells=FreeCells(policy, self.cells.canvas, self.cells.free.tolist(), self.symbols))

    @property
    def symbols(self) -> list[int]:
        return self.cells.symbols.tolist()

    @property
    def size(self) -> tuple[int, int]:
        """V and n."""
        return len(self.cells.symbols), len(self.cells.free)

    def edges(self) -> Tensor:
        """Its lattice under its policy, without gradient."""
        with torch.no_grad():
            return lattice_edges(self.cells, self.prompts, all_symbols(*self.size))


def sudoku_state(policy: Policy, problem: Problem) -> State:
    """A puzzle's empty cells, with the rewards of all 4^n ways to fill them."""
    cells, small = empty_cells(policy, problem, encode_answers(policy, [problem.answer], 16)[0])
    texts = policy.decode(cells.expand(enumerate_completions(4, len(small))))
    rewards = torch.tensor([problem.verify(text)["reward"] for text in texts], dtype=torch.float64)
    return State(policy.encode([problem.prompt]), cells, rewards)


def empty_cells(policy: Policy, problem: Problem, completion: Tensor) -> tuple[FreeCells, Tensor]:
    """The canvas of the puzzle's empty cells, and the completion on it."""
    free = [i for i, cell in enumerate(problem.prompt) if cell == "0"]
    digits = policy.tokenizer("1234", add_special_tokens=False)["input_ids"]
    match = completion[free].unsqueeze(1) == torch.tensor(digits)
    if not match.any(1).all():
        raise ValueError(f"a completion holds something else than digits: {policy.decode(completion[None])[0]!r}")
    return FreeCells(policy, completion, free, digits), match.int().argmax(1)


def contested_states(base: Policy, seed: int, count: int, free: int, spread: float = 0.05) -> list[State]:
    """Training puzzles with ``free`` empty cells about which the base policy is of two minds.

    Those whose reward has a standard deviation of at least ``spread`` under the base: a group of equal rewards has no
    gradient. They are the same for every policy that is compared (`State.of`).
    """
    states, index = [], 0
    while len(states) < count:
        state = sudoku_state(base, Sudoku(empty=free).problem("train", seed, index))
        probability = log_likelihoods(state.edges()).exp()
        if moments(state.rewards, probability)[1] >= spread:
            states.append(state)
        index += 1
    return states


def true_measures(states: list[State], policy: Policy) -> dict[str, float]:
    """Exact KL to the states' own policy, gap of the ELBO and entropy of the random-order decoder: means, in nats."""
    rows = []
    for state in states:
        edges = state.of(policy).edges()
        law = log_likelihoods(edges)
        distance = exact_kl(law, log_likelihoods(state.edges()))
        rows.append((float(distance), float(law.exp() @ (law - elbos(edges))), float(-(law.exp() @ law))))
    return {key: sum(column) / len(states) for key, column in zip(("kl", "gap", "entropy"), zip(*rows))}


def moments(values: Tensor, probability: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a value, for y ~ probability."""
    mean = float(probability @ values)
    return mean, float(probability @ (values - mean).square()) ** 0.5


def numbers(values: Tensor) -> list[float]:
    return [float(x) for x in values]
