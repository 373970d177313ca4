"""Checkpoints of every family that the tests of loading, saving and adapters open."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, write

from espo_lightning.policies.lora import LoRA
from espo_lightning.policies.policy import Prompts
from espo_lightning.scoring.likelihood import ELBO
from espo_lightning.scoring.score import score

MASKED = ["llada", "llada_gqa_sharded", "llada_tied", "dream", "llama_masked", "qwen3_masked"]
CAUSAL = ["llama", "qwen2", "qwen3"]
SMALL = LoRA(rank=4, alpha=8)


@pytest.fixture(name="checkpoints", scope="session")
def checkpoints_fixture(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in MASKED + CAUSAL:
        write(root / kind, kind)
    return root


@pytest.fixture(name="llada")
def llada_fixture(checkpoints, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoints / "llada_gqa_sharded", tmp_path / "ckpt"))


def edit(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def logits(policy, ids, attention=None) -> torch.Tensor:
    """Logits [N, T - shift, V]: entry i predicts token i + shift."""
    select = torch.ones_like(ids, dtype=torch.bool)
    select[:, : policy.shift] = False
    with torch.no_grad():
        return policy(ids, attention, select, lambda x: x).view(len(ids), -1, VOCABULARY)


def tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


def scores(policy, prompts=None, completion=None, rows=slice(None)) -> torch.Tensor:
    prompts = prompts or Prompts(tokens(3, 5), None)
    completion = tokens(3, 6, seed=1) if completion is None else completion
    masks = ELBO(draws=2).draw(torch.arange(3), 6)
    with torch.no_grad():
        return score(
            policy, prompts, completion, type(masks)(*(x[:, rows] if torch.is_tensor(x) else x for x in masks))
        )
