"""Decoding token by token: against full forwards, Transformers and the likelihood."""

import pytest
import torch
from causal_cases import EOS, FAMILIES, Counting, causal, prompts_of, terms_of, texts, unpadded

from espo_lightning import (
    AutoregressiveDecoding,
    Prompts,
    load_policy,
    new_policy,
)
from espo_lightning.decoding.proposals import sample_tokens
from espo_lightning.keys import fold_in, uniform

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


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
