"""Every argument of Lightning's Trainer takes effect, is refused with advice, or is a documented no-op."""

import csv
import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import SimpleProfiler
from run_cases import SFT, TINY, ends, refused, same, tiny_fixture  # noqa: F401
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from espo_lightning import fit, sft
from espo_lightning.training.report import read_metrics
from espo_lightning.training.signals import Signals
from espo_lightning.training.trainer_flags import CALLBACKS, MANUAL, REFUSED, UNVALIDATED

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

DOCS = (Path(__file__).parents[1] / "docs" / "trainer_flags.md").read_text()
TABLE = {m[1]: (m[2], m[3]) for m in re.finditer(r"^\| `(\w+)` \| ([\w-]+) \| ([\w-]+) \|", DOCS, flags=re.MULTILINE)}
FLAGS = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]

# a value that is not the default, for every flag that is refused by one of the programs
WRONG = {
    "accumulate_grad_batches": "2",
    "barebones": "true",
    "check_val_every_n_epoch": "2",
    "default_root_dir": "elsewhere",
    "enable_checkpointing": "false",
    "fast_dev_run": "true",
    "gradient_clip_algorithm": "value",
    "gradient_clip_val": "0.5",
    "limit_predict_batches": "2",
    "limit_test_batches": "2",
    "limit_train_batches": "1",
    "limit_val_batches": "3",
    "model_registry": "somewhere",
    "num_sanity_val_steps": "1",
    "overfit_batches": "2",
    "reload_dataloaders_every_n_epochs": "1",
    "val_check_interval": "3",
}
# what a flag changes in the objects of a program that is about to train; the rest is shown by runs, further down
CHANGES = {
    "accelerator": ("cpu", lambda cli: cli.trainer.strategy.root_device.type == "cpu"),
    "accumulate_grad_batches": ("2", lambda cli: cli.trainer.accumulate_grad_batches == 2),
    "benchmark": ("true", lambda cli: torch.backends.cudnn.benchmark),
    "check_val_every_n_epoch": ("2", lambda cli: cli.trainer.check_val_every_n_epoch == 2),
    "detect_anomaly": ("true", lambda cli: cli.trainer._detect_anomaly),
    "deterministic": ("true", lambda cli: torch.are_deterministic_algorithms_enabled()),
    "devices": ("2", lambda cli: cli.trainer.num_devices == 2),
    "gradient_clip_algorithm": ("value", lambda cli: cli.trainer.gradient_clip_algorithm == "value"),
    "gradient_clip_val": ("0.5", lambda cli: cli.trainer.gradient_clip_val == 0.5),
    "inference_mode": ("true", lambda cli: cli.trainer.validate_loop.inference_mode),
    "log_every_n_steps": ("2", lambda cli: cli.trainer.log_every_n_steps == 2),
    "max_epochs": ("3", lambda cli: cli.trainer.max_epochs == 3),
    "max_steps": ("3", lambda cli: cli.trainer.max_steps == 3),
    "max_time": ("00:01:00:00", lambda cli: any(type(c).__name__ == "Timer" for c in cli.trainer.callbacks)),
    "min_epochs": ("2", lambda cli: cli.trainer.min_epochs == 2),
    "min_steps": ("2", lambda cli: cli.trainer.min_steps == 2),
    "num_nodes": ("2", lambda cli: cli.trainer.num_nodes == 2),
    "num_sanity_val_steps": ("1", lambda cli: cli.trainer.num_sanity_val_steps == 1),
    "precision": ("bf16-mixed", lambda cli: cli.trainer.precision == "bf16-mixed"),
    "profiler": ("simple", lambda cli: isinstance(cli.trainer.profiler, SimpleProfiler)),
    "strategy": ("fsdp2", lambda cli: type(cli.trainer.strategy).__name__ == "FSDP2"),
    "enable_model_summary": ("true", lambda cli: any(isinstance(c, ModelSummary) for c in cli.trainer.callbacks)),
    "plugins": ("lightning.pytorch.plugins.environments.LightningEnvironment", lambda cli: cli.trainer.world_size == 1),
    "val_check_interval": ("3", lambda cli: cli.trainer.val_check_interval == 3),
    "limit_val_batches": ("1", lambda cli: cli.trainer.limit_val_batches == 1),
}
BY_RUNS = {"callbacks", "logger", "enable_autolog_hparams", "enable_progress_bar"}
PROGRAMS = {"fit": (fit, 0), "sft": (sft, 1)}


