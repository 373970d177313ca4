"""One program after the other: resume, supervised training, evaluation of what they left."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fit_cases import TINY, finished_fixture, folder_fixture  # noqa: F401

from espo_lightning import evaluate, fit, load_policy, sft
from espo_lightning.training.report import read_metrics

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


def test_a_csv_of_an_earlier_part_is_kept_over_a_resume(folder, tmp_path):
    run_dir = tmp_path / "run"
    common = [*TINY, f"--model.policy.path={folder}", "--data.batches=4", "--checkpoint_every=2"]
    fit.main([*common, f"--run_dir={run_dir}"])
    whole = load_policy(run_dir / "policy").state_dict()
    fit.main([*common, f"--ckpt_path={run_dir / 'checkpoints' / 'batch_000002.ckpt'}"])
    resumed = load_policy(run_dir / "policy").state_dict()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    rows = [r for r in read_metrics(run_dir) if "train/reward" in r]
    assert [r["rollout"] for r in rows] == [1, 2, 3, 4]
    assert (run_dir / "metrics.000.csv").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_the_command_that_resumes(folder, tmp_path):
    """The interrupted and resumed run equals an uninterrupted one bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    common = [*TINY, f"--model.policy.path={folder}", "--data.batches=40", "--checkpoint_every=100"]
    command = [sys.executable, "-m", "espo_lightning.fit", *common, f"--run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    samples = tmp_path / "run" / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (samples.exists() and len(samples.read_text().splitlines()) >= 12):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    (resume,) = [line.strip() for line in output.splitlines() if "--ckpt_path" in line]
    assert not (tmp_path / "run" / "summary.json").exists()
    fit.main(resume.split()[3:])
    fit.main([*common, f"--run_dir={tmp_path / 'whole'}"])
    resumed, whole = (load_policy(tmp_path / d / "policy").state_dict() for d in ("run", "whole"))
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_a_training_checkpoint_is_evaluated_like_the_policy_it_became(finished, folder, tmp_path, capsys):
    common = ["--problems=8", "--decoding.temperature=1", "--seed=5"]
    evaluate.main([f"--policy.path={finished / 'policy'}", *common, f"--output={tmp_path / 'policy.json'}"])
    checkpoint = f"--checkpoint={finished / 'checkpoints' / 'batch_000004.ckpt'}"
    evaluate.main([f"--policy.path={folder}", checkpoint, *common, f"--output={tmp_path / 'checkpoint.json'}"])
    evaluate.main([f"--policy.path={folder}", *common, f"--output={tmp_path / 'base.json'}"])
    texts = {
        name: [s["completion"] for s in json.loads((tmp_path / f"{name}.json").read_text())["samples"]]
        for name in ("policy", "checkpoint", "base")
    }
    assert texts["policy"] == texts["checkpoint"] != texts["base"]
    with pytest.raises(SystemExit) as error:
        evaluate.main([checkpoint, *common, f"--output={tmp_path / 'other.json'}"])  # the bundled policy is larger
    assert error.value.code == 2
    assert "does not fit the policy" in capsys.readouterr().err


def test_sft_continues_from_a_folder(folder, tmp_path):
    start = ["--model.policy=espo_lightning.load_policy", f"--model.policy.path={folder}", "--data.batches=1"]
    sft.main([*start, "--data.batch_size=2", f"--run_dir={tmp_path / 'run'}", "--trainer.enable_progress_bar=false"])
    before, after = (load_policy(path).state_dict() for path in (folder, tmp_path / "run" / "policy"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_sft_makes_the_same_bytes_twice_and_evaluate_judges_them(tmp_path, capsys):
    for name in ("a", "b"):
        sft.main([
            f"--run_dir={tmp_path / name}", "--data.batches=3", "--data.batch_size=4", "--model.policy.hidden_size=16",
            "--model.policy.heads=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--seed=1",
        ])  # fmt: skip
    first, second = ((tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    output = tmp_path / "evaluation.json"
    flags = [f"--policy.path={tmp_path / 'a' / 'policy'}", "--task=Countdown", "--problems=6", f"--output={output}"]
    evaluate.main(
        [*flags, "--batch_size=4", "--decoding.length=12", "--decoding.block_length=12", "--decoding.steps=6"]
    )
    result = json.loads(output.read_text())
    assert result["n"] == len(result["samples"]) == 6
    assert result["settings"]["decoding"]["init_args"]["steps"] == 6
    assert result["settings"]["task"]["class_path"].endswith("Countdown")
    assert set(result["ci95"]) == {"exact", "exact_published", "format", "reward", "failed", "timeout"}
    with pytest.raises(SystemExit) as error:
        evaluate.main(flags)
    assert error.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_an_answer_longer_than_the_canvas_is_an_error(tmp_path, capsys):
    """Before anything is written, as all data."""
    with pytest.raises(SystemExit) as error:
        sft.main([
            f"--run_dir={tmp_path / 'run'}", "--data.batches=1", "--model.length=8", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ])  # fmt: skip
    assert error.value.code == 2
    assert "an answer has 16 tokens, more than length=8" in capsys.readouterr().err
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_the_last_batch_of_an_evaluation_may_be_smaller(folder, tmp_path):
    """``--data.eval_problems=10`` alone is enough; the default batch is larger."""
    common = [f for f in TINY if "eval" not in f] + [f"--model.policy.path={folder}", "--data.batches=1"]
    for name, sizes in {"one": [], "several": ["--data.eval_batch_size=4"]}.items():
        fit.main([*common, f"--run_dir={tmp_path / name}", "--data.eval_problems=10", *sizes])
    one, several = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "several"))
    assert one["after"] == several["after"]
    assert one["after"]["n"] == 10
