"""What the heads do on held-out rows, beside what they are to beat: the uniform mixture and every expert alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from cai_experiment.ensemble.states import Source, States

if TYPE_CHECKING:
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

PLACES_A_PASS = 16384
ALL = "all rows"


@dataclass(frozen=True, slots=True)
class Measures:
    """Means over counted tokens, in nats: lower is better, but for the entropy. Lists are by expert, in order."""

    tokens: int
    loss: float  # the objective: mixture - entropy_weight * entropy
    mixture: float  # -log sum_m pi_m p_m: sampling from the mixture, as training optimises
    select: float  # -log p of the expert with the largest pi: what decoding in that mode says
    entropy: float  # of pi
    uniform: float  # -log mean_m p_m
    experts: tuple[float, ...]  # -log p_m
    best_expert: float  # -log max_m p_m: the best expert for each token, which no weights can beat
    shares: tuple[float, ...]  # of tokens at which this expert's pi is largest

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


@torch.no_grad()
def measure(
    model: MultiModelWithScalarHeads, source: Source, rows: Sequence[int], datasets: Sequence[str],
    places: Sequence[int], entropy_weight: float,
) -> dict[str, Measures]:  # fmt: skip
    """Measures of the rows with these numbers, by data set and, as ALL, together; dropout off.

    `datasets` and `places` give each row's data set and its number of counted tokens.
    """
    model.heads.eval()
    sums: dict[str, torch.Tensor] = {}
    for part in _parts(rows, places):
        found = source.states([rows[n] for n in part])
        columns = _columns(model, found)
        for n, values in zip(part, columns.split(list(found.places)), strict=True):
            here = torch.cat([values.new_tensor([float(len(values))]), values.sum(0)])
            sums[datasets[n]] = sums.get(datasets[n], torch.zeros_like(here)) + here
    everything = torch.stack(list(sums.values())).sum(0)
    experts = len(model.experts)
    return {name: _measures(total, experts, entropy_weight) for name, total in [*sums.items(), (ALL, everything)]}


def _parts(rows: Sequence[int], places: Sequence[int]) -> Iterator[list[int]]:
    """Indices into `rows`, in order, in parts of at most PLACES_A_PASS counted tokens."""
    part, filled = list[int](), 0
    for index in range(len(rows)):
        if part and filled + places[index] > PLACES_A_PASS:
            yield part
            part, filled = [], 0
        part.append(index)
        filled += places[index]
    if part:
        yield part


def _columns(model: MultiModelWithScalarHeads, found: States) -> torch.Tensor:
    """[places, 5 + 2 M] in float64: mixture, select, entropy, uniform, best expert, each one, where pi is largest."""
    log_p = found.log_p.cpu().double()  # Apple's GPUs know no float64
    log_pi = torch.log_softmax(model.scalars(found.hidden).cpu().double(), -1)
    chosen = log_pi.argmax(-1)
    count = log_p.shape[-1]
    columns = [
        -torch.logsumexp(log_pi + log_p, -1),
        -log_p.gather(-1, chosen[:, None]).squeeze(-1),
        -(log_pi.exp() * log_pi).sum(-1),
        -(torch.logsumexp(log_p, -1) - torch.log(log_p.new_tensor(float(count)))),
        -log_p.max(-1).values,
    ]
    return torch.cat([torch.stack(columns, -1), -log_p, torch.nn.functional.one_hot(chosen, count).double()], -1)


def _measures(total: torch.Tensor, experts: int, entropy_weight: float) -> Measures:
    tokens, *values = total.tolist()
    mixture, select, entropy, uniform, best, *rest = (value / tokens for value in values)
    return Measures(
        tokens=int(tokens), loss=mixture - entropy_weight * entropy, mixture=mixture, select=select, entropy=entropy,
        uniform=uniform, experts=tuple(rest[:experts]), best_expert=best, shares=tuple(rest[experts:]),
    )  # fmt: skip
