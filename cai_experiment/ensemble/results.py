"""What an evaluation found, as results.json holds it: arms, differences, patterns, settings; and in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_experiment.ensemble.answers import read_answer, right
from cai_experiment.ensemble.arms import Asked
from cai_experiment.ensemble.experts import SHIPPED
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
    side,
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
ABOVE = "above the oracle"
WHY_ABOVE = "the oracle has one expert give a whole answer, and the ensemble lets them take turns within it"
SELDOM = 0.1  # of the questions: where the oracle is right on fewer, a ratio to it says little
BARE_PROMPT = ('Every arm is asked by the bare prompt that the heads were trained on ("Question: ... Answer:", without '
               "examples or chat layout), so single experts may score below their published figures.")  # fmt: skip
FEW = 0.05  # drafts a token: below it decoding went by plain steps
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
        "arms": dict(_arms(marks, asked, experts, settings)),
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


def _arms(
    marks: Marks, asked: Asked, experts: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every arm: the ensemble first, then what is made of all experts, the experts, what picks one of them."""
    accuracy = accuracies(marks)
    short = dict(zip(experts, short_names(experts), strict=True))
    order = [ENSEMBLE, "select", "mixture", UNIFORM, *experts, ROUTER, BY_DATASET, ORACLE]
    for name in (name for name in order if name in accuracy):
        kind = "expert" if name in marks.experts else name
        arm: dict[str, Any] = {"kind": kind, "label": LABELS.get(name, f"ensemble ({name})")}
        if kind == ENSEMBLE:
            arm["label"] = f"ensemble ({settings['mode']})"
        if kind == "expert":
            place = list(experts).index(name)
            arm |= {"label": f"{letter(place)} {short[name]}", "expert": place}
        arm["accuracy"] = accuracy[name]
        if name in asked.cost:
            cut = [one["finish"] == "length" for one in asked.answers[name]]
            arm["cut"] = sum(cut)
            arm["cut_unread"] = sum(a and b for a, b in zip(cut, marks.unread[name], strict=True))
            arm["cost"] = asked.cost[name].to_json()
            arm["drafting"] = _drafting(kind, arm["cost"], settings)
        yield name, arm


def _drafting(kind: str, cost: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """How tokens were drafted by one expert and checked by the others, in words."""
    if kind == "expert" or not cost["tokens"]:
        return "–"
    if not settings.get("accelerate", True):
        return "off"
    share = cost["drafted"] / cost["tokens"]
    if share < FEW:
        alone = settings.get("batch_size") == 1 or settings.get("device", "cpu") != "cpu"  # see blocks.py
        return "plain steps: drafts were no faster" if alone else "plain steps: the batch is full"
    return f"{share:.0%} of the tokens drafted, {cost['acceptance']:.0%} of them accepted"


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
        line = _ratio_line if name == RATIO else _difference_line
        lines.append(line(name, groups[ALL], results))
    lines += _pattern_lines(results)
    lines += _doubts(results)
    if not set(results["settings"]["experts"]) <= set(SHIPPED) and len(arms) > 1:
        lines.append(BARE_PROMPT)
    return [line for line in lines if line]


def _difference_line(name: str, found: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    name = name.removeprefix("ensemble_minus_")
    if name == ORACLE:
        return ""  # the ratio says it
    rival = RIVALS[name]
    if "against" in found:
        rival += f" ({results['arms'][found['against']]['label']})"
    return f"{points(found)} against {rival} ({between(found, '')}): {verdict(found)}."


def _ratio_line(name: str, found: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "No expert is right on any question, so there is no oracle to hold the ensemble against."
    oracle = "an oracle that picks a right expert for each question"
    said, interval = of_oracle(results, ALL)
    if found["value"] > 1:
        said = said if said.startswith(ABOVE) else f"{ABOVE}, {said} of its accuracy ({interval})"
        return f"It is {said.replace('the oracle', oracle, 1)}: {WHY_ABOVE}."
    return f"It reaches {said} of what an oracle would that picks a right expert for each question ({interval})."


def of_oracle(results: Mapping[str, Any], group: str) -> tuple[str, str]:
    """(share of the oracle's accuracy, its interval) as text; counts where the oracle is seldom right."""
    found = results["differences"][RATIO][group]
    own, oracle = (results["arms"][arm]["accuracy"][group] for arm in (ENSEMBLE, ORACLE))
    if oracle["value"] is None or oracle["value"] >= SELDOM or own["value"] <= oracle["value"]:
        return percent(found), between(found)
    n = own["n"]
    return f"{ABOVE}, {round(own['value'] * n):,} of {n:,} to {round(oracle['value'] * n):,}", ""


def verdict(found: Mapping[str, Any]) -> str:
    """A difference in words, with what it would take to tell it from none."""
    if found["interval"] is None:
        return "not measured"
    if clear := side(found):
        return "clearly above" if clear > 0 else "clearly below"
    low, high = found["interval"]
    if low > 0 or high < 0:
        return "not told apart once adjusted for the number of rivals"
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
    cut = {arm["label"]: arm["cut_unread"] for arm in arms if arm["cut_unread"] >= TENTH * n}
    went_on = {arm["label"]: arm["cut"] - arm["cut_unread"] for arm in arms}
    went_on = {label: count for label, count in went_on.items() if count >= TENTH * n}
    unread = {arm["label"]: arm["accuracy"][ALL]["unread"] for arm in arms
              if arm["accuracy"][ALL]["unread"] >= TENTH * n}  # fmt: skip
    lines = []
    if cut:
        lines.append(f"Cut at {limit} tokens before there was an answer to read, of {n:,}: {_counted(cut)}; "
                     "give --max_new_tokens more.")  # fmt: skip
    if went_on:
        lines.append(f"Cut at {limit} tokens, an answer was read all the same, of {n:,}: {_counted(went_on)}; what was "
                     "said by then counts, and more --max_new_tokens would mostly cost more.")  # fmt: skip
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
