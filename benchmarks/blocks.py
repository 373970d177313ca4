"""What blocks buy: rollouts and scoring of block-causal policies against full attention.

    OMP_NUM_THREADS=1 python benchmarks/blocks.py        # about ten minutes; --quick for the smallest canvas only

The same random network under three settings: full attention (`Decoding`), block-causal without and with its cache
(`BlockDecoding`); and one scoring pass with M draws, of `ELBO` and `BlockELBO`, with its gradient. User CPU seconds on
one thread; what is compared runs in turns, and ratios are of medians. See benchmarks/README.md.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from measure import random_policy, summary, user_seconds

from espo_lightning import ELBO, BlockDecoding, BlockELBO, Decoding, Layout, Policy, Prompts
from espo_lightning.keys import fold_in
from espo_lightning.lab.flops_blocks import cache_bytes
from espo_lightning.lab.network import Network
from espo_lightning.scoring.likelihood import Likelihood, Seen

SIZE = {"hidden_size": 96, "layers": 4, "heads": 4, "intermediate_size": 256}
PROMPT = 64


def in_turns(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """User CPU seconds of each, one after the other in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            start = user_seconds()
            job()
            if number or repeats == 0:
                seconds[name].append(user_seconds() - start)
    return {name: summary(values) for name, values in seconds.items()}


def policies(block: int) -> tuple[Policy, Policy]:
    """The same weights under full and under block-causal attention."""
    full = random_policy(**SIZE)
    full.config.max_position_embeddings = 4096
    blocks = Policy(full.model, full.tokenizer, mask_id=full.mask_id, layout=Layout(block, "response"))
    return full, blocks


def some_prompts(rows: int) -> Prompts:
    ids = torch.randint(7, 60, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    return Prompts(ids, None)


def rollouts(length: int, block: int, rows: int, repeats: int, uncached: bool) -> dict:
    """Tokens per second, one token a step."""
    full, blocks = policies(block)
    prompts, keys = some_prompts(rows), fold_in(0, torch.arange(rows))
    cached = BlockDecoding(length, block, length)
    jobs = {
        "full": lambda: Decoding(length, block, length).generate(full, prompts, keys),
        "blocks, cached": lambda: cached.generate(blocks, prompts, keys),
    }
    if uncached:
        without = BlockDecoding(length, block, length, cache=False)
        jobs["blocks, not cached"] = lambda: without.generate(blocks, prompts, keys)
        assert torch.equal(jobs["blocks, cached"](), jobs["blocks, not cached"]())
    seconds = in_turns(jobs, repeats)
    speed = {name: rows * length / s["median"] for name, s in seconds.items()}
    network = Network(
        SIZE["hidden_size"], SIZE["layers"], SIZE["heads"], SIZE["heads"], 24, SIZE["intermediate_size"], 64
    )
    return {
        "seconds": seconds,
        "tokens per second": speed,
        "cached over full": speed["blocks, cached"] / speed["full"],
        "cache bytes": cache_bytes(network, rows * (PROMPT + length), 4),
    }


def scoring(length: int, block: int, draws: int, rows: int, repeats: int) -> dict:
    """A scoring pass and its backward pass."""
    full, blocks = policies(block)
    prompts, keys = some_prompts(rows), fold_in(1, torch.arange(rows))
    completion = torch.randint(7, 60, (rows, length), generator=torch.Generator().manual_seed(1))

    def job(policy: Policy, likelihood: Likelihood) -> Callable[[], None]:
        masks = likelihood.masks(keys, Seen.of(policy, prompts, completion, keys))
        return lambda: likelihood.terms(policy, prompts, completion, masks).sum().backward()

    jobs = {"full": job(full, ELBO(draws)), "blocks": job(blocks, BlockELBO(draws, block=block))}
    seconds = in_turns(jobs, repeats)
    return {"seconds": seconds, "blocks over full": seconds["blocks"]["median"] / seconds["full"]["median"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest canvas only")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="canvases of the rollouts")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="0 = one round, without a warm-up")
    parser.add_argument("--output", default="benchmarks/results/blocks.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict = {"size": SIZE, "prompt": PROMPT, "rows": options.rows, "torch": torch.__version__}
    result |= {"rollouts": {}, "scoring": {}}
    for length in (64,) if options.quick else options.lengths:
        long = length == 1024  # where one round of full attention takes minutes
        rows, repeats = (1, 0) if long else (options.rows, options.repeats)
        for block in (4, 16, 32):
            name = f"L {length}, b {block}"
            result["rollouts"][name] = rollouts(length, block, rows, repeats, uncached=length == 64)
            print(name, f"{result['rollouts'][name]['cached over full']:.2f} times the tokens/s", flush=True)
    for draws in (1, 2, 4):
        length = 64 if options.quick else 256
        name = f"L {length}, b 32, M {draws}"
        result["scoring"][name] = scoring(length, 32, draws, options.rows, options.repeats)
        print(name, f"{result['scoring'][name]['blocks over full']:.2f} of full attention", flush=True)
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
