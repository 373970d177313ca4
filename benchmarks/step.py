"""One outer ESPO step, library against the straightforward and a competent version: ``python benchmarks/step.py``.

All run in one process, turn by turn: the library inside ``Trainer.fit``, as users run it, the
other versions in a callback between its batches. Prints a table, writes JSON. Rows that it has already are not measured
again.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import competent
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from measure import host, in_fresh_process, matmul_peak, random_policy, summary, user_seconds
from startup import ROOT, commit
from straightforward import Straightforward, assert_same
from workloads import BETA, CLIP, OF_THE_WORKLOAD, ROWS, SIZES, Setting, Workload

from espo_lightning import ELBO, Decoding, ESPOModule, Policy, PolicyGradient, Problem, PromptDataModule, Task

MAX_NORM, LR = 0.2, 1e-5
PHASES = ("rollout", "score", "update")
BASELINES = {  # what `Straightforward` is given
    "straightforward": {},
    "competent": {"log_probs": competent.log_probs, "generate": competent.generate},
}
SIDES = (*BASELINES, "library")


@dataclass(frozen=True)
class Letters(Task):
    """Prompts of ``width`` tokens; the reward is a share of letters, and every other problem rewards nothing."""

    width: int

    def problem(self, split: str, seed: int, index: int) -> Problem:
        digits = f"{index % 1000:0{self.width - 2}d}"
        return Problem(digits, partial(share_of_letters, worth=float(index % 2)), answer="e")


def share_of_letters(text: str, worth: float) -> dict[str, float]:
    return {"reward": worth * sum("a" <= c <= "m" for c in text) / max(1, len(text))}


class Timed(ESPOModule):
    """`ESPOModule` that notes the user CPU seconds of its three phases."""

    spent = dict.fromkeys(PHASES, 0.0)

    def _timed(self, phase: str, function, *args):
        start = user_seconds()
        result = function(*args)
        self.spent[phase] += user_seconds() - start
        return result

    def complete(self, *args):
        return self._timed("rollout", super().complete, *args)

    def judge_and_score(self, *args):
        return self._timed("score", super().judge_and_score, *args)

    def update(self, *args):
        return self._timed("update", super().update, *args)


class Alternate(Callback):
    """Times each batch of the library, and after it one outer step of every baseline.

    A step of the library lasts from the end of this callback to its next start: loading, logging and everything
    else that Lightning does is in it.
    """

    def __init__(self, baselines: dict[str, Straightforward], prompts: torch.Tensor):
        self.baselines, self.prompts = baselines, prompts
        self.runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = clocks()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.runs["library"].append({**since(self.start), **pl_module.spent})
        for side, baseline in self.baselines.items():
            start = clocks()
            phases = baseline.outer_step(self.prompts, plain_reward)
            self.runs[side].append({**since(start), **phases})
        pl_module.spent = dict.fromkeys(PHASES, 0.0)
        self.start = clocks()


def clocks() -> tuple[float, float]:
    """User CPU and wall seconds."""
    return user_seconds(), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    """What `clocks` has advanced by."""
    return dict(zip(("step", "wall"), (now - then for now, then in zip(clocks(), start))))


def plain_reward(completion: torch.Tensor) -> torch.Tensor:
    return (completion % 2).float().mean(1)


def make_baseline(policy: Policy, work: Workload, side: str) -> Straightforward:
    """A trainer of `BASELINES`, on its own copy of the weights."""
    model = deepcopy(policy.model)
    return Straightforward(
        model=model,
        reference=deepcopy(model).requires_grad_(False),
        optimizer=torch.optim.AdamW(model.parameters(), lr=LR),
        mask_id=policy.mask_id,
        length=work.length,
        block=work.block,
        steps=work.steps,
        group=work.group,
        updates=work.updates,
        draws=work.draws,
        micro_batch=work.micro_batch or work.prompts * work.group,
        clip_range=CLIP,
        beta=BETA,
        max_norm=MAX_NORM,
        generator=torch.Generator().manual_seed(0),
        **BASELINES[side],
    )


def fit(policy: Policy, work: Workload, setting: Setting, batches: int, callbacks: list[Callback]) -> None:
    """Train with the library."""
    arguments = {
        "decoding": Decoding(work.length, work.block, work.steps),
        "group_size": work.group,
        "updates": work.updates,
        "likelihood": ELBO(draws=work.draws),
        "objective": PolicyGradient(clip_range=CLIP, beta=BETA),
        "optimizer": partial(torch.optim.AdamW, lr=LR),
        "max_grad_norm": MAX_NORM,
        "micro_batch": work.micro_batch,
        "compile": "inductor" if setting.compile else None,
    }
    policy.to(getattr(torch, setting.dtype)).model.set_attn_implementation(setting.attention)
    module = Timed(policy, **{**arguments, **setting.module})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            log_every_n_steps=1,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=callbacks,
        )
        trainer.fit(module, datamodule=PromptDataModule(Letters(work.width), batch_size=work.prompts, batches=batches))


def prepare(work: Workload) -> tuple[Policy, torch.Tensor]:
    """A policy and prompts [Q, P]."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    policy = random_policy(*SIZES[work.size], work.vocabulary)
    problems = [Letters(work.width).problem("train", 0, i) for i in range(work.prompts)]
    return policy, policy.encode([problem.prompt for problem in problems]).ids


