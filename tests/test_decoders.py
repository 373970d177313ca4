"""The published decoders against second implementations: Dream, thresholds, early stop, the prefix cache."""

import itertools
import math
import threading
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import fit, small_module
from decoding_cases import PROMPT, Recorder, assert_law, keys_of, nucleus, peaky_policy, rng, some_prompts

from espo_lightning import (
    Countdown,
    Decoding,
    LoRA,
    Policy,
    Prompts,
    dream_schedule,
    entropy_order,
    generate,
    load_policy,
    low_confidence,
    margin_order,
    origin_schedule,
    random_order,
)
from espo_lightning.decoding.masked import end
from espo_lightning.lab.tabular import TabularPolicy


@pytest.fixture(scope="module", params=[0, 1], ids=["LLaDA's heads", "Dream's heads"])
def policy(request):
    """A random policy, with and without the logit shift, at times confident."""
    base = peaky_policy(3)
    base.model.lm_head.weight.data.mul_(3)
    return Policy(base.model, base.tokenizer, mask_id=base.mask_id, shift=request.param).eval()


@pytest.fixture(scope="module")
def countdown():
    """The bundled policy and sixteen padded prompts, four completions each."""
    policy = load_policy("bundled:countdown")
    prompts = policy.encode([Countdown(largest=10, largest_target=50).problem("train", 0, i).prompt for i in range(16)])
    return policy, prompts.repeat_each(4)


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


# ---- early stop -----------------------------------------------------------------------------------------------------


def test_end_by_hand():
    class Ends:
        mask_id, eos_ids, eos_id = 9, {7, 8}, 7

    before = [
        [1, 2, 8, 9, 9, 9],  # the text is complete
        [1, 9, 8, 9, 9, 9],  # a token before the end is missing
        [7, 9, 3, 9, 8, 9],  # what is committed stays
        [1, 2, 3, 9, 9, 9],
        [1, 2, 3, 4, 5, 6],
        [9, 7, 7, 7, 7, 7],
    ]
    after = [[1, 2, 8, 7, 7, 7], before[1], [7, 7, 3, 7, 8, 7], *before[3:]]
    assert end(torch.tensor(before), Ends).tolist() == after


EARLY = [
    Decoding(16, 16, 16),
    Decoding(16, 4, 16),
    Decoding(16, 4, 8, 0.7, random_order),
    Decoding(16, 8, 8, 1.0, entropy_order, 0.9, 0.1, dream_schedule),
    Decoding(16, 16, 8, 1.0, random_order, schedule=origin_schedule),
    Decoding(16, 8, 16, 0.7, threshold=0.6),
    Decoding(16, 8, 8, prefix_cache=True),
]


def early(decoding: Decoding) -> Decoding:
    return Decoding(**{**vars(decoding), "early_stop": True})


@pytest.mark.parametrize("decoding", EARLY, ids=range(len(EARLY)))
def test_early_stop_keeps_every_text_and_saves_passes(countdown, decoding):
    """Texts end after some six of sixteen tokens. The canvas behind them may differ, and only there."""
    policy, prompts = countdown
    keys = keys_of(4, len(prompts.ids))
    full, short = Recorder(policy), Recorder(policy)
    whole, stopped = generate(full, prompts, keys, decoding), generate(short, prompts, keys, early(decoding))
    assert policy.decode(stopped) == policy.decode(whole)
    lengths = policy.lengths(whole)
    assert torch.equal(policy.lengths(stopped), lengths)
    assert (stopped != policy.mask_id).all()
    text = torch.arange(16) <= lengths.unsqueeze(1)  # with the first end-of-text token
    assert torch.equal(stopped[text], whole[text])
    rows = [sum(len(canvas) for canvas in recorder.canvases) for recorder in (full, short)]
    # in one block this policy is surest of the end-of-text tail and commits it first: then there is nothing to save
    assert rows[1] == rows[0] if decoding is EARLY[0] else rows[1] < rows[0]


