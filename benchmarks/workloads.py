"""What is measured: the work of one outer step, and the settings of the library that do it."""

from dataclasses import dataclass, field
from typing import Any

from espo_lightning import PolicyGradient

CLIP, BETA = 0.2, 1e-2
SIZES = {  # hidden size, layers, heads, MLP width
    "0.45M": (96, 4, 4, 256),
    "0.87M": (128, 4, 4, 384),
    "20M": (448, 8, 7, 1216),
    "135M": (768, 18, 12, 2112),
}


@dataclass(frozen=True)
class Workload:
    """What both sides do in a step.

    size, vocabulary: of the network. prompts, group, updates, draws: Q, G, mu, M.
    width, length, block, steps: prompt and completion tokens, tokens per block, denoising steps.
    micro_batch: completions per pass; None = all at once.
    """

    size: str = "0.87M"
    vocabulary: int = 64
    prompts: int = 2
    group: int = 6
    width: int = 32
    length: int = 32
    block: int = 32
    steps: int = 16
    updates: int = 8
    draws: int = 1
    micro_batch: int | None = None

    def flops(self, passes: float, trained: float) -> float:
        """Nominal FLOP of ``passes`` forward and ``trained`` forward and backward passes of all rows and positions: 2
        per weight and token, plus attention; a backward pass is two forward ones."""
        d, layers, _, mlp = SIZES[self.size]
        tokens = self.width + self.length
        per_token = 2 * (layers * (4 * d * d + 3 * d * mlp) + self.vocabulary * d) + layers * 4 * tokens * d
        return (passes + 3 * trained) * per_token * tokens * self.prompts * self.group

    @property
    def step_flops(self) -> float:
        """Of a whole straightforward step."""
        pairs = 2 * self.updates * self.draws
        return self.flops(self.steps + 2 * pairs, pairs)


@dataclass(frozen=True)
class Setting:
    """How the library does it. ``same_work``: it does the same statistical work as the straightforward version.

    module: further arguments of `ESPOModule`.
    dtype, attention: of the weights; transformers' kernel.
    compile: run the networks through torch.compile.
    """

    same_work: bool = True
    module: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attention: str = "sdpa"
    compile: bool = False


UNPENALISED = PolicyGradient(clip_range=CLIP, beta=0.0)
LESS = {"fresh_masks": False, "objective": UNPENALISED}
FAST = {"dtype": "bfloat16", "attention": "eager", "compile": True}  # sdpa's bfloat16 backward is slow on CPUs
ROWS = {
    "M=1": (Workload(), Setting()),
    "M=2": (Workload(draws=2), Setting()),
    "M=1, 3 x 4": (Workload(micro_batch=3), Setting()),
    "M=2, 3 x 4": (Workload(draws=2, micro_batch=3), Setting()),
    "compile": (Workload(), Setting(compile=True)),
    "M=2, compile": (Workload(draws=2), Setting(compile=True)),
    "reused masks": (Workload(), Setting(same_work=False, module={"fresh_masks": False})),
    "beta=0, skip groups": (Workload(), Setting(same_work=False, module={"objective": UNPENALISED})),
    "both": (Workload(), Setting(same_work=False, module=LESS)),
    "bf16": (Workload(), Setting(same_work=False, dtype="bfloat16")),
    "bf16, eager": (Workload(), Setting(same_work=False, dtype="bfloat16", attention="eager")),
    "all of these": (Workload(), Setting(same_work=False, module=LESS, **FAST)),
}
OF_THE_WORKLOAD = ("vocabulary", "length", "steps", "updates")  # flags
