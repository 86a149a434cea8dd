"""Which token comes next, and whose it is: the rule that decoding follows, whether or not it is accelerated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Sequence

import numpy as np

from cai_experiment.engines.sampling import draw
from cai_experiment.errors import BadInputError

if TYPE_CHECKING:
    import torch

MODES = ("select", "mixture", "uniform", "single")

Logits = Callable[[int, "torch.Tensor"], "torch.Tensor"]  # (expert, hidden [n, H]) -> [n, V]
Scalars = Callable[[Sequence["torch.Tensor"]], "torch.Tensor"]  # hidden [n, H_m] of each -> [n, M]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rule's tokens [n], the expert of each [n] and the weights of all experts [n, M]."""

    tokens: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Rule:
    """The next token from the experts' last hidden states, with pi = softmax of the heads' scalars.

    select: the expert with the largest pi speaks; its token is drawn at `temperature`. mixture: the token is drawn
    from q^(1/temperature), where q = sum over m of pi_m p_m is what training raises; 0 takes the likeliest token of q.
    uniform: the same with equal weights. single: expert `expert` alone. Draws are keyed by position (see `draw`).
    """

    count: int  # of experts
    scalars: Scalars
    mode: str
    expert: int
    temperature: float

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BadInputError(f"mode {self.mode!r} is unknown", f"use one of {', '.join(MODES)}")
        if not 0 <= self.expert < self.count:
            raise BadInputError(f"expert {self.expert} of {self.count} does not exist", "count from 0")

    @property
    def members(self) -> tuple[int, ...]:
        """The experts whose hidden states the rule asks for."""
        return (self.expert,) if self.mode == "single" else tuple(range(self.count))

    def __call__(self, hidden: Sequence[torch.Tensor | None], numbers: np.ndarray, logits: Logits) -> Chosen:
        """hidden: [n, H_m] of each expert (None: no member); numbers: uniform numbers [n]."""
        weights = self._weights(hidden)
        if self.mode in ("select", "single"):
            return self._select(hidden, weights, numbers, logits)
        return self._mix(hidden, weights, numbers, logits)

    def draw(self, logits: torch.Tensor, numbers: np.ndarray) -> np.ndarray:
        """One token per row at the rule's temperature: logits [n, V], numbers [n] -> [n]."""
        return draw(logits, np.full(len(numbers), self.temperature, dtype=np.float32), numbers)

    def _weights(self, hidden: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """pi [n, M]."""
        import torch

        given = [each for each in hidden if each is not None]
        if self.mode == "single":
            one = torch.zeros(len(given[0]), self.count)
            one[:, self.expert] = 1
            return one
        if self.mode == "uniform":
            return torch.full((len(given[0]), self.count), 1 / self.count)
        return torch.softmax(self.scalars(given), dim=-1)

    def _select(
        self, hidden: Sequence[torch.Tensor | None], weights: torch.Tensor, numbers: np.ndarray, logits: Logits
    ) -> Chosen:
        """Only the selected expert's logits are computed."""
        pi = weights.cpu().numpy()
        experts = pi.argmax(axis=1)
        tokens = np.zeros(len(pi), dtype=np.int64)
        for expert in np.unique(experts):
            mine = np.flatnonzero(experts == expert)
            states = hidden[expert]
            assert states is not None
            tokens[mine] = self.draw(logits(int(expert), states[mine]), numbers[mine])
        return Chosen(tokens, experts, pi)

    def _mix(
        self, hidden: Sequence[torch.Tensor | None], weights: torch.Tensor, numbers: np.ndarray, logits: Logits
    ) -> Chosen:
        import torch

        given = [logits(expert, states) for expert, states in enumerate(hidden) if states is not None]
        log_p = torch.stack([torch.log_softmax(each.float(), dim=-1) for each in given], dim=1)  # [n, M, V]
        joint = log_p + weights.to(log_p.device).log().unsqueeze(-1)
        tokens = self.draw(torch.logsumexp(joint, dim=1), numbers)
        at = torch.from_numpy(np.maximum(tokens, 0)).to(log_p.device)
        share = joint.gather(2, at[:, None, None].expand(-1, joint.shape[1], 1)).squeeze(2)  # log pi_m p_m(token)
        return Chosen(tokens, share.argmax(dim=1).cpu().numpy(), weights.cpu().numpy())
