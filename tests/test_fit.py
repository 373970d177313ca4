"""The command lines as a user meets them: run folders, errors, Ctrl-C and resume."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar

from espo_lightning import Problem, evaluate, fit, load_policy, new_policy, sft
from espo_lightning.training.data import unknown_tokens
from espo_lightning.training.report import limits, read_metrics, told, with_interval
from espo_lightning.training.samples import extremes, shown
from espo_lightning.training.screen import progress

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

TINY = [
    "--data.batch_size=2",
    "--data.eval_problems=8",
    "--data.eval_batch_size=8",
    "--model.group_size=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny policy folder."""
    path = tmp_path_factory.mktemp("policy") / "tiny"
    new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).save(path)
    return path


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """The run folder of a short run."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    fit.main([*TINY, f"--model.policy.path={folder}", f"--run_dir={run_dir}", "--data.batches=4", "--seed=3"])
    return run_dir


def test_the_run_folder_holds_everything(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "config.yaml",
        "summary.json",
        "metrics.csv",
        "samples.jsonl",
        "reward.png",
        "policy",
        "checkpoints",
    }
    summary = json.loads((finished / "summary.json").read_text())
    for moment in ("before", "after"):
        assert summary[moment]["n"] == 8
        for metric in ("exact", "cell"):
            low, high = summary[moment]["ci95"][metric]
            assert low <= summary[moment][metric] <= high
    assert summary["seed"] == 3
    assert summary["rollouts"] == 4
    assert summary["updates"] == 8
    assert summary["seconds"] > 0
    assert summary["settings"]["model"]["group_size"] == 2
    assert set(summary["chance"]) == {"exact", "cell"}
    assert (finished / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_row_per_rollout_and_docs_explain_every_column(finished):
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train = [r for r in rows if r["train/reward"]]
    assert [float(r["rollout"]) for r in train] == [1, 2, 3, 4]
    assert all(float(r["rollout/mask_tokens"]) == 0 for r in train)
    explained = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
    for column in set(rows[0]) - {"epoch", "step"}:
        assert f"`{column}`" in explained, column


def test_samples_are_the_completions_with_their_verdicts(finished):
    rows = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4
    assert {r["rollout"] for r in rows} == {1, 2, 3, 4}
    assert all(len(r["prompt"]) == 16 and "reward" in r["verdict"] for r in rows)


def test_transformers_opens_the_final_policy_as_a_bidirectional_model(finished):
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "policy")
    assert tokenizer.mask_token_id == model.config.mask_token_id
    ids = torch.randint(7, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = 7 + (ids[0, -1] - 6) % 50
    with torch.no_grad():
        assert not torch.equal(model(ids).logits[0, 0], model(changed).logits[0, 0])
    assert load_policy(finished / "policy").mask_id == tokenizer.mask_token_id


def test_the_saved_config_repeats_the_run_in_a_folder_of_its_own(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit.main(["--config", str(finished / "config.yaml")])
    (again,) = (tmp_path / "runs").iterdir()
    first, second = (load_policy(d / "policy").state_dict() for d in (finished, again))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_print_config_is_a_config(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        fit.main(["--print_config", f"--model.policy.path={folder}"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["updates"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modle.beta=1"], "unrecognized arguments: --modle.beta=1"),
        (["--model.bta=1"], "bta"),
        (["--model.objective.beta=abc"], "Expected a <class 'float'>. Got value: abc"),
        (["--model.objective.kl=k9"], "k9"),
        (["--model.likelihood=ELBO", "--model.likelihood.drawz=2"], "Option 'drawz' is not accepted"),
        (["--model.objective.clip_range=null"], "give clip_range or clip_nats"),
        (["--model.group_size=1"], "group_size must be at least 2"),
        (["--model.decoding.block_length=5"], "length 16 is not a multiple of block_length 5"),
        (["--model.decoding.steps=17"], "steps must be a multiple of the number of blocks"),
        (["--model.likelihood.smallest_count=1"], "coupled masks need counts uniform on 0..L"),
        (["--model.objective.kl=espo_lightning.k2_u"], "independent mask draws"),
        (["--data.task.empty=14"], "empty must be 1..12"),
        (["--data.eval_problems=-1"], "eval_problems must be at least 0, got -1"),
        (["--ckpt_path=nowhere.ckpt"], "ckpt_path nowhere.ckpt does not exist"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--model.policy.path=nowhere/at/all"], "nowhere/at/all"),
        (["--model.policy.dtype=float7"], "float7"),
    ],
)
def test_bad_flags_give_one_message_and_exit_code_2(flags, message, folder, tmp_path, capsys):
    policy = [] if any("policy.path" in f for f in flags) else [f"--model.policy.path={folder}"]
    with pytest.raises(SystemExit) as error:
        fit.main([*TINY, *policy, f"--run_dir={tmp_path / 'run'}", *flags])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_an_unreadable_policy_folder_is_named(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(SystemExit) as error:
        fit.main([*TINY, f"--model.policy.path={tmp_path / 'broken'}", f"--run_dir={tmp_path / 'run'}"])
    assert error.value.code == 2
    assert str(tmp_path / "broken") in capsys.readouterr().err


def test_an_existing_run_folder_is_never_written_to(folder, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("results")
    with pytest.raises(SystemExit) as error:
        fit.main([*TINY, f"--model.policy.path={folder}", f"--run_dir={tmp_path}"])
    assert error.value.code == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_run_folder_that_cannot_be_made_is_an_error_before_training(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        fit.main([*TINY, f"--model.policy.path={folder}", f"--run_dir={tmp_path / 'file' / 'run'}"])
    assert error.value.code == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("logger", ["WandbLogger", "TensorBoardLogger"])
def test_other_loggers_are_one_flag_away(logger, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = tmp_path / "run"
    where = ["--trainer.logger.save_dir=."] if logger == "TensorBoardLogger" else []  # it has no default of its own
    common = [*TINY, f"--model.policy.path={folder}", f"--run_dir={run_dir}", "--data.batches=1"]
    fit.main([*common, f"--trainer.logger={logger}", *where])
    assert (run_dir / "metrics.csv").exists()  # CSV as well
    pattern = "*.wandb" if logger == "WandbLogger" else "*tfevents*"
    assert list(run_dir.rglob(pattern))


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


@pytest.mark.parametrize(
    ("flag", "path"),
    [
        ("--model.objective.kl=k3", "espo_lightning.k3"),
        ("--model.objective.ratio=token_ratio", "espo_lightning.token_ratio"),
        ("--model.advantage=standardised", "espo_lightning.standardised"),
        ("--model.decoding.order=random_order", "espo_lightning.random_order"),
        ("--model.decoding.schedule=dream_schedule", "espo_lightning.dream_schedule"),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["=", "space"])
def test_functions_have_short_names_as_classes_do(flag, path, apart, capsys):
    outputs = []
    for value in (flag, f"{flag.split('=')[0]}={path}"):
        with pytest.raises(SystemExit) as done:
            fit.main(["--print_config", *(value.split("=") if apart else [value])])
        assert done.value.code == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert path.rsplit(".", 1)[1] in outputs[0]


def test_what_is_seen_while_a_run_goes_on(folder, tmp_path, capsys):
    """Where it writes, at the start; the progress; held-out results as they come; and in the end what there is."""
    fit.main([*TINY, f"--model.policy.path={folder}", f"--run_dir={tmp_path / 'run'}", "--data.batches=12"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"writing to {tmp_path / 'run'}"
    order = ["held-out before training:", "rollout 1 of 12:", "held-out after rollout 10:", "rollout 12 of 12:"]
    found = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert found == sorted(found)
    text = "\n".join(lines)
    assert "failed" not in text
    assert "timeout" not in text
    assert re.search(
        r"12 rollouts, seed 0, [\d.]+ s: decoding [\d.]+, verifying and scoring [\d.]+, updates [\d.]+", text
    )
    for name in ("summary.json", "metrics.csv", "samples.jsonl", "reward.png", "policy", "checkpoints"):
        assert f"{tmp_path / 'run' / name}  " in text


def test_the_sample_table_shows_different_prompts_with_the_best_and_the_worst():
    rewards = [0.0, 0.5, 1.0, 0.2, 0.2, 0.2, 0.9, 0.1, 0.3]
    assert extremes(rewards, 3, 4) == [(0, 2), (0, 0), (1, 3), (1, 4), (2, 6), (2, 7)]
    assert extremes(rewards, 3, 2) == [(0, 2), (0, 0), (1, 3), (1, 4)]
    problems = [Problem("2 + 2", len, "4"), Problem([{"role": "user", "content": "1 +\n1"}], len, "")]
    made = [(problems[q], f"text {i}", {"reward": i / 4}) for q in (0, 1) for i in (3, 1)]
    assert shown(21, made).splitlines() == [
        "rollout 21: the best and the worst completion of 2 prompts, by reward",
        "  prompt  2 + 2",
        "  right   4",
        "    0.75  text 3",
        "    0.25  text 1",
        "",
        "  prompt  1 + 1",
        "    0.75  text 3",
        "    0.25  text 1",
    ]


def test_failures_are_shown_only_if_there_are_any():
    means = {"exact": 0.5, "failed": 0.0, "n": 4, "ci95": {"exact": [0.1, 0.9], "failed": [0.0, 0.4]}}
    assert told(means) == ["exact"]
    assert told(means, means | {"failed": 0.25}) == ["exact", "failed"]
    assert with_interval(means) == "exact 0.500 [0.100, 0.900]"


@pytest.mark.parametrize(
    ("values", "expected"), [([0.2, 0.9], (0, 1)), ([], (0, 1)), ([-1.0, 0.5], (-1.1, 1)), ([0.5, 3.0], (0, 3.15))]
)
def test_the_curve_shows_all_rewards(values, expected):
    assert limits(values) == pytest.approx(expected)


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    def kinds(*arguments):
        return [type(c).__name__ for c in progress(*arguments)]

    assert kinds("rollout", True, []) == ["Lines", "Validations"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert kinds("rollout", True, []) == ["Bar", "Validations"]
    assert kinds("rollout", False, []) == ["Lines", "Validations"]
    assert kinds("rollout", True, [TQDMProgressBar()]) == ["Validations"]


def test_letters_that_the_policy_cannot_read_are_named(folder):
    policy = load_policy(folder)
    problems = [Problem("Où est B?", len, "là"), Problem([{"role": "user", "content": "abc"}], len, "")]
    prompts, answers = unknown_tokens(policy, problems)
    assert "does not know 25 % of the prompts (such as 'O', 'ù', 'B')" in prompts
    assert "50 % of the answers (such as 'à')" in answers
    assert unknown_tokens(policy, problems[1:]) == []


def test_a_short_name_in_a_file_is_answered_with_the_spelling_that_does(tmp_path, capsys):
    objective = {"class_path": "PolicyGradient", "init_args": {"kl": "k3"}}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"model": {"objective": objective}}))
    with pytest.raises(SystemExit) as error:
        fit.main([f"--config={tmp_path / 'short.yaml'}"])
    assert error.value.code == 2
    assert "in files, write espo_lightning.k3 for k3" in capsys.readouterr().err
