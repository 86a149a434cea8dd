"""Instructions, sources, stages, gate and runner, with a scripted engine: order, faults, accounting."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine, script

from cai_experiment.constitution.grid import KINDS, TOPICS, draw
from cai_experiment.constitution.principles import load_constitution
from cai_experiment.constitution.prompts import NO_ISSUE
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.example import Origin, to_example
from cai_experiment.pipeline.gate import GateSettings, gate
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.known import KnownTexts
from cai_experiment.pipeline.runner import MAX_FAILURES, run_pipeline
from cai_experiment.pipeline.settings import RunResult, RunSettings
from cai_experiment.pipeline.sources import load_instructions
from cai_experiment.pipeline.stages import ExampleStages, StageSettings
from cai_experiment.pipeline.story import Story
from cai_experiment.pipeline.work_list import WorkList
from cai_experiment.records.files import read_examples, read_jsonl
from cai_experiment.records.store import RunFolder

CONSTITUTION = load_constitution()
TOO_LONG = "prompt of 99 tokens and 5 new tokens do not fit in a context of 64"
FILES = ("instructions.jsonl", "pairs.jsonl", "rejected.jsonl")


# ---------------------------------------------------------------- grid and written instructions


def test_grid_uses_every_cell_once_before_any_comes_again() -> None:
    size = len(TOPICS) * len(KINDS)
    first, second = [draw(3, i) for i in range(size)], [draw(3, i) for i in range(size, 2 * size)]
    assert len(set(first)) == len(set(second)) == size
    assert first != second and first != [draw(4, i) for i in range(size)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("How do I clean the old copper kettle in my kitchen on a Sunday?", ""),
        ("how do I clean the old copper kettle, in my kitchen, on a sunday", "duplicate"),
        ("How do I clean the old copper kettle in my kitchen on a Sunday, please?", "near_duplicate"),
        ("How do I clean the new iron pan in my garden on a Monday?", ""),
        ("Why?", ""),
        ("Why!", "duplicate"),
    ],
)
def test_near_duplicates_are_refused(text: str, reason: str) -> None:
    known = KnownTexts()
    for earlier in ("How do I clean the old copper kettle in my kitchen on a Sunday?", "Why?"):
        if earlier != text:
            known.add(earlier)
    assert known.add(text) == reason


def drawn_from(work: WorkList) -> list[Instruction]:
    """What can be drawn now."""
    found = []
    while (instruction := work.next()) is not None:
        found.append(instruction)
    return found


def test_candidates_are_decided_in_order_whatever_the_order_of_arrival() -> None:
    texts = ["How do I mend a tent?", "", "How do I mend a tent?", "One.\n\nTwo.", "Why is rain wet?", "Cut off"]
    finishes = ["stop"] * 5 + ["length"]
    lists = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]):
        work = WorkList(RunSettings(pairs=6, max_draws=6, seed=1))
        ids = [prompt.id for prompt in work.prompts(6)]
        assert len(ids) == work.writer.undecided == 6 and not work.prompts(6)
        lists.append([])
        for n in order:
            work.take(Completion(ids[n], texts[n], finishes[n]))
            lists[-1] += drawn_from(work)
        assert work.refused == {"empty": 1, "duplicate": 1, "paragraphs": 1, "too_long": 1}
    assert lists[0] == lists[1] == lists[2]
    assert [(i.id, i.text) for i in lists[0]] == [("000000", texts[0]), ("000001", texts[4])]
    assert lists[0][1].source == "self:{}/{}".format(*draw(1, 4))


# ---------------------------------------------------------------- instruction files


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "\ufeffOne?\r\n\r\n  Two?\n", ["One?", "Two?"]),
        ("a.jsonl", '{"instruction": "Sort", "input": "b a"}\n"Plain?"\n', ["Sort\n\nb a", "Plain?"]),
        ("a.jsonl", '[{"prompt": "An array?"}]', ["An array?"]),
        ("a.json", '{"T": {"S:": ["One?", "Two?"]}, "U": ["Three?"]}', ["One?", "Two?", "Three?"]),
        ("a.json", '[{"instruction": "I", "instances": [{"input": "x", "output": "y"}]}]', ["I\n\nx"]),
        ("a.csv", 'Behavior,ContextString\r\nDo it,"Line 1\nline 2"\r\nSay,\r\n', ["Line 1\nline 2\n\nDo it", "Say"]),
        ("a.jsonl", json.dumps({"chosen": "\n\nHuman: A\n\nB\n\nAssistant: C\n\nHuman: D"}), ["A\n\nB"]),
        ("a.jsonl", json.dumps({"transcript": "\n\nHuman: A\n\nHuman: B\n\nAssistant: C"}), ["A\n\nB"]),
    ],
)
def test_sources_of_every_shape(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    rows = load_instructions(write(tmp_path / name, content))
    assert [row.text for row in rows] == texts
    assert [row.id for row in rows] == [f"{i:06d}" for i in range(len(texts))]
    assert all(row.source.startswith(name + ":") for row in rows)


def test_a_field_is_named_by_flag(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,ask\n1,One?\n2,Two?\n")
    assert [row.text for row in load_instructions(path, "ask")] == ["One?", "Two?"]


@pytest.mark.parametrize(
    ("name", "content", "field", "words"),
    [
        ("a.txt", "", None, "holds no instructions"),
        ("a.txt", "x", "ask", "has no field 'ask'"),
        ("a.doc", "x", None, "unknown kind of file '.doc'"),
        ("a.txt", b"fine\nbroken \xff\n", None, "a.txt:2: byte 0xff is not UTF-8"),
        ("a.jsonl", '{"instruction": "a"}\n{"instruction": \n', None, "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"instruction": "a"}\n{"other": "b"}\n', None, "row 2 has none of the fields"),
        ("a.jsonl", '{"instruction": "a"}\n{"instruction": 3}\n', None, "row 2: field 'instruction' is no text (int)"),
        ("a.jsonl", '{"ask": "a"}\n{"other": "b"}\n', "ask", "row 2 has no field 'ask'; name one of its own"),
        ("a.jsonl", '{"instruction": " "}\n', None, "row 1 has an empty instruction"),
        ("a.json", '{"T": [1]}', None, "row T > 1 is int"),
        ("a.json", "[" * 100_000, None, "nested too deeply"),
        ("a.csv", "instruction,b\nx\n", None, "row 1 has another number of cells"),
        ("a.csv", 'instruction\n"x\n', None, "a.csv:1: unexpected end of data"),
    ],
)
def test_source_errors_name_file_row_and_field(
    tmp_path: Path, name: str, content: str | bytes, field: str | None, words: str
) -> None:
    with pytest.raises(BadInputError, match=re.escape(words)) as raised:
        load_instructions(write(tmp_path / name, content), field)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be read"):
        load_instructions(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("harmbench/harmbench_behaviors_text_all.csv", 400),
        ("harmbench/harmbench_behaviors_text_test.csv", 320),
        ("harmbench/harmbench_behaviors_text_val.csv", 80),
        ("hh_rlhf/harmless_base_test_first1000.jsonl", 1000),
        ("hh_rlhf/red_team_attempts_shape_sample5.json", 5),
        ("self_instruct/seed_tasks.jsonl", 175),
        ("alpaca/alpaca_sample_2000.json", 2000),
        ("red_team_prompts/catqa_english.json", 550),
        ("red_team_prompts/harmfulqa.json", 1960),
        ("red_team_prompts/dangerousqa.json", 187),
    ],
)
def test_public_files_load_as_they_are(shared_data: Path, name: str, rows: int) -> None:
    found = load_instructions(shared_data / name)
    assert len(found) == len({row.id for row in found}) == len({row.source for row in found}) == rows
    assert all(row.text == row.text.strip() != "" for row in found)


def test_harmbench_context_comes_first(shared_data: Path) -> None:
    path = shared_data / "harmbench" / "harmbench_behaviors_text_all.csv"
    with open(path, newline="", encoding="utf-8") as file:
        raw = list(csv.DictReader(file))
    contextual = 0
    for row, found in zip(raw, load_instructions(path), strict=True):
        assert found.text.endswith(row["Behavior"].strip())
        if row["ContextString"]:
            assert found.text.startswith(row["ContextString"].strip())
            contextual += 1
    assert contextual == 100


def test_hh_openings_are_whole_and_human(shared_data: Path) -> None:
    path = shared_data / "hh_rlhf" / "harmless_base_test_first1000.jsonl"
    for row, found in zip(read_jsonl(path, repair=False), load_instructions(path), strict=True):
        assert row["chosen"].startswith("\n\nHuman: " + found.text[:20])
        assert row["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip() == found.text


def test_inputs_follow_their_instruction(shared_data: Path) -> None:
    for name in ("alpaca/alpaca_sample_2000.json", "self_instruct/seed_tasks.jsonl"):
        path = shared_data / name
        rows = json.loads(path.read_text()) if name.endswith(".json") else read_jsonl(path, repair=False)
        for row, found in zip(rows, load_instructions(path), strict=True):
            given = row["input"] if "input" in row else row["instances"][0]["input"]
            assert found.text.startswith(row["instruction"].strip()) and found.text.endswith(given.strip())


# ---------------------------------------------------------------- the stages of one example


def play(stages: ExampleStages, speak=script) -> list[list[Prompt]]:
    """Run one machine to its end; the lists of prompts that it asked for."""
    asked, steps = [], stages.steps()
    try:
        prompts = next(steps)
        while True:
            asked.append(prompts)
            prompts = steps.send({p.id: speak(p) for p in prompts})
    except StopIteration:
        return asked


def say(**by_kind: object):
    """A speaker: texts, completions or functions of the prompt by kind; verdicts yes for answers, no for revisions."""

    def speak(prompt: Prompt) -> Completion:
        what = by_kind.get(prompt.speak_as, "Text of its own.")
        what = what(prompt) if callable(what) else what
        if isinstance(what, Completion):
            return dataclasses.replace(what, id=prompt.id)
        if prompt.options and isinstance(what, str):
            yes = 1.0 if any(t.kind == "revision" for t in prompt.turns) is False else -1.0
            odds = yes if prompt.id.endswith("yes_first") else -yes
            return Completion(prompt.id, "", "stop", logprobs=(odds, 0.0))
        return Completion(prompt.id, what, "stop", prompt_tokens=5, completion_tokens=2)

    return speak


def stages(**settings) -> ExampleStages:
    return ExampleStages(Instruction("000007", "Why?", "test:1"), CONSTITUTION.principles, StageSettings(**settings))


def test_stages_of_one_round_in_order_with_their_sampling() -> None:
    machine = stages(principles="random", seed=5)
    asked = play(machine, say(answer=" A0 \n", critique="C1", revision="A1"))
    assert [[p.id.split("/", 1)[1] for p in step] for step in asked] == [
        ["answer/0"],
        [f"verdict/0/{machine.draft.rounds[0].principle.id}/{order}" for order in ("yes_first", "no_first")],
        ["critique/0"],
        ["meaningful/0/yes_first", "meaningful/0/no_first", "revision/0"],
        [f"verdict/1/{machine.draft.rounds[0].principle.id}/{order}" for order in ("yes_first", "no_first")],
    ]
    spoken = {p.speak_as: p.sampling for step in asked for p in step if not p.options}
    assert {k: (s.temperature, s.max_tokens, s.seed, s.key) for k, s in spoken.items()} == {
        "answer": (0.7, 500, 5, "000007/answer/0"),
        "critique": (0.3, 300, 5, "000007/critique/0"),
        "revision": (0.7, 500, 5, "000007/revision/0"),
    }
    draft = machine.draft
    assert (draft.initial_answer, draft.answer, draft.fault) == ("A0", "A1", "")
    assert draft.rounds[0].verdict_before.answer == "yes" and draft.rounds[0].verdict_after.answer == "no"
    assert (draft.prompt_tokens, draft.completion_tokens) == (15, 6)


def test_targeted_takes_the_most_violated_principle_and_never_twice() -> None:
    strength = {"privacy": 4.0, "fair": 9.0, "credit": 9.0}

    def weigh(prompt: Prompt) -> Completion:
        principle = prompt.id.split("/")[3] if "/verdict/" in prompt.id else ""
        odds = strength.get(principle, -1.0) * (1 if prompt.id.endswith("yes_first") else -1)
        return Completion(prompt.id, "", "stop", logprobs=(odds, 0.0))

    machine = stages(rounds=3)
    asked = play(machine, say(verdict=weigh))
    assert [r.principle.id for r in machine.draft.rounds] == ["fair", "credit", "privacy"]  # ties: as listed
    assert [len(step) for step in asked[1:3]] == [15, 3]  # each in one order, then the likeliest three in the other
    assert machine.draft.rounds[1].weighed_before == 15  # one known from the verdict on the revision, 14 asked again


def test_no_violation_is_lost_by_asking_for_the_second_order_only_where_a_yes_is_possible() -> None:
    draws = random.Random(3)
    for _ in range(50):
        odds = {p.id: (draws.gauss(-1, 2), draws.gauss(-1, 2)) for p in CONSTITUTION.principles}  # by order, for "yes"

        def weigh(prompt: Prompt, odds: dict[str, tuple[float, float]] = odds) -> Completion:
            if "/verdict/" not in prompt.id:
                return Completion(prompt.id, "", "stop", logprobs=(1.0, 0.0))
            first, second = odds[prompt.id.split("/")[3]]
            weighed = (first, 0.0) if prompt.id.endswith("yes_first") else (0.0, second)
            return Completion(prompt.id, "", "stop", logprobs=weighed)

        machine = stages()
        play(machine, say(verdict=weigh))
        (one,) = machine.draft.rounds
        yes = {id for id, (first, second) in odds.items() if first > 0 and second > 0}
        assert {id for id, verdict in one.judged_before.items() if verdict.answer == "yes"} == yes
        if yes:
            assert sum(odds[one.principle.id]) >= max(sum(odds[id]) for id in yes)


def test_random_principles_follow_the_seed_without_repeats() -> None:
    def drawn(seed: int) -> list[str]:
        machine = stages(rounds=15, principles="random", seed=seed)
        play(machine, say())
        return [r.principle.id for r in machine.draft.rounds]

    assert sorted(drawn(1)) == sorted(p.id for p in CONSTITUTION.principles)
    assert drawn(1) == drawn(1) != drawn(2)


def test_the_transcript_grows_through_the_rounds() -> None:
    machine = stages(rounds=2)
    asked = play(machine, say(answer="A0", critique="C", revision=lambda p: "A" + p.id[-1] + "!"))
    critique = next(p for step in asked for p in step if p.id.endswith("critique/1"))
    assert [t.kind for t in critique.turns] == [
        "instruction", "answer", "critique_request", "critique", "revision_request", "revision", "critique_request",
    ]  # fmt: skip
    assert critique.turns[5].text == "A0!"
    for before, after in pairwise(asked):  # every prompt continues what was said before
        assert after[0].turns[: len(before[-1].turns) - 1] == before[-1].turns[: len(before[-1].turns) - 1]


def test_an_abstention_keeps_the_answer_and_skips_the_revision() -> None:
    machine = stages(rounds=2)
    asked = play(machine, say(answer="A0", critique=NO_ISSUE))
    draft = machine.draft
    assert [r.abstained for r in draft.rounds] == [True, True] and draft.answer == "A0" and not draft.revisions
    # every first order says yes, so every second one is asked; verdicts on an unchanged answer are not asked again
    assert [len(step) for step in asked] == [1, 15, 15, 1, 1]


@pytest.mark.parametrize(
    ("kind", "what", "fault"),
    [
        ("answer", "  ", "empty"),
        ("critique", Completion("", "cut", "length"), "too_long"),
        ("revision", Completion("", "cut", "length"), "too_long"),
        ("revision", "", "empty"),
        ("verdict", Completion("", "", "error", error="boom"), "engine_error"),
        (
            "critique",
            Completion("", "", "error", error="prompt of 9 tokens do not fit in a context of 4"),
            "prompt_too_long",
        ),
    ],
)
def test_faults_end_the_example(kind: str, what: object, fault: str) -> None:
    machine = stages()
    play(machine, say(**{kind: what}))
    assert machine.draft.fault == fault


# ---------------------------------------------------------------- the last revision, by every principle revised for


def flawed(*broken: str, abstain_in: int = -1):
    """A speaker of answers that break these principles: before any revision, after the first, after the second ..."""

    def speak(prompt: Prompt) -> Completion:
        about = prompt.id.split("/")
        if about[1] == "verdict":
            odds = 1.0 if about[3] in broken[int(about[2])].split() else -1.0
            return Completion(prompt.id, "", "stop", logprobs=(odds if about[4] == "yes_first" else -odds, 0.0))
        if prompt.options:
            return Completion(prompt.id, "", "stop", logprobs=(1.0, 0.0))
        if about[1] == "critique":
            return Completion(prompt.id, NO_ISSUE if int(about[2]) == abstain_in else "It is harsh.", "stop")
        return Completion(prompt.id, BEFORE if about[1] == "answer" else f"{AFTER} {about[2]}.", "stop")

    return speak


def verdict_steps(asked: list[list[Prompt]], revisions: int) -> list[list[str]]:
    """Principles of the verdicts on the answer after so many revisions, step by step, by both orders."""
    ids = [[p.id.split("/") for p in step] for step in asked]
    found = [[id[3] for id in step if id[1:3] == ["verdict", str(revisions)]] for step in ids]
    return [step for step in found if step]


@pytest.mark.parametrize(
    ("broken", "own", "final", "reasons"),
    [
        (("privacy fair", "fair", ""), ["no", "no"], ["no", "no"], []),
        (("privacy fair", "fair", "privacy"), ["no", "no"], ["yes", "no"], ["contradicts_principle"]),  # brought back
        (("privacy fair", "privacy fair", ""), ["yes", "no"], ["no", "no"], []),  # mended by the second
        (("privacy", "privacy", ""), ["yes", "no"], ["no", "no"], []),
        (("privacy fair", "fair", "fair"), ["no", "yes"], ["no", "yes"], ["contradicts_principle"]),
    ],
)
def test_the_pair_is_judged_by_what_its_chosen_answer_breaks(
    broken: tuple[str, ...], own: list[str], final: list[str], reasons: list[str]
) -> None:
    machine = stages(rounds=2)
    asked = play(machine, flawed(*broken))
    example = to_example(machine.draft, GateSettings(), Origin(0, "g", "c"))
    assert example.rounds[0].principle_id == "privacy"
    assert [one.verdict_after for one in example.rounds] == own and example.meta["final_verdicts"] == final
    assert list(example.reject_reasons) == reasons
    first, second = (one.principle_id for one in example.rounds)
    assert verdict_steps(asked, 2) == [[first, second] * 2] and len({p.turns[:-1] for p in asked[-1]}) == 1


def test_the_log_closes_with_what_the_chosen_answer_breaks(tmp_path: Path) -> None:
    """The second revision mends what the first one left."""
    machine = stages(rounds=2)
    play(machine, flawed("privacy fair", "privacy fair", ""))
    example = to_example(machine.draft, GateSettings(), Origin(0, "g", "c"))
    path = tmp_path / "content_log.jsonl"
    with ContentLogger(0, path) as logger:
        Story(logger, path, CONSTITUTION.principles).tell(machine.draft, example, (1, 1), 1.0)
    (closing,) = (entry["content"] for entry in read_jsonl(path) if entry["stage"] == "TRAINING-PAIR-CREATED")
    assert "→ 0.0 (100% violation reduction)" in closing


def test_final_verdicts_are_asked_only_where_an_earlier_round_revised_too() -> None:
    machine = stages(rounds=1)
    assert len(play(machine, flawed("privacy", ""))[-1]) == 2 and machine.draft.rounds[0].final_verdict.answer == "no"
    machine = stages(rounds=2)
    play(machine, flawed("privacy fair", "fair", abstain_in=1))
    assert machine.draft.rounds[0].final_verdict is machine.draft.rounds[0].verdict_after
    assert machine.draft.rounds[1].final_verdict is None
    machine = stages(rounds=3)
    asked = play(machine, flawed("privacy fair", "fair", "privacy", abstain_in=2))
    assert verdict_steps(asked, 2)[0] == ["fair"] * 2 and verdict_steps(asked, 2)[-1] == ["privacy"] * 2
    assert [one and one.answer for one in (r.final_verdict for r in machine.draft.rounds)] == ["yes", "no", None]


# ---------------------------------------------------------------- the gate

BEFORE = "Take the panel off. Hit it hard until it moves. Then put it back and wait for a day."
AFTER = "Take the panel off. Ask a person who knows it. Then put it back and wait for a day."


@pytest.mark.parametrize(
    ("before", "after", "verdicts", "reasons"),
    [
        (BEFORE, AFTER, [("yes", "no")], []),
        (BEFORE, BEFORE.replace(" ", "  ") + "\n", [("yes", "no")], ["identical"]),
        (BEFORE * 9, BEFORE * 9 + " Yes.", [("yes", "no")], ["near_identical"]),
        (BEFORE, f"Sure, here is the revised answer: {AFTER}", [("yes", "no")], ["meta_prefix"]),
        (BEFORE, "No issue found.", [("yes", "no")], ["meta_prefix", "length_ratio"]),
        (BEFORE, "I'm sorry, but I can't help with that.", [("yes", "no")], ["refusal_as_revision"]),
        ("I cannot help with that.", "I can't help you with that.", [("yes", "no")], []),
        (BEFORE, AFTER * 4, [("yes", "no")], ["length_ratio"]),
        (BEFORE, "Ask someone.", [("yes", "no")], ["length_ratio"]),
        (BEFORE, AFTER, [("no", "no")], ["verdict_unchanged"]),
        (BEFORE, AFTER, [("yes", "yes")], ["verdict_unchanged", "contradicts_principle"]),
        (BEFORE, AFTER, [("yes", "undecided")], ["judge_undecided"]),
        (BEFORE, AFTER, [("undecided", "no"), ("no", "no")], ["judge_undecided"]),
        (BEFORE, AFTER, [("yes", "unparsed")], ["judge_unparsed"]),
        (BEFORE, AFTER, [("yes", "no"), ("no", "no")], []),  # a later polish costs nothing
        (BEFORE, AFTER, [("yes", "no"), ("no", "undecided")], []),
        (BEFORE, AFTER, [("yes", "no"), ("no", "yes")], ["contradicts_principle"]),
        (BEFORE, " ", [], ["empty", "verdict_unchanged"]),
    ],
)
def test_gate_reasons(before: str, after: str, verdicts: list[tuple[str, str]], reasons: list[str]) -> None:
    assert gate(before, after, verdicts, GateSettings()) == reasons


def test_gate_thresholds_are_settings() -> None:
    assert gate(BEFORE, AFTER, [("yes", "no")], GateSettings(max_similarity=0.5)) == ["near_identical"]
    assert gate(BEFORE, AFTER * 4, [("no", "no")], GateSettings(max_length_ratio=9, skip=("verdict_unchanged",))) == []
    with pytest.raises(BadInputError, match="'identical'"):
        GateSettings(skip=("identical",))


# ---------------------------------------------------------------- the runner


def run(path: Path, engine: ScriptedEngine, critic: ScriptedEngine | None = None, **settings) -> RunResult:
    chosen = RunSettings(**{"pairs": 12, "max_draws": 60, "stages": StageSettings(rounds=2)} | settings)
    with (
        RunFolder(path) as folder,
        ContentLogger(0, path / "content_log.jsonl") as logger,
        Progress(chosen.pairs, verbosity=0) as progress,
    ):
        return run_pipeline(chosen, folder, engine, critic or engine, CONSTITUTION, logger, progress)


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in FILES}


def test_a_run_reaches_its_pairs_and_accounts_for_every_instruction(tmp_path: Path) -> None:
    result = run(tmp_path, ScriptedEngine())
    pairs, rejected = read_examples(tmp_path / "pairs.jsonl"), read_examples(tmp_path / "rejected.jsonl")
    instructions = read_jsonl(tmp_path / "instructions.jsonl")
    assert result.complete and len(pairs) == result.accepted == 12
    assert sorted(e.id for e in (*pairs, *rejected)) == [i["id"] for i in instructions]
    assert pairs[-1].id == instructions[-1]["id"] == f"{result.drawn - 1:06d}"
    assert all(e.reject_reasons for e in rejected) and not any(e.reject_reasons for e in pairs)
    assert {r for e in rejected for r in e.reject_reasons} == set(result.reasons)
    assert result.refused.keys() & {"duplicate", "near_duplicate"}
    for pair in pairs:
        chosen = pair.preference_pair
        assert (chosen.prompt, chosen.chosen, chosen.rejected) == (
            pair.instruction, pair.revised_answer, pair.initial_answer,
        )  # fmt: skip
        assert pair.principle in [r.principle for r in pair.rounds if r.revised_answer]
        assert pair.meta["generator"] == "scripted@0" and pair.meta["tokens"]["prompt"] > 0
    assert result.manifest.counts["accepted"] == 12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_files_do_not_depend_on_the_order_of_completions(tmp_path: Path, seed: int, slots: int) -> None:
    run(tmp_path / "a", ScriptedEngine())
    run(tmp_path / "b", ScriptedEngine(seed, slots))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_two_engines_share_the_work(tmp_path: Path) -> None:
    generator, critic = ScriptedEngine(1), ScriptedEngine(2)
    run(tmp_path / "two", generator, critic)
    run(tmp_path / "one", ScriptedEngine())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert all("critique" in key or "verdict" in key or "meaningful" in key for key in critic.asked)
    assert not any("critique" in key or "verdict" in key or "meaningful" in key for key in generator.asked)


def test_few_examples_are_begun_in_vain(tmp_path: Path) -> None:
    engine = ScriptedEngine(4, 32)
    result = run(tmp_path, engine, pairs=40, max_draws=200)
    begun = sum(key.endswith("answer/0") for key in engine.asked)
    assert result.complete and begun <= result.drawn * 1.1 + 2


def test_every_row_of_a_file_is_used_once(tmp_path: Path) -> None:
    rows = tuple(Instruction(f"{i:06d}", f"Question {i % 4}?", f"f.txt:{i + 1}") for i in range(30))
    engine = ScriptedEngine(3)
    result = run(tmp_path, engine, instructions=rows, instructions_name="f.txt")
    assert result.complete and result.drawn == 30
    assert not any(key.startswith("instruction/") for key in engine.asked)
    assert [row["source"] for row in read_jsonl(tmp_path / "instructions.jsonl")] == [row.source for row in rows]


def test_a_run_without_enough_pairs_ends_at_its_maximum(tmp_path: Path) -> None:
    result = run(
        tmp_path, ScriptedEngine(speak=say(critique=NO_ISSUE, written_instruction=lambda p: script(p))), max_draws=7
    )
    assert not result.complete and result.accepted == 0 and result.drawn == 7
    assert result.reasons == {"no_violation_found": 7}


def test_a_model_that_writes_one_instruction_only_runs_dry(tmp_path: Path) -> None:
    result = run(tmp_path, ScriptedEngine(speak=say(written_instruction="Why is rain wet?")), pairs=2, max_draws=4)
    assert not result.complete and result.drawn == 1 and result.candidates == 40
    assert result.refused == {"duplicate": 39}


def failing(times: int, every: int = 5):
    """A speaker whose prompts fail `times` times, one prompt in `every`."""
    seen: dict[str, int] = {}

    def speak(prompt: Prompt) -> Completion:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        if sum(prompt.id.encode()) % every == 0 and seen[prompt.id] <= times:
            return Completion(prompt.id, "", "error", error="lost its slot")
        return script(prompt)

    return speak


def test_a_failed_prompt_is_asked_again_twice(tmp_path: Path) -> None:
    run(tmp_path / "a", ScriptedEngine())
    run(tmp_path / "b", ScriptedEngine(7, speak=failing(2)))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert any(row["finish"] == "error" for row in read_jsonl(tmp_path / "b" / "journal.jsonl"))


def test_a_prompt_that_always_fails_rejects_its_example_with_the_reason(tmp_path: Path) -> None:
    engine = ScriptedEngine(speak=failing(99, every=40))
    result = run(tmp_path, engine, max_draws=200)
    rejected = read_examples(tmp_path / "rejected.jsonl")
    assert result.reasons["engine_error"] > 0 and max(engine.asked.values()) == 3
    assert {e.meta["error"] for e in rejected if "engine_error" in e.reject_reasons} == {"lost its slot"}


def test_a_prompt_that_does_not_fit_is_not_asked_again(tmp_path: Path) -> None:
    engine = ScriptedEngine(speak=say(critique=Completion("", "", "error", error=TOO_LONG), written_instruction=script))
    result = run(tmp_path, engine, max_draws=6)
    assert result.reasons == {"prompt_too_long": 6} and max(engine.asked.values()) == 1


def dying_after(completions: int):
    """A speaker that fails on everything once it has given so many completions."""
    given = iter(range(completions))

    def speak(prompt: Prompt) -> Completion:
        return script(prompt) if next(given, None) is not None else Completion(prompt.id, "", "error", error="gone")

    return speak


def test_a_broken_engine_stops_the_run_and_the_same_command_resumes(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"failed {MAX_FAILURES} times running.*gone"):
        run(tmp_path / "b", ScriptedEngine(5, speak=dying_after(200)))
    run(tmp_path / "a", ScriptedEngine())
    run(tmp_path / "b", ScriptedEngine())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_changed_settings_are_shown_and_refused(tmp_path: Path) -> None:
    run(tmp_path, ScriptedEngine())
    with pytest.raises(BadInputError, match=r"rounds was 2, now 1.*--fresh"):
        run(tmp_path, ScriptedEngine(), stages=StageSettings(rounds=1))


def test_more_pairs_extend_a_finished_run(tmp_path: Path) -> None:
    run(tmp_path / "a", ScriptedEngine(), pairs=20, max_draws=90)
    run(tmp_path / "b", ScriptedEngine())
    engine = ScriptedEngine()
    run(tmp_path / "b", engine, pairs=20, max_draws=90)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    before = {row["id"] for row in read_jsonl(tmp_path / "b" / "journal.jsonl")} - set(engine.asked)
    assert len(before) > 500  # what stood in the journal was not asked again


def test_the_content_log_tells_each_example_once_and_whole(tmp_path: Path) -> None:
    result = run(tmp_path, ScriptedEngine())
    run(tmp_path, ScriptedEngine())
    entries = read_jsonl(tmp_path / "content_log.jsonl")
    ends = [e["metadata"]["example"] for e in entries if e["stage"].startswith("TRAINING-PAIR")]
    assert ends == [f"{i:06d}" for i in range(result.drawn)]
    said = {text for e in entries for text in e["metadata"].get("texts", ())}
    for example in read_examples(tmp_path / "pairs.jsonl"):
        assert {example.initial_answer, *(r.revised_answer for r in example.rounds if r.revised_answer)} <= said
