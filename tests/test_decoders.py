"""Decoders against their description, one completion at a time, and their exact laws on tables."""

import itertools
import math
from functools import cache

import pytest
import torch
from decoder_cases import policy_fixture  # noqa: F401
from decoding_cases import PROMPT, Recorder, assert_law, keys_of, nucleus, rng, some_prompts

from espo_lightning import (
    Decoding,
    Policy,
    dream_schedule,
    entropy_order,
    generate,
    low_confidence,
    margin_order,
    origin_schedule,
    random_order,
)
from espo_lightning.lab.tabular import TabularPolicy

# ---- one completion at a time, from METHOD's description ------------------------------------------------------------


def dream_law(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """logits / temperature, then top-p, then softmax."""
    scaled = [x / temperature for x in logits] if temperature else logits
    law = torch.tensor(scaled, dtype=torch.float64).softmax(-1).tolist()
    return nucleus(law, top_p) if top_p < 1 else law


def dream_confidence(algorithm: str, law: list[float]) -> float:
    if algorithm == "entropy":
        return sum(p * math.log(p) for p in law if p > 0)
    best, second = sorted(law, reverse=True)[:2]
    return best - second


def dream_counts(masked: int, steps: int) -> list[int]:
    """Dream's own float32 arithmetic."""
    timesteps, counts = torch.linspace(1, 1e-3, steps + 1), []
    for i in range(steps):
        t, s = timesteps[i], timesteps[i + 1]
        left = torch.tensor(masked - sum(counts), dtype=torch.float32)
        counts.append(int(left * (1 - s / t)) if i < steps - 1 else int(left))
    return counts


def logits_of(policy: Policy, row: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] that predict each position, without the mask token."""
    with torch.no_grad():
        logits = policy.model(row[None]).logits[0]
    if policy.shift:
        logits = torch.cat([logits[:1], logits[:-1]])
    logits[:, policy.mask_id] = -math.inf
    return logits


def dream_greedy(policy: Policy, prompt: torch.Tensor, length: int, steps: int, algorithm: str, top_p: float):
    """The states of one canvas that each commit something, and the final one."""
    x, states = torch.cat([prompt, torch.full((length,), policy.mask_id)]), []
    for n in dream_counts(length, steps):
        if not n:
            continue
        states.append(x.tolist())
        laws = {
            i: dream_law(row.tolist(), 0, top_p)
            for i, (token, row) in enumerate(zip(x.tolist(), logits_of(policy, x)))
            if token == policy.mask_id
        }
        first = sorted(laws, key=lambda i: -dream_confidence(algorithm, laws[i]))[:n]
        for i in first:
            x[i] = max(range(len(laws[i])), key=laws[i].__getitem__)
    return states, x.tolist()


@pytest.mark.parametrize(("algorithm", "order"), [("entropy", entropy_order), ("topk_margin", margin_order)])
@pytest.mark.parametrize(("length", "steps", "top_p"), [(12, 12, 1.0), (12, 5, 0.6), (8, 3, 0.9)])
def test_dream_greedy_trajectories(policy, algorithm, order, length, steps, top_p):
    prompts = some_prompts(4)
    recorder = Recorder(policy)
    decoding = Decoding(length, length, steps, 0.0, order, top_p, schedule=dream_schedule)
    final = generate(recorder, prompts, keys_of(1, 4), decoding)
    for row in range(4):
        states, theirs = dream_greedy(policy, prompts.ids[row], length, steps, algorithm, top_p)
        assert [canvas[row].tolist() for canvas in recorder.canvases] == states
        assert [*prompts.ids[row].tolist(), *final[row].tolist()] == theirs


# ---- exact laws on tables -------------------------------------------------------------------------------------------


def law_of(policy: TabularPolicy, decoding: Decoding, commits) -> torch.Tensor:
    """Exact law [V^L] of all completions; position 0 is the lowest digit.

    commits(step, active, laws, plain, proposal) -> list of (probability, positions to commit), where the active
    positions' proposal laws and laws at temperature 1 are dicts, and so is the proposal.
    """
    symbols, length, mask = policy.symbols, policy.length, policy.mask_id
    logits = policy.logits().detach()
    per_block = decoding.steps // decoding.blocks

    @cache
    def law(state: tuple, step: int) -> torch.Tensor:
        result = torch.zeros(symbols**length, dtype=torch.float64)
        hidden = [i for i, token in enumerate(state) if token == mask]
        if not hidden:
            result[sum(token * symbols**i for i, token in enumerate(state))] = 1
            return result
        block = step // per_block
        active = [i for i in hidden if i // decoding.block_length == block]
        if not active:
            return law(state, (block + 1) * per_block)
        rows = logits[sum(token * (symbols + 1) ** i for i, token in enumerate(state))].tolist()
        laws = {i: dream_law(rows[i], decoding.temperature, decoding.top_p) for i in active}
        plain = {i: dream_law(rows[i], 1, 1) for i in active}
        for tokens in itertools.product(range(symbols), repeat=len(active)):
            proposal = dict(zip(active, tokens))
            chance = math.prod(laws[i][v] for i, v in proposal.items())
            if chance == 0:
                continue
            for share, positions in commits(step % per_block, active, laws, plain, proposal):
                if share == 0:
                    continue
                after = tuple(proposal[i] if i in positions else token for i, token in enumerate(state))
                result += chance * share * law(after, step + 1)
        return result

    return law((mask,) * length, 0)


def drawn(n: int, confidence: dict[int, float], temperature: float):
    """n draws without replacement from softmax(confidence / temperature); temperature 0: the n first."""
    if not temperature:
        return [(1.0, sorted(confidence, key=lambda i: -confidence[i])[:n])]
    weight = {i: math.exp(c / temperature) for i, c in confidence.items()}
    result = []
    for positions in itertools.permutations(confidence, n):
        chance, left = 1.0, sum(weight.values())
        for i in positions:
            chance, left = chance * weight[i] / left, left - weight[i]
        result.append((chance, positions))
    return result


def dream_commits(algorithm: str, length: int, decoding: Decoding):
    counts = dream_counts(length, decoding.steps)

    def commits(step, active, laws, plain, proposal):
        confidence = {i: dream_confidence(algorithm, laws[i]) for i in active}
        return drawn(counts[step], confidence, decoding.order_temperature)

    return commits


def low_confidence_commits(decoding: Decoding):
    """LLaDA's confidence, one token a step, drawn with Dream's alg_temp."""

    def commits(step, active, laws, plain, proposal):
        return drawn(1, {i: math.log(plain[i][v]) for i, v in proposal.items()}, decoding.order_temperature)

    return commits


def origin_commits(steps: int):
    times = [1 - i * (1 - 1e-3) / steps for i in range(steps + 1)]

    def commits(step, active, laws, plain, proposal):
        p = 1 - times[step + 1] / times[step] if step < steps - 1 else 1.0
        subsets = itertools.chain.from_iterable(itertools.combinations(active, k) for k in range(len(active) + 1))
        return [(p ** len(s) * (1 - p) ** (len(active) - len(s)), s) for s in subsets]

    return commits


def threshold_commits(threshold: float):
    """Fast-dLLM: what is confident enough, and the best in any case."""

    def commits(step, active, laws, plain, proposal):
        confidence = {i: plain[i][v] for i, v in proposal.items()}
        best = max(confidence, key=confidence.get)
        return [(1.0, [i for i in active if i == best or confidence[i] >= threshold])]

    return commits


ENTROPY = Decoding(4, 4, 3, 0.8, entropy_order, 0.9, schedule=dream_schedule)
MARGIN = Decoding(4, 4, 3, 1.2, margin_order, 0.8, 0.3, schedule=dream_schedule)
SCATTERED = Decoding(4, 2, 4, 1.0, low_confidence, order_temperature=0.5)
ORIGIN = Decoding(4, 4, 3, 1.0, random_order, 0.9, schedule=origin_schedule)
PARALLEL = Decoding(4, 2, 4, 0.8, threshold=0.55)
FASTER = Decoding(4, 4, 4, 1.5, threshold=0.4)


@pytest.mark.parametrize(
    ("decoding", "commits"),
    [
        (ENTROPY, dream_commits("entropy", 4, ENTROPY)),
        (MARGIN, dream_commits("topk_margin", 4, MARGIN)),
        (SCATTERED, low_confidence_commits(SCATTERED)),
        (ORIGIN, origin_commits(3)),
        (PARALLEL, threshold_commits(0.55)),
        (FASTER, threshold_commits(0.4)),
    ],
    ids=["entropy", "margin", "order_temperature", "origin", "threshold", "threshold in one block"],
)
def test_decoders_sample_their_exact_laws(decoding, commits):
    policy, n = TabularPolicy(3, 4, generator=rng(11)), 30_000
    law = law_of(policy, decoding, commits)
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    plain = law_of(policy, Decoding(4, 4, 4), low_confidence_commits(Decoding(4, 4, 4)))
    assert (law - plain).abs().sum() / 2 > 0.05  # the test could fail
    completions = generate(policy, PROMPT.repeat_each(n), keys_of(31, n), decoding)
    counts = (completions * 3 ** torch.arange(4)).sum(1).bincount(minlength=81)
    assert counts[law == 0].sum() == 0
    rare = law * n < 15
    cells = [torch.cat([x[~rare], x[rare].sum().view(1)]) for x in (counts, law)]
    if cells[1][-1] * n < 15:
        cells = [torch.cat([x[:-2], x[-2:].sum().view(1)]) for x in cells]
    assert_law(*cells)


# ---- all of them ----------------------------------------------------------------------------------------------------


def test_every_option_has_an_effect(policy):
    base = {"length": 12, "block_length": 6, "steps": 6, "temperature": 0.7}
    changes = [
        {},
        {"order": random_order},
        {"order": entropy_order},
        {"order": margin_order},
        {"order": random_order, "schedule": origin_schedule},
        {"schedule": dream_schedule},
        {"top_p": 0.5},
        {"order_temperature": 0.3},
        {"threshold": 0.2},
        {"prefix_cache": True},
    ]
    prompts, keys = some_prompts(8), keys_of(15, 8)
    results = [generate(policy, prompts, keys, Decoding(**base | change)) for change in changes]
    same = [pair for pair in itertools.combinations(range(len(changes)), 2) if torch.equal(*(results[i] for i in pair))]
    assert same == []


@pytest.mark.parametrize("priority", [0.0, -math.inf, math.inf, math.nan])
def test_equal_priorities_are_committed_from_the_left(policy, priority):
    """Whatever the number: nothing but the order may depend on it."""
    recorder, prompts = Recorder(policy), some_prompts(3)

    def order(logits, warped, tokens, u):
        return torch.full_like(tokens, priority, dtype=torch.float32)

    final = generate(recorder, prompts, keys_of(16, 3), Decoding(6, 3, 4, order=order))
    hidden = [(canvas[:, 5:] == policy.mask_id).tolist() for canvas in recorder.canvases]
    assert hidden == [[[False] * n + [True] * (6 - n)] * 3 for n in (0, 2, 3, 5)]
    assert (final != policy.mask_id).all()


# ---- threshold ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_threshold_trajectories_one_completion_at_a_time(policy, threshold):
    """Fast-dLLM on one row: its completion, and the states that it passes through, in a batch as alone."""
    prompts, length, block = some_prompts(5, seed=2), 12, 6
    recorder = Recorder(policy)
    final = generate(recorder, prompts, keys_of(2, 5), Decoding(length, block, length, 0.0, threshold=threshold))
    seen = {tuple(row) for canvas in recorder.canvases for row in canvas.tolist()}
    expected, forwards = set(), []
    for row, prompt in enumerate(prompts.ids):
        x, steps = torch.cat([prompt, torch.full((length,), policy.mask_id)]), [0, 0]
        for start in (5, 5 + block):
            while hidden := [i for i in range(start, start + block) if x[i] == policy.mask_id]:
                expected.add(tuple(x.tolist()))
                confidence, token = logits_of(policy, x).softmax(-1).max(-1)
                best = max(hidden, key=lambda i: confidence[i])
                for i in hidden:
                    if i == best or confidence[i] >= threshold:
                        x[i] = token[i]
                steps[start > 5] += 1
        assert final[row].tolist() == x[5:].tolist()
        forwards.append(steps)
    assert seen == expected
    # a row that is done with a block takes no part in forward passes until all are
    assert sum(len(canvas) for canvas in recorder.canvases) == sum(map(sum, forwards))
    assert len(recorder.canvases) == sum(map(max, zip(*forwards)))
    assert sum(map(sum, forwards)) < 5 * length


def test_thresholds_between_one_token_a_step_and_one_step_a_block(policy):
    prompts, keys = some_prompts(4), keys_of(3, 4)
    full = generate(policy, prompts, keys, Decoding(12, 4, 12))
    assert torch.equal(generate(policy, prompts, keys, Decoding(12, 4, 12, threshold=1 - 1e-7)), full)
    recorder = Recorder(policy)
    at_once = generate(recorder, prompts, keys, Decoding(12, 4, 12, threshold=1e-30))
    assert len(recorder.canvases) == 3
    assert not torch.equal(at_once, full)
    recorder = Recorder(policy)  # the schedule commits four a step in any case
    generate(recorder, prompts, keys, Decoding(12, 4, 3, threshold=0.9))
    assert len(recorder.canvases) == 3
