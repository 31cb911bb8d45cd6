"""Time and memory of the attention kernels on this machine, with PyTorch's own doors as peers.

Owns what is measured. How is `flashgpt.measure.clock` and `memory`; table and files are those of
`flashgpt bench attention`, pictures those of `flashgpt.measure.plots`.

Legend: B batch, T query positions, N heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashgpt import half_on_cpu
from flashgpt.attention.attend import attend
from flashgpt.attention.dropout import Dropout
from flashgpt.attention.kernels import KERNELS
from flashgpt.attention.request import Request, bucket, shape_of
from flashgpt.attention.standard import NAME as STANDARD
from flashgpt.measure import failure
from flashgpt.measure.clock import MIN_ROUNDS, Call, alternate, device_peak, milliseconds
from flashgpt.measure.memory import peak_bytes

SDPA, FLEX = "torch F.sdpa", "FlexAttention"
PLAIN = "matmul, softmax"  # standard attention in half precision throughout, as models write it
OWN_DROPOUT = ", own dropout"  # behind the name of one of PyTorch's kernels

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        lengths: tokens per sequence T.
        tokens: tokens per call B * T; a longer sequence is a batch of one.
        dropout: probability of the cases with dropout; 0 leaves them out.
        rounds: times each call is timed, at most.
        flex: FlexAttention too, which compiles for each length.
    """

    lengths: tuple[int, ...]
    tokens: int
    heads: int
    head_dim: int
    dropout: float
    dtype: torch.dtype
    device: torch.device
    rounds: int = 7
    flex: bool = False

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("lengths must name at least one length, got none")
        numbers = {
            "lengths": min(self.lengths),
            "tokens": self.tokens,
            "heads": self.heads,
            "head_dim": self.head_dim,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout:g}")
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds must be at least {MIN_ROUNDS}, got {self.rounds}")
        on_cpu = self.device.type == "cpu"
        if self.dtype == torch.bfloat16 and on_cpu and (reason := half_on_cpu.refusal()):
            raise ValueError(f"dtype must be fp32 or fp16 on this CPU, where {reason}; got bf16")

    def batch(self, length: int) -> int:
        """Sequences of a call."""
        return max(1, self.tokens // length)


@dataclasses.dataclass(frozen=True)
class Pass:
    """Times of one kind of call.

    Attributes:
        ms, ms_min, ms_max: median and range over the rounds (milliseconds).
        flop_per_second: what causal attention needs (`flop`) over the median time.
        share_of_peak: of the speed of a large square product in the same run.
    """

    ms: float
    ms_min: float
    ms_max: float
    rounds: int
    flop_per_second: float
    share_of_peak: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """A kernel on one length, dropout off or on.

    Attributes:
        forward_backward: None for a kernel that has no backward pass here.
        peak_bytes: of forward + backward, or of forward where that is None (bytes).
        times_standard: speed over that of standard attention, by forward + backward, or by forward
            where that is None; None where standard attention failed.
    """

    kernel: str
    length: int
    batch: int
    dropout: bool
    forward: Pass
    forward_backward: Pass | None
    peak_bytes: int
    times_standard: float | None


@dataclasses.dataclass
class Refused:
    """Why a kernel was not measured at some lengths; `gradient`: only its backward pass."""

    kernel: str
    dropout: bool
    gradient: bool
    reason: str
    lengths: list[int]


@dataclasses.dataclass
class Result:
    """Everything that was measured; peak_flop_per_second is that of a large square product."""

    peak_flop_per_second: float
    rows: list[Timing] = dataclasses.field(default_factory=list)
    refused: list[Refused] = dataclasses.field(default_factory=list)

    def refuse(self, kernel: str, dropout: bool, gradient: bool, reason: str, length: int) -> None:
        """Notes a length that was not measured."""
        for known in self.refused:
            if (known.kernel, known.dropout, known.gradient) == (kernel, dropout, gradient) and (
                known.reason == reason
            ):
                known.lengths.append(length)
                return
        self.refused.append(Refused(kernel, dropout, gradient, reason, [length]))


def flop(batch: int, heads: int, length: int, head_dim: int, gradient: bool) -> float:
    """FLOP that causal attention needs: half of each [T, T] product.

    Forward has two products of 2 B N T T H, backward five (the scores once more, dv, dp, dq, dk).
    """
    return (7 if gradient else 2) * batch * heads * length * length * head_dim


def measure(
    setup: Setup,
    note: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Measures every kernel on every length.

    Args:
        note: hears what is being measured.
        progress: hears rounds done and rounds in all.
    """
    note("speed of a large square product")
    result = Result(device_peak(setup.dtype, setup.device))
    switch = (False, True) if setup.dropout else (False,)
    cases = [(length, dropout) for length in setup.lengths for dropout in switch]
    total = len(cases) * setup.rounds
    for i, (length, dropout) in enumerate(cases):
        done = i * setup.rounds
        progress(done, total)
        note(f"T {length}, batch {setup.batch(length)}, dropout {'on' if dropout else 'off'}")
        calls = _calls(setup, length, dropout, result)

        def tick(rounds: int, done: int = done) -> None:
            progress(done + rounds, total)

        times = alternate(calls, setup.rounds, lambda call: milliseconds(call, setup.device), tick)
        result.rows += _rows(setup, length, dropout, calls, times, result.peak_flop_per_second)
        progress(done + setup.rounds, total)
    return result


def _calls(
    setup: Setup, length: int, dropout: bool, result: Result
) -> dict[tuple[str, bool], Call]:
    """The warm calls of a case by (kernel, with backward); `result` hears of the others."""
    batch, heads, head_dim = setup.batch(length), setup.heads, setup.head_dim
    # Views of one projection, as a model has them; the upstream gradient comes in its layout too.
    random = functools.partial(torch.randn, dtype=setup.dtype, device=setup.device)
    qkv_BNTH = random(batch, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind()
    dout_BNTH = random(batch, length, heads, head_dim).transpose(1, 2)
    calls: dict[tuple[str, bool], Call] = {}
    for name, attention in _attentions(setup, length, dropout).items():
        for gradient in (False, True):
            whole = not gradient
            reason = _refusal(name, setup, length, dropout, gradient)
            if reason is None:
                call = _call(attention, qkv_BNTH, dout_BNTH if gradient else None)
                reason = _failure(name, call, setup.device)
                # What dynamo fails on once it runs uncompiled from then on, forward too.
                whole = whole or name == FLEX
            if reason is None:
                calls[name, gradient] = call
                continue
            if whole:
                calls.pop((name, False), None)
            result.refuse(name, dropout, not whole, reason, length)
            break
    return calls


def _call(attention: Attention, qkv: tuple[Tensor, ...], dout_BNTH: Tensor | None) -> Call:
    """Forward without gradients or, given the upstream gradient, forward and backward."""
    q, k, v = (x.detach().requires_grad_(dout_BNTH is not None) for x in qkv)

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(q, k, v)

    def forward_backward() -> tuple[Tensor, ...]:
        out_BNTH = attention(q, k, v)
        return torch.autograd.grad(out_BNTH, (q, k, v), dout_BNTH)

    return forward if dout_BNTH is None else forward_backward


def _attentions(setup: Setup, length: int, dropout: bool) -> dict[str, Attention]:
    """The kernels and the peers, each as (q, k, v) -> out."""
    p = setup.dropout if dropout else 0.0
    zero = torch.zeros((), dtype=torch.int64, device=setup.device)
    draw = Dropout(p, seed=zero, first_row=zero) if dropout else None

    def named(name: str) -> Attention:
        return lambda q, k, v: attend(
            q, k, v, kernel=name, use_flash=name != STANDARD, dropout=draw
        )

    def with_own_dropout(name: str, own: Dropout) -> Attention:
        return lambda q, k, v: attend(q, k, v, kernel=name, dropout=own)

    found = {name: named(name) for name in KERNELS}
    if draw is not None:
        own = draw.with_own_masks()
        torchs = [name for name in KERNELS if name.startswith("sdpa:")]
        found |= {name + OWN_DROPOUT: with_own_dropout(name, own) for name in torchs}
    found[SDPA] = functools.partial(scaled_dot_product_attention, is_causal=True, dropout_p=p)
    found[PLAIN] = functools.partial(
        _plain, torch.ones(length, length, dtype=torch.bool, device=setup.device).triu(1), p
    )
    found[FLEX] = _flex(length, setup.device)
    return found


def _plain(hidden_TT: Tensor, p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in PyTorch's operators, scores and softmax in the dtype of q."""
    scores_BNTT = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden_TT, float("-inf"))
    return torch.dropout(scores_BNTT.softmax(-1), p, train=p > 0) @ v


def _flex(length: int, device: torch.device) -> Attention:
    """FlexAttention, compiled for this length by the first call."""

    @functools.cache
    def compiled() -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # dynamo compiles a function for a few shapes only
        causal = create_block_mask(
            lambda b, n, t, s: t >= s, None, None, length, length, device=str(device)
        )
        return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=causal)

    return lambda q, k, v: compiled()(q, k, v)


