"""Presets on the command line, faults that were repaired, bad input, defaults."""

from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Letters, fit, parameters, small_module
from jsonargparse import ArgumentParser
from preset_cases import EACH, first_only, train

from espo_lightning import (
    ELBO,
    ESPOModule,
    MeanField,
    PolicyGradient,
    QuadratureELBO,
    Sandwich,
    SelfNormalised,
    TimeELBO,
    mean_centred,
)
from espo_lightning import fit as program

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


# ---- faults that were repaired --------------------------------------------------------------------------------------


class Constant(Letters):
    def __init__(self, reward: float):
        super().__init__(partial(constant, reward))


def constant(reward: float, prompt: str, text: str) -> dict[str, float]:
    return {"reward": reward, "exact": 0.0}


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7])
@pytest.mark.parametrize("skip", [False, True])
def test_a_batch_without_a_signal_does_not_move_a_fresh_policy(reward, skip):
    """The float32 mean of equal rewards differs from them in the last bit, which Adam would blow up to a whole step."""
    adam = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "beta": 0.0, "skip_equal_groups": skip}
    start = parameters(small_module())
    after, metrics = train(3, task=Constant(reward), **adam)
    assert torch.equal(start, after)
    assert [row["train/zero_variance_groups"] for row in metrics.rows] == [1.0] * 3


def test_leaving_out_groups_leaves_momentum_and_decay_as_they_are():
    """Equal rewards after a rollout with a signal: the optimizer's step is the same whether groups are skipped."""
    results = []
    for skip in (False, True):
        task = Letters(partial(first_only, seen=[]))
        settings = {"optimizer": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1), "beta": 0.0}
        after_one, _ = train(1, task=Letters(partial(first_only, seen=[])), **settings, skip_equal_groups=skip)
        after_two, _ = train(2, task=task, **settings, skip_equal_groups=skip)
        assert not torch.equal(after_one, after_two)
        results.append(after_two)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=2e-6)


def test_validation_draws_an_order_of_its_own_for_every_problem():
    from espo_lightning import Decoding, random_order

    class Watch(Decoding):
        keys: list = []  # noqa: RUF012

        def generate(self, policy, prompts, keys, agree=lambda more: more):
            self.keys.append(keys.tolist())
            return super().generate(policy, prompts, keys, agree)

    module = small_module(decoding=Watch(4, 4, 4, order=random_order))
    Watch.keys = []
    fit(module, 1, limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=0)
    validation = Watch.keys[-1]
    assert len(set(validation)) == len(validation) == 4


# ---- bad input, and the command line --------------------------------------------------------------------------------


