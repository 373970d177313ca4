"""``python -m espo_lightning.evaluate``: how well a policy does on a task, as one JSON file."""

import json
import pickle
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from espo_lightning.cli import run
from espo_lightning.masking import fold_in
from espo_lightning.policy import Policy
from espo_lightning.sampler import Decoder, Decoding
from espo_lightning.tasks.base import Problem, Task, Verdict
from espo_lightning.verdicts import judge, summarise


def solve(policy: Policy, problems: list[Problem], keys: Tensor, decoding: Decoder) -> tuple[list[str], list[Verdict]]:
    """Decode one completion per problem with keys [B], and judge it: texts and verdicts."""
    texts = policy.decode(decoding.generate(policy, policy.encode([p.prompt for p in problems]), keys))
    return texts, [judge(problem, text) for problem, text in zip(problems, texts)]


def evaluate(
    policy: Policy,
    task: Task,
    decoding: Decoder = Decoding(temperature=0.0),
    problems: int = 256,
    batch_size: int = 64,
    split: str = "test",
    seed: int = 0,
    output: str = "evaluation.json",
    checkpoint: str | None = None,
    settings: dict | None = None,
) -> dict:
    """Decode and judge problems of a task, and write one JSON file: metrics with confidence intervals, every sample,
    and all settings.

    Args:
        policy: see `load_policy`.
        task: where the problems come from.
        decoding: greedy unless told otherwise; `AutoregressiveDecoding` for a causal policy.
        problems: how many, from the start of the split.
        batch_size: problems decoded at once; does not change the results.
        split: "test" or "train".
        seed: of the decoding noise.
        output: the file to write.
        checkpoint: a training checkpoint of ``policy`` (``RUN/checkpoints/*.ckpt``), whose weights are used instead.
        settings: stored in the file.

    Returns:
        What was written: `summarise`'s numbers, "chance", "seconds", "settings" and "samples".
    """
    path = Path(output)
    if path.exists():
        raise ValueError(f"output {path} exists already: name another file, or remove it")
    decoding.check(policy)
    if checkpoint is not None:
        load_weights(policy, checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    start, samples = time.perf_counter(), []
    for first in tqdm(range(0, problems, batch_size), desc="evaluate", unit="batch"):
        batch = [task.problem(split, 0, i) for i in range(first, min(first + batch_size, problems))]
        keys = fold_in(seed, torch.arange(first, first + len(batch))).to(policy.device)
        for problem, text, verdict in zip(batch, *solve(policy, batch, keys, decoding)):
            samples.append({"prompt": problem.prompt, "completion": text, "verdict": verdict})
    result = {
        **summarise([s["verdict"] for s in samples]),
        "chance": task.chance,
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("torch", "transformers", "espo-lightning")},
        "settings": settings,
        "samples": samples,
    }
    path.write_text(json.dumps(result, indent=1, default=str))
    return result


def load_weights(policy: Policy, checkpoint: str) -> None:
    """Put the weights of a Lightning checkpoint of `ESPOModule` or `SFTModule` into a policy of the same architecture.

    Raises:
        ValueError: the file is no such checkpoint, or one of another architecture.
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        policy.load_state_dict({k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")})
    except (pickle.UnpicklingError, KeyError, RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint {checkpoint} does not fit the policy: {error}") from error


def main(argv: list[str] | None = None) -> None:
    defaults = {
        "policy": {"class_path": "espo_lightning.load_policy", "init_args": {"path": "bundled:sudoku"}},
        "task": {"class_path": "espo_lightning.tasks.Sudoku"},
    }
    result = run(evaluate, "espo_lightning.evaluate", argv, defaults)
    lines = [f"{k:8} {result[k]:.3f}   95 % {lo:.3f} to {hi:.3f}" for k, (lo, hi) in result["ci95"].items()]
    sys.stdout.write("\n".join([*lines, f"{result['n']} problems, written to {result['settings']['output']}"]) + "\n")


if __name__ == "__main__":
    main()
