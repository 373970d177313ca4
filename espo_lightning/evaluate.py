"""``python -m espo_lightning.evaluate``: how well a policy does on a task, as one JSON file.

Interrupted, even by ``kill -9``, the same command goes on where it stopped. Under ``torchrun --nproc-per-node N -m
espo_lightning.evaluate`` N processes share the batches, and the last one to finish writes the file. The result is the
same either way, as batches are the same: only "seconds" and "threads" differ.
"""

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.decoding.masked import Decoding
from espo_lightning.decoding.published import protocol as protocol_named
from espo_lightning.keys import fold_in
from espo_lightning.lab.evaluation import as_json, load_weights, place, solve
from espo_lightning.lab.evaluation_parts import Shards
from espo_lightning.policies.fingerprint import fingerprint
from espo_lightning.policies.policy import Policy
from espo_lightning.ranges import check_counts
from espo_lightning.tasks.base import Task
from espo_lightning.tasks.statistics import cluster_of, per_problem, summarise
from espo_lightning.training.command_line import run
from espo_lightning.training.data_check import check_data
from espo_lightning.training.report import told
from espo_lightning.training.threads import choose_threads, computing_with, counted

GREEDY = Decoding(temperature=0.0)


def evaluate(
    policy: Policy,
    task: Task,
    decoding: Decoder = GREEDY,
    protocol: str | None = None,
    problems: int = 256,
    samples: int = 1,
    batch_size: int = 64,
    split: str = "test",
    seed: int = 0,
    output: str = "evaluation.json",
    checkpoint: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    settings: dict | None = None,
) -> dict | None:
    """Decode and judge problems of a task, and write one JSON file: metrics with confidence intervals, every sample,
    and all settings.

    Args:
        policy: see `load_policy`.
        task: where the problems come from.
        decoding: greedy unless told otherwise; `AutoregressiveDecoding` for a causal policy.
        protocol: take ``decoding`` from a published evaluation, such as ``llada-planning-256``; see `protocols`.
        problems: how many, from the start of the split; all of them if it has fewer.
        samples: completions per problem. With several, metrics are means over problems of the mean over samples, and
            "pass@k" is added for k = 1, 2, 4, ... (unbiased; right means "exact" is 1).
        batch_size: completions decoded at once; changes the results by rounding only.
        split: "test" or "train".
        seed: of the decoding noise.
        output: the file to write. Until then, ``OUTPUT.RANK.jsonl`` beside it hold what is done.
        checkpoint: a training checkpoint of ``policy`` (``RUN/checkpoints/*.ckpt``), whose weights are used instead.
        device: "auto" is this process's GPU, or the CPU if there is none.
        threads: of a CPU to compute with; by default what OMP_NUM_THREADS says, or what the size of the policy is
            worth (`choose_threads`). Another number may change results by rounding.
        settings: stored in the file.

    Returns:
        What was written: `summarise`'s numbers, "chance", "seconds" (of decoding and judging, over all processes),
        "threads" (of the process that wrote it), "decoding", "settings", "samples" and so on. None if other
        processes are not done yet.

    Raises:
        ValueError: ``output`` exists, or an unfinished evaluation beside it is another one; contradictory arguments.
    """
    decoding = _decoding(decoding, protocol)
    check_counts(0, seed=seed)
    _check_numbers(problems, samples, batch_size, threads, decoding)
    task.check_host()
    check_data(task, policy, (split,))  # before anything is written
    problems = min(problems, task.size(split) or problems)  # none counts twice
    decoding.check(policy)
    if checkpoint is not None:
        load_weights(policy, checkpoint)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    header = {
        "policy": fingerprint(policy.parameters()),
        "versions": {name: version(name) for name in ("torch", "transformers", "espo-lightning")},
        "protocol": protocol,
        "decoding": as_json(decoding),
        "problems": problems,
        "samples_per_problem": samples,
        "batch_size": batch_size,
        "split": split,
        "seed": seed,
        "settings": settings,
    }
    shards = Shards(Path(output), header, rank)
    if (finished := shards.finished()) is not None:
        if world == 1:
            raise ValueError(f"output {output} exists already: name another file, or remove it")
        return finished  # the others were faster
    place(policy, device, local)
    shards.open()  # everything is known to be there
    pairs = [(i, s) for i in range(problems) for s in range(samples)]
    batches = [pairs[first : first + batch_size] for first in range(0, len(pairs), batch_size)]
    done = shards.read()
    with computing_with(choose_threads(threads, policy) if policy.device.type == "cpu" else None) as used:
        for number in tqdm(range(rank, len(batches), world), desc="evaluate", unit="batch", disable=rank > 0):
            if number not in done:
                shards.append(number, _solved(policy, task, split, batches[number], seed, decoding, number == 0))

    records = shards.read()
    if len(records) < len(batches):
        return shards.finished()
    header = {"threads": used, **shards.header}
    result = _result([records[number] for number in range(len(batches))], samples, task, header)
    shards.finish(result)
    return result