def test_early_stop_changes_canvases_behind_the_text():
    """Where the policy goes on behind the end, the canvas is not the same, as documented."""
    policy = peaky_policy(5)
    policy.config.eos_token_id = list(range(10, 22))  # some tokens that it does write
    prompts, keys = some_prompts(64), keys_of(5, 64)
    decoding = Decoding(12, 4, 12)
    whole, stopped = generate(policy, prompts, keys, decoding), generate(policy, prompts, keys, early(decoding))
    ended = policy.lengths(whole) < 12
    assert 8 < ended.sum() < 64
    assert policy.decode(whole) == policy.decode(stopped)
    assert torch.equal(whole[~ended], stopped[~ended])
    assert (whole != stopped).any(1).sum() > 4


class EndsForGood(TabularPolicy):
    """Behind an end-of-text token (symbol 0), nothing but end-of-text tokens."""

    eos_ids, eos_id = frozenset({0}), 0

    def logits(self):
        digits = torch.arange(len(self.table)).unsqueeze(1) // self._place % (self.symbols + 1)
        behind = (digits == 0).cumsum(1) > 0
        return self.table.masked_fill(behind.unsqueeze(-1) & (torch.arange(self.symbols) > 0), -math.inf)


@pytest.mark.parametrize("decoding", [Decoding(4, 1, 4), Decoding(4, 2, 4, 1.0, random_order), Decoding(4, 2, 2)])
def test_early_stop_is_exact_where_only_end_of_text_follows(decoding):
    policy, n = EndsForGood(3, 4, generator=rng(12)), 500
    full, short = Recorder(policy), Recorder(policy)
    whole = generate(full, PROMPT.repeat_each(n), keys_of(6, n), decoding)
    stopped = generate(short, PROMPT.repeat_each(n), keys_of(6, n), early(decoding))
    assert torch.equal(whole, stopped)
    assert sum(map(len, short.canvases)) < sum(map(len, full.canvases))


# ---- sharded processes ----------------------------------------------------------------------------------------------


def test_agree_is_asked_once_a_step_of_data_dependent_decodings_only(policy):
    prompts, keys, asked = some_prompts(3), keys_of(7, 3), []

    def agree(needs: bool) -> bool:
        asked.append(needs)
        return needs

    generate(policy, prompts, keys, Decoding(8, 4, 8), agree)
    generate(policy, prompts, keys, Decoding(8, 8, 4, 1.0, random_order, schedule=origin_schedule), agree)
    assert asked == []
    recorder = Recorder(policy)
    generate(recorder, prompts, keys, Decoding(8, 4, 8, threshold=0.05), agree)
    assert sum(asked) == len(recorder.canvases)
    assert 2 <= len(recorder.canvases) < 8
    assert len(asked) - sum(asked) == 2  # both blocks were complete before their last step


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("extra", [0, 2])
def test_a_process_that_has_finished_runs_one_row_a_pass(policy, prefix_cache, extra):
    """The others need ``extra`` more steps in every block, or all of them."""
    prompts, keys, asked = some_prompts(4), keys_of(8, 4), []
    decoding = Decoding(8, 4, 8, threshold=1e-30, prefix_cache=prefix_cache)  # alone, one pass a block
    alone = generate(policy, prompts, keys, decoding)

    def agree(needs: bool) -> bool:
        asked.append(needs)
        return needs or len(asked) % (extra + 2) != 0

    recorder = Recorder(policy)
    assert torch.equal(generate(recorder, prompts, keys, decoding, agree), alone)
    assert [len(canvas) for canvas in recorder.canvases] == ([4] + [1] * extra) * 2
    assert [int(select.sum()) for select in recorder.selections] == ([16] + [0] * extra) * 2


@pytest.mark.parametrize("decoding", [EARLY[5], EARLY[1], EARLY[6]], ids=["threshold", "early", "prefix"])
def test_two_processes_make_the_same_number_of_passes(countdown, decoding):
    """Two threads with a logical or between them, as two ranks; neither changes the other's completions."""
    policy, prompts = countdown
    decoding, keys = early(decoding), keys_of(9, 12)
    parts = [slice(0, 3), slice(3, 12)]
    alone = [generate(policy, prompts.of(part), keys[part], decoding) for part in parts]
    barrier, needs, results, recorders = threading.Barrier(2, timeout=60), [False] * 2, [None] * 2, []

    def run(rank: int, recorder: Recorder) -> None:
        def agree(mine: bool) -> bool:
            needs[rank] = mine
            barrier.wait()
            together = any(needs)
            barrier.wait()
            return together

        results[rank] = generate(recorder, prompts.of(parts[rank]), keys[parts[rank]], decoding, agree)

    recorders = [Recorder(policy) for _ in parts]
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(recorders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, alone))
    assert len(recorders[0].canvases) == len(recorders[1].canvases)


