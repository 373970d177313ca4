"""Every numeric argument of every public class and program refuses nonsense, and names itself and what came."""

import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Letters, small_module, small_policy
from range_cases import NONE, ONE, SEED, SHARE, Real, Whole, numbers_of

import espo_lightning
from espo_lightning import (
    ELBO,
    FSDP,
    FSDP2,
    AutoregressiveDecoding,
    BlockDecoding,
    BlockELBO,
    BlockViews,
    Decoding,
    DeepSpeed,
    ESPOModule,
    Layout,
    LoRA,
    MeanField,
    Policy,
    PolicyGradient,
    PromptDataModule,
    QuadratureELBO,
    RandomViews,
    Sandwich,
    SelfNormalised,
    TimeELBO,
    TokenViews,
    dream_schedule,
    espo_loss,
    even_schedule,
    fit,
    load_policy,
    new_policy,
    origin_schedule,
    tasks,
)
from espo_lightning.cost import cost
from espo_lightning.evaluate import evaluate
from espo_lightning.export import export
from espo_lightning.lab.costs import Hardware
from espo_lightning.ranges import check_counts, check_numbers
from espo_lightning.tasks.code import CodeTask
from espo_lightning.tasks.maths import GSM8K, MATH
from espo_lightning.tasks.rows import Rows, RowTask
from espo_lightning.training.checks import check_optimizer
from espo_lightning.training.supervised import SFTModule

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


POSITIVE, CHANCE = Real("(0, inf)"), Real("[0, 1)")
TASK = {"task": Letters(), "policy": None}
DECODING = {
    "length": ONE,
    "block_length": ONE,
    "steps": ONE,
    "temperature": Real("[0, inf)"),
    "top_p": Real("(0, 1]"),
    "order_temperature": Real("[0, inf)"),
    "threshold": Real("(0, 1)"),
    "refresh": ONE,
    "corrector": NONE,
}
CODE = {"held_out": SHARE, "timeout": POSITIVE, "memory_mb": ONE}


def sft(**settings: Any) -> SFTModule:
    return SFTModule(small_policy(), **{"length": 4, **settings})


def policy(**facts: Any) -> Policy:
    made = small_policy()
    return Policy(made.model, made.tokenizer, **{"mask_id": made.mask_id, **facts})


def loss(**settings: Any) -> Any:
    terms = torch.zeros(1, 2, 3)
    return espo_loss(terms, terms, terms, torch.zeros(2), **{"clip_range": 0.1, "beta": 0.1, **settings})


def schedule(make: Callable, **settings: int) -> Any:
    return make(**{"tokens": 4, "steps": 2, **settings})


def trl(prompts, completions) -> list[float]:
    return [0.0 for _ in completions]


def row_length(row, text) -> dict[str, float]:
    return {"reward": float(len(text))}


