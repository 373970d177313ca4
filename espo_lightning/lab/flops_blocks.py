"""The passes of block-causal policies: decoding with a cache, scoring of clean and noisy tokens. Pure.

Counted for prompts that end with a block, or blocks of the response; a prompt whose tail shares a block with the
completion costs up to one block more.
"""

from espo_lightning.decoding.block import BlockDecoding
from espo_lightning.lab.flops import Passes, hidden_in_steps, pass_of
from espo_lightning.lab.network import Network
from espo_lightning.scoring.block import parts_of
from espo_lightning.scoring.masks import Masks


def block_decoding_passes(decoding: BlockDecoding, completions: int, width: int) -> Passes:
    """Those of `decode_blocks`: one clean pass of the prompt and of every block but the last, and the steps."""
    block, hidden = decoding.block_length, hidden_in_steps(decoding)
    prompt, passes = width - decoding.length, Passes(0, 0, width, 0, 0)
    for number in range(decoding.blocks):
        start = prompt + number * block
        clean = prompt if number == 0 else block
        if decoding.cache:
            passes += pass_of(completions, clean, start, width)
        for positions in hidden:
            tokens = block if decoding.cache else start + block
            passes += pass_of(completions, tokens, start + block, width, completions * positions)
    return passes


def block_scoring_passes(
    masks: Masks, width: int, micro_batch: int, draws: int | None = None, *, block: int, resumes: bool = True
) -> Passes:
    """Those of `block_log_probs`: clean tokens once per completion, then noisy ones in parts, where they are read.

    draws: of which a call scores at most so many; None = all. resumes: see `Policy.resumes`; if not, clean tokens go
    along with every noisy copy.
    """
    if draws is not None and len(masks.weight) > draws:
        settings = {"block": block, "resumes": resumes}
        parts = [block_scoring_passes(part, width, micro_batch, **settings) for part in masks.split(draws)]
        return sum(parts[1:], parts[0])
    length, batch = masks.hidden.shape[-1], masks.hidden.shape[1]
    known, scored = width - block, masks.scored.flatten(0, 1)  # [H M, B, L]
    calls = -(-batch // micro_batch)

    def rows_of(part: slice) -> int:
        used = scored[..., part].any(-1)
        return int(used.sum() + (~used[0, ::micro_batch]).sum())  # the first row of a call always runs

    if not resumes:
        rows, tokens = rows_of(slice(None)), known + length
        return Passes(calls, rows * tokens / width, width, int(scored.sum()), rows * tokens * tokens)
    passes = Passes(calls, batch * known / width, width, 0, batch * known * known)
    for part in parts_of(length, block):
        rows, tokens = rows_of(part), part.stop - part.start
        keys, positions = width - length + part.stop - block + tokens, int(scored[..., part].sum())
        passes += Passes(calls, rows * tokens / width, width, positions, rows * tokens * keys)
    return passes


def cache_bytes(network: Network, tokens: float, stored: int) -> float:
    """Keys and values of so many tokens in all layers; stored: bytes of a number."""
    return 2 * network.layers * network.kv_heads * network.head_dim * tokens * stored
