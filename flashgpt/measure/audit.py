"""Both settings of the switch on a whole model: logits, loss, gradients and greedy tokens.

Runs the model with `use_flash=True` and with `use_flash=False` on the same ids, dropout off and on,
and judges both against the same model in float64, by the factors of `flashgpt.attention.verify`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from flashgpt.attention import properties, standard, verify
from flashgpt.attention.heads import MultiHeadAttention
from flashgpt.attention.kernels import KERNELS, refusal
from flashgpt.attention.verify import Error, Verdict, judge
from flashgpt.config import GPTConfig
from flashgpt.generation.cache import KVCache
from flashgpt.generation.decode import decode
from flashgpt.measure.memory import peak_bytes
from flashgpt.model.block import TransformerBlock
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig

SEEDS = 9
DECODED = 32  # tokens
AUDIT_DROPOUT = 0.1
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REPEATS, FULL_REPEATS = 3, 100
GROWTH = 3.0  # of memory when T doubles: linear is 2, quadratic 4
GROWTH_LENGTH = {"cpu": 1024, "cuda": 4096}  # past what blocked attention has in flight at once

MASKS = "dropout masks equal the definition bit for bit"
CAUSAL = "no output depends on a later token"
REPEATED = "results repeat bit for bit"
LINEAR = f"memory grows less than {GROWTH:g}x when T doubles"
GREEDY = "greedy tokens equal, switch on and off, cache on and off"


@dataclasses.dataclass
class Audit:
    """Everything that was measured, and the verdict.

    Attributes:
        rows: errors, judged by the rule.
        checks: what was checked -> kernel, or "model" -> whether it holds.
    """

    rows: list[Verdict]
    checks: dict[str, dict[str, bool]]

    @property
    def passed(self) -> bool:
        """Every row within the rule, or a known excess, and every check held."""
        held = (ok for results in self.checks.values() for ok in results.values())
        return all(row.passed or row.known for row in self.rows) and all(held)


def run(
    model: GPTModel,
    device: torch.device,
    note: Callable[[str], None] = lambda _: None,
    cases: list[verify.Case] | None = None,
    full: bool = False,
    dtypes: tuple[torch.dtype, ...] = (),
) -> Audit:
    """Audits the kernels on `cases` and `model` as a whole.

    Args:
        note: hears what is being measured.
        cases: the quick grid when left out, the full one with `full`.
        full: also repeats each kernel FULL_REPEATS instead of REPEATS times.
        dtypes: of the kernels; those that train on `device` when left out.
    """
    dtypes = dtypes or (CUDA_DTYPES if device.type == "cuda" else (torch.float32,))
    if cases is None:
        grid = verify.full_cases if full else verify.quick_cases
        cases = [case for dtype in dtypes for case in grid(dtype)]
    rows: list[Verdict] = []
    for case in cases:
        note(f"kernels: {case}")
        rows += verify.audit([case], device)
    note("closed forms")
    for dtype in dtypes:
        rows += properties.closed_forms(device, dtype)
    checks = audit_properties(device, dtypes, note, FULL_REPEATS if full else REPEATS)
    for p in (0.0, AUDIT_DROPOUT):
        note(f"whole model, dropout {p:g}")
        rows += audit_model(model, p, device)
    note("decoding")
    rows += audit_decoding(model, device)
    checks[GREEDY] = {"model": greedy_equal(model, device)}
    return Audit(rows, checks)


def audit_properties(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    note: Callable[[str], None],
    times: int,
) -> dict[str, dict[str, bool]]:
    """What holds exactly, kernel by kernel; only of those that promise it."""
    note("masks, causality, repeats, memory")
    checks: dict[str, dict[str, bool]] = {MASKS: {}, CAUSAL: {}, REPEATED: {}, LINEAR: {}}

    def record(what: str, name: str, held: bool) -> None:
        checks[what][name] = checks[what].get(name, True) and held

    for batch, queries in ((2, 72), (2, 65), (1, 33)):
        case = verify.Case(batch, 3, queries, 72, 16, 0.1)
        for name, equal in properties.masks_equal(case, device).items():
            record(MASKS, name, equal)
    length = GROWTH_LENGTH[device.type]
    for dtype, p in itertools.product(dtypes, (0.0, AUDIT_DROPOUT)):
        case = verify.Case(1, 2, 130, 130, 16, p, dtype=dtype)
        long = verify.Case(1, 2, length, length, 64, p, dtype=dtype)
        repeating = dataclasses.replace(case.request(device), deterministic=True)
        for name, kernel in KERNELS.items():
            if refusal(name, repeating) is None:
                record(REPEATED, name, properties.repeats(name, case, device, times))
            if p == 0 and kernel.supports(case.request(device)) is None:
                record(CAUSAL, name, properties.is_causal(name, case, device))
            if name != standard.NAME and refusal(name, case.request(device)) is None:
                record(LINEAR, name, _growth(name, long, device) < GROWTH)
    return checks


def _growth(kernel: str, case: verify.Case, device: torch.device) -> float:
    """Peak memory of forward and backward at twice the length, over that at `case`'s."""
    found = []
    for length in (case.queries, 2 * case.queries):
        sized = dataclasses.replace(case, queries=length, keys=length)
        inputs = verify.inputs_of(sized, 0, device)
        call = functools.partial(verify.run_case, kernel, sized, 0, inputs)
        call()  # what a first call allocates for good is not its peak
        found.append(peak_bytes(call, device))
    return found[1] / found[0]


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
        yield _median(verdicts)


@torch.inference_mode()
def audit_decoding(model: GPTModel, device: torch.device) -> Iterator[Verdict]:
    """Judges logits that come token by token over the cache, use_flash on, as whole ones are."""
    flash, plain = _copy(model, 0.0, device).eval(), _copy(model, 0.0, device).eval()
    flash.set_attention(use_flash=True)
    plain.set_attention(use_flash=False)
    oracle = copy.deepcopy(plain).double()
    verdicts = []
    for seed in range(SEEDS):
        ids_BT = _ids(model.cfg, seed, device)[:, :DECODED]
        cache = KVCache(model.cfg, len(ids_BT), device, torch.float32)
        steps = [flash(ids_BT[:, t : t + 1], cache=cache) for t in range(ids_BT.shape[1])]
        exact_BTV = oracle(ids_BT)
        decoded, whole = Error(), Error()
        decoded.add(torch.cat(steps, dim=1), exact_BTV, exact_BTV)
        whole.add(plain(ids_BT), exact_BTV, exact_BTV)
        case = f"decoding, {model.cfg.n_layers} layers float32"
        verdicts.append(judge("use_flash=True", case, "logits", decoded, whole))
    yield _median(verdicts)


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


def _median(verdicts: list[Verdict]) -> Verdict:
    """What the median seed used of its budget."""
    return dataclasses.replace(
        sorted(verdicts, key=lambda verdict: verdict.max_error)[len(verdicts) // 2],
        max_used=statistics.median(verdict.max_used for verdict in verdicts),
        rms_used=statistics.median(verdict.rms_used for verdict in verdicts),
    )


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
