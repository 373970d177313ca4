"""Random policies with and without the logit shift."""

import pytest
from decoding_cases import peaky_policy

from espo_lightning import (
    Policy,
)


@pytest.fixture(name="policy", scope="module", params=[0, 1], ids=["LLaDA's heads", "Dream's heads"])
def policy_fixture(request):
    """A random policy, with and without the logit shift, at times confident."""
    base = peaky_policy(3)
    base.model.lm_head.weight.data.mul_(3)
    return Policy(base.model, base.tokenizer, mask_id=base.mask_id, shift=request.param).eval()
