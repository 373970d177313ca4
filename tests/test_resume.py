"""A resume knows what changed since its checkpoint."""

import json

import pytest
import torch
import yaml
from run_cases import SFT, checkpoint, ends, refused, run_fixture, snapshot, stored_fixture, tiny_fixture, weights  # noqa: F401

from espo_lightning import fit, new_policy, sft
from espo_lightning.training import resume
from espo_lightning.training.report import read_metrics
from espo_lightning.training.run_checkpoint import RECORD

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


# ---- resume knows what changed ---------------------------------------------------------------------------------------


CHANGED = {
    "learning rate": (["--model.optimizer.lr=1e-5"], "model.optimizer.lr", [0.01, 1e-5]),
    "weight decay": (["--model.optimizer.weight_decay=0.5"], "model.optimizer.weight_decay", [0.01, 0.5]),
    "warm-up": (["--model.warmup=100"], "model.warmup", [0, 100]),
    "objective": (["--model.objective.beta=0.1"], "model.objective.beta", [0.003, 0.1]),
    "decoding": (["--model.decoding.temperature=0.5"], "model.decoding.temperature", [1.0, 0.5]),
    "batches": (["--data.batches=6"], "data.batches", [4, 6]),
    "evaluation": (["--data.eval_problems=5"], "data.eval_problems", [6, 5]),
    "logging": (["--trainer.log_every_n_steps=2"], "trainer.log_every_n_steps", [1, 2]),
    "memory": (["--model.micro_batch=4"], "model.micro_batch", [None, 4]),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_may_change_does_and_is_recorded(run, name):
    flags, setting, values = CHANGED[name]
    assert ends(fit, f"--ckpt_path={checkpoint(run, 2)}", *flags) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed"] == [{"checkpoint": str(checkpoint(run, 2)), "batches": 2, "changed": {setting: values}}]
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in ("seed", "model", "data", "trainer"):
        assert summary["settings"][key] == config[key]
    flat = resume.flat(config)
    assert flat[setting] == values[1]
    assert summary["rollouts"] == flat["data.batches"]


def test_a_changed_learning_rate_is_that_of_the_updates_and_the_schedule(run, stored):
    assert ends(fit, f"--ckpt_path={checkpoint(run, 2)}", "--model.optimizer.lr=1e-5", "--model.warmup=10") == 0
    rates = [row["train/lr"] for row in read_metrics(run) if "train/lr" in row]
    expected = [
        0.01,
        0.01,
        *(1e-5 * (n + 0.5) / 10 for n in (5, 7)),
    ]  # the mean over two updates, of which n - 1 are done
    assert rates == pytest.approx(expected, rel=1e-4)
    before = torch.load(checkpoint(stored, 2), weights_only=True)["state_dict"]
    moved = max((w - before[f"policy.{k}"]).abs().max() for k, w in weights(run).items())
    assert 0 < moved < 1e-4


def test_a_changed_schedule_of_sft_is_that_of_a_run_of_that_length(tmp_path):
    flags = [*SFT, "--checkpoint_every=3", "--keep_checkpoints=9"]
    sft.main([*flags, "--data.batches=9", f"--run_dir={tmp_path / 'long'}"])
    sft.main([*flags, "--data.batches=6", f"--run_dir={tmp_path / 'run'}"])
    assert ends(sft, f"--ckpt_path={checkpoint(tmp_path / 'run', 6)}", "--data.batches=9") == 0
    groups = [
        torch.load(checkpoint(tmp_path / name, 9), weights_only=True)["optimizer_states"][0]["param_groups"][0]
        for name in ("long", "run")
    ]
    assert groups[0]["lr"] == groups[1]["lr"]


FIXED = {
    "seed": (["--seed=1"], "seed is 0 there, 1 here"),
    "prompts": (["--data.batch_size=4"], "data.batch_size is 2 there, 4 here"),
    "completions": (["--model.group_size=2"], "model.group_size is 4 there, 2 here"),
    "updates": (["--model.updates=1"], "model.updates is 2 there, 1 here"),
    "task": (["--data.task.mode=raise"], "data.task.mode is 'none' there, 'raise' here"),
    "another task": (["--data.task=Sudoku"], "data.task is 'failing_tasks.Failing' there, "),
    "adapters": (["--model.policy.lora.rank=2"], "model.policy.lora"),
    "optimizer": (
        ["--model.optimizer=SGD", "--model.optimizer.lr=0.01"],
        "model.optimizer is 'torch.optim.AdamW' there",
    ),
    "reference": (["--model.reference_sync=2"], "model.reference_sync is None there, 2 here"),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_may_not_change_is_refused_with_both_values_and_nothing_is_touched(run, name, capsys):
    flags, message = FIXED[name]
    before = snapshot(run)
    assert message in refused(capsys, fit, f"--ckpt_path={checkpoint(run, 2)}", *flags)
    assert snapshot(run) == before


def test_a_lora_run_goes_on_without_its_flags_and_another_rank_is_refused(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    lora = ["--model.policy.lora.rank=2", "--model.policy.lora.alpha=4"]
    fit.main([*tiny, *lora, "--data.batches=2", f"--run_dir={run_dir}"])
    capsys.readouterr()
    rank = refused(capsys, fit, f"--ckpt_path={checkpoint(run_dir, 2)}", "--model.policy.lora.rank=4")
    assert "model.policy.lora.rank is 2 there, 4 here" in rank
    none = refused(capsys, fit, f"--ckpt_path={checkpoint(run_dir, 2)}", "--model.policy.lora=null")
    assert "model.policy.lora" in none
    assert ends(fit, f"--ckpt_path={checkpoint(run_dir, 2)}", "--data.batches=3") == 0


def test_a_checkpoint_of_another_policy_is_refused(run, tmp_path, capsys):
    new_policy(hidden_size=32, layers=2, heads=2, intermediate_size=24).save(tmp_path / "larger")
    before = snapshot(run)
    message = refused(capsys, fit, f"--ckpt_path={checkpoint(run, 2)}", f"--model.policy.path={tmp_path / 'larger'}")
    assert "does not fit model.policy" in message or "belongs to another base" in message
    assert snapshot(run) == before


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_checkpoint_is_named_with_another(run, damage, capsys):
    path = checkpoint(run, 3)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "other": b"hello" * 100}[damage])
    message = refused(capsys, fit, f"--ckpt_path={path}")
    assert f"ckpt_path {path} is damaged, or no checkpoint" in message
    assert f"such as {checkpoint(run, 4)}" in message


def test_a_checkpoint_of_the_other_program_is_refused(run, capsys):
    assert "resume it with python -m espo_lightning.fit" in refused(capsys, sft, f"--ckpt_path={checkpoint(run, 2)}")


def test_a_checkpoint_with_settings_that_are_gone_is_refused_in_a_sentence(run, capsys):
    content = torch.load(checkpoint(run, 2), weights_only=True)
    settings = yaml.safe_load(content[RECORD]["config"])
    settings["model"] |= {"beta": 0.1}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    del content[RECORD]  # as earlier versions wrote them
    torch.save(content, checkpoint(run, 2))
    before = snapshot(run)
    assert "was made by another version of this library" in refused(capsys, fit, f"--ckpt_path={checkpoint(run, 2)}")
    assert snapshot(run) == before


def test_an_earlier_checkpoint_starts_another_future(run, stored):
    """What was after it is set aside or dropped: no rollout counts twice; the newest checkpoint is this future's."""
    assert ends(fit, f"--ckpt_path={checkpoint(run, 1)}", "--data.batches=2", "--model.optimizer.lr=1e-5") == 0
    assert [row["rollout"] for row in read_metrics(run) if "train/reward" in row] == [1, 2]
    samples = [json.loads(line)["rollout"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples == [1] * 4 + [2] * 4
    assert [p.name for p in sorted((run / "checkpoints").glob("*.ckpt"))] == ["batch_000001.ckpt", "batch_000002.ckpt"]
    assert len(list((run / "checkpoints" / "superseded").glob("*.ckpt"))) == 3
    assert json.loads((run / "summary_000004.json").read_text())["rollouts"] == 4


def test_an_earlier_before_is_measured_again_if_it_would_be_about_other_problems(run):
    assert ends(fit, f"--ckpt_path={checkpoint(run, 4)}", "--data.eval_problems=5") == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["n"] == summary["after"]["n"] == 5
