"""Every preset of experiments/methods in training: the same numbers however a rollout is split, and its promises."""

import warnings
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Letters, fit, parameters, small_module, small_policy
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from two_processes import METHODS

from espo_lightning import (
    ELBO,
    Balance,
    ESPOModule,
    MeanField,
    PolicyGradient,
    QuadratureELBO,
    RandomViews,
    Sandwich,
    SelfNormalised,
    TimeELBO,
    by_length,
    k1,
    k2_each,
    mean_centred,
    sequence_kl,
    token_kl,
    token_ratio,
)
from espo_lightning import fit as program

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SGD = {"optimizer": partial(torch.optim.SGD, lr=2.0)}
EACH = pytest.mark.parametrize("name", METHODS)


class Metrics(Callback):
    def __init__(self):
        self.rows, self.rollouts = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.rollouts.append(module.last_rollout)


def train(batches: int = 2, task=None, **settings) -> tuple[torch.Tensor, Metrics]:
    """Final parameters and metrics of some rollouts with four completions of padded prompts."""
    policy = settings.pop("policy", small_policy)()
    module, metrics = small_module(policy, **SGD | settings), Metrics()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the gradient is NaN or infinite")
        fit(module, batches, task=task, callbacks=[metrics])
    return parameters(module), metrics


@pytest.mark.slow
@EACH
@pytest.mark.parametrize(
    "change", [{"micro_batch": 4}, {"view_by_view": True}, {"micro_batch": 4, "view_by_view": True}], ids=str
)
def test_a_rollout_in_parts_gives_the_same_numbers(name, change):
    whole, metrics = train(**METHODS[name])
    parts, others = train(**METHODS[name], **change)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=2e-6)
    for a, b in zip(metrics.rows, others.rows):
        torch.testing.assert_close(a["train/loss"], b["train/loss"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a["train/grad_norm"], b["train/grad_norm"], rtol=1e-4, atol=1e-5)
    assert any(row["train/grad_norm"] > 0 for row in metrics.rows)


@EACH
def test_leaving_out_equal_groups_changes_nothing(name):
    settings = METHODS[name]
    kept, metrics = train(4, **settings, skip_equal_groups=False)
    skipped, others = train(4, **settings, skip_equal_groups=True)
    torch.testing.assert_close(kept, skipped, rtol=1e-4, atol=2e-6)
    assert max(row["train/zero_variance_groups"] for row in metrics.rows) > 0
    if settings["objective"].idle:
        assert any(len(r.completion) < len(r.decoded) for r in others.rollouts)


@EACH
def test_the_first_update_compares_the_policy_with_itself(name):
    settings = METHODS[name] | {"updates": 1}
    if getattr(settings["likelihood"], "rising", False):
        settings["updates"] = 2
    _, metrics = train(1, **settings)
    row = metrics.rows[0]
    if settings["objective"].old:
        assert row["train/log_ratio_max"] == row["train/clip_high"] == 0.0
    else:
        assert "train/log_ratio" not in row


def same_for_all(prompt: str, text: str) -> dict[str, float]:
    return {"reward": 0.1, "exact": 0.0}  # whose float32 mean over a group is not 0.1


@EACH
def test_equal_rewards_have_no_gradient_at_all(name):
    """But for a balance against a reference, whose residual they leave; and it has none before the first update."""
    settings = METHODS[name]
    if getattr(settings["objective"], "beta", 0):
        settings = settings | {"objective": replace(settings["objective"], beta=0.0)}
    _, metrics = train(2, task=Letters(same_for_all), **settings, skip_equal_groups=False)
    assert [row["train/grad_norm"] for row in metrics.rows] == [0.0, 0.0]
    assert all(not r.advantages.any() for r in metrics.rollouts)


@pytest.mark.parametrize("name", [n for n, s in METHODS.items() if isinstance(s["objective"], Balance)])
def test_equal_rewards_leave_a_balance_with_a_gradient(name):
    """A policy that has left its reference is drawn back by completions that all have the same reward."""
    settings, rows = METHODS[name], []
    assert not settings["objective"].idle
    for skip in (False, True):
        task = Letters(partial(first_only, seen=[]))  # rewards in the first rollout, none in the second
        _, metrics = train(2, task=task, **settings | {"updates": 2}, skip_equal_groups=skip)
        rows.append([row["train/grad_norm"] for row in metrics.rows])
        assert metrics.rows[1]["train/zero_variance_groups"] == 1.0
        assert len(metrics.rollouts[1].completion) == len(metrics.rollouts[1].decoded)
    torch.testing.assert_close(*rows)
    assert rows[0][1] > 0 or (settings["objective"].to_old and not settings["objective"].beta)


OTHERS = {  # another value of every argument of every objective and law that a preset has
    "ratio": token_ratio,
    "clip_range": 1e-3,
    "clip_nats": 1e-3,
    "kl": k1,
    "beta": 0.01 / 3,
    "count": by_length,
    "score": Sandwich(0.5, 0.9),
    "cap": 0.1,
    "prompt_noise": 0.6,
    "to_end": False,
    "low": 0.45,
    "high": 0.55,
    "draws": 3,
    "nodes": 2,
    "block": 4,
    "noise": 0.6,
}
TRACED = {  # of those that only methods on traces, and balances, have; the rest are tested above
    "temperature": 0.03,
    "centre": False,
    "square": k2_each,
    "clip_high": 1e-3,
    "kl_at": sequence_kl,
    "merge": 2,
    "entropy": False,
    "weighted": True,
    "draws": 3,
}
PENALISED = PolicyGradient(beta=0.5)
NEW = ("rtb", "sepo", "justgrpo", "tracerl", "agrpo", "egspo", "gdsd", "rspo", "trafl")
ARGUMENTS = [
    (name, where, field.name)
    for name, settings in METHODS.items()
    for where in ("objective", "likelihood")
    for field in fields(settings[where])
    if name not in NEW and field.name in OTHERS and OTHERS[field.name] != getattr(settings[where], field.name)
    if (name, field.name) != ("ebpo", "block")  # the policy's
]
NEW_ARGUMENTS = [
    (name, where, field.name)
    for name in NEW
    for where in ("objective", "likelihood")
    for field in fields(METHODS[name][where])
    if field.name in TRACED and TRACED[field.name] != getattr(METHODS[name][where], field.name)
    if not (METHODS[name]["likelihood"].exact and field.name in ("square", "merge", "draws"))  # refused, or another law
    if (where, field.name) != ("likelihood", "temperature")  # the decoder's
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "argument"), ARGUMENTS)
def test_every_argument_has_an_effect(name, where, argument):
    settings = METHODS[name]
    if argument in ("kl", "count", "kl_at") and settings["objective"].idle and name == "gdpo" and argument != "count":
        settings = settings | {"objective": replace(settings["objective"], beta=0.02)}
    changed = settings | {where: replace(settings[where], **{argument: OTHERS[argument]})}
    same = {"micro_batch": None, "max_grad_norm": None, "optimizer": partial(torch.optim.SGD, lr=1.0)}
    assert not torch.equal(train(3, **settings | same)[0], train(3, **changed | same)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "argument"), NEW_ARGUMENTS)
