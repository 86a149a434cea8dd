"""What an evaluation found, as results.json holds it: arms, differences, patterns, settings; and in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_experiment.ensemble.answers import read_answer, right
from cai_experiment.ensemble.arms import Asked
from cai_experiment.ensemble.layout import Row
from cai_experiment.ensemble.patterns import Decoder, Turns, examples, letter, patterns, pieces, short_names
from cai_experiment.ensemble.score import (
    ALL,
    BEST_SINGLE,
    BY_DATASET,
    ENSEMBLE,
    ORACLE,
    RATIO,
    ROUTER,
    UNIFORM,
    Marks,
    accuracies,
    differences,
    with_picked,
)

LABELS = {
    UNIFORM: "uniform mixture", ROUTER: "router (prompt perplexity)", BY_DATASET: "best expert of each dataset",
    ORACLE: "oracle (right if any expert is)",
}  # fmt: skip
RIVALS = {
    BEST_SINGLE: "its best single expert", UNIFORM: "the uniform mixture", ROUTER: "the router by prompt perplexity",
    BY_DATASET: "the best expert of each dataset", ORACLE: "the oracle", "select": "its own select mode",
    "mixture": "its own mixture mode",
}  # fmt: skip
TENTH = 0.1  # of an arm's answers: from there on it is told that they were cut or could not be read


@dataclass(frozen=True, slots=True)
class Findings:
    """`results` for results.json, `answers` for answers.jsonl (one row per question and arm that was asked), `examples`
    to be shown."""

    results: dict[str, Any]
    answers: list[dict[str, Any]]
    examples: list[dict[str, Any]]


def findings(
    rows: Sequence[Row], asked: Asked, experts: Sequence[str], tokenizer: Decoder, settings: Mapping[str, Any],
    num_examples: int = 5,
) -> Findings:  # fmt: skip
    """Grade all answers and gather what they say. `experts`: the names as arms, in order; `settings` has "mode" and
    whatever else a reader must know; `num_examples` of each dataset are shown, won, lost and others by turns.
    """
    said = asked.answers
    found = {arm: [right(row, one["text"]) for row, one in zip(rows, own, strict=True)] for arm, own in said.items()}
    datasets = [row.dataset for row in rows]
    alone = [name for name in experts if name in said]
    marks = with_picked(Marks.of(datasets, alone, found), asked.picks)
    turns = [Turns(tuple(one["experts"]), tuple(map(tuple, one["pi"]))) for one in said[ENSEMBLE]]
    results = {
        "arms": dict(_arms(marks, asked, experts, str(settings["mode"]))),
        "differences": differences(marks),
        "patterns": patterns(turns, datasets, experts),
        "router": _router(asked.picks, datasets, alone),
        "settings": {**settings, "experts": list(experts), "questions": len(rows)},
    }
    places = [place for own in list(marks.groups.values())[1:] for place in
              examples(marks.right, alone or [ENSEMBLE], ENSEMBLE, own, num_examples)]  # fmt: skip
    shown = [_example(rows[place], place, asked, marks, tokenizer) for place in places]
    return Findings(results, list(_answers(rows, said, found)), shown)


# ---------------------------------------------------------------- tables


def _arms(marks: Marks, asked: Asked, experts: Sequence[str], mode: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every arm: the ensemble first, then what is made of all experts, the experts, what picks one of them."""
    accuracy = accuracies(marks)
    short = dict(zip(experts, short_names(experts), strict=True))
    order = [ENSEMBLE, "select", "mixture", UNIFORM, *experts, ROUTER, BY_DATASET, ORACLE]
    for name in (name for name in order if name in accuracy):
        kind = "expert" if name in marks.experts else name
        arm: dict[str, Any] = {"kind": kind, "label": LABELS.get(name, f"ensemble ({name})")}
        if kind == ENSEMBLE:
            arm["label"] = f"ensemble ({mode})"
        if kind == "expert":
            place = list(experts).index(name)
            arm |= {"label": f"{letter(place)} {short[name]}", "expert": place}
        arm["accuracy"] = accuracy[name]
        if name in asked.cost:
            arm["cut"] = sum(one["finish"] == "length" for one in asked.answers[name])
            arm["cost"] = asked.cost[name].to_json()
        yield name, arm


