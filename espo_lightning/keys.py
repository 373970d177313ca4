"""Keyed randomness: every random number of a run is a pure function of a *key*.

A key is an int64 that is folded together from (seed, purpose, rollout, global sample index, ...). Masks and rollouts
therefore do not depend on the world size, on the split into micro-batches or on a resume, and no global generator is
ever touched.
"""

import torch
from torch import Tensor

NO_FLOAT64 = ("mps",)  # types of devices that do not know it: Apple's GPUs
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed int64: the increment of SplitMix64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> on int64 copies the sign bit


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection of the 64-bit integers."""
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    return x ^ _shift_right(x, 31)


def fold_in(keys: Tensor | int, data: Tensor | int) -> Tensor:
    """Derive independent keys: int64 ``keys`` and ``data``, any shapes that broadcast."""
    keys, data = torch.as_tensor(keys), torch.as_tensor(data)
    return _mix(_mix(keys * _GOLDEN + 1) ^ _mix(data * _GOLDEN))


def random_bits(keys: Tensor, n: int) -> Tensor:
    """``n`` random int64 per key: [...] -> [..., n]."""
    counter = torch.arange(1, n + 1, device=keys.device)
    return _mix(_mix(keys).unsqueeze(-1) + counter * _GOLDEN)


def uniform(keys: Tensor, n: int) -> Tensor:
    """``n`` uniforms of type `real` on [0, 1) per key: [...] -> [..., n]."""
    return unit(random_bits(keys, n), real(keys.device))


def uniforms(keys: Tensor, numbers: Tensor) -> Tensor:
    """Those of `uniform` with these numbers, from 0: [...], int64 [..., n] that broadcasts -> [..., n]."""
    return unit(_mix(_mix(keys).unsqueeze(-1) + (numbers + 1) * _GOLDEN), real(keys.device))


def real(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def unit(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Random int64 as numbers of [0, 1), from as many of their bits as float32 or float64 hold exactly."""
    digits = {torch.float32: 24, torch.float64: 53}[dtype]
    return _shift_right(bits, 64 - digits).to(dtype) * 2.0**-digits


def randint(keys: Tensor, high: int) -> Tensor:
    """One integer on 0..high-1 per key (modulo bias below high / 2^63)."""
    return _shift_right(random_bits(keys, 1).squeeze(-1), 1) % high


def randints(keys: Tensor, n: int, high: Tensor) -> Tensor:
    """``n`` integers per key, each on 0..high-1 of its own ([..., n]); the first is that of `randint`."""
    return _shift_right(random_bits(keys, n), 1) % high


def random_subset(keys: Tensor, counts: Tensor, length: int) -> Tensor:
    """A uniformly random subset of ``counts`` out of ``length`` positions: [...] -> bool [..., length]."""
    ranks = random_bits(keys, length).argsort(-1).argsort(-1)
    return ranks < counts.unsqueeze(-1)
