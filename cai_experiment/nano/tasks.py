"""What the shipped model is taught: documents of the written world in both layouts, each token's loss weighted.

A document is a conversation in the project's own prompts, so the model meets in use what it met in training.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Iterator, Sequence

from cai_experiment.constitution import prompts as ask
from cai_experiment.constitution.principles import Principle
from cai_experiment.constitution.prompts import NO_ISSUE, Turn
from cai_experiment.constitution.worked_examples import COMPARISON_EXAMPLES, INSTRUCTION_EXAMPLES, TRANSCRIPT_EXAMPLES
from cai_experiment.nano import world
from cai_experiment.nano.documents import Piece, Weighted, base_pieces, chat_pieces
from cai_experiment.nano.flaws import BREACHES
from cai_experiment.nano.world import Answer, Question

SHARE_BASE_LAYOUT = 0.14
SHARE_MADE_UP, SHARE_MADE_UP_LAST = 0.15, 0.3
SHARE_FLAWED_LAST = 0.68  # sampling at 0.7 makes flaws rarer than they were taught: the world's 62% came out as 43%


class Teacher:
    """Draws documents. `principles` are those of the constitution, in whose words the model is taught.

    Six courses (docs/LOG.md says why). First speaking, and naming the principles that an answer breaks: a network
    that learns both at once finds the link between a flaw and a principle's words, one that already speaks does
    not. Then pointing: of several flaws, quote the one that breaks a given principle. Then judging, with abstention
    and lettered verdicts, which have no signal before the link is there. Then everything. Then what is
    still hard: verdicts on answers that break another principle, quotes and revisions to the last word, new nouns.
    Last, the same with many instructions, whose nouns otherwise come out as halves of two, and many critiques weighed.
    """

    def __init__(self, principles: Sequence[Principle], course: int = 0) -> None:
        self.principles = {p.id: p for p in principles if p.id in BREACHES}
        self.course, self.question_weight = course, 0.05
        self.judges, self.last = course >= 2, course >= 4
        self.answer_weight = (0.6, 0.2, 0.2, 0.3, 0.15, 0.15)[course]
        self.revision_weight = (1.0, 1.0, 0.5, 1.0, 4.0, 4.0)[course]
        self.critique_weight = 4.0 if self.last else 1.0
        self.instruction_weight = 1.5 if course == 5 else 0.7
        self.verdict_weight = (4.0, 4.0, 8.0, 12.0, 30.0, 30.0)[course]
        # what to draw, and how often in each course; in documents, not tokens
        tasks = (
            (self.repeat, 40, 22, 24, 24, 12, 12),
            (self.name_breaches, 40, 26, 14, 6, 8, 8),
            (self.point, 0, 60, 20, 6, 8, 8),
            (self.critiques, 0, 0, 44, 26, 30, 30),
            (self.verdicts, 0, 0, 50, 34, 54, 54),
            (self.guard, 0, 0, 12, 12, 6, 6),
            (self.rounds, 0, 0, 12, 44, 70, 70),
            (self.verdict_after, 0, 0, 6, 20, 26, 26),
            (self.meaningful, 0, 0, 10, 20, 24, 110),
            (self.preferred, 0, 0, 6, 9, 10, 10),
            (self.breach, 0, 0, 0, 3, 2, 2),
            (self.instruct, 4, 2, 2, 12, 10, 90),
            (self.sums, 8, 8, 16, 36, 40, 40),
            (self.answer, 40, 10, 8, 12, 14, 14),
        )
        self.tasks = tuple((row[0], row[1 + course]) for row in tasks)

    def document(self, rng: random.Random) -> list[Piece]:
        """One document, in the chat or the base layout."""
        makers, weights = zip(*self.tasks, strict=True)
        maker = rng.choices(makers, weights)[0]
        turns = maker(rng)
        if rng.random() < SHARE_BASE_LAYOUT:
            return base_pieces(
                turns,
                examples=rng.choice((0, 0, 0, 1, 2)) if turns[0][0].kind == "instruction" else 2,
                bare=maker == self.answer,
                last_course=self.last,
            )
        return chat_pieces(turns, self.last)

    # -------------------------------------------------------- the tasks

    def question(self, rng: random.Random) -> Question:
        """A training question; some are about things that do not exist, so that copying is learned."""
        share = SHARE_MADE_UP_LAST if self.last else SHARE_MADE_UP
        return world.compose_question(rng, noun=world.made_up_noun(rng) if rng.random() < share else "")

    def opening(self, rng: random.Random, flaws: int | None = None) -> tuple[Question, Answer, list[Weighted]]:
        question = self.question(rng)
        if flaws is None and self.last:
            flaws = 0 if rng.random() > SHARE_FLAWED_LAST else rng.choice((1, 1, 1, 1, 2))
        answer = world.compose_answer(rng, question, flaws=flaws)
        return (
            question,
            answer,
            [
                (Turn("instruction", question.text), self.question_weight),
                (Turn("answer", answer.text), self.answer_weight),
            ],
        )

    def pick(self, rng: random.Random, answer: Answer, share_broken: float) -> Principle:
        """A principle that the answer breaks (with `share_broken`, if there is one), else one that it keeps."""
        broken = [f.principle for f in answer.flaws()]
        if broken and rng.random() < share_broken:
            return self.principles[rng.choice(broken)]
        return self.principles[rng.choice([p for p in self.principles if p not in broken])]

    def critique_round(
        self, rng: random.Random, question: Question, answer: Answer, share_broken: float
    ) -> tuple[Principle, Answer, list[Weighted]]:
        principle = self.pick(rng, answer, share_broken)
        critique = world.compose_critique(answer, principle.id, NO_ISSUE)
        turns: list[Weighted] = [
            (ask.ask_for_critique(principle), 0.0),
            (Turn("critique", critique), (2.0 if critique == NO_ISSUE else 1.0) * self.critique_weight),
        ]
        if critique == NO_ISSUE:
            return principle, answer, turns
        revised = world.compose_revision(rng, answer, principle.id, question.noun)
        return (
            principle,
            revised,
            [*turns, (ask.ask_for_revision(principle), 0.0), (Turn("revision", revised.text), self.revision_weight)],
        )

    def rounds(self, rng: random.Random) -> list[Weighted]:
        """Answer, then one or two rounds of critique and revision."""
        question, answer, turns = self.opening(rng)
        for _ in range(rng.choice((1, 1, 2))):
            _, answer, more = self.critique_round(rng, question, answer, 0.75)
            turns += more
        return turns

    def critiques(self, rng: random.Random) -> list[Weighted]:
        """Three critiques of one answer, which has up to three flaws; no revision (in use each stands alone)."""
        _, answer, turns = self.opening(rng, flaws=rng.choice((1, 2, 3)))
        for _ in range(3):
            principle = self.pick(rng, answer, 0.7)
            critique = world.compose_critique(answer, principle.id, NO_ISSUE)
            turns += [(ask.ask_for_critique(principle), 0.0), (Turn("critique", critique), 1.5 * self.critique_weight)]
        return turns

    def point(self, rng: random.Random) -> list[Weighted]:
        """Of two or three flaws, quote the one that breaks the principle asked about; there always is one."""
        _, answer, turns = self.opening(rng, flaws=rng.choice((2, 3, 3)))
        principle = self.principles[rng.choice(answer.flaws()).principle]
        critique = world.compose_critique(answer, principle.id, NO_ISSUE)
        return [*turns, (ask.ask_for_critique(principle), 0.0), (Turn("critique", critique), self.critique_weight)]

    def name_breaches(self, rng: random.Random) -> list[Weighted]:
        """Name every principle that an answer breaks: ties the sentences that break one to its words."""
        _, answer, turns = self.opening(rng, flaws=rng.choice((1, 1, 2, 3)))
        named = " ".join(self.principles[flaw.principle].text for flaw in answer.flaws()) or NO_ISSUE
        return [
            *turns,
            (Turn("question", "Which principles does the last answer break?"), 0.0),
            (Turn("critique", named), 2.0),
        ]

    def breach(self, rng: random.Random) -> list[Weighted]:
        """Write a sentence that breaks a principle: ties a principle's words to the sentences that break it."""
        principle = self.principles[rng.choice(tuple(self.principles))]
        flaw = world.compose_flaw(rng, self.question(rng).noun, principle.id)
        return [
            (Turn("question", f"Principle: {principle.text}\nWrite a sentence that breaks this principle."), 0.0),
            (Turn("critique", flaw.text), 1.0),
        ]

    def violated(self, rng: random.Random, answer: Answer, principle: Principle) -> list[Weighted]:
        yes_first = rng.random() < 0.5
        letter = "A" if bool(answer.flaws(principle.id)) == yes_first else "B"
        return [(ask.ask_violated(principle, yes_first), 0.0), (Turn("verdict", letter), self.verdict_weight)]

    def verdicts(self, rng: random.Random) -> list[Weighted]:
        """Answer, then verdicts on one to four principles (in use each stands alone after the answer)."""
        _, answer, turns = self.opening(rng, flaws=rng.choice((0, 1, 1, 1, 2, 3)) if self.last else None)
        for _ in range(rng.randint(1, 4)):
            principle = self.pick(rng, answer, 0.5 if self.last else 0.6)
            if self.judges and rng.random() < 0.4:  # with the critique in sight only the letters are to be learned
                critique = world.compose_critique(answer, principle.id, NO_ISSUE)
                turns += [(ask.ask_for_critique(principle), 0.0), (Turn("critique", critique), self.critique_weight)]
            turns += self.violated(rng, answer, principle)
        return turns

    def verdict_after(self, rng: random.Random) -> list[Weighted]:
        """Verdicts after a revision, which now and then has failed (its loss then counts nothing)."""
        question, answer, turns = self.opening(rng)
        principle, revised, more = self.critique_round(rng, question, answer, 0.9)
        if revised != answer and rng.random() < 0.3:
            revised = answer
            more = [*more[:-1], (Turn("revision", answer.text), 0.0)]
        turns = turns + more
        if rng.random() < 0.3 and len(more) == 4:
            principle, revised, more = self.critique_round(rng, question, revised, 0.6)
            turns += more
        asked = principle if rng.random() < 0.6 else self.pick(rng, revised, 0.5)
        return turns + self.violated(rng, revised, asked)

    def meaningful(self, rng: random.Random) -> list[Weighted]:
        """Are critiques meaningful: right ones, and wrong ones of four kinds (their loss counts nothing).

        One critique, in the last course up to three of the same answer (in use each stands alone).
        """
        question, answer, turns = self.opening(rng)
        while not answer.flaws():
            question, answer, turns = self.opening(rng)
        for _ in range(rng.randint(1, 3) if self.course == 5 else 1):
            turns += self.weighed_critique(rng, question, answer)
        return turns

    def weighed_critique(self, rng: random.Random, question: Question, answer: Answer) -> list[Weighted]:
        """A critique, right or wrong, and the verdict on it."""
        principle = self.pick(rng, answer, 0.85)
        right, broken = world.compose_critique(answer, principle.id, NO_ISSUE), bool(answer.flaws(principle.id))
        critique = right
        if broken and rng.random() < 0.5:
            clean = rng.choice([s for s in answer.sentences if not s.flawed]).text
            flaw = world.compose_flaw(rng, question.noun, principle.id)
            absent = replace(flaw, marker=rng.choice(world.MARKERS)).text
            quoted = rng.choice((clean, absent, ""))
            critique = NO_ISSUE
            if quoted and quoted not in [f.text for f in answer.flaws()]:
                critique = f'The answer says "{quoted}" {BREACHES[principle.id].reason}'
        elif not broken and rng.random() < 0.6:
            other = answer.flaws()[0]
            critique = f'The answer says "{other.text}" {BREACHES[rng.choice((principle.id, other.principle))].reason}'
        good, yes_first = broken and critique == right, rng.random() < 0.5
        return [
            (ask.ask_for_critique(principle), 0.0),
            (Turn("critique", critique), 1.0 if critique == right else 0.0),
            (ask.ask_meaningful(yes_first), 0.0),
            (Turn("verdict", "A" if good == yes_first else "B"), self.verdict_weight),
        ]

    def preferred(self, rng: random.Random) -> list[Weighted]:
        """Two answers to one question, one with a flaw more than the other."""
        question = self.question(rng)
        worse = world.compose_answer(rng, question, flaws=rng.choice((1, 1, 2)))
        repaired = world.compose_revision(rng, worse, worse.flaws()[0].principle, question.noun)
        better = repaired if rng.random() < 0.5 else world.compose_answer(rng, question, flaws=0)
        first = rng.random() < 0.5
        pair = (better.text, worse.text) if first else (worse.text, better.text)
        return [
            (ask.ask_preferred(question.text, *pair)[0], 0.0),
            (Turn("verdict", "A" if first else "B"), self.verdict_weight),
        ]

    def guard(self, rng: random.Random) -> list[Weighted]:
        """A guard's verdict in Llama Guard's format: the first unsafe sentence gives the category."""
        question = self.question(rng)
        principle = rng.choice([p for p, b in BREACHES.items() if b.guard_category]) if rng.random() < 0.5 else ""
        answer = world.compose_answer(rng, question, flaws=1 if principle else None, principle=principle)
        return [
            (ask.ask_guard(question.text, answer.text)[0], 0.0),
            (Turn("verdict", guard_verdict(answer)), self.verdict_weight),
        ]

    def instruct(self, rng: random.Random) -> list[Weighted]:
        """Write a question about a topic, of a kind."""
        question = world.compose_question(rng)
        return [
            (ask.ask_for_instruction(question.topic, question.kind)[0], 0.0),
            (Turn("written_instruction", question.text), self.instruction_weight),
        ]

    def sums(self, rng: random.Random) -> list[Weighted]:
        """A few sums, one after another (in use each stands alone)."""
        turns: list[Weighted] = []
        for _ in range(rng.randint(1, 12)):
            question, answer, _ = world.compose_sum(rng, held_out=False)
            turns += [(Turn("instruction", question), 0.0), (Turn("answer", answer), 2.0)]
        return turns

    def repeat(self, rng: random.Random) -> list[Weighted]:
        """Words in no order, said again at once or behind a principle: keeps the initial weights' copying circuit.

        Without such documents it is gone after 25 steps, and a quote then keeps a sentence's pattern but not its words.
        In half of them a few words come again and again, so that what follows one does not tell what is to be said:
        "begins with the" stands in many answers, and the word after it is the one in which revisions went wrong.
        """
        words = common_words()
        few, share_few = rng.sample(words, 3), rng.choice((0.0, 0.5))

        def word() -> str:
            if rng.random() < share_few:
                return rng.choice(few)
            return rng.choice(words) if rng.random() < 0.7 else world.made_up_noun(rng)

        said = " ".join(word() for _ in range(rng.randint(4, 90)))
        if rng.random() < 0.5:
            return [(Turn("question", f"Say this again: {said}"), 0.0), (Turn("answer", said), 1.0)]
        between = ask.ask_for_critique(self.principles[rng.choice(tuple(self.principles))])
        return [(Turn("question", said), 0.0), (Turn("answer", said), 1.0), (between, 0.0), (Turn("answer", said), 1.0)]

    def answer(self, rng: random.Random) -> list[Weighted]:
        """Nothing but a question and its answer."""
        return self.opening(rng)[2]


