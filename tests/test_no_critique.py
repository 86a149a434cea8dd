"""--no-critique: the revision follows the answer directly; what is recorded, counted and gated then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.constitution.prompts import ask_for_direct_revision, render_base
from cai_experiment.constitution.worked_examples import DIRECT_EXAMPLES, TRANSCRIPT_EXAMPLES, examples_for
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import EXIT_NO_GO, EXIT_OK, BadInputError
from cai_experiment.evaluation.gates import generation_gates
from cai_experiment.evaluation.generation import generation_metrics
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.workload import Tokens, Workload
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.runner import run_pipeline
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.pipeline.stages import ExampleStages, StageSettings
from cai_experiment.records.files import read_examples, read_json, read_jsonl
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts import generate_mvp

CONSTITUTION = load_constitution()
DIRECT = StageSettings(rounds=2, principles="random", critique=False)


def play(settings: StageSettings, broken: bool = True) -> tuple[ExampleStages, list[Prompt]]:
    """The machine after its end, and every prompt that it asked; first answers break every principle, or none."""
    machine = ExampleStages(Instruction("000007", "Why?", "test:1"), CONSTITUTION.principles, settings)
    asked: list[Prompt] = []

    def reply(prompt: Prompt) -> Completion:
        asked.append(prompt)
        if not prompt.options:
            return Completion(prompt.id, f"{prompt.speak_as} {prompt.id[-1]}", "stop")
        odds = (1.0 if broken and "/verdict/0/" in prompt.id else -1.0) * (1 if prompt.id.endswith("yes_first") else -1)
        return Completion(prompt.id, "", "stop", logprobs=(odds, 0.0))

    steps = machine.steps()
    prompts = next(steps, None)
    while prompts is not None:
        try:
            prompts = steps.send({prompt.id: reply(prompt) for prompt in prompts})
        except StopIteration:
            prompts = None
    return machine, asked


def test_the_revision_stands_behind_the_answer_and_holds_its_principle() -> None:
    machine, asked = play(DIRECT)
    (first,) = [prompt for prompt in asked if prompt.speak_as == "revision"]
    assert [turn.kind for turn in first.turns] == ["instruction", "answer", "revision_request"]
    principle = machine.draft.rounds[0].principle
    assert first.turns[-1] == ask_for_direct_revision(principle) and principle.text in first.turns[-1].text
    assert not any(prompt.speak_as == "critique" or "/meaningful/" in prompt.id for prompt in asked)
    one, two = machine.draft.rounds  # of the second the judge says that nothing is broken, so it revises nothing
    assert (one.critique, one.meaningful, one.revised_answer) == ("", None, "revision 0")
    assert (two.verdict_before.answer, two.revised_answer, two.abstained) == ("no", "", False)


def test_where_nothing_is_broken_nothing_is_revised() -> None:
    machine, asked = play(DIRECT, broken=False)
    assert not machine.draft.revisions and {prompt.speak_as for prompt in asked} == {"answer", "verdict"}


def run(folder: Path, critique: bool = False) -> tuple[Any, Any]:
    """(accepted, rejected) of twelve pairs of the scripted engine."""
    engine, settings = ScriptedEngine(), RunSettings(12, 60, StageSettings(2, "random", critique=critique))
    with RunFolder(folder) as entered, ContentLogger(0, folder / "content_log.jsonl") as logger:
        run_pipeline(settings, entered, engine, engine, CONSTITUTION, logger, Progress(12, "pairs", 0))
    return read_examples(folder / "pairs.jsonl"), read_examples(folder / "rejected.jsonl")


def test_examples_gates_and_log_of_a_run(tmp_path: Path) -> None:
    accepted, rejected = run(tmp_path)
    assert len(accepted) == 12 and all(one.critique == "" and one.principle for one in accepted)
    assert not any(round.critique for one in (*accepted, *rejected) for round in one.rounds)
    metrics = generation_metrics(accepted, rejected, truth=False)
    of_critiques = {"critique_meaningful", "critique_abstained", "complete_examples", "revision_answers_critique"}
    assert not of_critiques & metrics.keys()
    assert "revision_answers_critique" in generation_metrics(*run(tmp_path / "with", critique=True), truth=False)
    assert [gate.name for gate in generation_gates("single", metrics, 1)] == ["accepted pairs"]
    revised = [bool(round.revised_answer) for one in (*accepted, *rejected) for round in one.rounds]
    assert (metrics["direct_revisions"].value, metrics["direct_revisions"].n) == (sum(revised), len(revised))
    assert [gate.name for gate in generation_gates("mvp", metrics, 12)] == ["accepted pairs"]
    stages = {row["stage"] for row in read_jsonl(tmp_path / "content_log.jsonl")}
    assert "REVISION-GENERATION" in stages and "CRITIQUE-GENERATION" not in stages
    assert read_json(tmp_path / "manifest.json")["settings"]["critique"] is False


def test_a_run_cannot_change_between_the_two(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(BadInputError, match="critique was false, now null"):
        run(tmp_path, critique=True)
    run(tmp_path / "with", critique=True)
    assert "critique" not in read_json(tmp_path / "with/manifest.json")["settings"]  # as before there was a choice
    with pytest.raises(BadInputError, match="critique was null, now false"):
        run(tmp_path / "with")


def test_worked_examples_of_direct_revision_are_the_others_without_their_critiques() -> None:
    kinds = [[turn.kind for turn in example] for example in DIRECT_EXAMPLES]
    assert kinds == [
        ["instruction", "answer", "question", "verdict", "revision_request", "revision", "question", "verdict"],
        ["instruction", "answer", "question", "verdict"],
    ]
    kept = {turn for example in TRANSCRIPT_EXAMPLES for turn in example}
    assert [turn.kind for example in DIRECT_EXAMPLES for turn in example if turn not in kept] == ["revision_request"]
    _, asked = play(DIRECT)
    revision = next(prompt for prompt in asked if prompt.speak_as == "revision")
    assert examples_for("revision", revision.turns) == DIRECT_EXAMPLES
    verdicts = [prompt for prompt in asked if prompt.speak_as == "verdict"]
    before, after = verdicts[0], verdicts[-1]
    assert len(after.turns) > len(before.turns), "of the answer, and of its revision"
    assert examples_for("verdict", before.turns) == examples_for("verdict", after.turns) == TRANSCRIPT_EXAMPLES
    assert examples_for("answer", asked[0].turns) == TRANSCRIPT_EXAMPLES
    _, asked = play(StageSettings(principles="random"))
    revision = next(prompt for prompt in asked if prompt.speak_as == "revision")
    assert examples_for("revision", revision.turns) == TRANSCRIPT_EXAMPLES
    text = "".join(segment.text for segment in render_base(revision.turns, "revision", DIRECT_EXAMPLES))
    assert text.endswith("### Revision:\n")


def test_the_plan_counts_no_critiques() -> None:
    nano = resolve_model("nano", hardware=None)  # type: ignore[arg-type]
    with_, without = (Tokens.of(nano, Workload(10, 2, critique=critique)) for critique in (True, False))
    assert with_.written - without.written == 20 * 2 * 30  # two critiques of 30 tokens of 20 rows
    assert without.prompts < with_.prompts and without.sent < with_.sent


def test_the_shipped_model_revises_directly_to_a_report(
    nano_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It never saw this prompt, so few pairs pass; what is reported of them must be right all the same."""
    rows = [f"How do I {verb} the old kettle in a small kitchen?" for verb in ("clean", "fix", "paint")]
    (tmp_path / "rows.txt").write_text("\n".join(rows), encoding="utf-8")
    flags = ["--no-critique", "--model", "nano", "--rounds", "1", "-v", "0", "--instructions", f"{tmp_path}/rows.txt"]
    checkpoints = str(tmp_path / "checkpoints")
    folders = ["--max-tokens-answer", "120", "--data-dir", str(tmp_path), "--checkpoint-dir", checkpoints]
    assert generate_mvp.main([*flags, *folders]) in (EXIT_OK, EXIT_NO_GO)
    report = read_json(tmp_path / "mvp/report.json")
    assert {gate["name"] for gate in report["gates"]} == {"accepted pairs"}
    assert {"revision_repaired", "judge_kappa"} <= report["metrics"].keys()
    settings = report["settings"]["generation"]
    named = ("critic", "critique", "rounds", "principles")
    assert [settings[name] for name in named] == ["nano", False, 1, "targeted"]
    assert any("--no-critique" in note for note in report["notes"])
    assert "--no-critique: answers were revised directly" in " ".join(capsys.readouterr().out.split())
