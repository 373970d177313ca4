"""What the tests of programs share."""

import pytest
from test_code import ISOLATED

from espo_lightning.tasks.sandbox.run import Sandbox

isolated = pytest.mark.skipif(not ISOLATED, reason="no isolation on this host: test_code checks the refusal")


@pytest.fixture(name="box", scope="module")
def box_fixture():
    pool = Sandbox(1)
    yield pool
    pool.close()
