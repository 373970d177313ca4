"""Prompts as people store them: a text, or chat messages in the usual shapes; anything else is refused by name."""

from espo_lightning.tasks.base import Messages
from espo_lightning.tasks.files import kind_of

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")  # the names of OpenAI's two interfaces


def prompt_of(value: object) -> str | Messages:
    """A prompt as a text, or as messages of a role and a text each.

    A message's content may be a text or a list of parts with text, which are joined by newlines. Its other keys
    ("name", say) are dropped, as long as they carry nothing that the policy should see.

    Raises:
        ValueError: no such shape, with what is wrong: null, no role, an image, tool calls, ShareGPT's "from", ...
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("has an empty 'prompt'")
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"has a 'prompt' that is {kind_of(value)}, not a text or a list of chat messages")
    if not value:
        raise ValueError("has a 'prompt' without a message")
    messages = [_message(number, message) for number, message in enumerate(value, 1)]
    if messages[-1]["role"] == "assistant":
        raise ValueError("has a 'prompt' that ends with a message of the assistant: it is to end with the question")
    return messages


def _message(number: int, message: object) -> dict[str, str]:
    where = f"has a 'prompt' whose message {number}"
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {kind_of(message)}, not an object with 'role' and 'content'")
    if missing := [key for key in ("role", "content") if key not in message]:
        keys = ", ".join(map(repr, message))
        known = " (ShareGPT's names: call them role and content)" if {"from", "value"} <= message.keys() else ""
        raise ValueError(f"{where} has no {missing[0]!r}, only {keys}{known}")
    if message["role"] not in ROLES:
        raise ValueError(f"{where} has the role {message['role']!r}, not one of {', '.join(ROLES)}")
    if carried := [key for key in ("tool_calls", "function_call", "images", "audio") if message.get(key)]:
        raise ValueError(f"{where} carries {carried[0]!r}: only text can be shown to a policy")
    content = message["content"]
    if isinstance(content, list | tuple):
        content = "\n".join(_part(where, part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where} has {kind_of(content)} as its 'content', not a text")
    if message["role"] == "user" and not content.strip():
        raise ValueError(f"{where} has an empty 'content'")
    return {"role": message["role"], "content": content}


def _part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError(f"{where} has a part of its content that is {kind_of(part)}, not a text")
    if part.get("type", "text") not in TEXT_PARTS:
        raise ValueError(f"{where} has a part of the type {part['type']!r}: only text can be shown to a policy")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{where} has a part without 'text', only {', '.join(map(repr, part))}")
    return part["text"]
