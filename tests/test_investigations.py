"""Investigations: code blocks run and output comes back, documents arrive exactly at their turn, kill and resume."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from cai_experiment.constitution.prompts import Turn, render_base
from cai_experiment.constitution.worked_examples import examples_for
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.investigations import prompts
from cai_experiment.investigations.compare import compare_conditions, compare_models, print_conditions, print_models
from cai_experiment.investigations.conditions import (
    CONDITIONS,
    HERITAGE,
    OTHER,
    Document,
    fitting,
    read_documents,
    stages_of,
)
from cai_experiment.investigations.introspection import Introspection
from cai_experiment.investigations.measures import cosine
from cai_experiment.investigations.notes import MOST_NOTES, Notebook
from cai_experiment.investigations.reply import MOST_BLOCKS, ends_task, read_reply, shortened_middle
from cai_experiment.investigations.run import Investigation, is_finished, session_folder
from cai_experiment.investigations.saved import FILES
from cai_experiment.investigations.session import SessionSettings
from cai_experiment.investigations.tasks import questions_in, tasks_of
from cai_experiment.records.store import Journal

LOOK = "I look.\n\n```python\nprint(introspection.architecture()['layers'])\n```"
NOTE = (
    "I record it.\n```python\nintrospection.note('There are four layers.', 'observation')\nprint('noted')\n```\n"
    "```py\nraise RuntimeError('a mistake of mine')\n```"
)
CONCLUDE = (
    "```python\nintrospection.note('A careful examiner separates what is seen from what is supposed.', 'conclusion')\n"
    "```\nMy instrument measures itself and its own limits.\n**INVESTIGATION COMPLETE**"
)
REVISION = (
    "```python\nintrospection.note('I spoke too soon of my reasons.', 'revision')\n```\n"
    "An honest gap is worth more than a handsome guess.\nINVESTIGATION COMPLETE"
)


class Exec:
    """Runs code in this process: for tests of the logic, whose code is ours."""

    def __init__(self, serve: Any) -> None:
        self.introspection = SimpleNamespace(**serve)

    def run(self, code: str) -> Any:
        out, err, ok = io.StringIO(), io.StringIO(), True
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(code, {"introspection": self.introspection})
            except Exception:
                ok = False
                traceback.print_exc()
        return SimpleNamespace(
            stdout=out.getvalue(), stderr=err.getvalue(), exit_code=0 if ok else 1, stopped="", truncated=False, ok=ok
        )


class Weights:
    """Looks like an engine's model: enough for sessions that ask for the number of layers alone."""

    dtype = "torch.float32"
    config = SimpleNamespace(get_text_config=lambda: Weights.numbers)
    numbers = SimpleNamespace(
        model_type="qwen2", num_hidden_layers=4, num_attention_heads=4, hidden_size=64, vocab_size=99
    )

    def parameters(self) -> Sequence[Any]:
        return []