@pytest.fixture
def flags(tiny):
    return {"fit": [*tiny, "--data.batches=3"], "sft": [*SFT, "--data.batches=3"]}


@pytest.fixture
def switches_as_they_were():
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    torch.backends.cudnn.benchmark = before[0]
    torch.use_deterministic_algorithms(before[1])


def test_the_table_names_every_flag_once_and_no_other():
    assert sorted(TABLE) == sorted(FLAGS)
    assert list(TABLE) == sorted(TABLE)
    assert {outcome for row in TABLE.values() for outcome in row} == {"effect", "refused", "no-op"}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_does_what_the_table_says(program, flag, flags, tmp_path, capsys, switches_as_they_were):
    module, column = PROGRAMS[program]
    outcome, run_dir = TABLE[flag][column], tmp_path / "run"
    if outcome == "refused":
        advice = (REFUSED | (MANUAL if program == "fit" else UNVALIDATED))[flag]
        message = refused(capsys, module, *flags[program], f"--run_dir={run_dir}", f"--trainer.{flag}={WRONG[flag]}")
        assert message.startswith(f"trainer.{flag}=")
        assert f"is not possible here: {advice}" in message
        assert not run_dir.exists()
    elif outcome == "no-op":
        for name, value in (("with", "true"), ("without", "false")):
            module.main([*flags[program], f"--run_dir={tmp_path / name}", f"--trainer.{flag}={value}"])
        assert same(tmp_path / "with", tmp_path / "without")
    elif flag not in BY_RUNS:
        value, changed = CHANGES[flag]
        without = [f for f in flags[program] if not f.startswith(f"--trainer.{flag}=")]
        devices = ["--trainer.devices=1"] if flag != "devices" else []
        cli = module.make([*without, f"--run_dir={run_dir}", *devices, f"--trainer.{flag}={value}"], Signals())
        assert changed(cli)


