"""What a generation_config.json says about tokens is heard; the rest of it is about somebody else's decoding."""

import json

import pytest

from espo_lightning import load_policy, new_policy

SIZE = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24}
# of checkpoints on the hub: what generate would do, and nothing here does
OTHERS = {
    "_from_model_config": True,
    "transformers_version": "4.38.2",
    "bos_token_id": 5,
    "pad_token_id": 6,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "max_length": 7,
    "max_new_tokens": 3,
    "min_length": 50,
    "suppress_tokens": [1, 2],
    "forced_eos_token_id": 3,
    "steps": 512,
    "alg": "origin",
    "eps": 0.001,
}


@pytest.fixture(params=[False, True], ids=["diffusion", "causal"])
def folder(request, tmp_path):
    new_policy(**SIZE, causal=request.param).save(tmp_path / "policy")
    return tmp_path / "policy"


def say(folder, **settings) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def test_without_one_the_config_says_it_alone(folder):
    before = load_policy(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load_policy(folder).eos_ids == before.eos_ids == {before.eos_id}


@pytest.mark.parametrize("ends", [30, [30], [30, 31]])
def test_its_ends_of_text_end_texts_here_and_stay_when_saved(ends, folder, tmp_path):
    own = load_policy(folder).eos_id
    say(folder, eos_token_id=ends)
    policy = load_policy(folder)
    assert policy.eos_ids == {own, *([ends] if isinstance(ends, int) else ends)}
    assert policy.eos_id == own  # which fills a canvas, as before
    policy.save(tmp_path / "again")
    assert load_policy(tmp_path / "again").eos_ids == policy.eos_ids


def test_the_same_end_of_text_changes_nothing(folder):
    before = load_policy(folder).config.eos_token_id
    say(folder, eos_token_id=[before])
    assert load_policy(folder).config.eos_token_id == before


def test_what_it_says_about_decoding_is_not_read(folder):
    before = load_policy(folder)
    say(folder, **OTHERS)
    policy = load_policy(folder)
    assert policy.eos_ids == before.eos_ids
    assert policy.tokenizer.pad_token_id == before.tokenizer.pad_token_id
    assert policy.config.to_dict() == before.config.to_dict()


@pytest.mark.parametrize("ends", [10**6, -1, "<eos>", [2.5]])
def test_an_end_that_is_no_token_is_refused(ends, folder):
    say(folder, eos_token_id=ends)
    with pytest.raises(ValueError, match=r"generation_config\.json of .* has eos_token_id"):
        load_policy(folder)


@pytest.mark.parametrize("text", ["[1, 2]", "{", ""])
def test_a_file_that_is_no_object_is_refused(text, folder):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_policy(folder)


def test_another_mask_is_refused_and_the_same_or_only_one_is_taken(tmp_path):
    policy = new_policy(**SIZE)
    policy.save(tmp_path / "policy")
    say(tmp_path / "policy", mask_token_id=policy.mask_id + 9)
    with pytest.raises(ValueError, match=rf"mask_token_id={policy.mask_id}, but its generation_config.json has"):
        load_policy(tmp_path / "policy")
    say(tmp_path / "policy", mask_token_id=policy.mask_id)
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    del config["mask_token_id"]
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    assert load_policy(tmp_path / "policy").mask_id == policy.mask_id
