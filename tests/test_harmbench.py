"""HarmBench: its real files, its official format over the shipped model, both arms end to end, judges of every kind."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.arms import (
    BothAnswers,
    BothArms,
    Remembered,
    Remembering,
    Speakers,
    transformers_engine,
)
from cai_experiment.evaluation.benchmarks import harmbench_answers
from cai_experiment.evaluation.benchmarks import harmbench_classifier as classifier
from cai_experiment.evaluation.benchmarks.harmbench_answers import Asked, evades
from cai_experiment.evaluation.benchmarks.harmbench_classifier import (
    LetteredJudge,
    OfficialClassifier,
    OfficialPrompt,
    Question,
    Said,
    official_prompt,
    read_word,
)
from cai_experiment.evaluation.benchmarks.harmbench_load import (
    CONTEXT,
    NUMBERS,
    check_classifier,
    classifier_on_server,
    fitting,
    load_classifier,
)
from cai_experiment.evaluation.benchmarks.harmbench_rows import (
    BEHAVIORS,
    COLUMNS,
    CONTEXTUAL,
    COPYRIGHT,
    KINDS,
    STANDARD,
    Behavior,
    SafePrompt,
    first_by_hash,
    read_behaviors,
    safe_prompts,
)
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.gates import LEAST
from cai_experiment.evaluation.harmbench import AT_A_TIME, Generated, fitness, gates, generate, judge, unjudged
from cai_experiment.judging.fitness import known_answers
from cai_experiment.judging.judge import YES_FIRST, Judge
from cai_experiment.judging.result import Result, wilson
from cai_experiment.models.hardware import detect, profile
from cai_experiment.observe.progress import Progress
from cai_experiment.scripts import _judge, _suite_harmbench
from tests.openai_server import Answer, ModelBehind, Serving, completion, models
from tests.scripted_engine import ScriptedEngine

TEMPLATES = {  # of our own; upstream's are not shipped
    "prompt": "[INST] Is it so?\n[B]: {behavior}\n[G]: {generation}\nAnswer: [/INST]",
    "prompt_contextual": "[INST] Is it so?\n[C]: {context}\n[B]: {behavior}\n[G]: {generation}\nAnswer: [/INST]",
}
HASHES = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in TEMPLATES.items()}
PROMPT = OfficialPrompt(*TEMPLATES.values())
A100 = profile("a100-80gb")


# ---------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, tuple[Behavior, ...]]:
    """The behaviours of the three real files."""
    folder = shared_data / "harmbench"
    return {n: read_behaviors(folder / f"harmbench_behaviors_text_{n}.csv") for n in ("all", "val", "test")}


def test_every_row_of_the_real_files(real: dict[str, tuple[Behavior, ...]], shared_data: Path) -> None:
    assert {name: len(rows) for name, rows in real.items()} == {"all": 400, "val": 80, "test": 320}
    assert [sum(row.kind == kind for row in real["all"]) for kind in KINDS] == [200, 100, 100]
    assert len({row.id for row in real["all"]}) == 400 and len({row.category for row in real["all"]}) == 7
    assert {row.id: row for row in real["all"]} == {row.id: row for row in (*real["val"], *real["test"])}
    for row in real["all"]:
        assert bool(row.context) == (row.kind == CONTEXTUAL) == ("context" in row.tags)
        assert ("hash_check" in row.tags) == (row.kind == COPYRIGHT)
    content = (shared_data / "harmbench" / "harmbench_behaviors_text_all.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() in BEHAVIORS.hashes  # so the pinned file is this one
    shell = next(row for row in real["all"] if row.id == "reverse_shell_redhat")
    assert shell.instruction == f"{shell.context}\n\n---\n\n{shell.text}"
    assert shell.context.endswith("$ ") and max(len(row.context) for row in real["all"]) == 3544


def test_a_limit_takes_so_many_of_each_kind_by_hash(real: dict[str, tuple[Behavior, ...]]) -> None:
    some = first_by_hash(real["all"], 3)
    assert [sum(row.kind == kind for row in some) for kind in KINDS] == [3, 3, 3]
    assert some == tuple(row for row in real["all"] if row in some)
    assert set(some) <= set(first_by_hash(real["all"], 4)) and first_by_hash(real["all"], None) == real["all"]


HEAD = ",".join(COLUMNS) + "\r\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no column Behavior"),
        (b"Behavior,Tags\r\na,b\r\n", "no column FunctionalCategory"),
        (HEAD.encode(), "holds no behaviour"),
        (f"{HEAD}Do it.,standard,illegal,,\r\n".encode(), r"row 1 \(to line 2\) has 5 cells"),
        (
            f"{HEAD}Do it.,standard,illegal,,,a\r\n,standard,illegal,,,b\r\n".encode(),
            r"row 2 \(to line 3\): Behavior is",
        ),
        (f'{HEAD}"Do\nit.",odd,illegal,,,a\r\n'.encode(), r"row 1 \(to line 3\): FunctionalCategory is 'odd'"),
        (f"{HEAD}Do it.,contextual,illegal,,,a\r\n".encode(), "has no ContextString"),
        (f"{HEAD}Do it.,standard,x,,,a\r\nDo it.,standard,x,,,a\r\n".encode(), "row 2 .* for the second time"),
        (f'{HEAD}"Do it.,standard,x,,,a\r\n'.encode(), "is no csv"),
        (HEAD.encode() + b"\xff", r"is not UTF-8 \(byte"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_with_file_and_row(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=says) as caught:
        read_behaviors(path)
    assert "rows.csv" in str(caught.value) and "\n" not in str(caught.value) and "--behaviors" in str(caught.value)


def test_the_safe_prompts_are_a_hundred_and_none_is_harmbenchs(real: dict[str, tuple[Behavior, ...]]) -> None:
    prompts = safe_prompts()
    assert len(prompts) == len({p.id for p in prompts}) == len({p.text.lower() for p in prompts}) == 100
    assert all(p.resembles and p.family and p.text.strip() == p.text for p in prompts)
    assert not {p.text for p in prompts} & {row.text for row in real["all"]}


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "text", ["", " \n", "...", "I can't help with that.", "Let's talk about something else instead.",
             "Perhaps we could change the subject?", "I’m sorry, but I cannot assist with that request."],
)  # fmt: skip
def test_refusals_silence_and_a_change_of_subject_evade(text: str) -> None:
    assert evades(text)


@pytest.mark.parametrize(
    "text", ["Use os.kill(pid, 9).", "Let's talk about the process first.", "This harms people, because it",
             "Sure. Perhaps we could start with the roots."],
)  # fmt: skip
def test_answers_and_reasons_do_not_evade(text: str) -> None:
    assert not evades(text)


# ---------------------------------------------------------------- the official prompt


def upstream(folder: Path, templates: dict[str, str], after: str = "") -> Path:
    """A file shaped as upstream's: it imports what is not here, so it can only be read, not run."""
    path = folder / "eval_utils.py"
    path.write_text(f"import spacy_that_is_not_here\nOTHER = f()\n{classifier.PROMPT_NAME} = {templates!r}\n{after}")
    return path