@pytest.mark.parametrize("kind", CALLBACKS, ids=lambda kind: kind.__name__)
def test_callbacks_that_cannot_work_are_refused_with_advice(kind, flags, tmp_path, capsys):
    needed = {"StochasticWeightAveraging": ["swa_lrs=0.1"], "GradientAccumulationScheduler": ["scheduling={0: 2}"]}
    needed |= {"OnExceptionCheckpoint": ["dirpath=."], "ModelPruning": ["pruning_fn=l1_unstructured"]}
    given = [f"--trainer.callbacks.{value}" for value in needed.get(kind.__name__, [])]
    arguments = [*flags["fit"], f"--run_dir={tmp_path / 'run'}", f"--trainer.callbacks={kind.__name__}", *given]
    assert f"{kind.__name__} is not possible here: {CALLBACKS[kind]}" in refused(capsys, fit, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--trainer.strategy=ddp_spawn"], "trainer.strategy=ddp starts processes"),
        (["--trainer.strategy=ddp_fork"], "trainer.strategy=ddp starts processes"),
        (["--trainer.strategy=ddp_notebook"], "trainer.strategy=ddp starts processes"),
        (["--trainer.strategy=fsdp2", "--trainer.callbacks=EMAWeightAveraging"], "copies the policy"),
        (["--trainer.plugins=lightning.pytorch.plugins.TorchCheckpointIO"], "DirectCheckpointIO"),
        (["--trainer.precision=16-mixed"], "trainer.precision"),
        (["--trainer.max_epochs=0"], "trainer.max_epochs must be at least 1"),
        (["--trainer.val_check_interval=0"], "--trainer.limit_val_batches=0"),
        (["--trainer.val_check_interval=2.5"], "val_check_interval"),
        (["--trainer.max_time=soon"], "soon"),
        (["--trainer.logger=NoLogger"], "NoLogger"),
        (["--seed_everything=1"], "use --seed"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_written(given, message, flags, tmp_path, capsys):
    others = [f for f in flags["fit"] if f.split("=")[0] not in {g.split("=")[0] for g in given}]
    assert message in refused(capsys, fit, *others, f"--run_dir={tmp_path / 'run'}", *given)
    assert not (tmp_path / "run").exists()


MONITOR = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
FORMS = {
    "a name": ["--trainer.callbacks=LearningRateMonitor"],
    "appended": ["--trainer.callbacks+=LearningRateMonitor"],
    "two appended": ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=RichProgressBar"],
    "one in YAML": {"trainer": {"callbacks": MONITOR}},
    "a list in YAML": {"trainer": {"callbacks": [MONITOR]}},
}


@pytest.mark.parametrize("form", FORMS)
def test_callbacks_in_every_form_with_rows_of_their_own(form, flags, tmp_path):
    given = FORMS[form]
    if isinstance(given, dict):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(given))
        given = [f"--config={tmp_path / 'more.yaml'}"]
    bar = [f for f in flags["fit"] if "progress_bar" not in f]
    assert ends(fit, *bar, f"--run_dir={tmp_path / 'run'}", *given) == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["lr-AdamW"]) for row in rows) == 3
    assert [row["rollout"] for row in read_metrics(tmp_path / "run") if "train/reward" in row] == [1, 2, 3]
    assert (tmp_path / "run" / "summary.json").exists()


