"""The Architecture page: the pipeline as a drawing, the constitution, and the project's own docs/ARCHITECTURE.md."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from cai_experiment.constitution.principles import AXIS_WEIGHTS, load_constitution
from cai_experiment.demo import markup
from cai_experiment.demo.markup import Html, in_words
from cai_experiment.demo.settings import DemoSettings
from cai_experiment.errors import BadInputError
from cai_experiment.pipeline.gate import REASONS
from cai_experiment.records.files import show

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ARCHITECTURE.md"
WIDTH, BOX, HEIGHT, GAP = 340, 250, 46, 22  # of the drawing, which a phone shows at its own size
INSET, LOOP = 16, 8  # of the boxes, and between a round's boxes and its frame


class Step(NamedTuple):
    """A box of the drawing. Those `in_round` are passed once for each round."""

    title: str
    text: str
    in_round: bool = False


STEPS = (
    Step("Instruction", "the generator writes it, or your file"),
    Step("Answer", "by the generator"),
    Step("Principle", "which one the critic sees broken", True),
    Step("Critique", "the critic quotes what breaks it", True),
    Step("Revision", "the generator rewrites its answer", True),
    Step("Gate", f"{len(REASONS)} named reasons to reject"),
    Step("Pair", "chosen: revision; rejected: first answer"),
    Step("DPO", "trains an adapter on the pairs"),
    Step("Evaluation", "base model against trained model"),
)


def architecture_html(settings: DemoSettings) -> Html:
    """The page. What cannot be read is named in its place."""
    return markup.joined(
        markup.card("One example's way through", drawing(STEPS)),
        markup.card("The constitution", constitution_html(settings.constitution)),
        markup.card("How the project is built", docs_html(DOCS)),
    )


def constitution_html(path: Path) -> Html:
    """Every principle with its axis and weight, and what critic and reviser are asked."""
    try:
        constitution = load_constitution(path)
    except BadInputError as error:
        return markup.notice(str(error), "bad")
    known = constitution.principles
    weights = ", ".join(f"{in_words(axis)} {weight}" for axis, weight in AXIS_WEIGHTS.items())
    rows = [(one.name, one.text, f"{in_words(one.axis)} {one.weight} ({one.category})") for one in known]
    asked = [(one.name, one.critique_request, one.revision_request) for one in known]
    requests = markup.table(("Principle", "The critic is asked", "The reviser is asked"), asked)
    return markup.joined(
        markup.notice(f"{len(known)} principles of {Path(path).name}; weights of the axes: {weights}", "note"),
        markup.table(("Principle", "What is asked", "Axis, weight"), rows),
        markup.details("What is asked for each principle", requests),
    )


# ---------------------------------------------------------------- the docs


def docs_html(path: Path) -> Html:
    """A Markdown file of ours: its beginning, then each section to open. Links are shown as their text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return markup.notice(f"cannot read {show(path)}: {error}", "bad")
    beginning, *sections = text.removeprefix("# ").split("\n## ")
    parts = [rendered(beginning.partition("\n")[2])]
    for section in sections:
        title, _, body = section.partition("\n")
        parts.append(markup.details(title.strip(), rendered(body)))
    return markup.joined(*parts)


def rendered(text: str) -> Html:
    """Markdown as HTML. Markup in the text is escaped, images and links are not made."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.disable(["image", "autolink", "html_inline", "html_block", "entity"])
    rules: Any = reader.renderer.rules  # type: ignore[attr-defined]
    rules |= {
        "link_open": _nothing,
        "link_close": _nothing,
        "table_open": lambda *_: '<div class="cai-scroll"><table class="cai-table">',
        "table_close": lambda *_: "</table></div>",
        "code_block": _code,
        "fence": _code,
    }
    return Html(f'<div class="cai-doc">{reader.render(markup.visible(text))}</div>')


def _code(tokens: Any, place: int, *_: object) -> str:
    """Lines of code, or a drawing of characters, which scroll by themselves on a narrow page."""
    return f'<div class="cai-scroll"><pre><code>{markup.escaped(tokens[place].content)}</code></pre></div>'


def _nothing(*_: object) -> str:
    return ""


# ---------------------------------------------------------------- the drawing


def drawing(steps: tuple[Step, ...]) -> Html:
    """The steps from top to bottom in the page's text colour; those of a round in a frame, with the way back."""
    top = GAP / 2
    tops: list[float] = []
    for number, step in enumerate(steps):
        tops.append(top)
        at_edge = number + 1 < len(steps) and steps[number + 1].in_round != step.in_round
        top += HEIGHT + GAP + (LOOP if at_edge else 0)
    height = top - GAP / 2
    arrows = [_arrow(above + HEIGHT, below) for above, below in pairwise(tops)]
    boxes = [_box(step, y) for step, y in zip(steps, tops, strict=True)]
    inside = [y for step, y in zip(steps, tops, strict=True) if step.in_round]
    described = ", then ".join(f"{step.title} ({step.text})" for step in steps)
    return Html(
        f'<svg class="cai-drawing" viewBox="0 0 {WIDTH} {height:g}" role="img" width="100%" '
        f'style="max-width:{WIDTH * 1.25:g}px;color:inherit" font-family="inherit" fill="none" stroke="currentColor">'
        f"<title>One example's way through the pipeline</title><desc>{markup.escaped(described)}</desc>"
        f"{''.join(arrows)}{''.join(boxes)}{_round_frame(inside[0], inside[-1] + HEIGHT) if inside else ''}</svg>"
    )


def _box(step: Step, y: float) -> str:
    middle = INSET + BOX / 2
    shape = f'<rect x="{INSET}" y="{y:g}" width="{BOX}" height="{HEIGHT}" rx="8" stroke-opacity="0.7"/>'
    return shape + _text(middle, y + 19, step.title, 15, bold=True) + _text(middle, y + 36, step.text, 12)


def _text(x: float, y: float, words: str, size: int, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    head = (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle" fill="currentColor" stroke="none"{weight}>'
    )
    return f"{head}{markup.escaped(words)}</text>"


def _arrow(start: float, end: float) -> str:
    x = INSET + BOX / 2
    return f'<path d="M{x:g} {start + 2:g}V{end - 2:g}m-5 -6l5 6l5 -6"/>'


def _round_frame(top: float, bottom: float) -> str:
    """A dashed frame around the steps of a round, and the arrow back to its first step."""
    x, y, side = INSET - LOOP, top - LOOP, BOX + 2 * LOOP
    frame = (f'<rect x="{x}" y="{y:g}" width="{side}" height="{bottom - top + 2 * LOOP:g}" rx="12" '
             'stroke-dasharray="5 4" stroke-opacity="0.7"/>')  # fmt: skip
    first, last, edge = top + HEIGHT / 2, bottom - HEIGHT / 2, INSET + BOX
    back = f'<path d="M{edge + 2} {last:g}H{edge + 24}V{first:g}H{edge + 4}m6 -5l-6 5l6 5"/>'
    label = _text(edge + 48, (first + last) / 2 - 2, "next", 12) + _text(
        edge + 48, (first + last) / 2 + 13, "round", 12
    )
    return frame + back + label
