"""Causal policies: exact likelihoods, cached decoding, GRPO and GSPO, against transformers and enumeration."""

import json
from functools import partial

import pytest
import torch
from conftest import Letters, fit, parameters, small_module
from lightning.pytorch import Callback
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from espo_lightning import (
    ELBO,
    Autoregressive,
    AutoregressiveDecoding,
    Decoding,
    LoRA,
    MeanField,
    Policy,
    Prompts,
    espo_loss,
    evaluate,
    k1,
    k2,
    k2_u,
    k3,
    load_policy,
    new_policy,
    sequence_ratio,
    sft,
    standardised,
    token_ratio,
)
from espo_lightning.decoding.proposals import sample_tokens
from espo_lightning.keys import fold_in, uniform
from espo_lightning.lab.exact import enumerate_completions, exact_kl, exact_policy_gradient
from espo_lightning.policies.reference import make_reference
from espo_lightning.training.supervised import SFTModule

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

PAD, EOS = 0, 1
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


class Tokenizer:
    pad_token_id, eos_token_id = PAD, EOS


def causal(family: str = "llama", vocabulary: int = 9, seed: int = 2, attention: str = "sdpa", **config) -> Policy:
    """Random weights with spread logits, so that no two tokens are nearly tied."""
    make_config, make_model = FAMILIES[family]
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "head_dim": 8}
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    with torch.random.fork_rng(devices=[]):
        model = make_model(make_config(vocab_size=vocabulary, **size, **ids | config))
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.2 if "norm" in name else 0.5, generator=generator)
    return Policy(model.eval(), Tokenizer(), mask_id=None, shift=1, causal=True)


