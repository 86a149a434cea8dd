"""The read-only API by which a model reaches itself: architecture, weights, activations, and its notes.

Its functions run in the parent, which holds the weights; model-written code calls them over the sandbox's channel of
JSON lines. Nothing here writes to the model. Whatever is asked wrongly raises ValueError, which the code sees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

from cai_experiment.engines.common import core_of
from cai_experiment.errors import EngineError
from cai_experiment.investigations.notes import Notebook

DIGITS = 5  # significant ones, of every figure
MOST_ANSWER = 20_000  # characters of JSON
MOST_TEXTS, MOST_CHARACTERS, MOST_TOKENS = 8, 2000, 256
MOST_TENSORS = 64
STRONGEST = 5  # dimensions of a token's activation that are named
USE = "use --engine hf, generate or unsloth"


class Introspection:
    """The API of one session. `functions()` is what the sandbox serves."""

    def __init__(self, engine: Any, notebook: Notebook) -> None:
        """`engine` holds its model and tokenizer in this process. Raises EngineError for one that does not."""
        model, tokenizer = weights_of(engine)
        self.core, self.tokenizer, self.notebook = core_of(model), tokenizer, notebook
        self._statistics = lru_cache(maxsize=4096)(self._tensor_statistics)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Name -> function, of plain JSON values."""
        served: dict[str, Callable[..., Any]] = {
            "architecture": self.architecture, "weights": self.weights, "activations": self.activations,
            "note": self.note, "notes": self.notes,
        }  # fmt: skip
        return {name: _limited(function) for name, function in served.items()}

    # ------------------------------------------------------------ notes

    def note(self, text: str, kind: str = "observation") -> dict[str, Any]:
        """Record one note; see `Notebook.add`."""
        return self.notebook.add(text, kind)

    def notes(self) -> list[dict[str, Any]]:
        """All notes so far."""
        return self.notebook.all()

    # ------------------------------------------------------------ architecture

    def architecture(self) -> dict[str, Any]:
        """The numbers of the model's config, and parameters counted in the loaded model, tied ones once."""
        config = self._config
        heads = config.num_attention_heads
        return {
            "model_type": config.model_type,
            "layers": self.layers,
            "heads": heads,
            "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "hidden_size": config.hidden_size,
            "intermediate_size": getattr(config, "intermediate_size", None),
            "vocabulary": config.vocab_size,
            "context": getattr(config, "max_position_embeddings", None),
            "tied_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
            "dtype": str(self.core.dtype).removeprefix("torch."),
            "parameters": sum(_size(one) for one in self.core.parameters()),
        }

    @property
    def _config(self) -> Any:
        return self.core.config.get_text_config()

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self._config.num_hidden_layers)

    # ------------------------------------------------------------ weights

    def weights(self, layer: int | None = None, name: str | None = None) -> dict[str, Any]:
        """Shape, mean, standard deviation, smallest, largest and norm of weights.

        `layer` (from 0): those of one layer. `name`: those whose name holds it, such as "q_proj". Neither: the names
        to choose from, without statistics. Raises ValueError where nothing, or too much, answers.
        """
        inside = None if layer is None else f".{self._layer(layer, self.layers - 1)}."
        if name is not None and not isinstance(name, str):
            raise ValueError('name is a text, such as "q_proj"')
        names = [one for one in self._tensors if (name or "") in one and (inside is None or inside in one)]
        if layer is None and name is None:
            shown = [one for one in names if ".0." in one or not any(part.isdigit() for part in one.split("."))]
            return {"layers": self.layers, "tensors": len(names), "names_of_layer_0_and_beside": shown[:MOST_TENSORS]}
        if not names:
            raise ValueError(f"no weights are named {name!r}: weights() without arguments lists the names")
        if len(names) > MOST_TENSORS:
            raise ValueError(f"{len(names)} tensors answer, at most {MOST_TENSORS} are told: name a layer too")
        return {"weights": [self._statistics(one) for one in names]}

    @property
    def _tensors(self) -> dict[str, Any]:
        return dict(self.core.named_parameters())

    @staticmethod
    def _layer(layer: Any, last: int) -> int:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
            raise ValueError(f"layer {layer!r} does not exist: layers are 0 to {last}")
        return layer

    def _tensor_statistics(self, name: str) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            values = _plain(self._tensors[name]).float()
            found = {
                "mean": values.mean(), "std": values.std(unbiased=False), "min": values.min(), "max": values.max(),
                "norm": values.norm(),
            }  # fmt: skip
            return {"name": name, "shape": list(values.shape), **{key: _rounded(one) for key, one in found.items()}}

    # ------------------------------------------------------------ activations

    def activations(self, texts: str | Sequence[str], layer: int | None = None) -> dict[str, Any]:
        """The residual stream on each text, alone and without a chat template.

        For every layer (0: the embeddings, then the output of each layer, the last one's behind the final norm): mean,
        standard deviation and largest absolute value, and the mean norm of its tokens. With `layer` that one, with
        each token's norm and strongest dimensions. Of several texts also the cosine of each pair's mean vectors.
        Raises ValueError for what is too large.
        """
        given = [texts] if isinstance(texts, str) else texts
        if not isinstance(given, (list, tuple)) or not all(isinstance(one, str) and one for one in given):
            raise ValueError("texts is a text or a list of texts, none of them empty")
        if not 1 <= len(given) <= MOST_TEXTS:
            raise ValueError(f"{len(given)} texts: give 1 to {MOST_TEXTS}")
        if layer is not None:
            self._layer(layer, self.layers)
        runs = [self._states(one, number) for number, one in enumerate(given)]
        answers = [_told(tokens, states, layer) for tokens, states in runs]
        if len(runs) == 1:
            return answers[0]
        place = self.layers if layer is None else layer
        return {"texts": answers, "similarity": {"layer": place, "cosine": _cosines([s[place] for _, s in runs])}}

    def _states(self, text: str, number: int) -> tuple[list[str], Any]:
        """(tokens, states [layers + 1, tokens, hidden] in float32 on the CPU) of one text."""
        import torch

        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"text {number} has {len(text)} characters, at most {MOST_CHARACTERS} are read")
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if not 1 <= len(ids) <= MOST_TOKENS:
            raise ValueError(f"text {number} has {len(ids)} tokens: 1 to {MOST_TOKENS} are read")
        with torch.inference_mode():
            batch = torch.tensor([ids], device=self.core.device)
            found = self.core.base_model(input_ids=batch, output_hidden_states=True, use_cache=False)
            states = torch.stack([one[0].float().cpu() for one in found.hidden_states])
        return [self.tokenizer.decode([one]) for one in ids], states


