"""Causal policies in training: GRPO and GSPO with exact likelihoods, supervised training, command lines."""

import json
from functools import partial

import pytest
import torch
from causal_cases import causal
from conftest import Letters, fit, parameters, small_module
from lightning.pytorch import Callback

from espo_lightning import (
    ELBO,
    Autoregressive,
    AutoregressiveDecoding,
    Decoding,
    LoRA,
    MeanField,
    evaluate,
    k2_u,
    k3,
    load_policy,
    new_policy,
    sequence_ratio,
    sft,
    standardised,
    token_ratio,
)
from espo_lightning.training.supervised import SFTModule

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


# ---- ESPOModule ------------------------------------------------------------------------------------------------------


EXACT = {"likelihood": Autoregressive(), "decoding": AutoregressiveDecoding(4)}
GRPO = EXACT | {"ratio": token_ratio, "advantage": standardised, "clip_range": 0.2, "beta": 0.0}
GSPO = EXACT | {"ratio": sequence_ratio, "advantage": standardised, "clip_range": 4e-4, "beta": 0.0}


def causal_module(**settings):
    policy = new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, seed=3, causal=True)
    return small_module(policy, **EXACT | {"group_size": 16} | settings)


class Record(Callback):
    def __init__(self):
        self.metrics, self.rollouts = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.rollouts.append(module.last_rollout)


def train(module, batches: int = 2) -> Record:
    record = Record()
    fit(module, batches, callbacks=[record])
    return record


@pytest.mark.parametrize("settings", [GRPO, GSPO, GRPO | {"beta": 0.01, "micro_batch": 3}])
def test_ratio_is_exactly_one_at_the_first_update_and_moves_afterwards(settings):
    first = train(causal_module(**settings, updates=1), batches=1).metrics[0]
    assert first["train/log_ratio_max"] == first["train/kl"] == first["train/clip_high"] == 0.0
    module = causal_module(**settings, updates=3)
    passes = []
    score = module.score
    module.score = lambda *args: passes.append(args) or score(*args)
    record = train(module, batches=1)
    assert record.metrics[0]["train/log_ratio_max"] > 1e-4
    assert record.metrics[0]["train/score_per_token"] < 0
    assert "rollout/mask_tokens" not in record.metrics[0]
    assert len(record.rollouts[0].masks) == 1  # there is nothing to draw anew
    assert len(passes) == bool(settings["beta"])  # so no old pass, and one of the reference


@pytest.mark.slow
@pytest.mark.parametrize("settings", [GRPO, GSPO])
def test_grpo_and_gspo_learn_a_task_that_any_correct_gradient_solves(settings):
    record = train(causal_module(**settings, group_size=8, optimizer=partial(torch.optim.Adam, lr=1e-2)), 60)
    rewards = [m["train/reward"] for m in record.metrics]
    assert sum(rewards[:3]) / 3 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.9


class DrawnAnew(Autoregressive):
    """As if every update had masks of its own."""

    random = True


def test_memory_options_do_not_change_the_updates():
    modules = [causal_module(beta=0.1, optimizer=partial(torch.optim.SGD, lr=10.0), **change)
               for change in ({}, {"likelihood": DrawnAnew()}, {"micro_batch": 3}, {"view_by_view": True})]  # fmt: skip
    start = parameters(modules[0]).clone()
    for module in modules:
        fit(module)
    assert (parameters(modules[0]) - start).abs().max() > 1e-3
    assert torch.equal(parameters(modules[1]), parameters(modules[0]))
    for module in modules[2:]:
        torch.testing.assert_close(parameters(module), parameters(modules[0]), rtol=1e-4, atol=2e-6)


def test_options_have_an_effect():
    base = {"updates": 3, "beta": 0.1, "clip_range": 0.02}
    changes = [
        {}, {"ratio": token_ratio}, {"kl": k3}, {"advantage": standardised}, {"clip_range": 1e-4}, {"beta": 0.0},
        {"decoding": AutoregressiveDecoding(4, 0.5)}, {"decoding": AutoregressiveDecoding(6)},
    ]  # fmt: skip
    results = []
    for change in changes:
        module = causal_module(**base | change)
        fit(module)
        results.append(parameters(module))
    assert all(not torch.equal(one, other) for i, one in enumerate(results) for other in results[:i])


