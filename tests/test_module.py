"""The training step: invariants, the effect of every option, resume."""

import math
from functools import partial

import pytest
import torch
from conftest import Letters, fit, parameters, share_of_a, small_module, small_policy
from lightning.pytorch import Callback
from module_cases import Record, run

from espo_lightning import (
    ELBO,
    Decoding,
    MeanField,
    PromptDataModule,
    QuadratureELBO,
    TimeELBO,
    k1,
    k1_score,
    k2_u,
    k3,
    mean_centred,
    random_order,
    score,
    standardised,
    token_ratio,
)
from espo_lightning.training.rollout import chunks

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


# ---- invariants ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("likelihood", [ELBO(), ELBO(draws=2), MeanField()])
def test_ratio_is_exactly_one_at_the_first_update(likelihood, micro_batch):
    record = run(small_module(updates=1, likelihood=likelihood, micro_batch=micro_batch), batches=1)
    assert record.metrics[0]["train/log_ratio_max"] == 0.0
    assert record.metrics[0]["train/kl"] == 0.0  # the reference is still the policy, on the same masks
    assert record.metrics[0]["train/clip_low"] == record.metrics[0]["train/clip_high"] == 0.0


def test_old_scores_equal_those_of_a_separate_pass_bit_for_bit():
    """Why the first update needs no old pass: with the same micro-batches the numbers are the same."""
    module = small_module(micro_batch=3)
    problems = next(iter(PromptDataModule(Letters(), batch_size=2, batches=1).train_dataloader()))
    prompts, completion, keys = module.complete(problems)
    assert prompts.mask is not None  # padded
    masks = module.likelihood.draw(keys, 4)
    separate = module.score(module.policy, prompts, completion, masks) * masks.weight
    with_graph = [score(module.policy, prompts.of(r), completion[r], masks.of(r)) for r in chunks(8, 3)]
    assert torch.equal(separate, torch.cat(with_graph, 1))
    assert with_graph[0].requires_grad


def test_ratio_moves_away_from_one_afterwards():
    record = run(small_module(updates=3), batches=1)
    assert record.metrics[0]["train/log_ratio_max"] > 1e-4


@pytest.mark.parametrize("likelihood", [ELBO(draws=2), ELBO(coupled=False), MeanField()])
@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"micro_batch": 3}, {"view_by_view": True}])
def test_memory_options_do_not_change_the_updates(change, likelihood):
    plain, changed = small_module(likelihood=likelihood), small_module(likelihood=likelihood, **change)
    start = parameters(plain).clone()
    for module in (plain, changed):
        module.optimizer = partial(torch.optim.SGD, lr=10.0)
        fit(module)
    assert (parameters(plain) - start).abs().max() > 1e-3
    torch.testing.assert_close(parameters(plain), parameters(changed), rtol=1e-4, atol=2e-6)


def test_frozen_reference_is_bit_equal_after_training():
    module = small_module()
    start = parameters(module).clone()
    fit(module, batches=3)
    reference = torch.cat([p.flatten() for p in module.reference.parameters()])
    assert torch.equal(reference, start)
    assert not torch.equal(parameters(module), start)


def test_reference_follows_every_n_rollouts():
    module = small_module(reference_sync=2)
    record = run(module, batches=3)
    reference = torch.cat([p.flatten() for p in module.reference.parameters()])
    assert torch.equal(reference, record.before[2])


def test_same_seed_same_parameters_other_seed_other_parameters():
    results = []
    for seed in (0, 0, 1):
        module = small_module(seed=seed)
        fit(module, seed=0)
        results.append(parameters(module))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_group_shares_its_prompt_and_the_advantages_its_rewards():
    rollout = run(small_module(), batches=1).rollouts[0]
    assert rollout.completion.shape == (8, 4)
    assert rollout.rewards.shape == (2, 4)
    assert torch.equal(rollout.prompts.ids[:4], rollout.prompts.ids[:1].expand(4, -1))
    expected = (rollout.rewards - rollout.rewards.mean(1, keepdim=True)) * 4 / 3
    torch.testing.assert_close(rollout.advantages, expected.flatten())
    assert [v["reward"] for v in rollout.verdicts] == rollout.rewards.flatten().tolist()


