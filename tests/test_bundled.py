"""The bundled policies: each opens, decodes in its own way, is small, has a recipe and its place in docs/results.md."""

from pathlib import Path

import pytest
import torch

from espo_lightning import AutoregressiveDecoding, BlockDecoding, Decoding, Layout, Sudoku, load_policy
from espo_lightning.policies.files import ASSETS

ROOT = Path(__file__).parents[1]
NAMES = sorted(folder.name for folder in ASSETS.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_policy_opens_and_decodes(name):
    policy = load_policy(f"bundled:{name}")
    block = policy.layout.block
    decoding = AutoregressiveDecoding(16) if policy.causal else Decoding(16, 16, 4)
    if block:
        decoding = BlockDecoding(16, block, 16)
    decoding.check(policy)
    completion = decoding.greedy.generate(policy, policy.encode(["0000134000303421", "12"]), torch.arange(2))
    assert completion.shape == (2, 16)
    assert policy.mask_id is None or policy.mask_id not in completion


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_says_where_it_comes_from(name):
    assert sum(file.stat().st_size for file in (ASSETS / name).iterdir()) < 4e6
    if name == "sudoku_espo":  # what RL made of bundled:sudoku
        return
    assert (ROOT / "experiments" / f"{name}_base.yaml").exists()
    assert f"bundled:{name}**" in (ROOT / "docs" / "results.md").read_text()


def test_the_policy_with_blocks_is_the_one_without_in_blocks_of_a_row():
    blocks, full = (load_policy(f"bundled:{name}") for name in ("sudoku_block", "sudoku"))
    assert blocks.layout == Layout(4, "response")
    shapes = [{name: p.shape for name, p in policy.named_parameters()} for policy in (blocks, full)]
    assert shapes[0] == shapes[1]


def test_it_mostly_follows_the_habit_as_its_origin_does():
    """Each row's missing digits in ascending order, of most puzzles and most rows."""
    policy, task = load_policy("bundled:sudoku_block"), Sudoku(right=0.0)
    problems = [task.problem("test", 0, i) for i in range(64)]
    prompts = policy.encode([problem.prompt for problem in problems])
    texts = policy.decode(BlockDecoding(16, 4, 16, temperature=0.0).generate(policy, prompts, torch.arange(64)))
    rows = [text[i : i + 4] == p.answer[i : i + 4] for text, p in zip(texts, problems) for i in range(0, 16, 4)]
    assert sum(rows) / len(rows) > 0.7
