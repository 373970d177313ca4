"""Costs: counted passes, FLOPs, bytes and memory against the formulas."""

from dataclasses import replace

import pytest
import torch
from checkpoints import write
from conftest import fit
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from two_processes import METHODS

from espo_lightning import (
    ELBO,
    Decoding,
    ESPOModule,
    LoRA,
    MeanField,
    PolicyGradient,
    Prompts,
    dream_schedule,
    load_policy,
    score,
)
from espo_lightning import cost as calculator
from espo_lightning.cost import cost
from espo_lightning.lab import flops as counting
from espo_lightning.lab.costs import Hardware, activation_bytes, collectives, memory
from espo_lightning.lab.flops import decoding_passes, flops, scoring_passes, work
from espo_lightning.lab.network import DREAM_7B, LLADA_8B, SDAR_8B, read_network
from espo_lightning.lab.studies.compute import ATTENTION, Measured

pytestmark = pytest.mark.usefixtures("global_generators_untouched")
RANK = 4
DECODING = Decoding(length=16, block_length=8, steps=8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    found = {kind: write(root / kind, kind) for kind in ("llada", "dream")}
    return found | {(kind, n): write(root / f"{kind}{n}", kind, layers=n) for kind in found for n in (3, 4)}


SMALL_LORA = LoRA(rank=RANK, alpha=8)
CASES = {
    "plain": {},
    "Dream's schedule": {"decoding": Decoding(16, 16, 8, schedule=dream_schedule)},
    "more draws and updates": {"likelihood": ELBO(draws=2), "updates": 3},
    "not coupled": {"likelihood": ELBO(coupled=False)},
    "mean field": {"likelihood": MeanField()},
    "no reference": {"objective": PolicyGradient(beta=0.0)},
    "one block": {"decoding": Decoding(length=16, block_length=16, steps=4)},
    "masks once": {"fresh_masks": False, "updates": 3},
    "micro-batches": {"micro_batch": 3},
    "view by view": {"view_by_view": True, "micro_batch": 3, "likelihood": ELBO(draws=2)},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora": SMALL_LORA},
    "LoRA, masks once": {"lora": SMALL_LORA, "fresh_masks": False, "objective": PolicyGradient(beta=0.0)},
    "LoRA, view by view": {"lora": SMALL_LORA, "view_by_view": True},
    "LoRA, checkpointing": {"lora": SMALL_LORA, "gradient_checkpointing": True, "micro_batch": 5},
    "GQA": {"kind": "dream"},
    "GQA, LoRA": {"kind": "dream", "lora": SMALL_LORA},
    "GQA, LoRA, checkpointing": {"kind": "dream", "lora": SMALL_LORA, "gradient_checkpointing": True},
    **{
        f"method {name}": {k: v for k, v in settings.items() if k != "policy"}
        for name, settings in METHODS.items()
        if name != "ebpo"  # of blocks, which test_blocks_cost.py counts
    },
    "head in chunks": {"head_bytes": 4 * 64 * 20, "micro_batch": 4},
    "head in chunks, LoRA": {"head_bytes": 4 * 64 * 20, "micro_batch": 4, "lora": SMALL_LORA},
}


@pytest.mark.parametrize("name", CASES)
def test_flops_and_calls_are_those_of_a_real_step(checkpoints, monkeypatch, tmp_path, name):
    """Every phase, exactly: not an estimate within some per cent."""
    case = dict(CASES[name])
    if head_bytes := case.pop("head_bytes", None):
        monkeypatch.setattr("espo_lightning.policies.prefix.HEAD_BYTES", head_bytes)
        monkeypatch.setattr(counting, "HEAD_BYTES", head_bytes)
    kind, lora, checkpointing = (
        case.pop("kind", "llada"),
        case.pop("lora", None),
        case.pop("gradient_checkpointing", False),
    )
    folder = checkpoints[kind]
    policy = load_policy(folder, lora=lora, gradient_checkpointing=checkpointing)
    module = Measured(policy, **{"decoding": DECODING, "group_size": 4, "skip_equal_groups": False} | case)
    fit(module, batches=1, folder=tmp_path)
    assert ATTENTION.keys() & module.kernels  # the counter has seen attention

    rollout, network, rank = module.last_rollout, read_network(str(folder)), RANK if lora else 0
    completions, width = len(rollout.completion), rollout.prompts.ids.shape[1] + module.decoding.length
    expected = work(
        decoding_passes(module.decoding, completions, width),
        rollout.masks,
        updates=module.updates,
        objective=module.objective,
        micro_batch=module.micro_batch or completions,
        view_by_view=module.view_by_view,
    )
    spent = flops(network, expected, rank, checkpointing)
    assert {phase: n for phase, n in spent.items() if n} == module.flops
    calls = {"rollout": expected.rollout, "old scores": expected.old, "updates": expected.terms + expected.updates}
    if rank:  # a frozen copy is another network
        calls["reference"] = expected.reference
    assert {phase: p.calls for phase, p in calls.items() if p.calls} == module.calls


def test_the_expected_step_is_close_to_every_real_one(checkpoints, tmp_path):
    """The command line averages over masks; one rollout has its own."""
    module = Measured(load_policy(checkpoints["llada"]), decoding=DECODING, likelihood=ELBO(draws=2), group_size=8)
    fit(module, batches=1, folder=tmp_path)
    settings = {"decoding": DECODING, "likelihood": ELBO(draws=2), "group_size": 8, "updates": 2, "micro_batch": 16}
    width = module.last_rollout.prompts.ids.shape[1]
    result = cost(str(checkpoints["llada"]), prompt_length=width, lora_rank=None, gpus=(1,), **settings)
    (total,) = result["table"]["PFLOP per GPU"]["total"]
    assert total * 1e15 == pytest.approx(sum(module.flops.values()), rel=0.02)


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "config", "billions"),
    [(LLADA_8B, LlamaConfig, 8.016), (DREAM_7B, Qwen2Config, 7.616), (SDAR_8B, Qwen3Config, 8.191)],
)
def test_parameters_are_those_of_transformers(network, config, billions):
    ours = ("qkv_bias", "tied", "qk_norm", "shift")
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    shape = {names.get(key, key): value for key, value in vars(network).items() if key not in ours}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**shape, tie_word_embeddings=False))
    assert sum(p.numel() for p in model.parameters()) == network.parameters
    assert network.parameters / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("kind", ["llada", "dream", "bundled:sudoku"])
