"""Notebook 05: what a training step costs, predicted and measured, phase by phase."""

import time
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from espo_lightning.decoding.masked import Decoding
from espo_lightning.lab.costs import expected_work
from espo_lightning.lab.flops import decoding_passes, flops
from espo_lightning.lab.network import LLADA_8B
from espo_lightning.lab.studies.arms import PROMPTS, Arm, expected_flops
from espo_lightning.lab.studies.states import train
from espo_lightning.objectives.policy_gradient import PolicyGradient
from espo_lightning.scoring.likelihood import ELBO
from espo_lightning.tasks import Sudoku
from espo_lightning.training.module import ESPOModule

aten = torch.ops.aten


def attention_forward(q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(q, k, v)


def attention_backward(grad, q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


ATTENTION = {  # torch's counter knows the attention kernels of GPUs; this adds the CPU's, by torch's own formulas
    aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


class Measured(ESPOModule):
    """Adds up the FLOPs, the network's calls and the processor seconds of every phase of a training step.

    Counting FLOPs takes time itself: with ``counting`` False there are seconds only.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counting, self.phase = True, None
        self.flops, self.calls, self.seconds, self.kernels = {}, {}, {}, set()
        self.policy.language_model.model.register_forward_pre_hook(self.count_call)

    def count_call(self, *_):
        if self.phase is not None:
            self.calls[self.phase] = self.calls.get(self.phase, 0) + 1

    @contextmanager
    def counted(self, phase: str):
        self.phase, start = phase, time.process_time()
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION) if self.counting else None
        with counter or nullcontext():
            yield
        self.phase = None
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.process_time() - start
        if counter:
            self.flops[phase] = self.flops.get(phase, 0) + counter.get_total_flops()
            self.kernels |= {op for per_op in counter.get_flop_counts().values() for op in per_op}

    def complete(self, problems):
        with self.counted("rollout"):
            return super().complete(problems)

    def score(self, policy, *args):
        with self.counted("old scores" if policy is self.policy else "reference"):
            return super().score(policy, *args)

    def update(self, rollout, u):
        with self.counted("updates"):
            return super().update(rollout, u)


def step_costs(seed: int, *, arms: dict[str, dict], repeats: int) -> dict:
    """Predicted and counted FLOPs of a training step, and its processor seconds, by phase.

    Args:
        arms: name -> settings of an `Arm`.
        repeats: training steps that are timed, after one that is counted.
    """
    result = {}
    for name, settings in arms.items():
        module = Arm(**settings).module(seed, Measured, skip_equal_groups=False)
        train(module, Sudoku(), seed, 1, batch=PROMPTS)
        module.counting, module.seconds = False, {}
        train(module, Sudoku(), seed, repeats, batch=PROMPTS)
        result[name] = {
            "predicted": expected_flops(Arm(**settings)),
            "counted": module.flops,
            "seconds": {phase: seconds / repeats for phase, seconds in module.seconds.items()},
        }
    return {"arms": result}


def paper_costs(draws: list[int], updates: int, steps: int, length: int, prompt_length: int) -> list[dict]:
    """FLOPs of one completion of LLaDA-8B, all weights trained, in units of N D, by the number of draws.

    N are its parameters, D = prompt + canvas tokens. "paper" is its formula, 2 (T + 6 mu M); "all passes" adds old and
    reference scores, 2 (T + 10 mu M); "coupled" and "single" are exact counts of what this library runs.
    """
    rows = []
    for m in draws:
        row = {"draws": m, "paper": 2 * (steps + 6 * updates * m), "all passes": 2 * (steps + 10 * updates * m)}
        for name, coupled in (("single", False), ("coupled", True)):
            decoding = Decoding(length, 32, steps)
            passes = expected_work(
                decoding_passes(decoding, 1, prompt_length + length),
                ELBO(draws=m, coupled=coupled),
                1,
                decoding,
                updates,
                updates=updates,
                objective=PolicyGradient(),
                micro_batch=1,
                view_by_view=False,
            )
            row[name] = sum(flops(LLADA_8B, passes).values()) / LLADA_8B.parameters / (prompt_length + length)
        rows.append(row)
    return rows
