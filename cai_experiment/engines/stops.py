"""Where a completion ends: at a stop token, or exactly at a stop string in its decoded text."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np


class StopRule:
    """Finds the end of a completion. One rule serves all prompts of a renderer.

    A stop string may end in the middle of a token and may begin in one (".\\n\\n" is one token in Qwen2's vocabulary),
    so it is searched in the decoded text. Only a token that holds the last character of a stop string can complete
    one: `may_end` marks those, and only after them is text decoded at all.
    """

    def __init__(self, tokenizer: Any, stop_token_ids: Sequence[int], stop_strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)
        self.stop_strings = tuple(stop_strings)
        self._is_stop = self._table(self.stop_token_ids)
        self._may_end = self._table(self._ending_tokens())

    def _table(self, ids: Sequence[int]) -> np.ndarray:
        table = np.zeros(max([len(self.tokenizer), *(i + 1 for i in ids)]), dtype=bool)
        table[list(ids)] = True
        return table

    def _ending_tokens(self) -> list[int]:
        if not self.stop_strings:
            return []
        last = {stop[-1] for stop in self.stop_strings}
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return [i for i, text in enumerate(texts) if last & set(text)]

    def is_stop_token(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` end a completion by themselves; bool, same shape."""
        return self._look_up(self._is_stop, ids)

    def may_end(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` might complete a stop string; bool, same shape."""
        return self._look_up(self._may_end, ids)

    def _look_up(self, table: np.ndarray, ids: np.ndarray) -> np.ndarray:
        known = ids < len(table)  # a model's head may be wider than its tokenizer
        return table[np.where(known, ids, 0)] & known

    def text(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of a completion's tokens, cut exactly at the first stop token or string, and whether it was cut."""
        ids = list(ids)
        end = next((i for i, token in enumerate(ids) if token in self.stop_token_ids), None)
        whole = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        places = [place for stop in self.stop_strings if (place := whole.find(stop)) >= 0]
        if places:
            return whole[: min(places)], True
        # The last token may hold only a part of a character's bytes.
        return (whole if end is not None else whole.rstrip("\ufffd")), end is not None

    def settled(self, ids: Sequence[int]) -> str:
        """The text of a completion that is not over, without its last characters if a later token may cut them off or
        complete them: what may be the start of a stop string, and a part of a character's bytes.
        """
        text, ended = self.text(ids)
        if ended:
            return text
        starts = (stop[:size] for stop in self.stop_strings for size in range(len(stop) - 1, 0, -1))
        return text.removesuffix(max((start for start in starts if text.endswith(start)), key=len, default=""))
