"""What a denoising step begins with: its uniforms, and where they belong. Everything random is keyed.

Nothing here waits for the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from espo_lightning.keys import fold_in, uniforms

NOISE_STEPS = 16  # whose noise is made at once: it is many small kernels, however few numbers


def step_noise(keys: Tensor, number: int, places: Tensor, length: int) -> Tensor:
    """Uniforms of a step for tokens and orders at some positions of canvases of L tokens: [2, n, places].

    They are numbered by (key, step, position), whoever else is in the batch.

    Args:
        keys: int64 [n].
        number: of the step; or several, [S, 1, 1], for uniforms [S, 2, n, places].
        places: positions, int64 [n or 1, places].
        length: L.
    """
    return uniforms(fold_in(keys, number), torch.stack([places, places + length]).expand(2, len(keys), -1))


def steps_noise(keys: Tensor, numbers: range, places: Tensor, length: int) -> Callable[[int], Tensor]:
    """`step_noise` of steps that are asked for in their order, `NOISE_STEPS` of them computed at once.

    Args:
        numbers: of all steps.
    """
    held: dict[int, Tensor] = {}

    def noise(number: int) -> Tensor:
        if number not in held:
            held.clear()
            some = range(number, min(number + NOISE_STEPS, numbers.stop))
            steps = torch.arange(some.start, some.stop, device=keys.device)
            held.update(zip(some, step_noise(keys, steps.view(-1, 1, 1), places, length)))
        return held[number]

    return noise


def true_places(mask: Tensor, count: int) -> Tensor:
    """Where a mask is true, ``count`` times, as indices of it flattened: int64 [count]."""
    return torch.nonzero_static(mask.flatten(), size=count).squeeze(1)


def needing(hidden: Tensor, each: list[int]) -> Tensor:
    """Rows that have hidden positions, or the first if none has: bool [n, l] -> int64 [k].

    Args:
        each: how many positions are hidden in every row.
    """
    count = sum(map(bool, each))
    return true_places(hidden.any(1), count) if count else torch.zeros(1, dtype=torch.int64, device=hidden.device)
