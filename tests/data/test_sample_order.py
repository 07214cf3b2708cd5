import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_fast.data.order import item_of

PINNED_EPOCH_0 = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
PINNED_EPOCH_7 = [7, 4, 3, 8, 5, 9, 1, 6, 2, 0]


@given(num_items=st.integers(1, 200), epoch=st.integers(0, 2**20), seed=st.integers(-(2**63), 2**64))
@settings(max_examples=60, deadline=None)
def test_each_epoch_draws_every_item_once(num_items, epoch, seed):
    numbers = torch.arange(num_items) + epoch * num_items
    assert sorted(item_of(numbers, num_items, seed).tolist()) == list(range(num_items))


def test_epochs_and_seeds_differ():
    first = item_of(torch.arange(100), 100, 0)
    assert not torch.equal(first, item_of(torch.arange(100, 200), 100, 0))
    assert not torch.equal(first, item_of(torch.arange(100), 100, 1))
    assert not torch.equal(first, torch.arange(100))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_ranks_together_draw_what_one_rank_draws(world_size):
    num_items, batch_size, steps = 17, 12, 9  # 17 does not divide 12: batches straddle epochs
    alone = item_of(torch.arange(steps * batch_size), num_items, 5)
    per_rank = batch_size // world_size
    together = []
    for step in range(steps):
        for rank in range(world_size):
            first = step * batch_size + rank * per_rank
            together.append(item_of(torch.arange(first, first + per_rank), num_items, 5))
    assert torch.equal(torch.cat(together), alone)


def test_the_order_is_pinned():
    # a run resumed with a later release must go on with the same order: these numbers never change
    assert item_of(torch.arange(10), 10, 0).tolist() == PINNED_EPOCH_0
    assert item_of(torch.arange(70, 80), 10, 2**63 + 5).tolist() == PINNED_EPOCH_7


@pytest.mark.parametrize(
    ("numbers", "num_items", "words"),
    [
        (torch.tensor([0]), 0, "at least one item"),
        (torch.tensor([3, -1]), 5, "-1 is negative"),
        (torch.tensor([0.5]), 5, "int64"),
        (torch.tensor([[1]]), 5, r"\(1, 1\)"),
    ],
)
def test_bad_arguments_get_a_sentence(numbers, num_items, words):
    with pytest.raises(ValueError, match=words):
        item_of(numbers, num_items, 0)


def test_no_sample_draws_no_item():
    assert item_of(torch.empty(0, dtype=torch.int64), 5, 0).shape == (0,)
