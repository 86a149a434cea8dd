"""What each metric is called in plain words, which question it answers, and which way is better.

A metric that this table does not know keeps its own name, and stands in the group of its own words ("other").
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, Mapping

from cai_experiment.evaluation.gates import MAY_FORGET

Group = Literal["safer", "helpful", "lost", "other"]
Better = Literal["up", "down", "same", ""]  # "same": a change is worth seeing, and no loss; "": neither is better

GROUPS: dict[Group, str] = {
    "safer": "Is it safer?",
    "helpful": "Is it still helpful?",
    "lost": "What did it lose?",
    "other": "Also measured",
}
ARMS = ("_base", "_trained")


@dataclass(frozen=True, slots=True)
class Named:
    """A metric for people. `rate`: a share from 0 to 1, shown in percent; else `unit` follows the number.

    `margin`: how much worse it may be and still count as kept, of the base's figure if `of_base`; None: not stated.
    """

    label: str
    group: Group
    better: Better = ""
    rate: bool = False
    unit: str = ""
    margin: float | None = None
    of_base: bool = False


def _rate(label: str, group: Group, better: Better = "") -> Named:
    return Named(label, group, better, rate=True, margin=MAY_FORGET)


METRICS: dict[str, Named] = {
    # safer
    "flawed_answers": _rate("answers with a flaw (world's truth)", "safer", "down"),
    "preference_accuracy": _rate("held-out pairs: revision preferred", "safer", "up"),
    "preference_margin": Named("margin of the revision", "safer", "up", unit="nats"),
    "attack_success": _rate("HarmBench requests complied with", "safer", "down"),
    "attack_success_undecided": _rate("HarmBench judgements undecided", "other"),
    "harm_score": Named("weighted harm in answers (0 to 5.5)", "safer", "down"),
    "harm_flagged": _rate("answers flagged as harmful", "safer", "down"),
    "detection": _rate("harmful texts detected", "safer", "up"),
    "false_alarm": _rate("harmless texts flagged", "safer", "down"),
    # helpful
    "win_rate": _rate("held-out answers: trained preferred", "helpful", "up"),
    "on_topic": _rate("answers on topic", "helpful", "up"),
    "over_refusal": _rate("harmless look-alikes refused", "helpful", "down"),
    "refusal": _rate("answers that refuse", "helpful", "down"),
    "evasive": _rate("answers to HarmBench that refuse or evade", "other"),
    "mt_bench": Named("MT-Bench grade", "helpful", "up", unit="of 10", margin=0.2),
    "mt_bench_known_answers": _rate("MT-Bench's judge right on known answers", "other", "up"),
    "mt_bench_pairwise": _rate("MT-Bench turns: trained preferred", "helpful", "up"),
    # lost
    "arithmetic": _rate("short sums right", "lost", "up"),
    "gsm8k": _rate("GSM8K problems right", "lost", "up"),
    "gsm8k_direct": _rate("GSM8K problems right, asked directly", "lost", "up"),
    "arc_easy": _rate("ARC-Easy questions right", "lost", "up"),
    "arc_challenge": _rate("ARC-Challenge questions right", "lost", "up"),
    "hellaswag": _rate("HellaSwag endings right", "lost", "up"),
    "clean_nll": Named("loss on clean text", "lost", "down", unit="nats a token", margin=0.095),
    "clean_perplexity": Named("perplexity on clean text", "lost", "down"),
    "clean_perplexity_factor": Named("perplexity on clean text, trained / base", "lost", "down"),
    "ends_by_itself": _rate("answers that end by themselves", "lost", "up"),
    "repetition": Named("repeated word sequences in an answer", "lost", "down", margin=0.05),
    "empty": _rate("empty answers", "lost", "down"),
    "answers_nll_under_base": Named("answers' loss under the base", "lost", "down", unit="nats a token", margin=0.5),
    "distinct_1": Named("distinct words", "lost", "up", margin=0.2, of_base=True),
    "distinct_2": Named("distinct word pairs", "lost", "up", margin=0.2, of_base=True),
    "words": Named("words an answer", "lost", "same"),
    "sentences": Named("sentences an answer", "lost", "same"),
    "words_harmbench": Named("words an answer to HarmBench", "other", "same"),
    "words_safe_prompts": Named("words an answer to a safe look-alike", "other", "same"),
    "chosen_logp_change": Named("chosen answers: log-probability change", "lost", "up", unit="nats"),
    "rejected_logp_change": Named("rejected answers: log-probability change", "other", "down", unit="nats"),
    # the data and the judge
    "accepted_pairs": Named("accepted pairs", "other", "up"),
    "complete_examples": _rate("examples with all parts present", "other", "up"),
    "revision_answers_critique": _rate("revisions that answer their critique", "other", "up"),
    "revision_preferred": _rate("revisions preferred to the first answer", "other", "up"),
    "revision_repaired": _rate("revisions that repair the flaw", "other", "up"),
    "critique_meaningful": _rate("critiques meaningful", "other", "up"),
    "critique_right": _rate("critiques right (world's truth)", "other", "up"),
    "critique_abstained": _rate("flawed answers, critic silent", "other", "down"),
    "critique_false_alarm": _rate("sound answers, critic objects", "other", "down"),
    "judge_kappa": Named("judge agrees with the world's truth (kappa)", "other", "up"),
    "meaningful_kappa": Named("judge agrees with the truth on critiques (kappa)", "other", "up"),
    "preferred_kappa": Named("judge agrees with the truth on revisions (kappa)", "other", "up"),
    "judge_fitness": Named("judge right on known answers (kappa)", "other", "up"),
    "judge_undecided": _rate("known answers, judge undecided", "other", "down"),
    "win_rate_kappa": Named("judge agrees with the truth on held-out answers (kappa)", "other", "up"),
    "win_rate_read": _rate("held-out answers, judge could be read", "other", "up"),
    "answers_came": _rate("instructions that both models answered", "other", "up"),
    "win_rate_undecided": _rate("held-out answers, judge undecided", "other"),
    "revision_undecided": _rate("revisions, judge undecided", "other"),
    "judge_person_kappa": Named("judge agrees with a person on critiques (kappa)", "other", "up"),
    "judge_person_agreement": _rate("critiques, judge and person agree", "other", "up"),
    "preferred_person_kappa": Named("judge agrees with a person on revisions (kappa)", "other", "up"),
    "preferred_person_agreement": _rate("revisions, judge and person agree", "other", "up"),
    "person_meaningful": _rate("critiques meaningful to a person", "other", "up"),
    "person_preferred": _rate("revisions that a person prefers", "other", "up"),
    "person_person_kappa": Named("two people agree on critiques (kappa)", "other", "up"),
    "direct_revisions": _rate("rounds that revised without a critique", "other"),
    "length_only_accuracy": _rate("pairs told apart by length alone", "other", "down"),
    "bag_of_words_accuracy": _rate("pairs told apart by their words alone", "other", "down"),
    "words_change": Named("words an answer, trained - base", "other", "same"),
}


def named(metric: str) -> Named:
    """The name of a metric without its arm. "harmbench_cybercrime" is "HarmBench ...: cybercrime": the longest known
    beginning speaks, the rest of the name follows. An unknown metric keeps its name."""
    metric, arm = stem(metric)
    known = _known(metric)
    if not known:
        return Named(metric.replace("_", " ") + arm, "other")
    found, rest = METRICS[known], metric[len(known) + 1 :].replace("_", " ")
    rest = f": {rest}" if rest else ""
    return replace(found, label=found.label + rest + arm)


def _known(metric: str) -> str:
    """The longest name of the table that the metric (without arm) is or begins with; "" if there is none."""
    if metric in METRICS:
        return metric
    return max((name for name in METRICS if metric.startswith(f"{name}_")), key=len, default="")


def stem(metric: str) -> tuple[str, str]:
    """A metric's name without its arm, and the arm in words: ("words", ", trained model"); "" if it has none."""
    for arm in ARMS if metric not in METRICS else ():  # "answers_nll_under_base" is a whole name
        if metric.endswith(arm):
            return metric.removesuffix(arm), f", {arm[1:]} model"
    return metric, ""


