"""NaN, infinity and lost precision: noticed where they arise, named, never saved; and numbers stay what they were."""

import math
import warnings
from functools import partial

import pytest
import torch
from conftest import Letters, fit, parameters, small_module, small_policy
from lightning.pytorch import Callback, Trainer

from espo_lightning import (
    ELBO,
    Autoregressive,
    AutoregressiveDecoding,
    Decoding,
    LoRA,
    PromptDataModule,
    evaluate,
    load_policy,
    new_policy,
    random_order,
    sft,
    standardised,
)
from espo_lightning import fit as fit_program
from espo_lightning.decoding.proposals import greedy_tokens, sample_tokens
from espo_lightning.keys import fold_in
from espo_lightning.tasks.verifiers import BrokenVerifier
from espo_lightning.training import module as rl
from espo_lightning.training import nonfinite, supervised
from espo_lightning.training.supervised import SFTModule

pytestmark = pytest.mark.usefixtures("global_generators_untouched")
SIZE = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24}


class Breaks(torch.optim.SGD):
    """Makes one weight infinite after so many steps; on the two steps of the trial it does not."""

    after = 3

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr)
        self.steps = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.steps += 1
        if self.steps == self.after:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].view(-1)[-1] = math.inf
        return loss


def train_sft(module: SFTModule, batches: int, **trainer) -> Trainer:
    data = PromptDataModule(Letters(), batch_size=2, batches=batches)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False, "limit_val_batches": 0}
    runner = Trainer(**{**settings, **quiet, **trainer})
    runner.fit(module, data)
    return runner


def small_sft(**settings) -> SFTModule:
    return SFTModule(small_policy(), **{"length": 4, "optimizer": partial(torch.optim.AdamW, lr=1e-2), **settings})


def poisoned(value: float = math.nan, causal: bool = False):
    """A policy one of whose weights is no number."""
    policy = new_policy(**SIZE, causal=causal)
    with torch.no_grad():
        policy.model.lm_head.weight[20, 0], policy.model.lm_head.weight[21, 0] = value, -value
    return policy


# ---- weights after a step ----------------------------------------------------------------------------------


def test_a_weight_that_is_not_finite_ends_the_run_and_names_the_rollout():
    # the third step is the first one of rollout 1
    with pytest.raises(
        FloatingPointError, match=r"^rollout 1: weights are NaN or infinite after a step of Breaks.*rate 0\.001.*lower"
    ):
        fit(small_module(optimizer=Breaks), 4)


def test_in_supervised_training_too():
    with pytest.raises(
        FloatingPointError, match=r"^after 3 batches: weights are NaN or infinite after a step of Breaks"
    ):
        train_sft(small_sft(optimizer=Breaks), 4)


