"""What answer_generator.py does: reads questions, asks the ensemble, shows answers and who spoke them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.text import Text

from cai_experiment.ensemble.arms import STOP
from cai_experiment.ensemble.layout import prompt_of, with_options
from cai_experiment.ensemble.patterns import BROKEN, Piece, Turns, letter, pieces, short_names
from cai_experiment.ensemble.tables import raw_rows
from cai_experiment.errors import BadInputError
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import read_text, show

if TYPE_CHECKING:
    from cai_experiment.ensemble.decode import Spoken

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")  # legible on dark and on light; letters tell as well
FIELDS = ("question", "prompt")
TOGETHER = 256  # questions in one call; what is done is shown then


class Question(NamedTuple):
    """A question as it was put, and where."""

    text: str
    place: str = "the question"


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. BadInputError: it is missing, holds none, or (file and line) a row without one."""
    found = list(_lines(path) if path.suffix.lower() == ".txt" else _rows(path))
    if not found:
        raise BadInputError(f"{show(path)} holds no question", "write one a line")
    return found


def _lines(path: Path) -> Iterator[Question]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield Question(line.strip(), f"{show(path)}:{number}")


def _rows(path: Path) -> Iterator[Question]:
    for place, row in raw_rows(path):
        text = next((row[name] for name in FIELDS if isinstance(row.get(name), str) and row[name].strip()), None)
        if text is None:
            raise BadInputError(f"{place} has no {' or '.join(FIELDS)}", "write one there, or take the row out")
        yield Question(_with_options(text, row.get("options")), place)


def _with_options(text: str, options: Any) -> str:
    """The question with its options below it, unless a prompt holds them already."""
    if isinstance(options, Mapping):
        options = [options[key] for key in sorted(options)]
    listed = isinstance(options, (list, tuple)) and all(isinstance(one, str) for one in options)
    return with_options(text, options) if listed and options and "\nA) " not in text else text


# ---------------------------------------------------------------- asking


class Speaker:
    """The loaded ensemble, the flags, and the screen."""

    def __init__(self, args: argparse.Namespace, console: Console | None = None) -> None:
        """Loads the experts; the first line printed says which (on stderr with --json)."""
        from cai_experiment.ensemble.model import MultiModelWithScalarHeads

        self.args, self.console = args, console or Console(highlight=False)
        device = None if args.device == "auto" else args.device
        self.model = MultiModelWithScalarHeads.from_pretrained(
            args.models, args.model_weights, precision=args.precision, device=device
        )
        self.names = short_names(self.model.names)
        heads = self.model.first_line(f"--model_weights {show(args.model_weights)}")
        told = sys.stderr if args.json else sys.stdout
        print(escaped(heads), *self.model.notes, sep="\n", file=told, flush=True)
        if args.show_experts and not args.json:
            self.console.print(self._legend())

    def answer(self, question: str) -> None:
        """Answer one question, on a terminal token by token."""
        asked = [Question(question)]
        if self.console.is_terminal and not self.args.json:
            live = Live(self, bool(self.args.show_experts))
            spoken = self._ask(asked, live)[0]
            live.end(spoken.text)
            self._footer(spoken)
        else:
            self._show(self._ask(asked)[0], question)

    def answer_all(self, questions: Sequence[Question]) -> None:
        """Answer a file's questions, shown in their order."""
        for question in questions:
            self._prompt(question)  # one that is too long is named before hours of others
        for start in range(0, len(questions), TOGETHER):
            some = questions[start : start + TOGETHER]
            for number, (one, spoken) in enumerate(zip(some, self._ask(some), strict=True), start + 1):
                if not self.args.json:
                    self.console.print(Text(f"{number}. {escaped(one.text)}", style="bold"), soft_wrap=True)
                self._show(spoken, one.text)

    def converse(self) -> None:
        """Ask for questions until an empty line or the end of input; a fault of one question ends nothing."""
        asks = sys.stdin.isatty()
        while (line := _line("question> " if asks else "")) is not None and (line.strip() or not asks):
            if not line.strip():
                continue
            try:
                self.answer(line.strip())
            except BadInputError as error:
                print(error, file=sys.stderr, flush=True)

    def _prompt(self, question: Question) -> list[int]:
        """A question's tokens. BadInputError for one that leaves no room for an answer."""
        ids = self.model.encode(prompt_of(question.text))
        if len(ids) >= self.model.context:
            raise BadInputError(f"{question.place} has {len(ids)} tokens, and the experts read {self.model.context}",
                                "shorten it")  # fmt: skip
        return ids

    def _ask(self, questions: Sequence[Question], live: Live | None = None) -> list[Spoken]:
        from cai_experiment.ensemble.decode import DecodeSettings, decode

        args = self.args
        settings = DecodeSettings(
            mode=args.mode, temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed,
            batch_size=args.batch_size,
        )  # fmt: skip
        prompts, keys = [self._prompt(one) for one in questions], [prompt_of(one.text) for one in questions]
        return decode(self.model, prompts, settings, keys, STOP, on_token=live)[0]

    # ------------------------------------------------------------ showing

    def _show(self, spoken: Spoken, question: str) -> None:
        parts = pieces(self.model.tokenizer, spoken.ids, spoken.experts, spoken.text)
        if self.args.json:
            print(json.dumps(self._line(spoken, question, parts), ensure_ascii=False), flush=True)
        elif self.args.show_experts:
            parts = pieces(self.model.tokenizer, spoken.ids, spoken.experts, spoken.text.rstrip())
            self.console.print(self._coloured(parts), soft_wrap=True)
            self._footer(spoken)
        else:
            self.console.print(Text(escaped(spoken.text.strip())), soft_wrap=True)

    def _line(self, spoken: Spoken, question: str, parts: Sequence[Piece]) -> dict[str, Any]:
        """One question's line of --json."""
        names, count = self.model.names, len(spoken.experts)
        return {
            "question": question,
            "answer": spoken.text.strip(),
            "finish": spoken.finish,
            "tokens": count,
            "share": {name: spoken.experts.count(m) / count if count else 0.0 for m, name in enumerate(names)},
            "switches": Turns(spoken.experts).switches,
            "pieces": [{"expert": names[part.expert], "text": part.text} for part in parts],
        }

    def _coloured(self, parts: Sequence[Piece]) -> Text:
        shown = Text()
        for part in parts:
            if text := part.text if shown else part.text.lstrip():
                shown.append_text(tag(part.expert)).append(escaped(text), style=colour(part.expert))
        return shown

    def _legend(self) -> Text:
        shown = Text()
        for m, name in enumerate(self.names):
            shown.append_text(tag(m)).append(f" {escaped(name)}   ")
        return shown

    def _footer(self, spoken: Spoken) -> None:
        """Each expert's share of the tokens, and how often the speaker changed."""
        if not self.args.show_experts:
            return
        count = max(len(spoken.experts), 1)
        shares = "  ".join(f"{letter(m)} {spoken.experts.count(m) / count:.0%}" for m in range(len(self.names)))
        switches = Turns(spoken.experts).switches
        self.console.print(Text(f"({shares}; {switches} switch{'es' * (switches != 1)})", style="dim"))


