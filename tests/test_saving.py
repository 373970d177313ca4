"""What is saved and exported is what was loaded, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    CAUSAL,
    MASKED,
    checkpoints_fixture,  # noqa: F401
    logits,
    scores,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from espo_lightning.export import export, main
from espo_lightning.policies.load import load_policy


@pytest.mark.parametrize("kind", MASKED + CAUSAL)
def test_saved_policy_opens_here_and_in_transformers(checkpoints, tmp_path, kind):
    policy, ids = load_policy(checkpoints / kind), tokens(2, 7)
    policy.save(tmp_path / "out")
    again = load_policy(tmp_path / "out")
    assert (again.mask_id, again.shift, again.causal) == (policy.mask_id, policy.shift, policy.causal)
    assert torch.equal(logits(again, ids), logits(policy, ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        full = theirs(ids).logits
    assert torch.equal(full[:, : ids.shape[1] - policy.shift], logits(policy, ids))
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert again.encode(["w1 w2"]).ids.tolist() == policy.encode(["w1 w2"]).ids.tolist()


@pytest.mark.parametrize("kind", ["llada", "llada_gqa_sharded", "llada_tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llada_export_is_the_original_bit_for_bit(checkpoints, tmp_path, kind, dtype):
    original = Path(shutil.copytree(checkpoints / kind, tmp_path / "original"))
    for file in original.glob("*.safetensors"):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    load_policy(original, dtype="auto").save(tmp_path / "hf")  # through our own folder, which must forget nothing
    for n, source in enumerate([original, tmp_path / "hf"]):
        export(str(source), str(tmp_path / f"out{n}"))
        weights = {k: v for file in original.glob("*.safetensors") for k, v in load_file(file).items()}
        written = load_file(tmp_path / f"out{n}" / "model.safetensors")
        assert written.keys() == weights.keys()
        assert all(torch.equal(written[k], weights[k]) and written[k].dtype == dtype for k in weights)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / f"out{n}")]
        assert configs[0] == configs[1]


def test_export_of_a_policy_that_never_was_llada(checkpoints, tmp_path, capsys):
    export(str(checkpoints / "llama_masked"), str(tmp_path / "llada"), "llada")
    again = load_policy(tmp_path / "llada")
    assert json.loads((tmp_path / "llada" / "config.json").read_text())["model_type"] == "llada"
    assert torch.equal(scores(again), scores(load_policy(checkpoints / "llama_masked")))
    for kind in ("dream", "llama", "qwen3_masked"):
        with pytest.raises(ValueError, match="--format hf"):
            export(str(checkpoints / kind), str(tmp_path / kind), "llada")
        assert not (tmp_path / kind).exists()
    main(["--policy", str(checkpoints / "dream"), "--output", str(tmp_path / "hf"), "--format", "hf"])
    assert torch.equal(scores(load_policy(tmp_path / "hf")), scores(load_policy(checkpoints / "dream")))
    assert capsys.readouterr().out.count("\n") == 1


def test_export_cli_errors_are_one_message_and_exit_2(checkpoints, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(SystemExit) as stop:
        main(["--policy", str(checkpoints / "llada"), "--output", str(tmp_path / "full")])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    *usage, error = printed.err.splitlines()
    assert error.startswith("error: ")
    assert "is not empty" in error
    assert all(line.startswith(("usage: ", "tip: ")) for line in usage)
    assert [x.name for x in (tmp_path / "full").iterdir()] == ["precious"]


def test_export_cli_errors_in_process(checkpoints, tmp_path, capsys):
    for argv, message in [
        (["--policy", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")], "does not exist"),
        (["--policy", str(checkpoints / "llada"), "--output", str(tmp_path / "out"), "--format", "gguf"], "gguf"),
        (["--policy", str(checkpoints / "llada")], "output"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