def time_all(work: Workload, setting: Setting, repeats: int) -> tuple[dict[str, list], float, dict[str, dict]]:
    """Runs of all sides, warm-up first; FLOP/s of a matrix product; differences of each baseline on equal masks."""
    policy, prompts = prepare(work)
    baselines = {side: make_baseline(policy, work, side) for side in BASELINES}
    rows = prompts.repeat_interleave(work.group, 0)
    differences = {side: assert_same(baseline, policy, rows) for side, baseline in baselines.items()}
    alternate = Alternate(baselines, prompts)
    peak = matmul_peak()
    fit(policy, work, setting, repeats + 1, [alternate])
    return alternate.runs, max(peak, matmul_peak()), differences


def measure(name: str, work: Workload, setting: Setting, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    sides, peak, differences = in_fresh_process(time_all, work, setting, repeats)
    row: dict[str, Any] = {
        "name": name,
        "repeats": repeats,
        **asdict(work),
        **asdict(setting),
        "differences": differences,
    }
    for side, runs in sides.items():
        row[side] = {key: summary([run[key] for run in runs[1:]]) for key in ("step", "wall", *PHASES)}
        row[side]["warm_up"] = runs[0]["step"]
        tokens = work.prompts * work.group * work.length
        row[side]["tokens_per_second"] = {key: tokens / row[side][key]["median"] for key in ("rollout", "step")}
        if setting.same_work:
            update = work.flops(0, 2 * work.updates * work.draws)
            row[side]["share_of_peak"] = work.step_flops / row[side]["step"]["median"] / peak
            row[side]["update_share_of_peak"] = update / row[side]["update"]["median"] / peak
    row["matmul_gflops"] = peak / 1e9
    return row | {"ratio": ratios(sides)}


def ratios(sides: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Library / baseline, of each step of the library and that of the baseline after it: median and range."""
    return {
        side: {
            key: summary([own[key] / other[key] for own, other in zip(sides["library"][1:], sides[side][1:])])
            for key in ("step", *PHASES)
        }
        for side in BASELINES
    }


HEADER = (
    f"{'size':6} {'setting':20} {'side':16} {'step, s':>20} {'wall':>7} {'rollout':>8} {'score':>8} {'update':>8} "
    f"{'tokens/s':>9} {'peak':>5}  {'ratio':>17}"
)


def table(row: dict[str, Any]) -> str:
    """A line for each side; a baseline's ratio is that of the library to it."""
    lines = []
    for side in SIDES:
        s = row[side]
        step = f"{s['step']['median']:.2f} [{s['step']['min']:.2f}, {s['step']['max']:.2f}]"
        phases = " ".join(f"{s[phase]['median']:8.2f}" for phase in PHASES)
        share = f"{s['share_of_peak']:5.0%}" if "share_of_peak" in s else "    -"
        step_ratio = row["ratio"].get(side, {}).get("step")
        ratio = "{median:.2f} [{min:.2f}, {max:.2f}]".format_map(step_ratio) if step_ratio else ""
        lines.append(
            f"{row['size']:6} {row['name']:20} {side:16} {step:>20} {s['wall']['median']:7.2f} {phases} "
            f"{s['tokens_per_second']['step']:9.0f} {share}  {ratio:>17}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.87M"])
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each side (default: 7)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="some rows (default: all)")
    parser.add_argument("--quick", action="store_true", help="only the first row, two repeats")
    for name in OF_THE_WORKLOAD:
        parser.add_argument(f"--{name}", type=int, help=f"of every row (default: {getattr(Workload(), name)})")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step.json")
    arguments = parser.parse_args()
    chosen = {name: n for name in OF_THE_WORKLOAD if (n := getattr(arguments, name)) is not None}
    names, repeats = (arguments.rows[:1], 2) if arguments.quick else (arguments.rows, arguments.repeats)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"host": host(), "rows": []}
    print(HEADER)
    for size in arguments.sizes:
        for name in names:
            work, setting = ROWS[name]
            case = {"name": name} | asdict(replace(work, size=size, **chosen))
            row = next((r for r in stored["rows"] if case.items() <= r.items()), None)
            if row is None:
                row = measure(name, replace(work, size=size, **chosen), setting, repeats) | {"commit": commit(ROOT)}
                stored["rows"].append(row)
                # an objective among the arguments of the module has functions
                arguments.output.write_text(json.dumps(stored, indent=1, default=lambda f: f.__name__) + "\n")
            print(table(row), flush=True)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
