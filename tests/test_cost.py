"""The cost calculator against what the library really does: FLOPs, calls and bytes of real steps of small policies."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import write
from conftest import fit
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from espo_lightning import ELBO, Decoding, ESPOModule, LoRA, MeanField, load_policy
from espo_lightning import flops as counting
from espo_lightning.cost import read_network
from espo_lightning.flops import decoding_passes, flops, work

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
RANK = 4
DECODING = Decoding(length=16, block_length=8, steps=8)
aten = torch.ops.aten
# torch's counter knows the attention kernels of GPUs; this adds the CPU's, by torch's own formulas
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, out_shape=None, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class Measured(ESPOModule):
    """Counts the FLOPs and the calls of every phase of a training step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.flops, self.calls, self.phase = {}, {}, None
        self.policy.language_model.model.register_forward_pre_hook(self.count_call)

    def count_call(self, *_):
        if self.phase is not None:
            self.calls[self.phase] = self.calls.get(self.phase, 0) + 1

    @contextmanager
    def counted(self, phase):
        self.phase = phase
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            yield
        self.phase = None
        self.flops[phase] = self.flops.get(phase, 0) + counter.get_total_flops()
        self.kernels = {op for per_op in counter.get_flop_counts().values() for op in per_op}

    def complete(self, problems):
        with self.counted("rollout"):
            return super().complete(problems)

    def score(self, policy, *args):
        with self.counted("old scores" if policy is self.policy else "reference"):
            return super().score(policy, *args)

    def update(self, rollout, u):
        with self.counted("updates"):
            return super().update(rollout, u)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write(root / kind, kind) for kind in ("llada", "dream")}


SMALL_LORA = LoRA(rank=RANK, alpha=8)
CASES = {
    "plain": {},
    "more draws and updates": {"likelihood": ELBO(draws=2), "updates": 3},
    "not coupled": {"likelihood": ELBO(coupled=False)},
    "mean field": {"likelihood": MeanField()},
    "no reference": {"beta": 0.0},
    "masks once": {"fresh_masks": False, "updates": 3},
    "micro-batches": {"micro_batch": 3},
    "view by view": {"view_by_view": True, "micro_batch": 3, "likelihood": ELBO(draws=2)},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora": SMALL_LORA},
    "LoRA, masks once": {"lora": SMALL_LORA, "fresh_masks": False, "beta": 0.0},
    "LoRA, view by view": {"lora": SMALL_LORA, "view_by_view": True},
    "LoRA, checkpointing": {"lora": SMALL_LORA, "gradient_checkpointing": True, "micro_batch": 5},
    "GQA": {"kind": "dream"},
    "GQA, LoRA": {"kind": "dream", "lora": SMALL_LORA},
    "GQA, LoRA, checkpointing": {"kind": "dream", "lora": SMALL_LORA, "gradient_checkpointing": True},
    "head in chunks": {"head_bytes": 4 * 64 * 20, "micro_batch": 4},
    "head in chunks, LoRA": {"head_bytes": 4 * 64 * 20, "micro_batch": 4, "lora": SMALL_LORA},
}


@pytest.mark.parametrize("name", CASES)
def test_flops_and_calls_are_those_of_a_real_step(checkpoints, monkeypatch, tmp_path, name):
    """Every phase, exactly: not an estimate within some per cent."""
    case = dict(CASES[name])
    if head_bytes := case.pop("head_bytes", None):
        monkeypatch.setattr("espo_lightning.policy.HEAD_BYTES", head_bytes)
        monkeypatch.setattr(counting, "HEAD_BYTES", head_bytes)
    kind, lora, checkpointing = (
        case.pop("kind", "llada"),
        case.pop("lora", None),
        case.pop("gradient_checkpointing", False),
    )
    folder = checkpoints[kind]
    policy = load_policy(folder, lora=lora, gradient_checkpointing=checkpointing)
    module = Measured(policy, decoding=DECODING, group_size=4, skip_equal_groups=False, **case)
    fit(module, batches=1, folder=tmp_path)
    assert ATTENTION.keys() & module.kernels  # the counter has seen attention

    rollout, network, rank = module.last_rollout, read_network(str(folder)), RANK if lora else 0
    completions, width = len(rollout.completion), rollout.prompts.ids.shape[1] + DECODING.length
    expected = work(
        decoding_passes(DECODING, completions, width),
        rollout.masks,
        updates=module.updates,
        reference=module.beta != 0,
        micro_batch=module.micro_batch or completions,
        view_by_view=module.view_by_view,
    )
    spent = flops(network, expected, rank, checkpointing)
    assert {phase: n for phase, n in spent.items() if n} == module.flops
    calls = {"rollout": expected.rollout, "old scores": expected.old, "updates": expected.terms + expected.updates}
    if rank:  # a frozen copy is another network
        calls["reference"] = expected.reference
    assert {phase: p.calls for phase, p in calls.items() if p.calls} == module.calls
