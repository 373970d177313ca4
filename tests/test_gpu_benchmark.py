"""benchmarks/gpu.py is a program that runs: on the CPU, with a tiny network, it does all that it does on a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from gpu_device import SIZES, Enough, Size, Stopwatch

from espo_lightning.lab.network import LLADA_8B, read_network
from espo_lightning.policies.prefix import HEAD_BYTES

ROOT = Path(__file__).parents[1]
ROLLOUT = {"measured_steps", "measured_seconds", "tflops", "share_of_measured_peak", "peak_GB", "model_GB"}
UPDATE = {"update_seconds", "updated_tokens_per_s", "score_seconds", "share_of_measured_peak", "peak_GB", "model_GB"}


def run(folder: Path, *flags: str) -> tuple[int, dict]:
    output = folder / "gpu.json"
    code = gpu.main(["--size=tiny", "--device=cpu", f"--output={output}", *flags])
    return code, json.loads(output.read_text())


def test_rows_are_measured_and_say_what_was(tmp_path):
    code, result = run(tmp_path, "--rows=4")
    assert code == 0
    assert result["torch"] == torch.__version__
    assert result["measured_peak_tflops"] > 0
    full, update, blocks, prefix = result["rows"]
    assert ROLLOUT | {"tokens_per_s_extrapolated"} <= full.keys()
    assert update.keys() >= UPDATE
    assert ROLLOUT | {"tokens_per_s"} <= blocks.keys()  # all of it was run
    assert full["measured_steps"] == prefix["measured_steps"] == 2  # those of one block of four
    assert blocks["measured_steps"] == 12  # eight steps, and one pass for the keys of the prompt and of finished blocks
    assert full["tokens_per_s_extrapolated"] == pytest.approx(4 * 16 / (full["measured_seconds"] / 2 * 8))


def test_no_row_begins_when_time_is_over(tmp_path):
    code, result = run(tmp_path, "--seconds=0")
    assert code == 0
    assert len(result["rows"]) == len(gpu.rows_of(SIZES["tiny"]))
    assert {row["error"] for row in result["rows"]} == {"no time left"}


def test_out_of_memory_ends_a_row_and_a_fault_the_program(tmp_path, monkeypatch):
    def full(bench):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(bench):
        raise RuntimeError("a fault")

    monkeypatch.setattr(gpu, "rows_of", lambda size: [("a", full, {}), ("b", full, {})])
    assert run(tmp_path)[0] == 0
    monkeypatch.setattr(gpu, "rows_of", lambda size: [("a", full, {}), ("b", broken, {}), ("c", full, {})])
    code, result = run(tmp_path)
    assert code == 1
    assert [row["error"] for row in result["rows"]] == ["out of memory", "RuntimeError: a fault", "out of memory"]


def test_the_eight_billion_are_those_of_llada_and_the_authors_settings():
    size = SIZES["8B"]
    shape = (size.hidden, size.layers, size.heads, size.mlp, size.vocabulary)
    assert shape == (
        LLADA_8B.hidden_size,
        LLADA_8B.layers,
        LLADA_8B.heads,
        LLADA_8B.intermediate_size,
        LLADA_8B.vocab_size,
    )
    assert (size.rank, size.prompt, size.length, size.block, size.group, size.draws) == (128, 400, 256, 32, 6, 2)
    steps = {settings.get("steps") for _, _, settings in gpu.rows_of(size)}
    assert {128, 256} <= steps


def test_the_cost_model_counts_the_network_that_is_made(tmp_path):
    policy = gpu.make_policy(SIZES["tiny"], torch.device("cpu"))
    policy.config.save_pretrained(tmp_path)
    network, size = read_network(str(tmp_path)), SIZES["tiny"]
    base = sum(p.numel() for name, p in policy.named_parameters() if ".lora_" not in name)
    adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert (network.parameters, network.adapters(size.rank)) == (base, adapters)
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_chunks_of_the_head_are_those_that_the_page_says():
    page = (ROOT / "docs" / "scaling.md").read_text()
    rows = HEAD_BYTES // (4 * LLADA_8B.vocab_size)
    positions = SIZES["8B"].draws * SIZES["8B"].length  # of a micro-batch of one completion
    head = 2 * LLADA_8B.vocab_size * LLADA_8B.hidden_size / 1e9
    assert f"64 MiB of logits are {rows} positions of LLaDA's vocabulary" in page
    assert f"the head's {head:.2f} GB are read: {-(-positions // rows)} times for the {positions} positions" in page
    assert f"adapters of rank 128 are {4 * LLADA_8B.adapters(128) / 1e9:.2f} GB" in page


def test_a_stopwatch_counts_passes_and_stops_in_time():
    policy = gpu.make_policy(Size(16, 1, 1, 16, 80, 1), torch.device("cpu"))
    policy.forward = lambda: None
    for deadline, measured in ((time.monotonic() + 1e6, 3), (0.0, 1)):
        watch = Stopwatch(policy, skipped=2, passes=3, deadline=deadline)
        with pytest.raises(Enough):
            [policy() for _ in range(10)]
        watch.hook.remove()
        assert watch.measured == measured


@pytest.mark.slow  # starts processes
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="Apple's GPU cannot be hidden")
def test_without_a_gpu_make_gpu_is_one_sentence():
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    bin_of = f"BIN={Path(sys.executable).parent}"
    done = subprocess.run(["make", "-o", "env", "gpu", bin_of], cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("make[", "make:"))]
    assert len(lines) == 1, lines
    assert "no GPU" in lines[0]
