"""What the heads are trained on: each expert's last hidden states, and how likely it found the token that came next.

The experts are frozen, so both are the same in every epoch: they can be computed once and kept (`state_cache.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from cai_experiment.ensemble.encoding import EncodedRow
from cai_experiment.errors import EngineError

if TYPE_CHECKING:
    from cai_experiment.ensemble.experts import Expert
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

TOKENS_A_PASS = {"cpu": 2048, "mps": 4096, "cuda": 16384}  # padding included
LOGITS_AT_ONCE = 2**27  # float32 numbers, 0.5 GB: of 151,665 tokens some 880 places at a time


@dataclass(frozen=True, slots=True)
class States:
    """Counted places of some rows, one after the other without padding.

    `hidden`: of each expert [places, H_m] in half precision; `log_p` [places, experts] in float32, the log-probability
    of the token that comes next; `places`: how many belong to each row.
    """

    hidden: list[torch.Tensor]
    log_p: torch.Tensor
    places: tuple[int, ...]


class Source(Protocol):
    """Where training takes states from: the cache, or the experts each time anew."""

    def states(self, rows: Sequence[int]) -> States:
        """The states of the rows with these numbers, in this order, on the model's device."""
        ...


class DirectStates:
    """States computed whenever they are asked for: no disk, and every epoch costs as much as the first."""

    def __init__(self, model: MultiModelWithScalarHeads, rows: Sequence[EncodedRow]) -> None:
        self.computer, self.rows = StateComputer(model), rows

    def states(self, rows: Sequence[int]) -> States:
        """See Source."""
        return self.computer.states_in_passes([self.rows[row] for row in rows])


class StateComputer:
    """Runs the experts over rows. Half precision is the experts' own bfloat16, which loses nothing, else float16."""

    def __init__(self, model: MultiModelWithScalarHeads) -> None:
        self.model, self.device = model, torch.device(model.device)

    def passes(self, rows: Sequence[EncodedRow]) -> Iterator[list[EncodedRow]]:
        """Neighbouring rows in passes of at most TOKENS_A_PASS tokens, padded; a longer row is a pass by itself."""
        most, part, width = TOKENS_A_PASS[self.device.type], list[EncodedRow](), 0
        for row in rows:
            width = max(width, len(row.ids))
            if part and width * (len(part) + 1) > most:
                yield part
                part, width = [], len(row.ids)
            part.append(row)
        if part:
            yield part

    def states_in_passes(self, rows: Sequence[EncodedRow]) -> States:
        """As `states`, in as many passes as memory asks for."""
        parts = [self.states(part) for part in self.passes(rows)]
        hidden = [torch.cat(of_expert) for of_expert in zip(*(part.hidden for part in parts), strict=True)]
        return States(hidden, torch.cat([part.log_p for part in parts]), tuple(row.counted for row in rows))

    @torch.no_grad()
    def states(self, rows: Sequence[EncodedRow]) -> States:
        """One pass of each expert over `rows`. Raises EngineError for an expert whose numbers are not finite."""
        ids, mask, counted = (part.to(self.device) for part in _padded(rows))
        targets = ids[:, 1:][counted[:, :-1]]
        hidden, log_p = [], []
        for expert in self.model.experts:
            states = expert.hidden(ids, mask)[counted]
            chances = self._head_log_p(expert, states, targets)
            half = states.to(torch.bfloat16 if states.dtype == torch.bfloat16 else torch.float16)
            if not (torch.isfinite(half).all() and torch.isfinite(chances).all()):
                raise _not_finite(expert, rows, half, chances)
            hidden.append(half)
            log_p.append(chances)
        return States(hidden, torch.stack(log_p, dim=-1), tuple(row.counted for row in rows))

    def _head_log_p(self, expert: Expert, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [places] of `targets`, a part of the places at a time: all logits would be far too many."""
        size = self.model.vocabulary
        at_once = max(LOGITS_AT_ONCE // size, 1)
        parts = zip(states.split(at_once), targets.split(at_once), strict=True)
        return torch.cat([_log_p(expert.logits(some)[:, :size], wanted) for some, wanted in parts])


def _padded(rows: Sequence[EncodedRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token ids, attention mask, places whose next token counts), each [rows, longest]; padding is on the right."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    counted = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = 1
        counted[number, row.start - 1 : len(row.ids) - 1] = True
    return ids, mask, counted


def _log_p(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [places] of `targets` under logits [places, vocabulary], in float32."""
    logits = logits.float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _not_finite(expert: Expert, rows: Sequence[EncodedRow], half: torch.Tensor, chances: torch.Tensor) -> EngineError:
    """The error for an expert's numbers, naming the first row with one that is none."""
    bad = ~(torch.isfinite(half).all(-1) & torch.isfinite(chances))
    at = int(bad.nonzero()[0, 0])
    row = next(row for n, row in enumerate(rows) if sum(r.counted for r in rows[: n + 1]) > at)
    what = "hidden states" if not torch.isfinite(half).all() else "log-probabilities"
    message = f"{expert.name} gives {what} that are no finite numbers in {half.dtype} at row {row.id} of {row.dataset}"
    return EngineError(message, "use another --precision (bf16 has the widest range), or other weights")