# what makes one (with settings that are fine, but for those that the test changes), and the range of each number
NUMBERS: dict[Callable, tuple[Callable, dict[str, Whole | Real]]] = {
    ESPOModule: (
        small_module,
        {
            "group_size": Whole(2),
            "updates": ONE,
            "reference_sync": ONE,
            "warmup": NONE,
            "max_grad_norm": Real("(0, inf]"),
            "micro_batch": ONE,
            "max_skipped": NONE,
            "max_prompt_length": ONE,
            "seed": SEED,
        },
    ),
    SFTModule: (sft, {"length": ONE, "warmup": SHARE, "max_prompt_length": ONE, "seed": SEED}),
    PromptDataModule: (
        PromptDataModule,
        {"batch_size": ONE, "batches": ONE, "eval_problems": NONE, "eval_batch_size": ONE, "seed": SEED},
    ),
    Policy: (policy, {"mask_id": NONE, "shift": Whole(0, 1)}),
    LoRA: (LoRA, {"rank": ONE, "alpha": POSITIVE, "seed": SEED}),
    new_policy: (
        new_policy,
        {"hidden_size": ONE, "layers": ONE, "heads": ONE, "intermediate_size": ONE, "seed": SEED, "block": ONE},
    ),
    Decoding: (Decoding, DECODING),
    BlockDecoding: (BlockDecoding, DECODING | {"corrector": Whole(0, 0)}),
    Layout: (Layout, {"block": ONE}),
    load_policy: (partial(load_policy, "bundled:sudoku"), {"block": ONE}),
    AutoregressiveDecoding: (AutoregressiveDecoding, {"length": ONE, "temperature": Real("[0, inf)")}),
    even_schedule: (partial(schedule, even_schedule), {"tokens": ONE, "steps": ONE}),
    dream_schedule: (partial(schedule, dream_schedule), {"tokens": ONE, "steps": ONE}),
    origin_schedule: (partial(schedule, origin_schedule), {"tokens": ONE, "steps": ONE}),
    ELBO: (partial(ELBO, coupled=False), {"draws": ONE, "smallest_count": Whole(0, 1)}),
    BlockELBO: (partial(BlockELBO, coupled=False), {"draws": ONE, "smallest_count": Whole(0, 1), "block": ONE}),
    TimeELBO: (TimeELBO, {"draws": ONE, "low": CHANCE, "high": Real("(0, 1]")}),
    QuadratureELBO: (QuadratureELBO, {"nodes": ONE}),
    MeanField: (MeanField, {"prompt_noise": CHANCE}),
    TokenViews: (TokenViews, {"low": Real("(0, 1)"), "high": Real("(0, 1)")}),
    RandomViews: (RandomViews, {"draws": ONE, "low": Real("(0, 1)"), "high": Real("(0, 1)")}),
    BlockViews: (BlockViews, {"draws": ONE, "block": ONE, "noise": CHANCE}),
    PolicyGradient: (
        PolicyGradient,
        {
            "clip_range": Real("[0, inf]"),
            "clip_nats": Real("[0, inf]"),
            "clip_high": Real("[0, inf]"),
            "beta": Real("[0, inf)"),
        },
    ),
    espo_lightning.Balance: (
        espo_lightning.Balance,
        {"temperature": POSITIVE, "clip_range": Real("[0, inf]"), "beta": Real("[0, inf)")},
    ),
    espo_lightning.TruncatedRatio: (espo_lightning.TruncatedRatio, {"clip": Real("(0, 1)")}),
    espo_lightning.Trajectory: (
        espo_lightning.Trajectory,
        {"draws": ONE, "merge": ONE, "temperature": POSITIVE},
    ),
    espo_lightning.HighestEntropy: (espo_lightning.HighestEntropy, {"draws": ONE, "temperature": POSITIVE}),
    espo_lightning.OneMasked: (espo_lightning.OneMasked, {"draws": ONE}),
    espo_loss: (loss, {"clip_range": Real("[0, inf]"), "beta": Real("[0, inf)")}),
    SelfNormalised: (SelfNormalised, {"cap": Real("(0, inf]")}),
    Sandwich: (Sandwich, {"beta": POSITIVE, "mix": SHARE}),
    DeepSpeed: (DeepSpeed, {"stage": Whole(1, 2), "bucket_size": ONE}),
    tasks.Sudoku: (tasks.Sudoku, {"empty": Whole(1, 12), "right": SHARE}),
    tasks.Chain: (tasks.Chain, {"steps": Whole(8), "right": SHARE}),
    tasks.Countdown: (
        tasks.Countdown,
        {"largest": Whole(2), "largest_target": Whole(4), "format_reward": SHARE, "right": SHARE},
    ),
    tasks.Weighted: (
        lambda extra=0.1, **weight: tasks.Weighted(
            Letters(), extra={"espo_lightning.tasks.rewards.brevity": extra}, **weight
        ),
        {"weight": Real("(-inf, inf)"), "extra": Real("(-inf, inf)")},
    ),
    tasks.TRLReward: (
        lambda extra=0.1, **weight: tasks.TRLReward(
            trl, extra={"espo_lightning.tasks.rewards.brevity": extra}, **weight
        ),
        {"weight": Real("(-inf, inf)"), "extra": Real("(-inf, inf)")},
    ),
    Rows: (partial(Rows, verifier=row_length), {"held_out": SHARE}),
    GSM8K: (GSM8K, {"held_out": SHARE, "copied": SHARE}),
    MATH: (MATH, {"held_out": SHARE, "copied": SHARE}),
    tasks.HumanEval: (tasks.HumanEval, CODE),
    tasks.MBPP: (tasks.MBPP, CODE),
    tasks.AceCode: (tasks.AceCode, CODE),
    evaluate: (
        partial(evaluate, **TASK),
        {"problems": ONE, "samples": ONE, "batch_size": ONE, "seed": SEED, "threads": ONE},
    ),
    cost: (
        lambda gpus=8, **settings: cost(gpus=(gpus,), **settings),
        dict.fromkeys(
            ("prompt_length", "prompts_per_gpu", "group_size", "updates", "micro_batch", "lora_rank", "gpus", "shards"),
            ONE,
        ),
    ),
    Hardware: (
        Hardware,
        {
            "tflops": POSITIVE,
            "utilisation": Real("(0, 1]"),
            "node": ONE,
            "nvlink": POSITIVE,
            "network": POSITIVE,
            "memory": POSITIVE,
        },
    ),
}
# public, with numbers that are no settings, or that somebody else checks
EXEMPT = {
    FSDP: "Lightning's own arguments",
    FSDP2: "Lightning's own arguments",
    RowTask: "abstract; its tasks stand above",
    espo_lightning.truncated_ratio: "TruncatedRatio holds its number",
}


