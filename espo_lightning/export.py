"""python -m espo_lightning.export --policy DIR --output DIR: merge adapters and write a checkpoint for other programs.

``llada`` is LLaDA's own format: its parameter names and its config.json as it was; ``own`` is that of SDAR, TraDo and
Tiny-A2D, whose parameters have the names of Qwen3, Qwen2 and Llama. The code files that its ``auto_map``
names are no part of a policy: copy them from the original folder for programs that run them.
"""

import json
import sys
from pathlib import Path
from typing import Literal

from espo_lightning.policies.formats import came_in_blocks, llada_config, llada_names, own_config, was_llada
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.policy import Policy
from espo_lightning.training.command_line import run


def export(policy: str, output: str, format: Literal["llada", "own", "hf"] | None = None) -> Path:
    """Write a policy as a checkpoint without adapters, in the dtype of its weights.

    Args:
        policy: a folder or hub id that load_policy opens, adapters included.
        output: a new or empty folder.
        format: llada, own, or hf (Llama, Qwen2, Qwen3 of transformers); default: llada for what once was LLaDA's, own
            for what came as SDAR, TraDo or Tiny-A2D, else hf.

    Returns:
        The output folder.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose a new --output")
    loaded = load_policy(policy, dtype="auto")
    if loaded.has_adapters:
        loaded.model = loaded.model.merge_and_unload(safe_merge=True)
    config = config_of(loaded, format)
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        loaded.save(folder)
        return folder
    from huggingface_hub import save_torch_state_dict

    weights = loaded.model.state_dict()
    if loaded.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    own = {name: name for name in weights}
    names = llada_names(loaded.config) if config["model_type"] == "llada" else own
    save_torch_state_dict({theirs: weights[ours] for theirs, ours in names.items() if ours in weights}, folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def config_of(policy: Policy, format: str | None) -> dict | None:
    """The config.json to write; None = the one that transformers writes."""
    blocks = policy.layout.block is not None
    if format == "llada" or (format is None and was_llada(policy.config) and not blocks):
        return llada_config(policy.config)
    if format == "own" or (format is None and came_in_blocks(policy.config)):
        return own_config(policy.config)
    return None


def main(argv: list[str] | None = None) -> None:
    folder = run(export, "espo_lightning.export", argv)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = sorted({f"{value.split('.')[0]}.py" for value in config.get("auto_map", {}).values()})
    lines = [f"{folder}"]
    if code:  # which transformers runs, and which a policy does not hold
        lines.append(f"for programs that run its own code, copy {', '.join(code)} here from the original checkpoint")
    elif config["model_type"] == "llada":
        lines.append("for programs that run LLaDA's own code, copy its .py files here, and its auto_map to config.json")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
