"""What the content log says of an evaluation: each text judged, and the answers of base and trained side by side.

    with ContentLogger(verbosity, path) as log:
        tell_detection(log, text, detector.detect_all([text])[0])    # EVAL-INPUT, EVAL-MODEL-RESPONSE, EVAL-DECISION
        tell(log, evaluation)                                        # the same of all that an Evaluation read

The file holds every text whole. Of many, level 2 shows a few, spread over the whole; level 3 each one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai_experiment.constitution.principles import AXIS_WEIGHTS
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.harm.answers import HARM
from cai_experiment.evaluation.harm_rules import METHOD, Detection
from cai_experiment.evaluation.verdicts import WIN_RATE
from cai_experiment.observe.content_logger import LEVEL, PLACE, TEXTS, ContentLogger
from cai_experiment.observe.screen import compared, decision

ARMS = ("base", "trained")
PREFERS = {"yes": "prefers this answer", "no": "prefers the base's answer", "undecided": "undecided"}

Row = Mapping[str, Any]


def tell(log: ContentLogger, found: Evaluation) -> None:
    """Everything that `found` read: answers of both arms with their harm, labelled texts, what a judge was asked."""
    for name, rows in found.items.items():
        if name == HARM:
            _tell_answers(log, rows, {row["id"]: row for row in found.items.get(WIN_RATE, ())})
            continue
        for keys, tell_rows in _KINDS.items():
            if rows and keys in rows[0]:
                tell_rows(log, rows)


# ---------------------------------------------------------------- a text and what was found in it


def tell_detection(log: ContentLogger, text: str, found: Detection, about: Mapping[str, Any] | None = None) -> None:
    """A text, what the model said of it (where one was asked), and the decision. `about` goes into the metadata."""
    tell_found(log, text, found.to_json(), about)


def tell_found(log: ContentLogger, text: str, found: Row, about: Mapping[str, Any] | None = None) -> None:
    """See `tell_detection`; `found` is the detection as a row of a file holds it (`Detection.to_json`)."""
    facts = dict(about or {})
    log.log_stage("EVAL-INPUT", f'Text to evaluate:\n"{text}"', {**facts, TEXTS: [text]})
    if "verdicts" in found:
        reasons = list(found["reasons"].values())
        log.log_stage("EVAL-MODEL-RESPONSE", response(found), {**facts, TEXTS: reasons} if reasons else facts)
    axes, score = list(found["axes"]), found["score"]
    log.log_stage("EVAL-DECISION", decided(text, found), {**facts, "axes": axes, "score": score})


def response(found: Row) -> str:
    """What a model said, axis by axis, with its reasons; or what came where no answer could be read."""
    method = found["method"].removesuffix(f" and {METHOD}")
    lines = [f"{method}, asked on each axis in both orders:"]
    for axis, answer in found["verdicts"].items():
        reason = found["reasons"].get(axis)
        lines.append(f"- {axis}: {answer}" + (f'. "{reason}"' if reason else ""))
    return "\n".join([*lines, *([f"could not be read: {found['why']}"] if found.get("why") else [])])


def decided(text: str, found: Row) -> str:
    """The text of EVAL-DECISION: violation or none, method, category, principle, the words that rules matched."""
    axes = found["axes"]
    categories = ", ".join(dict.fromkeys(span["category"] for span in found["spans"]))
    lines = [decision(bool(axes), found["method"], categories, ", ".join(axes))]
    if axes:
        lines.append(f"  Weighted score: {found['score']:.1f} ({len(axes)}/{len(AXIS_WEIGHTS)} principles violated)")
    for span in found["spans"]:
        lines.append(f'  Words: "{text[span["start"] : span["end"]]}" ({span["axis"]}: {span["reason"]})')
    return "\n".join(lines)


def _tell_texts(log: ContentLogger, rows: Sequence[Row]) -> None:
    """Labelled texts: a harmful one and its harmless look-alike stand side by side and share a place. A model with the
    rules says what both have said before: at level 3.
    """
    again = {LEVEL: 3} if rows[0]["method"].endswith(f" and {METHOD}") else {}
    for number, row in enumerate(rows):
        place = f"{number // 2 + 1}/{-(-len(rows) // 2)}"
        about = {"id": row["id"], "set": row.get("set"), "label": row.get("label"), PLACE: place}
        tell_found(log, row["text"], row, about | again)


# ---------------------------------------------------------------- base against trained


def tell_comparison(
    log: ContentLogger, instruction: str, base: str, trained: str, found: tuple[Row, Row],
    about: Mapping[str, Any] | None = None, said: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> None:  # fmt: skip
    """Both answers with their violations and scores, the verdict, and a word diff. `found` are the detections' rows,
    `said` further lines of each arm.
    """
    texts, facts = (base, trained), dict(about or {})
    before, after = (one["score"] for one in found)
    arms = [
        [text, f"Violations: {_violations(text, one)}", f"Weighted score: {one['score']:.1f}", *lines]
        for text, one, lines in zip(texts, found, said, strict=True)
    ]
    scores = {"base_score": before, "trained_score": after}
    content = compared(instruction, arms[0], arms[1], before, after)
    log.log_stage("COMPARISON-TEST", content, {**facts, **scores, TEXTS: [instruction, base, trained]})
    log.log_comparison("BASE", base, "TRAINED", trained, facts)


def _violations(text: str, found: Row) -> str:
    """The axes with the words that broke them, or with the model's reason."""
    named = []
    for axis in found["axes"]:
        words = dict.fromkeys(text[s["start"] : s["end"]] for s in found["spans"] if s["axis"] == axis)
        reason = found.get("reasons", {}).get(axis, "")
        why = ", ".join(f'"{one}"' for one in words) or reason
        named.append(f"{axis} ({why})" if why else axis)
    return ", ".join(named) or "None"


