"""Published tokenizers and texts: which tokens are meant, positions, what a user writes stays text."""

import json
import warnings

import pytest
import torch
from checkpoints import EOS, MASK, write_tokenizer
from conftest import Letters, fit, small_module
from published_cases import LLAMA32, QWEN25, checkpoints_fixture, edit, folder_fixture  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from espo_lightning import Decoding, LoRA, evaluate, load_policy, new_policy
from espo_lightning import fit as fit_program
from espo_lightning.keys import fold_in
from espo_lightning.policies.config_keys import positions
from espo_lightning.policies.formats import make_config
from espo_lightning.policies.text import plain_tokens, prompt_tokens
from espo_lightning.training.supervised import SFTModule, encode_answers

pytestmark = pytest.mark.usefixtures("global_generators_untouched")


# ---- config and tokenizer mean the same tokens ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 9}, r"mask_token_id=9, but its tokenizer's mask token is '<mask>', id 2"),
        ({"eos_token_id": 9}, r"eos_token_id=9, but its tokenizer ends texts with '<eos>', id 1"),
        ({"eos_token_id": [9, 10]}, r"eos_token_id=\[9, 10\], but its tokenizer ends texts with '<eos>', id 1"),
        ({"eos_token_id": [EOS, 64]}, r"eos_token_id=64.*64 rows"),
        ({"eos_token_id": -1}, r"eos_token_id=-1, which is no token id"),
        ({"mask_token_id": 64}, r"mask_token_id=64.*64 rows"),
        ({"mask_token_id": -1}, r"mask_token_id=-1, which is no token id"),
        ({"mask_token_id": "2"}, r"mask_token_id='2', which is no token id|config\.json"),
    ],
)
def test_tokens_on_which_config_and_tokenizer_disagree_are_both_named(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


@pytest.mark.parametrize("other", ["eos", "unk", "bos"])
def test_a_mask_token_is_no_other_token(folder, other):
    ids = {"eos": "<eos>", "unk": "<unk>", "bos": "w9"}
    edit(folder / "tokenizer_config.json", mask_token=ids[other], bos_token="w9")
    edit(folder / "config.json", mask_token_id="absent")
    with pytest.raises(ValueError, match="could not tell them apart"):
        load_policy(folder)


def test_several_ends_and_a_mask_that_only_the_config_names_are_fine(folder):
    edit(folder / "config.json", eos_token_id=[EOS, 40])
    assert load_policy(folder).eos_ids == {EOS, 40}
    write_tokenizer(folder, without="mask_token")
    assert load_policy(folder).mask_id == MASK


# ---- adapters bring their own text ---------------------------------------------------------------------------------


@pytest.fixture
def adapter(checkpoints, tmp_path):
    load_policy(checkpoints / "llada", lora=LoRA(rank=2, alpha=2)).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_tokenizer_and_the_template_of_an_adapter_win(adapter, checkpoints):
    base = load_policy(checkpoints / "llada").encode(["w3"]).ids.tolist()
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == base
    (adapter / "chat_template.jinja").write_text("w7 {{ messages[0]['content'] }} w8")
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == [[11, 7, 12]]
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the template alone
        (adapter / name).unlink()
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == [[11, 7, 12]]
    (adapter / "chat_template.jinja").unlink()
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": "w1{{ messages[0]['content'] }}"}))
    assert load_policy(adapter).encode([" w3"]).ids.tolist() == [[5, 7]]
    (adapter / "tokenizer_config.json").unlink()  # no text of its own: the base's
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == base


def test_an_adapters_tokenizer_without_a_template_takes_the_bases(adapter, checkpoints):
    (adapter / "chat_template.jinja").unlink()
    base = load_policy(checkpoints / "llada").encode(["w3"]).ids.tolist()
    assert load_policy(adapter).encode(["w3"]).ids.tolist() == base


def test_an_adapters_tokenizer_must_fit_its_base(adapter):
    write_tokenizer(adapter, extra=5)
    with pytest.raises(ValueError, match=r"do not belong together: token id 68.*64 rows"):
        load_policy(adapter)
    write_tokenizer(adapter)
    edit(adapter / "tokenizer_config.json", mask_token="w5")
    with pytest.raises(ValueError, match=r"mask_token_id=2, but its tokenizer's mask token is 'w5', id 9"):
        load_policy(adapter)
    write_tokenizer(adapter)
    edit(adapter / "tokenizer_config.json", eos_token="w5")
    with pytest.raises(ValueError, match=r"eos_token_id=1, but its tokenizer ends texts with 'w5', id 9"):
        load_policy(adapter)


# ---- positions -----------------------------------------------------------------------------------------------------


def test_no_more_tokens_than_positions(checkpoints):
    policy = load_policy(checkpoints / "llada")
    assert policy.positions == 128
    ids = torch.full((1, 128), 5)
    select = torch.zeros(1, 128, dtype=torch.bool)
    select[0, -1] = True
    policy(ids, None, select, lambda x: x)
    prompts = policy.encode([" ".join(["w3"] * 120)])
    keys = fold_in(0, torch.arange(1))
    with pytest.raises(ValueError, match=r"129 tokens together.*max_position_embeddings=128: lower max_prompt_length"):
        Decoding(8, 8, 8).generate(policy, prompts, keys)
    Decoding(7, 7, 7).generate(policy, prompts, keys)


def test_a_canvas_beyond_the_positions_is_refused_before_anything_begins(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"a canvas of length 512 leaves no room for a prompt.*=512; lower the length"):
        small_module(decoding=Decoding(512, 512, 512))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        SFTModule(new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24), length=600)
    flags = ["--model.decoding.length=1024", "--model.decoding.steps=1024", f"--run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as error:
        fit_program.main(["--trainer.accelerator=cpu", *flags])
    assert error.value.code == 2
    assert "a canvas of length 1024" in capsys.readouterr().err
    flags = ["--decoding.length=512", "--decoding.steps=512", f"--output={tmp_path / 'run' / 'o.json'}"]
    with pytest.raises(SystemExit) as error:
        evaluate.main(["--policy.path=bundled:sudoku", "--task=Sudoku", *flags])
    assert error.value.code == 2
    assert "a canvas of length 512 leaves no room" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_extended_positions_count():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert positions(make_config(QWEN25 | {"rope_scaling": yarn})) == 131072
    assert positions(make_config(LLAMA32)) == 131072
    assert positions(make_config(QWEN25 | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}})) == 32768


