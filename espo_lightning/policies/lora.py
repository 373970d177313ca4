"""Low-rank adapters through peft: new ones, and those of a folder."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from espo_lightning.ranges import check_counts, check_whole


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters through peft; the defaults are the paper's.

    There is no dropout: rollouts, old scores and updates must come from one and the same function, and a
    dropped-out adapter is another function in every forward pass.

    Args:
        rank: of each adapter.
        alpha: its product is scaled by alpha / rank.
        target_modules: the linear layers that get one, by the end of their name.
        seed: of the initial A (B is zero); torch's global generator is neither read nor advanced.

    Raises:
        ValueError: a number out of range, or no target module.
    """

    rank: int = 128
    alpha: float = 64
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
    seed: int = 0

    def __post_init__(self):
        check_whole(rank=self.rank)
        check_counts(0, seed=self.seed)
        if self.rank < 1 or not 0 < self.alpha < math.inf or not self.target_modules:
            raise ValueError(f"LoRA needs rank >= 1, alpha > 0 and at least one target module, got {self}")


def add_adapter(model: nn.Module, lora: LoRA) -> nn.Module:
    from peft import LoraConfig

    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(lora.target_modules) - layers)
    if unknown:
        raise ValueError(f"LoRA target_modules {unknown} are not in this model: choose from {sorted(layers)}")
    model = _wrap(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(lora.target_modules),
            lora_dropout=0.0,
            task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        ),
    )
    generator = torch.Generator().manual_seed(lora.seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            drawn = nn.init.kaiming_uniform_(
                torch.empty_like(parameter, device="cpu"), a=math.sqrt(5), generator=generator
            )
            parameter.data.copy_(drawn)  # the same on every device
    return model


def _wrap(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator
        return get_peft_model(model, config)


def load_adapter(model: nn.Module, folder: Path, base: str) -> nn.Module:
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != "LORA":
        raise ValueError(f"{folder} is a {config.peft_type} adapter: only LORA has a reference with the adapter off")
    config.inference_mode, config.lora_dropout = False, 0.0
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} lacks adapter_model.safetensors: copy the complete adapter")
    try:
        weights = load_file(file)
        model = _wrap(model, config)
        ours = get_peft_model_state_dict(model, save_embedding_layers=False)
        wrong = sorted(ours.keys() ^ weights.keys()) or [k for k in ours if ours[k].shape != weights[k].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors differ in name or shape, the first is {wrong[0]}")
        set_peft_model_state_dict(model, weights)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter {folder} does not fit its base {base}: {error}") from error
    return model