def test_averaged_weights_are_the_policy_and_resume(flags, tmp_path):
    average = ["--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    common = [*flags["fit"], "--checkpoint_every=1", *average]
    fit.main([*flags["fit"], f"--run_dir={tmp_path / 'plain'}"])
    fit.main([*common, f"--run_dir={tmp_path / 'whole'}"])
    fit.main([*common, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=3"])
    newest = tmp_path / "run" / "checkpoints" / "batch_000002.ckpt"
    fit.main([f"--ckpt_path={newest}", "--trainer.max_steps=-1"])
    assert same(tmp_path / "run", tmp_path / "whole")
    assert not same(tmp_path / "plain", tmp_path / "whole")


@pytest.mark.parametrize("off", ["--trainer.limit_val_batches=0", "--data.eval_problems=0"])
def test_training_without_validation(off, flags, tmp_path, capsys):
    fit.main([*flags["fit"], f"--run_dir={tmp_path / 'run'}", off])
    assert "nothing was held out" in capsys.readouterr().out
    assert not any(key.startswith("val/") for row in read_metrics(tmp_path / "run") for key in row)
    fit.main([*flags["fit"], f"--run_dir={tmp_path / 'whole'}"])
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("interval", "expected"), [(["0.34"], [1, 2, 3]), (["1.0"], [3]), (["2"], [2]), (["00:00:00:00"], [1, 2, 3])]
)
def test_validation_intervals_in_every_unit(interval, expected, flags, tmp_path):
    fit.main([*flags["fit"], f"--run_dir={tmp_path / 'run'}", f"--trainer.val_check_interval={interval[0]}"])
    found = {row["rollout"] for row in read_metrics(tmp_path / "run") if "val/reward" in row}
    assert found == {0, 3, *expected}  # before, after, and these


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_a_profiler_reports_on_training(name, flags, tmp_path, caplog):
    fit.main([*flags["fit"], f"--run_dir={tmp_path / 'run'}", f"--trainer.profiler={name}"])
    assert caplog.text.count("FIT Profiler Report") == 1
    assert "VALIDATE Profiler Report" not in caplog.text


def test_a_model_summary_is_shown(flags, tmp_path, capsys):
    fit.main([*flags["fit"], f"--run_dir={tmp_path / 'run'}", "--trainer.enable_model_summary=true"])
    assert "params" in capsys.readouterr().out.lower()


# ---- loggers ---------------------------------------------------------------------------------------------------------

BOARD = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
LOGGERS = {
    "a name": ["--trainer.logger=TensorBoardLogger"],
    "appended": ["--trainer.logger+=TensorBoardLogger"],
    "two": ["--trainer.logger+=TensorBoardLogger", "--trainer.logger+=CSVLogger"],
    "YAML": {"trainer": {"logger": BOARD}},
    "a list in YAML": {"trainer": {"logger": [BOARD]}},
}


@pytest.mark.parametrize("form", LOGGERS)
def test_tensorboard_in_every_form_gets_metrics_settings_and_samples(form, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = LOGGERS[form]
    if isinstance(given, dict):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(given))
        given = ["--config=more.yaml"]
    settings = []
    log = TensorBoardLogger.log_hyperparams
    monkeypatch.setattr(TensorBoardLogger, "log_hyperparams", lambda s, p, *a: settings.append(p) or log(s, p, *a))
    assert ends(fit, *flags["fit"], "--run_dir=run", *given) == 0
    assert {p.name for p in tmp_path.iterdir()} <= {"run", "more.yaml"}  # and not where the command was given
    events = [p for p in (tmp_path / "run").rglob("*tfevents*")]
    boards = [EventAccumulator(str(p)).Reload() for p in events]
    scalars = {tag for board in boards for tag in board.Tags()["scalars"]}
    assert {"train/reward", "val/exact"} <= scalars
    assert any("samples/text_summary" in board.Tags()["tensors"] for board in boards)
    assert settings[0]["model"]["group_size"] == 4
    assert settings[0] == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.parametrize("autolog", [True, False])
def test_wandb_gets_settings_and_sample_tables(autolog, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings, tables = [], []
    monkeypatch.setattr(WandbLogger, "log_hyperparams", lambda self, params: settings.append(params))
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, key, columns, data, **_: tables.append((columns, data)))
    arguments = [f"--trainer.enable_autolog_hparams={str(autolog).lower()}", "--trainer.logger=WandbLogger"]
    fit.main([*flags["fit"], f"--run_dir={tmp_path / 'run'}", *arguments])
    assert [s["model"]["group_size"] for s in settings] == [4] * autolog
    ((columns, data),) = tables
    assert columns == ["rollout", "prompt", "right", "reward", "completion"]
    assert [row[:3] for row in data] == [[1, "abc", "aaaa"]] * 4


def test_trackio_gets_metrics_settings_and_sample_tables(flags, tmp_path, monkeypatch, capsys):
    """With the calls of trackio 0.43, which the tests do not install."""
    begun, logged = [], []

    class Run:
        def log(self, metrics, step=None):
            logged.append(metrics)

    class Table:
        def __init__(self, columns=None, data=None):
            self.columns, self.data = columns, data

    module = types.ModuleType("trackio")
    module.Table = Table
    module.init = lambda project, name=None, config=None: begun.append((project, name, config)) or Run()
    monkeypatch.setitem(sys.modules, "trackio", module)
    run = ["--trainer.logger=TrackioLogger", "--trainer.logger.run=first"]
    fit.main([*flags["fit"], f"--run_dir={tmp_path / 'run'}", *run])
    ((project, name, settings),) = begun
    assert (project, name) == ("espo_lightning", "first")
    assert settings["model"]["group_size"] == 4
    assert [m["rollout"] for m in logged if "train/reward" in m] == [1, 2, 3]
    (table,) = [m["samples"] for m in logged if "samples" in m]
    assert [row[1] for row in table.data] == ["abc"] * 4
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert "pip install trackio" in refused(capsys, fit, *flags["fit"], f"--run_dir={tmp_path / 'other'}", run[0])
    assert not (tmp_path / "other").exists()
