"""Callbacks and flags that Lightning itself gives up on: one message, no traceback, and the command that resumes."""

import os
import signal
import time

import pytest
from run_cases import ends, refused, tiny_fixture  # noqa: F401

from espo_lightning import fit

pytestmark = pytest.mark.usefixtures("global_generators_untouched")
NOTHING = ["EarlyStopping"], ["ModelCheckpoint", "every_n_train_steps=1"]


@pytest.mark.parametrize("callback", NOTHING, ids=lambda given: given[0])
def test_a_metric_that_there_is_not_is_one_message(callback, tiny, tmp_path, capsys):
    name, *settings = callback
    given = [f"--trainer.callbacks.{value}" for value in ("monitor=nothing", *settings)]
    run_dir = tmp_path / "run"
    flags = [*tiny, "--data.batches=2", "--checkpoint_every=1", f"--run_dir={run_dir}"]
    assert ends(fit, *flags, f"--trainer.callbacks={name}", *given) == 1
    printed = capsys.readouterr().err
    assert "nothing" in printed
    assert "Traceback" not in printed
    assert f"--ckpt_path {run_dir / 'checkpoints'}" in printed or "nothing is left" in printed


@pytest.mark.parametrize("value", ["-1", "0", "-2"])
def test_devices_that_a_cpu_has_not_are_refused(value, tiny, tmp_path, capsys):
    message = refused(capsys, fit, *tiny, f"--run_dir={tmp_path / 'run'}", f"--trainer.devices={value}")
    assert "devices" in message
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_written_as_yaml_is_refused(tiny, tmp_path, capsys):
    """Lightning's Timer has an enumeration among its defaults; --trainer.max_time is the same."""
    timer = ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:00:01"]
    assert "Timer" in refused(capsys, fit, *tiny, f"--run_dir={tmp_path / 'run'}", *timer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fault", [ValueError, RuntimeError, TypeError, OSError])
def test_a_signal_of_which_a_library_makes_an_error_is_a_signal(number, fault, tiny, tmp_path, capsys, monkeypatch):
    """As torch does with one that comes while it reads a checkpoint."""

    def check_space(*_):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except BaseException:
            raise fault("could not determine the shape") from None

    monkeypatch.setattr("espo_lightning.training.cli.check_space", check_space)
    assert ends(fit, *tiny, f"--run_dir={tmp_path / 'run'}") == 128 + number
    printed = capsys.readouterr()
    assert "stopped by" in printed.out
    assert "shape" not in printed.err
    assert not (tmp_path / "run").exists()
