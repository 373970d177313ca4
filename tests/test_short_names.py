"""Short names of this library's functions, on the command line and in files: the same settings."""

import pytest
import yaml

from espo_lightning import evaluate, fit, sft
from espo_lightning.training.command_line import callables, spelt_out, spelt_out_in
from espo_lightning.training.signals import Signals

DRY = ["--trainer.accelerator=cpu", "--data.batches=1", "--data.eval_problems=0"]
# each as one would write it on the command line, and in a file
PAIRS = {
    "a function": (["--model.advantage=standardised"], {"model": {"advantage": "standardised"}}),
    "of an object inside": (
        ["--model.objective.kl=k3", "--model.objective.ratio=token_ratio"],
        {"model": {"objective": {"class_path": "PolicyGradient", "init_args": {"kl": "k3", "ratio": "token_ratio"}}}},
    ),
    "without its class": (
        ["--model.objective.kl=k3"],
        {"model": {"objective": {"init_args": {"kl": "k3"}}}},
    ),
    "an object like a function": (
        ["--model.objective.ratio=TruncatedRatio", "--model.objective.ratio.clip=0.25"],
        {
            "model": {
                "objective": {
                    "init_args": {"ratio": {"class_path": "TruncatedRatio", "init_args": {"clip": 0.25}}},
                },
            },
        },
    ),
    "a decoder's order": (
        ["--model.decoding.order=random_order"],
        {"model": {"decoding": {"class_path": "Decoding", "init_args": {"order": "random_order"}}}},
    ),
    "a class": (["--model.likelihood=MeanField"], {"model": {"likelihood": "MeanField"}}),
    "a policy that a function makes": (
        ["--model.policy=new_policy", "--model.policy.hidden_size=16", "--model.policy.heads=2"],
        {"model": {"policy": {"class_path": "new_policy", "init_args": {"hidden_size": 16, "heads": 2}}}},
    ),
    "a task": (["--data.task=Countdown"], {"data": {"task": "Countdown"}}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_file_says_the_same_as_the_command_line(name, tmp_path):
    flags, settings = PAIRS[name]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(settings))
    settings = []
    for where, given in (("flags", flags), ("file", [f"--config={tmp_path / 'more.yaml'}"])):
        cli = fit.make([*DRY, f"--run_dir={tmp_path / where}", *given], Signals())
        settings.append(cli.settings)
        cli.close()
    assert settings[0] == settings[1]


def test_every_public_function_is_known_where_functions_are_expected_and_nowhere_else():
    for name, path in callables().items():
        assert spelt_out([f"--model.objective.kl={name}"]) == [f"--model.objective.kl={path}"]
        assert spelt_out(["--model.objective.kl", name]) == ["--model.objective.kl", path]
        assert spelt_out([f"--model.objective.ratio.class_path={name}"])[0].endswith(f"={path}")
        assert spelt_out_in({"objective": {"init_args": {"kl": name}}}) == {"objective": {"init_args": {"kl": path}}}
        for elsewhere in ({"run_dir": name}, {"task": {"init_args": {"path": name}}}, [name], name):
            assert spelt_out_in(elsewhere) == elsewhere


@pytest.mark.parametrize("program", [fit, sft, evaluate])
@pytest.mark.parametrize("text", ["model: [", "{", "a: b: c", "\t- x"])
def test_a_file_that_is_no_yaml_is_one_message(program, text, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(SystemExit) as error:
        program.main([f"--config={tmp_path / 'broken.yaml'}"])
    assert error.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
