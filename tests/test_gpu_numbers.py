"""Randomness, scores and completions on a GPU are those of the CPU. The default suite runs these tests on the CPU."""

import pytest
import torch
from checkpoints import golden_folder
from golden_cases import AS_THEIRS, COMPLETION, GOLDEN, LENGTH, loss_of, masks_of, their_name
from gpu_cases import DECODERS, EVERYWHERE, opinionated, wide

from espo_lightning import ELBO, BlockELBO, Decoding, MeanField, Prompts, TimeELBO, keys, load_policy, score
from espo_lightning.policies import prefix as prefix_module
from espo_lightning.scoring.likelihood import QuadratureELBO, Seen

PROMPTS = ["abc", "defghi", "j", "kl", "abc"]
KEYS = keys.fold_in(7, torch.arange(5))
LAWS = {
    "coupled": ELBO(draws=3),
    "stratified": ELBO(draws=3, stratified=True),
    "paper": ELBO(draws=2, coupled=False, smallest_count=1),
    "blocks": BlockELBO(draws=2, block=4),
    "quadrature": QuadratureELBO(),
    "time": TimeELBO(draws=2),
    "noisy prompts": MeanField(prompt_noise=0.3),
}
WIDE_ONLY = ("time", "noisy prompts")  # which compare uniforms of the widest type with a chance


@EVERYWHERE
def test_keyed_randomness_is_that_of_the_cpu_bit_for_bit(device):
    there = KEYS.to(device)
    counts = torch.tensor([0, 1, 7, 32, 33])
    for function, arguments in [
        (keys.fold_in, (11,)),
        (keys.random_bits, (33,)),
        (keys.randint, (10,)),
        (keys.randints, (3, torch.tensor([1, 10, 10**6]))),
        (keys.random_subset, (counts, 33)),
    ]:
        moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        assert torch.equal(function(there, *moved).cpu(), function(KEYS, *arguments)), function.__name__
    expected = keys.unit(keys.random_bits(KEYS, 33), wide(device))
    assert torch.equal(keys.uniform(there, 33).cpu(), expected)
    numbers = torch.tensor([[0, 5, 32]])
    assert torch.equal(keys.uniforms(there, numbers.to(device)).cpu(), expected[:, [0, 5, 32]])


@EVERYWHERE
@pytest.mark.parametrize("name", LAWS)
def test_masks_are_those_of_the_cpu(device, name):
    if name in WIDE_ONLY and wide(device) != torch.float64:
        return  # there they are other masks of the same law
    law = LAWS[name]
    ours = law.masks(KEYS.to(device), Seen.whole(KEYS.to(device), 12))
    theirs = law.masks(KEYS, Seen.whole(KEYS, 12))
    assert torch.equal(ours.hidden.cpu(), theirs.hidden)
    torch.testing.assert_close(ours.weight.cpu(), theirs.weight, rtol=1e-6, atol=0)
    assert torch.equal(ours.tallied().tally, theirs.tallied().tally)


# ---- the authors' numbers -------------------------------------------------------------------------------------------


def golden_policy(folder, device: str, dtype: torch.dtype):
    return load_policy(golden_folder(folder / "tiny", "tiny.safetensors")).to(device, dtype)


@EVERYWHERE
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_golden_elbos(tmp_path, device, dtype, tolerance):
    """nats; the ELBOs are about -60, and bfloat16 has three digits."""
    policy = golden_policy(tmp_path, device, dtype)
    prompts = Prompts(AS_THEIRS.ids.to(device), None)
    for iteration, noised in enumerate(GOLDEN["noised"]):
        masks = masks_of(noised)
        masks = masks._replace(hidden=masks.hidden.to(device), weight=masks.weight.to(device))
        with torch.no_grad():
            elbo = score(policy, prompts, COMPLETION.to(device), masks).sum(-1).mean(0)
        assert elbo.dtype == torch.float32
        theirs = torch.tensor([row[iteration] for row in GOLDEN["elbo"]["coupled_mean"]])
        torch.testing.assert_close(elbo.cpu(), theirs, rtol=0, atol=tolerance)


