"""The authors' numbers on random weights and given masks, and the library's loss on them (tests/golden/README.md)."""

import json
from pathlib import Path

import torch

from espo_lightning import Masks, Policy, Prompts, espo_loss, score

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "espo.json").read_text())
PAD, MASK = 0, 2
IDS = torch.tensor(GOLDEN["prompts"])
COMPLETION = torch.tensor(GOLDEN["completions"])
AS_THEIRS = Prompts(IDS, None)  # their scorer and sampler attend to the pads
LENGTH = COMPLETION.shape[1]


def masks_of(noised: list, *, coupled: bool = True) -> Masks:
    """The masks behind noised sequences [M][B][P + L], with the weights written out."""
    hidden = torch.tensor(noised)[:, :, -LENGTH:] == MASK
    k = hidden.sum(-1, keepdim=True)
    first = torch.where(hidden, (LENGTH + 1) / k.clamp(min=1), 0.0)
    second = torch.where(hidden, 0.0, (LENGTH + 1) / (LENGTH - k).clamp(min=1))
    return Masks(hidden, (first + second) / 2 if coupled else first, coupled)


def spread(values: list, terms: torch.Tensor) -> torch.Tensor:
    """Terms [M, B, L] of given scores [B]."""
    return (torch.tensor(values) / LENGTH).view(1, -1, 1).expand_as(terms)


def their_name(name: str) -> str:
    """The name that LLaDA gives to a parameter of ours."""
    for ours, theirs in [
        ("lm_head", "model.transformer.ff_out"),
        ("model.norm", "model.transformer.ln_f"),
        ("model.embed_tokens", "model.transformer.wte"),
        ("model.layers", "model.transformer.blocks"),
        ("self_attn.o_proj", "attn_out"),
        ("self_attn.", ""),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ff_norm"),
        ("mlp.gate_proj", "ff_proj"),
        ("mlp.down_proj", "ff_out"),
        ("mlp.", ""),
    ]:
        name = name.replace(ours, theirs)
    return name


def loss_of(policy: Policy, case: dict) -> tuple:
    """The library's loss, with its graph, and statistics for one of the authors' cases."""
    advantages = torch.tensor(GOLDEN["loss"]["advantages"])
    old, ref = GOLDEN["loss"]["values"][case["values"]]
    terms = score(policy, AS_THEIRS, COMPLETION, masks_of(GOLDEN["noised"][case["iteration"]][: case["draws"]]))
    old, ref = terms.detach() if old is None else spread(old, terms), spread(ref, terms)

    def part(rows: torch.Tensor, clip_range: float) -> tuple:
        return espo_loss(
            terms[:, rows], old[:, rows], ref[:, rows], advantages[rows], clip_range=clip_range, beta=case["beta"]
        )

    if case["clip_low"] == case["clip_high"]:
        return part(torch.ones(len(advantages), dtype=torch.bool), case["clip_low"])
    # a positive advantage meets the upper side only and a negative one the lower: two symmetric losses make one
    up, down = advantages > 0, advantages <= 0
    loss = (part(up, case["clip_high"])[0] * up.sum() + part(down, case["clip_low"])[0] * down.sum()) / len(advantages)
    return loss, None
