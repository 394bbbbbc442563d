"""The feature queue: order, wrap-around, alignment, what a checkpoint keeps."""

from __future__ import annotations

import pytest
import torch

from sslbench.errors import ConfigError
from sslbench.nn.queue import FeatureQueue


def numbered(first: int, count: int, dim: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, dim)


def pushed(queue: FeatureQueue, batches: int, size: int = 2) -> FeatureQueue:
    for first in range(0, batches * size, size):
        queue.push(keys=numbered(first, size, 3), pooled=numbered(first, size, 5))
    return queue


def test_starts_as_random_unit_rows_or_zeros() -> None:
    queue = FeatureQueue(64, 8, keys=16)
    torch.testing.assert_close(queue["keys"].norm(dim=1), torch.ones(64))
    assert queue["keys"].mean(dim=0).abs().max() < 0.2
    assert not FeatureQueue(64, 8, init="zeros", keys=16)["keys"].any()


def test_new_rows_replace_the_oldest_and_wrap_around() -> None:
    queue = pushed(FeatureQueue(6, 2, keys=3, pooled=5), 3)
    assert queue["keys"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    queue.push(keys=numbered(6, 2, 3), pooled=numbered(6, 2, 5))
    assert queue["keys"][:, 0].tolist() == [6, 7, 2, 3, 4, 5]
    assert queue.slots(2).tolist() == [2, 3]


def test_a_push_may_cross_the_end() -> None:
    queue = pushed(FeatureQueue(6, 2, keys=3, pooled=5), 2)
    queue.push(keys=numbered(4, 4, 3), pooled=numbered(4, 4, 5))
    assert queue["keys"][:, 0].tolist() == [6, 7, 2, 3, 4, 5]


def test_sets_stay_aligned() -> None:
    queue = pushed(FeatureQueue(6, 2, keys=3, pooled=5), 8)
    assert torch.equal(queue["keys"][:, 0], queue["pooled"][:, 0])


def test_is_full_after_its_length() -> None:
    queue = FeatureQueue(6, 2, keys=3, pooled=5)
    assert [bool(pushed(queue, 1).is_full) for _ in range(4)] == [False, False, True, True]


def test_state_dict_continues_where_it_stopped() -> None:
    queue, other = (FeatureQueue(6, 2, keys=3, pooled=5) for _ in range(2))
    other.load_state_dict(pushed(queue, 4).state_dict())
    for each in (queue, other):
        each.push(keys=-numbered(1, 2, 3), pooled=-numbered(1, 2, 5))
    assert other["keys"][:, 0].tolist() == queue["keys"][:, 0].tolist() == [6, 7, -1, -2, 4, 5]


def test_rows_carry_no_gradient() -> None:
    queue = FeatureQueue(4, 2, keys=3)
    queue.push(keys=torch.ones(2, 3, requires_grad=True) * 2)
    assert not queue["keys"].requires_grad


def test_length_must_be_a_multiple_of_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"method\.queue=100 is not a multiple of train\.batch_size=32") as info:
        FeatureQueue(100, 32, keys=3)
    assert "method.queue=96" in str(info.value.hint)
    with pytest.raises(ConfigError, match=r"method\.bank=8") as info:
        FeatureQueue(8, 32, option="method.bank", keys=3)
    assert "method.bank=32" in str(info.value.hint)


def test_every_set_must_be_pushed() -> None:
    with pytest.raises(ValueError, match="keys, pooled, got keys"):
        FeatureQueue(4, 2, keys=3, pooled=5).push(keys=torch.ones(2, 3))