def public() -> list[Callable]:
    """Everything public that is called: but for protocols and records, which hold what others have checked."""
    names = [getattr(espo_lightning, name) for name in espo_lightning.__all__]
    names += [getattr(tasks, name) for name in tasks.__all__] + [SFTModule, Hardware, RowTask, CodeTask]
    names += [evaluate, cost, export]
    return [x for x in names if inspect.isfunction(x) or (inspect.isclass(x) and not issubclass(x, tuple))]


def test_every_number_has_its_range_here():
    """A new argument without an entry fails."""
    for made in public():
        if made in EXEMPT or inspect.isabstract(made) or made is CodeTask:
            continue
        assert numbers_of(made) == set(NUMBERS[made][1] if made in NUMBERS else ()), made


CASES = [
    pytest.param(make, name, domain.nonsense, id=f"{made.__name__}-{name}")
    for made, (make, ranges) in NUMBERS.items()
    for name, domain in ranges.items()
]


@pytest.mark.parametrize(("make", "name", "nonsense"), CASES)
def test_nonsense_is_refused_and_named(make, name, nonsense):
    for value in nonsense:
        with pytest.raises(ValueError) as error:
            make(**{name: value})
        message = str(error.value)
        assert re.search(rf"\b{name}\b", message), message
        assert str(value) in message, message


@pytest.mark.parametrize("value", [1, 2**63 - 1, True, None])
def test_counts_pass(value):
    check_counts(1, n=value)


@pytest.mark.parametrize(
    ("interval", "inside"), [("[0, 1]", [0, 0.5, 1, None]), ("(0, inf]", [1e-300, math.inf]), ("(-inf, inf)", [-1e300])]
)
def test_numbers_pass(interval, inside):
    for value in inside:
        check_numbers(interval, x=value)


def test_every_optimizer_of_torch_is_tried():
    """What each does with bad numbers is its own; a loss is never climbed, and no weight becomes NaN."""
    found = [x for x in vars(torch.optim).values() if inspect.isclass(x) and issubclass(x, torch.optim.Optimizer)]
    assert len(found) > 10
    for made in set(found) - {torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.Muon}:
        check_optimizer(made, {1, 2})
        for name, value in [("lr", -1.0), ("lr", math.nan), ("weight_decay", -1.0), ("momentum", math.nan)]:
            with pytest.raises(ValueError, match="optimizer"):
                check_optimizer(partial(made, **{name: value}), {1, 2})
        if made is not torch.optim.SparseAdam:  # it cannot be tried on a dense gradient, nor made without a rate
            check_optimizer(partial(made, lr=0.0), {1, 2})
            with pytest.raises(ValueError, match="climbs"):
                check_optimizer(partial(made, maximize=True), {1, 2})
    with pytest.raises(ValueError, match="NaN or infinite in two steps"):
        check_optimizer(partial(torch.optim.SGD, lr=math.inf), {2})
    with pytest.raises(ValueError, match="gradients alone"):
        check_optimizer(torch.optim.LBFGS, {2})
    with pytest.raises(ValueError, match=r"must make a torch\.optim\.Optimizer, got a list"):
        check_optimizer(list, {2})
    check_optimizer(torch.optim.Muon, {2})
    with pytest.raises(ValueError, match="2D"):  # norms are vectors
        check_optimizer(torch.optim.Muon, {1, 2})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model.optimizer=Adam", "--model.optimizer.lr=-1"],
            "optimizer cannot be made: Invalid learning rate: -1.0",
        ),
        (["--model.max_grad_norm=-1"], "max_grad_norm must lie in (0, inf], got -1.0"),
        (["--model.warmup=-1"], "warmup must be at least 0, got -1"),
        (["--seed=-1"], "seed must be at least 0, got -1"),
        (["--model.objective.clip_range=-0.1"], "clip_range must be 0 or positive"),
        (["--data.task=HumanEval", "--data.task.timeout=-1"], "timeout must lie in (0, inf), got -1.0"),
        (["--model.policy.lora.rank=0"], "LoRA needs rank >= 1"),
    ],
)
def test_the_program_ends_with_one_message_and_nothing_is_written(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        fit.main(["--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'run'}", *flags])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
