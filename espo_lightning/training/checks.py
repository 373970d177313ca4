"""Settings that contradict each other or are out of range, refused before anything begins."""

from espo_lightning.decoding.decoder import Decoder
from espo_lightning.objectives.objective import Objective
from espo_lightning.policies.policy import Policy
from espo_lightning.scoring.likelihood import Likelihood


def check_settings(
    policy: Policy,
    decoding: Decoder,
    likelihood: Likelihood,
    objective: Objective,
    group_size: int,
    updates: int,
    micro_batch: int | None,
    reference_sync: int | None,
) -> None:
    """Raises ValueError if the arguments of `ESPOModule` that these are do not fit together."""
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2: an advantage compares completions; got {group_size}")
    if updates < 1 or (micro_batch is not None and micro_batch < 1):
        raise ValueError(f"updates and micro_batch must be at least 1, got {updates} and {micro_batch}")
    if objective.groups and micro_batch is not None and micro_batch % group_size:
        raise ValueError(
            f"micro_batch must be a multiple of group_size {group_size}, as {type(objective).__name__} weighs the "
            f"completions of a prompt against each other; got {micro_batch}"
        )
    if reference_sync is not None:
        if not objective.reference:
            raise ValueError("reference_sync has no effect with beta=0: there is no reference; set beta or drop it")
        if policy.has_adapters:
            raise ValueError("reference_sync is not possible with adapters: the reference is the base without them")
    decoding.check(policy)
    if decoding.temperature == 0:
        raise ValueError("decoding.temperature is 0: the completions of a group would all be equal; set it above 0")
    likelihood.check(policy, decoding.length, updates)
    likelihood.check_decoding(decoding, updates)
    objective.check(likelihood, decoding)