@pytest.mark.parametrize("program", [fit_program, sft])
def test_no_such_policy_is_saved_by_the_programs(program, tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--data.batches=6", "--data.batch_size=2", "--checkpoint_every=1", "--trainer.enable_progress_bar=false"]
    flags += ["--trainer.accelerator=cpu", f"--run_dir={run_dir}", "--model.optimizer=test_nonfinite.Breaks"]
    new_policy(**SIZE).save(tmp_path / "policy")
    flags += ["--model.policy=espo_lightning.load_policy", f"--model.policy.path={tmp_path / 'policy'}"]
    if program is fit_program:
        flags += ["--data.eval_problems=4", "--data.eval_batch_size=4", "--model.group_size=2"]
    with pytest.raises((FloatingPointError, SystemExit)) as error:
        program.main(flags)
    assert getattr(error.value, "code", 1) != 0
    assert not (run_dir / "policy").exists()
    kept = sorted((run_dir / "checkpoints").glob("*.ckpt"))
    assert kept
    for path in kept:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(bool(weight.isfinite().all()) for weight in state.values())


def test_large_weights_are_no_infinite_ones():
    """The sum over all weights overflows first; then each is looked at."""
    module = small_module()
    weight = torch.nn.Parameter(torch.full((4,), 3e38))
    optimizer = nonfinite.watched(torch.optim.SGD([weight], lr=1e-3), module, 0)
    module._trainer = type("T", (), {"strategy": type("S", (), {"reduce_boolean_decision": lambda _, x, all: x})()})()
    weight.grad = torch.ones(4)
    optimizer.step()
    with torch.no_grad():
        weight[2] = math.nan
    with pytest.raises(FloatingPointError, match="weights are NaN or infinite"):
        optimizer.step()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_look_costs_one_sum_a_step_and_changes_no_bit(precision, monkeypatch):
    watched = small_module()
    sums = []
    original = nonfinite.get_total_norm
    monkeypatch.setattr(nonfinite, "get_total_norm", lambda weights: sums.append(len(weights)) or original(weights))
    fit(watched, 2, precision=precision)
    assert sums == [len(list(watched.policy.parameters()))] * 4
    plain = small_module()
    monkeypatch.setattr(rl, "watched", lambda optimizer, *_: optimizer)
    fit(plain, 2, precision=precision)
    assert torch.equal(parameters(watched), parameters(plain))


# ---- types of weights ------------------------------------------------------------------------------------


def test_float16_is_not_trained(tmp_path):
    new_policy(**SIZE).save(tmp_path)
    half = load_policy(tmp_path, dtype="float16")
    for make in (lambda: small_module(half), lambda: SFTModule(half)):
        with pytest.raises(ValueError, match="must be float32 or bfloat16 to train, got float16"):
            make()
    adapted = load_policy(tmp_path, dtype="float16", lora=LoRA(rank=2, alpha=2))
    with pytest.raises(ValueError, match="got float16"):
        small_module(adapted)


@pytest.mark.parametrize("kind", ["rl", "sft"])
@pytest.mark.parametrize(
    ("dtype", "rate", "warned"),
    [("bfloat16", 1e-7, True), ("bfloat16", 3e-3, False), ("float32", 1e-7, False)],
)
def test_updates_that_bfloat16_rounds_away_are_told_once_with_the_share_that_moved(kind, dtype, rate, warned, tmp_path):
    new_policy(**SIZE).save(tmp_path)
    policy = load_policy(tmp_path, dtype=dtype)
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "rl":
            fit(small_module(policy, optimizer=optimizer, warmup=3), 4)
        else:
            train_sft(SFTModule(policy, length=4, optimizer=optimizer, warmup=0.2), 10)
    told = [str(w.message) for w in caught if "of the weights moved" in str(w.message)]
    assert len(told) == warned
    if warned:
        share = float(told[0].split("only ")[1].split(" %")[0])
        assert 0 <= share < 10
        assert "bfloat16" in told[0]
        assert f"{rate:g}" in told[0]


# ---- logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(4, 4, 4),
        Decoding(4, 4, 4, temperature=0.0),
        Decoding(4, 4, 2, top_p=0.9, order=random_order),
        Decoding(4, 4, 4, temperature=0.0, threshold=0.9),
        AutoregressiveDecoding(4),
        AutoregressiveDecoding(4, temperature=0.0),
    ],
)
def test_damaged_logits_are_named(value, decoding):
    policy = poisoned(value, causal=isinstance(decoding, AutoregressiveDecoding))
    prompts = policy.encode(["abc", "defg"])
    with pytest.raises(FloatingPointError, match=r"logits are NaN or infinite, at \d+ of \d+ positions"):
        decoding.generate(policy, prompts, torch.arange(2))


def test_finite_logits_pass_as_they_were():
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) * 10
    logits[:, 3] = -math.inf  # as that of the mask token is
    assert torch.equal(greedy_tokens(logits), logits.argmax(-1))
    assert not (sample_tokens(logits, torch.linspace(0, 0.999, 64)) == 3).any()