def test_masks_are_fresh_for_every_update_and_rollout():
    record = run(small_module(updates=3), batches=2)
    hidden = [m.hidden for r in record.rollouts for m in r.masks]
    assert len(hidden) == 6
    assert all(not torch.equal(a, b) for i, a in enumerate(hidden) for b in hidden[:i])


def test_learns_a_task_that_any_correct_gradient_solves():
    record = run(small_module(policy=small_policy(3), group_size=8, optimizer=partial(torch.optim.Adam, lr=1e-2)), 60)
    rewards = [m["train/reward"] for m in record.metrics]
    assert sum(rewards[:3]) / 3 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.9


def test_skipping_equal_groups_is_exact_and_saves_forward_rows():
    rows = {}
    results = []
    for skip in (False, True):
        module = small_module(beta=0, skip_equal_groups=skip, optimizer=partial(torch.optim.SGD, lr=10.0))
        forward = module.policy.forward
        rows[skip] = 0

        def counting(ids, *args, forward=forward, skip=skip):
            rows[skip] += len(ids)
            return forward(ids, *args)

        module.policy.forward = counting
        record = run(module, batches=4)
        results.append(parameters(module))
    assert max(m["train/zero_variance_groups"] for m in record.metrics) > 0
    assert rows[True] < rows[False]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=2e-6)


def test_masks_once_per_rollout_need_one_pass_of_the_reference_and_none_of_the_old_policy():
    passes = {}
    for fresh in (True, False):
        module = small_module(updates=4, fresh_masks=fresh)
        passes[fresh] = 0
        original = module.score

        def counting(*args, original=original, fresh=fresh):
            passes[fresh] += 1
            return original(*args)

        module.score = counting
        fit(module, batches=1)
    assert passes == {True: 3 + 4, False: 1}


