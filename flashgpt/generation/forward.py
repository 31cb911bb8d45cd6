"""The forward pass of a GPT-2 for decoding, as one loop over its weights.

With few tokens the calls of modules cost the host more than their layers cost the device. And on
many CPUs oneDNN's products are faster than those of modules, with several texts from copies of the
matrices in another order.

Legend: B batch, T new positions, M = B T rows, S positions so far, N heads, H head dim, D model
width, I features that come in, O that go out, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashgpt.attention.attend import attend
from flashgpt.attention.heads import MultiHeadAttention
from flashgpt.attention.measured import device_name
from flashgpt.attention.packed import split
from flashgpt.generation.cache import KVCache
from flashgpt.model.block import FeedForward, TransformerBlock
from flashgpt.model.gpt2 import GPTModel
from flashgpt.model.replaced import is_plain

LAYERS = (
    *(GPTModel, TransformerBlock, MultiHeadAttention, FeedForward),
    *(nn.ModuleList, nn.Embedding, nn.Linear, nn.LayerNorm, nn.GELU),
)
MULTIPLE = 64  # of columns
ROWS = 1024  # for which matrices are packed; as good for fewer
LEAST_STEPS = 40  # that make up for packing, 0.15 to 0.35 s of GPT-2 124M
MKL_ROWS = 3  # up to which MKL's products are faster than oneDNN's on a Xeon
ONEDNN = ("_reorder_linear_weight", "_linear_pointwise")


def weights_of(model: GPTModel) -> list[Tensor] | None:
    """All weights of a model that this file computes; of another None.

    It has plain layers in one dtype, and the switch on.
    """
    found: list[Tensor] = []
    for layer in model.modules():
        own = layer._parameters
        if not is_plain(layer, LAYERS):
            return None
        if isinstance(layer, MultiHeadAttention) and (layer.kernel or not layer.use_flash):
            return None
        if isinstance(layer, nn.LayerNorm) and any(p is None for p in own.values()):
            return None
        if isinstance(layer, nn.GELU) and layer.approximate != _approximate(model):
            return None
        found += (p for p in own.values() if p is not None)
    biased = [p for b in blocks(model) for p in (b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
    if model.lm_head._parameters["bias"] is not None or any(p.bias is None for p in biased):
        return None
    return found if len({(p.dtype, p.device) for p in found}) == 1 else None


def _approximate(model: GPTModel) -> str:
    return "tanh" if model.cfg.activation == "gelu_new" else "none"


def blocks(model: GPTModel) -> list[TransformerBlock]:
    """The transformer blocks."""
    return [block for block in model.h if isinstance(block, TransformerBlock)]


class Product:
    """x weight^T + bias, x_MI to [M, O]."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight_OI, self._bias_O = layer.weight, layer.bias

    def __call__(self, x_MI: Tensor) -> Tensor:
        return F.linear(x_MI, self.weight_OI, self._bias_O)


class OneDNNProduct(Product):
    """The same by oneDNN, in the operator that torch.compile takes for inference."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._weight = layer.weight.detach()

    def __call__(self, x_MI: Tensor) -> Tensor:
        out_MO: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_MI, self._weight, self._bias_O, "none", [], ""
        )
        return out_MO


class PackedProduct(OneDNNProduct):
    """The same from a copy in the order in which oneDNN reads it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, ROWS)


def has_onednn(model: GPTModel) -> bool:
    """Whether the model's products can be oneDNN's."""
    weight = model.wte.weight
    cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return cpu and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN)


def fastest(model: GPTModel, rows: int, steps: int) -> type[Product]:
    """The products for so many steps of so many rows, by measurements on an EPYC with AVX2 and on
    a Xeon with AVX-512 (docs/generation.md, benchmarks/rows_cpu.py)."""
    if not has_onednn(model) or (rows <= MKL_ROWS and _is_intel()):
        return Product
    # On an EPYC with AVX-512 they were faster than MKL's for one row too.
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    packs = steps >= LEAST_STEPS and (rows > 1 or wide)
    return PackedProduct if packs else OneDNNProduct