def _router(picks: Sequence[int] | None, datasets: Sequence[str], experts: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often the router picked each expert, by dataset; empty without a router."""
    if picks is None:
        return {}
    pairs = list(zip(datasets, picks, strict=True))
    return {
        dataset: {name: pairs.count((dataset, place)) for place, name in enumerate(experts)}
        for dataset in dict.fromkeys(datasets)
    }


def _answers(
    rows: Sequence[Row], said: Mapping[str, Sequence[Mapping[str, Any]]], found: Mapping[str, Sequence[bool | None]]
) -> Iterator[dict[str, Any]]:
    """Every answer of every arm that was asked, question by question. `spoken`: the letter of each token's expert."""
    for place, row in enumerate(rows):
        for arm, own in said.items():
            one = own[place]
            yield {
                "id": row.id, "dataset": row.dataset, "arm": arm, "gold": row.gold,
                "read": read_answer(one["text"], row.task, row.options), "right": found[arm][place],
                "text": one["text"], "finish": one["finish"], "tokens": len(one["ids"]),
                "spoken": " ".join(map(letter, one["experts"])),
            }  # fmt: skip


def _example(row: Row, place: int, asked: Asked, marks: Marks, tokenizer: Decoder) -> dict[str, Any]:
    """One question with what every arm said, the ensemble's answer by speaker and with the heads' weights."""
    one = asked.answers[ENSEMBLE][place]
    return {
        "id": row.id, "dataset": row.dataset, "task": row.task, "needs": list(row.needs), "prompt": row.prompt,
        "gold": row.gold,
        "pieces": [{"expert": piece.expert, "text": piece.text}
                   for piece in pieces(tokenizer, one["ids"], one["experts"], one["text"])],
        "tokens": [{"text": tokenizer.decode([token]), "expert": expert, "pi": pi}
                   for token, expert, pi in zip(one["ids"], one["experts"], one["pi"], strict=True)],
        "arms": [
            {"arm": arm, "right": marks.right[arm][place], "unread": marks.unread[arm][place],
             "text": asked.answers[arm][place]["text"] if arm in asked.answers else None}
            for arm in marks.right
        ],
    }  # fmt: skip


# ---------------------------------------------------------------- sentences


def readings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know, in sentences: accuracy, what it is above, who speaks, what it costs, what to doubt."""
    arms = results["arms"]
    own = arms[ENSEMBLE]["accuracy"][ALL]
    lines = [f"The {arms[ENSEMBLE]['label']} answers {percent(own)} of {own['n']:,} questions right "
             f"({between(own)})."]  # fmt: skip
    for name, groups in results["differences"].items():
        lines.append(_ratio_line(groups[ALL]) if name == RATIO else _difference_line(name, groups[ALL], results))
    lines += _pattern_lines(results)
    lines += _doubts(results)
    return [line for line in lines if line]


def _difference_line(name: str, found: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    name = name.removeprefix("ensemble_minus_")
    if name == ORACLE:
        return ""  # the ratio says it
    rival = RIVALS[name]
    if "against" in found:
        rival += f" ({results['arms'][found['against']]['label']})"
    return f"{points(found)} against {rival} ({between(found, '')}): {verdict(found)}."


def _ratio_line(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "No expert is right on any question, so there is no oracle to hold the ensemble against."
    oracle = "what an oracle would that picks a right expert for each question"
    return f"It reaches {percent(found)} of {oracle} ({between(found)})."


def verdict(found: Mapping[str, Any]) -> str:
    """A difference in words, with what it would take to tell it from none."""
    if found["interval"] is None:
        return "not measured"
    low, high = found["interval"]
    if low > 0:
        return "clearly above"
    if high < 0:
        return "clearly below"
    more = f"; about {found['needed']:,} questions would tell such a difference" if found.get("needed") else ""
    return f"not told apart{more}"


def _pattern_lines(results: Mapping[str, Any]) -> list[str]:
    experts, found = results["settings"]["experts"], results["patterns"]
    if not found[ALL]["tokens"]:
        return []
    groups = [group for group in found if group != ALL and found[group]["tokens"]]
    said = []
    for group in groups:
        share = found[group]["share"]
        most = max(experts, key=lambda name: share[name]["value"])
        said.append(f"{group}: {letter(experts.index(most))} {percent(share[most])}")
    changes = found[ALL]["switches"]["value"]
    return [f"Most of the tokens, by dataset: {', '.join(said)}; the speaker changes {changes:.1f} times an answer."]


def _doubts(results: Mapping[str, Any]) -> list[str]:
    """What makes the figures doubtful: answers that were cut or could not be read, a tenth of an arm's or more."""
    arms = [arm for arm in results["arms"].values() if "cost" in arm]
    n, limit = results["settings"]["questions"], results["settings"]["max_new_tokens"]
    cut = {arm["label"]: arm["cut"] for arm in arms if arm["cut"] >= TENTH * n}
    unread = {arm["label"]: arm["accuracy"][ALL]["unread"] for arm in arms
              if arm["accuracy"][ALL]["unread"] >= TENTH * n}  # fmt: skip
    lines = [f"Cut at {limit} tokens, of {n:,} answers: {_counted(cut)}; give --max_new_tokens more."] if cut else []
    return lines + ([f"Not read, so counted as wrong, of {n:,} answers: {_counted(unread)}."] if unread else [])


def _counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {count}" for label, count in found.items())


# ---------------------------------------------------------------- figures as text


def percent(found: Mapping[str, Any]) -> str:
    """A share as "78.0%"; "not measured" for None."""
    return "not measured" if found["value"] is None else f"{100 * found['value']:.1f}%"


def points(found: Mapping[str, Any]) -> str:
    """A difference of shares as "+4.0 points"."""
    if found["value"] is None:
        return "not measured"
    return f"{100 * found['value']:+.1f} points".replace("-", "−")


def between(found: Mapping[str, Any], unit: str = "%") -> str:
    """An interval as "71.8 to 83.2%"."""
    if found["interval"] is None:
        return "no interval"
    low, high = (f"{100 * end:.1f}".replace("-", "−") for end in found["interval"])
    return f"{low} to {high}{unit}"
