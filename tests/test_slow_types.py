"""What is said where a type of numbers is slow on the device at hand, with processors and GPUs that are made up."""

import warnings

import pytest
import torch
from conftest import fit, small_module, small_policy

from espo_lightning import Decoding
from espo_lightning.evaluate import evaluate
from espo_lightning.policies import precision
from espo_lightning.policies.precision import native_bfloat16, slow_type
from espo_lightning.tasks import Sudoku

ZEN_3 = {"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "x"}
ZEN_4, APPLE_M2, APPLE_M1 = ZEN_3 | {"avx512_bf16": True}, {"neon": True, "bf16": True}, {"neon": True, "bf16": False}
EMULATED = "no instructions for bfloat16.*emulated.*use float32 here.*Zen 4"


@pytest.fixture
def old_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN_3, raising=False)


def test_processors_that_have_it():
    assert native_bfloat16(ZEN_4)
    assert native_bfloat16(APPLE_M2)
    assert not native_bfloat16(ZEN_3)
    assert not native_bfloat16(APPLE_M1)


def test_a_torch_that_cannot_say_is_believed(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert native_bfloat16()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_warns_once_where_bfloat16_is_emulated(old_processor, precision):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(small_module(), batches=1, precision=precision)
    lines = [str(w.message) for w in told if "emulated" in str(w.message)]
    assert len(lines) == (precision == "bf16-mixed")


def test_an_evaluation_in_bfloat16_warns(old_processor, tmp_path):
    settings = {"problems": 2, "decoding": Decoding(16, 16, 1, temperature=0.0)}
    with pytest.warns(UserWarning, match=EMULATED):
        evaluate(small_policy().to(torch.bfloat16), Sudoku(), output=str(tmp_path / "x.json"), **settings)


def test_nothing_is_said_where_nothing_is_slow(old_processor, monkeypatch):
    assert slow_type(small_policy()) is None
    assert slow_type(small_policy(), mixed=True) is not None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN_4)
    assert slow_type(small_policy().to(torch.bfloat16)) is None


def test_a_large_float32_policy_on_a_gpu_is_told_of_tf32(monkeypatch):
    class Weight:
        """One that says it is on a GPU."""

        device, dtype = torch.device("cuda"), torch.float32

        def __init__(self, size: int):
            self.numel = lambda: size

    class Large:
        def __init__(self, size: int, dtype=torch.float32):
            self.weight = Weight(size)
            self.weight.dtype = dtype

        def parameters(self):
            return iter([self.weight])

    assert "without TF32" in slow_type(Large(precision.LARGE))
    assert slow_type(Large(precision.LARGE), mixed=True) is None
    assert slow_type(Large(precision.LARGE, torch.bfloat16)) is None
    assert slow_type(Large(precision.LARGE - 1)) is None  # a small one spends its time elsewhere
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert slow_type(Large(precision.LARGE)) is None
    finally:
        torch.set_float32_matmul_precision(before)
