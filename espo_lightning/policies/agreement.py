"""A config.json and a tokenizer must mean the same tokens by mask and end of text, within the vocabulary."""

from pathlib import Path
from typing import Any


def mask_token(config: Any, tokenizer: Any, rows: int, folder: Path, *, causal: bool) -> int | None:
    """The mask token of a checkpoint, None of a causal one, once config, tokenizer and embedding agree.

    Args:
        rows: of the embedding.
        folder: named in messages.

    Raises:
        ValueError: naming both sides of what does not agree.
    """
    ends = _ids(config.eos_token_id)
    named = {"eos_token_id": ends, "mask_token_id": [] if causal else _ids(getattr(config, "mask_token_id", None))}
    for key, ids in named.items():
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < rows]:
            raise ValueError(
                f"config.json of {folder} has {key}={wrong[0]!r}, which is no token id: the embedding has {rows} rows, "
                f"tokenizer and weights do not belong together, or token id {wrong[0]!r} is a mistake"
            )
    largest = max([tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.get_vocab().values()])
    if largest >= rows:
        raise ValueError(
            f"tokenizer and weights of {folder} do not belong together: token id {largest}, but the embedding has "
            f"{rows} rows"
        )
    if ends and tokenizer.eos_token_id not in ends:
        raise ValueError(
            f"config.json of {folder} has eos_token_id={config.eos_token_id}, but its tokenizer ends texts with "
            f"{tokenizer.eos_token!r}, id {tokenizer.eos_token_id}: make them agree (a list may name several)"
        )
    return None if causal else _mask(config, tokenizer, folder, {*ends, tokenizer.eos_token_id})


def _mask(config: Any, tokenizer: Any, folder: Path, ends: set[int]) -> int:
    ours, theirs = getattr(config, "mask_token_id", None), tokenizer.mask_token_id
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"config.json of {folder} has mask_token_id={ours}, but its tokenizer's mask token is "
            f"{tokenizer.mask_token!r}, id {theirs}: make them agree"
        )
    mask = theirs if ours is None else ours
    if mask is None:
        raise ValueError(
            f"{folder} has no mask token: set mask_token_id in config.json, or mask_token in tokenizer_config.json"
        )
    others = {"end-of-text": ends, "unknown": {tokenizer.unk_token_id}, "beginning-of-text": {tokenizer.bos_token_id}}
    if same := [name for name, ids in others.items() if mask in ids]:
        raise ValueError(
            f"the mask token of {folder}, id {mask}, is its {same[0]} token, too: a canvas could not tell them apart"
        )
    return mask


def _ids(value: Any) -> list:
    """One id, several, or none."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