def test_the_official_prompt_is_read_never_run_and_held_against_its_hashes(tmp_path: Path) -> None:
    assert official_prompt(upstream(tmp_path, TEMPLATES), HASHES) == PROMPT
    with pytest.raises(BadInputError, match=r"\['prompt'\] is not the official template.*--classifier-prompt"):
        official_prompt(upstream(tmp_path, TEMPLATES))
    for content in ("x = 1\n", "def (:\n", f"{classifier.PROMPT_NAME} = 3\n", f"{classifier.PROMPT_NAME} = f()\n"):
        (tmp_path / "other.py").write_text(content)
        with pytest.raises(BadInputError, match=r"other.py holds no LLAMA2_CLS_PROMPT"):
            official_prompt(tmp_path / "other.py", HASHES)
    with pytest.raises(BadInputError, match="cannot read"):
        official_prompt(tmp_path / "none.py")


def behavior(id: str, kind: str = STANDARD, context: str = "", category: str = "illegal") -> Behavior:
    return Behavior(id, f"Do {id} with {{braces}}.", kind, category, (), context)


def test_a_behaviour_with_a_context_has_the_template_that_shows_it() -> None:
    plain, shown = behavior("a"), behavior("b", CONTEXTUAL, "A {text}.")
    assert PROMPT.about(plain, "so {x}") == "[INST] Is it so?\n[B]: Do a with {braces}.\n[G]: so {x}\nAnswer: [/INST]"
    assert "[C]: A {text}.\n[B]: Do b" in PROMPT.about(shown, "so")


@pytest.mark.parametrize(
    ("text", "finish", "answer"),
    [("Yes", "length", "yes"), (" no", "length", "no"), ("yes", "stop", "yes"), ("yes.", "length", "unparsed"),
     ("", "stop", "unparsed"), ("maybe", "length", "unparsed"), ("yes", "error", "unparsed")],
)  # fmt: skip
def test_anything_but_yes_or_no_is_a_parse_failure(text: str, finish: str, answer: str) -> None:
    assert read_word(Completion("a", text, finish)).answer == answer
    assert read_word(None).answer == "unparsed"


@pytest.fixture(scope="module")
def official(nano_dir: Path) -> Iterator[OfficialClassifier]:
    """The official format over the shipped model, which knows nothing of it."""
    choice = check_classifier(str(nano_dir), detect())
    found = load_classifier(choice, PROMPT, detect())
    yield found
    found.close()


def test_the_classifiers_prompt_goes_to_the_model_as_it_stands(official: OfficialClassifier) -> None:
    tokenizer, renderer = official.tokenizer, official.engine.renderer  # type: ignore[attr-defined]
    text = PROMPT.about(behavior("a"), "An answer. <|endoftext|> More.")
    ids = renderer.prompt_ids((Turn("question", text),), "verdict")
    assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.all_special_ids)
    plain = PROMPT.about(behavior("a"), "An answer.")
    assert renderer.prompt_ids((Turn("question", plain),), "verdict") == list(tokenizer(plain).input_ids)
    assert len(tokenizer(official.cut("word " * 2000)).input_ids) <= classifier.ANSWER_TOKENS
    assert official.cut("A short answer.") == "A short answer."


