"""Linear layers whose rows do not depend on how many there are: what makes decoding exact on a CPU in float32.

oneDNN's layer with packed weights gives a row the same bits alone, in a block and in a batch (tried when it is made),
and takes eight rows nearly in the time of one; MKL's does neither, but is faster for a single row (`quick`). Nothing of
this is promised on a GPU or in bfloat16, where the plain layers are used.
"""

from __future__ import annotations

from typing import Any, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional

from cai_experiment.engines.forward import ROWS

PACKED_AT_MOST = 2**29  # parameters that are held twice on a CPU; 2 GB in float32
MANY = 4096  # rows of a prefill: oneDNN may block so many in another way
TRIED = 2**31  # products in that trial, at most: wide layers are tried with fewer rows


_MANY_ROWS: dict[tuple[int | bool, ...], bool] = {}  # by output, input, no bias, threads: rows keep their bits


class Fused:
    """Linear layers that read the same input, as one: [n, in] -> [n, out of all]. Their weights become views of one."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.weight: torch.Tensor = layers[0].weight.data
        self.bias = None if layers[0].bias is None else layers[0].bias.data
        if len(layers) > 1:
            self.weight = torch.cat([layer.weight.data for layer in layers])
            for layer, part in zip(layers, self.weight.split([layer.out_features for layer in layers]), strict=True):
                layer.weight.data = part
            self.bias = None if self.bias is None else torch.cat([layer.bias.data for layer in layers])
        self._packed: torch.Tensor | None = None

    def pack(self) -> bool:
        """Pack the weights for oneDNN; False if rows then depend on their number, or there is no oneDNN."""
        try:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            return self._is_row_wise()
        except (RuntimeError, AttributeError):
            return False

    def unpack(self) -> None:
        """Back to the plain weights."""
        self._packed = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Exact: see the module."""
        if self._packed is None:
            return functional.linear(x, self.weight, self.bias)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
        return out

    def quick(self, x: torch.Tensor) -> torch.Tensor:
        """The fastest for one row; the last bits may differ."""
        return functional.linear(x, self.weight, self.bias)

    def _is_row_wise(self) -> bool:
        """Whether rows have the same bits alone, in blocks and in batches."""
        rows = torch.randn(67, self.weight.shape[1], generator=torch.Generator().manual_seed(0))
        whole = self(rows)
        few = all(torch.equal(self(rows[3 : 3 + size]), whole[3 : 3 + size]) for size in (1, 2, 3, 4, 7, 8, 16, 33))
        kind = (*self.weight.shape, self.bias is None, torch.get_num_threads())
        if few and kind not in _MANY_ROWS:  # what oneDNN does with many rows is a matter of the sizes: tried once
            many = rows.repeat(-(-min(MANY, TRIED // self.weight.numel()) // len(rows)) or 1, 1)
            _MANY_ROWS[kind] = bool((self(many).view(-1, *whole.shape) == whole).all())
        return few and _MANY_ROWS[kind]


class Apart:
    """The same for layers of other kinds (quantised ones, adapters): each by itself."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out of all]."""
        outs = [layer(x) for layer in self.layers]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    quick = __call__


def joined(layers: Sequence[nn.Module]) -> Fused | Apart:
    """Layers that read the same input: as one if they are plain ones."""
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    if len(plain) < len(layers) or len({layer.bias is None for layer in plain}) > 1:
        return Apart(layers)
    return Fused(plain)


def pack_all(layers: Sequence[Fused | Apart]) -> bool:
    """Pack all of them; False leaves every one as it was: rows then depend on their number."""
    plain = [layer for layer in layers if isinstance(layer, Fused)]
    small = len(plain) == len(layers) and sum(layer.weight.numel() for layer in plain) <= PACKED_AT_MOST
    done = small and all(layer.weight.dtype == torch.float32 and layer.pack() for layer in plain)
    if not done:
        for layer in plain:
            layer.unpack()
    return done


class Heads:
    """The scalar heads with exact linear layers. Made anew for each `decode`, since training changes the weights."""

    def __init__(self, heads: Iterable[Any]) -> None:
        """`heads`: ScalarHead modules in eval mode."""
        heads = list(heads)
        each = [[one for one in head.layers if not isinstance(one, nn.Dropout)] for head in heads]
        self.steps = [[joined([one]) if isinstance(one, nn.Linear) else one for one in steps] for steps in each]
        linear = [one for steps in self.steps for one in steps if isinstance(one, Fused | Apart)]
        on_cpu = next(heads[0].parameters()).device.type == "cpu"
        self.rows = ROWS if on_cpu and not pack_all(linear) else 1

    @torch.inference_mode()
    def __call__(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """The scalars [n, M] of hidden states [n, H_m], as `MultiModelWithScalarHeads.scalars` gives them."""
        found = []
        for steps, states in zip(self.steps, hidden, strict=True):
            x = functional.pad(states.float(), (0, 0, 0, -len(states) % self.rows))
            for step in steps:
                x = step(x)
            found.append(x[: len(states), 0])
        return torch.stack(found, dim=-1)