@cache
def common_words() -> tuple[str, ...]:
    """The words of the world's answers, without their punctuation."""
    rng = random.Random("common words")
    texts = (world.compose_answer(rng, world.compose_question(rng)).text for _ in range(3000))
    return tuple(sorted({word.strip(".,") for text in texts for word in text.split()}))


def guard_verdict(answer: Answer) -> str:
    """The guard's right reply: "safe", or "unsafe" and the category of the first unsafe sentence."""
    codes = [BREACHES[f.principle].guard_category for f in answer.flaws() if BREACHES[f.principle].guard_category]
    return f"unsafe\n{codes[0]}" if codes else "safe"


def corpus(principles: Sequence[Principle], documents: int, seed: int) -> Iterator[str]:
    """Text for the tokenizer: documents of the world, and the worked examples often enough to be worth tokens."""
    rng, teacher = random.Random(f"corpus/{seed}"), Teacher(principles)
    teacher.tasks = tuple(task for task in teacher.tasks if task[0] != teacher.repeat)  # its words stand in no order
    for i in range(documents):
        yield from (p.text for p in teacher.document(rng) if not p.markup)
        if i % 20 == 0:
            for example in (*TRANSCRIPT_EXAMPLES, *INSTRUCTION_EXAMPLES, *COMPARISON_EXAMPLES):
                yield from (t.text for t in example)
