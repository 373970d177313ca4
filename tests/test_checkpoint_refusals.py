"""Remote code, hub ids, and checkpoints that are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SMALL, checkpoints_fixture, edit, llada_fixture, scores  # noqa: F401
from checkpoints import MASK, write_tokenizer
from safetensors.torch import load_file, save_file

from espo_lightning.policies.files import resolve
from espo_lightning.policies.load import load_policy
from espo_lightning.policies.lora import LoRA

# ---- remote code ----------------------------------------------------------------------------------------------------


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

class OtherConfig(LlamaConfig):
    model_type = "other"

class OtherModel(LlamaForCausalLM):
    config_class = OtherConfig

    def __init__(self, config):
        super().__init__(config)
        {change}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("self.config.is_causal = False", None),
        ("pass", "attends backwards only"),
        ("self.inner = self.model; del self.model", "laid out like LlamaForCausalLM"),
        ("raise RuntimeError('old code')", "old code"),
    ],
)
def test_remote_code_only_on_request_and_only_if_it_attends_in_both_directions(checkpoints, tmp_path, change, message):
    folder = Path(shutil.copytree(checkpoints / "llama_masked", tmp_path / "other"))
    auto_map = {"AutoConfig": "modeling_other.OtherConfig", "AutoModelForCausalLM": "modeling_other.OtherModel"}
    edit(folder / "config.json", model_type="other", auto_map=auto_map, is_causal="absent")
    (folder / "modeling_other.py").write_text(REMOTE.format(change=change))
    with pytest.raises(ValueError, match=r"unknown model_type 'other'.*llada, Dream.*trust_remote_code"):
        load_policy(folder)
    if message:
        with pytest.raises(ValueError, match=message):
            load_policy(folder, trust_remote_code=True)
    else:
        policy = load_policy(folder, trust_remote_code=True)
        assert (policy.mask_id, policy.shift, policy.causal) == (MASK, 0, False)
        assert torch.equal(scores(policy), scores(load_policy(checkpoints / "llama_masked")))


# ---- hub ids and bad input ------------------------------------------------------------------------------------------


def test_hub_ids_are_downloaded_and_local_paths_never_are(checkpoints, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404 not found\nsecond line")
        return str(checkpoints / "llada")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    policy = load_policy("owner/name")
    assert policy.model.name_or_path == "owner/name"
    assert [name for name, _ in asked] == ["owner/name"]
    assert {"*.json", "*.safetensors"} <= set(asked[0][1])
    assert "*.py" not in asked[0][1]
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no local folder.*404 not found$"):
        resolve("nobody/nothing")
    asked.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("/no/where", "./a", "../a/b", "~/nowhere-at-all", "runs/typo", "a/b/c", "name", "a/", "file"):
        with pytest.raises(
            FileNotFoundError, match=r"(does not exist|is a file): expected a checkpoint folder"
        ) as error:
            resolve(path)
        assert path in str(error.value)
    assert not asked


def shard(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def change_weights(folder: Path, change) -> None:
    weights = load_file(shard(folder))
    change(weights)
    save_file(weights, shard(folder))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "must hold a JSON object, got list"),
        (lambda f: edit(f / "config.json", d_model="absent"), ValueError, "lacks 'd_model'"),
        (lambda f: edit(f / "config.json", model_type="gpt2"), ValueError, "unknown model_type 'gpt2'.*llada, Dream"),
        (lambda f: edit(f / "config.json", model_type="absent"), ValueError, "unknown model_type None"),
        (lambda f: edit(f / "config.json", alibi=True), ValueError, "no Llama.*alibi"),
        (lambda f: edit(f / "config.json", n_layers=3), ValueError, r"missing model\.transformer\.blocks\.2"),
        (lambda f: edit(f / "config.json", n_layers=1), ValueError, r"unexpected model\.transformer\.blocks\.1"),
        (lambda f: edit(f / "config.json", embedding_size=99), ValueError, r"wte\.weight is \[64, 32\].*\[99, 32\]"),
        (lambda f: shard(f).unlink(), FileNotFoundError, "lacks model-00001-of-00002.safetensors"),
        (lambda f: shard(f).write_bytes(b"junk"), ValueError, "model-00001-of-00002.safetensors is damaged"),
        (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]), ValueError, "is damaged"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), FileNotFoundError, "lacks model.safetensors: copy"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ValueError, "has no weight_map"),
        (lambda f: change_weights(f, lambda w: w.update(extra=torch.ones(1))), ValueError, "unexpected extra"),
        (lambda f: change_weights(f, lambda w: w.pop(next(iter(w)))), ValueError, r"missing model\.transformer"),
        (
            lambda f: change_weights(f, lambda w: w.update({k: v.to(torch.int8) for k, v in w.items()})),
            ValueError,
            "torch.int8, where config.json needs floats",
        ),
        (lambda f: write_tokenizer(f, without="eos_token"), ValueError, "no end-of-text token"),
        (
            lambda f: [(f / "chat_template.jinja").unlink(), write_tokenizer(f, without="chat_template")],
            ValueError,
            "no chat template",
        ),
        (lambda f: write_tokenizer(f, extra=5), ValueError, "do not belong together: token id 68.*64 rows"),
        (lambda f: (f / "tokenizer.json").write_text("{"), ValueError, "tokenizer of .* cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), ValueError, "tokenizer of .* cannot be read"),
        (
            lambda f: [write_tokenizer(f, without="mask_token"), edit(f / "config.json", mask_token_id="absent")],
            ValueError,
            "no mask token: set mask_token_id",
        ),
        (lambda f: edit(f / "config.json", mask_token_id=64), ValueError, "token id 64"),
    ],
)
def test_bad_checkpoints_say_what_is_wrong(llada, damage, error, message):
    damage(llada)
    with pytest.raises(error, match=message):
        load_policy(llada)


def test_bad_arguments_say_what_is_wrong(checkpoints, tmp_path):
    llada = checkpoints / "llada"
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, auto, got 'fp8'"):
        load_policy(llada, dtype="fp8")
    with pytest.raises(ValueError, match="attention='magic'"):
        load_policy(llada, attention="magic")
    with pytest.raises(ValueError, match=r"target_modules \['query'\].*choose from.*'q_proj'"):
        load_policy(llada, lora=LoRA(rank=2, target_modules=("q_proj", "query")))
    for bad in ({"rank": 0}, {"alpha": 0}, {"target_modules": ()}):
        with pytest.raises(ValueError, match="LoRA needs"):
            LoRA(**bad)
    copy = Path(shutil.copytree(checkpoints / "llama_masked", tmp_path / "copy"))
    for shift in (2, "absent"):
        edit(copy / "config.json", logits_shift=shift)
        with pytest.raises(ValueError, match="logits_shift must be 0"):
            load_policy(copy)


def test_bad_adapters_say_what_is_wrong(checkpoints, tmp_path):
    load_policy(checkpoints / "llada", lora=SMALL).save(tmp_path / "good")

    def damaged(name: str, **changes) -> Path:
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / name))
        edit(folder / "adapter_config.json", **changes)
        return folder

    with pytest.raises(ValueError, match="already is a LoRA adapter"):
        load_policy(tmp_path / "good", lora=SMALL)
    with pytest.raises(ValueError, match=r"does not fit its base .*llada_gqa"):
        load_policy(damaged("gqa", base_model_name_or_path=str(checkpoints / "llada_gqa_sharded")))
    with pytest.raises(ValueError, match="does not fit its base"):
        load_policy(damaged("rank", r=5))
    with pytest.raises(FileNotFoundError, match=r"base of the adapter .* is gone \(/no/where"):
        load_policy(damaged("gone", base_model_name_or_path="/no/where"))
    with pytest.raises(ValueError, match="set base_model_name_or_path"):
        load_policy(damaged("none", base_model_name_or_path=None))
    folder = damaged("no_weights")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model\.safetensors"):
        load_policy(folder)
    folder = damaged("junk")
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="does not fit its base"):
        load_policy(folder)
