"""`espo_lightning.push`: a card that states what the files of a run say, and an upload only where one is asked for."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from espo_lightning import LoRA, load_policy, new_policy, push
from espo_lightning.lab.card import card, read_run

BUNDLED = Path(push.__file__).parent / "assets" / "sudoku_espo"
RESULT = {"split": "test", "n": 64, "exact": 0.5, "reward": 0.75, "settings": {"task": {"class_path": "a.b.GSM8K"}}}
RESULT |= {"ci95": {"exact": [0.4, 0.6], "reward": [0.7, 0.8], "failed": [0.0, 0.1]}, "failed": 0.0}


@pytest.fixture
def run(tmp_path):
    """The folder of the run that made bundled:sudoku_espo, as far as it is kept."""
    summary = json.loads((BUNDLED / "summary.json").read_text())
    folder = tmp_path / "run"
    (folder / "policy").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump(summary["settings"], sort_keys=False))
    return folder


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as error:
        push.main(list(flags))
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_card_of_the_bundled_policy_says_what_its_run_measured(run):
    stored = (BUNDLED / "README.md").read_text()
    notes = "## Recipe" + stored.split("## Recipe")[1].split("## Settings")[0].rstrip()
    made = card(read_run(run, []), "sudoku_espo: bundled:sudoku after RL", "apache-2.0", notes, "bundled:sudoku_espo")
    assert made == stored
    assert "| exact | 0.062 [0.039, 0.099] | 0.707 [0.641, 0.765] | 0.037 |" in stored


def test_the_hub_reads_metrics_with_intervals_from_the_metadata(run, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    push.main([f"--run={run}", f"--evaluations=[{tmp_path / 'result.json'}]", "--name=mine", "--notes=Read this."])
    content = ModelCard.load(run / "policy" / "README.md")
    data = content.data
    assert (data.license, data.library_name, data.model_name) == ("apache-2.0", "transformers", "mine")
    assert data.base_model is None  # a bundled policy is none of the hub's
    found = {(r.dataset_type, r.metric_name): r for r in data.eval_results}
    exact = found["espo_lightning/Sudoku", "exact"]
    assert (exact.metric_value, exact.metric_type, exact.dataset_split) == (0.707, "accuracy", "test")
    assert exact.metric_args == {"n": 256, "ci95": [0.641, 0.7654]}
    assert found["openai/gsm8k", "exact"].metric_args == {"n": 64, "ci95": [0.4, 0.6]}
    assert ("openai/gsm8k", "failed") not in found  # it never happened
    assert "exact 0.500 [0.400, 0.600]" in content.text
    assert "bundled:sudoku" in content.text
    assert "seed 0" in content.text
    assert "Read this." in content.text
    assert yaml.safe_load(content.text.split("```yaml")[1].split("```")[0])["model"]["group_size"] == 8


def test_adapters_name_their_base(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["policy"]["init_args"]["path"] = "GSAI-ML/LLaDA-8B-Instruct"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "policy" / "adapter_config.json").write_text("{}")
    push.main([f"--run={run}", "--licence=mit"])
    content = ModelCard.load(run / "policy" / "README.md")
    assert (content.data.library_name, content.data.base_model) == ("peft", "GSAI-ML/LLaDA-8B-Instruct")
    assert content.text.lstrip().split("\n")[2].startswith("LoRA adapters made from `GSAI-ML/LLaDA-8B-Instruct`")


def test_a_policy_of_supervised_training_has_a_card_without_results(run):
    (run / "summary.json").unlink()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"] = {"policy": {"class_path": "espo_lightning.new_policy", "init_args": {"seed": 0}}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    push.main([f"--run={run}", "--licence=apache-2.0"])
    content = ModelCard.load(run / "policy" / "README.md")
    assert "made from random weights by supervised training" in content.text
    assert content.data.eval_results is None
    assert "## Results" not in content.text


def test_nothing_leaves_the_machine_unless_a_repository_is_named(run, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **k: calls.append(("create", repo, k)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **k: calls.append(("upload", k)))
    push.main([f"--run={run}"])
    assert calls == []
    push.main([f"--run={run}", "--repo=me/it"])
    (_, repo, options), (_, upload) = calls
    assert (repo, options) == ("me/it", {"private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("me/it", run / "policy")
    assert 'load_policy("me/it")' in (run / "policy" / "README.md").read_text()
    assert str(run / "policy" / "README.md") in capsys.readouterr().out


def test_a_hub_that_refuses_is_one_message(run, monkeypatch, capsys):
    def fail(self, *_, **__):
        raise OSError("401 Unauthorized\nlong trace")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    assert "the hub did not take me/it: 401 Unauthorized. The card is written" in refused(
        capsys, f"--run={run}", "--repo=me/it"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run=nowhere"], "run nowhere is no folder of a finished run"),
        (["--repo=me"], "repo must be OWNER/NAME, got 'me'"),
        (["--evaluations=[config.yaml]"], "config.yaml is no JSON file"),
        (["--evaluations=[summary.json]"], "summary.json is no result of espo_lightning.evaluate"),
        (["--licence=null"], "name the licence"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(flags, message, run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    if "licence" in flags[0]:
        text = (run / "config.yaml").read_text().replace("bundled:sudoku", "GSAI-ML/LLaDA-8B-Instruct")
        (run / "config.yaml").write_text(text)
    assert message in refused(capsys, "--run=.", *flags)
    assert not (run / "policy" / "README.md").exists()


def test_a_folder_with_its_card_opens_as_before(run):
    policy = load_policy("bundled:sudoku", lora=LoRA(rank=2))
    policy.save(run / "policy")
    push.main([f"--run={run}"])
    assert load_policy(run / "policy").has_adapters
    base = new_policy(hidden_size=16, layers=1, heads=2)
    base.save(run / "policy2")
    assert load_policy(run / "policy2").mask_id == base.mask_id
