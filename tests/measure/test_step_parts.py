"""What the parts of a step are read from: names, and traces of known content.

pytest tests/measure/test_step_parts.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashgpt.config import GPTConfig
from flashgpt.measure import step_parts
from flashgpt.measure.step_parts import MEANING, PARTS, RULES, by_kernel, by_part, part, profile
from flashgpt.measure.train_variants import ON, Variant, build
from flashgpt.train.bare import UPDATE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OURS = "GPTModel/TransformerBlock/"
THEIRS = "GPT2LMHeadModel/GPT2Model/GPT2Block/"
LOSS = "GPTModel/flashgpt::linear_cross_entropy/"
PATHS = [
    (f"{OURS}FeedForward/Linear/aten::linear/aten::addmm/", "products"),
    (f"{THEIRS}GPT2MLP/Conv1D/aten::addmm/nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN/", "products"),
    (f"{LOSS}aten::matmul/aten::mm/", "products"),
    (f"{LOSS}aten::addmm_/", "products"),
    ("## Call CompiledFxGraph x ##/nvjet_hsh_192x128_64x6_1x2_h_bz_coopB_TNT/", "products"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>(Params)/", "products"),
    (f"{OURS}FeedForward/flashgpt::linear_gelu/_gemm_gelu/", "products"),
    (f"{OURS}FeedForward/flashgpt::linear_of_gelu/aten::addmm/nvjet_bias_TNN/", "products"),
    ("CompiledFunctionBackward/flashgpt::matmul_dgelu/_gemm_gelu/", "products"),
    ("autograd::engine::evaluate_function: AddmmBackward0/AddmmBackward0/aten::sum/", "products"),
    ("autograd::engine::evaluate_function: MmBackward0/MmBackward0/aten::mm/", "products"),
    (f"{OURS}MultiHeadAttention/aten::matmul/aten::bmm/nvjet_tst_64x8_NNT/", "attention"),
    ("BmmBackward0/aten::bmm/", "attention"),
    (f"{OURS}MultiHeadAttention/aten::softmax/aten::_softmax/", "attention"),
    (f"{OURS}MultiHeadAttention/aten::masked_fill/", "attention"),
    ("flashgpt::blocked_backward/aten::mul/", "attention"),
    ("CompiledFunction/flashgpt::triton/_forward/", "attention"),
    ("CompiledFunctionBackward/flashgpt::triton_backward/_backward_kv/", "attention"),
    (f"{OURS}MultiHeadAttention/flashgpt::dropout_keys/_keys/", "attention"),
    (f"{OURS}flashgpt::dropout_keys/_keys/", "norms"),
    ("GPTModel/flashgpt::dropout_keys/_keys/", "other"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128/", "attention"),
    ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_traits<64>>/", "attention"),
    ("fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80(PyTorchMemEffAttention)/", "attention"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu_backward/", "attention"),
    ("triton_per_fused__softmax__to_copy_masked_fill_mul_3/", "attention"),
    ("triton_per_fused__softmax_backward_data_mul_7/", "attention"),
    (f"{LOSS}aten::softmax/aten::_softmax/", "loss"),
    (f"{LOSS}aten::to/aten::_to_copy/aten::copy_/", "loss"),
    ("GeneratedBackwardFor_flashgpt_linear_cross_entropy_default/aten::mul/", "loss"),
    ("GPT2LMHeadModel/aten::cross_entropy_loss/aten::log_softmax/aten::_log_softmax/", "loss"),
    ("triton_red_fused__log_softmax__to_copy_nll_loss_forward_19/", "loss"),
    ("NllLossBackward0/aten::nll_loss_backward/", "loss"),
    (f"{OURS}LayerNorm/aten::layer_norm/aten::native_layer_norm/", "norms"),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>/", "norms"),
    ("triton_per_fused__to_copy_add_native_dropout_native_layer_norm_4/", "norms"),
    ("graph_0_cpp_fused_add_embedding_native_layer_norm_0/", "norms"),
    ("triton_poi_fused_add_view_11/", "norms"),
    (f"{OURS}aten::add/", "norms"),
    (f"{OURS}aten::where/", "norms"),
    (f"{THEIRS}GPT2MLP/Dropout/aten::dropout/aten::native_dropout/", "norms"),
    (f"{OURS}FeedForward/GELU/aten::gelu/", "activation"),
    (f"{THEIRS}GPT2MLP/NewGELUActivation/aten::add/", "activation"),
    ("triton_poi_fused_gelu_view_6/", "activation"),
    ("triton_poi_fused__to_copy_add_mul_pow_tanh_tanh_backward_8/", "activation"),
    (f"{UPDATE}/Optimizer.step#AdamW.step/aten::_fused_adamw_/", "optimizer"),
    (f"{UPDATE}/aten::_foreach_norm/multi_tensor_apply_kernel/", "optimizer"),
    (f"{UPDATE}/aten::add/", "optimizer"),
    (f"{OURS}FeedForward/Linear/aten::linear/aten::to/aten::_to_copy/aten::copy_/", "other"),
    (f"{THEIRS}GPT2MLP/Conv1D/aten::addmm/aten::to/aten::_to_copy/aten::copy_/", "other"),
    ("GPTModel/Embedding/aten::embedding/", "other"),
    ("triton_poi_fused_embedding_dense_backward_2/", "other"),
    ("Memcpy HtoD (Pinned -> Device)/", "other"),
    ("", "other"),
]


@pytest.mark.parametrize(("path", "expected"), PATHS, ids=[path or "none" for path, _ in PATHS])
def test_names_tell_the_part(path: str, expected: str) -> None:
    assert part(path) == expected


def test_every_rule_decides_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(PARTS) == set(MEANING) == {name for name, _ in RULES} | {"other"}
    for i, (name, pattern) in enumerate(RULES):
        rest = [rule for j, rule in enumerate(step_parts._RULES) if j != i]
        with monkeypatch.context() as patch:
            patch.setattr(step_parts, "_RULES", rest)
            changed = [path for path, expected in PATHS if part(path) != expected]
        assert changed, f"{name}: {pattern} has no case of its own"


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def number(value: int, backward: bool = False) -> dict[str, int]:
    return {"Sequence number": value, "Fwd thread id": int(backward)}


GELU_FORWARD = [
    event("user_annotation", "NewGELUActivation", 0, 100),
    event("cpu_op", "aten::mul", 10, 40, **number(5)),
]
GELU_BACKWARD = [
    event("cpu_op", "MulBackward0", 200, 50, tid=2, **number(5, backward=True)),
    event("cpu_op", "aten::mul", 210, 30, tid=2),
]


def test_on_the_cpu_own_times_count_and_python_is_other() -> None:
    events = [*GELU_FORWARD, event("cpu_op", "aten::to", 15, 10), {"ph": "M", "name": "thread"}]
    assert by_part(events, CPU) == dict.fromkeys(PARTS, 0) | {"activation": 0.04, "other": 0.06}


def test_a_backward_operator_belongs_to_its_forward_operator() -> None:
    assert by_part(GELU_BACKWARD, CPU)["activation"] == 0
    found = by_part([*reversed(GELU_BACKWARD), *GELU_FORWARD], CPU)
    assert found["activation"] == pytest.approx(0.04 + 0.05)


def test_on_cuda_kernels_count_by_what_launched_them() -> None:
    events = [
        *GELU_FORWARD,
        *GELU_BACKWARD,
        event("cuda_runtime", "cudaLaunchKernel", 20, 5, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 220, 5, tid=2, correlation=2),
        event("kernel", "elementwise_kernel", 60, 1000, tid=7, correlation=1),
        event("kernel", "elementwise_kernel", 1500, 2000, tid=7, correlation=2),
        event("kernel", "nvjet_tst_64x8", 4000, 500, tid=7, correlation=3),
        event("gpu_memset", "Memset (Device)", 5000, 7, tid=7, correlation=4),
        event("gpu_user_annotation", "NewGELUActivation", 60, 5000, tid=7),
    ]
    expected = {"activation": 3.0, "products": 0.5, "other": 0.007}
    assert by_part(events, CUDA) == pytest.approx(dict.fromkeys(PARTS, 0) | expected)


def test_kernels_are_listed_by_their_time_in_a_step() -> None:
    events = [
        event("cpu_op", "aten::mm", 0, 9000),
        event("kernel", "nvjet", 0, 1000),
        event("kernel", "nvjet", 2000, 2000),
        event("gpu_memset", "Memset (Device)", 5000, 4000),
    ]
    assert by_kernel(events, 2) == [
        {"kernel": "Memset (Device)", "ms": 2.0, "launches": 0.5},
        {"kernel": "nvjet", "ms": 1.5, "launches": 1.0},
    ]


@pytest.mark.parametrize(
    ("device", "measured", "products", "other"),
    [
        (CPU, 5.0, 3.0, 2.0),  # the profiler made the step twice as slow
        (CUDA, 20.0, 6.0, 14.0),  # kernels are true, the device idles
        (CUDA, 5.0, 3.0, 2.0),  # they cannot take longer than the step
    ],
)
def test_parts_add_up_to_the_measured_step(
    device: torch.device,
    measured: float,
    products: float,
    other: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cats = ("cpu_op", "cpu_op") if device == CPU else ("kernel", "kernel")
    events = [event(cats[0], "aten::mm/gemm", 0, 12000), event(cats[1], "x", 13000, 8000)]
    monkeypatch.setattr(step_parts, "trace", lambda call, device: events)
    found = profile(lambda: None, 2, device, measured).parts
    assert sum(found.values()) == pytest.approx(measured)
    assert found["products"] == pytest.approx(products)
    assert found["other"] == pytest.approx(other)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_real_step_has_all_parts(dropout: float) -> None:
    cfg = GPTConfig(96, 16, 32, 2, 1, 0.0)
    step = build(Variant(ON, False, dropout), cfg, CPU, None)
    ids = torch.randint(96, (2, 16))
    step(ids, ids)
    with step_parts.modules_in_trace():
        found = profile(lambda: step(ids, ids), 1, CPU, 10.0).parts
    assert tuple(found) == PARTS and all(ms > 0 for ms in found.values())
    assert sum(found.values()) == pytest.approx(10.0)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
