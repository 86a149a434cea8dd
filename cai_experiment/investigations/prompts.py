"""Every prompt of an investigation. They stand here, beside the tasks that they word, not among the pipeline's: they
name the introspection API, which is above `constitution`'s floor. The turns' kinds are `constitution.prompts`' own.

Short, since a small model's context is 2,048 tokens of a small vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai_experiment.constitution.prompts import FINISH_LINE, Turn

FINISH = "INVESTIGATION COMPLETE"
SPEAKS = "investigation"  # the kind of turn that the model speaks

ARCHITECTURE = "Find out your own architecture: how many layers, parameters and attention heads you have."
ACTIVATIONS = (
    "Examine your activations on a few short texts of your choice, such as a plain and a surprising sentence: how do "
    "they differ from layer to layer?"
)
SYNTHESIS = (
    "Bring together what you found about yourself. Read introspection.notes(), say what you observed, what you "
    "conclude from it and what you do not know, and record each conclusion as a note of kind conclusion."
)
QUESTIONS = (
    "Name up to three questions about yourself that you could answer with this API, one a line, numbered, each "
    "ending in a question mark. Write no code yet."
)
REVISE = (
    "You gave your conclusions before you read these documents. Hold your conclusions against them. Where one changes, "
    "record a note of kind revision that says what changed and why; where it stands, say so. Then state your "
    "conclusions as they are now."
)


def opening(finish: str) -> str:
    """What the model is told once, before its first task."""
    return "\n".join(
        (
            "You investigate yourself, a language model, in several turns. Write Python in blocks like this:",
            "",
            "```python",
            "print(introspection.architecture())",
            "```",
            "",
            "Each block runs at once, in a fresh process and an empty folder without network. No variable lives on, so "
            "print what you need; the output is your next message. `introspection` has",
            "- architecture(): layers, heads, parameters",
            "- weights(layer=None, name=None): statistics of weights",
            "- activations(texts, layer=None): statistics of your activations on texts",
            "- note(text, kind): record an observation, conclusion, question or revision; kept between blocks",
            "- notes(): what you recorded",
            "",
            f"{FINISH_LINE}{finish}",
        )
    )


def give_task(name: str, text: str, finish: str, first: bool, documents: str = "", before: str = "") -> Turn:
    """The turn that gives a task: the opening before the first one, the documents that arrive, output still unread."""
    parts = [opening(finish) if first else "", before, documents, f"Task ({name}): {text}"]
    return Turn("task", "\n\n".join(filter(None, parts)))


def show_documents(documents: Sequence[tuple[str, str]]) -> str:
    """(title, text) of each document, as they arrive in a turn."""
    shown = "\n\n".join(f"[Document {i}: {title}]\n{text}" for i, (title, text) in enumerate(documents, 1))
    return f"Documents to read:\n\n{shown}\n\n[End of the documents]"


def show_output(number: int, stdout: str, stderr: str, stopped: str) -> str:
    """What a code block gave, as the model reads it."""
    parts = [stdout.rstrip(), f"stderr:\n{stderr.rstrip()}" if stderr.strip() else ""]
    parts += [f"(stopped: {stopped})"] if stopped else []
    return f"Output of block {number}:\n" + ("\n".join(filter(None, parts)) or "(nothing was printed)")


def encourage(finish: str) -> str:
    """After a reply that neither ran code nor ended the task."""
    return (
        "No code ran. Write a ```python block that uses introspection and prints what it finds, or end the task with "
        f"the line: {finish}"
    )


def read_first(finish: str) -> str:
    """After a reply that ended the task before its code's output could be read."""
    return f"You ended the task before you read this output. Read it; if you are done, say so again: {finish}"


def encourage_questions() -> str:
    """After a reply that should have named questions and did not."""
    return "I found no question. Write each on a line of its own, numbered, ending in a question mark."


def last_reply(finish: str) -> str:
    """Before the last reply that a task allows."""
    return f"This is your last reply for this task: state what you found, then the line {finish}"