def _tell_answers(log: ContentLogger, rows: Sequence[Row], judged: Mapping[str, Row]) -> None:
    """The held-out answers: compared at level 2, each reading of the rules by itself at level 3."""
    for number, row in enumerate(rows, 1):
        about = {"id": row["id"], PLACE: f"{number}/{len(rows)}"}
        texts = [row[f"{arm}_text"] for arm in ARMS]
        found = (row["base_found"], row["trained_found"])
        for arm, text, one in zip(ARMS, texts, found, strict=True):
            tell_found(log, text, one, {**about, "arm": arm, LEVEL: 3})
        said = PREFERS.get(judged[row["id"]]["preferred"]) if row["id"] in judged else None
        judge = [f"Judge: {said}"] if said else []
        tell_comparison(log, row["instruction"], texts[0], texts[1], found, about, ((), judge))


def _tell_both(log: ContentLogger, rows: Sequence[Row]) -> None:
    """Another judge's reading of the same answers: each text and its decision."""
    for number, row in enumerate(rows, 1):
        for arm in ARMS:
            about = {"id": row["id"], "arm": arm, PLACE: f"{number}/{len(rows)}"}
            tell_found(log, row[f"{arm}_text"], row[f"{arm}_found"], about)


# ---------------------------------------------------------------- benchmarks and their judges


def _tell_attacks(log: ContentLogger, rows: Sequence[Row]) -> None:
    """HarmBench: each answer, and whether the judge calls it harmful."""
    for number, row in enumerate(rows, 1):
        for arm in ARMS:
            about = {"id": row["id"], "arm": arm, PLACE: f"{number}/{len(rows)}"}
            said = row.get(f"{arm}_verdict", "not asked")
            _tell_asked(log, row, row[f"{arm}_text"], about)
            if raw := row.get(f"{arm}_raw"):
                log.log_stage("EVAL-MODEL-RESPONSE", f'HarmBench judge raw output:\n"{raw}"', {**about, TEXTS: [raw]})
            known = said in ("yes", "no")
            word = decision(said == "yes", "HarmBench judge", row["category"], "harm_prevention")
            log.log_stage("EVAL-DECISION", word if known else f"✗ {said}\n  Method: HarmBench judge", about)


def _tell_grades(log: ContentLogger, rows: Sequence[Row]) -> None:
    """MT-Bench: each answer, the judge's own words, and the grade."""
    for number, row in enumerate(rows, 1):
        for arm in ARMS:
            about = {"id": row["id"], "arm": arm, PLACE: f"{number}/{len(rows)}"}
            grade, said = row[f"grade_{arm}"], row[f"judgement_{arm}"]
            _tell_asked(log, row, row[f"{arm}_text"], about)
            log.log_stage("EVAL-MODEL-RESPONSE", f'MT-Bench judge raw output:\n"{said}"', {**about, TEXTS: [said]})
            word = "✗ no grade" if grade is None else f"✓ Grade: {grade:g} of 10"
            log.log_stage("EVAL-DECISION", f"{word}\n  Method: MT-Bench judge", about)


def _tell_pairwise(log: ContentLogger, rows: Sequence[Row]) -> None:
    """MT-Bench: which answer the judge prefers, in its own words for both orders."""
    for number, row in enumerate(rows, 1):
        about = {"id": row["id"], PLACE: f"{number}/{len(rows)}"}
        texts = [row["judgement_base_first"], row["judgement_trained_first"]]
        said = f'MT-Bench judge, base first:\n"{texts[0]}"\nTrained first:\n"{texts[1]}"'
        log.log_stage("EVAL-MODEL-RESPONSE", said, {**about, TEXTS: texts})
        log.log_stage("EVAL-DECISION", f"Preferred: {row['verdict']}\n  Method: MT-Bench judge, pairwise", about)


def _tell_asked(log: ContentLogger, row: Row, answer: str, about: Mapping[str, Any]) -> None:
    """The question and the answer that is judged."""
    asked = row["instruction"]
    content = f'Question: "{asked}"\nText to evaluate:\n"{answer}"'
    log.log_stage("EVAL-INPUT", content, {**about, TEXTS: [asked, answer]})


_KINDS = {  # a key that only rows of this kind have
    "base_found": _tell_both, "spans": _tell_texts, "base_verdict": _tell_attacks, "judgement_base": _tell_grades,
    "judgement_base_first": _tell_pairwise,
}  # fmt: skip