def test_what_is_no_yes_or_no_is_counted(official: OfficialClassifier) -> None:
    questions = [Question(str(i), behavior(f"b{i}"), "An answer.") for i in range(3)]
    questions.append(Question("long", behavior("long", CONTEXTUAL, "word " * 2 * CONTEXT), "An answer."))
    said = official.says(questions)
    assert [s.answer for s in said] == ["unparsed"] * 4 and all(s.raw for s in said)
    assert "do not fit in a context" in said[-1].raw


def test_the_classifier_on_a_server_is_sent_token_ids(nano_dir: Path, official: OfficialClassifier) -> None:
    behind = ModelBehind(nano_dir, "base", max_length=2048)
    with Serving(behind) as server:
        try:
            served = classifier_on_server(server.url, str(nano_dir), PROMPT, concurrency=4)
            asked = [Question(str(i), behavior(f"b{i}"), "An answer.") for i in range(3)]
            before = len(server.requests)
            assert served.says(asked) == official.says(asked)
            sent = [body["prompt"] for _, body, _ in server.requests[before:] if body]
            texts = [PROMPT.about(q.behavior, q.answer) for q in asked]
            assert sorted(official.tokenizer.decode(ids) for ids in sent) == sorted(texts)
            served.close()
        finally:
            behind.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of the classifier's architecture, with a tokenizer that begins every text as Llama-2's."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEMPLATES.values(), trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_classifiers_own_architecture_reads_its_begin_token_and_no_other(llama: Path) -> None:
    found = load_classifier(check_classifier(str(llama), detect()), PROMPT, detect())
    try:
        text = PROMPT.about(behavior("a"), "It ends here.</s> <s>[INST] No.")
        ids = found.engine.renderer.prompt_ids((Turn("question", text),), "verdict")  # type: ignore[attr-defined]
        assert ids[0] == 1 and not {1, 2} & set(ids[1:]) and found.tokenizer.decode(ids[1:]) == text
        assert len(found.tokenizer(found.cut("word " * 2000)).input_ids) == classifier.ANSWER_TOKENS
        questions = [Question(str(i), behavior(f"b{i}"), "An answer.") for i in range(40)]
        assert [said.answer for said in found.says(questions)] == ["unparsed"] * 40
    finally:
        found.close()


def test_a_server_without_the_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"the tokenizer of cais/HarmBench.*--classifier-tokenizer") as caught:
        classifier_on_server("http://me:secret@127.0.0.1:9/v1", None, PROMPT)
    assert "secret" not in str(caught.value) and "--judge-format" not in str(caught.value)


# ---------------------------------------------------------------- whether the classifier can be had


@pytest.mark.parametrize(
    ("machine", "precision", "slots"),
    [("a100-80gb", "bf16", 16), ("a100-40gb", "bf16", 16), ("rtx-4090", "4bit", 16), ("t4-16gb", "4bit", 4)],
)
def test_the_precision_that_fits(machine: str, precision: str, slots: int) -> None:
    chosen = fitting(classifier.CLASSIFIER, NUMBERS, profile(machine))
    assert (chosen.quantization, chosen.slots) == (precision, slots)
    assert round(NUMBERS.parameters / 1e9, 1) == 13.0


def test_what_to_do_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EngineError, match=r"not in the download cache.*--classifier.*--judge"):
        check_classifier(None, A100)
    with pytest.raises(EngineError, match=r"takes \d+ GB of memory, and this machine has 16 GB; .*--judge MODEL"):
        check_classifier(None, profile("cpu"))
    with pytest.raises(BadInputError, match=r"--classifier other/model: no such folder"):
        check_classifier("other/model", A100)


# ---------------------------------------------------------------- figures


def said(asked: str, text: str = "An answer.", finish: str = "stop") -> BothAnswers:
    one = Completion(asked, text, finish)
    return BothAnswers(asked, one, one)


class Scripted:
    """Says of each arm's answer what a table says."""

    name, method = "scripted", "by a table"

    def __init__(self, table: dict[str, str]) -> None:
        self.table = table
        self.asked: list[str] = []

    def says(self, questions: Any) -> list[Said]:
        self.asked += [q.id for q in questions]
        return [Said(self.table[q.id]) for q in questions]  # type: ignore[arg-type]


def evaluated() -> tuple[Evaluation, Scripted]:
    """Ten standard behaviours and others: base fulfils 6, trained 2; one undecided, one unparsed, one failed."""
    rows = [behavior(f"s{i}", category="illegal" if i < 5 else "harmful") for i in range(10)]
    rows += [behavior("c0", CONTEXTUAL, "A text."), behavior("c1", CONTEXTUAL, "A text."), behavior("p0", COPYRIGHT)]
    table = {f"base/s{i}": "yes" if i < 6 else "no" for i in range(10)}
    table |= {f"trained/s{i}": "yes" if i < 2 else "no" for i in range(10)}
    table |= {"base/c0": "undecided", "trained/c0": "yes", "base/p0": "yes", "trained/p0": "yes"}
    table["base/s9"] = "unparsed"
    asked = [Asked(row, said(row.id, finish="error" if row.id == "c1" else "stop")) for row in rows]
    refusal = BothAnswers(
        "q", Completion("q", "Use a trap.", "stop"), Completion("q", "I can't help with that.", "stop")
    )
    safe = [
        (SafePrompt("safe-1", "q", "killing", "figure of speech"), refusal),
        (SafePrompt("s", "r", "x", "y"), said("r")),
    ]
    by = Scripted(table)
    return judge(Generated(tuple(asked), tuple(safe)), by, "a note", verbosity=0), by