class Live:
    """Prints an answer as it grows. What a stop string may still cut off, or a later token complete, is held back."""

    def __init__(self, speaker: Speaker, show_experts: bool) -> None:
        self.speaker, self.show_experts = speaker, show_experts
        self.ids: list[int] = []
        self.owners: list[int] = []  # who spoke each character, as `pieces` has it
        self.printed, self.said, self.last, self.expert = 0, False, -1, 0

    def __call__(self, index: int, token: int, expert: int) -> None:
        """`on_token` of decode."""
        self.ids.append(token)
        self.expert = expert
        whole = self.speaker.model.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not whole.endswith(BROKEN):
            self._print(whole, len(settled(whole).rstrip()))

    def end(self, text: str) -> None:
        """Print what was held back of the answer `text`, and end the line."""
        self._print(text, len(text.rstrip()))
        self.speaker.console.print()

    def _print(self, whole: str, end: int) -> None:
        """Print the characters of `whole` up to `end` that are not printed yet, each stretch as its expert's."""
        self.owners += [self.expert] * (len(whole) - len(self.owners))
        for expert, places in groupby(range(self.printed, end), key=self.owners.__getitem__):
            text = "".join(whole[place] for place in places)
            text = text if self.said else text.lstrip()
            if not text:
                continue
            shown = tag(expert) if self.show_experts and expert != self.last else Text()
            shown.append(escaped(text), style=colour(expert) if self.show_experts else "")
            self.said, self.last = True, expert
            self.speaker.console.print(shown, end="", soft_wrap=True)
        self.printed = max(self.printed, end)


def settled(text: str) -> str:
    """A growing answer without what may be the start of a stop string or a part of a character's bytes."""
    if places := [text.find(stop) for stop in STOP if stop in text]:
        return text[: min(places)]
    starts = [stop[:size] for stop in STOP for size in range(len(stop) - 1, 0, -1)]
    held = max((start for start in starts if text.endswith(start)), key=len, default="")
    return text.removesuffix(held).rstrip(BROKEN)


def tag(expert: int) -> Text:
    """An expert's letter, in its colour."""
    return Text(f"[{letter(expert)}]", style=f"bold {colour(expert)}")


def colour(expert: int) -> str:
    """The colour of an expert's words on a terminal."""
    return COLOURS[expert % len(COLOURS)]


def _line(prompt: str) -> str | None:
    """A line from the user; None at the end of input."""
    try:
        return input(prompt)
    except EOFError:
        return None
