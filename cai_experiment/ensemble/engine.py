"""The ensemble behind the pipeline's seam: `stream` and `choose` over several frozen experts and their heads.

Prompts are rendered as for a single model, by the experts' shared tokenizer; texts are drawn by keyed sampling. So a
completion depends on its prompt, seed and key; on a CPU in float32 on nothing else, elsewhere on what is read together
as far as last bits go (see lean.py and blocks.py). Every device decodes by blocks: the manifest records it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from cai_experiment.engines.base import Completion
from cai_experiment.engines.common import Request, give_memory_back
from cai_experiment.engines.generate import GenerateEngine
from cai_experiment.engines.load import LoadSettings, renderer_for
from cai_experiment.engines.render import Renderer
from cai_experiment.ensemble.decode import BATCH, Counts, DecodeSettings, decode
from cai_experiment.ensemble.weigh import weigh
from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import ModelChoice

if TYPE_CHECKING:
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

MODES = ("select", "mixture")
AHEAD = 4  # batches of prompts in one call of `decode`: a row that ends early makes room for the next one


class EnsembleEngine(GenerateEngine):
    """Speaks with all experts, token by token. Batches are gathered as `GenerateEngine` does it.

    A prompt that makes its batch fail comes back as its own error; out of memory, fewer prompts are taken at a time.
    """

    name = "ensemble"
    model: MultiModelWithScalarHeads

    def __init__(
        self, model: MultiModelWithScalarHeads, tokenizer: Any, renderer: Renderer, batch_size: int | None = None,
        facts: dict[str, object] | None = None, mode: str = "select", accelerate: bool = True,
    ) -> None:  # fmt: skip
        """`batch_size`: rows in one pass (None: decode's own). `facts` go into `describe`. BadInputError: a mode that
        does not decode by the heads.
        """
        if mode not in MODES:
            raise BadInputError(f"mode {mode} is unknown", f"use one of {', '.join(MODES)}")
        self.rows = batch_size or BATCH
        super().__init__(model, tokenizer, renderer, AHEAD * self.rows, facts)
        self.ends = frozenset(renderer.stop_token_ids)  # the layout's end beside the model's own
        self.mode, self.accelerate = mode, accelerate
        self.counts = Counts(passes=[0] * len(model.experts))

    @property
    def width(self) -> int:
        """How many prompts it wants at a time."""
        return self.batch_size

    def describe(self) -> dict[str, object]:
        """What the manifest records. There is no probe: a batch's shape may change the last bits here."""
        return {
            "model": "ensemble",
            **self.facts,
            "engine": self.name,
            "mode": self.mode,
            "accelerate": self.accelerate,  # off a CPU in float32 it may change a token where two are nearly as likely
            "experts": list(self.model.names),
            "weights_sha256": weights_of(self.model),
            "quantization": self.model.experts[0].precision,
            "layout": self.renderer.layout,
            "dtype": str(self.model.experts[0].model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "max_length": self.renderer.max_length,
            "slots": self.rows,
            "probe": None,
        }

    @torch.inference_mode()
    def _speak(self, batch: list[Request]) -> list[Completion]:
        verdicts = [request for request in batch if request.option_ids]
        done = weigh(self.model, verdicts, self.mode) if verdicts else []
        spoken = sorted((request for request in batch if not request.option_ids), key=_drawn_by)
        for (temperature, seed), run in groupby(spoken, key=_drawn_by):
            done += self._decode(list(run), temperature, seed)
        return done

    def _decode(self, run: Sequence[Request], temperature: float, seed: int) -> list[Completion]:
        """Texts of prompts that are drawn alike."""
        settings = DecodeSettings(
            mode=self.mode, temperature=temperature, seed=seed, accelerate=self.accelerate,
            batch_size=min(self.rows, self.batch_size), ends=self.ends,
        )  # fmt: skip
        spoken, counts = decode(
            self.model,
            [request.ids.tolist() for request in run],
            settings,
            [request.prompt.sampling.key or request.prompt.id for request in run],
            self.renderer.stop_strings,
            [request.prompt.sampling.max_tokens for request in run],
        )
        self._count(counts)
        return [
            Completion(request.prompt.id, one.text, one.finish, len(request.ids), len(request.ids), len(one.ids))
            for request, one in zip(run, spoken, strict=True)
        ]

    def _count(self, counts: Counts) -> None:
        """Add what a call of `decode` took to `counts`."""
        mine = self.counts
        mine.passes = [a + b for a, b in zip(mine.passes, counts.passes, strict=True)]
        for name in ("tokens", "prompts", "block_passes", "drafted", "accepted", "row_passes", "seconds"):
            setattr(mine, name, getattr(mine, name) + getattr(counts, name))

    def release_for_training(self) -> tuple[Any, Any]:
        """Raises BadInputError: the experts are frozen."""
        raise BadInputError("an ensemble's experts are frozen, and none of them is trained",
                            f"train one of them: --model {self.model.names[0]}")  # fmt: skip

    def close(self) -> None:
        """Forget experts and heads and give their memory back."""
        self.model = self.tokenizer = None  # type: ignore[assignment]
        give_memory_back()


def open_engine(
    model: MultiModelWithScalarHeads, choice: ModelChoice, settings: LoadSettings, mode: str = "select"
) -> EnsembleEngine:
    """The engine over a loaded ensemble: layout, context and batch as `settings` ask for, a name for the manifest."""
    first = next(expert for expert in model.experts if expert.tokenizer is model.tokenizer).model
    renderer = renderer_for(first.config, first.generation_config, model.tokenizer, choice, settings)
    renderer.max_length = min(renderer.max_length, model.context)
    facts: dict[str, object] = {"model": choice.name}
    return EnsembleEngine(model, model.tokenizer, renderer, settings.batch_size, facts, mode)


def weights_of(model: MultiModelWithScalarHeads) -> str:
    """SHA-256 that tells these heads over these experts from any others."""
    digest = hashlib.sha256("\n".join(expert.weights for expert in model.experts).encode())
    for name, tensor in model.heads.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _drawn_by(request: Request) -> tuple[float, int]:
    return request.prompt.sampling.temperature, request.prompt.sampling.seed