@functools.cache
def _is_intel() -> bool:
    return torch.backends.mkl.is_available() and "Intel" in device_name("cpu")


class Norm:
    """LayerNorm of the last dimension."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        self._shape, self._eps = list(layer.normalized_shape), layer.eps
        self._gain, self._shift = layer.weight, layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._shape, self._gain, self._shift, self._eps)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One transformer block."""

    ln_1: Norm
    c_attn: Product
    attn_proj: Product
    ln_2: Norm
    c_fc: Product
    mlp_proj: Product


class Forward:
    """Logits of a plain model after the last position, over a cache.

    Args:
        model: of which `weights_of` gives the weights.
        product: of its matrices; those of oneDNN where `has_onednn` says so.
    """

    def __init__(self, model: GPTModel, product: type[Product] = Product) -> None:
        self._wte_VD, self._wpe_SD = model.wte.weight, model.wpe.weight
        self._heads = (model.cfg.n_heads, model.cfg.head_dim)

        def layer(block: TransformerBlock) -> Layer:
            return Layer(
                Norm(block.ln_1),
                product(block.attn.c_attn),
                product(block.attn.c_proj),
                Norm(block.ln_2),
                product(block.mlp.c_fc),
                product(block.mlp.c_proj),
            )

        self._layers = [layer(block) for block in blocks(model)]
        self._lm_head = product(model.lm_head)
        self._ln_f = Norm(model.ln_f)
        self._approximate = _approximate(model)

    def __call__(
        self,
        ids_BT: Tensor,
        cache: KVCache,
        documents_BS: Tensor | None = None,
        positions_BT: Tensor | None = None,
        *,
        last_B: Tensor | None = None,
    ) -> Tensor:
        """logits_BV; the tokens join the cache. Arguments are those of the model.

        Args:
            last_B: the one of the B T tokens that each text's logits are to follow; its last when
                left out.
        """
        (batch, count), start = ids_BT.shape, cache.length
        if positions_BT is None:
            place_TD = self._wpe_SD[start : start + count]
        else:
            place_TD = F.embedding(positions_BT, self._wpe_SD)

        def attention(index: int, qkv_MD: Tensor) -> Tensor:
            q_BNTH, k_BNTH, v_BNTH = split(qkv_MD.view(batch, count, 3, *self._heads))
            k_BNSH, v_BNSH = cache.layer(index).extend(k_BNTH, v_BNTH)
            out_BNTH = attend(q_BNTH, k_BNSH, v_BNSH, documents_BT=documents_BS)
            return out_BNTH.transpose(1, 2).reshape(batch * count, -1)

        x_BTD = F.embedding(ids_BT, self._wte_VD) + place_TD
        x_MD = self.hidden(x_BTD.flatten(0, 1), attention)
        cache.advance(count)
        return self.logits(x_MD[count - 1 :: count] if last_B is None else x_MD[last_B])

    def hidden(self, x_MD: Tensor, attention: Callable[[int, Tensor], Tensor]) -> Tensor:
        """x_MD behind the last block; `attention` takes a block's number and qkv_MD."""
        for index, layer in enumerate(self._layers):
            x_MD = x_MD + layer.attn_proj(attention(index, layer.c_attn(layer.ln_1(x_MD))))
            inner = F.gelu(layer.c_fc(layer.ln_2(x_MD)), approximate=self._approximate)
            x_MD = x_MD + layer.mlp_proj(inner)
        return x_MD

    def logits(self, x_MD: Tensor) -> Tensor:
        """logits_MV of what `hidden` gave."""
        return self._lm_head(self._ln_f(x_MD))

    def logits_in_two(self, x_MD: Tensor) -> Tensor:
        """The same for a GPU, whose products with an odd number of columns are slow."""
        x_MD, weight_VD = self._ln_f(x_MD), self._lm_head.weight_OI
        vocab = len(weight_VD)
        even = vocab // MULTIPLE * MULTIPLE
        out_MC = x_MD.new_empty(len(x_MD), even + MULTIPLE)
        for start, end in ((0, even), (even, vocab)):
            torch.mm(x_MD, weight_VD[start:end].t(), out=out_MC[:, start:end])
        return out_MC[:, :vocab]