def prompts_of(rows: int, width: int = 5, vocabulary: int = 9, seed: int = 0) -> Prompts:
    """Left-padded prompts of 1 to ``width`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) >= torch.arange(rows).unsqueeze(1) % width
    return Prompts(torch.randint(2, vocabulary, (rows, width), generator=generator).masked_fill(~mask, PAD), mask)


def unpadded(prompts: Prompts, row: int) -> Prompts:
    return Prompts(prompts.ids[row : row + 1, prompts.mask[row]], None)


def terms_of(policy, prompts: Prompts, completion: torch.Tensor) -> torch.Tensor:
    """[B, L]."""
    likelihood = Autoregressive()
    masks = likelihood.draw(torch.zeros(len(completion), dtype=torch.int64), completion.shape[1])
    return likelihood.terms(policy, prompts, completion, masks).squeeze(0)


def some_completions(rows: int = 7, length: int = 6) -> torch.Tensor:
    """Ends at the first, at a middle and at the last position, and none at all; junk after the end."""
    completion = torch.randint(2, 9, (rows, length), generator=torch.Generator().manual_seed(5))
    completion[0, 0] = completion[1, 2] = completion[2, -1] = completion[3, 3] = completion[3, 5] = EOS
    return completion


def texts(policy, vocabulary: int, length: int) -> torch.Tensor:
    """Every completion once: all canvases [N, L] that are end-of-text from their first end-of-text on."""
    every = enumerate_completions(vocabulary, length)
    after = torch.arange(length) > policy.lengths(every).unsqueeze(1)
    return every[(every == EOS).where(after, True).all(1)]


# ---- the likelihood ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_terms_are_the_log_probs_of_transformers_up_to_the_end(family, attention):
    """Every row against transformers' own forward of it alone, without padding."""
    policy, prompts, completion = causal(family, attention=attention), prompts_of(7), some_completions()
    terms = terms_of(policy, prompts, completion)
    for row, ends in enumerate([0, 2, 5, 3, 5, 5, 5]):
        alone = torch.cat([unpadded(prompts, row).ids, completion[row : row + 1]], 1)
        logits = causal(family, attention=attention).model(alone).logits[0, -7:-1]
        expected = logits.log_softmax(-1).gather(1, completion[row].unsqueeze(1)).squeeze(1)
        expected[ends + 1 :] = 0
        torch.testing.assert_close(terms[row], expected, rtol=1e-5, atol=1e-5)
        assert (terms[row] != 0).sum() == ends + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_their_gradients_ignore_what_stands_under_the_padding_and_after_the_end(family):
    policy, prompts, completion = causal(family), prompts_of(7), some_completions()
    results = []
    for pad, junk in ((PAD, EOS), (7, 3)):
        ids = prompts.ids.masked_fill(~prompts.mask, pad)
        after = torch.arange(6) > policy.lengths(completion).unsqueeze(1)
        policy.zero_grad()
        terms = terms_of(policy, Prompts(ids, prompts.mask), completion.masked_fill(after, junk))
        terms.sum().backward()
        results.append((terms.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    assert results[0][1].isfinite().all()
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_of_all_completions_add_up_to_one(family):
    policy = causal(family, vocabulary=4)
    completions = texts(policy, 4, 4)
    assert len(completions) == 3**4 + 3**3 + 3**2 + 3 + 1
    log_likelihood = terms_of(policy, prompts_of(1, vocabulary=4).repeat_each(len(completions)), completions).sum(1)
    assert log_likelihood.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_every_end_of_text_token_ends_a_completion():
    policy = causal(eos_token_id=[4, EOS])
    terms = terms_of(policy, prompts_of(1), torch.tensor([[2, 4, 3, EOS]]))
    assert (terms != 0).tolist() == [[True, True, False, False]]


class Counting:
    """A policy that notes the rows and columns that its calls compute, and on how many positions the head ran."""

    def __init__(self, policy):
        self.policy, self.calls = policy, []
        self.mask_id, self.tokenizer, self.eos_ids = policy.mask_id, policy.tokenizer, policy.eos_ids
        self.lengths, self.prefix = policy.lengths, policy.prefix

    def __call__(self, ids, attention, select, reduce, *columns, prefix=None):
        known = 0 if prefix is None else len(prefix)
        self.calls.append(((len(ids), ids.shape[1] - known), int(select.sum())))
        return self.policy(ids, attention, select, reduce, *columns, prefix=prefix)


def test_one_forward_without_the_last_token_and_the_head_where_a_token_is_scored():
    policy = Counting(causal())
    terms_of(policy, prompts_of(7), some_completions())
    assert policy.calls == [((7, 5 + 6 - 1), 1 + 3 + 6 + 4 + 6 + 6 + 6)]


def test_references_score_like_their_policy():
    policy = causal()
    with torch.no_grad():
        expected = terms_of(policy, prompts_of(7), some_completions())
        assert torch.equal(terms_of(make_reference(policy), prompts_of(7), some_completions()), expected)


# ---- gradients against enumeration -----------------------------------------------------------------------------------

V, L = 3, 3


@pytest.fixture(scope="module")
def law():
    """A policy, all its completions on a canvas, their terms [1, N, L], and log-likelihoods [N] with their graph."""
    policy = causal(vocabulary=V, seed=3)
    completions = texts(policy, V, L)
    terms = terms_of(policy, prompts_of(1, vocabulary=V).repeat_each(len(completions)), completions).unsqueeze(0)
    return policy, completions, terms, terms.sum((0, 2))


def gradient(policy, scalar: torch.Tensor) -> torch.Tensor:
    parameters = list(policy.parameters())
    grads = torch.autograd.grad(scalar, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def assert_same_direction_and_length(one: torch.Tensor, other: torch.Tensor) -> None:
    assert other.norm() > 1e-2
    assert (one - other).norm() < 1e-4 * other.norm()  # float32


@pytest.mark.parametrize("clip_range", [0.2, 4e-4, 0.0])
@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_grpo_and_gspo_have_the_exact_policy_gradient_on_policy(law, ratio, clip_range):
    """Its mean over all completions is grad E[R] / L, whatever the level of the ratio and the clip range."""
    policy, completions, terms, log_likelihood = law
    rewards = torch.randn(len(completions), generator=torch.Generator().manual_seed(1))
    probability = log_likelihood.detach().exp()
    weighted = probability * (rewards - (probability * rewards).sum()) * len(completions)  # the loss means over rows
    loss, _ = espo_loss(terms, terms.detach(), None, weighted, clip_range=clip_range, beta=0.0, ratio=ratio)
    mean_reward = (log_likelihood.exp() * rewards).sum()
    assert_same_direction_and_length(-L * gradient(policy, loss), gradient(policy, mean_reward))
    exact = exact_policy_gradient(policy, log_likelihood, log_likelihood, rewards, centred=False)
    assert_same_direction_and_length(exact, gradient(policy, mean_reward))


def test_expected_gradients_of_the_kl_estimators(law):
    """k2 has that of KL(policy || reference), k3 that of KL(reference || policy), k1 none (Tang & Munos 2025)."""
    policy, completions, terms, log_likelihood = law
    with torch.no_grad():
        ref = terms_of(
            causal(vocabulary=V, seed=4), prompts_of(1, vocabulary=V).repeat_each(len(completions)), completions
        )
    probability, delta = log_likelihood.detach().exp(), (terms - ref).sum(-1)
    expected = {kl: gradient(policy, (probability * kl(delta)).sum()) for kl in (k1, k2, k3)}
    ref = ref.sum(1)
    assert_same_direction_and_length(expected[k2], gradient(policy, exact_kl(log_likelihood, ref)))
    assert_same_direction_and_length(expected[k3], gradient(policy, exact_kl(ref, log_likelihood)))
    assert expected[k1].norm() < 1e-4 * expected[k2].norm()


# ---- decoding --------------------------------------------------------------------------------------------------------


def naive(policy, prompts: Prompts, keys: torch.Tensor, decoding: AutoregressiveDecoding) -> torch.Tensor:
    """Row by row without padding or cache, a full forward of transformers for every token."""
    rows = []
    for row, key in enumerate(keys):
        ids, completion = unpadded(prompts, row).ids, []
        for u in uniform(key, decoding.length):
            token = EOS
            if EOS not in completion:
                logits = policy.model(torch.cat([ids, torch.tensor([completion], dtype=torch.int64)], 1)).logits[:, -1]
                greedy = decoding.temperature == 0
                token = int(logits.argmax() if greedy else sample_tokens(logits / decoding.temperature, u[None]))
            completion.append(token)
        rows.append(completion)
    return torch.tensor(rows)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_full_forwards_one_row_at_a_time(family, temperature):
    policy, prompts, keys = causal(family), prompts_of(12), fold_in(3, torch.arange(12))
    decoding = AutoregressiveDecoding(8, temperature)
    before = prompts.ids.clone()
    completion = decoding.generate(policy, prompts, keys)
    with torch.no_grad():
        assert torch.equal(completion, naive(policy, prompts, keys, decoding))
    assert torch.equal(prompts.ids, before)
    lengths = policy.lengths(completion)
    assert lengths.min() < 4 < lengths.max()  # some ended early, and are end-of-text to the end of the canvas
    assert (completion[torch.arange(8) >= lengths.unsqueeze(1)] == EOS).all()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:5]
    assert torch.equal(decoding.generate(policy, prompts.of(order), keys[order]), completion[order])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_are_those_of_transformers_generate(family):
    policy, prompts = causal(family), prompts_of(12)
    ours = AutoregressiveDecoding(8).greedy.generate(policy, prompts, torch.zeros(12, dtype=torch.int64))
    theirs = policy.model.generate(
        prompts.ids, attention_mask=prompts.mask, do_sample=False, max_new_tokens=8, pad_token_id=EOS
    )[:, 5:]
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)


def test_samples_at_temperature_one_follow_the_likelihood():
    """Chi-square test at the level 1e-4."""
    policy, n = causal(vocabulary=3, seed=7), 20_000
    completions = texts(policy, 3, 3)
    with torch.no_grad():
        law = terms_of(policy, prompts_of(1, vocabulary=3).repeat_each(len(completions)), completions).sum(1).exp()
    samples = AutoregressiveDecoding(3).generate(
        policy, prompts_of(1, vocabulary=3).repeat_each(n), fold_in(0, torch.arange(n))
    )
    hits = (samples.unsqueeze(1) == completions).all(2)
    assert hits.sum() == n
    expected = n * law.double()
    assert expected.min() >= 5
    statistic = ((hits.sum(0) - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(law) - 1) / 2).double(), statistic / 2) > 1e-4


