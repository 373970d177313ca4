"""`espo_lightning.sample`: what is shown is what was decoded, step by step, and at no pass more."""

import io
import json
import re
import subprocess
import sys

import pytest
import torch

from espo_lightning import BlockDecoding, Decoding, Sudoku, evaluate, load_policy, new_policy, sample
from espo_lightning.lab import terminal
from espo_lightning.lab.unmasking import fitting, keys_of, steps_of, unmask

ESCAPE = "\033["


class Terminal(io.StringIO):
    def isatty(self):
        return True


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as error:
        sample.main(list(flags))
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def policy():
    return load_policy("bundled:sudoku_espo")


KINDS = {"full": {}, "block": {"block": 4, "origin": "response"}, "causal": {"causal": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_end_in_what_the_decoder_made_without_a_pass_more(kind, monkeypatch):
    policy = new_policy(hidden_size=32, layers=1, heads=2, seed=1, **KINDS[kind])
    decoder, keys, passes = fitting(policy, temperature=1.0, length=8), keys_of(3, 0, samples=3), []
    forward = type(policy).forward
    monkeypatch.setattr(type(policy), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    prompts = policy.encode(["1+1"]).repeat_each(3)
    made = policy.decode(decoder.generate(policy, prompts, keys))
    alone, _ = len(passes), passes.clear()
    found = unmask(policy, "it", "1+1", decoder, keys)
    assert len(passes) == alone
    assert [one.text for one in found] == made
    for one in found:
        assert one.shown(-1) == [None] * 8
        assert one.shown(max(one.steps)) == one.tokens
        filled = [sum(token is not None for token in one.shown(step)) for step in steps_of(found)]
        assert filled == sorted(filled)
        assert all(0 <= sure <= 1 for sure in one.certainty)
        special = policy.tokenizer.all_special_tokens
        assert "".join(token for token in one.tokens[: one.end] if token not in special) == one.text


def test_a_causal_policy_shows_nothing_after_its_end():
    policy = new_policy(hidden_size=32, layers=1, heads=2, causal=True)
    policy.config.eos_token_id = [policy.eos_id, *range(10, 40)]  # so that texts end early
    found = unmask(policy, "it", "1", fitting(policy, 1.0, length=8), keys_of(0, 0, samples=8))
    short = [one for one in found if one.end < 7]
    assert short
    assert all(one.steps == [*range(one.end + 1), *[-1] * (7 - one.end)] for one in short)


def test_what_was_filled_in_is_shown_with_the_last_step(policy):
    early = Decoding(length=16, steps=16, temperature=1.0, early_stop=True)
    policy.config.eos_token_id = [policy.eos_id, 7, 8]
    try:
        found = unmask(policy, "it", "0" * 16, early, keys_of(0, 0, samples=4))
    finally:
        policy.config.eos_token_id = policy.eos_id
    filled = [one for one in found if -1 in one.steps]
    assert filled
    for one in filled:
        before = one.shown(max(one.steps) - 1)
        assert all(before[i] is None for i, step in enumerate(one.steps) if step < 0)
        assert None not in one.shown(max(one.steps))


def test_a_corrector_is_refused(policy):
    with pytest.raises(ValueError, match=r"decoding.corrector must be 0 to look on"):
        unmask(policy, "it", "0" * 16, Decoding(corrector=1), keys_of(0, 0, 1))


def test_fitting_is_of_the_kind_that_the_policy_needs(policy):
    assert fitting(policy, 0.0) == Decoding(temperature=0.0)
    blocks = fitting(new_policy(hidden_size=32, layers=1, heads=2, block=5), 1.0)
    assert (type(blocks), blocks.length, blocks.block_length) == (BlockDecoding, 20, 5)


def test_by_default_two_policies_solve_a_puzzle_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.main(["--html=page.html", "--json=trace.json"])
    out = capsys.readouterr().out
    assert ESCAPE not in out  # no terminal
    assert re.search(r"before RL +wrong", out)
    assert re.search(r"after RL +right", out)
    assert out.count("before RL    after RL\n") == 17  # before the first step, and after each
    trace = json.loads((tmp_path / "trace.json").read_text())
    before, after = trace["completions"]
    assert after["text"] == trace["right"]
    assert before["verdict"]["exact"] == 0
    assert sorted(after["steps"]) == trace["steps"] == list(range(16))
    assert trace["settings"]["problem"] == 1
    page = (tmp_path / "page.html").read_text()
    assert json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', page).group(1)) == trace
    assert "http" not in page.replace(json.dumps(trace), "")  # nothing is fetched
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=", page)


def test_the_problem_of_the_default_is_the_first_that_only_the_trained_policy_solves(policy):
    untrained, keys = load_policy("bundled:sudoku"), torch.arange(2)
    right = []
    for one in (untrained, policy):
        problems = [Sudoku().problem("test", 0, i) for i in range(2)]
        texts = one.decode(Decoding(temperature=0.0).generate(one, one.encode([p.prompt for p in problems]), keys))
        right.append([p.verify(text)["exact"] for p, text in zip(problems, texts)])
    assert right == [[0, 0], [0, 1]]


def test_completions_are_those_of_evaluate(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warm = "--decoding.temperature=4"  # so that they differ
    sample.main(
        [
            "--policies=bundled:sudoku",
            "--samples=3",
            "--problem=2",
            "--seed=5",
            "--json=trace.json",
            "--decoding=Decoding",
            warm,
        ]
    )
    made = [one["text"] for one in json.loads((tmp_path / "trace.json").read_text())["completions"]]
    evaluate.main(["--policy.path=bundled:sudoku", "--problems=3", "--samples=3", "--seed=5", warm, "--output=e.json"])
    rows = json.loads((tmp_path / "e.json").read_text())["samples"]
    assert [row["completion"] for row in rows if row["problem"] == 2] == made
    assert len(set(made)) > 1
    capsys.readouterr()


def test_texts_of_others_cannot_end_the_script_of_a_page():
    content = {"completions": [{"tokens": ["</script><script>alert(1)</script>"]}]}
    page = sample.page(content)
    assert "<script>alert" not in page
    assert json.loads(re.search(r'id="data">(.*?)</script>', page).group(1)) == content


def test_a_terminal_has_colours_unless_it_or_its_user_does_not_want_them(policy, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    found = unmask(policy, "it", "3001002014320300", fitting(policy, 0.0), keys_of(0, 1, 1))

    def played(**settings):
        out = Terminal()
        terminal.play(found, columns=4, pause=0, out=out, **settings)
        return out.getvalue()

    sure, steps = played(), played(colour="step")
    assert ESCAPE in sure
    assert sure != steps
    assert sure.count(f"{ESCAPE}J") == 16  # drawn over one another
    plain = terminal.ESCAPE.sub("", sure)
    assert "3 2 4 1" in plain.split("step 16")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert ESCAPE not in played()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert ESCAPE not in played()


def test_text_flows_and_breaks_at_newlines_and_at_the_width(policy):
    (one,) = unmask(policy, "it", "0" * 16, fitting(policy, 0.0), keys_of(0, 0, 1))
    one = one._replace(tokens=["ab", "c\nd", "efgh", "i"] + ["x"] * 12, end=4)
    assert terminal.panel(one, 99, 5, None, None)[:3] == ["abc", "defgh", "i····"]
    assert terminal.panel(one, -1, 8, None, None) == ["▒" * 8, "▒" * 8]


def test_panels_that_do_not_fit_stand_below_one_another(policy):
    found = unmask(policy, "it", "0" * 16, fitting(policy, 1.0), keys_of(0, 0, 4))
    assert len(terminal.frame(found, 15, 4, None, across=200)) == 5
    assert len(terminal.frame(found, 15, 4, None, across=25)) == 11


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policies=[]"], "policies is empty"),
        (["--policies=bundled:none"], "the bundled policies are"),
        (["--samples=0"], "samples must be at least 1"),
        (["--samples=2", "--decoding=Decoding", "--decoding.temperature=0"], "would all be equal"),
        (["--chat=true"], "chat is with one policy"),
        (["--chat=true", "--policies=bundled:sudoku", "--html=a.html"], "writes no file"),
        (["--pause=-1"], "pause must be 0 or a number of seconds"),
        (["--html=there.html"], "there.html exists already"),
        (["--problem=3", "--task=Sudoku", "--task.path=two.csv"], "problem must be below 2"),
        (["--policies=bundled:sudoku_causal", "--decoding=Decoding"], "use decoding=AutoregressiveDecoding"),
        (["--colour=loud"], "loud"),
        (["--device=nowhere"], "device=nowhere is not possible"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    rows = ["Puzzle,Solution", "3001002014320300,3241412314322314", "3241412314322310,3241412314322314"]
    (tmp_path / "two.csv").write_text("\n".join(rows) + "\n")
    assert message in refused(capsys, *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"there.html", "two.csv"}
    assert (tmp_path / "there.html").read_text() == "mine"


def test_chat_answers_every_line_with_what_was_said_before(monkeypatch, capsys):
    policy = new_policy(hidden_size=32, layers=1, heads=2)
    seen, tokens = [], policy.tokens
    monkeypatch.setattr(policy, "tokens", lambda prompts: seen.extend(map(list, prompts)) or tokens(prompts))
    out = io.StringIO()
    lines = ["hello\n", "\n", "and now?\n", "/new\n", "again\n"]
    sample.converse(policy, fitting(policy, 0.0), 0, lines, out)
    said = [[turn["content"] for turn in turns if turn["role"] == "user"] for turns in seen]
    answers = out.getvalue().split("\n")
    assert len([turn for turn in seen[1] if turn["role"] == "assistant"]) == 1
    assert said == [["hello"], ["hello", "and now?"], ["again"]]
    assert len(answers) == 4  # one a line, and the last line's end
    assert ESCAPE not in out.getvalue()


def test_chat_on_a_terminal_shows_the_unmasking(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    policy, out = new_policy(hidden_size=32, layers=1, heads=2), Terminal()
    sample.converse(policy, fitting(policy, 0.0, length=4), 0, ["hello"], out)
    assert out.getvalue().count(f"{ESCAPE}J") == 4


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m espo_lightning.sample --policies=bundled:sudoku --samples=40 | head -1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert run.stdout == "prompt: 3001002014320300\n"
    assert run.stderr == ""


def test_chat_reads_the_standard_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("3001002014320300\n"))
    sample.main(["--chat=true", "--policies=bundled:sudoku_espo"])
    assert capsys.readouterr().out == "3241412314322314\n"