def test_a_network_is_read_from_its_config(checkpoints, kind):
    path = str(checkpoints.get(kind, kind))
    policy = load_policy(path, lora=LoRA(rank=RANK))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    network = read_network(path)
    assert trained == network.adapters(RANK)
    assert sum(p.numel() for p in policy.parameters()) - trained == network.parameters


def test_an_unknown_policy_is_named_and_nothing_is_downloaded(capsys):
    with pytest.raises(SystemExit) as stop:
        calculator.main(["--policy=somebody/model"])
    assert stop.value.code == 2
    assert "'somebody/model'" in capsys.readouterr().err


# ---- memory and collectives -----------------------------------------------------------------------------------------


def kept_bytes(policy, prompts, completion, masks) -> int:
    """What a forward pass under bf16-mixed keeps for its backward pass, weights and their bfloat16 copies excluded."""
    shapes = {p.shape for p in policy.parameters() if p.ndim > 1}
    shapes |= {shape[::-1] for shape in shapes}
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters and tensor.shape not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # alive, so that no address recurs
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        score(policy, prompts, completion, masks)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_a_layer_keeps_the_bytes_that_the_formula_says(checkpoints, kind, rank, checkpointing):
    """Exactly, as the difference between networks of 3 and 4 layers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (6, 24), generator=generator)
    prompts, completion, masks = Prompts(ids[:, :11], None), ids[:, 11:], ELBO().draw(torch.arange(6), 13)
    measured, formula = [], []
    for layers in (3, 4):
        folder = checkpoints[kind, layers]
        dtype, lora = ("bfloat16", LoRA(rank=rank)) if rank else ("float32", None)
        policy = load_policy(folder, dtype=dtype, lora=lora, gradient_checkpointing=checkpointing)
        measured.append(kept_bytes(policy, prompts, completion, masks))
        passes = scoring_passes(masks, ids.shape[1], len(ids))
        formula.append(activation_bytes(read_network(str(folder)), passes, rank, checkpointing))
    assert measured[1] - measured[0] == formula[1] - formula[0]


def test_memory_counts_weights_gradients_moments_and_reference(checkpoints, tmp_path):
    """Of a real module after a step, on one GPU: nothing is sharded."""
    for lora in (None, SMALL_LORA):
        policy = load_policy(checkpoints["llada"], lora=lora)
        module = ESPOModule(policy, decoding=DECODING, group_size=4)
        fit(module, batches=1, folder=tmp_path)
        rank, trained = RANK if lora else 0, [p for p in policy.parameters() if p.requires_grad]
        moments = [t for state in module.optimizers().state.values() for t in state.values() if t.ndim]
        reference = [] if lora else list(module.reference.parameters())
        tensors = {"weights": policy.parameters(), "gradients": trained, "optimizer": moments, "reference": reference}
        width = module.last_rollout.prompts.ids.shape[1] + 16
        passes = decoding_passes(DECODING, 8, width)
        options = {"updates": 2, "objective": PolicyGradient(), "micro_batch": 8, "view_by_view": False}
        w = work(passes, module.last_rollout.masks, **options)
        network = read_network(str(checkpoints["llada"]))
        held = memory(network, w, stored=4, shards=1, rank=rank, checkpointing=False, gather_rollouts=False)
        for name, parts in tensors.items():
            assert held[name] == sum(t.nbytes for t in parts), name


def received(gpus, shards, *, rank=0, gather_rollouts=False, **changes):
    masks = [ELBO().draw(torch.arange(8), 16)] * 2
    options = {"updates": 2, "objective": PolicyGradient(), "micro_batch": 2, "view_by_view": False} | changes
    w = work(decoding_passes(DECODING, 8, 20), masks, **options)
    network = replace(LLADA_8B, layers=2)
    size, _ = collectives(
        network, w, Hardware(), gpus=gpus, shards=shards, updates=2, rank=rank, gather_rollouts=gather_rollouts
    )
    return {phase: n / network.parameters for phase, n in size.items()}


def test_collectives_by_hand():
    """In bytes per parameter: weights are 2 wide, gradients 4; two GPUs exchange one half of everything.

    Eight decoding steps; 4 micro-batches for the one old pass, 8 for the reference, 8 forward and backward in updates.
    Embedding and head are gathered once in the rollout, for each pass of the reference, and for 7 of the updates.
    """
    network = replace(LLADA_8B, layers=2)
    layers = 2 * network.layer_parameters / network.parameters
    rest = 1 - layers
    ddp = received(2, 1)
    assert ddp == {"rollout": 0, "old scores": 0, "reference": 0, "updates": 2 * 4}  # an all-reduce per update
    fsdp = {"rollout": 8 * layers + rest, "old scores": 4 * layers, "reference": 8}
    fsdp["updates"] = 8 * 2 * layers + 7 * rest + 8 * 2
    assert received(2, 2) == pytest.approx(fsdp)
    assert received(2, 2, gather_rollouts=True) == pytest.approx(fsdp | {"rollout": 1})
    hybrid = received(4, 2)  # replicas of a half exchange it once more
    assert hybrid == pytest.approx(fsdp | {"updates": fsdp["updates"] + 8 * 2})
    views = (8 + 16 * 2) * layers + 15 * rest + 16 * 2
    assert received(2, 2, view_by_view=True)["updates"] == pytest.approx(views)
    share = network.adapters(8) / network.parameters
    assert received(2, 1, rank=8)["updates"] == 2 * 4 * share
    # adapters are gathered in every pass, and reduced once per update
    sharded = 8 * 2 * (layers + share) + 7 * rest + 2 * 2 * share
    assert received(2, 2, rank=8)["updates"] == pytest.approx(sharded)


def test_speeds_inside_a_node_and_between_nodes():
    machine = Hardware(nvlink=450, network=50, node=8)
    assert [machine.gather_speed(n) for n in (2, 8, 64)] == [450, 450, 400]  # eight ports bring what eight GPUs share
    assert machine.replica_speed(1, 8) == 450
    assert machine.replica_speed(8, 64) == 50  # every GPU has another shard
    assert machine.replica_speed(1, 64) == 400