@pytest.mark.parametrize("decoding", [Decoding(4, 4, 4, threshold=0.3), Decoding(4, 2, 4, early_stop=True)])
def test_training_asks_the_strategy(decoding, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    asked = []

    def reduce(self, decision: bool, all: bool = True) -> bool:
        asked.append((all, self.lightning_module.trainer.training))
        return decision

    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", reduce)
    module = small_module(decoding=decoding)
    fit(module, batches=1, limit_val_batches=1)
    assert module.rollouts == 1
    assert set(asked) == {(False, True), (False, False)}  # whether *any* process needs it, in training and validation


# ---- prefix cache ---------------------------------------------------------------------------------------------------


class StalePrefix:
    """A second implementation beside the first, without a cache: their logits are compared in every pass.

    Within a block, the network reads the block's first canvas and, behind it, the present canvas from the prefix's
    end on. The first canvas attends to itself alone, the rest to the first canvas's prefix and to itself.
    """

    def __init__(self, policy: Policy):
        self.policy, self.mask_id, self.errors = policy, policy.mask_id, []

    def prefix(self, start: int):
        self.first, self.known, self.cache = None, start - self.policy.shift, self.policy.prefix(start)
        return self

    def keep(self, rows: torch.Tensor) -> None:
        self.first = self.first[rows]
        self.cache.keep(rows)

    def __call__(self, ids, attention, select, reduce, *columns, prefix):
        def compared(logits, *columns):
            self.errors.append((logits - self.logits(ids, attention, select)).abs().max().item())
            return reduce(logits, *columns)

        return self.policy(ids, attention, select, compared, *columns, prefix=self.cache)

    def logits(self, ids, attention, select):
        self.first = ids.clone() if self.first is None else self.first
        width, known = ids.shape[1], self.known
        real = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention
        keys = torch.cat([real, real[:, known:]], 1)[:, None]  # [N, 1, T + rest]
        old = torch.arange(keys.shape[-1]) < width
        frozen = torch.arange(keys.shape[-1]) < known
        seen = torch.where(old.unsqueeze(1), old, frozen | ~old) & keys  # [N, queries, keys]
        dtype = self.policy.model.dtype
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
        positions = torch.cat([torch.arange(width), torch.arange(known, width)])[None]
        both = torch.cat([self.first, ids[:, known:]], 1)
        logits = self.policy.model(both, attention_mask=bias, position_ids=positions).logits[:, width:]
        row, position = select[:, known:].nonzero(as_tuple=True)
        return logits[row, position - self.policy.shift]


def padded(rows: int, width: int = 6) -> Prompts:
    prompts = some_prompts(rows, width)
    return Prompts(prompts.ids, torch.arange(width) >= torch.arange(rows).unsqueeze(1) % 4)


def with_lora(policy: Policy) -> Policy:
    from espo_lightning.policies.lora import add_adapter

    base = peaky_policy(3)
    model = add_adapter(base.model, LoRA(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=rng(13))
    return Policy(model, base.tokenizer, mask_id=base.mask_id, shift=policy.shift).eval()


CACHED = [
    Decoding(12, 4, 12, prefix_cache=True),
    Decoding(12, 12, 6, 0.7, prefix_cache=True),
    Decoding(12, 6, 6, 1.0, entropy_order, 0.9, 0.1, dream_schedule, prefix_cache=True),
    Decoding(12, 6, 12, 0.7, threshold=0.5, prefix_cache=True),
]


@pytest.mark.parametrize("decoding", CACHED, ids=range(len(CACHED)))
@pytest.mark.parametrize("lora", [False, True], ids=["", "LoRA"])
@pytest.mark.parametrize("prompts", [some_prompts(5), padded(5), some_prompts(5, 1)], ids=["", "padded", "one token"])
def test_prefix_cache_is_what_it_says(policy, decoding, lora, prompts):
    """Logits reach 25; the two ways agree to their rounding to float32. The full decoding goes another way."""
    policy, keys = (with_lora(policy) if lora else policy).double(), keys_of(10, 5)
    assert policy.selective
    stale = StalePrefix(policy)
    ours = generate(stale, prompts, keys, decoding)
    assert max(stale.errors) < 1e-5
    without = Decoding(**{**vars(decoding), "prefix_cache": False})
    if prompts.ids.shape[1] > 1:
        assert not torch.equal(ours, generate(policy, prompts, keys, without))


def test_prefix_cache_is_exact_in_a_network_of_one_layer(policy):
    """There, keys and values depend on nothing but their own token."""
    from espo_lightning import new_policy

    base = new_policy(hidden_size=32, layers=1, heads=2, intermediate_size=48, seed=1)
    base.model.lm_head.weight.data.mul_(20)
    base.model.model.layers[0].self_attn.o_proj.weight.data.mul_(20)
    single = Policy(base.model, base.tokenizer, mask_id=base.mask_id, shift=policy.shift).eval()
    prompts, keys = padded(16), keys_of(11, 16)
    for decoding in CACHED:
        without = Decoding(**{**vars(decoding), "prefix_cache": False})
        ours = generate(single, prompts, keys, decoding)
        assert torch.equal(ours, generate(single, prompts, keys, without))


def test_later_passes_compute_only_what_follows_the_prefix(policy):
    widths = []
    hook = policy.model.model.embed_tokens.register_forward_hook(lambda _, ids, __: widths.append(ids[0].shape[1]))
    generate(policy, some_prompts(3), keys_of(12, 3), Decoding(12, 4, 12, prefix_cache=True))
    hook.remove()
    assert widths == [17 if step % 4 == 0 else 12 - step // 4 * 4 + policy.shift for step in range(12)]


def test_gradient_checkpointing_does_not_drop_the_cache():
    """transformers' checkpointed layers ignore a cache in train mode, the only mode in which they checkpoint."""
    from espo_lightning.policies.load import _checkpoint_layers

    policy, prompts, keys = peaky_policy(3), some_prompts(4), keys_of(13, 4)
    expected = generate(policy, prompts, keys, CACHED[0])
    _checkpoint_layers(policy)
    policy.train()
    assert torch.equal(generate(policy, prompts, keys, CACHED[0]), expected)
    assert all(module.training for module in policy.modules())


def test_a_network_with_code_of_its_own_has_no_prefix_cache():
    policy = peaky_policy(3)
    policy = Policy(policy.model, policy.tokenizer, mask_id=policy.mask_id, whole_last_layer=True)
    with pytest.raises(ValueError, match="prefix_cache needs a Llama, Qwen2 or Qwen3 network"):
        generate(policy, some_prompts(1), keys_of(1, 1), CACHED[0])


def test_one_name_is_enough_on_the_command_line(capsys):
    import yaml

    from espo_lightning import fit as command

    names = {"order": "entropy_order", "schedule": "dream_schedule"}
    flags = [f"--model.decoding.{key}=espo_lightning.{name}" for key, name in names.items()]
    flags += ["--model.decoding.threshold=null", "--model.decoding.top_p=0.9", "--model.decoding.early_stop=true"]
    with pytest.raises(SystemExit) as done:
        command.main([*flags, "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["decoding"]["init_args"]
    assert {key: printed[key].rsplit(".", 1)[1] for key in names} == names
    assert (printed["top_p"], printed["early_stop"]) == (0.9, True)


def test_padding_does_not_matter_to_a_cached_prefix(policy):
    """The same prompt, bare and behind four pads, with the same key."""
    prompts, keys = some_prompts(4), keys_of(14, 4)
    ids, mask = F.pad(prompts.ids, (4, 0)), F.pad(torch.ones_like(prompts.ids, dtype=torch.bool), (4, 0))
    bare = generate(policy, prompts, keys, CACHED[3])
    assert torch.equal(generate(policy, Prompts(ids, mask), keys, CACHED[3]), bare)