def _result(records: list[dict], samples: int, task: Task, header: dict) -> dict:
    """What is written, of the records of all batches in their order."""
    made = [sample for record in records for sample in record["samples"]]
    return {
        **summarise(
            per_problem([s["verdict"] for s in made], samples),
            [cluster_of(s["prompt"], s["cluster"]) for s in made[::samples]],
        ),
        "chance": task.chance,
        "seconds": sum(record["seconds"] for record in records),
        **header,
        "samples": made,
    }


def _decoding(decoding: Decoder, protocol: str | None) -> Decoder:
    """That of the protocol, or the one that was given."""
    if protocol is None:
        return decoding
    if decoding != GREEDY:
        raise ValueError(f"protocol={protocol} and decoding contradict each other: drop one of them")
    return protocol_named(protocol)


def _check_numbers(problems: int, samples: int, batch_size: int, threads: int | None, decoding: Decoder) -> None:
    check_counts(1, problems=problems, samples=samples, batch_size=batch_size, threads=threads)
    if samples > 1 and decoding.temperature == 0:
        raise ValueError(f"samples={samples} at temperature 0 would all be equal: set decoding.temperature above 0")


def _solved(
    policy: Policy,
    task: Task,
    split: str,
    batch: list[tuple[int, int]],
    seed: int,
    decoding: Decoder,
    must_work: bool,
) -> dict:
    """The record of a batch of (problem, sample): completions, verdicts, seconds. must_work: see `solve`."""
    start = time.perf_counter()
    problems = [task.problem(split, 0, i) for i, _ in batch]
    counters = torch.tensor([sample << 32 | i for i, sample in batch])
    keys = fold_in(seed, counters).to(policy.device)
    texts, verdicts = solve(policy, problems, keys, decoding, must_work=must_work)
    made = [
        {"problem": i, "prompt": problem.prompt, "completion": text, "verdict": verdict, "cluster": problem.cluster}
        for (i, _), problem, text, verdict in zip(batch, problems, texts, verdicts)
    ]
    return {"seconds": time.perf_counter() - start, "samples": made}


def main(argv: list[str] | None = None) -> None:
    defaults = {
        "policy": {"class_path": "espo_lightning.load_policy", "init_args": {"path": "bundled:sudoku"}},
        "task": {"class_path": "espo_lightning.tasks.Sudoku"},
    }
    try:
        result = run(evaluate, "espo_lightning.evaluate", argv, defaults)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on where it stopped\n")
        raise SystemExit(130) from None
    if result is None:
        lines = ["this process is done; the last one writes the result"]
    else:
        intervals = {key: result["ci95"][key] for key in told(result)}
        lines = [f"{k:8} {result[k]:.3f}   95 % {lo:.3f} to {hi:.3f}" for k, (lo, hi) in intervals.items()]
        lines.append(f"{result['n']} problems, {counted(result['threads'])}, written to {result['settings']['output']}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