def test_one_token_per_forward_until_all_have_ended_anywhere():
    """With ``agree`` a process whose own completions have ended goes on as long as another one needs it."""
    inner, prompts, keys = causal(), prompts_of(3), fold_in(1, torch.arange(3))
    policy, decoding = Counting(inner), AutoregressiveDecoding(30)
    completion = decoding.generate(policy, prompts, keys)
    steps = int(inner.lengths(completion).max()) + 1
    assert steps < 30
    assert policy.calls == [((3, 5), 3)] + [((3, 1), 3)] * (steps - 1)
    asked = []
    policy.calls = []

    def another_needs_two_more(more: bool) -> bool:
        asked.append(more)
        return len(asked) <= steps + 2

    assert torch.equal(decoding.generate(policy, prompts, keys, another_needs_two_more), completion)
    assert len(policy.calls) == steps + 2
    assert asked == [True] * steps + [False] * 3


def test_length_and_key_have_an_effect_and_a_shorter_canvas_is_a_prefix():
    policy, prompts, keys = causal(seed=7), prompts_of(1).repeat_each(64), fold_in(2, torch.arange(64))
    long, short = (AutoregressiveDecoding(n).generate(policy, prompts, keys) for n in (6, 3))
    assert torch.equal(long[:, :3], short)
    assert len(long.unique(dim=0)) > 32


def test_decoding_under_gradient_checkpointing_keeps_its_cache(tmp_path):
    """transformers drops caches in train mode under checkpointing, which would decode from the last token alone."""
    new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, causal=True).save(tmp_path)
    plain, checkpointed = load_policy(tmp_path), load_policy(tmp_path, gradient_checkpointing=True)
    keys, decoding = fold_in(4, torch.arange(2)), AutoregressiveDecoding(12)
    completions = [decoding.generate(p, p.encode(["ab", "cde"]), keys) for p in (plain, checkpointed)]
    assert torch.equal(*completions)
    assert checkpointed.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"length": 0}, "length must be at least 1, got 0"), ({"temperature": -1.0}, "temperature must be 0")],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoregressiveDecoding(**settings)


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
