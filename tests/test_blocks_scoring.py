"""BlockELBO against one forward per block, enumeration, the exact likelihood and the ELBO; and in training."""

import itertools
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from block_cases import EACH, LENGTHS, block_policy, keys_of, some_prompts
from conftest import fit, parameters, small_module
from lightning.pytorch import Callback
from transformers import LlamaConfig, LlamaForCausalLM

from espo_lightning import (
    ELBO,
    BlockDecoding,
    BlockELBO,
    Decoding,
    Layout,
    LoRA,
    MeanField,
    Policy,
    PolicyGradient,
    Prompts,
    QuadratureELBO,
    RandomViews,
    Seen,
    TimeELBO,
    TokenViews,
    new_policy,
    random_order,
)
from espo_lightning.keys import fold_in, randint, random_subset
from espo_lightning.lab.exact import enumerate_completions, exact_policy_gradient
from espo_lightning.lab.exact_blocks import (
    block_completion_law,
    block_elbo,
    block_gap,
    block_log_likelihood,
    block_score_moments,
    block_sizes,
    block_tables,
)
from espo_lightning.policies.load import _checkpoint_layers
from espo_lightning.policies.lora import add_adapter
from espo_lightning.policies.reference import make_reference
from espo_lightning.scoring.masks import count_masks
from espo_lightning.training.supervised import SFTModule

LENGTH = 8
LAWS = [BlockELBO(2, block=4), BlockELBO(3, stratified=True, block=4), BlockELBO(2, False, False, 1, block=4)]


def some_completions(rows: int = len(LENGTHS), length: int = LENGTH) -> torch.Tensor:
    return torch.randint(7, 60, (rows, length), generator=torch.Generator().manual_seed(3))


def drawn(policy, law, prompts, completion, keys=None):
    keys = keys_of(len(completion)) if keys is None else keys
    return law.masks(keys, Seen.of(policy, prompts, completion, keys))


# ---- masks ----------------------------------------------------------------------------------------------------------