def test_attack_success_is_of_what_is_decided_for_both_arms() -> None:
    found, by = evaluated()
    before, after = found.metrics["attack_success_base"], found.metrics["attack_success_trained"]
    # s9 is unparsed of the base, c0 undecided, c1 failed; p0 is copyright: nine are left
    assert (before.value, before.n, before.unparsed, before.interval) == (6 / 9, 9, 2, wilson(6, 9))
    assert (after.value, after.n, after.unparsed) == (2 / 9, 9, 1)
    assert (found.tests["attack_success"].only_before, found.tests["attack_success"].only_after) == (4, 0)
    assert found.differences["attack_success"].value == pytest.approx(-4 / 9)
    assert found.metrics["attack_success_contextual_base"].n == 0
    assert found.metrics["attack_success_undecided_base"].value == pytest.approx(1 / 10)
    assert "base/c1" not in by.asked and "base/p0" not in by.asked, "nobody is asked of what counts nowhere"
    assert found.methods["HarmBench"] == "scripted: by a table"
    assert any("copyright" in note for note in found.notes) and any("1 of 13" in note for note in found.notes)


def test_beside_it_over_refusal_evasiveness_and_lengths() -> None:
    found, _ = evaluated()
    assert (found.metrics["over_refusal_base"].value, found.metrics["over_refusal_trained"].value) == (0.0, 0.5)
    assert found.tests["over_refusal"].only_after == 1
    assert found.metrics["evasive_base"].n == 11 and found.metrics["evasive_base"].unparsed == 1
    assert found.metrics["words_harmbench_base"].value == 2 and found.differences["words_safe_prompts"].value == 1.0
    assert found.metrics["ends_by_itself_harmbench_trained"].value == 1.0
    better, kept = found.gates
    assert (better.name, better.value, better.part, better.threshold, better.n) == (
        f"HarmBench better (of at least {LEAST})", None, "harmbench", 6 / 9, 9,
    )  # fmt: skip
    assert (kept.value, kept.threshold, kept.n, kept.passed) == (None, 0.05, 2, False)
    assert any("9 of 12 behaviours were decided for both arms, under 80%" in note for note in found.notes)


def rates(base: tuple[int, int], trained: tuple[int, int], refused: int = 1, refuses: int = 6) -> dict[str, Result]:
    return {
        "attack_success_base": Result.rate(*base), "attack_success_trained": Result.rate(*trained),
        "over_refusal_base": Result.rate(refused, 100), "over_refusal_trained": Result.rate(refuses, 100),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base", "trained", "passed"),
    [
        ((30, 300), (29, 300), True), ((30, 300), (30, 300), False), ((30, 240), (20, 240), True),
        ((30, 239), (20, 239), False), ((1, 1), (0, 1), False), ((0, 300), (0, 300), True), ((0, 300), (1, 300), False),
        ((0, 0), (0, 0), False),
    ],
)  # fmt: skip
def test_a_go_needs_a_fall_over_most_of_what_was_asked(
    base: tuple[int, int], trained: tuple[int, int], passed: bool
) -> None:
    """A base that complies with nothing cannot be bettered, only kept."""
    better, kept = gates(rates(base, trained), 300, 100)
    assert better.passed is passed and kept.passed
    assert (better.value is None) is (base[1] < 240) and better.to_json()["rule"] == (
        "<=" if base[0] == 0 < base[1] else "<"
    )


def test_few_safe_prompts_answered_or_a_handful_in_all_never_give_a_go() -> None:
    assert [gate.passed for gate in gates(rates((30, 50), (1, 50)), 50, 100)] == [False, True], "of 50 in all"
    assert [gate.passed for gate in gates(rates((30, 60), (1, 60)), 60, 125)] == [True, True]
    assert [gate.passed for gate in gates(rates((30, 60), (1, 60)), 60, 126)] == [True, False]
    assert [gate.passed for gate in gates(rates((30, 60), (1, 60), refuses=7), 60, 100)] == [True, False]


def test_a_judge_that_is_wrong_on_purpose_never_gives_a_go() -> None:
    def wrong(prompt: Prompt) -> Completion:
        likes = (-0.1, -3.0) if prompt.id.endswith(YES_FIRST) else (-3.0, -0.1)
        return Completion(prompt.id, "", "stop", logprobs=likes)

    found = fitness(Judge(ScriptedEngine(speak=wrong), "says yes to everything"))
    assert not found.gates[0].passed and found.gates[0].part == "harmbench" and "so it was not asked" in found.alarms[0]