def test_adapters_train_against_the_base_without_them(tmp_path):
    new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, causal=True).save(tmp_path)
    policy = load_policy(tmp_path, lora=LoRA(rank=2, alpha=4))
    settings = {"group_size": 16, "beta": 0.1, "optimizer": partial(torch.optim.Adam, lr=1e-2)}
    assert train(small_module(policy, **EXACT | settings)).metrics[0]["train/kl"] > 0


def diffusion():
    return new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: causal_module(likelihood=ELBO()),
            r"cannot denoise, and ELBO scores .*Autoregressive.*sft",
        ),
        (lambda: causal_module(likelihood=MeanField()), "cannot denoise, and MeanField scores denoising"),
        (lambda: causal_module(decoding=Decoding(4, 4, 4)), "cannot denoise: use decoding=AutoregressiveDecoding"),
        (lambda: small_module(diffusion(), likelihood=Autoregressive()), "the policy is a diffusion model"),
        (lambda: small_module(diffusion(), decoding=AutoregressiveDecoding(4)), "needs a causal policy"),
        (lambda: causal_module(kl=k2_u), "independent mask draws"),
        (lambda: causal_module(decoding=AutoregressiveDecoding(4, 0.0)), "temperature is 0"),
        (lambda: SFTModule(causal(), likelihood=ELBO()), "cannot denoise"),
        (lambda: SFTModule(diffusion(), likelihood=Autoregressive()), "the policy is a diffusion model"),
    ],
)
def test_contradictions_of_policy_likelihood_and_decoding_raise_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- command lines ---------------------------------------------------------------------------------------------------


def test_sft_minimises_the_log_likelihood_of_answer_and_end():
    """Its first loss is that of transformers' logits; an answer as long as the canvas has no end to learn."""
    policy = new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, causal=True)
    for length, scored in ((6, 5), (4, 4)):
        problems = [Letters().problem("train", 0, i) for i in range(2)]
        module = SFTModule(policy, length=length, likelihood=Autoregressive())
        with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):  # nothing is logged
            loss = module.training_step(problems, 0)
        expected = 0.0
        for problem in problems:
            prompt = policy.encode([problem.prompt]).ids
            answer = torch.tensor([[policy.tokenizer.convert_tokens_to_ids("a")] * 4 + [policy.tokenizer.eos_token_id]])
            logits = policy.model(torch.cat([prompt, answer], 1)).logits[0, -6:-1]
            expected -= logits.log_softmax(-1).gather(1, answer.T)[:scored].sum() / length / 2
        torch.testing.assert_close(loss, expected)


def test_a_causal_policy_is_made_trained_on_and_evaluated_from_the_command_line(tmp_path, capsys):
    exact = ["--model.likelihood=Autoregressive", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    small = ["--data.batches=3", "--data.batch_size=4", "--model.policy.hidden_size=16", "--model.policy.heads=2"]
    sft.main([f"--run_dir={tmp_path / 'a'}", *small, *exact, "--model.policy.causal=true"])
    folder, output = tmp_path / "a" / "policy", tmp_path / "e.json"
    again = load_policy(folder)
    assert (again.causal, again.mask_id, again.shift) == (True, None, 1)
    continued = ["--model.policy=espo_lightning.load_policy", f"--model.policy.path={folder}"]
    sft.main([f"--run_dir={tmp_path / 'b'}", *continued, "--data.batches=1", "--data.batch_size=4", *exact])
    flags = [f"--policy.path={folder}", "--problems=3", f"--output={output}"]
    evaluate.main([*flags, "--decoding=AutoregressiveDecoding", "--decoding.length=16", "--decoding.temperature=0"])
    assert json.loads(output.read_text())["n"] == 3
    capsys.readouterr()
    output.unlink()
    with pytest.raises(SystemExit) as error:
        evaluate.main(flags)
    assert error.value.code == 2
    assert "causal model, which cannot denoise" in capsys.readouterr().err