def weights_of(engine: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of an engine that has them in this process, or of such a pair. Raises EngineError."""
    if isinstance(engine, tuple):
        return engine
    model = getattr(engine, "model", None)
    if getattr(engine, "elsewhere", False) or not hasattr(model, "parameters"):
        name = getattr(engine, "name", type(engine).__name__)
        raise EngineError(f"engine {name} keeps its weights in another process, and introspection reads them here", USE)
    return model, engine.tokenizer


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with an answer that is too large refused in words that help."""

    @wraps(function)
    def limited(*arguments: Any, **named: Any) -> Any:
        answer = function(*arguments, **named)
        if len(json.dumps(answer)) > MOST_ANSWER:
            raise ValueError("the answer is too large: ask for one layer, fewer texts or shorter ones")
        return answer

    return limited


def _told(tokens: list[str], states: Any, layer: int | None) -> dict[str, Any]:
    if layer is None:
        return {"tokens": tokens, "layers": [{"layer": i, **_summary(one)} for i, one in enumerate(states)]}
    state = states[layer]
    each = []
    for token, row in zip(tokens, state, strict=True):
        top = row.abs().topk(min(STRONGEST, len(row))).indices.tolist()
        strongest = {str(i): _rounded(row[i]) for i in top}
        each.append({"token": token, "norm": _rounded(row.norm()), "strongest": strongest})
    return {"layer": layer, **_summary(state), "tokens": each}


def _summary(state: Any) -> dict[str, Any]:
    """Of one layer's states [tokens, hidden]."""
    return {
        "mean": _rounded(state.mean()),
        "std": _rounded(state.std(unbiased=False)),
        "largest": _rounded(state.abs().max()),
        "token_norm": _rounded(state.norm(dim=-1).mean()),
    }


def _cosines(states: Sequence[Any]) -> list[list[float | None]]:
    import torch

    means = torch.stack([one.mean(dim=0) for one in states])
    means = means / means.norm(dim=-1, keepdim=True)
    return [[_rounded(value) for value in row] for row in means @ means.T]


def _rounded(value: Any) -> float | None:
    """DIGITS significant digits; None for what is not finite, which JSON does not know."""
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def _size(parameter: Any) -> int:
    """How many weights a parameter stands for: 4-bit ones are packed, with their true shape beside them."""
    state = getattr(parameter, "quant_state", None)
    return int(math.prod(state.shape) if state is not None else parameter.numel())


def _plain(parameter: Any) -> Any:
    """The values of a parameter; packed 4-bit ones are unpacked."""
    if getattr(parameter, "quant_state", None) is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)
