"""Rollouts and training on the pretended device, and how often the host waited in which part."""

from collections import Counter

from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_device import DEVICE, Pretended

from espo_lightning import ESPOModule

PHASES = ("complete", "judge_and_score", "score", "update", "log_step")


class Accelerator(CPUAccelerator):
    def setup_device(self, device) -> None:
        """Lightning's own wants a CPU."""


def strategy() -> dict:
    """Arguments of a Trainer that has the device."""
    return {"accelerator": "auto", "strategy": SingleDeviceStrategy(device=DEVICE, accelerator=Accelerator())}


def watch(module: ESPOModule, device: Pretended) -> list[tuple[str, Counter]]:
    """Notes, for every call of a phase of a step, what was waited for in it; inner phases are counted by themselves."""
    noted: list[tuple[str, Counter]] = []

    def watched(phase: str, function):
        def run(*arguments):
            before, inside = Counter(device.record.waits), len(noted)
            result = function(*arguments)
            inner = sum((waits for _, waits in noted[inside:]), Counter())
            noted.append((phase, Counter(device.record.waits) - before - inner))
            return result

        return run

    for phase in PHASES:
        setattr(module, phase, watched(phase, getattr(module, phase)))
    return noted


def most(noted: list[tuple[str, Counter]], phase: str) -> int:
    """The largest number of waits of a phase."""
    return max((sum(waits.values()) for name, waits in noted if name == phase), default=0)
