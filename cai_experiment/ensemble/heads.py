"""The scalar head: what a frozen expert's last hidden state says of whether that expert should speak next."""

from __future__ import annotations

import torch
from torch import nn

from cai_experiment.errors import BadInputError

HIDDEN_DIM, DROPOUT = 256, 0.1


class ScalarHead(nn.Module):
    """hidden -> hidden_dim -> hidden_dim / 2 -> 1, each token by itself, in float32.

    LayerNorm keeps no statistics of a batch, so a batch of one and a single token work, and a token's scalar never
    depends on its neighbours; BatchNorm, which such heads are often given, fails on both. The first one stands before
    the first layer, since the scale of hidden states differs between models by orders of magnitude. GELU has a
    gradient everywhere: no unit dies.
    """

    def __init__(self, hidden: int, hidden_dim: int = HIDDEN_DIM, dropout: float = DROPOUT) -> None:
        """`hidden`: the expert's hidden size; `hidden_dim`: of the first layer. BadInputError if it is below 2."""
        super().__init__()
        if hidden_dim < 2:
            raise BadInputError(f"--head_hidden_dim {hidden_dim}: the second layer has half as many", "give 2 or more")
        self.hidden, self.hidden_dim, self.dropout = hidden, hidden_dim, dropout
        half = hidden_dim // 2
        self.layers = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden_dim, half), nn.LayerNorm(half), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(half, 1),
        )  # fmt: skip

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden] of any float type -> scalars [...] in float32."""
        scalars: torch.Tensor = self.layers(states.float()).squeeze(-1)
        return scalars
