"""The constitution's loader: the shipped file, a user's own, the CAI paper's, and every way to get one wrong."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cai_experiment.constitution.principles import AXIS_WEIGHTS, DEFAULT_CONSTITUTION, load_constitution
from cai_experiment.errors import BadInputError

ENTRY: dict[str, Any] = {
    "id": "kind",
    "name": "Kindness",
    "category": "helpfulness",
    "text": "Be kind.",
    "critique_request": "Find where the last answer is unkind.",
    "revision_request": "Rewrite the answer kindly.",
    "axis": "fairness",
    "weight": 3,
}


def write(folder: Path, *entries: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "principles": list(entries)}), encoding="utf-8")
    return path


def changed(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(ENTRY), **fields}


def refusal(path: Path) -> str:
    """The error's one line."""
    with pytest.raises(BadInputError) as caught:
        load_constitution(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert caught.value.exit_code == 2
    return message


def test_shipped_constitution_has_fifteen_principles_with_their_axis_weights() -> None:
    constitution = load_constitution()
    assert len(constitution.principles) == 15
    assert all(p.weight == AXIS_WEIGHTS[p.axis] for p in constitution.principles)
    assert {p.category for p in constitution.principles} == {"helpfulness", "harmlessness", "honesty"}
    assert constitution.sha256 == hashlib.sha256(DEFAULT_CONSTITUTION.read_bytes()).hexdigest()
    assert constitution.get("privacy").name == "Privacy"


def test_own_constitution_of_one_principle_with_its_own_weight(tmp_path: Path) -> None:
    constitution = load_constitution(write(tmp_path, ENTRY))
    assert [p.id for p in constitution.principles] == ["kind"]
    assert constitution.principles[0].weight == 3.0
    with pytest.raises(BadInputError, match=r"no principle 'privacy'.*kind"):
        constitution.get("privacy")


def test_own_constitution_as_json_reads_surrogate_pairs(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"principles": [changed(text="Be kind 😀.")]}), encoding="ascii")
    assert load_constitution(path).principles[0].text == "Be kind 😀."


@pytest.mark.parametrize("field", list(ENTRY))
def test_missing_field_is_named(tmp_path: Path, field: str) -> None:
    entry = changed()
    del entry[field]
    message = refusal(write(tmp_path, changed(id="first"), entry))
    assert "principle 2" in message and f'"{field}"' in message


@pytest.mark.parametrize("field", [f for f in ENTRY if f != "weight"])
@pytest.mark.parametrize("value, says", [("  ", "empty"), (False, "False, not a text"), (None, "None"), ([1], "[1]")])
def test_empty_or_mistyped_text_is_named(tmp_path: Path, field: str, value: Any, says: str) -> None:
    message = refusal(write(tmp_path, changed(**{field: value})))
    assert "principle 1" in message and f'"{field}"' in message and says in message


@pytest.mark.parametrize("value", [0, -1, True, "2", None, float("nan"), float("inf"), [2]])
def test_weight_must_be_a_positive_number(tmp_path: Path, value: Any) -> None:
    message = refusal(write(tmp_path, changed(weight=value)))
    assert "(kind)" in message and '"weight"' in message and "positive number" in message


def test_unknown_axis_and_category_list_the_known_ones(tmp_path: Path) -> None:
    assert "use one of harm_prevention, truthfulness" in refusal(write(tmp_path, changed(axis="honour")))
    assert "use one of helpfulness" in refusal(write(tmp_path, changed(category="help")))


def test_duplicate_and_odd_ids(tmp_path: Path) -> None:
    assert "principle 2" in refusal(write(tmp_path, ENTRY, ENTRY))
    assert "letters, digits" in refusal(write(tmp_path, changed(id="be kind/now")))


@pytest.mark.parametrize(
    "text, says",
    [
        ("", 'no list "principles"'),
        ("version: 1\n", 'no list "principles"'),
        ("principles: []\n", "empty"),
        ("principles: hello\n", "not a list"),
        ("principles:\n  - hello\n", "principle 1 is 'hello'"),
        ("principles:\n  - id: a\n   name: b\n", "mine.yaml:3 is not YAML"),
        ('principles:\n  - id: "a\n', "is not YAML"),
        ("principles: 2024-13-45\n", "is not YAML"),
        ("principles: \x07\n", "is not YAML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert says in refusal(path)


def test_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"version: 1\nprinciples:\n  - id: caf\xe9\n")
    assert f"{path}:3 holds byte 0xe9" in refusal(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.yaml")
    assert "cannot be read" in refusal(tmp_path)


def test_paper_format(tmp_path: Path) -> None:
    path = tmp_path / "paper.json"
    entry = {
        "prompt": ["\n\nCritiqueRequest: Find harm.\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Remove harm.\n\nRevision:",
    }
    path.write_text(json.dumps({"harmful0": entry}))
    (principle,) = load_constitution(path).principles
    assert (principle.critique_request, principle.revision_request) == ("Find harm.", "Remove harm.")
    path.write_text(json.dumps({"harmful0": entry, "harmful1": {"prompt": ["x"]}}))
    message = refusal(path)
    assert "'harmful1'" in message and '"edit_request"' in message
    path.write_text(json.dumps({"harmful0": {**entry, "prompt": ["\n\nCritiqueRequest: \n\nCritique:"]}}))
    assert '"prompt" is empty' in refusal(path)
    path.write_text('{"harmful0": \n 1,}')
    assert "paper.json:2 is not JSON" in refusal(path)


def test_the_papers_own_file(shared_data: Path) -> None:
    paper = shared_data / "cai_paper"
    constitution = load_constitution(paper / "CritiqueRevisionInstructions.json")
    assert len(constitution.principles) == 16
    for principle in constitution.principles:
        for text in (principle.critique_request, principle.revision_request):
            assert text and "Request:" not in text and "Critique:" not in text and "Revision:" not in text
    assert 'no list "principles"' in refusal(paper / "RLMadisonInstructions.json")