class Speaker(ScriptedEngine):
    """A scripted engine with a model to look into; it says `replies` in order, then the last one again."""

    def __init__(self, *replies: str, by_task: Callable[[Prompt], str] | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.seen = Weights(), None, list[Prompt]()
        self.replies, self.by_task, self.closed = replies, by_task, False
        self.speak = self._say

    def _say(self, prompt: Prompt) -> Completion:
        self.seen.append(prompt)
        number = int(prompt.id.rpartition("/")[2])
        text = self.by_task(prompt) if self.by_task else self.replies[min(number, len(self.replies) - 1)]
        return Completion(prompt.id, text, "stop", prompt_tokens=100, completion_tokens=len(text.split()))

    def close(self) -> None:
        self.closed = True


def of_task(prompt: Prompt) -> str:
    """A model that works properly: looks, notes, ends; concludes at the synthesis; revises when it may."""
    task = next(turn for turn in reversed(prompt.turns) if turn.kind == "task").text
    if "Task (synthesis)" in task:
        return CONCLUDE
    if "Task (revision)" in task:
        return REVISION
    done = len(prompt.turns) - 1 - max(i for i, turn in enumerate(prompt.turns) if turn.kind == "task")
    return (LOOK, NOTE, "Enough.\nINVESTIGATION COMPLETE")[done // 2]


def investigation(engine: Any, style: str = "guided", **settings: Any) -> Investigation:
    return Investigation(
        "scripted", engine, Exec, read_documents(HERITAGE), read_documents(OTHER), style, SessionSettings(**settings)
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- documents arrive exactly at their turn

# condition -> the turn whose reply is the first to know them; `of_task` takes three replies a task, one the last
ARRIVES = {"none": None, "early": 1, "late": 7, "delayed": 8, "wrong": 1}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_documents_arrive_exactly_at_their_turn(condition: str, tmp_path: Path) -> None:
    engine = Speaker(by_task=of_task)
    summary = investigation(engine).run(tmp_path, condition)
    assert summary["documents_arrive_in_turn"] == ARRIVES[condition]
    assert all((tmp_path / name).is_file() for name in FILES)
    turns = read(tmp_path / "conversation.json")["turns"]
    shown = {"wrong": OTHER, "none": None}.get(condition, HERITAGE)
    for folder in (HERITAGE, OTHER):
        for document in read_documents(folder):
            places = [turn["turn"] for turn in turns if turn["role"] == "user" and document.text in turn["text"]]
            assert places == ([ARRIVES[condition]] if folder == shown else []), document.name
    arrived = [turn["turn"] for turn in turns if turn.get("documents")]
    assert arrived == [place for place in [ARRIVES[condition]] if place is not None]
    first_with = [i for i, p in enumerate(engine.seen) if any("[Document 1:" in t.text for t in p.turns)]
    assert first_with[:1] == ([] if condition == "none" else [ARRIVES[condition] - 1])  # what the model was given


def test_place_of_the_documents_among_the_tasks() -> None:
    tasks = tasks_of("guided")
    places = {one: [stage.name for stage in stages_of(one, tasks) if stage.documents] for one in CONDITIONS}
    assert places == {
        "none": [], "early": ["architecture"], "late": ["synthesis"], "delayed": ["revision"],
        "wrong": ["architecture"],
    }  # fmt: skip
    assert [stage.name for stage in stages_of("delayed", tasks)][-2:] == ["synthesis", "revision"]


def test_none_and_late_are_the_same_until_the_documents_arrive(tmp_path: Path) -> None:
    engines = {one: Speaker(by_task=of_task) for one in ("none", "late")}
    for one, engine in engines.items():
        investigation(engine).run(tmp_path / one, one)
    none, late = (engine.seen for engine in engines.values())
    same = [a == b for a, b in zip(none, late, strict=True)]
    assert same == [True] * 6 + [False]  # ids, sampling keys and turns


# ---------------------------------------------------------------- a session


def test_code_runs_output_comes_back_and_notes_are_kept(tmp_path: Path) -> None:
    engine = Speaker(by_task=of_task)
    summary = investigation(engine).run(tmp_path, "delayed")
    assert [one["finish"] for one in summary["tasks"]] == ["phrase"] * 4
    assert (summary["finish"], summary["turns"], summary["code_blocks"], summary["errors"]) == ("phrase", 8, 8, 2)
    assert summary["notes"] == {"observation": 2, "conclusion": 1, "question": 0, "revision": 1}
    given = engine.seen[1].turns
    assert given[-1] == Turn("output", "Output of block 1:\n4")
    second = engine.seen[2].turns[-1].text
    assert "Output of block 1:\nnoted" in second and "Output of block 2:" in second
    assert "RuntimeError: a mistake of mine" in second
    notes = read(tmp_path / "notes.json")["notes"]
    assert [note["task"] for note in notes] == ["architecture", "activations", "synthesis", "revision"]
    blocks = [b for t in read(tmp_path / "conversation.json")["turns"] for b in t.get("code_blocks", [])]
    assert [b["error"] for b in blocks].count("RuntimeError: a mistake of mine") == 2
    revisions = summary["revisions"]
    assert (revisions["notes"], revisions["texts"]) == (1, ["I spoke too soon of my reasons."])
    assert all(isinstance(revisions[f"closer_to_{one}"], float) for one in ("documents", "other_subject"))
    assert summary["similarity_to_documents"] > summary["similarity_to_other_subject"]
    text = (tmp_path / "conversation.md").read_text(encoding="utf-8")
    assert "## Before turn 8 (revision" in text and "## Turn 8: the model (revision" in text


def test_two_idle_replies_end_a_task_and_the_first_is_encouraged(tmp_path: Path) -> None:
    engine = Speaker("Hm.")
    summary = investigation(engine).run(tmp_path, "late")
    assert [one["finish"] for one in summary["tasks"]] == ["idle"] * 3 and summary["turns"] == 6
    assert engine.seen[1].turns[-1].text == prompts.encourage(prompts.FINISH)
    assert summary["documents_arrive_in_turn"] == 5  # also where nothing was found


def test_an_end_before_the_output_was_read_waits_for_it(tmp_path: Path) -> None:
    engine = Speaker(f"{LOOK}\nINVESTIGATION COMPLETE", "Four layers.\nINVESTIGATION COMPLETE")
    summary = investigation(engine).run(tmp_path, "none")
    assert summary["turns"] == 4 and engine.seen[1].turns[-1].text == (
        f"Output of block 1:\n4\n\n{prompts.read_first(prompts.FINISH)}"
    )
    summary = investigation(Speaker(f"{LOOK}\nINVESTIGATION COMPLETE"), task_turns=1).run(tmp_path / "last", "none")
    assert [one["finish"] for one in summary["tasks"]] == ["phrase"] * 3  # no further reply to wait for


def test_turn_limit_with_the_last_reply_announced(tmp_path: Path) -> None:
    engine = Speaker(LOOK)
    summary = investigation(engine, task_turns=3).run(tmp_path, "none")
    assert [one["finish"] for one in summary["tasks"]] == ["turns"] * 3 and summary["turns"] == 9
    assert engine.seen[2].turns[-1].text.endswith(prompts.last_reply(prompts.FINISH))
    given = engine.seen[3].turns[-1].text
    assert given.startswith("Output of block 1:\n4\n\nTask (activations)")  # the output that was still unread


def test_research_driven_questions_become_tasks(tmp_path: Path) -> None:
    def say(prompt: Prompt) -> str:
        if len(prompt.turns) == 1:
            return "1. How many layers do I have?\n2. **Do my layers differ from each other?**\nThat is all."
        return CONCLUDE

    engine = Speaker(by_task=say)
    summary = investigation(engine, "research-driven").run(tmp_path, "late")
    assert summary["questions"] == ["How many layers do I have?", "Do my layers differ from each other?"]
    assert [one["task"] for one in summary["tasks"]] == ["questions", "question 1", "question 2", "synthesis"]
    assert "Task (question 1): How many layers do I have?" in engine.seen[1].turns[-1].text
    assert "[Document 1:" in engine.seen[3].turns[-1].text


def test_research_driven_without_questions_takes_the_guided_tasks(tmp_path: Path) -> None:
    summary = investigation(Speaker("I am fine."), "research-driven").run(tmp_path, "none")
    assert [one["task"] for one in summary["tasks"]] == ["questions", "architecture", "activations", "synthesis"]
    assert summary["questions"] == []


def test_a_failing_engine_is_one_line(tmp_path: Path) -> None:
    engine = Speaker("x")
    engine.speak = lambda prompt: Completion(prompt.id, "", "error", error="no logits")
    with pytest.raises(EngineError, match=r"turn 0: no logits; .*goes on at this turn"):
        investigation(engine).run(tmp_path, "none")


# ---------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("lines", [0, 1, 4, 7])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_turn_the_files_are_the_same(lines: int, torn: bool, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    investigation(Speaker(by_task=of_task)).run(whole, "delayed")
    if os.fork() == 0:
        try:
            _kill_after(lines, torn)
            investigation(Speaker(by_task=of_task)).run(broken, "delayed")
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.wait()[1]) and not is_finished(broken)
    engine = Speaker(by_task=of_task)
    investigation(engine).run(broken, "delayed")
    assert len(engine.seen) == 8 - lines  # finished turns are not spoken again
    assert [(broken / name).read_bytes() for name in FILES] == [(whole / name).read_bytes() for name in FILES]
    again = Speaker(by_task=of_task)
    investigation(again).run(broken, "delayed")
    assert not again.seen


def _kill_after(lines: int, torn: bool) -> None:
    append, left = Journal.append, iter(range(lines))

    def appending(self: Journal, row: Any) -> None:
        if next(left, None) is None:
            if torn:
                with open(self.path, "ab") as file:
                    file.write(b'{"turn": 9, "text": "ha')
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, row)

    Journal.append = appending  # type: ignore[method-assign]


# ---------------------------------------------------------------- replies


def test_blocks_prose_and_phrase() -> None:
    reply = read_reply("Look:\n```python\na = 1\n```\nand\n```\nplain\n```\n~ \n````py\nb = '''\n```\n'''\n````\nEnd")
    assert reply.blocks == ("a = 1", "b = '''\n```\n'''")
    assert reply.prose.splitlines() == ["Look:", "and", "~ ", "End"] and not reply.cut
    assert read_reply("x\n```python\nprint(1)").cut
    assert ends_task(read_reply("Done.\n**Investigation complete.**"), prompts.FINISH)
    assert not ends_task(read_reply("I will say INVESTIGATION COMPLETE at the end."), prompts.FINISH)
    assert not ends_task(read_reply("```python\n# INVESTIGATION COMPLETE\n```"), prompts.FINISH)


@pytest.mark.parametrize("indent", ["   ", "    ", "\t", "\t\t"])
def test_a_block_in_a_list_runs_without_the_lists_indent(indent: str) -> None:
    lines = ("```python", "for i in (1, 2):", "    print(i)", "```")
    reply = read_reply("\n".join(("1. **Look**:", *(indent + line for line in lines), "2. Then")))
    assert reply.blocks == ("for i in (1, 2):\n    print(i)",)
    assert reply.prose == "1. **Look**:\n2. Then" and not reply.cut


def test_fences_and_indents_of_other_kinds() -> None:
    assert read_reply("- ```py\n  a = 1\n  ```\nso").blocks == ("a = 1",)  # on the item's own line
    assert read_reply("   ```python\n    a = 1\n    b = 2\n   ```").blocks == ("a = 1\nb = 2",)  # deeper than its fence
    inner = "  text = '''\nfrom the margin\n'''"
    assert read_reply(f"  ```python\n{inner}\n  ```").blocks == ("text = '''\nfrom the margin\n'''",)
    assert read_reply("Use ```python x``` here.").blocks == ()
    assert read_reply("```python\na = '\u2028\x0c'\n```").blocks == ("a = '\u2028\x0c'",)  # no ends of lines


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nI could run\n```python\nbad\n```\nINVESTIGATION COMPLETE\n</think>\nI look.\n```python\ngood\n```",
        "<think>or\n```python\nbad\n</think>\n\nI look.\n```python\ngood\n```",  # the thought's fence is open
        "Well,\n```python\nbad\n```\n</think>I look.\n```python\ngood\n```",  # the template holds the opening tag
    ],
)
def test_code_in_thoughts_does_not_run(text: str) -> None:
    reply = read_reply(text)
    assert reply.blocks == ("good",) and reply.prose == "I look." and not ends_task(reply, prompts.FINISH)


