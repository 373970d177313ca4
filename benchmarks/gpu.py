"""An 8-billion policy of LLaDA's shape on one GPU: ``python benchmarks/gpu.py``, in ten minutes at most.

Random bfloat16 weights and rank-128 adapters, made on the device. Rows are in the order of their value, and the JSON is
written after each. What is timed is what ``measured_steps`` says; a whole rollout's time is that times its steps, and
its name ends in "extrapolated". Without a GPU there is one sentence, and ``--device cpu --size tiny`` runs the program.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_device import (
    SIZES,
    Enough,
    Size,
    Stopwatch,
    card,
    forget,
    in_blocks,
    make_policy,
    measured_peak,
    peak_gigabytes,
    wait,
)
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from step import Letters

from espo_lightning import (
    ELBO,
    BlockDecoding,
    BlockELBO,
    Decoding,
    ESPOModule,
    Policy,
    PolicyGradient,
    PromptDataModule,
)
from espo_lightning.cost import cost
from espo_lightning.keys import fold_in

SHEET = {  # dense bfloat16 TFLOP/s of data sheets, by what is in the card's name; the first that fits
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}
NOTHING = "benchmarks/gpu.py: torch sees no GPU here, so that nothing was measured (--device cpu --size tiny runs it)"
COMMITTED = 2  # tokens a step


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What rows have in common. peak: measured TFLOP/s. sheet: of the data sheet. deadline: on the monotonic clock."""

    size: Size
    policy: Policy
    device: torch.device
    peak: float
    sheet: float | None
    deadline: float

    def model(self, **settings: Any) -> dict:
        """The cost model's numbers of one GPU."""
        with tempfile.TemporaryDirectory() as folder:
            self.policy.config.save_pretrained(folder)
            shape = {"policy": folder, "lora_rank": self.size.rank, "gpus": (1,), "prompt_length": self.size.prompt}
            return cost(**shape, likelihood=settings.pop("likelihood", ELBO(draws=self.size.draws)), **settings)[
                "table"
            ]

    def shares(self, flop: float, seconds: float) -> dict[str, float | None]:
        """TFLOP/s, and what share that is of the card's peak."""
        reached = flop / seconds / 1e12
        by_sheet = None if self.sheet is None else reached / self.sheet
        return {"tflops": reached, "share_of_measured_peak": reached / self.peak, "share_of_data_sheet": by_sheet}