@EVERYWHERE
def test_golden_losses_and_gradients(tmp_path, monkeypatch, device):
    policy = golden_policy(tmp_path, device, torch.float32)
    with torch.device(device):  # where its tensors are made
        monkeypatch.setattr("golden_cases.AS_THEIRS", Prompts(AS_THEIRS.ids.to(device), None))
        monkeypatch.setattr("golden_cases.COMPLETION", COMPLETION.to(device))
        for case in GOLDEN["loss"]["cases"][::5]:
            policy.zero_grad()
            loss, _ = loss_of(policy, case)
            loss.backward()
            norms = {their_name(name): parameter.grad.norm() for name, parameter in policy.model.named_parameters()}
            ours = torch.stack([norms[name] for name in GOLDEN["loss"]["parameters"]])
            torch.testing.assert_close(ours.cpu(), torch.tensor(case["grad_norms"], device="cpu"), rtol=1e-3, atol=1e-6)
            assert float(loss.detach()) == pytest.approx(case["loss"], abs=1e-5)
    assert COMPLETION.shape[1] == LENGTH


# ---- decoding -------------------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("name", DECODERS)
def test_completions_are_those_of_the_cpu(device, name):
    decoder, made = DECODERS[name]
    policy, there = opinionated("cpu", torch.float64, **made), opinionated(device, **made)
    expected, trace = decoder.decode(policy, policy.encode(PROMPTS), KEYS)
    ours, their_trace = decoder.decode(there, there.encode(PROMPTS), KEYS.to(device))
    assert ours.device.type == device
    plain = decoder.generate(there, there.encode(PROMPTS), KEYS.to(device))
    assert torch.equal(plain, ours)
    assert there.mask_id is None or not (ours == there.mask_id).any()
    same = (ours.cpu() == expected).all(-1)
    if wide(device) == torch.float64:
        assert same.all()
        assert torch.equal(their_trace.steps.cpu(), trace.steps)
        torch.testing.assert_close(their_trace.entropy.cpu(), trace.entropy, rtol=1e-5, atol=1e-5)
    if name == "greedy":  # nothing is drawn from uniforms of another type
        assert same.all()


@EVERYWHERE
def test_early_stop_keeps_the_text_and_saves_passes(device):
    policy, passes = opinionated(device), []
    policy.register_forward_hook(lambda *_: passes.append(1))
    texts = []
    for early_stop in (False, True):
        decoder = Decoding(12, 4, 12, early_stop=early_stop)
        completion = decoder.generate(policy, policy.encode(PROMPTS), KEYS.to(device))
        texts.append(policy.decode(completion))
        passes.append(0)
    assert texts[0] == texts[1]
    first = passes.index(0)
    assert first == 12
    assert len(passes) - first - 2 < 12


@EVERYWHERE
def test_a_threshold_that_all_reach_is_one_pass_a_block(device):
    policy, passes = opinionated(device), []
    policy.register_forward_hook(lambda *_: passes.append(1))
    Decoding(12, 6, 12, threshold=1e-30).generate(policy, policy.encode(PROMPTS), KEYS.to(device))
    assert len(passes) == 2


@EVERYWHERE
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_and_batch_mates_change_nothing(device, attention):
    policy = opinionated(device, torch.float32)
    policy.model.set_attn_implementation(attention)
    prompts = policy.encode(PROMPTS)
    completion = torch.randint(32, 60, (5, 12), generator=torch.Generator().manual_seed(0)).to(device)
    masks = ELBO(draws=2).draw(KEYS.to(device), 12)
    with torch.no_grad():
        together = score(policy, prompts, completion, masks)
        for row, prompt in enumerate(PROMPTS):
            only = slice(row, row + 1)
            alone = score(policy, policy.encode([prompt]), completion[only], masks.of(only))
            torch.testing.assert_close(alone, together[:, only], rtol=1e-3, atol=1e-3)


@EVERYWHERE
def test_a_head_in_chunks_gives_the_same_numbers_and_gradients(device, monkeypatch):
    found = []
    for head_bytes in (prefix_module.HEAD_BYTES, 4 * 66 * 7):
        monkeypatch.setattr(prefix_module, "HEAD_BYTES", head_bytes)
        policy = opinionated(device)
        completion = torch.randint(32, 60, (5, 12), generator=torch.Generator().manual_seed(0)).to(device)
        terms = score(policy, policy.encode(PROMPTS), completion, ELBO(draws=2).draw(KEYS.to(device), 12))
        terms.sum().backward()
        found.append([terms.detach(), *(p.grad for p in policy.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
