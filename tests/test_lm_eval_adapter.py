"""The adapter for lm-evaluation-harness, with the harness if it is installed, else with its base class rewritten."""

import importlib.util
import itertools
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from conftest import small_policy

from espo_lightning import ELBO, Decoding, MeanField, generate, score
from espo_lightning.keys import fold_in
from espo_lightning.scoring.masks import Masks

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

SHORT = Decoding(length=8, block_length=4, steps=8, temperature=1.0)


@dataclass
class Request:
    """As much of lm_eval.api.instance.Instance as a model sees."""

    args: tuple


@pytest.fixture(scope="module")
def adapter():
    """The module under test. Where lm_eval is missing, its two names stand in: the abstract base, and a record."""
    if importlib.util.find_spec("lm_eval") is None:
        names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.instance")
        fakes = {name: types.ModuleType(name) for name in names}
        fakes["lm_eval.api.model"].LM = type("LM", (), {"__init__": lambda self: None})
        fakes["lm_eval.api.instance"].Instance = Request
        sys.modules |= fakes
        from espo_lightning.lab import lm_eval_adapter

        for name in [*names, "espo_lightning.lab.lm_eval_adapter"]:
            del sys.modules[name]
        return lm_eval_adapter
    from espo_lightning.lab import lm_eval_adapter

    return lm_eval_adapter


def tokens(policy, text: str) -> torch.Tensor:
    return torch.tensor([policy.tokenizer(text, add_special_tokens=False)["input_ids"]])


def prompts_of(policy, text: str):
    from espo_lightning import Prompts

    return Prompts(tokens(policy, text), None)


def exact_elbo(policy, context: str, continuation: str) -> float:
    """Minus the sum over k of g(k), the mean NLL per hidden token at k hidden ones, from all 2^L masks (METHOD's level
    sum; arXiv:2512.03759, Eq. 3)."""
    completion = tokens(policy, continuation)
    length, total = completion.shape[1], 0.0
    for count in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), count))
        for subset in subsets:
            hidden = torch.zeros(1, 1, length, dtype=torch.bool)
            hidden[..., list(subset)] = True
            terms = score(policy, prompts_of(policy, context), completion, Masks(hidden, hidden.float(), False))
            total += float(terms.sum()) / count / len(subsets)
    return total


@torch.no_grad()
def test_a_likelihood_is_the_elbo(adapter):
    policy = small_policy()
    requests = [Request(("ab", "cde")), Request(("abc", "d")), Request(("", "ab"))]
    likelihood = ELBO(draws=600, stratified=True)
    scores = adapter.DiffusionLM(policy, SHORT, likelihood, batch_size=64).loglikelihood(requests)
    for (value, greedy), request in zip(scores, requests):
        context, continuation = request.args
        expected = exact_elbo(policy, context or policy.tokenizer.eos_token, continuation)
        assert value == pytest.approx(expected, abs=0.15)  # a draw of 3 tokens spreads by less than 0.5 nats
        assert greedy is False
    assert scores[1][0] == pytest.approx(exact_elbo(policy, "abc", "d"), abs=1e-5)  # one token: nothing is random


@torch.no_grad()
def test_draws_are_scored_in_parts_of_the_batch_size(adapter):
    policy = small_policy()
    scores = [
        adapter.DiffusionLM(policy, SHORT, ELBO(draws=10), batch_size=size).loglikelihood([Request(("ab", "cde"))])
        for size in (1, 3, 10)
    ]
    assert scores[0][0][0] == pytest.approx(scores[1][0][0], abs=1e-5) == pytest.approx(scores[2][0][0], abs=1e-5)
    other = adapter.DiffusionLM(policy, SHORT, ELBO(draws=10), seed=1).loglikelihood([Request(("ab", "cde"))])
    assert other != scores[2]


@torch.no_grad()
def test_blanks_before_a_continuation_belong_to_it(adapter):
    policy = small_policy()
    lm = adapter.DiffusionLM(policy, SHORT, MeanField())
    (first, _), (second, _) = lm.loglikelihood([Request(("ab ", "cd")), Request(("ab", " cd"))])
    assert first == second
    completion = tokens(policy, " cd")
    hidden = torch.ones(1, 1, 3, dtype=torch.bool)
    terms = score(policy, prompts_of(policy, "ab"), completion, Masks(hidden, hidden.float(), False))
    assert first == pytest.approx(float(terms.sum()), abs=1e-5)


def test_greedy_continuations_are_recognised(adapter):
    policy = small_policy()
    lm = adapter.DiffusionLM(policy, SHORT, MeanField(), check_greedy=True)
    decoding = Decoding(length=3, block_length=3, steps=3, temperature=0.0)
    own = generate(policy, prompts_of(policy, "ab"), torch.zeros(1, dtype=torch.int64), decoding)
    other = own.clone()
    other[0, 1] = (own[0, 1] + 1) % policy.mask_id
    assert [lm._is_greedy(prompts_of(policy, "ab"), ids) for ids in (own, other)] == [True, False]


def test_generated_text_is_ours_cut_at_the_stop_strings(adapter):
    policy = small_policy()
    contexts = ["abc", "a", "hello", "xy", "zzzz"]
    raw = []
    for index, context in enumerate(contexts):
        keys = fold_in(3, torch.tensor([index]))
        raw += policy.decode(generate(policy, prompts_of(policy, context), keys, SHORT))
    for stop in (None, [], "", [raw[0][2:4]], raw[1][1], [raw[2][-1], raw[2][3]]):
        lm = adapter.DiffusionLM(policy, SHORT, batch_size=2, seed=3)
        texts = lm.generate_until([Request((context, {"until": stop})) for context in contexts])
        stops = [stop] if isinstance(stop, str) else stop or []
        for text, whole in zip(texts, raw):
            assert whole.startswith(text)
            assert not any(s in text for s in stops if s)
            assert text == whole or any(whole[len(text) :].startswith(s) for s in stops if s)


def test_chat_template(adapter):
    policy = small_policy()
    history = [{"role": "user", "content": "abc"}]
    lm = adapter.DiffusionLM(policy, SHORT)
    text = lm.apply_chat_template(history)
    assert torch.equal(tokens(policy, text), policy.encode(["abc"]).ids)


def test_what_a_diffusion_policy_cannot_do_is_refused(adapter):
    policy = small_policy()
    with pytest.raises(NotImplementedError, match="perplexity"):
        adapter.DiffusionLM(policy, SHORT).loglikelihood_rolling([Request(("abc",))])
    policy.mask_id = None
    with pytest.raises(ValueError, match="causal"):
        adapter.DiffusionLM(policy, SHORT)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", -1), ("batch_size", 1.5), ("seed", -1)])
def test_numbers_out_of_range_are_named(adapter, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .* got {value}"):
        adapter.DiffusionLM(small_policy(), SHORT, **{name: value})