class CountGraphs:
    """A torch.compile backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.slow
def test_compiling_changes_the_execution_and_not_the_numbers(monkeypatch):
    backend = CountGraphs()
    monkeypatch.setattr(torch.compiler, "list_backends", lambda exclude_tags: [backend])
    plain, compiled = small_module(), small_module(compile=backend)
    for module in (plain, compiled):
        module.optimizer = partial(torch.optim.SGD, lr=10.0)
        fit(module, 1)
    assert backend.graphs > 0
    torch.testing.assert_close(parameters(plain), parameters(compiled), rtol=1e-4, atol=2e-6)
    assert list(plain.state_dict()) == list(compiled.state_dict())


def test_mixed_precision_scores_in_float32():
    record, plain = run(small_module(), precision="bf16-mixed"), run(small_module())
    rollout = record.rollouts[0]
    assert rollout.ref[0].dtype == rollout.old[1].dtype == torch.float32
    assert record.metrics[0]["train/log_ratio"] != plain.metrics[0]["train/log_ratio"]
    first = run(small_module(updates=1), batches=1, precision="bf16-mixed").metrics[0]
    assert first["train/log_ratio_max"] == 0.0


# ---- every option has an effect --------------------------------------------------------------------------


BASE = {"updates": 3, "likelihood": ELBO(draws=2), "beta": 0.1, "clip_range": 0.02}
CHANGES = {
    "group_size": {"group_size": 3},
    "updates": {"updates": 2},
    "draws": {"likelihood": ELBO(draws=1)},
    "coupled": {"likelihood": ELBO(draws=2, coupled=False)},
    "stratified": {"likelihood": ELBO(draws=2, stratified=True)},
    "smallest_count": {"likelihood": ELBO(draws=2, coupled=False, smallest_count=1)},
    "time form": {"likelihood": TimeELBO(draws=2)},
    "quadrature": {"likelihood": QuadratureELBO(2)},
    "mean field": {"likelihood": MeanField()},
    "ratio": {"ratio": token_ratio},
    "clip_range": {"clip_range": 1e-4},
    "clip_nats": {"clip_nats": 1e-3},
    "k1": {"kl": k1},
    "k1_score": {"kl": k1_score},
    "k2_u": {"kl": k2_u},
    "k3": {"kl": k3},
    "beta": {"beta": 0.0},
    "advantage": {"advantage": mean_centred, "max_grad_norm": None},
    "standardised": {"advantage": standardised},
    "reference_sync": {"reference_sync": 1},
    "fresh_masks": {"fresh_masks": False},
    "optimizer": {"optimizer": partial(torch.optim.SGD, lr=1.0)},
    "warmup": {"warmup": 4},
    "max_grad_norm": {"max_grad_norm": 1e-3, "optimizer": partial(torch.optim.SGD, lr=1.0)},
    "seed": {"seed": 5},
    "temperature": {"decoding": Decoding(4, 4, 4, temperature=0.5)},
    "steps": {"decoding": Decoding(4, 4, 2)},
    "block_length": {"decoding": Decoding(4, 2, 4)},
    "length": {"decoding": Decoding(6, 6, 6)},
    "order": {"decoding": Decoding(4, 4, 4, order=random_order)},
}
BASES = {  # where one option is compared at another setting of the others
    "advantage": {"max_grad_norm": None},
    "smallest_count": {"likelihood": ELBO(draws=2, coupled=False)},
    "max_grad_norm": {"optimizer": partial(torch.optim.SGD, lr=1.0)},
}


@pytest.fixture(scope="module")
def trained():
    """Parameters after two rollouts, per setting, computed once."""
    cache = {}

    def train(name: str, settings: dict):
        if name not in cache:
            module = small_module(**{**BASE, **settings})
            fit(module)
            cache[name] = parameters(module)
        return cache[name]

    return train


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_has_an_effect(trained, name):
    base = trained(f"base {name}" if name in BASES else "base", BASES.get(name, {}))
    assert not torch.equal(base, trained(name, CHANGES[name]))


def test_clip_in_nats_equals_the_same_clip_in_the_papers_unit(trained):
    nats = trained("nats", {"clip_nats": 4 * math.log1p(0.02)})
    torch.testing.assert_close(nats, trained("base", {}), rtol=1e-6, atol=1e-7)


# ---- resume ------------------------------------------------------------------------------------------------


class SaveAt(Callback):
    def __init__(self, batch: int, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("change", [{}, {"reference_sync": 2, "warmup": 5}, {"beta": 0.0, "fresh_masks": False}])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, change):
    whole = Record()
    module = small_module(**change)
    trainer = fit(module, 6, callbacks=[whole, SaveAt(2, tmp_path / "x.ckpt")])
    resumed, again = small_module(**change), Record()
    data = PromptDataModule(Letters(), batch_size=2, batches=6, eval_problems=4, eval_batch_size=4)
    second = type(trainer)(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[again],
    )  # fmt: skip
    second.fit(resumed, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert len(again.metrics) == 3
    assert torch.equal(parameters(resumed), parameters(module))
    for mine, expected in zip(again.metrics, whole.metrics[3:]):
        timeless = [k for k in expected if not k.startswith(("time/", "speed/"))]
        assert {k: repr(mine[k]) for k in timeless} == {k: repr(expected[k]) for k in timeless}  # repr: NaN = NaN


def test_checkpoints_hold_no_frozen_reference(tmp_path):
    module = small_module()
    fit(module, 1, callbacks=[SaveAt(0, tmp_path / "x.ckpt")])
    keys = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"].keys()
    assert keys
    assert not any(k.startswith("reference.") for k in keys)


def test_verdicts_of_a_group_follow_their_texts():
    rollout = run(small_module(group_size=8), batches=1).rollouts[0]
    assert [share_of_a("", t)["reward"] for t in rollout.texts] == rollout.rewards.flatten().tolist()