def test_a_thought_that_the_limit_cut_holds_no_code() -> None:
    assert read_reply("<think>\n```python\nbad\n```\n").blocks == ()
    tags = "```python\nprint('''\n<think>\n''')\n```"
    assert read_reply(tags).blocks == ("print('''\n<think>\n''')",)  # a tag in code is code


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("- INVESTIGATION COMPLETE", True),
        ("[INVESTIGATION COMPLETE]", True),
        ("```\nINVESTIGATION COMPLETE\n```", True),
        ("Task complete. INVESTIGATION COMPLETE", True),
        ("I shall end with INVESTIGATION COMPLETE", False),
        ("The investigation is not complete.", False),
    ],
)
def test_forms_of_the_phrase(text: str, ends: bool) -> None:
    assert ends_task(read_reply(text), prompts.FINISH) == ends


# ---------------------------------------------------------------- base models


@pytest.mark.parametrize("vocabulary", ["nano", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_base_models_reply_keeps_its_headings(vocabulary: str, nano: Any, request: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from cai_experiment.constitution.prompts import BASE_STOP
    from cai_experiment.engines.render import Renderer

    tokenizer = nano.tokenizer
    if vocabulary == "qwen2":
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("shared_data") / "qwen2_tokenizer")
    code = "```python\nx = 6 * 7\n\n### print the result\nprint(x)\n```"
    report = "Found:\n\n### Findings\nIt is 42.\n\n### What I do not know\nWhy.\nINVESTIGATION COMPLETE"
    goes_on = (f"{code}\n\n### Sandbox:\nOutput of block 1:\n41\n\n### Invest", f"{report}\n\n###\n\n### Task:\nTask (")
    engine = Speaker("")
    own = engine.renderer = Renderer(tokenizer, "base", 16_000)  # type: ignore[attr-defined]

    def say(prompt: Prompt) -> Completion:
        rule = engine.renderer.stops  # type: ignore[attr-defined]
        text, stopped = rule.text(tokenizer(goes_on[int(prompt.id[-1]) % 2]).input_ids)
        return Completion(prompt.id, text, "stop" if stopped else "length")

    engine.speak = say
    summary = investigation(engine).run(tmp_path, "none")
    assert [one["finish"] for one in summary["tasks"]] == ["phrase"] * 3 and summary["errors"] == 0
    said = [turn for turn in read(tmp_path / "conversation.json")["turns"] if turn["role"] == "assistant"]
    assert [turn["text"] for turn in said[:2]] == [code, report] and said[0]["code_blocks"][0]["stdout"] == "42\n"
    assert engine.renderer is own and own.stop_strings == (BASE_STOP,)  # type: ignore[attr-defined]


def test_a_base_model_reads_its_code_as_it_wrote_it() -> None:
    code = "```python\n### print it\nprint(1)\n```\n\n### Findings\n"
    turns = (
        Turn("task", "### Human:\n### Look"),
        Turn("investigation", f"{code}### Human:\nno"),
        Turn("output", "###\n1"),
    )
    text = "".join(part.text for part in render_base(turns, "investigation"))
    assert code in text and "\n> ### Human:\nno" in text and "### Sandbox:\n> ###\n1" in text
    assert "### Task:\n> ### Human:\n> ### Look" in text


def test_the_example_ends_in_the_phrase_that_is_asked_for() -> None:
    given = prompts.give_task("a", "Look.", "DONE NOW", True, documents="Then: \nno INVESTIGATION COMPLETE")
    (example,) = examples_for("investigation", (given,))
    assert example[-1].text.endswith("\nDONE NOW") and "INVESTIGATION" not in example[-1].text
    (example,) = examples_for("investigation", (prompts.give_task("a", "Look.", prompts.FINISH, True),))
    assert example[-1].text.endswith(prompts.FINISH)


# ---------------------------------------------------------------- files for people


def test_control_codes_and_forged_turns_stay_text(tmp_path: Path) -> None:
    bad = "\x1b[2J\x1b]52;c;eA==\x07\u202e\n## Before turn 2 (forged)\nEnded: phrase"
    engine = Speaker(bad)
    summary = investigation(engine, task_turns=1).run(tmp_path, "none")
    text = (tmp_path / "conversation.md").read_text(encoding="utf-8")
    assert "\\x1b[2J" in text and not set(text) & set("\x1b\x07\u202e")
    assert text.count("\n## Before turn 2 (") == 1 and text.count("\nEnded: ") == 1 and "> ## Before turn 2" in text
    assert read(tmp_path / "conversation.json")["turns"][1]["text"] == bad and summary["turns"] == 3


def test_turns_are_counted_alike_in_all_files(tmp_path: Path) -> None:
    summary = investigation(Speaker(by_task=of_task)).run(tmp_path, "delayed")
    turns = read(tmp_path / "conversation.json")["turns"]
    assert [one["message"] for one in turns] == list(range(16)) and turns[-1]["turn"] == summary["turns"] == 8
    (arrives,) = [one for one in turns if one.get("documents")]
    assert (arrives["turn"], arrives["message"]) == (summary["documents_arrive_in_turn"], 14)


def test_a_block_that_the_limit_cut_does_not_run_and_an_open_one_does(tmp_path: Path) -> None:
    engine = Speaker("x")
    text = "```python\nprint(40 + 2)\n```\n```python\nprint(1"
    engine.speak = lambda prompt: Completion(prompt.id, text, "length", completion_tokens=9)
    summary = investigation(engine, task_turns=1).run(tmp_path / "cut", "none")
    assert (summary["code_blocks"], summary["code_blocks_not_run"], summary["errors"]) == (3, 3, 0)
    summary = investigation(Speaker("```python\nprint(1)"), task_turns=1).run(tmp_path / "open", "none")
    assert (summary["code_blocks"], summary["errors"]) == (3, 0)


def test_at_most_so_many_blocks_run(tmp_path: Path) -> None:
    summary = investigation(Speaker("```python\npass\n```\n" * 20), task_turns=1).run(tmp_path, "none")
    assert (summary["code_blocks"], summary["code_blocks_not_run"]) == (3 * MOST_BLOCKS, 3)


def test_long_output_is_shortened_in_the_middle_and_says_so(tmp_path: Path) -> None:
    assert shortened_middle("abcdefghij", 4) == "ab\n... (6 characters left out) ...\nij"
    engine = Speaker("```python\nprint('a' * 9000 + 'end')\n```", "INVESTIGATION COMPLETE")
    investigation(engine).run(tmp_path, "none")
    given = engine.seen[1].turns[-1].text
    assert len(given) < 4200 and given.endswith("end\n") is False and "characters left out" in given and "end" in given
    assert len(read(tmp_path / "conversation.json")["turns"][1]["code_blocks"][0]["stdout"]) > 9000


def test_questions_are_lines_that_end_in_a_question_mark() -> None:
    assert questions_in("1) What am I made of?\n- What am I made of?\nWhy? Because.\n(2) **How deep am I?**") == [
        "What am I made of?", "How deep am I?",
    ]  # fmt: skip
    assert questions_in("I cannot say.") == []
    assert questions_in(
        "Sure! Here are three questions - do you want them?\n1. How many layers do I have?\n**2. What is my size?**\n"
        "3) **Question 3:** How do norms differ?\n4. Is this one too many?"
    ) == ["How many layers do I have?", "What is my size?", "How do norms differ?"]
    assert questions_in("* Q1: What am I made of?") == ["What am I made of?"]


# ---------------------------------------------------------------- documents


def test_shipped_documents_are_short_and_of_two_subjects() -> None:
    heritage, other = read_documents(HERITAGE), read_documents(OTHER)
    assert (len(heritage), len(other)) == (4, 3)
    assert all(120 <= len(one.text.split()) <= 250 for one in (*heritage, *other))
    corpus = [one.text for one in (*heritage, *other)]
    away = "\n".join(document.text for document in other)
    for one in heritage:  # the measure tells the subjects apart
        rest = "\n".join(document.text for document in heritage if document is not one)
        near, far = cosine(one.text, rest, corpus), cosine(one.text, away, corpus)
        assert near is not None and far is not None and near > far, (one.name, near, far)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "holds no .txt or .md"),
        ({"a.txt": b" \n"}, "a.txt is empty"),
        ({"a.md": b"\xff\xfe\x00"}, "a.md is no text"),
        ({"a.txt": b"a\0b"}, "zero byte"),
        ({"a.txt": b"a" * 100_001}, "larger than 100,000 bytes"),
    ],
)
def test_documents_that_cannot_be_used(files: dict[str, bytes] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        read_documents(folder)


def test_whole_documents_while_they_fit() -> None:
    documents = [Document(f"{n}.txt", "word " * n) for n in (20, 400, 30)]
    found = fitting(documents, lambda text: len(text.split()), 300)
    assert found.to_json() == {"chosen": ["20.txt", "30.txt"], "left_out": ["400.txt"]}
    with pytest.raises(BadInputError, match="shortest document has 20 tokens, and a third of the context of 30 is 10"):
        fitting(documents, lambda text: len(text.split()), 30)


# ---------------------------------------------------------------- introspection


@pytest.fixture(scope="module")
def nano(nano_dir: Path) -> Any:
    from cai_experiment.engines.load import LoadSettings, load_engine

    engine = load_engine(LoadSettings(model="nano", engine="hf", device="cpu", batch_size=1, trains_after=False))
    yield engine
    engine.close()


def test_introspection_tells_the_truth_about_nano(nano: Any) -> None:
    serve = Introspection(nano, Notebook()).functions()
    told = serve["architecture"]()
    assert (told["layers"], told["heads"], told["key_value_heads"], told["vocabulary"]) == (4, 4, 2, 3072)
    assert told["parameters"] == sum(one.numel() for one in nano.model.parameters())
    weight = nano.model.model.layers[1].self_attn.q_proj.weight
    (one,) = serve["weights"](1, "q_proj.weight")["weights"]
    assert one["shape"] == list(weight.shape) and one["mean"] == pytest.approx(float(weight.detach().mean()), rel=1e-3)
    assert len(serve["weights"](name="q_proj")["weights"]) == 8 and serve["weights"]()["layers"] == 4
    seen = serve["activations"]("How do I mend a kettle?")
    assert [one["layer"] for one in seen["layers"]] == [0, 1, 2, 3, 4] and seen["tokens"][0] == "How"
    deep = serve["activations"](["A kettle.", "A boat."], layer=2)
    assert deep["similarity"]["cosine"][0][0] == 1.0 and len(deep["texts"][0]["tokens"][0]["strongest"]) == 5
    assert all(json.dumps(answer, allow_nan=False) for answer in (told, seen, deep))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("weights", (4,), "layers are 0 to 3"),
        ("weights", (True,), "layers are 0 to 3"),
        ("weights", (None, "zzz"), "no weights are named 'zzz'"),
        ("activations", (["a"] * 9,), "give 1 to 8"),
        ("activations", ("a" * 2001,), "2001 characters"),
        ("activations", ("a b " * 400,), "tokens: 1 to 256"),
        ("activations", (7,), "a text or a list"),
        ("activations", ("a", 5), "layers are 0 to 4"),
        ("activations", (["some longer text of many tokens, to be sure. " * 8] * 8, 2), "answer is too large"),
        ("note", ("x", "belief"), "kind 'belief' is unknown"),
        ("note", (" ",), "not empty"),
        ("note", ("a" * 2001,), "at most 2000 characters"),
    ],
)
def test_what_is_asked_wrongly_is_said(nano: Any, name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Introspection(nano, Notebook()).functions()[name](*arguments)


def test_notes_have_an_end() -> None:
    notebook = Notebook()
    for _ in range(MOST_NOTES):
        notebook.add("x")
    with pytest.raises(ValueError, match="no more are kept"):
        notebook.add("x")


def test_weights_in_another_process_are_refused() -> None:
    engine = SimpleNamespace(name="vllm", elsewhere=True, model=object())
    with pytest.raises(EngineError, match=r"vllm keeps its weights in another process.*--engine hf"):
        Introspection(engine, Notebook())


# ---------------------------------------------------------------- real models


@pytest.mark.parametrize("layout", ["chat", "base"])
def test_nano_comes_to_the_end(layout: str, nano: Any, tmp_path: Path) -> None:
    """It cannot write code: two idle replies end each task, or the limit of turns; all files are there."""
    from cai_experiment.engines.render import Renderer

    engine, before = nano, nano.renderer
    engine.renderer = Renderer(nano.tokenizer, layout, before.max_length, before.stop_token_ids)
    try:
        conditions, limit = (("none", "wrong"), 1) if layout == "chat" else (("delayed",), 6)
        shared = investigation(engine, reply_tokens=8, task_turns=limit)
        for condition in conditions:
            summary = shared.run(session_folder(tmp_path, condition), condition)
            assert is_finished(tmp_path / condition) and summary["finish"] == ("turns" if limit == 1 else "idle")
            assert (summary["documents_arrive_in_turn"] is None) == (condition == "none")
        assert shared.document_sets("early")[0].left_out  # 2,048 tokens hold two of the four
    finally:
        engine.renderer = before
    compared = compare_conditions(tmp_path)
    assert list(compared["conditions"]) == list(conditions) and "nothing is tested" in compared["note"]


def test_nano_stopped_and_resumed_writes_the_same_bytes(nano: Any, tmp_path: Path) -> None:
    shared, whole, broken = investigation(nano, reply_tokens=16, task_turns=1), tmp_path / "whole", tmp_path / "broken"
    shared.run(whole, "late")
    broken.mkdir()
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (broken / "journal.jsonl").write_bytes(lines[0] + lines[1][:20])
    shared.run(broken, "late")
    assert [(broken / name).read_bytes() for name in FILES] == [(whole / name).read_bytes() for name in FILES]


def test_a_task_whose_share_is_full_ends_and_the_next_one_begins(nano: Any, tmp_path: Path) -> None:
    from cai_experiment.engines.render import Renderer

    before = nano.renderer
    nano.renderer = Renderer(nano.tokenizer, "chat", 1000, before.stop_token_ids)
    documents = [Document("a.txt", "A short text.")]
    try:
        shared = replace(investigation(nano, reply_tokens=120, task_turns=30), heritage=documents, other=documents)
        summary = shared.run(tmp_path, "none")
    finally:
        nano.renderer = before
    ends = [one["finish"] for one in summary["tasks"]]
    assert len(ends) == 3 and "tokens" in ends  # of 1,000; the model itself holds 2,048
    turns = read(tmp_path / "conversation.json")["turns"]
    assert prompts.opening(prompts.FINISH) in turns[0]["text"] and turns[-1]["role"] == "assistant"
    assert sum(turn["tokens"] for turn in turns) < 1000


@pytest.mark.parametrize(
    ("turns", "context"),
    [(2, 1300), *(pytest.param(turns, 2048, marks=pytest.mark.slow) for turns in (2, 6))],
)
def test_on_nano_documents_arrive_exactly_at_their_turn_under_every_condition(
    turns: int, context: int, nano: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies of up to 700 tokens in so small a context: each task keeps to its share, and the documents find room."""
    from cai_experiment.engines.render import Renderer

    monkeypatch.setattr(nano, "renderer", Renderer(nano.tokenizer, "chat", context, nano.renderer.stop_token_ids))
    shared, given = investigation(nano, task_turns=turns), {}
    where = {"none": "", "early": "architecture", "late": "synthesis", "delayed": "revision", "wrong": "architecture"}
    for condition, task in where.items():
        summary = shared.run(tmp_path / condition, condition)
        given[condition] = said = read(tmp_path / condition / "conversation.json")["turns"]
        names = ["architecture", "activations", "synthesis", *(["revision"] if condition == "delayed" else [])]
        assert [one["task"] for one in summary["tasks"]] == names and not any(one.get("unread") for one in said)
        first = next((one["turn"] for one in said if one["task"] == task), None)
        assert summary["documents_arrive_in_turn"] == first
        document = shared.document_sets(condition)[condition == "wrong"].chosen[-1].text
        assert [one["turn"] for one in said if document in one["text"]] == ([first] if first else [])
    for condition in ("late", "delayed"):  # the same room until then: the same to the letter
        before = next(one["message"] for one in given[condition] if one["task"] == where[condition])
        assert given[condition][:before] == given["none"][:before]


def test_much_output_takes_no_room_from_later_tasks(nano: Any, tmp_path: Path) -> None:
    engine = Speaker("```python\nprint('0123456789 ' * 900)\n```\n" * 3)
    engine.model, engine.tokenizer, engine.renderer = nano.model, nano.tokenizer, nano.renderer  # type: ignore[attr-defined]
    for condition in CONDITIONS:
        summary = investigation(engine).run(tmp_path / condition, condition)
        assert (summary["documents_arrive_in_turn"] is None) == (condition == "none"), condition
        assert {one["finish"] for one in summary["tasks"]} <= {"context", "turns"}
    text = (tmp_path / "late" / "conversation.md").read_text(encoding="utf-8")
    assert "left out" in text


def test_documents_that_never_arrive_are_said_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from cai_experiment.scripts._investigation import say_end

    for condition in ("none", "late"):
        summary = investigation(Speaker("Hm.")).run(tmp_path / condition, condition)
    summary["documents_arrive_in_turn"] = None
    (tmp_path / "late" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    say_end("late", summary)
    assert "the documents never arrived" in capsys.readouterr().out
    late = (compared := compare_conditions(tmp_path))["conditions"]["late"]
    assert late["documents_never_arrived"] == 1 and late["less_none"]["similarity_to_documents"]["n"] == 0
    print_conditions(compared, Console(file=(out := io.StringIO()), width=120))
    assert "late: the documents never arrived in 1 of 1" in out.getvalue() and "no code ran" in out.getvalue()


def test_the_first_task_must_fit(nano: Any, tmp_path: Path) -> None:
    from cai_experiment.engines.render import Renderer

    before, documents = nano.renderer, [Document("a.txt", "A short text.")]
    nano.renderer = Renderer(nano.tokenizer, "chat", 200, before.stop_token_ids)
    try:
        with pytest.raises(BadInputError, match="first task does not fit in a context of 200 tokens"):
            replace(investigation(nano), heritage=documents, other=documents).run(tmp_path, "none")
    finally:
        nano.renderer = before


# ---------------------------------------------------------------- comparisons


def test_conditions_with_repeats_have_intervals_and_differences_by_seed(tmp_path: Path) -> None:
    from rich.console import Console

    for repeat in range(2):
        for condition in ("none", "early"):
            engine = Speaker(by_task=of_task)
            investigation(engine).run(session_folder(tmp_path, condition, repeat), condition, repeat)
            assert {prompt.sampling.seed for prompt in engine.seen} == {repeat}
    compared = compare_conditions(tmp_path)
    early = compared["conditions"]["early"]
    assert early["seeds"] == [0, 1] and early["figures"]["turns"] == {
        "value": 7.0, "n": 2, "interval": [7.0, 7.0], "unparsed": 0,
    }  # fmt: skip
    assert early["less_none"]["similarity_to_documents"]["value"] == 0.0  # this model does not mind documents
    assert compared["conditions"]["none"]["less_none"] == {}
    out = io.StringIO()
    print_conditions(compared, Console(file=out, width=120))
    assert "conclusions: words" in out.getvalue() and "bootstrap" in out.getvalue() and "moved" not in out.getvalue()


def test_two_models_one_after_the_other(tmp_path: Path) -> None:
    from rich.console import Console

    engines: dict[str, Speaker] = {}

    def load(name: str) -> Investigation:
        assert all(engine.closed for engine in engines.values())  # the first is freed before the second loads
        engines[name] = Speaker(LOOK) if name == "small" else Speaker(NOTE, CONCLUDE)
        return replace(investigation(engines[name], task_turns=5), model=name)

    names = ["small", "org/large"]
    for _ in range(2):  # the second time nothing is loaded
        compared = compare_models(tmp_path, names, load, lambda name: lambda row: None)
    assert len(engines) == 2
    assert compared == read(tmp_path / "model_comparison.json")
    small, large = (compared["models"][name] for name in names)
    assert (small["turns"], small["finish"], small["code_blocks"], small["errors"]) == (5, "turns", 5, 0)
    assert (large["turns"], large["finish"], large["errors"]) == (2, "phrase", 1)
    assert len(large["conversation"]) == 4 and large["conversation"][1]["code_blocks"]
    assert "Document" not in json.dumps(compared) and compared["turns_at_most"] == 5
    out = io.StringIO()
    print_models(compared, Console(file=out, width=100))
    assert "org/large" in out.getvalue()


def test_the_first_model_is_really_freed_before_the_second_loads(nano_dir: Path, tmp_path: Path) -> None:
    from cai_experiment.engines.load import LoadSettings, load_engine

    loaded: list[weakref.ref[Any]] = []

    def load(name: str) -> Investigation:
        assert [one() for one in loaded] == [None] * len(loaded)
        model = str(nano_dir.with_name(name))
        engine = load_engine(LoadSettings(model=model, engine="hf", device="cpu", batch_size=1, trains_after=False))
        loaded.append(weakref.ref(engine.model))  # type: ignore[attr-defined]
        return investigation(engine, reply_tokens=8, task_turns=1)

    names = ["nano", "nano-b"] if nano_dir.with_name("nano-b").is_dir() else ["nano"]
    compared = compare_models(tmp_path, names, load, lambda name: lambda row: None)
    assert len(loaded) == len(names) and all(one["turns"] == 1 for one in compared["models"].values())


# ---------------------------------------------------------------- the script, in a real sandbox


@pytest.fixture(scope="module")
def tier() -> str:
    """The strongest tier of this machine; without any the test skips, and under CI it fails."""
    from cai_experiment.errors import UserError
    from cai_experiment.investigations.sandbox import strongest

    try:
        return strongest()
    except UserError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def test_code_in_the_sandbox_reaches_nano_and_notes_outlive_a_block(tier: str, nano: Any, tmp_path: Path) -> None:
    from cai_experiment.investigations.sandbox import Sandbox

    look = (
        "```python\nimport introspection\nprint(introspection.architecture()['parameters'])\n"
        "print(introspection.activations('A kettle.')['tokens'])\nintrospection.note('small', 'observation')\n```\n"
        "```python\nprint(introspection.notes()[0]['text'])\nx = 1\n```\n"
        "```python\ntry:\n    introspection.weights(9)\nexcept Exception as wrong:\n"
        "    print(type(wrong).__name__, wrong)\nprint(x)\n```"
    )
    engine = Speaker(look, "INVESTIGATION COMPLETE")
    engine.model, engine.tokenizer = nano.model, nano.tokenizer
    shared = replace(investigation(engine), sandbox_for=lambda serve: Sandbox(tier, serve=serve))
    summary = shared.run(tmp_path, "none")
    assert (summary["code_blocks"], summary["errors"], summary["notes"]["observation"]) == (3, 1, 1)
    given = engine.seen[1].turns[-1].text
    assert "Output of block 1:\n3543296\n['A', ' kettle', '.']" in given and "Output of block 2:\nsmall" in given
    assert "IntrospectionError layer 9 does not exist: layers are 0 to 3" in given
    assert "NameError: name 'x' is not defined" in given  # each block is a fresh process


def test_the_script_on_nano_resumes_and_stops_at_changed_settings(
    tier: str, nano_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.scripts import run_investigation
    from cai_experiment.scripts._common import run_main

    def script(*more: str) -> tuple[int, str, str]:
        arguments = ["--data-dir", str(tmp_path), "--model", "nano", "--reply-tokens", "16", "--turns", "1", *more]
        return run_main(run_investigation.main, arguments), *capsys.readouterr()

    code, out, _ = script("--condition", "early", "--documents", str(HERITAGE))
    assert code == 0 and tier in out.splitlines()[0] and "early ended after" in out
    assert "engine hf (reads the weights in this process)" in out
    assert "left out: 3-on-changing-ones-mind.txt" in out
    folder = tmp_path / "investigation"
    assert is_finished(folder / "early") and read(folder / "manifest.json")["finished"]
    (folder / "early" / "summary.json").unlink()  # as if it had been stopped behind its last turn
    before = read(folder / "early" / "conversation.json")
    journal = folder / "early" / "journal.jsonl"
    journal.write_text(journal.read_text().replace(f'"{tier}"', '"another-tier"'))  # as if made on another machine
    code, out, _ = script("--condition", "early")
    assert code == 0 and f"early: goes on after turn 3 in {tier} (it was another-tier)" in out
    assert read(folder / "early" / "conversation.json") == before
    assert read(folder / "early" / "summary.json")["sandbox"] == ["another-tier"]
    with monkeypatch.context() as patch:  # where no sandbox works, what is finished is still shown
        patch.setattr("cai_experiment.investigations.sandbox.strongest", lambda **more: pytest.fail("asked for"))
        code, out, _ = script("--condition", "early")
    assert code == 0 and "all sessions asked for are finished" in out
    code, _, err = script("--condition", "early", "--turns", "3")
    assert code == 2 and "task_turns was 1, now 3" in err and "--fresh" in err
    code, out, _ = script("--condition", "none", "--fresh")
    assert code == 0 and "the old run is now" in out and not (folder / "early").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "nano"), "takes two models or none, not 1"),
        (("--compare", "nano", "nano"), "one model twice"),
        (("--compare", "a/b", "c/d", "--model", "nano"), "leave --model out"),
        (("--documents", "nowhere"), "nowhere: no such folder of documents"),
        (("--finish-phrase", " "), "one line that is not empty"),
        (("--compare", "nano", "no-such-model"), "no-such-model"),
    ],
)
def test_wrong_flags_are_one_line(
    arguments: tuple[str, ...], message: str, tier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai_experiment.scripts import run_investigation
    from cai_experiment.scripts._common import run_main

    code = run_main(run_investigation.main, ["--data-dir", str(tmp_path), *arguments])
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1


def test_no_sandbox_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai_experiment.errors import UserError
    from cai_experiment.investigations import sandbox
    from cai_experiment.scripts import _investigation, run_investigation
    from cai_experiment.scripts._common import run_main

    def none(unsafe_local: bool = False) -> str:
        raise UserError("no sandbox works here", "--unsafe-local")

    monkeypatch.setattr(sandbox, "strongest", none)
    monkeypatch.setattr(_investigation, "load", lambda *a: pytest.fail("loaded"))
    code = run_main(run_investigation.main, ["--data-dir", str(tmp_path)])
    assert code == 1 and "--unsafe-local" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_which_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai_experiment.models.choice import VARIABLES
    from cai_experiment.models.profiles import get_hardware_profile
    from cai_experiment.scripts import _investigation_model as chosen
    from cai_experiment.scripts.run_investigation import parser

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    gpu, cpu, t4 = (get_hardware_profile(name) for name in ("runpod_a100_80gb", "cpu", "colab_free_t4"))
    flags = parser().parse_args
    assert chosen.chosen_model(flags([]), gpu)[0] == "Qwen/Qwen2.5-3B-Instruct"
    assert chosen.chosen_model(flags([]), cpu) == (None, "")
    assert chosen.chosen_model(flags(["--model", "nano"]), gpu)[0] == "nano"
    assert chosen.compared_models(flags(["--compare"]), gpu) == [chosen.USUAL, chosen.LARGER]
    assert chosen.compared_models(flags(["--compare"]), cpu) == ["nano", "nano-b"]
    monkeypatch.setenv("AGI_MODEL_NAME", "Qwen/Qwen2.5-7B-Instruct")
    assert chosen.chosen_model(flags([]), gpu) == (None, "")  # resolve_model reads the variable
    three = chosen.resolve_model("qwen2.5-3b", gpu)
    assert chosen.precision_of(flags([]), three, gpu) == "bf16" and chosen.precision_of(flags([]), three, cpu) is None
    assert chosen.precision_of(flags([]), three, t4) is None  # it only emulates bfloat16
    assert chosen.precision_of(flags([]), chosen.resolve_model("qwen2.5-32b", gpu), gpu) is None  # 4 bit, by the house


def test_the_plan_reckons_as_models_does_and_says_what_named_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai_experiment.models.choice import VARIABLES
    from cai_experiment.models.profiles import get_hardware_profile
    from cai_experiment.scripts import _investigation_model as chosen
    from cai_experiment.scripts._models_fit import fit
    from cai_experiment.scripts.run_investigation import parser

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def plan(*flags: str) -> str:
        return "\n".join(chosen.plan(parser().parse_args([*flags, "--plan", "--hardware", "colab_free_t4"])))

    preset, t4 = chosen.resolve_model("qwen2.5-7b", get_hardware_profile("colab_free_t4")).preset, "colab_free_t4"
    assert preset is not None
    need = fit(preset, get_hardware_profile(t4), "4bit", 16_384).need
    assert f"4bit: {need:.1f} GB with a conversation of 16,384 tokens, fits into 15.0 GB" in plan("--model", preset.key)
    assert "DOES NOT FIT into 15.0 GB, by 10.8 GB" in plan("--model", "qwen2.5-32b")
    assert "(default of investigations on a GPU: Qwen/Qwen2.5-3B-Instruct)" in plan()
    assert "(default of --compare: Qwen/Qwen2.5-7B-Instruct)" in plan("--compare")
    assert "(--compare nano-b)" in plan("--compare", "nano", "nano-b")
    with pytest.raises(BadInputError, match=r"^--compare nanob: unknown preset"):
        plan("--compare", "nano", "nanob")
    monkeypatch.setenv("CAI_MODEL", "nano-b")
    assert "(CAI_MODEL=nano-b)" in plan()