def rollout(bench: Bench, completions: int, decoding: Decoding) -> dict:
    """Denoising steps of one block, or of all where blocks are cheap, of so many completions."""
    size, blocks = bench.size, isinstance(decoding, BlockDecoding)
    policy = in_blocks(bench.policy, size.block) if blocks else bench.policy
    policy.eval()
    per_block = decoding.passes // decoding.blocks if not blocks else decoding.steps // decoding.blocks
    problems = [Letters(size.prompt).problem("train", 0, i).prompt for i in range(completions // size.group)]
    prompts = policy.encode(problems).repeat_each(size.group)
    keys = fold_in(0, torch.arange(len(prompts.ids), device=bench.device))
    forget(bench.device)
    # a cache, and a block that is finished, cost a pass that others do not: whole blocks are timed, after the first
    watch, whole = Stopwatch(policy, 2, per_block, bench.deadline), blocks
    if decoding.prefix_cache:
        watch.skipped = per_block
    if blocks:
        watch.skipped, watch.passes = 0, 10**9
    try:
        with torch.autocast(bench.device.type, torch.bfloat16, cache_enabled=False):
            decoding.generate(policy, prompts, keys)
        watch.stop()
    except Enough:
        whole = False
    finally:
        watch.hook.remove()
    table = bench.model(
        decoding=decoding,
        prompts_per_gpu=completions // size.group,
        group_size=size.group,
        likelihood=BlockELBO(size.draws, block=size.block) if blocks else ELBO(draws=size.draws),
    )
    modelled, steps = table["GB of memory per GPU"]["total in the rollout"][0], decoding.passes
    seconds = watch.seconds if whole else watch.seconds / max(1, watch.measured) * steps
    name = "" if whole else "_extrapolated"
    row = {"passes_of_rollout": steps, "measured_steps": watch.measured, "measured_seconds": watch.seconds}
    row |= {f"rollout_seconds{name}": seconds, f"tokens_per_s{name}": completions * size.length / seconds}
    row |= {"peak_GB": peak_gigabytes(bench.device), "model_GB": modelled}
    return row | bench.shares(table["PFLOP per GPU"]["rollout"][0] * 1e15, seconds)


class Phases(ESPOModule):
    """`ESPOModule` that times its phases, each until the device has done it."""

    spent: dict[str, float]

    def _timed(self, phase: str, function: Callable, *arguments: Any) -> Any:
        start = wait(self.policy.device)
        result = function(*arguments)
        self.spent[phase] = self.spent.get(phase, 0.0) + wait(self.policy.device) - start
        return result

    def complete(self, *arguments):
        self.spent = {}
        forget(self.policy.device)
        return self._timed("rollout", super().complete, *arguments)

    def judge_and_score(self, *arguments):
        return self._timed("score", super().judge_and_score, *arguments)

    def update(self, *arguments):
        return self._timed("update", super().update, *arguments)


class Staying(SingleDeviceStrategy):
    """Leaves the weights where they are when a fit ends; Lightning's own takes them to the host."""

    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def update(bench: Bench, completions: int, micro_batch: int, updates: int = 2) -> dict:
    """Two updates and what is scored for them, by the library inside ``Trainer.fit``, after as many as a warm-up."""
    size = bench.size
    decoding = Decoding(size.length, size.block, size.length // size.block, temperature=1.0)  # one step a block
    optimizer = partial(torch.optim.AdamW, lr=1e-5)
    settings = {"group_size": size.group, "updates": updates, "objective": PolicyGradient(), "micro_batch": micro_batch}
    module = Phases(
        bench.policy,
        decoding,
        likelihood=ELBO(draws=size.draws),
        optimizer=optimizer,
        max_prompt_length=2 * size.prompt,
        **settings,
    )
    accelerator = {"cpu": CPUAccelerator, "cuda": CUDAAccelerator, "mps": MPSAccelerator}[bench.device.type]()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        strategy=Staying(device=bench.device, accelerator=accelerator),
        plugins=MixedPrecision("bf16-mixed", bench.device.type),
        max_epochs=1,
        limit_val_batches=0,
        **quiet,
    )
    data = PromptDataModule(Letters(size.prompt), batch_size=completions // size.group, batches=2)
    trainer.fit(module, datamodule=data)
    table = bench.model(
        decoding=decoding,
        prompts_per_gpu=completions // size.group,
        group_size=size.group,
        updates=updates,
        micro_batch=micro_batch,
    )
    spent, pflop = module.spent, table["PFLOP per GPU"]
    shares = bench.shares(pflop["updates"][0] * 1e15, spent["update"])
    return {
        "updates": updates,
        "update_seconds": spent["update"] / updates,
        "updated_tokens_per_s": completions * size.length * updates / spent["update"],
        "score_seconds": spent["score"],
        "score_tflops": (pflop["old scores"][0] + pflop["reference"][0]) * 1e3 / spent["score"],
        "peak_GB": peak_gigabytes(bench.device),
        "model_GB": table["GB of memory per GPU"]["total"][0],
        **shares,
    }


def rows_of(size: Size) -> list[tuple[str, Callable[[Bench], dict], dict]]:
    """(name, row, settings), the most valuable first. Batches grow until memory ends."""
    few, plain = 2 * size.group, Decoding(size.length, size.block, size.length // COMMITTED)
    one = replace(plain, steps=size.length)
    blocks = BlockDecoding(size.length, size.block, size.length // COMMITTED)
    rollouts = [
        ("rollout, full", few, plain),
        ("rollout, block-causal", few, blocks),
        ("rollout, prefix cache", few, replace(plain, prefix_cache=True)),
        # random weights never reach it: a step commits one token, and this is what asking costs
        ("rollout, threshold never reached", few, replace(one, threshold=0.9)),
        ("rollout, full, a token a step", few, one),
        *(("rollout, full", n * few, plain) for n in (2, 4, 8)),
        *(("rollout, block-causal", n * few, blocks) for n in (4, 16)),
    ]
    made = [
        (name, partial(rollout, completions=n, decoding=decoding), {"completions": n, "steps": decoding.steps})
        for name, n, decoding in rollouts
    ]
    updates = [
        ("update", partial(update, completions=few, micro_batch=n), {"completions": few, "micro_batch": n})
        for n in (1, 2, 3, 6, 12)
        if n <= few
    ]
    return [made[0], updates[0], *made[1:4], updates[1], made[4], made[5], *updates[2:], *made[6:]]


def measure(bench: Bench, run: Callable[[Bench], dict]) -> dict:
    """A row, or why there is none."""
    try:
        return run(bench)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # the other rows are worth having
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        bench.policy.zero_grad(set_to_none=True)
        forget(bench.device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--seconds", type=float, default=480, help="begin no row after so many (default: 480)")
    parser.add_argument("--rows", type=int, help="only so many, the most valuable (default: all)")
    parser.add_argument("--sheet-tflops", type=float, help="dense bfloat16 peak of the card's data sheet")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--found", action="store_true", help="only say, by the exit code, whether there is a GPU")
    arguments = parser.parse_args(argv)
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if arguments.found:
        return int(found is None)
    if arguments.device == "auto" and found is None:
        print(NOTHING)
        return 0
    started = time.monotonic()
    device = torch.device(found if arguments.device == "auto" else arguments.device)
    size, facts = SIZES[arguments.size], card(device)
    sheet = next((value for name, value in SHEET.items() if name in facts.get("card", "")), None)
    sheet, peak = arguments.sheet_tflops or sheet, measured_peak(size.product, device)
    policy = make_policy(size, device)
    bench = Bench(size, policy, device, peak, sheet, started + arguments.seconds)
    result = {**facts, "size": arguments.size, "measured_peak_tflops": peak, "data_sheet_tflops": sheet, "rows": []}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name, run, settings in rows_of(size)[: arguments.rows]:
        late = time.monotonic() > bench.deadline
        row = {"name": name, **settings} | ({"error": "no time left"} if late else measure(bench, run))
        result["rows"].append(row | {"at_second": time.monotonic() - started})
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    print(f"written to {arguments.output}")
    known = ("out of memory", "no time left")
    return int(any(row.get("error", known[0]) not in known for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
