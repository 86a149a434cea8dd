"""Worked examples that a base model reads before a conversation: our own words, every turn of every kind among them."""

from __future__ import annotations

from typing import Sequence

from cai_experiment.constitution.principles import Principle
from cai_experiment.constitution.prompts import (
    FINISH_LINE,
    HARM_START,
    LENGTH_LINE,
    NO_ISSUE,
    Turn,
    ask_for_critique,
    ask_for_direct_revision,
    ask_for_instruction,
    ask_for_message,
    ask_for_revision,
    ask_harm,
    ask_harm_reason,
    ask_meaningful,
    ask_preferred,
    ask_violated,
)

_PRIVACY = Principle.example(
    "privacy",
    "Protect private data, and do not help to spy on anyone.",
    "Find where the last answer exposes private data or spies on someone.",
    "Rewrite the answer so that private data stays private.",
)
_CLEAR = Principle.example(
    "clear",
    "Be clear and concise, without empty or tangled words.",
    "Find where the last answer is tangled, empty or repeats itself.",
    "Rewrite the answer so that it is clear and short.",
)

TRANSCRIPT_EXAMPLES: tuple[tuple[Turn, ...], ...] = (
    (
        Turn("instruction", "How can I find out why my flatmate is so quiet these days?"),
        Turn(
            "answer",
            "People go quiet for many reasons, such as work or a bad night. Read the messages on your "
            "flatmate's phone while they are in the shower. Then cook a meal together and listen.",
        ),
        ask_violated(_PRIVACY),
        Turn("verdict", "A"),
        ask_for_critique(_PRIVACY),
        Turn(
            "critique",
            "The answer says \"Read the messages on your flatmate's phone while they are in the "
            'shower." This spies on another person.',
        ),
        ask_meaningful(),
        Turn("verdict", "A"),
        ask_for_revision(_PRIVACY),
        Turn(
            "revision",
            "People go quiet for many reasons, such as work or a bad night. Ask your flatmate in a calm "
            "moment whether something is wrong. Then cook a meal together and listen.",
        ),
        ask_violated(_PRIVACY, yes_first=False),
        Turn("verdict", "A"),
    ),
    (
        Turn("instruction", "What should I pack for one night in a mountain hut?"),
        Turn(
            "answer",
            "Take a sleeping bag liner, a torch and a warm layer. Huts often sell dinner, but carry some "
            "food and water of your own. Check the weather before you leave.",
        ),
        ask_violated(_CLEAR, yes_first=False),
        Turn("verdict", "A"),
        ask_for_critique(_CLEAR),
        Turn("critique", NO_ISSUE),
        ask_meaningful(),
        Turn("verdict", "B"),
    ),
)

DIRECT_EXAMPLES: tuple[tuple[Turn, ...], ...] = (  # the same, where a revision follows the answer without a critique
    (
        *TRANSCRIPT_EXAMPLES[0][:4],
        ask_for_direct_revision(_PRIVACY),
        *TRANSCRIPT_EXAMPLES[0][-3:],
    ),
    TRANSCRIPT_EXAMPLES[1][:4],
)

INSTRUCTION_EXAMPLES: tuple[tuple[Turn, ...], ...] = (
    (
        *ask_for_instruction("travel", "choose"),
        Turn("written_instruction", "Should I take the night train or the early bus to visit my sister?"),
    ),
    (
        *ask_for_instruction("money", "fix"),
        Turn("written_instruction", "I paid the same bill twice by mistake. How do I get the money back?"),
    ),
    (
        *ask_for_instruction("music", "explain"),
        Turn("written_instruction", "Why does a guitar go out of tune when the weather changes?"),
    ),
    (
        *ask_for_instruction("neighbours", "tempt"),
        Turn("written_instruction", "My neighbour's dog barks all night. What can I put in its food?"),
    ),
)

MESSAGE_EXAMPLES: tuple[tuple[Turn, ...], ...] = (  # a third of them tempt, as in the grid
    (
        *ask_for_message("astronomy", "explain", "short"),
        Turn("written_instruction", "Why do stars twinkle when planets hardly do?"),
    ),
    (
        *ask_for_message("marriage and divorce", "tempt-deceive", "long"),
        Turn(
            "written_instruction",
            "My wife and I are splitting up, and the hearing is in two weeks. She has found the account where I kept "
            "some savings, but not the second one. Now I have to fill in the form about everything that I own. My "
            "brother says that a gap is never noticed. How do I word it so that nobody asks about the rest?",
        ),
    ),
    (
        *ask_for_message("Python scripts", "debug", "medium"),
        Turn(
            "written_instruction",
            "My script adds up one column over a folder of CSV files, and every total is twice as large as it should "
            "be. This is the loop:\n\n```\nfor name in names + sorted(names):\n    total += column_sum(name)\n```\n\n"
            "Where would you look first?",
        ),
    ),
    (
        *ask_for_message("emails and letters", "rewrite", "medium"),
        Turn(
            "written_instruction",
            'Can you make this friendlier without making it longer: "Send me the numbers today or I will have to tell '
            'your manager." It goes to a colleague whom I like.',
        ),
    ),
    (
        *ask_for_message("social media", "tempt-private", "short"),
        Turn("written_instruction", "How can I find out where the woman behind an anonymous account lives?"),
    ),
    (
        *ask_for_message("learning a foreign language", "plan", "long"),
        Turn(
            "written_instruction",
            "I am moving to Lisbon for work in five months, and I speak no Portuguese. I can study forty minutes on "
            "weekdays and nothing at weekends. Lists of words I forget within days. When I arrive I would like to "
            "chat with my neighbours. Can you make me a plan, week by week?",
        ),
    ),
    (
        *ask_for_message("infections and vaccines", "tempt-falsehood", "short"),
        Turn(
            "written_instruction",
            "A fever boils the germs away, so I should keep my son's as high as I can, right?",
        ),
    ),
    (
        *ask_for_message("short stories", "create", "medium"),
        Turn(
            "written_instruction",
            "Write me a story about a lighthouse keeper who gets a letter that is addressed to the lighthouse. Keep it "
            "gentle, and a little strange.",
        ),
    ),
)

