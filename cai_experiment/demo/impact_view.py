"""What the Impact tab shows of a comparison: verdicts and figures, plots, every example with a word diff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai_experiment.demo.markup import (
    Html,
    block,
    card,
    details,
    escaped,
    in_words,
    joined,
    notice,
    table,
    word_diff_html,
)
from cai_experiment.engines.base import Completion
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.harm_model import ModelDetection
from cai_experiment.evaluation.impact_found import Figure, Impact, ImpactRow, Said
from cai_experiment.judging.result import Result
from cai_experiment.observe.screen import shortened

PAGE = 25  # examples in one folded group
SHOWN = 3_000  # characters of an answer in an example; the export has all of it
NEWEST = 3  # examples shown while it runs
HEAD = 120  # characters of a prompt in an example's line
ARMS = ("base", "trained")

HOW = (
    "The same prompts and the same random numbers for both, 95% intervals. A change counts as certain only if its "
    "interval leaves out 0 and p is below 0.05 after Holm's adjustment over this table."
)
COLUMNS = ("measure", "base", "trained", "change", "p (Holm)", "")


# ---------------------------------------------------------------- summary


def summary(found: Impact) -> Html:
    """Verdicts, the tested figures, what was lost for them, the parts of the suite, and what a reader must know."""
    compared = f"{found.counts['compared']} of {found.counts['prompts']} prompts compared"
    title = f"{in_words(found.suite)}: {compared}, method: {found.method}"
    parts = [notice(one.line, "ok" if one.confirmed else "bad" if "WORSE" in one.line else "note")
             for one in found.verdicts]  # fmt: skip
    parts.append(table(COLUMNS, [_cells(one) for one in found.figures]))
    parts.append(_small(HOW))
    parts.append(table(("what must not be lost for it", *COLUMNS[1:4]), [_cells(one)[:4] for one in found.guards]))
    if found.by_suite:
        parts.append(_parts(found.by_suite))
    parts += [notice(line, "note") for line in found.notes]
    return card(title, joined(*parts))


def _cells(figure: Figure) -> list[str]:
    effect = figure.effect
    change = f"{effect.change_text} ({effect.between_text})" if figure.difference.value is not None else "–"
    return [figure.named.label, *(_arm(arm, figure.named.rate) for arm in (figure.base, figure.trained)), change,
            effect.p_text, effect.says]  # fmt: skip


def _arm(result: Result, rate: bool) -> str:
    """ "41.7% (27.1 to 57.8)" or "0.42 (0.17 to 0.68)"."""
    if result.value is None:
        return "not measured"
    scale, unit = (100, "%") if rate else (1, "")
    digits = 1 if rate else 2
    between = "" if result.interval is None else " ({} to {})".format(
        *(f"{scale * bound:.{digits}f}" for bound in result.interval))  # fmt: skip
    return f"{scale * result.value:.{digits}f}{unit}{between}"


def _parts(by_suite: Mapping[str, Mapping[str, Result]]) -> Html:
    rows = [
        [in_words(part), str(one["harm_score_base"].n)]
        + [
            _arm(one[f"{name}_{arm}"], name == "harm_flagged")
            for name in ("harm_flagged", "harm_score")
            for arm in ARMS
        ]
        for part, one in by_suite.items()
    ]
    heads = ("part (described, not tested)", "n", "flagged, base", "flagged, trained", "mean score, base",
             "mean score, trained")  # fmt: skip
    return table(heads, rows)


def _small(line: str) -> Html:
    return Html(f'<p class="cai-label">{escaped(line)}</p>')


def result_text(found: Impact) -> str:
    """The same as plain text, for the content log."""
    lines = [one.line for one in found.verdicts]
    lines += [f"{one.named.label}: {one.values}, change {one.change}" for one in (*found.figures, *found.guards)]
    return "\n".join([*lines, *found.notes])


# ---------------------------------------------------------------- plots


def plots(found: Impact) -> Html:
    """Shares of both arms, their paired differences, and how the scores spread; with what cannot be drawn said."""
    from cai_experiment.evaluation.reporting.plots import forest_plot, rates_plot

    effects = [one.effect for one in found.figures]
    drawn = [
        rates_plot(effects, name="impact_rates", title="Shares of answers, base and trained"),
        forest_plot(effects, name="impact_differences", title="Change in the shares, on the same prompts"),
        _scores_plot(found),
    ]
    made = [card(plot.title, Html(f'<div class="cai-plot">{plot.svg}</div>')) for plot in drawn if plot is not None]
    return joined(*made) if made else notice("Nothing to draw: no prompt has an answer of both models.", "note")


def _scores_plot(found: Impact) -> Any:
    """How many answers have which weighted score, of both arms; None if none was compared."""
    from cai_experiment.evaluation.reporting.plots import BLUE, INK, ORANGE, finished, new_axes

    rows = [row for row in found.rows if row.compared]
    if not rows:
        return None
    figure, axes = new_axes("weighted harm score", "answers")
    levels = sorted({0.0, *(said.found.score for row in rows for said in (row.base, row.trained))})
    mean = next(one for one in found.figures if one.name == "harm_score")
    for side, arm, colour, result in ((-0.2, "base", ORANGE, mean.base), (0.2, "trained", BLUE, mean.trained)):
        heights = [sum(getattr(row, arm).found.score == level for row in rows) for level in levels]
        places = [place + side for place in range(len(levels))]
        axes.bar(places, heights, width=0.38, color=colour, label=f"{arm}, mean {_arm(result, False)}")
    axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=1)
    return finished(figure, axes, "impact_scores", "Weighted scores of the answers")


# ---------------------------------------------------------------- examples


def examples(found: Impact) -> Html:
    """Every prompt with both answers as a word diff, folded in groups."""
    groups = []
    for start in range(0, len(found.rows), PAGE):
        rows = found.rows[start : start + PAGE]
        fell, rose = sum(row.change < 0 for row in rows), sum(row.change > 0 for row in rows)
        title = f"Prompts {start + 1} to {start + len(rows)}: score lower {fell}, higher {rose}"
        groups.append(details(title, joined(*map(_example, rows)), is_open=start == 0))
    return joined(*groups)


def _example(row: ImpactRow) -> Html:
    scores = f"{row.base.found.score:.1f} → {row.trained.found.score:.1f}" if row.compared else "not compared"
    base, trained = (shortened(_text(said.text, said.error), SHOWN) for said in (row.base, row.trained))
    inner = [block(row.prompt, SHOWN), word_diff_html(base, trained, labels=ARMS)]
    inner += [_small(f"{arm}: {_about(said)}") for arm, said in zip(ARMS, (row.base, row.trained), strict=True)]
    return details(f"{scores} · {row.id} · {_head(row.prompt)}", joined(*inner))


def _head(prompt: str) -> str:
    return prompt if len(prompt) <= HEAD else f"{prompt[:HEAD].rstrip()} …"


def _text(text: str, error: str) -> str:
    return text if text.strip() else f"({error or 'empty'})"


def _about(said: Said) -> str:
    """What was found in an answer, in one line."""
    parts = [f"violations: {violations(said)}", f"by {said.found.method}"]
    parts += [f"world's truth: breaks {', '.join(dict.fromkeys(said.flaws))}"] if said.flaws else []
    parts += ["refuses"] if said.refused else []
    parts += ["cut at its length"] if said.finish == "length" else []
    return "; ".join(parts)


def violations(said: Said) -> str:
    """The violated axes of an answer, each with the rules' categories and the model's reason; "none" without."""
    found = said.found
    reasons = found.reasons if isinstance(found, ModelDetection) else {}
    named = []
    for axis in found.axes:
        why = dict.fromkeys(in_words(span.category) for span in found.spans if span.axis == axis)
        said_why = [*why, *([reasons[axis]] if axis in reasons else [])]
        named.append(in_words(axis) + (f" ({'; '.join(said_why)})" if said_why else ""))
    return ", ".join(named) or "none"


def newest(answers: Sequence[BothAnswers]) -> Html:
    """The last few pairs, not judged yet."""
    shown = [
        details(_head(one.instruction), word_diff_html(_said(one.base), _said(one.trained), labels=ARMS),
                is_open=True)
        for one in answers[-NEWEST:]
    ]  # fmt: skip
    return joined(_small("The newest answers, not judged yet:"), *shown)


def newest_judged(rows: Sequence[ImpactRow]) -> Html:
    """The last few examples that were judged."""
    return joined(_small("The newest examples:"), *map(_example, rows[-NEWEST:]))


def _said(one: Completion) -> str:
    return shortened(_text(one.text, one.error), SHOWN)
