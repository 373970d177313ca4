"""The passes of block-causal policies: decoding with a cache, scoring of clean and noisy tokens. Pure.

Counted for prompts that end with a block, or blocks of the response; a prompt whose tail shares a block with the
completion costs up to one block more.
"""

from espo_lightning.decoding.block import BlockDecoding
from espo_lightning.lab.flops import Passes, hidden_in_steps
from espo_lightning.lab.network import Network
from espo_lightning.scoring.masks import Masks


def pass_of(rows: float, tokens: int, keys: int, width: int, positions: float = 0) -> Passes:
    """One pass of some rows that computes ``tokens`` of each, which may attend to ``keys``."""
    return Passes(1, rows * tokens / width, width, positions, rows * tokens * keys)


def block_decoding_passes(decoding: BlockDecoding, completions: int, width: int) -> Passes:
    """Those of `generate_blocks`: one clean pass of the prompt and of every block but the last, and the steps."""
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


def block_scoring_passes(masks: Masks, width: int, micro_batch: int, *, block: int, resumes: bool = True) -> Passes:
    """Those of `block_log_probs`: clean tokens once per completion, noisy ones for every pass that scores something.

    resumes: see `Policy.resumes`; if not, clean tokens go along with every noisy copy.
    """
    length, batch = masks.hidden.shape[-1], masks.hidden.shape[1]
    known, scored = width - block, masks.scored.flatten(0, 1)  # [H M, B, L]
    used = scored.any(-1)
    calls, idle = -(-batch // micro_batch), int((~used[0, ::micro_batch]).sum())  # the first row of a call always runs
    rows, positions = int(used.sum()) + idle, int(scored.sum())
    if not resumes:
        tokens = known + length
        return Passes(calls, rows * tokens / width, width, positions, rows * tokens * tokens)
    clean = Passes(calls, batch * known / width, width, 0, batch * known * known)
    return clean + Passes(calls, rows * length / width, width, positions, rows * length * (known + length))


def cache_bytes(network: Network, tokens: float, stored: int) -> float:
    """Keys and values of so many tokens in all layers; stored: bytes of a number."""
    return 2 * network.layers * network.kv_heads * network.head_dim * tokens * stored
