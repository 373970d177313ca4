"""Training from the command line: the run folder, and bad flags."""

import csv
import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from fit_cases import TINY, finished_fixture, folder_fixture  # noqa: F401

from espo_lightning import fit, load_policy

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


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