class Poison(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            with torch.no_grad():
                module.policy.model.lm_head.weight.fill_(math.nan)


def test_the_rollout_is_named():
    with pytest.raises(FloatingPointError, match=r"^rollout 1: logits are NaN or infinite"):
        fit(small_module(), 3, callbacks=[Poison()])
    module = small_module(poisoned())
    with pytest.raises(FloatingPointError, match=r"^the validation after rollout 0: logits are NaN or infinite"):
        fit(module, 1, limit_val_batches=1, num_sanity_val_steps=1)


def test_a_damaged_policy_is_refused_by_name_or_by_its_logits(tmp_path, capsys):
    poisoned().save(tmp_path / "policy")
    with pytest.raises(SystemExit) as error:
        evaluate.main([f"--policy.path={tmp_path / 'policy'}", "--problems=2", f"--output={tmp_path / 'o.json'}"])
    assert error.value.code == 2
    assert "NaN" in capsys.readouterr().err


# ---- rewards -----------------------------------------------------------------------------------------------


def huge(value: float, prompt: str, text: str) -> dict[str, float]:
    return {"reward": value * (1 + len(text)), "exact": 0.0}


def overflowing(rewards: torch.Tensor) -> torch.Tensor:
    return rewards * 1e30


@pytest.mark.parametrize("value", [1e15, -1e15])
def test_an_advantage_beyond_float32_ends_the_run_with_a_sentence(value):
    module = small_module(advantage=overflowing)
    with pytest.raises(FloatingPointError, match=r"^rollout 0: completion \d has the reward .*e\+1.*scale the rewards"):
        fit(module, 1, task=Letters(partial(huge, value)))


def test_a_reward_beyond_float32_is_a_fault_of_its_verifier():
    with pytest.raises(BrokenVerifier, match="advantages overflow"):
        fit(small_module(), 1, task=Letters(partial(huge, 1e300)))


def test_large_rewards_are_fine():
    module = small_module(advantage=standardised)
    fit(module, 1, task=Letters(partial(huge, 1e14)))
    assert parameters(module).isfinite().all()


# ---- one clock of random keys ------------------------------------------------------------------------------


@pytest.fixture
def keys_drawn(monkeypatch):
    """The keys of every draw of masks in supervised training."""
    drawn = []
    original = supervised.Seen.of

    def of(policy, prompts, answers, keys):
        drawn.append(keys.tolist())
        return original(policy, prompts, answers, keys)

    monkeypatch.setattr(supervised.Seen, "of", of)
    return drawn


@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_batch_has_masks_of_its_own(accumulate, keys_drawn):
    train_sft(small_sft(seed=3), 8, accumulate_grad_batches=accumulate, max_epochs=2)
    assert keys_drawn == [fold_in(fold_in(3, n), torch.arange(2)).tolist() for n in range(16)]


def test_resume_inside_of_an_epoch_draws_what_an_uninterrupted_run_does(keys_drawn, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    whole = small_sft()
    train_sft(whole, 8, accumulate_grad_batches=2, callbacks=[Save()])
    again = small_sft()
    data = PromptDataModule(Letters(), batch_size=2, batches=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, enable_model_summary=False, **quiet)
    trainer.fit(again, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert keys_drawn[8:] == keys_drawn[4:8]
    assert again.batches == whole.batches == 8


class Batches:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def test_problems_of_a_validation_have_keys_of_their_own_whatever_the_batches(monkeypatch):
    seen = []

    def generate(self, prompts, keys, decoding):
        seen.append(keys.tolist())
        return torch.full((len(keys), decoding.length), self.policy.eos_id)

    module = small_module(decoding=Decoding(4, 4, 4))
    monkeypatch.setattr(type(module), "generate", generate)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    task = Letters()
    batches = [[task.problem("test", 0, i) for i in part] for part in ((0, 1, 2), (3, 4, 5), (6, 7))]
    trainer.validate(module, Batches(batches), verbose=False)
    assert [key for part in seen for key in part] == fold_in(rl.EVALUATE, torch.arange(8)).tolist()


def test_the_exact_likelihood_has_no_keys_to_draw():
    policy = new_policy(**SIZE, causal=True)
    train_sft(SFTModule(policy, length=4, likelihood=Autoregressive()), 2, accumulate_grad_batches=2)
    assert ELBO().random
    assert not Autoregressive().random
