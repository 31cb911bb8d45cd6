"""Both settings of the switch on a whole model: logits, loss, gradients and greedy tokens.

Runs the model with `use_flash=True` and with `use_flash=False` on the same ids, dropout off and on,
and judges both against the same model in float64, by the factors of `flashgpt.attention.verify`.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flashgpt.attention import verify
from flashgpt.attention.heads import MultiHeadAttention
from flashgpt.attention.kernels import KERNELS
from flashgpt.attention.verify import Error, Verdict, judge
from flashgpt.config import GPTConfig, SampleConfig
from flashgpt.generation.decode import decode
from flashgpt.model.block import TransformerBlock
from flashgpt.model.gpt2 import GPTModel

SEEDS = 9
AUDIT_DROPOUT = 0.1
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Audit:
    """Everything that was measured, and the verdict."""

    rows: list[Verdict]
    masks: dict[str, bool]
    causal: dict[str, bool]
    greedy_equal: bool

    @property
    def passed(self) -> bool:
        """Every row within the rule, every mask equal, every kernel causal, greedy tokens equal."""
        checks = [*self.masks.values(), *self.causal.values(), self.greedy_equal]
        return all(row.passed for row in self.rows) and all(checks)


def run(
    model: GPTModel,
    device: torch.device,
    note: Callable[[str], None] = lambda _: None,
    cases: list[verify.Case] | None = None,
) -> Audit:
    """Audits the kernels on `cases` (the quick grid when left out) and `model` as a whole.

    `note` hears what is being measured.
    """
    if cases is None:
        dtypes = CUDA_DTYPES if device.type == "cuda" else (torch.float32,)
        cases = [case for dtype in dtypes for case in verify.quick_cases(dtype)]
    rows: list[Verdict] = []
    for case in cases:
        note(f"kernels: {case}")
        rows += verify.audit([case], device)
    masks: dict[str, bool] = {}
    causal: dict[str, bool] = {}
    note("dropout masks and causality")
    for case in (verify.Case(2, 3, 65, 65, 16, 0.1), verify.Case(1, 2, 33, 70, 16, 0.1)):
        for kernel, equal in verify.masks_equal(case, device).items():
            masks[kernel] = masks.get(kernel, True) and equal
    case = verify.Case(1, 2, 130, 130, 16)
    for kernel, entry in KERNELS.items():
        if entry.supports(case.request(device)) is None:
            causal[kernel] = verify.is_causal(kernel, case, device)
    for p in (0.0, AUDIT_DROPOUT):
        note(f"whole model, dropout {p:g}")
        rows += audit_model(model, p, device)
    note("greedy tokens")
    return Audit(rows, masks, causal, greedy_equal(model, device))


def audit_model(model: GPTModel, p: float, device: torch.device) -> Iterator[Verdict]:
    """Judges logits, loss and gradients of the flash path against those of the standard path.

    Every seed is judged by itself, and the median seed counts. A model amplifies rounding, on some
    inputs by several hundred times and on either path alike; there it is chance which path errs
    more, while a defect shows on every input.
    """
    paths = {True: _copy(model, p, device), False: _copy(model, p, device)}
    for use_flash, path in paths.items():
        path.set_attention(use_flash=use_flash)
    oracle = copy.deepcopy(paths[False]).double()
    case = f"model, {model.cfg.n_layers} layers, dropout {p:g} float32"
    judged: dict[str, list[Verdict]] = {name: [] for name in ("logits", "loss", "gradients")}
    for seed in range(SEEDS):
        ids_BT = _ids(model.cfg, seed, device)
        exact = _measure(oracle, ids_BT, seed)
        found = {use_flash: _measure(path, ids_BT, seed) for use_flash, path in paths.items()}
        for i, (name, verdicts) in enumerate(judged.items()):
            errors = {use_flash: Error() for use_flash in paths}
            for use_flash, error in errors.items():
                error.add(found[use_flash][i], exact[i], terms=exact[i])
            verdicts.append(judge("use_flash=True", case, name, errors[True], errors[False]))
    for verdicts in judged.values():
        yield dataclasses.replace(
            sorted(verdicts, key=lambda verdict: verdict.max_error)[SEEDS // 2],
            max_used=statistics.median(verdict.max_used for verdict in verdicts),
            rms_used=statistics.median(verdict.rms_used for verdict in verdicts),
        )


def greedy_equal(model: GPTModel, device: torch.device, tokens: int = 48) -> bool:
    """Whether greedy tokens in fp32 are equal, switch on and off, with and without the cache."""
    prompt = _ids(model.cfg, 0, device)[0, :8].tolist()
    greedy = SampleConfig(temperature=0, max_new_tokens=tokens)
    chosen = set()
    for use_flash in (True, False):
        path = _copy(model, 0.0, device)
        path.set_attention(use_flash=use_flash)
        for use_cache in (True, False):
            found = decode(
                path, prompt, greedy, vocab_size=model.cfg.vocab_size, use_cache=use_cache
            )
            chosen.add(tuple(found))
    return len(chosen) == 1


def _copy(model: GPTModel, p: float, device: torch.device) -> GPTModel:
    """The same weights in fp32, in training mode, with dropout `p`."""
    clone = copy.deepcopy(model).to(device=device, dtype=torch.float32).train()
    clone.cfg = GPTConfig.from_dict({**model.cfg.to_dict(), "drop_rate": p})
    for module in clone.modules():
        if isinstance(module, MultiHeadAttention):
            module.dropout = p
        if isinstance(module, TransformerBlock):
            module.drop_rate = p
    return clone


def _ids(cfg: GPTConfig, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = min(cfg.context_length, 160) - 1
    return torch.randint(cfg.vocab_size, (2, max(length, 1)), generator=generator).to(device)


def _measure(model: GPTModel, ids_BT: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, loss and all gradients in one vector, of one training-mode pass."""
    model.set_dropout(seed=seed)
    model.zero_grad()
    logits_BTV = model(ids_BT)
    loss = model(ids_BT, ids_BT.roll(-1, dims=1))
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits_BTV, loss, torch.cat(grads)