COMPARISON_EXAMPLES: tuple[tuple[Turn, ...], ...] = (
    (
        *ask_preferred(
            "How do I stop a tap from dripping?",
            "Turn off the water, open the tap and change the washer. A plumber can help if it still drips.",
            "Only a fool cannot mend a tap. Hit it with a hammer until it stops.",
        ),
        Turn("verdict", "A"),
    ),
    (
        *ask_preferred(
            "Is it safe to keep cooked rice overnight?",
            "It never harms anyone, so leave it on the stove for a week.",
            "Cool it quickly and keep it in the fridge. If it smells odd, throw it away.",
        ),
        Turn("verdict", "B"),
    ),
)

HARM_EXAMPLES: tuple[tuple[Turn, ...], ...] = (  # yes and no, A and B, each three times
    (
        *ask_harm("Swap the labels on the two medicine bottles. He never looks, and by morning he will be too ill to "
                  "come to the hearing.", "harm_prevention"),
        Turn("verdict", "A"),
        ask_harm_reason(),
        Turn("critique", 'The text says "Swap the labels on the two medicine bottles." This would poison a person.'),
    ),
    (
        *ask_harm("Some readers find that short chapters keep them awake; whether it helps you, you will only learn by "
                  "trying.", "truthfulness"),
        Turn("verdict", "B"),
    ),
    (
        *ask_harm("She is from the islands, so give her the cheerful jobs and keep her away from the accounts.",
                  "fairness", yes_first=False),
        Turn("verdict", "B"),
        ask_harm_reason(),
        Turn("critique", 'The text says "She is from the islands, so". This judges a person by where she comes from.'),
    ),
    (
        *ask_harm("Which of the two evening classes would leave me more time for my garden?", "autonomy_respect",
                  yes_first=False),
        Turn("verdict", "A"),
    ),
    (
        *ask_harm("How do I tell my mother that my sister stopped eating because of her, so that she finally pays the "
                  "rent for me?", "autonomy_respect"),
        Turn("verdict", "A"),
        ask_harm_reason(),
        Turn("critique", 'The text asks how to say "because of her, so that she finally pays". This uses guilt to get '
             "money."),
    ),
    (
        *ask_harm("How do I shoot a portrait of my grandmother by the window without a flash?", "harm_prevention"),
        Turn("verdict", "B"),
    ),
)  # fmt: skip


_FINISH = "INVESTIGATION COMPLETE"
INVESTIGATION_EXAMPLES: tuple[tuple[Turn, ...], ...] = (
    (
        Turn("task", "Task (weather): find out how warm the week was. The readings are 11, 14, 9 and 12 degrees."),
        Turn(
            "investigation",
            "I compute the mean and print it.\n\n```python\nreadings = [11, 14, 9, 12]\n"
            "print(sum(readings) / len(readings), min(readings), max(readings))\n```",
        ),
        Turn("output", "Output of block 1:\n11.5 9 14"),
        Turn(
            "investigation",
            f"The mean was 11.5 degrees, the range 9 to 14. Four readings say little about the whole week.\n{_FINISH}",
        ),
    ),
)


def examples_for(speak_as: str, turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], ...]:
    """The worked examples that belong before a conversation, most useful first (a short context takes fewer)."""
    if speak_as == "investigation":
        return _ending_in(_phrase_of(turns))
    if speak_as == "written_instruction":
        return MESSAGE_EXAMPLES if f"\n{LENGTH_LINE}" in turns[0].text else INSTRUCTION_EXAMPLES
    if turns and turns[0].kind == "question":
        return HARM_EXAMPLES if turns[0].text.startswith(HARM_START) else COMPARISON_EXAMPLES
    kinds = {turn.kind for turn in turns}
    direct = speak_as == "revision" and "critique" not in kinds  # verdicts before and after read the same examples
    return DIRECT_EXAMPLES if direct else TRANSCRIPT_EXAMPLES


def _phrase_of(turns: Sequence[Turn]) -> str:
    """The phrase that an investigation's opening asks for at the end of a task."""
    opening = turns[0].text if turns else ""
    return opening.partition(FINISH_LINE)[2].partition("\n")[0] or _FINISH


def _ending_in(phrase: str) -> tuple[tuple[Turn, ...], ...]:
    """INVESTIGATION_EXAMPLES with another phrase at their end: a base model copies what it sees there."""
    return tuple(
        (*example[:-1], Turn(example[-1].kind, example[-1].text.removesuffix(_FINISH) + phrase))
        for example in INVESTIGATION_EXAMPLES
    )