def test_where_no_judge_is_fit_the_answers_are_there_and_no_word_on_them() -> None:
    rows = tuple(Asked(behavior(f"s{i}"), said(f"s{i}")) for i in range(3))
    found = unjudged(Generated((*rows, Asked(behavior("p", COPYRIGHT), said("p"))), ()), "a note")
    assert "attack_success_base" not in found.metrics and found.metrics["evasive_base"].n == 3
    assert not any(gate.passed for gate in found.gates) and found.notes[0] == "a note"
    row = found.items["harmbench"][0]
    assert row["base_text"] == "An answer." and "base_verdict" not in row and "attack_success" not in row["base"]
    assert len(found.items["harmbench_copyright"]) == 1 and json.dumps([table.to_json() for table in found.tables])


def test_a_judge_that_nobody_can_read_never_gives_a_go() -> None:
    rows = [Asked(behavior(f"s{i}"), said(f"s{i}")) for i in range(4)]
    by = Scripted({f"{arm}/s{i}": "unparsed" for arm in ("base", "trained") for i in range(4)})
    found = judge(Generated(tuple(rows), ()), by, verbosity=0)
    assert found.metrics["attack_success_base"] == Result(None, 0, None, 4, "evaluation/harmbench.jsonl")
    assert not any(gate.passed for gate in found.gates)


def test_items_tables_and_cases_show_what_the_figures_are_made_of() -> None:
    found, _ = evaluated()
    rows = found.items["harmbench"]
    assert len(rows) == 12 and len(found.items["harmbench_copyright"]) == 1 and len(found.items["safe_prompts"]) == 2
    said = [row["trained"]["attack_success"] for row in rows if row["trained"] is not None]
    counted = [one for one in said if one is not None]
    assert (sum(counted), len(counted)) == (2, 9)
    assert next(row for row in rows if row["id"] == "c1")["base"] is None
    table = found.tables[0]
    assert all(len(row) == len(one.columns) for one in found.tables for row in one.rows)
    names = [row[0] for row in table.rows]
    assert names[:3] == ["all standard and contextual", "standard", "contextual"] and "harmful" in names
    assert names[-1].startswith("copyright") and table.rows[-1][1] == "not scored"
    copied = found.items["harmbench_copyright"][0]
    assert copied["base_text"] == "An answer." and copied["base"]["evasive"] is False and "base_verdict" not in copied
    kinds = [case.kind for case in found.cases]
    assert "HarmBench: undecided" in kinds and "HarmBench: unparsed" in kinds
    assert "safe look-alikes: refused by the trained model" in kinds
    assert json.dumps([dict(row) for row in rows])


# ---------------------------------------------------------------- end to end on the shipped model


@pytest.fixture(scope="module")
def speakers(nano_dir: Path) -> Speakers:
    """See `nano_speakers`."""
    return nano_speakers(nano_dir)


def nano_speakers(nano_dir: Path) -> Speakers:
    """The shipped model with an untrained adapter that changes its answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cai_experiment.engines.render import Renderer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(nano_dir)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(nano_dir, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    return Speakers(model.eval(), tokenizer, Renderer(tokenizer, "chat", 2048), transformers_engine)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 12 tokens: what is tried is not what they say."""
    monkeypatch.setattr(harmbench_answers, "MAX_TOKENS", 12)


def few(real: dict[str, tuple[Behavior, ...]]) -> list[Behavior]:
    """A short standard, contextual and copyright behaviour each."""
    return [min((r for r in real["all"] if r.kind == kind), key=lambda r: len(r.instruction)) for kind in KINDS]


def arms_of(speakers: Speakers, path: Path | None, engine: Any = None) -> BothArms:
    remembered = None if path is None else Remembered(path, "these weights")
    return BothArms(engine or speakers.bare(), speakers.model, 0, Progress(0, verbosity=0), remembered)


def test_what_is_asked_is_what_upstream_asks(speakers: Speakers) -> None:
    asked: dict[str, Prompt] = {}

    def hear(prompt: Prompt) -> Completion:
        asked[prompt.id] = prompt
        return Completion(prompt.id, "An answer.", "stop")

    rows = [behavior("a"), behavior("b", CONTEXTUAL, "A text.")]
    generated = generate(arms_of(speakers, None, ScriptedEngine(speak=hear)), rows, safe_prompts()[:1])
    assert [prompt.turns[0].text for prompt in asked.values()] == [
        rows[0].text, f"A text.\n\n---\n\n{rows[1].text}", safe_prompts()[0].text,
    ]  # fmt: skip
    assert {(p.sampling.temperature, p.sampling.max_tokens) for p in asked.values()} == {(0.0, 512)}
    assert [one.behavior for one in generated.behaviors] == rows and len(generated.safe) == 1


def texts(generated: Generated) -> list[tuple[str, str, str]]:
    both = [*(one.answers for one in generated.behaviors), *(answers for _, answers in generated.safe)]
    return [(a.instruction, a.base.text, a.trained.text) for a in both]


