"""The shipped model's tokenizer: a small byte-level BPE that AutoTokenizer rebuilds exactly.

For `model_type: qwen2` transformers rebuilds a Qwen2Tokenizer with Qwen's own pre-tokenizer, whatever was saved; so
this one is trained with that very pre-tokenizer (NFC, Qwen2's pattern, byte level), and a test holds them equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterable, Sequence

from cai_experiment.nano.tasks import Piece

VOCABULARY = 3072
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], folder: Path, vocabulary: int = VOCABULARY, eos: str = "<|im_end|>"
) -> Any:
    """Train one of `vocabulary` tokens on `texts`, save it into `folder`, return it as AutoTokenizer will load it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoTokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

    raw = Tokenizer(models.BPE(byte_fallback=False))
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    model = json.loads(raw.to_str())["model"]
    # pairs, as tokenizers wants them; transformers' annotation says strings
    merges: Any = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token=None,  # type: ignore[arg-type]  # bytes cover everything
        eos_token=eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL[1:] if token != eos],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class PieceEncoder:
    """Encodes pieces one by one, as the engines do; requests that recur are encoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[tuple[str, bool], list[int]] = {}

    def encode(self, text: str, markup: bool) -> list[int]:
        """Token ids of one piece; text that is not markup never becomes a special token."""
        if (text, markup) not in self.known:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not markup)["input_ids"]
            if len(self.known) > 200_000:
                self.known.clear()
            self.known[text, markup] = ids
        return self.known[text, markup]

    def document(self, pieces: Sequence[Piece]) -> tuple[list[int], list[float], list[bool]]:
        """(token ids, loss weight of each token, whether it counts by its difficulty)."""
        ids: list[int] = []
        weights: list[float] = []
        focal: list[bool] = []
        for piece in pieces:
            got = self.encode(piece.text, piece.markup)
            ids += got
            lead = min(len(got), piece.lead_tokens) if piece.lead != 1.0 else 0
            weights += [piece.weight * piece.lead] * lead + [piece.weight] * (len(got) - lead)
            focal += [piece.focal] * len(got)
        return ids, weights, focal
