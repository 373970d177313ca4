"""A diffusion policy for lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    import lm_eval
    model = DiffusionLM(load_policy("FOLDER"), protocol("llada-reasoning-256"))
    lm_eval.simple_evaluate(model, tasks=["gsm8k"], apply_chat_template=True)

Needs the extra ``lm-eval``. As in LLaDA's published evaluations (arXiv:2502.09992), a likelihood is a Monte-Carlo
estimate of the ELBO in nats, and text is decoded by the diffusion sampler and cut at the stop strings.
"""

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor

from espo_lightning.decoding.masked import Decoding, generate
from espo_lightning.keys import fold_in
from espo_lightning.policies.policy import Policy, Prompts
from espo_lightning.ranges import check_counts
from espo_lightning.scoring.likelihood import ELBO, Likelihood
from espo_lightning.scoring.masks import Masks
from espo_lightning.scoring.score import score


class DiffusionLM(LM):
    """The harness's view of a policy.

    Args:
        policy: see `load_policy`.
        decoding: of generated text. It decides length and temperature; a request's own ``max_gen_toks``,
            ``temperature`` and the like are ignored.
        likelihood: of continuations; 64 coupled draws are 128 forward passes, LLaDA's number.
        batch_size: texts decoded, or mask draws scored, at once.
        check_greedy: also find out whether greedy decoding gives the continuation, one forward pass per token. The
            metrics "acc" and "acc_norm" do not ask for it; without it, the answer is always no.
        seed: of masks and decoding noise, keyed by the number of the request.

    Raises:
        ValueError: a causal policy, which has no mask token; a number out of range.
    """

    def __init__(
        self,
        policy: Policy,
        decoding: Decoding,
        likelihood: Likelihood = ELBO(draws=64, stratified=True),
        batch_size: int = 16,
        check_greedy: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if policy.mask_id is None:
            raise ValueError("the policy is a causal model without a mask token: use the harness's own model type hf")
        check_counts(1, batch_size=batch_size)
        check_counts(0, seed=seed)
        decoding.check(policy)
        self.policy, self.decoding, self.likelihood = policy.eval(), decoding, likelihood
        self.batch_size, self.check_greedy, self.seed = batch_size, check_greedy, seed

    @property
    def tokenizer_name(self) -> str:
        """Names cached requests of the harness."""
        return str(self.policy.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.policy.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ELBO in nats, greedy?) of each (context, continuation)."""
        return [self._score(index, *request.args) for index, request in enumerate(requests)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Raises NotImplementedError: the ELBO of a long text depends on how it is cut, and no publication says how."""
        raise NotImplementedError("perplexity of running text is not defined for a masked diffusion policy here")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions, each up to its first end-of-text token or stop string ``until``."""
        texts = []
        for first in range(0, len(requests), self.batch_size):
            batch = requests[first : first + self.batch_size]
            keys = fold_in(self.seed, torch.arange(first, first + len(batch))).to(self.policy.device)
            prompts = self._padded([self._tokens(request.args[0]) for request in batch])
            completions = self.policy.decode(generate(self.policy, prompts, keys, self.decoding))
            texts += [cut(text, request.args[1].get("until")) for text, request in zip(completions, batch)]
        return texts

    def _tokens(self, text: str) -> list[int]:
        """Of a text that is templated already. An empty one becomes one token, as something must precede a canvas."""
        tokenizer = self.policy.tokenizer
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return tokenizer(text, add_special_tokens=False)["input_ids"] or [start]

    def _padded(self, rows: list[list[int]]) -> Prompts:
        width, pad = max(map(len, rows)), self.policy.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.policy.device)
        mask = torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])
        return Prompts(ids, None if mask.all() else mask.to(ids.device))

    @torch.no_grad()
    def _score(self, index: int, context: str, continuation: str) -> tuple[float, bool]:
        # blanks at the end of the context belong to the first word of the continuation
        stem = context.rstrip()
        before = self._tokens(stem)
        after = self._tokens(context + continuation)[len(before) if stem else 0 :]
        completion = torch.tensor([after], device=self.policy.device)
        prompts, length = self._padded([before]), len(after)
        key = fold_in(self.seed, torch.tensor([index], device=completion.device))
        masks = self.likelihood.draw(key, length)
        draws = len(masks.weight)
        total = sum(
            float(score(self.policy, prompts, completion, part).sum()) for part in in_parts(masks, self.batch_size)
        )
        return total / draws, self.check_greedy and self._is_greedy(prompts, completion)

    def _is_greedy(self, prompts: Prompts, completion: Tensor) -> bool:
        length = completion.shape[1]
        decoding = Decoding(length=length, block_length=length, steps=length, temperature=0.0)
        keys = torch.zeros(1, dtype=torch.int64, device=completion.device)
        return torch.equal(generate(self.policy, prompts, keys, decoding), completion)


def in_parts(masks: Masks, size: int) -> list[Masks]:
    """Masks of at most ``size`` draws each."""
    pairs = zip(masks.hidden.split(size), masks.weight.split(size))
    return [masks._replace(hidden=hidden, weight=weight) for hidden, weight in pairs]


def cut(text: str, until: str | list[str] | None) -> str:
    """The text before the first stop string."""
    stops = [until] if isinstance(until, str) else until or []
    return text[: min([place for stop in stops if stop and (place := text.find(stop)) >= 0], default=len(text))]