def _refusal(name: str, setup: Setup, length: int, dropout: bool, gradient: bool) -> str | None:
    """Why a kernel is not even tried, or None."""
    if name == FLEX and dropout:
        return "has no dropout"
    if name == FLEX and not setup.flex:
        return "left out, for it compiles about 10 s per length; --flex adds it"
    if name == FLEX and gradient and setup.device.type == "cpu":
        return "has no backward pass on the CPU"
    if name == PLAIN and setup.dtype.itemsize > 2:
        return f"is {STANDARD} in fp32"
    kernel = name.removesuffix(OWN_DROPOUT)
    if kernel not in KERNELS:
        return None
    request = Request(
        device=setup.device.type,
        dtype=setup.dtype,
        head_dim=setup.head_dim,
        t_bucket=bucket(length),
        shape=shape_of(length, length),
        dropout=dropout,
        documents=False,
        gradient=gradient,
        deterministic=False,
        own_masks=kernel != name,
    )
    return KERNELS[kernel].supports(request)  # known to be bad or not: it is a peer


def _failure(name: str, call: Call, device: torch.device) -> str | None:
    """Runs a call for the first time: None, or in one line why it fails.

    Of our own kernels only a lack of memory is taken as an answer; of a peer, whatever it is.
    """
    try:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        why = failure.reason(error)
        if name in KERNELS and why != failure.OUT_OF_MEMORY:
            raise
        return why
    return None


def _rows(
    setup: Setup,
    length: int,
    dropout: bool,
    calls: Mapping[tuple[str, bool], Call],
    times: Mapping[tuple[str, bool], list[float]],
    peak: float,
) -> list[Timing]:
    batch = setup.batch(length)

    def judged(name: str, gradient: bool) -> Pass | None:
        if (name, gradient) not in times:
            return None
        ms = times[name, gradient]
        needed = flop(batch, setup.heads, length, setup.head_dim, gradient)
        speed = needed / statistics.median(ms) * 1e3
        return Pass(statistics.median(ms), min(ms), max(ms), len(ms), speed, speed / peak)

    rows = []
    for name in dict.fromkeys(name for name, _ in calls):
        forward, both = judged(name, False), judged(name, True)
        assert forward is not None, "a kernel whose forward fails has no calls"
        gradient = both is not None
        standard, own = judged(STANDARD, gradient), both or forward
        rows.append(
            Timing(
                name,
                length,
                batch,
                dropout,
                forward,
                both,
                peak_bytes(calls[name, gradient], setup.device),
                standard.ms / own.ms if standard else None,
            )
        )
    return rows