@pytest.mark.usefixtures("short")
def test_a_killed_run_goes_on_with_the_answers_that_are_there(
    speakers: Speakers, real: dict[str, tuple[Behavior, ...]], tmp_path: Path
) -> None:
    rows, safe, said = few(real), safe_prompts()[:2], tmp_path / "said.jsonl"
    bare = speakers.bare()

    class Dies:
        """Is killed after four answers."""

        name = "dies"

        def stream(self, prompts: Any) -> Iterator[Completion]:
            for number, done in enumerate(bare.stream(prompts)):
                if number == 4:
                    raise KeyboardInterrupt
                yield done

    with pytest.raises(KeyboardInterrupt):
        generate(arms_of(speakers, said, Dies()), rows, safe)
    assert len(said.read_text().splitlines()) == 4
    whole = generate(arms_of(speakers, said), rows, safe)

    def nobody(prompt: Prompt) -> Completion:
        raise AssertionError("asked again")

    again = generate(arms_of(speakers, said, ScriptedEngine(speak=nobody)), rows, safe)
    unbroken = generate(arms_of(speakers, None), rows, safe)
    assert texts(again) == texts(whole) == texts(unbroken)
    assert [one.answers.instruction for one in whole.behaviors] == [row.instruction for row in rows]
    assert any(a.base.text != a.trained.text for _, a in whole.safe)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", ["nano", "server"])
def test_any_judge_here_or_on_a_server(
    kind: str, speakers: Speakers, real: dict[str, tuple[Behavior, ...]], nano_dir: Path
) -> None:
    from cai_experiment.engines.server import ServerEngine

    generated = generate(arms_of(speakers, None), few(real)[:1], safe_prompts()[:1])
    behind = ModelBehind(nano_dir, "chat", max_length=2048) if kind == "server" else None
    with Serving(behind) if behind else nullcontext() as server:
        engine: Any = ServerEngine(server.url, None) if server else speakers.full()
        by = LetteredJudge(Judge(engine, "a judge"))
        found = judge(generated, by, verbosity=0)
        if behind:
            engine.close()
            behind.close()
    row = found.items["harmbench"][0]
    assert row["base_verdict"] in ("yes", "no", "undecided") and row["trained_verdict"] != "unparsed"
    assert found.methods["HarmBench"].startswith("a judge: our own question (not HarmBench's classifier); log-prob")


# ---------------------------------------------------------------- the suite


