"""A milestone's evaluation: `evaluate_generation` reads its examples, `evaluate_training` tries its trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from cai_experiment.constitution.principles import Principle
from cai_experiment.engines.render import Renderer
from cai_experiment.evaluation.answers import answers_found, ask_both
from cai_experiment.evaluation.arms import BothArms, EngineOver, Speakers, transformers_engine
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.gates import Trained, generation_gates, training_gates
from cai_experiment.evaluation.generation import generation_metrics
from cai_experiment.evaluation.preference import Pair, preference_metrics, score_pairs
from cai_experiment.evaluation.reporting.words import result_text
from cai_experiment.evaluation.shortcuts import shortcut_metrics
from cai_experiment.evaluation.verdicts import critiques_again, drawn, fitness_of, revisions_again, win_rate
from cai_experiment.judging.judge import Judge
from cai_experiment.judging.result import Result
from cai_experiment.nano.world import held_out_questions
from cai_experiment.observe.progress import Progress
from cai_experiment.records.schema import Example

HELD_OUT = 200  # instructions: a rate near 5% is then known to within 3 points
SUMS = 400
COMPARED = 1000  # revisions against first answers: the rate is then known to within 3 points


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """`truth`: the model is the shipped one, whose world knows every flaw (`nano.is_nano`). `held_out`: instructions
    that the base and the trained model answer; 0 leaves generation out, as in milestones 0 and 1.
    """

    milestone: str
    truth: bool
    seed: int = 0
    held_out: int = 0
    sums: int = SUMS
    verbosity: int = 1  # 0: no progress on the screen


def evaluate_generation(
    settings: EvaluationSettings,
    accepted: Sequence[Example],
    rejected: Sequence[Example],
    wanted: int,
    judge: Judge | None = None,
    principles: Sequence[Principle] = (),
) -> Evaluation:
    """The gates of the pipeline's part. `wanted` pairs were to be accepted; `judge` (the critic, without an adapter)
    compares each revision with its first answer, without it that metric is left out.

    With `principles` the judge is another than the critic that sat with the examples, and reads their critiques again:
    its word then stands in the place of the critic's. Milestone 0 speaks of its one pair, so only accepted examples
    count there.
    """
    counted: Sequence[Example] = [] if settings.milestone == "single" else rejected
    found = Evaluation(generation_metrics(accepted, counted, settings.truth))
    found.metrics["accepted_pairs"] = Result(len(accepted), len(accepted) + len(rejected), None)
    if judge is not None and principles:
        by_id = {principle.id: principle for principle in principles}
        found += critiques_again(judge, drawn(accepted, counted, COMPARED, settings.seed), by_id, settings.truth)
    if judge is not None:
        found += revisions_again(judge, drawn(accepted, (), COMPARED, settings.seed), settings.truth)
    found.gates = generation_gates(settings.milestone, found.metrics, wanted)
    return found


def evaluate_training(
    settings: EvaluationSettings,
    trained: Trained,
    tokenizer: Any,
    renderer: Renderer,
    train_pairs: Sequence[Pair],
    held_out_pairs: Sequence[Pair] = (),
    unused_instructions: Sequence[str] = (),
    engine_over: EngineOver | None = None,
    reference: Path | None = None,
    also_trained_on: Sequence[str] = (),
) -> Evaluation:
    """The gates of training's part. `trained.model` is the PEFT model; its base is the model with the adapter off.

    `reference` is the adapter that DPO started from, if any: implicit rewards are against it, while answers before are
    the base's, so that they speak of the whole effect. `also_trained_on` are instructions beyond those of the pairs.
    Without `held_out_pairs` preference is measured on the training pairs, and the report says so.
    `unused_instructions` (of rejected examples) were never trained on; another model than the shipped one answers
    those and the held-out pairs' own. `engine_over` is `from_model` of the engine that loaded the weights; without it
    the transformers engine speaks.
    """
    scored = held_out_pairs or train_pairs
    metrics = preference_metrics(score_pairs(trained.model, renderer, scored, reference=reference))
    metrics |= shortcut_metrics(train_pairs, held_out_pairs)
    found = Evaluation(metrics)
    kind = "held-out" if held_out_pairs else "training"
    found.notes.append(f"preference is measured on {len(scored)} {kind} pair{'' if len(scored) == 1 else 's'}")
    if reference is not None:
        found.notes[-1] += ", against the SFT model that DPO started from; answers before are the base model's"
    if settings.held_out:
        questions = held_out_instructions(settings, train_pairs, held_out_pairs, unused_instructions, also_trained_on)
        speakers = Speakers(trained.model, tokenizer, renderer, engine_over or transformers_engine)
        found += _evaluate_answers(settings, speakers, questions)
    gated = dict(found.metrics)
    if not held_out_pairs:  # what was trained on proves nothing
        gated.pop("preference_accuracy")
    found.gates += training_gates(settings.milestone, gated, trained, len(train_pairs))
    found.notes += warnings(found.metrics)
    return found


def held_out_instructions(
    settings: EvaluationSettings, train_pairs: Sequence[Pair], held_out_pairs: Sequence[Pair], unused: Sequence[str],
    also_trained_on: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Up to `settings.held_out` distinct instructions that were never trained on, in a fixed order."""
    seen = {*also_trained_on, *(pair.turns[-1].text for pair in train_pairs)}
    if settings.truth:
        drawn = held_out_questions(settings.held_out + len(seen), settings.seed)
    else:
        drawn = [*(pair.turns[0].text for pair in held_out_pairs if len(pair.turns) == 1), *unused]
    return [text for text in dict.fromkeys(drawn) if text not in seen][: settings.held_out]


def _evaluate_answers(settings: EvaluationSettings, speakers: Speakers, questions: Sequence[str]) -> Evaluation:
    """Base against trained: text, sums, the base's own preference, and the truth where it is known."""
    with Progress(2 * (len(questions) + settings.sums), "held-out answers", settings.verbosity) as progress:
        arms = BothArms(speakers.bare(), speakers.model, settings.seed, progress)
        both, sums = ask_both(arms, "answer", questions, settings.sums)
    found = sums + answers_found(both, settings.truth, speakers)
    judge = Judge(speakers.base(), "the base model")
    return found + win_rate(judge, both, {}, settings.truth) + fitness_of(judge, settings.truth, settings.seed)


def warnings(metrics: dict[str, Result]) -> list[str]:
    """What a reader must not miss beside the gates."""
    found = []
    change = metrics["chosen_logp_change"]
    if change.value is not None and change.value < 0:
        found.append(f"the chosen answers' log-probability fell: {result_text(change.to_json())} (nats a pair); watch "
                     "for collapse")  # fmt: skip
    accuracy = metrics["preference_accuracy"].value
    for name, words in (("length_only_accuracy", "length alone"), ("bag_of_words_accuracy", "words alone")):
        shortcut = metrics.get(name)
        if accuracy is not None and shortcut is not None and shortcut.value is not None and shortcut.value >= accuracy:
            found.append(f"{words} tells chosen from rejected as well as the model does "
                         f"({result_text(shortcut.to_json())})")  # fmt: skip
    return found
