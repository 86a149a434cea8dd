"""Rows of public sets, files and the hub; and the answer reader, on a table of answers as models write them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cai_experiment.ensemble.answers import read_answer, right
from cai_experiment.ensemble.data import balanced, load_rows, load_sets, prompt_of, split_rows
from cai_experiment.ensemble.layout import options_in, row_of
from cai_experiment.errors import BadInputError
from tests.hub_server import Hub, _send, _tree

OPTIONS = ("Inhibition of proteasome", "B cells", "Cross-linking of DNA", "E. coli")

CASES: tuple[tuple[str, str, str | None], ...] = (
    # what is marked as the answer
    ("number", " She makes 9 * 2 = 18 dollars.\n#### 18", "18"),
    ("number", "#### $1,234.00", "1234"),
    ("number", "#### -5", "-5"),
    ("number", "#### \u22125", "-5"),
    ("number", "####18 eggs", "18"),
    ("number", "#### 2,125", "2125"),
    ("number", "#### 18\n\nQuestion: Tom has 5 apples.\nAnswer: #### 5", "18"),
    ("number", "#### 18\nQuestion 2: Tom has 7.", "18"),
    ("number", "#### Step 1: Add 3 and 4.\n3 + 4 = 7\n#### Step 2: Double it.\n2 * 7 = 14", "14"),
    ("number", "### Final answer\n# 42", "42"),
    ("number", "Therefore, the answer is: # 18", "18"),
    ("number", "\\boxed{7}", "7"),
    ("number", "The answer is $\\boxed{1{,}234}$.", "1234"),
    ("number", "First \\boxed{3}, so in all \\boxed{\\text{\\$}12.50}", "12.5"),
    ("number", "\\boxed{\\frac{1}{2}}", "0.5"),
    ("number", "\\boxed{20\\%}", "20"),
    ("number", "\\[ x = \\boxed{12\\,000} \\]", "12000"),
    ("number", "\\boxed{18 \\text{ dollars}} each week for 7 weeks", "18"),
    ("number", "\\boxed{x = -3}", "-3"),
    # what is said to be the answer
    ("number", " The answer is 18.", "18"),
    ("number", "The answer is $1,234.00.", "1234"),
    ("number", "The answer is -5.", "-5"),
    ("number", "So the final answer is **42** dollars a day for 7 days.", "42"),
    ("number", "Answer: 72", "72"),
    ("number", "Final Answer: $0.75", "0.75"),
    ("number", "Answer: 18 eggs.\nExplanation: 16 - 3 - 4 = 9 and 9 * 2 = 18, in 1 day.", "18"),
    ("number", "Answer: She sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18.", "18"),
    ("number", "The answer is 5 * 3 = 15.", "15"),
    ("number", "The answer is x = 8", "8"),
    ("number", "The answer is 18 = 9 * 2", "18"),
    ("number", "The answer is that she has made 18 dollars by noon.", "18"),
    ("number", "The answer is 5. Wait, that is wrong. The answer is 6.", "6"),
    ("number", "The answer is 18. I found the answer by adding 5 and 13.", "18"),
    ("number", "The answer to the question is approximately 3.5 hours", "3.5"),
    ("number", "The answer is 1.2 million.", "1200000"),
    ("number", "The answer is 2 1/2 cups.", "2.5"),
    ("number", "the answer is 1/3", "1/3"),
    ("number", "The answer is:\n\n-$5", "-5"),
    ("number", "The answer is $-5", "-5"),
    # nothing is said to be it: the last number
    ("number", "16 - 3 - 4 = 9 eggs, and 9 * 2 = $18 every day.", "18"),
    ("number", "Tom had 10 and gave away 3, so 10 - 3 = 7 of them in 2 days.", "7"),
    ("number", "It costs $1,234.00", "1234"),
    ("number", "He owes -5", "-5"),
    ("number", "From 3-5 pm it is 2", "2"),
    ("number", "It fell to minus... 10 -3 = 7", "7"),
    ("number", "About .5", "0.5"),
    ("number", "Answer: 1,00,000", "100000"),
    ("number", "So the answer is $\\$18$.", "18"),
    ("number", "The answer is \\(18\\).", "18"),
    ("number", "#### 5/8", "0.625"),
    ("number", "#### 10%", "10"),
    ("number", "1. He has 5.\n2. He gets 3.\nThus he has 8.", "8"),
    ("number", "The answer is 80 because 4*20=80 and then 5", "80"),
    ("number", "The answer is 6 times 7, which is 42.", "42"),
    ("number", "It is 50% of 80, i.e. 40.", "40"),
    ("number", "\\boxed{18", "18"),
    ("number", "The answer is eighteen.", None),
    ("number", "I do not know.", None),
    ("number", "Let x2 be it.", None),
    ("number", "", None),
    ("number", "Question: What is 2 + 2?\nAnswer: 4", None),
    ("number", "9" * 5000, None),
    # letters
    ("choice", " The answer is B.", "B"),
    ("choice", "B", "B"),
    ("choice", "(C)", "C"),
    ("choice", "D) E. coli", "D"),
    ("choice", "**B**", "B"),
    ("choice", "b)", "B"),
    ("choice", "A", "A"),
    ("choice", "A. Inhibition of proteasome", "A"),
    ("choice", "Answer: B", "B"),
    ("choice", "Answer: A", "A"),
    ("choice", "Answer: A patient needs to be told.", None),
    ("choice", "A patient needs rest, so the answer is (C).", "C"),
    ("choice", "The correct answer is: C) Cross-linking of DNA", "C"),
    ("choice", "\\boxed{C}", "C"),
    ("choice", "\\boxed{\\text{(B)}}", "B"),
    ("choice", "The answer is A because the drug inhibits it.", "A"),
    ("choice", "The answer is not A, it is (B).", "B"),
    ("choice", "The most likely answer is option D.", "D"),
    ("choice", "Option C is correct.", "C"),
    ("choice", "I would go with C.", "C"),
    ("choice", "The answer is B cells.", "B"),
    ("choice", "The answer is E. coli", "D"),
    ("choice", "The answer is cross-linking of DNA.", "C"),
    ("choice", "It acts through cross-linking of DNA in the cell", "C"),
    ("choice", "Answer: A 40-year-old man has E. coli", "D"),
    ("choice", "(A) is wrong. (B) is wrong. The answer is (D).", "D"),
    ("choice", "C\n\nExplanation: A and B are wrong.", "C"),
    ("choice", "The answer is \u201cC\u201d.", "C"),
    ("choice", "Therefore, C is the correct answer.", "C"),
    ("choice", "A man of 40 years", None),
    ("choice", "C-reactive protein is raised.", None),
    ("choice", "Vitamin D and hepatitis B", None),
    ("choice", "The answer is A and B.", None),
    ("choice", "The answer is A, B or C", None),
    ("choice", "It is between (A) and (B).", None),
    ("choice", "The answer is F.", None),
    ("choice", "The patient has a fever.", None),
    ("choice", "The answer is B.\n\nQuestion: Next?\nAnswer: The answer is C.", "B"),
    # yes and no
    ("yesno", " The answer is yes.", "yes"),
    ("yesno", "Answer: No", "no"),
    ("yesno", "Yes, because the text says so.", "yes"),
    ("yesno", "No.", "no"),
    ("yesno", "**Yes**", "yes"),
    ("yesno", "true", "yes"),
    ("yesno", "False", "no"),
    ("yesno", "No, there is no evidence.", "no"),
    ("yesno", "No evidence is given, but the answer is yes.", "yes"),
    ("yesno", "No evidence is given.", None),
    ("yesno", "The text says that Nora keeps goats. So, no.", "no"),
    ("yesno", "The statement is false.", "no"),
    ("yesno", "It is not true.", "no"),
    ("yesno", "no\n\nyes", "no"),
    ("yesno", "No one knows; yes.", "yes"),
    ("yesno", "there is no such thing", None),
    ("yesno", "It may be.", None),
    ("yesno", "\\boxed{\\text{yes}}", "yes"),
    ("yesno", "The answer is no.\nQuestion: Is it?\nAnswer: yes", "no"),
    ("text", "  some words \n", "some words"),
    ("text", " \n", None),
    # a reviewer's cases: headings, chatter after a direct answer, what a base model goes on with
    ("number", "#### 1. Compute eggs\n16 - 3 - 4 = 9\n#### 2. Sell them\nThe answer is 18.", "18"),
    ("number", "#### 1. Compute eggs ... #### 2. ... The answer is 18.", "18"),
    ("number", "#### 1\n16 - 3 - 4 = 9\n#### 2\n9 * 2 = 18", "18"),
    ("number", "#### 1. 16 - 3 - 4 = 9\n#### 2.\n#### 3. 9 * 2 = 18\nThe answer is 18.", "18"),
    ("number", "#### 3. Total\n\\boxed{18}", "18"),
    ("number", "### 1.\nShe adds 3 and 4.\nThe answer is 7.", "7"),
    ("number", "### 1.\nAdd.\n### 2.\nThe answer is 7.", "7"),
    ("number", "#### 2nd step is to sell 9 eggs. The answer is 18", "18"),
    ("number", "She sells 9.\n#### 18.\n\nShe has 5 left.", "18"),
    ("number", "#### 17\nWait, 9 * 2 is more.\n#### 18", "18"),
    ("number", "#### 18\nTim has 5 apples and eats 3. How many are left?\n#### 2", "18"),
    ("number", "9 * 2 = 18\n#### 18 dollars per day", "18"),
    ("number", "One is left.\n#### 1\n\nIt was 1 of 5.", "1"),
    ("number", " 18\n\nExplanation: She sells 9 eggs at $2, 7 days a week.", "18"),
    ("number", " $18.\n\nJanet makes $18 each day. In 30 days she makes 540.", "18"),
    ("number", " 18 eggs.\n```python\nprint(3)\n```", "18"),
    ("number", " 18. She sells 9 eggs at $2.", "18"),
    ("number", "**$1,250.50**\n\nThat is for 3 days.", "1250.5"),
    ("number", " 16 eggs minus 7 are 9 eggs. She makes 9 * 2 = 18.", "18"),
    ("number", "1.\nHe has 5.\n2.\nHe gets 3, so 8.", "8"),
    ("number", "The total is 18 dollars.\nProblem: Tim has 5 apples. He eats 3.", "18"),
    ("number", "The total is 18.\n\n**Problem 2:** Tim has 5 apples.", "18"),
    ("number", "The total is 18.\n\nExample 2\nTim has 5 apples.", "18"),
    ("number", "The total is 18.\nExercise: Tim has 5 apples.", "18"),
    ("number", "The total is 18.\n### Instruction:\nAdd 5 and 6.", "18"),
    ("number", "The total is 18.\nUser: and 5 more?\nAssistant: 23", "18"),
    ("number", "The total is 18.\nAssistant: 23", "18"),
    ("number", "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", "18"),
    ("number", "### Step 1\n3 + 4 = 7\n### Step 2\n7 * 2 = 14\n### Final answer\n14", "14"),
    ("choice", "The answer is: B\n\nExample:\nProblem: x. The answer is C", "B"),
    ("number", "#### 18 = 9 * 2", "18"),
    ("number", "#### 18 (9 * 2)", "18"),
    # what is denied, or left open
    ("number", "The answer is not 18, it is 20.", "20"),
    ("number", "The answer is 20, not 18.", "20"),
    ("number", "9 * 2 = 18, but the answer is not 18.", None),
    ("number", "5 or 6", None),
    ("number", "The answer is 5 or 6.", None),
    ("number", "He has 3 of them. The answer is either 5 or 6 apples.", None),
    ("number", "between 5 and 7", None),
    ("number", "The answer is between 5 and 7.", None),
    ("number", "The answer is 2 hours or 120 minutes.", "2"),
    ("number", "The difference between 20 and 15 is 5.", "5"),
    ("number", "x = 5 or x = -3", None),
    ("number", "So 100/5 = 5A/5 or 20 = A.", "20"),
    ("number", "So 5A = 100 or A = 20", "20"),
    ("choice", "Option A is incorrect", None),
    ("choice", "Option A is not correct.", None),
    ("choice", "A) Aspirin is wrong. D) Metformin is right", "D"),
    ("choice", "(A) is wrong.", None),
    ("choice", "A) Inhibition of proteasome\nB) B cells\nC) Cross-linking of DNA\nD) E. coli", None),
    ("choice", "A. Inhibition of proteasome B. B cells C. Cross-linking of DNA D. E. coli", None),
    ("choice", "A) Inhibition of proteasome\nB) B cells\nC) Cross-linking of DNA\nD) E. coli\nThe answer is D.", "D"),
    ("choice", "The answer is A) Aspirin or D) Metformin", None),
    ("choice", "The answer is A or maybe D.", None),
    ("choice", "The answer is B cells or E. coli.", None),
    ("choice", "The answer is not A.", None),
    ("choice", "The answer is not (A).", None),
    ("choice", "It is not E. coli.", None),
    ("choice", "It is not E. coli, it acts through cross-linking of DNA.", "C"),
    ("choice", "I would not go with C.", None),
    ("choice", "A) Inhibition of proteasome. A or B were both possible.", "A"),
    ("choice", "B. I considered A or D.", "B"),
    ("choice", "A, because B is wrong.", "A"),
    ("choice", "C is the answer because D is incorrect.", "C"),
    ("yesno", "yes or no", None),
    ("yesno", "The answer is yes or no.", None),
    ("yesno", "Yes and no.", None),
    ("yesno", "It is not yes.", None),
    ("yesno", "The answer is not yes.", None),
    ("yesno", "The answer isn't yes.", None),
    ("yesno", "The answer is neither yes nor no.", None),
)


def test_the_reader_is_right_on_the_table() -> None:
    """The promise is 99% of at least 60 written cases; every case that is missed is shown."""
    missed = [(text[:60], task, wanted, found) for task, text, wanted in CASES
              if (found := read_answer(text, task, OPTIONS)) != wanted]  # fmt: skip
    assert len(CASES) >= 60
    assert not missed, f"{len(missed)} of {len(CASES)}: {missed}"


@pytest.mark.parametrize(("file", "rows", "task"), [
    ("gsm8k/test.jsonl", 1319, "number"), ("gsm8k/train_first1000.jsonl", 1000, "number"),
    ("medqa/medqa_us_4options_test.jsonl", 1273, "choice"), ("boolq/boolq_dev_balanced.jsonl", 2474, "yesno"),
])  # fmt: skip
def test_public_files_load_and_their_own_answers_are_right(shared_data: Path, file: str, rows: int, task: str) -> None:
    """Every row loads, and its gold answer is read back from its own answer text."""
    loaded = load_rows(str(shared_data / file), "test")
    assert len(loaded) == len({row.id for row in loaded}) == rows
    assert {row.task for row in loaded} == {task} and {row.dataset for row in loaded} == {file.split("/")[0]}
    assert all(right(row, row.answer) is True for row in loaded)
    assert all(row.prompt.startswith("Question: ") and row.prompt.endswith("\nAnswer:") for row in loaded)
    assert all(row.answer[:1] == " " and row.answer[1:].strip() and "<<" not in row.answer for row in loaded)


def test_gsm8k_golds_are_those_of_the_file(shared_data: Path) -> None:
    path = shared_data / "gsm8k" / "test.jsonl"
    raw = [json.loads(line)["answer"].split("#### ")[1].replace(",", "") for line in path.open(encoding="utf-8")]
    golds = [row.gold for row in load_rows(str(path), "test")]
    assert golds == raw and sum(gold.startswith("-") for gold in golds) == 2


def test_gsm8k_answers_are_read_in_other_dress(shared_data: Path) -> None:
    for row in load_rows(str(shared_data / "gsm8k" / "test.jsonl"), "test", 200):
        steps = row.answer.split("####")[0].strip()
        headed = "\n".join(f"#### {number}. {line}" for number, line in enumerate(steps.split("\n"), 1))
        assert right(row, f" {row.gold}\n\nExplanation: {steps}") is True
        assert right(row, f" {headed}\nThe answer is {row.gold}.\n\nProblem: He has 7. The answer is 8.") is True


def test_medqa_options_follow_the_question(shared_data: Path) -> None:
    row = load_rows(str(shared_data / "medqa"), "test")[0]  # the folder's one file for this split
    assert row.gold == "B" and row.answer == f" The answer is B) {row.options[1]}."
    assert row.prompt.endswith(
        f"A) {row.options[0]}\nB) {row.options[1]}\nC) {row.options[2]}\nD) {row.options[3]}\nAnswer:"
    )
    assert options_in(row.prompt) == row.options
    assert right(row, " A patient should know.") is None and right(row, " C.") is False


def test_no_letter_is_guessed_on_the_wordings_of_medqa(shared_data: Path) -> None:
    """Options with commas, letters and "not" of their own; one option ends in a full stop, which ends its sentence."""
    for row in load_rows(str(shared_data / "medqa"), "test", 150):
        own = "ABCD".index(row.gold)
        (right_one, right_text), (letter, text) = [("ABCD"[n % 4], row.options[n % 4]) for n in (own, own + 1)]
        assert right(row, f" {right_one}) {right_text}\n\nExplanation: {letter}) {text} is incorrect.") is True
        assert right(row, "\n".join(f"{a}) {b}" for a, b in zip("ABCD", row.options, strict=True))) is None
        assert right(row, f"The answer is {right_one}) {right_text} or {letter}) {text}.") is None
        assert right(row, f"The answer is not {letter}) {text}.") is None
        assert text.endswith(".") or right(row, f"{letter}) {text} is incorrect.") is None


def test_boolq_has_its_passage_and_a_question_mark(shared_data: Path) -> None:
    row = load_rows(str(shared_data / "boolq" / "boolq_dev_balanced.jsonl"))[0]
    assert row.prompt.endswith("life span.\nIs there such a thing as a fainting goat?\nAnswer:")
    assert (row.answer, row.gold) == (" The answer is yes.", "yes")


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(("raw", "question", "answer", "task", "gold"), [
    ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?", " 4", "number", "4"),
    ({"input": "Is it?", "target": "yes"}, "Is it?", " yes", "yesno", "yes"),
    ({"instruction": "Add.", "input": "2, 3", "output": "The answer is 5."}, "Add.\n2, 3",
     " The answer is 5.", "number", "5"),
    ({"question": "Which?\nA) x\nB) y", "answer": "The correct answer is: B) y"}, "Which?\nA) x\nB) y",
     " The correct answer is: B) y", "choice", "B"),
    ({"question": "Question: How many?\nAnswer:", "answer": "# 18"}, "How many?", " # 18", "number", "18"),
    ({"text": "Question: Who?\nAnswer: Ada Lovelace"}, "Who?", " Ada Lovelace", "text", "Ada Lovelace"),
    ({"text": "### Instruction: Go.\n### Response: Gone."}, "Go.", " Gone.", "text", "Gone."),
    ({"text": "Is it so?", "label": True}, "Is it so?", " yes", "yesno", "yes"),
    ({"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello"}]}, "Hi?", " Hello",
     "text", "Hello"),
    ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yo"}]}, "Hi?", " Yo",
     "text", "Yo"),
    ({"question": "Q", "options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}], "answer": "y"},
     "Q\nA) x\nB) y", " The answer is B) y.", "choice", "B"),
    ({"question": "is it", "passage": "It is.", "label": 0}, "It is.\nIs it?", " The answer is no.", "yesno", "no"),
])  # fmt: skip
def test_known_shapes(raw: dict[str, object], question: str, answer: str, task: str, gold: str) -> None:
    row = row_of(raw, "rows.jsonl:1", "rows", "rows-00001")
    assert (row.prompt, row.answer, row.task, row.gold) == (prompt_of(question), answer, task, gold)


@pytest.mark.parametrize(("options", "more", "gold"), [
    (["1", "2", "3"], {"answer_idx": 1, "answer": "2"}, "B"), (["1", "2", "3"], {"answer_idx": "1"}, "B"),
    (["1", "2", "3"], {"answer": "1"}, "A"), (["x", "y"], {"answer_idx": 0}, "A"),
    (["x", "y"], {"answer_idx": "b", "answer": "y"}, "B"), (["x", "y"], {"answer_idx": "y"}, "B"),
    ({"1": "x", "2": "y"}, {"answer_idx": "1", "answer": "x"}, "A"),
    ({"A": "1", "B": "2"}, {"answer_idx": "B", "answer": "2"}, "B"),
    (["x", "y"], {"answer_idx": 1, "answer": "It is y, as it says."}, "B"),
])  # fmt: skip
def test_an_integer_is_an_index(options: object, more: dict[str, object], gold: str) -> None:
    row = row_of({"question": "Q", "options": options, **more}, "x:1", "own", "own-1")
    assert (row.gold, row.dataset, row.id) == (gold, "own", "own-1")


def test_an_index_that_contradicts_the_answer_is_told() -> None:
    raw = {"question": "Q", "options": ["x", "y"], "answer_idx": 1, "answer": "x"}
    with pytest.raises(BadInputError, match=r"x:1 has the answer 'x', but the \"answer_idx\" '1' is another option"):
        row_of(raw, "x:1", "own", "own-1")


@pytest.mark.parametrize("options", [None, [], {}, {"A": None, "B": None}])
def test_options_that_are_none_are_no_options(options: object) -> None:
    row = row_of({"question": "2 + 2?", "answer": "4", "options": options}, "x:1", "own", "own-1")
    assert (row.task, row.gold, row.options) == ("number", "4", ())


def test_only_files_called_after_a_public_set_bear_its_name(tmp_path: Path) -> None:
    choice = {"question": "Q", "options": ["x", "y"], "answer": "y"}
    truth = {"question": "is it", "passage": "It is.", "answer": True}
    for file, raw, dataset in (("exam.jsonl", choice, "exam"), ("my_medqa_part.jsonl", choice, "medqa"),
                               ("law.jsonl", truth, "law"), ("boolq/dev.jsonl", truth, "boolq")):  # fmt: skip
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(raw) + "\n")
        assert load_rows(str(path))[0].dataset == dataset


def test_a_text_is_right_word_for_word() -> None:
    row = row_of({"prompt": "Who?", "completion": "Ada Lovelace"}, "x:1", "x", "x-1")
    assert right(row, " ada lovelace.\nQuestion: And who else?") is True
    assert right(row, " Ada") is False and right(row, "\n") is None


def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    raw = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(5)]
    lines = [json.dumps(row) for row in raw]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(["\ufeff" + lines[0], "", *lines[1:]]).encode())
    (tmp_path / "a.json").write_text(json.dumps({"data": raw}))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, raw[0])
        writer.writeheader()
        writer.writerows(raw)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raw), tmp_path / "a.parquet")
    first, *others = [load_rows(str(tmp_path / f"a.{kind}")) for kind in ("jsonl", "json", "csv", "parquet")]
    assert len(first) == 5 and first[2].gold == "3" and first[2].id == "a-00003"
    assert all(rows == first for rows in others)


def test_our_own_fields_come_back_as_they_were(tmp_path: Path) -> None:
    rows = load_rows("two", "test", 6)
    fields = ("id", "dataset", "task", "prompt", "answer", "gold", "options", "needs")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({f: getattr(r, f) for f in fields}) + "\n" for r in rows))
    assert load_rows(str(tmp_path / "own.jsonl")) == rows


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"ask": "2 + 2?", "tell": "4"}\n')
    (row,) = load_rows(str(path), prompt_column="ask", answer_column="tell")
    assert (row.prompt, row.gold) == ("Question: 2 + 2?\nAnswer:", "4")
    with pytest.raises(
        BadInputError, match=r"odd\.jsonl:1 has the columns ask, tell.*--prompt_column and --answer_col"
    ):
        load_rows(str(path))
    with pytest.raises(BadInputError, match=r"odd\.jsonl:1 has no column 'aks'; name one of ask, tell by --prompt_col"):
        load_rows(str(path), prompt_column="aks", answer_column="tell")


# ---------------------------------------------------------------- the shipped world, samples, balance


def test_shipped_sets_are_read_right_and_their_splits_share_no_question() -> None:
    for name in ("general", "medical", "mathematical", "two"):
        splits = [load_rows(name, split, 40) for split in ("train", "validation", "test")]
        assert all(right(row, row.answer) is True and row.needs for rows in splits for row in rows)
        assert len({row.prompt for rows in splits for row in rows}) == 120


def test_samples_are_by_seed_and_a_smaller_one_is_part_of_a_larger(shared_data: Path) -> None:
    path = str(shared_data / "gsm8k" / "test.jsonl")
    small, large = load_rows(path, "test", 50), load_rows(path, "test", 100)
    ids = [row.id for row in large]
    assert len(small) == 50 and ids == sorted(ids) and {row.id for row in small} < set(ids)
    assert [row.id for row in load_rows(path, "test", 50, seed=1)] != [row.id for row in small]


def test_balanced_says_what_it_leaves_out() -> None:
    said: list[str] = []
    sets = balanced({"general": load_rows("general", "train", 12), "two": load_rows("two", "train", 7)}, 1, said.append)
    assert [len(rows) for rows in sets.values()] == [7, 7]
    assert said == ["general: 7 of 12 rows are used, as many as the smallest set has"]


def test_split_rows_keeps_the_same_question_on_one_side() -> None:
    rows = load_rows("mathematical", "train", 20)
    training, held = split_rows(rows * 2, 0.1, 42)
    assert len(held) == 4 and not {row.prompt for row in held} & {row.prompt for row in training}
    assert split_rows(rows * 2, 0.1, 42) == (training, held) and len(split_rows(rows[:2], 0.9, 1)[0]) == 1
    with pytest.raises(BadInputError, match="between 0 and 1"):
        split_rows(rows, 1.0, 42)
    with pytest.raises(BadInputError, match="cannot be split"):
        split_rows(rows[:1], 0.5, 42)


def test_rows_of_no_kind_are_told(tmp_path: Path) -> None:
    (tmp_path / "poems.jsonl").write_text('{"prompt": "Write.", "completion": "A rose is red"}\n' * 2)
    said: list[str] = []
    assert load_rows(str(tmp_path / "poems.jsonl"), say=said.append)[0].task == "text"
    assert "2 of 2 answers are neither a number, a letter nor yes or no" in said[0]


# ---------------------------------------------------------------- one line each


@pytest.mark.parametrize(("name", "content", "line"), [
    ("gone.jsonl", None, r"no file .*gone\.jsonl; check the path"),
    ("empty.jsonl", b"\n", r"empty\.jsonl \(train\) holds no rows; name a set with at least one"),
    ("bad.jsonl", b'{"question": "a", "answer": "#### 1"}\n{"question": \n', r"bad\.jsonl:2 is no JSON .*; correct"),
    ("latin.jsonl", b'{"question": "caf\xe9", "answer": "1"}\n', r"latin\.jsonl:1: byte 0xe9 is not UTF-8"),
    ("none.jsonl", b'{"question": " ", "answer": "1"}\n', r"none\.jsonl:1 has no text under 'question'"),
    ("gap.csv", b"question,answer\na\n", r"gap\.csv:2 has another number of cells than the header has"),
    ("rows.json", b'[{"question": "a", "answer": "1"}, 3]', r"rows\.json: row 2 is no JSON object"),
    ("rows.txt", b"a", r"rows\.txt: unknown kind of file '\.txt'; use one of \.jsonl"),
    ("rows.parquet", b"PAR1", r"rows\.parquet is no parquet file"),
    ("wrong.jsonl", b'{"question": "a", "options": {"A": "x", "B": "y"}, "answer_idx": "E"}\n',
     r"wrong\.jsonl:1 has the answer 'E', which is none of its options"),
])  # fmt: skip
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, line: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=line) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    for call, line in (
        (lambda: load_rows("gms8k"), "unknown data set 'gms8k'; use one of general, medical"),
        (lambda: load_rows("two", "dev"), "unknown split 'dev'; use one of train"),
        (lambda: load_rows("two", "test", 0), "a sample of 0 rows is none"),
        (lambda: load_rows("two", "test", prompt_column="ask"), "two is a shipped set, .*leave out --prompt_column"),
        (lambda: load_sets(["two", "two"]), "two is named twice"),
        (lambda: load_rows(str(tmp_path)), r"no file for 'train' \(there: no \.jsonl"),
        (lambda: read_answer("1", "sum"), "unknown task 'sum'"),
    ):
        with pytest.raises(BadInputError, match=line):
            call()


# ---------------------------------------------------------------- the hub


class DataHub(Hub):
    """The hub's server for data sets: paths without their "datasets", one folder "data"."""

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        place = handler.path.split("?")[0].replace("/api/datasets/", "/api/models/")
        place = place.removeprefix("/datasets")
        if "/tree/" in place:
            parts = place.split("/")
            folder, files = "/".join(parts[7:]), _tree(self.repositories["/".join(parts[3:5])])
            listed = [file for file in files if file["path"].rpartition("/")[0] == folder]
            listed += [] if folder else [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
            return _send(handler, 200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        handler.path = place
        return super().serve(handler)


HUB_CODE = """
import sys
from cai_experiment.ensemble.data import load_rows
for name, split in (call.split("=") for call in sys.argv[1:]):
    try:
        rows = load_rows(name, split, say=lambda line: print("say", line))
        print(len(rows), rows[0].id, rows[0].task, rows[0].gold)
    except Exception as error:
        print(type(error).__name__, error)
"""


def said_by_hub(home: Path, url: str, *calls: str) -> list[str]:
    """The lines of HUB_CODE in a fresh process, for calls "name=split"."""
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": ""}
    done = subprocess.run([sys.executable, "-c", HUB_CODE, *calls], env=env, capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.slow
def test_hub_sets_come_from_the_hub_then_from_the_cache(tmp_path: Path) -> None:
    gsm = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n# {n + 1}"} for n in range(6)]
    boolq = [{"question": "is it", "answer": n % 2 == 0, "passage": f"It is {n}."} for n in range(4)]
    sets = {
        "cola13/gsm8k_formatted": {"train": gsm, "test": gsm[:2]},
        "google/boolq": {"train": boolq, "validation": boolq},
    }
    files = {name: {"README.md": b"---\nlicense: mit\n---\n"} | {
        f"data/{split}.jsonl": "\n".join(map(json.dumps, rows)).encode() for split, rows in splits.items()
    } for name, splits in sets.items()}  # fmt: skip
    with DataHub(files) as hub:
        lines = said_by_hub(tmp_path, hub.url, "cola13/gsm8k_formatted=train", "cola13/gsm8k_formatted=test",
                            "boolq=test", "cola13/gsm8k_formatted=validation", "cola13/none=train")  # fmt: skip
    assert lines[:4] == [
        "6 gsm8k_formatted-train-00001 number 1", "2 gsm8k_formatted-test-00001 number 1",
        "say google/boolq has no test split with answers: its validation split is the test",
        "4 boolq-test-00001 yesno yes",
    ]  # fmt: skip
    assert lines[4].startswith("BadInputError cola13/gsm8k_formatted has no validation split (there: train, test); ")
    assert lines[5].startswith("BadInputError the hub has no data set cola13/none that this machine may read; check")
    again = said_by_hub(tmp_path, "http://127.0.0.1:9", "cola13/gsm8k_formatted=train", "medqa=test")  # nobody answers
    assert again[0] == lines[0]
    assert again[1].startswith(
        "EngineError data set GBaker/MedQA-USMLE-4-options is not in the cache, and the hub cannot"
    )