def test_groups_are_not_split_by_micro_batches():
    with pytest.raises(ValueError, match=r"micro_batch must be a multiple of group_size 4, as SelfNormalised .* got 3"):
        small_module(objective=SelfNormalised(), likelihood=ELBO(), micro_batch=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sandwich(beta=0.0), "Sandwich.beta must be positive"),
        (lambda: Sandwich(mix=1.5), "Sandwich.mix must lie between 0"),
        (lambda: SelfNormalised(cap=0.0), "cap must be positive"),
        (lambda: PolicyGradient(clip_range=float("nan")), "clip_range must be 0 or positive"),
        (lambda: TimeELBO(low=0.9, high=0.1), "low"),
        (lambda: ELBO(draws=0), "draws must be at least 1"),
        (lambda: TimeELBO(draws=0), "draws must be at least 1"),
        (lambda: QuadratureELBO(nodes=0), "nodes must be at least 1"),
    ],
)
def test_nonsense_is_refused_by_constructors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SMALL = [
    *("--data.batches=1", "--data.batch_size=2", "--data.eval_problems=2", "--data.eval_batch_size=2"),
    *("--model.group_size=2", "--model.updates=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
]


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("task", ["sudoku", "countdown"])
def test_every_preset_runs_on_the_bundled_policies(name, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [] if task == "sudoku" else ["--config", str(EXPERIMENTS / "countdown_tiny.yaml")]
    if name == "ebpo":
        if task == "countdown":
            pytest.skip("of the bundled policies, only one for Sudoku has blocks")
        base = ["--model.policy.path=bundled:sudoku_block"]
    program.main([*base, "--config", str(EXPERIMENTS / "methods" / f"{name}.yaml"), "--run_dir=run", *SMALL])
    assert (tmp_path / "run" / "summary.json").exists()


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        program.main([*SMALL, "--run_dir=run", *flags])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["spg", "--model.likelihood.block=5"], "block 5 does not divide the canvas"),
        (["spg", "--model.objective.score.mix=2"], "Sandwich.mix must lie between 0"),
        (["unigrpo", "--model.likelihood.rising=true", "--model.updates=1"], "rising needs updates >= 2"),
        (["stabledrl", "--model.micro_batch=3"], "micro_batch must be a multiple of group_size"),
        (["diffu_grpo", "--model.objective.clip_range=-1"], "clip_range must be 0 or positive"),
        (["coupled_grpo", "--model.objective.kl=espo_lightning.k2_u"], "k2_u needs independent mask draws"),
        (["wd1", "--model.reference_sync=2"], "reference_sync has no effect"),
        (["gdpo", "--model.policy.path=bundled:sudoku_causal"], "cannot denoise"),
        (["gdpo", "--model.likelihood=Autoregressive"], "likelihood=Autoregressive scores a token"),
        (["../sudoku_grpo", "--model.policy.path=bundled:sudoku"], "use Decoding"),
        (["gdpo", "--model.beta=0.1"], "model.beta is now model.objective.beta"),
        (
            ["rtb", "--model.decoding.order=espo_lightning.low_confidence"],
            "order of this decoding depends on the policy",
        ),
        (["rtb", "--model.likelihood.draws=4"], "sampled or merged steps"),
        (["rtb", "--model.likelihood.merge=4"], "sampled or merged steps"),
        (["rtb", "--model.decoding.temperature=0"], "decoding.temperature is 0"),
        (["rtb", "--model.decoding.top_p=0.9"], "needs decoding.top_p=1, got 0.9"),
        (["rtb", "--model.micro_batch=3"], "micro_batch must be a multiple of group_size"),
        (["agrpo", "--model.decoding.top_p=0.9"], "needs decoding.top_p=1, got 0.9"),
        (["agrpo", "--model.decoding.temperature=0.9"], "likelihood.temperature is 0.6 and decoding.temperature 0.9"),
        (["justgrpo", "--model.likelihood.entropy=true"], "entropy draws steps"),
        (
            ["tracerl", "--model.decoding.block_length=4", "--model.decoding.prefix_cache=true"],
            "prefix_cache draws from",
        ),
        (["tracerl", "--model.decoding.corrector=3"], "decoding.corrector draws some of them again"),
        (["egspo", "--model.decoding.steps=4", "--model.updates=8"], "takes 1 steps in each of 8 updates"),
        (["sepo", "--model.likelihood.draws=17"], "likelihood.draws is 17, but decoding.length"),
        (["sepo", "--model.objective.ratio.clip=2"], "TruncatedRatio.clip must lie between 0 and 1"),
        (["trafl", "--model.likelihood.draws=1"], "square=k2_u needs independent mask draws"),
        (["rtb", "--model.policy.path=bundled:sudoku_causal"], "cannot denoise"),
        (["ebpo"], "needs a block-causal policy, but this one has full attention"),
        (["ebpo", "--model.policy.path=bundled:sudoku_causal"], "cannot denoise"),
        (["espo", "--model.policy.path=bundled:sudoku_block"], "decoding=Decoding is for policies whose canvas is one"),
    ],
)
def test_what_does_not_fit_is_one_message_and_nothing_written(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "--config", str(EXPERIMENTS / "methods" / f"{flags[0]}.yaml"), *flags[1:])
    assert list(tmp_path.iterdir()) == []


@EACH
def test_a_preset_is_the_same_after_other_files(name, tmp_path):
    """What files before it say of the same settings does not leak into it: the parser hands on arguments that another
    class has, too."""
    keys = ("objective", "likelihood")
    parser = ArgumentParser()
    parser.add_class_arguments(
        ESPOModule, "model", skip=set(signature(ESPOModule).parameters) - {*keys}, instantiate=False
    )
    parser.add_argument("--config", action="config")
    files = {}
    for path in (EXPERIMENTS / "methods" / f"{name}.yaml", EXPERIMENTS / "llada.yaml", EXPERIMENTS / "paper_demo.yaml"):
        settings = yaml.safe_load(path.read_text())["model"]
        files[path.stem] = tmp_path / path.name
        files[path.stem].write_text(yaml.safe_dump({"model": {k: v for k, v in settings.items() if k in keys}}))
    flags = [f"--config={files[stem]}" for stem in ("llada", "paper_demo", name)]
    after, alone = (parser.instantiate(parser.parse_args(x)).model for x in (flags, flags[-1:]))
    assert after == alone


def test_defaults_are_the_same_in_python_on_the_command_line_and_in_studies():
    import yaml

    from espo_lightning import ESPOModule, load_policy
    from espo_lightning.lab.studies.states import new_module

    policy = load_policy("bundled:sudoku")
    mine = ESPOModule(policy).configure_optimizers()[0][0].defaults
    study = new_module(policy, 0).configure_optimizers()[0][0].defaults
    assert mine == study
    assert (mine["lr"], mine["weight_decay"]) == (1e-4, 0.01)
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        program.main(["--print_config"])
    options = yaml.safe_load(shown.getvalue())["model"]["optimizer"]["init_args"]
    assert {key: mine[key] for key in ("lr", "weight_decay")} == {key: options[key] for key in ("lr", "weight_decay")}


def test_names_of_public_objects_hold():
    """What is imported above is used by files of users: names of `espo_lightning` do not go away."""
    assert MeanField() == MeanField(0.0, False)
    assert mean_centred(torch.tensor([[1.0, 0.0]])).tolist() == [[0.5, -0.5]]