def test_every_argument_of_the_methods_on_traces_has_an_effect(name, where, argument):
    settings, same = METHODS[name], {"max_grad_norm": None, "optimizer": partial(torch.optim.SGD, lr=1.0)}
    settings = settings | {"updates": 1 if argument == "draws" else max(2, settings["updates"])}
    if argument == "kl_at":
        settings = settings | {"objective": replace(settings["objective"], beta=0.02)}
    changed = settings | {where: replace(settings[where], **{argument: TRACED[argument]})}
    assert not torch.equal(train(2, **settings | same)[0], train(2, **changed | same)[0])


def test_where_the_penalty_is_applied_and_to_what_has_an_effect():
    base = {"objective": PENALISED, "updates": 3}
    for change in ({"kl_at": token_kl}, {"to_old": True}):
        assert not torch.equal(train(**base)[0], train(**base | {"objective": replace(PENALISED, **change)})[0])
    rising = {"likelihood": RandomViews(1, rising=True), "updates": 2}
    assert not torch.equal(train(**rising)[0], train(**rising | {"likelihood": RandomViews(1)})[0])


def test_to_old_needs_no_reference():
    module = small_module(objective=PolicyGradient(beta=0.1, to_old=True))
    assert module.reference is None
    assert not module.objective.idle


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


def first_only(prompt: str, text: str, seen: list) -> dict[str, float]:
    seen.append(text)
    return {"reward": float(len(seen) % 2) if len(seen) <= 8 else 0.0, "exact": 0.0}


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
