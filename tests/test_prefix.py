"""Keys and values that are known: in room that is taken once, in some rows, and passes that see all of them."""

import pytest
import torch
from block_cases import block_policy

from espo_lightning import Policy
from espo_lightning.keys import uniform, uniforms

BATCH, WIDTH, BLOCK = 3, 6, 4


@pytest.fixture(scope="module")
def policy() -> Policy:
    return block_policy(BLOCK, "response")


IDS = torch.randint(7, 60, (BATCH, WIDTH + 2 * BLOCK), generator=torch.Generator().manual_seed(3))


def states(policy: Policy, stop: int, prefix, rows=slice(None), sees: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the last block before ``stop``."""
    ids = IDS[rows, :stop]
    select = torch.zeros_like(ids, dtype=torch.bool)
    select[:, stop - BLOCK :] = True
    with torch.no_grad():
        return policy(ids, sees, select, lambda logits: logits, prefix=prefix)


def everything(rows: int, queries: int, keys: int) -> torch.Tensor:
    return torch.ones(rows, queries, keys, dtype=torch.bool)


@pytest.mark.parametrize("room", [None, 14, 99])
def test_room_changes_no_bit(policy, room):
    """Two blocks after a prompt, the first of which is forgotten once and computed again."""
    plain, other = policy.prefix(), policy.prefix(room=room)
    for known in (plain, other):
        states(policy, WIDTH, known)
        known.width = WIDTH
        states(policy, WIDTH + BLOCK, known)
        assert len(known) == WIDTH
        known.width = None
    for stop in (WIDTH + BLOCK, WIDTH + 2 * BLOCK):
        assert torch.equal(states(policy, stop, plain), states(policy, stop, other))
        assert len(plain) == len(other) == stop


def test_room_is_taken_once(policy):
    known, places = policy.prefix(room=IDS.shape[1]), set()
    for stop in (WIDTH, WIDTH + BLOCK, WIDTH + 2 * BLOCK):
        states(policy, stop, known)
        places.add(tuple(layer.keys.data_ptr() for layer in known.cache.layers))
    assert len(places) == 1


@pytest.mark.parametrize("room", [None, IDS.shape[1]])
def test_some_rows_are_what_they_were(policy, room):
    rows, known = torch.tensor([2, 0]), policy.prefix(room=room)
    states(policy, WIDTH, known)
    few, kept = known.of(rows), known.of(torch.arange(BATCH))
    kept.keep(rows)
    expected = states(policy, WIDTH + BLOCK, known)[: BATCH * BLOCK].view(BATCH, BLOCK, -1)[rows].flatten(0, 1)
    for some in (few, kept):
        torch.testing.assert_close(states(policy, WIDTH + BLOCK, some, rows), expected, rtol=0, atol=1e-12)
        assert len(some) == WIDTH + BLOCK


def test_a_pass_that_sees_everything_need_not_be_told(policy):
    logits = []
    for sees in (None, everything(BATCH, BLOCK, WIDTH + BLOCK)):
        known = policy.prefix(room=IDS.shape[1])
        states(policy, WIDTH, known)
        logits.append(states(policy, WIDTH + BLOCK, known, sees=sees))
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="pass attention"):
        states(policy, WIDTH + BLOCK, None)


def test_a_prefix_without_positions_has_any_number_of_rows(policy):
    known = policy.prefix(0, room=WIDTH)
    states(policy, WIDTH, known)
    assert len(known) == 0
    states(policy, WIDTH, known, rows=slice(1))


def test_uniforms_are_some_of_uniform():
    keys = torch.tensor([3, -8])
    assert torch.equal(
        uniforms(keys, torch.tensor([[5, 0], [2, 2]])), uniform(keys, 6).gather(1, IDS.new_tensor([[5, 0], [2, 2]]))
    )
    assert torch.equal(uniforms(keys, torch.arange(4)), uniform(keys, 9)[:, :4])


@pytest.mark.parametrize("rows", [[0, 1, 2, 0, 1, 2], [0, 2, 1, 1], [2, 1, 0]])
def test_gradients_flow_through_rows_that_repeat(policy, rows):
    """Keys of copies lead back to those they were copied from, by either way of copying."""
    known, rows = policy.prefix(), torch.tensor(rows)
    states(policy, WIDTH, known)
    for layer in known.cache.layers:
        layer.keys.requires_grad_()
    weight = torch.rand(len(rows), 4, generator=torch.Generator().manual_seed(0)).double()
    copies = known.of(rows, WIDTH - 2)
    for layer, copy in zip(known.cache.layers, copies.cache.layers):
        assert torch.equal(copy.keys, layer.keys[rows, :, : WIDTH - 2])
        (copy.keys.sum((1, 2, 3)) * weight[:, 0]).sum().backward()
        for row in range(BATCH):
            expected = weight[rows == row, 0].sum()
            torch.testing.assert_close(
                layer.keys.grad[row, :, : WIDTH - 2], expected.expand_as(layer.keys[row, :, : WIDTH - 2])
            )
        assert not layer.keys.grad[:, :, WIDTH - 2 :].any()