def is_rate(name: str, metric: Mapping[str, Any]) -> bool:
    """True if the metric (as report.json holds it) is a share of its n items: it says so itself, or by its name, or (a
    report of before) by its figures."""
    if metric.get("scale"):
        return bool(metric["scale"] == "rate")
    known = _known(stem(name)[0])
    if known and (known == stem(name)[0] or not METRICS[known].rate):
        return METRICS[known].rate
    value, n, interval = metric.get("value"), metric.get("n") or 0, metric.get("interval")
    if value is None or interval is None or not (0 <= interval[0] <= value <= interval[1] <= 1):
        return False
    return abs(value * n - round(value * n)) < 1e-6  # a mean of scores is hardly ever a whole number of items


def scaled(name: str, metric: Mapping[str, Any]) -> dict[str, Any]:
    """The metric of this name with its scale said."""
    return {**metric, "scale": metric.get("scale") or ("rate" if is_rate(name, metric) else "")}


def scaled_rows(table: Mapping[str, Any]) -> list[list[Any]]:
    """The rows of a table (as report.json holds it), every result with its scale. Results of a report of before do not
    say theirs: there a column is one of rates if all of it looks like rates."""
    rates = set()
    for place in range(len(table["columns"])):
        cells = [row[place] for row in table["rows"] if isinstance(row[place], Mapping)]
        measured = [cell for cell in cells if cell.get("value") is not None]
        if measured and all(is_rate("", cell) for cell in measured):
            rates.add(place)
    return [
        [{"scale": "rate" if place in rates else "", **cell} if isinstance(cell, Mapping) else cell
         for place, cell in enumerate(row)]
        for row in table["rows"]
    ]  # fmt: skip


def pairs_of_arms(metrics: Mapping[str, Any]) -> list[str]:
    """The names (without arm) of everything that was measured for base and trained, grouped, in the table's order."""
    both = [name.removesuffix("_base") for name in metrics if name.endswith("_base")]
    both = [name for name in both if f"{name}_trained" in metrics]
    order = list(GROUPS)
    return sorted(both, key=lambda name: order.index(named(name).group))  # stable: as they were measured


def file_name(text: str) -> str:
    """A name made fit for a file: letters, digits, "-", "_" and "." stay, the rest becomes "_"."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("._")[:100] or "unnamed"
