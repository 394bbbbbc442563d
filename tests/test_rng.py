"""Counter-based random numbers: the right generator, uniform, independent, and stable for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from scipy import stats
from torch import Tensor

from sslbench.rng import Draws, _hash_on_device, _hash_words, derive_seed, hash_uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
N = 20_000


def splitmix64(state: int) -> int:
    """The output of SplitMix64 for an already advanced state, in Python integers."""
    z = state & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def slow_uniform(key: int, counter: int, number: int) -> float:
    sample_key = splitmix64(counter * GOLDEN + key)
    return (splitmix64(sample_key + (number + 1) * GOLDEN) >> 40) / (1 << 24)


def flat(seed: int = 1, step: int = 0, stream: str = "crop", n: int = N) -> Tensor:
    return Draws(seed, step, torch.arange(n)).uniform(stream)


def neighbours() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of sequences whose counters, keys or names differ as little as they can."""
    two = Draws(1, 0, torch.arange(N)).uniform("crop", 2)
    raw = hash_uniform(5, torch.arange(N), 1)[:, 0]
    base = flat()
    return {
        "numbers of a sample": (two[:, 0], two[:, 1]),
        "positions": (base[:-1], base[1:]),
        "distant positions": (base[:-256], base[256:]),
        "steps": (base, flat(step=1)),
        "seeds": (base, flat(seed=2)),
        "seed and step swapped": (flat(seed=3, step=4), flat(seed=4, step=3)),
        "streams": (base, flat(stream="crop2")),
        "numbered streams": (flat(stream="method/1"), flat(stream="method/2")),
        "keys": (raw, hash_uniform(6, torch.arange(N), 1)[:, 0]),
        "number and position": (two[1:, 0], two[:-1, 1]),
    }


def test_reference_is_splitmix64():
    """The published first outputs for the seed 1234567."""
    outputs = [splitmix64(1234567 + k * GOLDEN) for k in range(1, 6)]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("key", [0, 1, 42, (1 << 63) - 1, derive_seed("any")])
def test_tensors_compute_what_python_integers_compute(key):
    counters = torch.tensor([0, 1, 2, 255, 10**6, (1 << 40) + 3, (1 << 62) + 1])
    expected = [[slow_uniform(key, c, n) for n in range(4)] for c in counters.tolist()]
    assert hash_uniform(key, counters, 4).double().tolist() == expected


def test_golden_values():
    """A change here changes every run ever made: recorded results would no longer be reproducible."""
    assert derive_seed(1, 2, "crop") == 1362633285711808029
    assert derive_seed("a") == 2340832890917691671
    expected = [[0.9332586526870728, 0.5840505361557007], [0.7450045943260193, 0.10088741779327393]]
    assert Draws(1, 7, torch.arange(2)).uniform("crop", 2).double().tolist() == expected


def test_values_do_not_depend_on_the_process():
    """Python salts its own string hashes in every process."""
    code = "import torch, sslbench.rng as r; print(r.Draws(3, 4, torch.arange(3)).uniform('x', 2).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(Draws(3, 4, torch.arange(3)).uniform("x", 2).tolist())


def test_range_and_type():
    values = hash_uniform(3, torch.arange(200_000), 5)
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert (values * (1 << 24) == (values * (1 << 24)).round()).all()


@pytest.mark.parametrize("numbers", [1, 7])
@pytest.mark.parametrize("key", [0, 1, derive_seed("uniform")])
def test_uniformity(key, numbers):
    for column in hash_uniform(key, torch.arange(N), numbers).double().T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
        counts = torch.histc(column, bins=100, min=0, max=1)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_low_bits_are_uniform_too():
    low = (hash_uniform(9, torch.arange(N), 1)[:, 0].double() * (1 << 24)).long() % 256
    assert stats.chisquare(torch.bincount(low, minlength=256).numpy()).pvalue > 1e-4


def test_numbers_of_one_sample_are_uniform():
    assert stats.kstest(hash_uniform(4, torch.tensor([123]), N)[0].double().numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("what", list(neighbours()))
def test_neighbours_are_independent(what):
    """Correlation, and equal counts in the 16 x 16 cells of the unit square, which also sees non-linear ties."""
    a, b = neighbours()[what]
    assert abs(stats.pearsonr(a.numpy(), b.numpy()).statistic) * len(a) ** 0.5 < 4
    cells = (a * 16).long() * 16 + (b * 16).long()
    assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > 1e-4


def test_numbers_do_not_repeat_over_steps_and_streams():
    drawn = torch.cat([flat(step=step, stream=stream, n=64) for step in range(8) for stream in "abcdefgh"])
    collisions = len(drawn) - len(drawn.unique())
    assert collisions <= 4  # 4,096 draws of 24 bits: half a collision is expected


def test_slices_of_positions_give_slices_of_numbers():
    whole = Draws(1, 5, torch.arange(16)).uniform("blur", 2, 3)
    assert whole.shape == (16, 2, 3)
    for part in (slice(0, 4), slice(4, 16), slice(1, 16, 3)):
        share = Draws(1, 5, torch.arange(16)[part]).uniform("blur", 2, 3)
        assert torch.equal(share, whole[part])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Draws(1, 5, order).uniform("blur", 2, 3), whole[order])


def test_more_numbers_extend_fewer():
    draws = Draws(1, 0, torch.arange(8))
    assert torch.equal(draws.uniform("x", 9)[:, :4], draws.uniform("x", 4))


def test_draws_have_no_state():
    draws = Draws(1, 0, torch.arange(8))
    torch.manual_seed(0)
    first = draws.uniform("x")
    torch.manual_seed(1)
    draws.uniform("y")
    assert torch.equal(draws.uniform("x"), first)
    assert first.shape == (8,)


def test_no_positions_give_no_numbers():
    assert Draws(1, 0, torch.arange(0)).uniform("x", 3).shape == (0, 3)


def test_seeds_are_distinct_and_fit_torch():
    seeds = {derive_seed(seed, step, name) for seed in range(20) for step in range(20) for name in ("a", "b")}
    assert len(seeds) == 800
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_a_batch_draws_on_its_own_device() -> None:
    draws = Draws(3, 5, torch.arange(4))
    moved = draws.uniform("s", 2, 3, device=torch.device("meta"))
    assert moved.device.type == "meta"
    assert moved.shape == (4, 2, 3)
    assert torch.equal(draws.uniform("s", 2, 3, device=torch.device("cpu")), draws.uniform("s", 2, 3))


def test_stacked_streams_are_the_streams():
    draws = Draws(3, 5, torch.arange(1000, 1007))
    stacked = draws.stacked(["view0/crop", "view1/crop"], 2, 3)
    assert torch.equal(stacked[0], draws.uniform("view0/crop", 2, 3))
    assert torch.equal(stacked[1], draws.uniform("view1/crop", 2, 3))


def test_signed_and_unsigned_arithmetic_agree():
    counters = torch.tensor([0, 1, 2**40, 2**62, -1])
    for key in (0, 5, 2**63 - 1):
        assert torch.equal(_hash_words([key], counters, 7)[0], _hash_on_device(key, counters, 7))