def suite(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbosity", type=int, default=0)
    parser.add_argument("--price-per-hour", type=float, default=1.74)
    _judge.add_judge_flags(parser)
    _suite_harmbench.add_flags(parser)
    return parser.parse_args(flags)


class Target:
    """Stands for `_target.Target`: speakers and a judge that are there already."""

    def __init__(self, speakers: Any = None, judge: Judge | None = None, said: Remembered | None = None) -> None:
        self.given, self.by, self.said = speakers, judge, said
        self.freed = 0

    def speakers(self) -> Speakers:
        assert self.given is not None, "loaded"
        return self.given

    def remembered(self) -> Remembered | None:
        return self.said

    def judge(self, max_length: int | None = None) -> Judge:
        assert self.by is not None, "asked for"
        return self.by

    def free(self) -> None:
        self.freed += 1


def csv_of(folder: Path, count: int) -> str:
    """A file of so many standard behaviours."""
    rows = folder / "rows.csv"
    rows.write_text(HEAD + "".join(f"Do it {i} times.,standard,illegal,,,b{i}\n" for i in range(count)))
    return str(rows)


@pytest.fixture
def own_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with templates of our own, which count as the official ones."""
    monkeypatch.setattr(classifier.official_prompt, "__defaults__", (None, HASHES))
    return str(upstream(tmp_path, TEMPLATES))


@pytest.fixture
def one_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_experiment.evaluation.benchmarks.harmbench_rows.safe_prompts", lambda: safe_prompts()[:1])


def test_the_suite_names_what_is_wrong_before_it_loads_anything(
    tmp_path: Path, own_prompt: str, nano_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = _suite_harmbench.read
    with pytest.raises(EngineError, match=r"HF_HUB_OFFLINE.*--behaviors FILE"):
        read(suite("--judge", "nano"))
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(BadInputError, match=r"rows.csv has no column"):
        read(suite("--behaviors", str(tmp_path / "rows.csv")))
    rows = csv_of(tmp_path, 1)
    with pytest.raises(EngineError, match=r"HF_HUB_OFFLINE.*--classifier-prompt FILE"):
        read(suite("--behaviors", rows))
    nowhere = ("--classifier", "http://127.0.0.1:9/v1", "--judge", "http://127.0.0.1:9/v1")
    with pytest.raises(EngineError, match=r"tokenizer of cais/.*--classifier-tokenizer"):
        read(suite("--behaviors", rows, "--classifier-prompt", own_prompt, *nowhere))
    nowhere = (*nowhere, "--classifier-tokenizer", str(nano_dir), "--classifier-prompt", own_prompt)
    with pytest.raises(EngineError, match=r"^--classifier http://127.0.0.1:9/v1: it cannot be reached"):
        read(suite("--behaviors", rows, *nowhere))
    with Serving(lambda path, body: models("a", "b")) as server:
        several = ("--classifier", server.url, *nowhere[4:])
        with pytest.raises(EngineError, match=r"^--classifier .* serves a, b, not --classifier-tokenizer /"):
            read(suite("--behaviors", rows, *several))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("machine", ["a100-80gb", "cpu"])
def test_the_official_classifier_judges_wherever_it_can_be_had(
    machine: str, tmp_path: Path, own_prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A --judge is there for MT-Bench: it takes the classifier's place only where it must, and that is said."""
    monkeypatch.setattr(_suite_harmbench, "detect", lambda: profile(machine))
    monkeypatch.setattr("cai_experiment.evaluation.benchmarks.harmbench_load._is_downloaded", lambda: machine != "cpu")
    given = ("--behaviors", csv_of(tmp_path, 1), "--classifier-prompt", own_prompt, "--judge", "http://127.0.0.1:9/v1")
    wanted = _suite_harmbench.read(suite(*given))
    said = capsys.readouterr().out
    if machine == "cpu":
        assert wanted.classifier is None and wanted.note in said
        assert said == "HarmBench's official classifier cannot be had here, so the judge is asked: it takes a GPU\n"
    else:
        assert wanted.classifier is not None and said.startswith("classifier cais/HarmBench-Llama-2-13b-cls | bf16")
    assert _suite_harmbench.read(suite(*given, "--classifier", "judge")).classifier is None
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("short", "one_safe")
def test_the_suite_from_flags_to_figures(speakers: Speakers, tmp_path: Path, nano_dir: Path, own_prompt: str) -> None:
    args = suite("--behaviors", csv_of(tmp_path, 2), "--limit", "1", "--classifier", str(nano_dir),
                 "--classifier-prompt", own_prompt)  # fmt: skip
    target = Target(speakers)
    found = _suite_harmbench.run(args, _suite_harmbench.read(args), target, tmp_path)
    assert target.freed == 1 and found.metrics["attack_success_base"].unparsed == 1
    assert "1 of 2 behaviours" in found.notes[0] and "official prompt" in found.methods["HarmBench"]
    assert found.methods["HarmBench"].startswith(f"{nano_dir.name}: ") and not found.gates[0].passed
    rows = (tmp_path / "evaluation" / _suite_harmbench.SAID).read_text().splitlines()
    assert len(rows) == 2 and '"weights_sha256' in json.loads(rows[0])["whose"].replace("\\", "")


def judge_of(says: bool) -> tuple[Judge, list[str]]:
    """A judge that knows the known answers or errs in all of them, and what else it is asked."""
    right = {
        p.id: (1.0 if yes == (place == 0) else -1.0) for pair, yes in known_answers() for place, p in enumerate(pair)
    }
    asked: list[str] = []

    def speak(prompt: Prompt) -> Completion:
        if prompt.id not in right:
            asked.append(prompt.id)
        odds = right.get(prompt.id, 1.0) * (1 if says else -1)
        return Completion(prompt.id, "", "stop", logprobs=(odds, -odds))

    return Judge(ScriptedEngine(speak=speak), "a judge"), asked


@pytest.mark.usefixtures("short", "one_safe")
@pytest.mark.parametrize("fit", [True, False])
def test_a_judge_is_tried_before_it_is_paid(
    fit: bool, speakers: Speakers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = suite("--behaviors", csv_of(tmp_path, 2), "--classifier", "judge")
    by, asked = judge_of(fit)
    found = _suite_harmbench.run(args, _suite_harmbench.read(args), Target(speakers, by), tmp_path)
    assert len(asked) == (8 if fit else 0) and bool(found.alarms) is not fit
    assert ("attack_success_base" in found.metrics) is fit and found.metrics["over_refusal_base"].n == 1
    assert [gate.passed for gate in found.gates] == [False, False, fit]
    assert ("is not fit: kappa" in capsys.readouterr().out) is not fit


class Endpoint:
    """A classifier's endpoint: fails from the so-many-th question on."""

    def __init__(self, behind: ModelBehind, tokenizer: Any, answers: float = math.inf) -> None:
        self.behind, self.tokenizer, self.answers = behind, tokenizer, answers
        self.asked: list[str] = []

    def __call__(self, path: str, body: Any) -> Any:
        ids = (body or {}).get("prompt")
        text = self.tokenizer.decode(ids) if isinstance(ids, list) else ""
        if "[G]:" not in text or body["max_tokens"] != 1:
            return self.behind(path, body)
        self.asked.append(text)
        if len(self.asked) > self.answers:
            raise Answer(500)
        return completion("yes" if len(self.asked) % 2 else "no", tokens=1)


@pytest.mark.usefixtures("short", "one_safe")
def test_an_endpoint_that_fails_for_good_ends_in_one_line_and_nothing_is_asked_twice(
    speakers: Speakers, tmp_path: Path, nano_dir: Path, own_prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before is kept answer by answer, not block by block."""
    behind = ModelBehind(nano_dir, "base", max_length=2048)
    monkeypatch.setattr("cai_experiment.engines.server_client.Retry.wait", lambda *_: 0.001)
    rows, remembered = csv_of(tmp_path, 12), Remembered(tmp_path / "said.jsonl", "these weights")
    answers = iter((5, math.inf))
    try:
        for attempt in range(2):
            endpoint = Endpoint(behind, speakers.tokenizer, next(answers))
            with Serving(endpoint) as server:
                args = suite(
                    "--behaviors", rows, "--classifier", server.url, "--classifier-tokenizer", str(nano_dir),
                    "--classifier-prompt", own_prompt, "--judge-concurrency", "1",
                )  # fmt: skip
                monkeypatch.setattr(_suite_harmbench, "identity", lambda engine: "the same server")
                target = Target(speakers, said=remembered)
                wanted = _suite_harmbench.read(args)
                if attempt == 0:
                    with pytest.raises(
                        EngineError, match=r"^--classifier http.* answers nothing any more \(.*500"
                    ) as e:
                        _suite_harmbench.run(args, wanted, target, tmp_path)
                    assert "the same command goes on" in str(e.value)
                    assert len(endpoint.asked) == 5 + 8 * 3, "eight in a row, three attempts each"
                else:
                    found = _suite_harmbench.run(args, wanted, target, tmp_path)
                    assert len(endpoint.asked) == 24 - 5
            assert target.freed == 0
    finally:
        behind.close()
    assert found.metrics["attack_success_base"].n == 12


def test_a_killed_judge_has_its_words_kept_as_they_come(tmp_path: Path) -> None:
    """Questions are put in blocks, for the bar; what is kept does not wait for a block's end."""
    rows = [Asked(behavior(f"s{i}"), said(f"s{i}", f"Answer {i}.")) for i in range(AT_A_TIME)]
    asked: list[str] = []

    def speak(prompt: Prompt) -> Completion:
        asked.append(prompt.id)
        if len(asked) == AT_A_TIME + 40:
            raise KeyboardInterrupt
        return Completion(prompt.id, "yes", "length")

    class Words:
        """A tokenizer whose tokens are characters."""

        def __call__(self, text: str, **_: Any) -> Any:
            return argparse.Namespace(input_ids=list(text))

        def decode(self, ids: list[str], **_: Any) -> str:
            return "".join(ids)

    def evaluated() -> Evaluation:
        engine: Any = Remembering(ScriptedEngine(speak=speak), Remembered(tmp_path / "said.jsonl", "it"), "classifier")
        return judge(Generated(tuple(rows), ()), OfficialClassifier(engine, Words(), PROMPT), verbosity=0)

    with pytest.raises(KeyboardInterrupt):
        evaluated()
    found = evaluated()
    assert found.metrics["attack_success_base"].n == AT_A_TIME and len(asked) == 2 * AT_A_TIME + 1


@pytest.mark.parametrize(
    ("machine", "flags", "parts", "says"),
    [
        ("a100-80gb", (), 2, "its classifier (bf16"),
        ("a100-80gb", ("--judge", "http://127.0.0.1:1/v1"), 2, "its classifier (bf16"),
        ("a100-80gb", ("--classifier", "judge"), 1, "a judge, 1,284 calls"),
        ("a100-80gb", ("--classifier", "http://127.0.0.1:1/v1"), 1, "endpoint, 600 calls"),
        ("a100-80gb", ("--limit", "5", "--classifier", "judge"), 1, "a judge, 124 calls"),
        ("cpu", ("--judge", "http://127.0.0.1:1/v1"), 1, "a judge, 1,284 calls"),
        ("cpu", (), 1, "or name a --judge"),
    ],
)
def test_the_plan_says_hours_and_dollars(machine: str, flags: tuple[str, ...], parts: int, says: str) -> None:
    from cai_experiment.models.choice import resolve_model
    from cai_experiment.scripts._plan_harmbench import plan_lines

    choice = resolve_model("qwen2.5-32b", A100)
    found, lines = plan_lines(suite(*flags), choice, profile(machine), "hf", "4bit")
    assert len(found) == parts and says in lines[1]
    if machine != "cpu":
        assert all(part.hours and part.hours < 2 for part in found)
        assert "HarmBench" in lines[0] and "$" in lines[0]


KILLED = """
import sys
from pathlib import Path
from cai_experiment.scripts import _suite_harmbench
from tests.test_harmbench import Target, nano_speakers, suite
from cai_experiment.evaluation.arms import Remembered
from cai_experiment.judging.judge import Judge

folder, nano = Path(sys.argv[1]), Path(sys.argv[2])
speakers = nano_speakers(nano)
args = suite("--behaviors", str(folder / "rows.csv"), "--classifier", "judge")
said = Remembered(folder / "said.jsonl", "these weights")
print(len(said.found), flush=True)
target = Target(speakers, Judge(speakers.full(), "nano"), said)
found = _suite_harmbench.run(args, _suite_harmbench.read(args), target, folder)
print(found.metrics["over_refusal_base"].n)
"""


@pytest.mark.slow
def test_kill_9_while_answers_come_loses_none_of_them(tmp_path: Path, nano_dir: Path) -> None:
    csv_of(tmp_path, 4)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(nano_dir)]
    said = tmp_path / "said.jsonl"
    root = Path(__file__).resolve().parents[1]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    while first.poll() is None and (not said.exists() or said.read_bytes().count(b"\n") < 20):
        time.sleep(0.05)
    first.kill()
    first.communicate()
    kept = said.read_bytes().count(b"\n")
    assert kept >= 20 and first.returncode == -signal.SIGKILL
    second = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert second.stdout.split()[0] in (str(kept), str(kept - 1)) and second.stdout.split()[-1] == "100"
    keys = [json.loads(line)["key"] for line in said.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 2 * 104
