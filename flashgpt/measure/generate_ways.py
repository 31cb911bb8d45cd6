"""Who writes in `bench generate`: our model, and Hugging Face's GPT-2 with the same weights.

Each is a function (prompts, count) -> the greedy tokens that follow, exactly so many for each.

Legend: B rows, P tokens of a prompt, C new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.generation.decode import decode_rows
from flashgpt.generation.rows import Row
from flashgpt.measure import peer
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig

OURS, DYNAMIC, STATIC = "ours", "dynamic", "static"
WAYS = {
    OURS: "flashgpt",
    DYNAMIC: "Hugging Face, dynamic",
    STATIC: "Hugging Face, static, compiled",
}
SEED = 20240326
# With GPT-2's initialisation a model repeats one token, and a wrong one would do so too. Matrices
# that widen what they get by this, at any width, make texts that go on changing.
GAIN = 2.0

Write = Callable[[Tensor, int], Tensor]


def model(cfg: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPTModel:
    """Ours, with weights of a fixed seed, in eval mode."""
    torch.manual_seed(SEED)
    made = GPTModel(cfg)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith("h.") and parameter.dim() == 2:
                parameter.normal_(std=GAIN / math.sqrt(cfg.emb_dim))
    return made.to(device, dtype).eval()


def ours(own: GPTModel) -> Write:
    """Decodes as `flashgpt generate` does, past the tokenizer."""

    def write(prompt_BP: Tensor, count: int) -> Tensor:
        config = SampleConfig(temperature=0, max_new_tokens=count)
        texts = [Row(prompt, count) for prompt in prompt_BP.tolist()]
        for _ in decode_rows(own, texts, config, vocab_size=own.cfg.vocab_size):
            pass
        return torch.tensor([text.ids for text in texts])

    return write


def hugging_face(own: GPTModel) -> dict[str, Write]:
    """Its two ways by name; they share one model, which has our weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    theirs: Any = peer.with_weights_of(own)
    theirs.generation_config.eos_token_id = None  # a text goes on to its last token
    compiled: Any = transformers.CompileConfig()
    compiled._compile_all_devices = True  # else a CPU is left out

    def writer(**how: Any) -> Write:
        def write(prompt_BP: Tensor, count: int) -> Tensor:
            whole_BT: Tensor = theirs.generate(
                prompt_BP,
                attention_mask=torch.ones_like(prompt_BP),
                max_new_tokens=count,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **how,
            )
            return whole_BT[:, prompt_BP.shape[1] :].cpu()

        return write

    static = writer(cache_implementation="static", compile_config=compiled)
    return {DYNAMIC: writer(), STATIC: static}
