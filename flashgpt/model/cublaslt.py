"""Matrix products with GELU, or its derivative, in their epilogue: cuBLASLt by ctypes.

PyTorch ships the library and loads it, but reaches these epilogues for inference alone. Names and
numbers are those of cublasLt.h (CUDA 11.8 to 13), documented at
https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api. GELU there is the tanh form.

A row-major matrix is its transpose to cuBLASLt, which counts columns first. So the row-major
product out_MN = a_MK b_KN is asked for as out_NM = b_NK a_KM.

Legend: M rows, K summed, N columns.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p

import torch
from torch import Tensor

GELU_AUX_BIAS, DGELU = 164, 192  # cublasLtEpilogue_t
COMPUTE_32F = 68  # cublasComputeType_t
TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t; that of scalars is 0, fp32
# cublasLtMatmulDescAttributes_t
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LEADING = 3, 4, 7, 8, 11, 12
INVALID_VALUE, NOT_SUPPORTED = 7, 15  # cublasStatus_t
MAX_WORKSPACE_BYTES = 1  # cublasLtMatmulPreferenceAttributes_t
# Both in bytes. With less, cuBLASLt may choose to apply the epilogue in a second kernel.
ALIGNMENT, WORKSPACE = 256, 2**25


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t; the algorithm is its first field."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The cuBLASLt of the CUDA that torch was built for; None without one."""
    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.partition(".")[0]
    name = f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _call(name: str, *arguments: object) -> None:
    status = getattr(library(), name)(*arguments)
    if status in (INVALID_VALUE, NOT_SUPPORTED):
        raise NotImplementedError(f"{name} refused with cublasStatus_t {status}")
    if status:
        raise RuntimeError(f"{name} failed with cublasStatus_t {status}")


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _call("cublasLtCreate", byref(handle))
    return handle


class Product:
    """out_MN = epilogue(a_MK b_KN) for one shape, dtype and device.

    Args:
        transposed: b is given as b_NK.

    Raises:
        NotImplementedError: cuBLASLt has no algorithm for it.
    """

    def __init__(
        self,
        epilogue: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: int,
        transposed: bool,
    ) -> None:
        m, n, k = shape
        self._device, self._lock = device, threading.Lock()
        self._description = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self._description), COMPUTE_32F, 0)
        self._set(TRANSPOSE_A, c_int(transposed))
        self._set(EPILOGUE, c_int(epilogue))
        self._set(AUX_LEADING, c_int64(n))
        # The choice looks at how these pointers are aligned.
        self._set(AUX_POINTER, c_void_p(ALIGNMENT))
        if epilogue == GELU_AUX_BIAS:
            self._set(BIAS_POINTER, c_void_p(ALIGNMENT))
        self._b = _layout(dtype, *((k, n) if transposed else (n, k)))
        self._a, self._out = _layout(dtype, k, m), _layout(dtype, n, m)
        self._chosen = self._choose()

    def _choose(self) -> _Heuristic:
        """The algorithm that cuBLASLt expects to be the fastest."""
        preference, found, count = c_void_p(), _Heuristic(), c_int()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        layouts = (self._b, self._a, self._out, self._out)
        handle, limit = _handle(self._device), c_size_t(WORKSPACE)
        try:
            _call(
                "cublasLtMatmulPreferenceSetAttribute", preference, MAX_WORKSPACE_BYTES,
                byref(limit), c_size_t(ctypes.sizeof(limit)),
            )  # fmt: skip
            _call(
                "cublasLtMatmulAlgoGetHeuristic", handle, self._description, *layouts,
                preference, 1, byref(found), byref(count),
            )  # fmt: skip
        finally:
            _call("cublasLtMatmulPreferenceDestroy", preference)
        if not count.value or found.state:
            raise NotImplementedError("cuBLASLt has no algorithm")
        return found

    def __call__(
        self, a_MK: Tensor, b: Tensor, out_MN: Tensor, aux_MN: Tensor, bias_N: Tensor | None = None
    ) -> None:
        """Launches it on the current stream.

        Args:
            aux_MN: what GELU is taken of: written with GELU_AUX_BIAS, read with DGELU.
        """
        stream = torch.cuda.current_stream(self._device).cuda_stream
        size = self._chosen.workspace
        workspace = out_MN.new_empty(size, dtype=torch.uint8)
        with self._lock, torch.cuda.device(self._device):
            self._set(AUX_POINTER, c_void_p(aux_MN.data_ptr()))
            if bias_N is not None:
                self._set(BIAS_POINTER, c_void_p(bias_N.data_ptr()))
            out = (c_void_p(out_MN.data_ptr()), self._out)
            _call(
                "cublasLtMatmul", _handle(self._device), self._description, byref(c_float(1)),
                c_void_p(b.data_ptr()), self._b, c_void_p(a_MK.data_ptr()), self._a,
                byref(c_float(0)), *out, *out, byref(self._chosen),
                c_void_p(workspace.data_ptr()), c_size_t(size), c_void_p(stream),
            )  # fmt: skip

    def _set(self, attribute: int, value: c_int | c_int64 | c_void_p) -> None:
        size = c_size_t(ctypes.sizeof(value))
        _call("cublasLtMatmulDescSetAttribute", self._description, attribute, byref(value), size)


def _layout(dtype: torch.dtype, rows: int, columns: int) -> c_void_p:
    """A dense matrix, columns first."""
    layout = c_void_p()
    sizes = c_uint64(rows), c_uint64(columns), c_int64(rows)
    _call("cublasLtMatrixLayoutCreate", byref(layout), TYPES[dtype], *sizes)
    return layout


@functools.cache
def find(
    epilogue: int, shape: tuple[int, int, int], dtype: torch.dtype, device: int, transposed: bool
) -> Product | None:
    """A `Product`, made once; None where cuBLASLt has no algorithm."""
    try:
        return Product(epilogue, shape, dtype, device, transposed)
    except NotImplementedError:
        return None