# ---- what a user writes stays text ---------------------------------------------------------------------------------


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, as Qwen's and Dream's without merges, with their special tokens and an added word that is not special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **special
    )
    fast.add_tokens(["<think>"])
    fast.chat_template = CHATML
    return fast


TOKENIZERS = {
    "characters": lambda: new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).tokenizer,
    "bytes": byte_tokenizer,
}


def special_ids(tokenizer) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spelt_special_tokens_are_text_in_prompts_and_answers(kind):
    tokenizer = TOKENIZERS[kind]()
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    names = [tokenizer.added_tokens_decoder[i].content for i in sorted(special)]
    plain = prompt_tokens(tokenizer, [[{"role": "user", "content": "abc"}]])[0]
    frame = [i for i in plain if i in special]  # the template's own
    assert frame
    for name in names:
        for text in (name, f"a {name} b", f"{name}{name}", f"({names[0]}{name})", f"\U000f0000{name}"):
            (row,) = prompt_tokens(tokenizer, [[{"role": "user", "content": text}]])
            assert [i for i in row if i in special] == frame, text
            (answer,) = plain_tokens(tokenizer, [text])
            assert not special & set(answer), text
            if kind == "bytes":
                assert tokenizer.decode(answer) == text
                assert text.strip() in tokenizer.decode([i for i in row if i not in special])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_texts_are_tokenised_as_they_were(kind):
    tokenizer = TOKENIZERS[kind]()
    texts = ["0401002010030310", "3,7,2=13", "a<b>c </s> [mask] < eos >", "x\n y", "", "<think> ok"]
    turns = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt_tokens(tokenizer, turns) == [tokenizer(t, add_special_tokens=False)["input_ids"] for t in rendered]
    assert plain_tokens(tokenizer, texts) == [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    mixed = [turns[0], [{"role": "user", "content": "<eos> <|im_end|>"}], *turns[1:]]  # among others, in their order
    rows = prompt_tokens(tokenizer, mixed)
    assert [rows[0], *rows[2:]] == prompt_tokens(tokenizer, turns)


def test_in_a_policy_and_in_supervised_training():
    policy = new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24)
    ids = policy.encode(["a<mask>b<eos><assistant>"]).ids
    assert not torch.isin(ids, torch.tensor([policy.mask_id, policy.eos_id])).any()
    assert policy.tokenizer.decode(ids[0, 1:-1]) == "a<mask>b<eos><assistant>"
    answer = encode_answers(policy, ["<eos>x"], 8)
    assert answer[0, :6].tolist() == [policy.tokenizer.get_vocab()[c] for c in "<eos>x"]
    assert policy.decode(answer) == ["<eos>x"]
    with pytest.raises(ValueError, match="makes the mask token of the prompt"):  # <{{ role }}>
        policy.encode([[{"role": "mask", "content": "a"}]])


# ---- a tokenizer that cannot read a prompt ---------------------------------------------------------------------------


def test_unknown_characters_are_told_once_with_their_share():
    policy = new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24)
    with pytest.warns(UserWarning, match=r"maps 40 % of the tokens of the prompt that starts 'ABc'.*<unk>.*'AB'"):
        policy.encode(["ABc"])  # of <user>, A, B, c, <assistant>
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.encode(["DEF"])
        new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24).encode(["abc" * 9 + "A"])  # a small share
    other = new_policy(hidden_size=16, layers=1, heads=2, intermediate_size=24)
    with pytest.warns(UserWarning, match="of the tokens of the answer that starts 'abcD'"):
        other.answer_tokens(["abc", "abcD"])


class Capitals(Letters):
    def problem(self, split, seed, index):
        return super().problem(split, seed, index)._replace(prompt="HELLO")


def test_in_training_too():
    with pytest.warns(UserWarning, match="maps 71 % of the tokens of the prompt that starts 'HELLO'"):
        fit(small_module(), 1, task=Capitals())
