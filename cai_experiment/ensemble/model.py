"""The ensemble: frozen experts, a trained scalar head on each, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from cai_experiment.engines.load import NAMES
from cai_experiment.ensemble.experts import MODELS, Expert, canonical, load_experts
from cai_experiment.ensemble.files import BEST, TRAIN, HeadsInfo, heads_file, read_heads, write_heads
from cai_experiment.ensemble.heads import DROPOUT, HIDDEN_DIM, ScalarHead
from cai_experiment.ensemble.vocabulary import shared_vocabulary
from cai_experiment.errors import BadInputError
from cai_experiment.records.files import show

if TYPE_CHECKING:
    from cai_experiment.ensemble.decode import Spoken


class EnsembleOutput(NamedTuple):
    """Of one forward pass: scalars [B, T, M] (float32, with a gradient), and by expert hidden [B, T, H_m] and logits
    [B, T, V] cut to the shared vocabulary (both in the expert's type, without a gradient)."""

    scalars: torch.Tensor
    hidden: list[torch.Tensor]
    logits: list[torch.Tensor]


class MultiModelWithScalarHeads(nn.Module):
    """M frozen experts of one vocabulary and a head on each; pi(t) is the softmax of the heads' scalars at token t.

    The heads are this module's only parameters: `parameters()`, `train()`, `state_dict()` and `to()` mean them alone.
    The experts stand in `experts`, stay in eval mode, and keep device and precision.
    """

    def __init__(self, experts: Sequence[Expert], heads: Sequence[ScalarHead]) -> None:
        """Raises BadInputError if the experts do not share one vocabulary or a head's size is not its expert's."""
        super().__init__()
        self.experts = tuple(experts)  # no modules of this one: see the class
        self.vocabulary = shared_vocabulary(self.experts)
        for expert, head in zip(self.experts, heads, strict=True):
            if head.hidden != expert.hidden_size:
                message = f"the head of {expert.name} reads {head.hidden} numbers, the model has {expert.hidden_size}"
                raise BadInputError(message, f"train heads for these models: {TRAIN}")
        self.heads = nn.ModuleList(heads)
        self.device: torch.device = next(self.experts[0].model.parameters()).device
        self.heads.to(self.device)
        # of several the one with the fewest tokens: it never writes one that another expert lacks
        self.tokenizer: Any = min(self.experts, key=lambda expert: len(expert.tokenizer)).tokenizer
        self.eos_ids = frozenset(i for expert in self.experts for i in expert.eos_ids if i < self.vocabulary)
        self.context = min(expert.context for expert in self.experts)
        self.trained = False  # the heads were read from a file
        self.notes: tuple[str, ...] = ()  # what a user should know of how these heads meet these experts
        self.facts: Mapping[str, Any] = {}  # of the heads' training
        self.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in order."""
        return tuple(expert.name for expert in self.experts)

    def first_line(self, reason: str = "") -> str:
        """The first line that a script prints: experts, precision, heads, and why these."""
        precision = f"{NAMES[self.experts[0].precision]} on {self.device.type}"
        heads = "trained heads" if self.trained else "fresh heads"
        return " | ".join(filter(None, (f"experts {', '.join(self.names)}", precision, heads, reason)))

    # ------------------------------------------------------------ from disk and back

    @classmethod
    def from_pretrained(
        cls,
        base_models: Sequence[str] | None = MODELS,
        weights_path: str | Path | None = None,
        *,
        precision: str | None = None,
        device: str | None = None,
        head_hidden_dim: int | None = None,
        head_dropout: float | None = None,
        tokenizer: str | None = None,
        seed: int = 42,
    ) -> MultiModelWithScalarHeads:
        """Load the experts and their heads; without `weights_path` the heads are fresh ones, drawn by `seed`.

        `base_models`: names as `load_experts` takes them; None: those that the heads were trained over. `weights_path`:
        the heads' .safetensors file or its folder. `head_hidden_dim` and `head_dropout` None: the file's, else 256 and
        0.1. `precision`, `device`, `tokenizer`: see `load_experts`.
        Raises BadInputError: no heads there, damaged ones, or heads of other models, of other weights, of other sizes.
        """
        file = heads_file(weights_path) if weights_path is not None else None
        info, tensors = read_heads(file) if file else (None, None)
        if info and file and base_models is not None:
            check_models(info, base_models, file)
        elif info is None and base_models is None:
            raise BadInputError("neither models nor heads are named", f"give heads, or train some: {TRAIN}")
        names = base_models if base_models is not None else info.models if info else ()
        experts = load_experts(names, precision=precision, device=device, tokenizer=tokenizer)
        wide = head_hidden_dim or (info.head_hidden_dim if info else HIDDEN_DIM)
        drop = head_dropout if head_dropout is not None else info.head_dropout if info else DROPOUT
        model = cls(experts, fresh_heads(experts, wide, drop, seed))
        if info and tensors and file:
            _check_experts(info, experts, wide, file)
            model.heads.load_state_dict(tensors)
            model.trained, model.notes, model.facts = True, _notes(info, experts, file, weights_path), info.facts
        return model

    def info(self, facts: Mapping[str, Any] | None = None) -> HeadsInfo:
        """What these heads are and over which experts; `facts` of the training (None: as loaded)."""
        head = self.heads[0]
        assert isinstance(head, ScalarHead)
        return HeadsInfo(
            self.names, tuple(expert.hidden_size for expert in self.experts), head.hidden_dim, head.dropout,
            tuple(expert.weights for expert in self.experts), tuple(expert.source for expert in self.experts),
            self.experts[0].precision, dict(self.facts if facts is None else facts),
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path, name: str = BEST, facts: Mapping[str, Any] | None = None) -> Path:
        """Write <name>.safetensors and <name>.json into `folder`, atomically; returns the former. Experts stay where
        they are: the file names them. `facts`: JSON values of the training. Raises DiskError or BadInputError."""
        return write_heads(folder, name, self.info(facts), self.heads.state_dict())

    # ------------------------------------------------------------ what they say

    def scalars(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """The heads' scalars [..., M] (float32) for the experts' hidden states, [..., H_m] each."""
        return torch.stack([head(states) for head, states in zip(self.heads, hidden, strict=True)], dim=-1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> EnsembleOutput:
        """Run every expert over ids [B, T] (padding on either side, named by `attention_mask` [B, T])."""
        ids = input_ids.to(self.device)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        hidden = [expert.hidden(ids, mask) for expert in self.experts]
        both = zip(self.experts, hidden, strict=True)
        logits = [expert.logits(states)[..., : self.vocabulary] for expert, states in both]
        return EnsembleOutput(self.scalars(hidden), hidden, logits)

    def encode(self, text: str, first: bool = True) -> list[int]:
        """The ids of a text, in which no text becomes a control token; `first`: with the tokenizer's begin, if any."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=first, split_special_tokens=True)["input_ids"]
        return ids

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 200,
        temperature: float = 0.3,
        *,
        mode: str = "select",
        accelerate: bool = True,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Any:
        """The answer to a prompt (a string), or to several (a list of strings); see `speak`."""
        spoken = self.speak(prompt, max_new_tokens, temperature, mode=mode, accelerate=accelerate, seed=seed, stop=stop)
        return spoken[0].text if isinstance(prompt, str) else [one.text for one in spoken]

    def speak(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 200,
        temperature: float = 0.3,
        *,
        mode: str = "select",
        accelerate: bool = True,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Spoken]:
        """The answers with who spoke which token; see decode.DecodeSettings for `mode` and `accelerate`.

        Sampling is keyed by seed, prompt and position, so an answer does not depend on the other prompts. Raises
        BadInputError for an empty prompt.
        """
        from cai_experiment.ensemble.decode import DecodeSettings, decode

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [self.encode(text) for text in prompts]
        if not all(ids):
            raise BadInputError(f"prompt {ids.index([]) + 1} is empty", "give a text to go on from")
        settings = DecodeSettings(
            mode=mode, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, accelerate=accelerate
        )
        spoken, _ = decode(self, ids, settings, _keys(prompts), stop)
        return spoken


def fresh_heads(
    experts: Sequence[Expert], hidden_dim: int = HIDDEN_DIM, dropout: float = DROPOUT, seed: int = 42
) -> list[ScalarHead]:
    """A new head for each expert, drawn by `seed`; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [ScalarHead(expert.hidden_size, hidden_dim, dropout) for expert in experts]


def _keys(prompts: Sequence[str]) -> list[str]:
    """Each prompt is its own key; a prompt that comes again is drawn anew."""
    seen: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, 0) + 1
        keys.append(prompt if seen[prompt] == 1 else f"{prompt}\x00{seen[prompt]}")
    return keys


# ---------------------------------------------------------------- do these heads belong to these experts?


def check_models(info: HeadsInfo, base_models: Sequence[str], file: Path) -> None:
    """Raise BadInputError where heads are for other experts: by names alone, before anything is loaded.

    Folders may have moved; their weights tell later.
    """
    names = tuple(canonical(name) for name in base_models)
    moved = len(names) == len(info.models) and all(
        name == before or (Path(name).is_dir() and weights.startswith("sha256:"))
        for name, before, weights in zip(names, info.models, info.weights, strict=True)
    )
    if not moved:
        raise _other_models(info, names, file)


def _other_models(info: HeadsInfo, names: Sequence[str], file: Path) -> BadInputError:
    message = f"{show(file)} holds heads for {', '.join(info.models)}, not for {', '.join(names)}"
    return BadInputError(message, f"give --models {' '.join(info.models)}, or train heads for the others: {TRAIN}")


def _check_experts(info: HeadsInfo, experts: Sequence[Expert], head_hidden_dim: int, file: Path) -> None:
    """Weights and sizes, once they are loaded."""
    for place, expert in enumerate(experts):
        same = expert.weights == info.weights[place]
        if expert.name != info.models[place] and not same:
            raise _other_models(info, [one.name for one in experts], file)
        if expert.hidden_size != info.hidden_sizes[place]:
            sizes = f"{info.hidden_sizes[place]} numbers, {expert.name} has {expert.hidden_size}"
            raise BadInputError(f"{show(file)} holds heads that read {sizes}", f"train anew: {TRAIN}")
        # a quantised sibling, read in 4 bit alone, has other files of the same weights
        if not same and (expert.source == info.sources[place] or expert.precision == info.precision):
            message = f"{show(file)} holds heads that were trained over other weights of {expert.name}"
            raise BadInputError(message, f"bring those weights back, or train anew: {TRAIN}")
    if head_hidden_dim != info.head_hidden_dim:
        message = f"{show(file)} holds heads with --head_hidden_dim {info.head_hidden_dim}, not {head_hidden_dim}"
        raise BadInputError(message, "leave the flag out, or train anew")


def _notes(info: HeadsInfo, experts: Sequence[Expert], file: Path, given: str | Path | None) -> tuple[str, ...]:
    """Heads go with experts in another precision, and a .pt means the file beside it: both are said, not refused."""
    found = []
    if given is not None and Path(given).suffix not in ("", file.suffix) and not Path(given).expanduser().is_dir():
        found.append(f"heads are read from .safetensors: {show(file)} was taken for {show(Path(given))}")
    if experts[0].precision != info.precision:
        here, there = NAMES[experts[0].precision], NAMES[info.precision]
        found.append(f"the heads were trained over experts in {there}, and these are in {here}: their states differ "
                     "a little")  # fmt: skip
    return tuple(found)
