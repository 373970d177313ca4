"""From text to tokens: what a user writes stays text, also where it spells a special token.

Special tokens of a prompt come from the chat template alone; those of an answer from nowhere. So no text can end a
prompt, begin a turn, or smuggle in a mask: ``<eos>`` in it is five characters. Added tokens that are not special
(``<think>`` of Qwen3, say) are words of the vocabulary and stay what they are.
"""

import re
import warnings
from collections.abc import Iterator
from typing import Any

Messages = list[dict[str, str]]
LARGE = 0.1  # of a text: the share of unknown tokens that is told
PRIVATE = range(0xF0000, 0xFFFFE)  # characters of Unicode's private use, which no template looks at


def plain_tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, none of them special."""
    return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]


def prompt_tokens(tokenizer: Any, turns: list[Messages]) -> list[list[int]]:
    """Token ids of chat-templated conversations, the special ones of which are the template's."""
    spelling = special_spelling(tokenizer)
    spelt = [any(isinstance(v, str) and spelling.search(v) for m in messages for v in m.values()) for messages in turns]
    plain = [messages for messages, special in zip(turns, spelt) if not special]
    render = {"tokenize": False, "add_generation_prompt": True}
    texts = tokenizer.apply_chat_template(plain, **render) if plain else []
    rows = iter([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    return [_with_spelling(tokenizer, m, spelling, render) if s else next(rows) for m, s in zip(turns, spelt)]


def special_spelling(tokenizer: Any) -> re.Pattern:
    """Matches what spells a special token, the longest first; nothing if there are none."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _with_spelling(tokenizer: Any, messages: Messages, spelling: re.Pattern, render: dict) -> list[int]:
    """Tokens of a conversation whose texts spell special tokens, which pass the template as other characters."""
    texts = "".join(value for message in messages for value in message.values() if isinstance(value, str))
    free = (chr(code) for code in PRIVATE if chr(code) not in texts)
    stands_for: dict[str, str] = {}

    def hide(match: re.Match) -> str:
        if match.group() not in stands_for:
            stands_for[match.group()] = next(free)
        return stands_for[match.group()]

    hidden = [
        {key: spelling.sub(hide, value) if isinstance(value, str) else value for key, value in message.items()}
        for message in messages
    ]
    rendered = tokenizer.apply_chat_template(hidden, **render)
    back = str.maketrans({private: text for text, private in stands_for.items()})
    ids: list[int] = []
    for part, special in _parts(rendered, spelling):
        tokens = tokenizer(part, add_special_tokens=False) if special else None
        ids += tokens["input_ids"] if tokens else plain_tokens(tokenizer, [part.translate(back)])[0]
    return ids


def _parts(text: str, spelling: re.Pattern) -> Iterator[tuple[str, bool]]:
    """A rendered text in pieces, (piece, whether it is a special token), none of them empty."""
    end = 0
    for match in spelling.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], False
        yield match.group(), True
        end = match.end()
    if end < len(text):
        yield text[end:], False


def tell_unknown(tokenizer: Any, rows: list[list[int]], texts: list[Any], what: str, share: float = LARGE) -> bool:
    """Warn if the tokenizer cannot read at least a share of some text; whether it did.

    Args:
        rows: token ids of each text.
        texts: shown by their beginning.
        what: "prompt" or "answer".
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return False
    shares = [row.count(unknown) / max(1, len(row)) for row in rows]
    worst = max(range(len(rows)), key=shares.__getitem__, default=None)
    if worst is None or not shares[worst] or shares[worst] < share:
        return False
    text = texts[worst] if isinstance(texts[worst], str) else texts[worst][-1].get("content", "")
    known = tokenizer.get_vocab()
    letters = "".join(dict.fromkeys(c for c in text if c not in known))[:20] if len(known) < 1000 else ""
    warnings.warn(
        f"the tokenizer maps {100 * shares[worst]:.0f} % of the tokens of the {what} that starts {text[:40]!r} to its "
        f"unknown token {tokenizer.unk_token!r}, so that the policy cannot read or write them"
        + (f" (characters like {letters!r})" if letters else ""),
        stacklevel=3,
    )
    return True
