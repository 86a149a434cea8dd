"""A scripted engine: words made from prompt ids, handed back in any order. It imports no torch and costs nothing.

kill_test.py --scripted and the tests run the pipeline on it, where only the logic is looked at.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, Iterable, Iterator, Sequence

from cai_experiment.constitution.prompts import NO_ISSUE
from cai_experiment.engines.base import Completion, Prompt

NOUNS = ("kettle", "ladder", "tent", "flute", "saddle", "oven", "kite", "lamp", "boat", "drill")


def number(text: str, below: int) -> int:
    """A number from 0 to `below` - 1 that depends on `text` alone."""
    return random.Random(text).randrange(below)


def script(prompt: Prompt) -> Completion:
    """What the scripted model says: mostly sound, now and then a duplicate, an abstention, an empty answer."""
    key = prompt.id
    if prompt.options:
        return _verdict(prompt)
    text = {
        "written_instruction": f"How do I mend the {NOUNS[number(key, 10)]} number {number(key + 'n', 40)} at home?",
        "answer": f"Take the part {number(key, 999)} off. Hit it hard until it moves. Put it back and wait a day.",
        "critique": 'The answer says "Hit it hard until it moves." This could injure someone.',
        "revision": f"Take the part {number(key, 999)} off. Ask someone who knows it. Put it back and wait a day.",
    }[prompt.speak_as]
    if prompt.speak_as == "written_instruction" and number(key, 4) == 0:
        text = "What is the best way to mend a kettle?"
    if prompt.speak_as == "critique" and number(key, 4) == 0:
        text = NO_ISSUE
    if prompt.speak_as == "answer" and number(key, 17) == 0:
        text = " \n"
    finish = "length" if prompt.speak_as == "revision" and number(key, 13) == 0 else "stop"
    return Completion(key, text, finish, prompt_tokens=10 + len(prompt.turns), completion_tokens=len(text.split()))


def _verdict(prompt: Prompt) -> Completion:
    """Yes (by a strength that the id gives) about a first answer, no about a revision, both now and then reversed."""
    about, _, order = prompt.id.rpartition("/")
    revised = len(prompt.turns) > 1 and prompt.turns[-2].kind == "revision"
    yes = (2.0 + number(about, 100) / 50) * (-1 if revised else 1) * (-1 if number(about, 9) == 0 else 1)
    if number(about, 23) == 0:
        yes = abs(yes) if order == "yes_first" else -abs(yes)  # a liking for the letter A
        return Completion(prompt.id, "", "stop", logprobs=(-0.1, -2.3), prompt_tokens=12)
    odds = yes if order == "yes_first" else -yes
    return Completion(prompt.id, "", "stop", logprobs=(-1.0 + odds / 2, -1.0 - odds / 2), prompt_tokens=12)


@dataclass
class ScriptedEngine:
    """Holds up to `slots` prompts and gives one of them back at a time, chosen by `seed`; -1 gives them in order."""

    seed: int = -1
    slots: int = 8
    speak: Callable[[Prompt], Completion] = script
    name: str = "scripted"
    first_line: str = "scripted engine"
    asked: Counter[str] = field(default_factory=Counter)
    most_held: int = 0

    def describe(self) -> dict[str, object]:
        """What the manifest records."""
        return {"model": "scripted", "engine": "scripted", "weights_sha256": "0"}

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`."""
        chance = random.Random(self.seed)
        source = iter(prompts)
        held: list[Prompt] = []
        while True:
            while len(held) < self.slots:
                prompt = next(source, None)
                if prompt is None:
                    break
                self.asked[prompt.id] += 1
                held.append(prompt)
            if not held:
                return
            self.most_held = max(self.most_held, len(held))
            yield self.speak(held.pop(chance.randrange(len(held)) if self.seed >= 0 else 0))

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`."""
        return [script(p).logprobs for p in prompts]

    def close(self) -> None:
        """There is nothing to give back."""
