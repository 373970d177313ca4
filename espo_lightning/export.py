"""python -m espo_lightning.export --policy DIR --output DIR: merge adapters and write a checkpoint for other programs.

``llada`` is LLaDA's own format: its parameter names and its config.json as it was. The code files that its ``auto_map``
names are no part of a policy: copy them from the original folder for programs that run them.
"""

import json
import sys
from pathlib import Path
from typing import Literal

from espo_lightning.policies.formats import llada_config, llada_names, was_llada
from espo_lightning.policies.load import load_policy
from espo_lightning.training.command_line import run


def export(policy: str, output: str, format: Literal["llada", "hf"] | None = None) -> Path:
    """Write a policy as a checkpoint without adapters, in the dtype of its weights.

    Args:
        policy: a folder or hub id that load_policy opens, adapters included.
        output: a new or empty folder.
        format: llada or hf (Llama, Qwen2, Qwen3 of transformers); default: llada for what once was LLaDA's, else hf.

    Returns:
        The output folder.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose a new --output")
    loaded = load_policy(policy, dtype="auto")
    if loaded.has_adapters:
        loaded.model = loaded.model.merge_and_unload(safe_merge=True)
    llada = format == "llada" or (format is None and was_llada(loaded.config))
    config = llada_config(loaded.config) if llada else None
    folder.mkdir(parents=True, exist_ok=True)
    if config is None:
        loaded.save(folder)
        return folder
    from huggingface_hub import save_torch_state_dict

    weights = loaded.model.state_dict()
    if loaded.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    names = llada_names(loaded.config).items()
    save_torch_state_dict({theirs: weights[ours] for theirs, ours in names if ours in weights}, folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


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