def one_block_by_hand(keys, length, draws, coupled, stratified, smallest):
    """The law of Eq. 3 as it was written before there were blocks."""
    span = length + 1 - smallest
    draw = torch.arange(draws).unsqueeze(-1)
    if stratified:
        counts = (randint(fold_in(keys, -1), span) + draw * span // draws) % span + smallest
    else:
        counts = randint(fold_in(fold_in(keys, -2), draw), span) + smallest
    hidden = random_subset(fold_in(fold_in(keys, -3), draw), counts, length)
    k = counts.unsqueeze(-1)
    weight = torch.where(hidden, span / k.clamp(min=1), 0.0)
    if coupled:
        weight = 0.5 * torch.where(hidden, weight, span / (length - k).clamp(min=1))
    return hidden, weight.float()


@pytest.mark.parametrize(("coupled", "stratified", "smallest"), [(1, 0, 0), (1, 1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_one_block_has_the_masks_of_the_elbo_bit_for_bit(length, coupled, stratified, smallest):
    law = {"coupled": bool(coupled), "stratified": bool(stratified), "smallest": smallest}
    masks = count_masks(keys_of(50), length, 3, **law)
    hidden, weight = one_block_by_hand(keys_of(50), length, 3, *law.values())
    assert torch.equal(masks.hidden, hidden)
    assert torch.equal(masks.weight, weight)
    blocks = BlockELBO(3, bool(coupled), bool(stratified), smallest, block=length).draw(keys_of(50), length)
    assert torch.equal(blocks.hidden, hidden)
    assert torch.equal(blocks.weight, weight)


@pytest.mark.parametrize("law", LAWS)
def test_counts_are_uniform_and_independent_in_every_block(law):
    """Blocks of 2, 4 and 2 positions, as an unaligned prompt makes them."""
    blocks = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]]).expand(6000, -1)
    settings = {"coupled": law.coupled, "stratified": law.stratified, "smallest": law.smallest_count}
    masks = count_masks(keys_of(6000), 8, law.draws, **settings, blocks=blocks)
    counts = torch.stack([masks.hidden[:, :, blocks[0] == b].sum(-1) for b in range(3)], -1)  # [M, B, 3]
    for b, size in enumerate((2, 4, 2)):
        possible = torch.arange(law.smallest_count, size + 1)
        for draw in counts[..., b]:
            share = (draw.unsqueeze(-1) == possible).double().mean(0)
            assert share.sum().item() == pytest.approx(1)
            assert (share - 1 / len(possible)).abs().max() < 4 * math.sqrt(0.25 / 6000)
    for position in range(8):  # which positions are hidden is uniform given the count
        b = int(blocks[0, position])
        size = int((blocks[0] == b).sum())
        shown = masks.hidden[0, :, position].double()
        assert abs(shown.mean() - counts[0, :, b].double().mean() / size) < 4 * math.sqrt(0.25 / 6000)
    joint = torch.corrcoef(counts[0].T.double())
    assert (joint - torch.eye(3)).abs().max() < 0.06
    if law.coupled:
        assert (masks.weight > 0).all()  # every position is scored once


# ---- one pass -------------------------------------------------------------------------------------------------------


def one_forward_per_block(policy, prompts, completion, masks):
    """The definition: every block by itself, after clean ones, later ones hidden."""
    layout, length = policy.layout, completion.shape[1]
    blocks = layout.blocks(prompts, length)
    result = torch.zeros(masks.weight.shape)
    for passes, draw, row in itertools.product(range(len(masks.passes)), range(len(masks.weight)), range(len(blocks))):
        hidden, one = masks.passes[passes, draw, row], Prompts(*(x[row : row + 1] for x in prompts))
        for block in blocks[row].unique():
            inside = blocks[row] == block
            canvas = completion[row].masked_fill((inside & hidden) | (blocks[row] > block), policy.mask_id)
            ids = torch.cat([one.ids, canvas.unsqueeze(0)], 1)
            select = F.pad(torch.ones(1, length, dtype=torch.bool), (one.ids.shape[1], 0))
            logits = policy(ids, one.seen_by(policy, length), select, lambda x: x)
            found = logits.log_softmax(-1).gather(-1, completion[row].unsqueeze(-1)).squeeze(-1)
            result[draw, row] += torch.where(inside & hidden, found, 0.0)
    return torch.where(masks.weight != 0, result, 0.0)


@EACH
@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("law", LAWS)
def test_one_pass_equals_one_forward_per_block(law, block, origin, monkeypatch):
    policy, prompts, completion = block_policy(block, origin), some_prompts(), some_completions()
    law = replace(law, block=block)
    masks = drawn(policy, law, prompts, completion)
    with torch.no_grad():
        expected = one_forward_per_block(policy, prompts, completion, masks)
        resumed = law.log_probs(policy, prompts, completion, masks)
        monkeypatch.setattr("espo_lightning.scoring.block.PART", 4)
        in_parts = law.log_probs(policy, prompts, completion, masks)
        policy.sharded = True
        joint = law.log_probs(policy, prompts, completion, masks)
    assert expected.abs().max() > 1
    torch.testing.assert_close(resumed, expected, rtol=1e-6, atol=1e-6)  # logits are rounded to float32
    torch.testing.assert_close(in_parts, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(joint, expected, rtol=1e-6, atol=1e-6)


@EACH
@pytest.mark.parametrize("part", [64, 4])
def test_both_forms_of_the_pass_have_the_same_gradient(origin, part, monkeypatch):
    monkeypatch.setattr("espo_lightning.scoring.block.PART", part)
    policy, prompts, completion = block_policy(4, origin), some_prompts(), some_completions()
    masks = drawn(policy, LAWS[0], prompts, completion)
    gradients = []
    for policy.sharded in (False, True):
        assert policy.resumes != policy.sharded
        loss = LAWS[0].terms(policy, prompts, completion, masks).sum()
        gradients.append(torch.autograd.grad(loss, list(policy.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    assert all(g.abs().max() > 0 for g in gradients[0])


def test_recomputed_layers_give_the_same_numbers():
    policy, prompts, completion = block_policy(), some_prompts(), some_completions()
    masks = drawn(policy, LAWS[0], prompts, completion)
    expected = LAWS[0].terms(policy, prompts, completion, masks)
    _checkpoint_layers(policy)
    policy.train()
    assert not policy.resumes
    torch.testing.assert_close(LAWS[0].terms(policy, prompts, completion, masks), expected, rtol=1e-6, atol=1e-6)


@EACH
def test_a_score_depends_on_its_own_row_only(origin):
    policy, prompts, completion = block_policy(4, origin), some_prompts(), some_completions()
    keys = keys_of(4)
    together = LAWS[0].terms(policy, prompts, completion, drawn(policy, LAWS[0], prompts, completion))
    wide = some_prompts(width=20)
    torch.testing.assert_close(
        LAWS[0].terms(policy, wide, completion, drawn(policy, LAWS[0], wide, completion)),
        together,
        rtol=1e-5,
        atol=1e-5,
    )
    for row in range(4):
        one, rows = prompts.of(slice(row, row + 1)), slice(row, row + 1)
        one = Prompts(one.ids[one.mask].unsqueeze(0), None)
        masks = drawn(policy, LAWS[0], one, completion[rows], keys[rows])
        alone = LAWS[0].terms(policy, one, completion[rows], masks)
        torch.testing.assert_close(alone, together[:, rows], rtol=1e-5, atol=1e-5)


@EACH
def test_references_score_as_the_policy_they_were(origin):
    policy, prompts, completion = block_policy(4, origin), some_prompts(), some_completions()
    masks = drawn(policy, LAWS[0], prompts, completion)
    expected = LAWS[0].log_probs(policy, prompts, completion, masks).detach()
    reference = make_reference(policy)
    policy.model = add_adapter(policy.model, LoRA(rank=2, alpha=4))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    for frozen in (reference, make_reference(policy)):
        assert torch.equal(LAWS[0].log_probs(frozen, prompts, completion, masks), expected)
    assert not torch.equal(LAWS[0].log_probs(policy, prompts, completion, masks), expected)


class Positions:
    """A policy that notes how many tokens it computes and where the head runs."""

    def __init__(self, policy):
        self.policy, self.tokens, self.head = policy, [], 0
        self.mask_id, self.layout, self.prefix, self.resumes = policy.mask_id, policy.layout, policy.prefix, True

    def __call__(self, ids, attention, select, *args, prefix=None, **kwargs):
        self.tokens.append(len(ids) * (ids.shape[1] - (0 if prefix is None else len(prefix))))
        self.head += int(select.sum())
        return self.policy(ids, attention, select, *args, prefix=prefix, **kwargs)


def test_prompt_and_clean_tokens_are_computed_once_and_the_head_where_it_is_read():
    policy, completion = Positions(block_policy(4, "response")), some_completions(2)
    prompts = some_prompts((6, 6))._replace(mask=None)
    law = BlockELBO(3, block=4)
    masks = law.draw(keys_of(2), LENGTH)
    law.log_probs(policy, prompts, completion, masks)
    passes = int(masks.scored.any(-1).sum())
    assert policy.tokens == [2 * (6 + LENGTH - 4), passes * LENGTH]
    assert policy.head == 2 * 3 * LENGTH  # every position once per draw


# ---- what it estimates ----------------------------------------------------------------------------------------------

SYMBOLS, MASK_ID = 3, 3


class NoMask(Policy):
    """A policy whose law over tokens leaves out the mask, as decoders do."""

    def forward(self, ids, attention, select, reduce, *columns, **more):
        def among_symbols(logits, *columns):
            return reduce(logits.index_fill(-1, torch.tensor(MASK_ID), float("-inf")), *columns)

        return super().forward(ids, attention, select, among_symbols, *columns, **more)


def tiny(block: int, origin: str, seed: int = 0, scale: float = 1.0) -> NoMask:
    config = LlamaConfig(
        vocab_size=SYMBOLS + 1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=64, is_causal=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1]) * 2)
    return NoMask(model.double(), None, mask_id=MASK_ID, layout=Layout(block, origin)).eval()


PROMPT = Prompts(torch.tensor([[0, 2, 1]]), None)  # with origin global and blocks of 2, its tail shares a block
CASES = pytest.mark.parametrize(("block", "origin"), [(1, "global"), (2, "global"), (2, "response"), (4, "response")])


def outcomes(sizes: list[int]) -> list[tuple[float, list[bool]]]:
    """Every (chance, hidden positions) of a count form with counts 0..n in each block."""
    single = [
        [
            (1 / (n + 1) / math.comb(n, k), [i in subset for i in range(n)])
            for k in range(n + 1)
            for subset in itertools.combinations(range(n), k)
        ]
        for n in sizes
    ]
    return [
        (math.prod(chance for chance, _ in each), list(itertools.chain(*(hidden for _, hidden in each))))
        for each in itertools.product(*single)
    ]


@CASES
@pytest.mark.parametrize("coupled", [True, False])
def test_unbiased_with_its_gradient_against_enumeration(block, origin, coupled):
    """The mean over all masks that the law can draw, each by its chance, is the ELBO by enumeration of orders."""
    policy, completion, law = tiny(block, origin), torch.tensor([[2, 0, 1, 1]]), BlockELBO(1, coupled, block=block)
    sizes = block_sizes(policy, PROMPT, 4)
    assert sizes == policy.layout.blocks(PROMPT, 4)[0].bincount().tolist()
    keys = keys_of(3000)
    seen = Seen(torch.ones(3000, 4, dtype=torch.bool), torch.ones(3000, 3), keys)
    seen = seen._replace(blocks=policy.layout.blocks(PROMPT, 4).expand(3000, -1))
    masks = law.masks(keys, seen)
    possible = outcomes(sizes)
    rows = []
    for chance, hidden in possible:
        found = (masks.hidden[0] == torch.tensor(hidden)).all(-1).nonzero().flatten()
        assert abs(len(found) / 3000 - chance) < 5 * math.sqrt(chance / 3000)
        rows.append(int(found[0]))
    masks, chances = masks.of(torch.tensor(rows)), torch.tensor([chance for chance, _ in possible])
    n = len(rows)
    many = Prompts(PROMPT.ids.expand(n, -1), None)
    scores = law.terms(policy, many, completion.expand(n, -1), masks).sum(-1)[0].double()
    mean = (chances * scores).sum()
    exact = block_elbo(block_tables(policy, PROMPT, completion[0]))
    assert mean.item() == pytest.approx(exact.item(), abs=1e-5)
    weights = list(policy.parameters())
    for a, b in zip(torch.autograd.grad(mean, weights), torch.autograd.grad(exact, weights)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    variance = (chances * scores.square()).sum() - mean.square()
    moments = block_score_moments(block_tables(policy, PROMPT, completion[0]), coupled=coupled)
    assert moments.mean.item() == pytest.approx(exact.item(), abs=1e-9)
    assert moments.variance.item() == pytest.approx(variance.item(), abs=1e-4)


@CASES
def test_the_law_by_enumeration_sums_to_one_and_its_parts_agree(block, origin):
    policy = tiny(block, origin)
    law = block_completion_law(policy, PROMPT, SYMBOLS, 4)
    assert law.log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)
    completions = enumerate_completions(SYMBOLS, 4)
    for index in (0, 17, 42, 80):
        tables = block_tables(policy, PROMPT, completions[index])
        assert law.log_likelihood[index].item() == pytest.approx(block_log_likelihood(tables).item(), abs=1e-5)
        assert law.elbo[index].item() == pytest.approx(block_elbo(tables).item(), abs=1e-5)
        gap = law.log_likelihood[index] - law.elbo[index]
        assert block_gap(tables).item() == pytest.approx(gap.item(), abs=1e-5)
        assert gap >= -1e-6
    if block == 1:
        torch.testing.assert_close(law.elbo, law.log_likelihood, rtol=0, atol=1e-9)
    else:
        assert (law.log_likelihood - law.elbo).max() > 1e-3


@CASES
def test_random_order_decoding_draws_from_that_law(block, origin):
    policy, n = tiny(block, origin), 4000
    decoding = BlockDecoding(4, block, 4, order=random_order)
    many = Prompts(PROMPT.ids.expand(n, -1), None)
    completion = decoding.generate(policy, many, keys_of(n, seed=11))
    index = (completion * SYMBOLS ** torch.arange(4)).sum(-1)
    observed = index.bincount(minlength=SYMBOLS**4).double()
    expected = n * block_completion_law(policy, PROMPT, SYMBOLS, 4).log_likelihood.exp().detach()
    common = expected > 5
    parts = torch.stack([torch.cat([x[common], x[~common].sum().view(1)]) for x in (observed, expected)])
    statistic = ((parts[0] - parts[1]).square() / parts[1].clamp(min=1e-9)).sum().item()
    freedom = int(common.sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_its_exact_gradient_is_that_of_the_expected_reward():
    policy, rewards = tiny(2, "global"), torch.rand(81, generator=torch.Generator().manual_seed(0)).double()
    law = block_completion_law(policy, PROMPT, SYMBOLS, 4)
    ours = exact_policy_gradient(policy, law.log_likelihood, law.log_likelihood, rewards)
    grads = torch.autograd.grad((law.log_likelihood.exp() * rewards).sum(), list(policy.parameters()))
    torch.testing.assert_close(ours, torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("origin", ["global", "response"])
def test_blocks_of_one_token_are_the_exact_likelihood_whatever_the_key(origin):
    policy, prompts, completion = block_policy(1, origin), some_prompts(), some_completions()
    law = BlockELBO(1, block=1)
    scores = [
        law.terms(policy, prompts, completion, drawn(policy, law, prompts, completion, keys_of(4, seed))).sum(-1)
        for seed in range(3)
    ]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=1e-5)
    for row in range(4):
        one = Prompts(prompts.ids[row : row + 1], prompts.mask[row : row + 1])
        total, canvas = 0.0, torch.full((1, LENGTH), policy.mask_id)
        for i in range(LENGTH):  # the chain rule, a forward for every token
            select = torch.zeros(1, prompts.ids.shape[1] + LENGTH, dtype=torch.bool)
            select[0, prompts.ids.shape[1] + i] = True
            ids = torch.cat([one.ids, canvas], 1)
            total += policy(ids, one.seen_by(policy, LENGTH), select, lambda x: x.log_softmax(-1))[
                0, completion[row, i]
            ]
            canvas[0, i] = completion[row, i]
        assert scores[0][0, row].item() == pytest.approx(total.item(), abs=1e-4)


@pytest.mark.parametrize("settings", [(2, True, False, 0), (2, False, True, 1)])
def test_a_canvas_of_one_block_is_scored_as_by_the_elbo(settings):
    policy, prompts, completion, keys = block_policy(8, "response"), some_prompts(), some_completions(), keys_of(4)
    ours, elbo = BlockELBO(*settings, block=8), ELBO(*settings)
    elbo.check(policy, LENGTH)
    a = ours.terms(policy, prompts, completion, drawn(policy, ours, prompts, completion))
    b = elbo.terms(policy, prompts, completion, elbo.draw(keys, LENGTH))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_block_of_prompt_and_canvas_is_full_attention():
    policy, prompts, completion = block_policy(64, "global"), some_prompts(), some_completions()
    full = Policy(policy.model, policy.tokenizer, mask_id=policy.mask_id)
    law = BlockELBO(2, block=64)
    masks = drawn(policy, law, prompts, completion)
    torch.testing.assert_close(
        law.terms(policy, prompts, completion, masks),
        ELBO(2).terms(full, prompts, completion, masks),
        rtol=1e-6,
        atol=1e-6,
    )


# ---- training -------------------------------------------------------------------------------------------------------

PRESET = {
    "decoding": BlockDecoding(4, 2, 4),
    "likelihood": BlockELBO(2, block=2),
    "objective": PolicyGradient(beta=0.01),
    "optimizer": partial(torch.optim.SGD, lr=2.0),
}


def small_block_policy(origin: str = "global"):
    return new_policy(hidden_size=16, layers=2, heads=2, intermediate_size=24, block=2, origin=origin)


class Metrics(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def train(batches: int = 2, origin: str = "global", task=None, policy=None, **settings):
    module, metrics = small_module(policy or small_block_policy(origin), **PRESET | settings), Metrics()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the gradient is NaN or infinite")
        fit(module, batches, task=task, callbacks=[metrics])
    return parameters(module), metrics.rows


@pytest.mark.usefixtures("global_generators_untouched")
@EACH
@pytest.mark.parametrize(
    "change", [{"micro_batch": 4}, {"view_by_view": True}, {"micro_batch": 4, "view_by_view": True}], ids=str
)
def test_a_rollout_in_parts_gives_the_same_numbers(change, origin):
    whole, rows = train(origin=origin)
    parts, others = train(origin=origin, **change)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=2e-6)
    for a, b in zip(rows, others):
        torch.testing.assert_close(a["train/loss"], b["train/loss"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a["train/grad_norm"], b["train/grad_norm"], rtol=1e-4, atol=1e-5)
    assert any(row["train/grad_norm"] > 0 for row in rows)


def test_the_first_update_compares_the_policy_with_itself():
    _, rows = train(1, updates=1)
    assert rows[0]["train/log_ratio_max"] == rows[0]["train/clip_high"] == 0.0


def test_leaving_out_equal_groups_changes_nothing():
    free = {"objective": PolicyGradient(beta=0.0)}
    kept, rows = train(4, **free, skip_equal_groups=False)
    skipped, _ = train(4, **free, skip_equal_groups=True)
    torch.testing.assert_close(kept, skipped, rtol=1e-4, atol=2e-6)
    assert max(row["train/zero_variance_groups"] for row in rows) > 0


@EACH
def test_a_block_policy_learns(origin):
    adam = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "group_size": 8}
    _, rows = train(40, origin=origin, **adam)
    rewards = [row["train/reward"] for row in rows]
    assert sum(rewards[-5:]) / 5 > 0.8 > 0.3 > sum(rewards[:3]) / 3


@EACH
def test_supervised_training_teaches_a_block_policy(origin):
    policy = small_block_policy(origin)
    module = SFTModule(policy, 4, BlockELBO(block=2), partial(torch.optim.Adam, lr=1e-2))
    fit(module, 60)
    prompts = policy.encode(["a", "abc"])
    completion = BlockDecoding(4, 2, 4, 0.0).generate(policy.eval(), prompts, keys_of(2))
    assert policy.decode(completion) == ["aaaa", "aaaa"]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "likelihood", "length", "message"),
    [
        (lambda: new_policy(), BlockELBO(block=4), 8, "BlockELBO needs a block-causal policy, but .* full attention"),
        (lambda: new_policy(causal=True), BlockELBO(block=4), 8, "the policy is a causal model, which cannot denoise"),
        (lambda: block_policy(4), BlockELBO(block=8), 8, "likelihood.block is 8, but the policy has .* set it to 4"),
        (lambda: block_policy(4), BlockELBO(block=4), 10, "block 4 does not divide the canvas of 10 tokens"),
        *(
            (lambda: block_policy(4), likelihood, 8, "hides positions of all blocks at once.*BlockELBO with block 4")
            for likelihood in (ELBO(), TimeELBO(), QuadratureELBO(), MeanField(), TokenViews(), RandomViews())
        ),
    ],
)
def test_likelihoods_that_do_not_fit_the_policy_are_refused(policy, likelihood, length, message):
    policy = policy()
    with pytest.raises(ValueError, match=message):
        likelihood.check(policy, length)
    with pytest.raises(ValueError, match=message):
        SFTModule(policy, length, likelihood)


def test_nonsense_is_refused_by_the_constructor():
    for settings, message in (
        ({"block": 0}, "block must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"smallest_count": 1}, "coupled masks need counts uniform on 0..L"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockELBO(**settings)


def test_a_module_refuses_what_does_not_fit_together():
    with pytest.raises(ValueError, match="use BlockDecoding"):
        small_module(small_block_policy(), **PRESET | {"decoding": Decoding(4, 2, 4)})
    with pytest.raises(ValueError, match="use likelihood=BlockELBO with block 2"):
        small_module(small_block_policy(), **PRESET | {"likelihood": ELBO()})
