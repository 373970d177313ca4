"""A config.json and a tokenizer must mean the same tokens by mask and end of text, within the vocabulary."""

from pathlib import Path
from typing import Any

from espo_lightning.policies.files import read_json

GENERATION = "generation_config.json"


def hear_generation(config: Any, folder: Path) -> None:
    """Let the folder's generation_config.json, if there is one, say which tokens end a text, and which is the mask.

    Instruction-tuned checkpoints name ends there that their config.json does not. What else stands in it is about
    ``generate`` of transformers, or of a checkpoint's own code: lengths, temperatures, schedules. None of it is read,
    as decoding is set here; tokens of beginning and padding are the tokenizer's.

    Raises:
        ValueError: it names another mask token than config.json, or is no JSON object.
    """
    if not (folder / GENERATION).is_file():
        return
    said = read_json(folder, GENERATION)
    for key in ("eos_token_id", "mask_token_id"):
        if wrong := [i for i in _ids(said.get(key)) if type(i) is not int]:
            raise ValueError(f"{GENERATION} of {folder} has {key}={wrong[0]!r}, which is no token id")
    ends = _ids(getattr(config, "eos_token_id", None))
    if more := [i for i in _ids(said.get("eos_token_id")) if i not in ends]:
        together = [*ends, *more]
        config.eos_token_id = together if len(together) > 1 else together[0]
    ours, theirs = getattr(config, "mask_token_id", None), said.get("mask_token_id")
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"config.json of {folder} has mask_token_id={ours}, but its {GENERATION} has {theirs}: make them agree"
        )
    if theirs is not None:
        config.mask_token_id = theirs


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
                f"config.json or {GENERATION} of {folder} has {key}={wrong[0]!r}, which is no token id: the embedding "
                f"has {rows} rows, tokenizer and weights do not belong together, or token id {wrong[0]!r} is a mistake"
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
