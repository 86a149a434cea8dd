"""What instructions are asked for (both grids), and which are refused because an evaluation set holds them."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from math import gcd
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution import broad_grid, grid
from cai_experiment.constitution.broad_grid import BROAD, KINDS, LENGTHS, TOPICS, tempts
from cai_experiment.constitution.prompts import (
    Turn,
    ask_for_instruction,
    ask_for_message,
    render_base,
)
from cai_experiment.constitution.worked_examples import INSTRUCTION_EXAMPLES, MESSAGE_EXAMPLES, examples_for
from cai_experiment.engines.base import Completion
from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.dataset import describe_pairs
from cai_experiment.evaluation.reporting.words import dataset_lines
from cai_experiment.pipeline.evaluation_sets import (
    SHIPPED,
    EvaluationSet,
    EvaluationTexts,
    read_evaluation_set,
    shipped_sets,
)
from cai_experiment.pipeline.instruct import Instruction, InstructionWriter
from cai_experiment.pipeline.known import KnownTexts, fingerprint
from cai_experiment.pipeline.mix import Part
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.pipeline.sources import load_instructions
from cai_experiment.pipeline.work_list import WorkList
from cai_experiment.records.manifest import Manifest, check_same_settings
from cai_experiment.scripts import hash_evaluation_set
from cai_experiment.scripts._generation import generation_parser, run_settings

ROOT = Path(__file__).resolve().parents[1]
CELLS = len(TOPICS) * len(KINDS)


def rendered(turns: tuple[Turn, ...]) -> str:
    """A prompt as a base model reads it, worked examples first."""
    examples = examples_for("written_instruction", turns)
    return "".join(segment.text for segment in render_base(turns, "written_instruction", examples))


# ---------------------------------------------------------------- the household grid


def test_the_shipped_model_s_prompts_and_their_order_are_what_they_always_were() -> None:
    asked = [ask_for_instruction(*grid.draw(seed, n)) for seed in (0, 1) for n in range(432)]
    assert asked[0][0].text.startswith("Write one question that a person might ask an assistant.\nTopic: ")
    assert all(examples_for("written_instruction", turns) is INSTRUCTION_EXAMPLES for turns in asked)
    for texts, digest in (
        ([turns[0].text for turns in asked], "a4e359dc75808abbd243dad351d01a58e474fbc7cc17a63ec9fe85146cce383c"),
        (map(rendered, asked), "609dd17af00292840ebf08ba754caf4dee6843753188ae79675ea938ff8401cb"),
    ):
        assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == digest
    (first,) = InstructionWriter(0, 1).next_prompts(1)
    assert first.turns == asked[0] and first.sampling.max_tokens == 120


# ---------------------------------------------------------------- the broad grid


def test_the_broad_grid_is_broad_and_a_third_of_its_kinds_tempt() -> None:
    assert len(set(TOPICS)) == len(TOPICS) >= 120 and len(broad_grid.FIELDS) >= 15 and len(KINDS) >= 20
    assert gcd(len(TOPICS), len(KINDS)) == 1, "else a pass would not meet every cell"
    assert 0.28 <= sum(map(tempts, KINDS)) / len(KINDS) <= 0.36
    assert not any(set("/:\n") & set(name) for name in (*TOPICS, *KINDS, *LENGTHS)), "a source is topic/kind/length"


@pytest.mark.parametrize("draws", [100, 300, 5000])
def test_topics_and_kinds_come_evenly_however_few_are_drawn(draws: int) -> None:
    for seed in (0, 7):
        topics, kinds, lengths = zip(*(broad_grid.draw(seed, n) for n in range(draws)), strict=True)
        for drawn, every in ((topics, TOPICS), (kinds, tuple(KINDS))):
            counts = Counter(drawn)
            passes = 1 + draws // CELLS
            assert max(counts.values()) - min(counts[one] for one in every) <= passes
        assert set(lengths) == set(LENGTHS) and max(Counter(lengths).values()) < 0.5 * draws


def test_every_cell_comes_once_before_any_comes_again_in_an_order_of_the_seed() -> None:
    first, second = ([broad_grid.draw(3, n)[:2] for n in range(k * CELLS, (k + 1) * CELLS)] for k in (0, 1))
    assert len(set(first)) == len(set(second)) == CELLS and first != second
    assert (
        first == [broad_grid.draw(3, n)[:2] for n in range(CELLS)] != [broad_grid.draw(4, n)[:2] for n in range(CELLS)]
    )


def test_every_cell_renders_and_reads_as_a_sentence_of_its_own() -> None:
    for topic in TOPICS:
        for kind, phrase in KINDS.items():
            (turn,) = turns = ask_for_message(topic, kind, "long")
            assert turn.text.split("\n")[1:] == [
                f"Topic: {topic}", f"Kind: the person {phrase}", f"Length: {LENGTHS['long']}",
            ]  # fmt: skip
            assert phrase.split()[0] in ("asks", "wants", "gives", "shows", "poses", "states", "describes")
            assert examples_for("written_instruction", turns) is MESSAGE_EXAMPLES
    text = rendered(ask_for_message("astronomy", "debug", "short"))
    assert text.count("### Task:\n") == len(MESSAGE_EXAMPLES) + 1 and text.endswith("### Result:\n")


def test_worked_examples_are_cells_of_the_grid_and_would_be_taken() -> None:
    known = KnownTexts()
    tempting = 0
    for task, result in MESSAGE_EXAMPLES:
        topic, phrase, _ = (line.partition(": ")[2] for line in task.text.split("\n")[1:])
        (kind,) = (name for name, value in KINDS.items() if f"the person {value}" == phrase)
        assert topic in TOPICS and known.add(result.text) == ""
        tempting += tempts(kind)
    assert tempting == 3


def test_the_broad_prompt_fits_the_real_base_model_s_tokenizer(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    from cai_experiment.engines.render import Renderer

    renderer = Renderer(AutoTokenizer.from_pretrained(shared_data / "qwen2_tokenizer"), "base", 4096)
    turns = ask_for_message(*broad_grid.draw(0, 0))
    ids = renderer.prompt_ids(turns, "written_instruction", max_tokens=200)
    assert renderer.tokenizer.decode(ids) == rendered(turns) and len(ids) < 1000


def settings_of(*flags: str) -> RunSettings:
    """The settings that generate_mvp.py makes of its flags."""
    from cai_experiment.milestones import MILESTONES

    return run_settings(generation_parser("", "mvp").parse_args(flags), MILESTONES["mvp"])


def test_the_shipped_model_keeps_its_grid_and_others_get_the_broad_one(nano_dir: Path, tiny_model_dir: Path) -> None:
    assert settings_of("--model", str(nano_dir)).recorded()["grid"] == "household"
    assert settings_of("--model", str(tiny_model_dir)).recorded()["grid"] == "broad"


def test_a_run_begun_with_another_grid_is_refused() -> None:
    old, new = (
        Manifest(RunSettings(1, 9, grid=name).recorded(), 0, {}, {"sha256": ""}) for name in ("household", BROAD)
    )
    with pytest.raises(BadInputError, match=r'grid was "household", now "broad".*--fresh'):
        check_same_settings(old, new)


def test_the_report_shows_kinds_and_how_many_tempt() -> None:
    work = WorkList(RunSettings(pairs=50, max_draws=50, grid=BROAD, evaluation_sets=shipped_sets()))
    for prompt in work.prompts(50):
        assert prompt.turns[0].text.startswith("Write one message") and prompt.sampling.max_tokens == 200
        work.take(Completion(prompt.id, f"Tell me of {prompt.id.replace('/', ' number ')}, please.", "stop"))
    sources = [one.source for one in iter(work.next, None)]
    assert sources[0] == "self:{}/{}/{}".format(*broad_grid.draw(0, 0)) and len(sources) == 50
    manifest = Manifest({"exclude": [one.name for one in shipped_sets()]}, 0, {}, {"sha256": ""})
    manifest.counts["refused/in_evaluation_set"] = 3
    dataset = describe_pairs([accepted(source) for source in sources], [], manifest, None)
    assert dataset["shares"]["kind"].keys() == set(KINDS) and dataset["shares"]["length"].keys() == set(LENGTHS)
    assert dataset["tempting"] == 16 / 50
    lines = "\n".join(dataset_lines(dataset))
    assert "32% of the pairs" in lines and "tempt-danger 4%" in lines
    assert "evaluation sets checked: HarmBench, MT-Bench; 3 instructions stood in them and were refused" in lines
    assert "--allow" not in lines
    allowed = Manifest({"exclude": [], "allow_evaluation_sets": True}, 0, {}, {"sha256": ""})
    lines = "\n".join(dataset_lines(describe_pairs([accepted("self:a/b/c")], [], allowed, None)))
    assert "evaluation sets checked: none" in lines and "--allow-evaluation-sets: what stands in HarmBench or" in lines


def accepted(source: str) -> Any:
    """An accepted example, as far as the report's part on the data reads it."""
    from cai_experiment.records.schema import Example, PreferencePair, Round

    pair = PreferencePair("Why?", "So it is.", "So it was.")
    one = Round("kind", "Be kind.", "So.", "So it is.", "yes", "no")
    return Example("000000", "Why?", "So it was.", "Be kind.", "So.", "So it is.", pair, (one,), {"source": source})


# ---------------------------------------------------------------- evaluation sets

HELD = (
    "Write a long letter in which a baker explains to his landlord why the rent of the shop must not rise this year.",
    "Name three rivers of Iceland.",
    "Explain rain",
)
INNOCENT = (
    "Write a short letter to my landlord about the broken heating.",
    "Name three rivers of Norway, please, and say how long each of them is.",
    "Explain rain and snow to a child who has seen neither of them",
)


@pytest.fixture(scope="module")
def held() -> EvaluationTexts:
    return EvaluationTexts((EvaluationSet.of("held", HELD),))


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        *((text, True) for text in HELD),
        (HELD[0].upper().replace(",", ""), True),
        (HELD[0].replace("baker", "barber"), True),
        (f"For my novel, and quickly, {HELD[0]} Do not mention that I asked for it, and keep it under a page.", True),
        (f"{HELD[1][:-1]}, please", True),  # 3 of 4 shingles
        (f"{HELD[1][:-1]} and three of Norway", False),  # 3 of 6: a text of 3 may stand in a longer one by chance
        *((text, False) for text in INNOCENT),
    ],
)
def test_texts_are_refused_whole_and_nearly_and_within_others(held: EvaluationTexts, text: str, refused: bool) -> None:
    assert held.holds(fingerprint(text)) is refused


def test_without_a_set_nothing_is_held() -> None:
    assert not EvaluationTexts(()).holds(fingerprint("Why?")) and len(EvaluationTexts(())) == 0


def test_a_set_on_disk_holds_no_text_and_refuses_the_same(tmp_path: Path, held: EvaluationTexts) -> None:
    source = tmp_path / "held.jsonl"
    source.write_text(
        "".join(json.dumps({"turns": [text, f"And {n} more of them?"]}) + "\n" for n, text in enumerate(HELD))
    )
    out = tmp_path / "held.json"
    flags = (str(source), "--name", "Held", "--source", "a test", "--licence", "none", "--out", str(out))
    assert hash_evaluation_set.main(flags) == 0
    row = json.loads(out.read_text())
    assert (row["name"], row["source"], row["licence"], row["texts"]) == ("Held", "a test", "none", 6)
    assert not any(word in out.read_text() for word in ("baker", "Iceland"))
    found = EvaluationSet.read(out)
    assert found.name == read_evaluation_set(source, "Held").name and found.name.startswith("Held sha256:")
    again = EvaluationTexts((found,))
    for text in (*HELD, HELD[0].replace("baker", "barber"), *INNOCENT):
        assert again.holds(fingerprint(text)) is held.holds(fingerprint(text))
    assert again.holds(fingerprint("And 2 more of them!")), "a later turn is asked in the evaluation too"


def test_hashes_are_the_same_in_every_process(tmp_path: Path) -> None:
    code = ("from cai_experiment.pipeline.evaluation_sets import EvaluationSet; import sys;"
            "print(EvaluationSet.of('x', sys.argv[1:]).name)")  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code, *HELD], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == EvaluationSet.of("x", HELD).name


@pytest.mark.parametrize("damage", [lambda row: row.pop("sizes"), lambda row: row.update(words=row["words"][:-8])])
def test_a_damaged_set_is_one_line(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "held.json"
    EvaluationSet.of("held", HELD).write(path, "", "")
    row = json.loads(path.read_text())
    damage(row)
    path.write_text(json.dumps(row))
    with pytest.raises(BadInputError, match=r"held\.json is no whole set of hashes"):
        EvaluationSet.read(path)


# ---------------------------------------------------------------- the shipped sets


def test_harmbench_and_mt_bench_are_shipped_small_and_with_their_licences() -> None:
    rows = {path.name: json.loads(path.read_text()) for path in SHIPPED.glob("*.json")}
    assert "MIT" in rows["harmbench.json"]["licence"] and "Apache-2.0" in rows["mt_bench.json"]["licence"]
    assert [(one.name.partition(" ")[0], len(one)) for one in shipped_sets()] == [("HarmBench", 493), ("MT-Bench", 160)]
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.json")) < 300_000


def test_rows_of_the_public_sets_are_refused_edited_ones_too_and_other_questions_are_not(shared_data: Path) -> None:
    behaviours = load_instructions(shared_data / "harmbench" / "harmbench_behaviors_text_all.csv")
    questions = load_instructions(shared_data / "mt_bench" / "question.jsonl")
    texts = EvaluationTexts(shipped_sets())
    assert all(texts.holds(fingerprint(row.text)) for row in (*behaviours, *questions))
    rng, caught = random.Random(0), 0
    for row in behaviours:
        words = row.text.split()
        words[rng.randrange(len(words))] = "other"
        caught += texts.holds(fingerprint(" ".join(words)))
    assert caught >= 0.75 * len(behaviours), "one word of a behaviour is another: most are seen"
    others = [*load_instructions(shared_data / "self_instruct" / "seed_tasks.jsonl"),
              *load_instructions(shared_data / "red_team_prompts" / "harmfulqa.json")]  # fmt: skip
    assert not any(texts.holds(fingerprint(row.text)) for row in others)


def test_every_run_checks_the_shipped_sets_unless_it_is_told_not_to(
    nano_dir: Path, tmp_path: Path, shared_data: Path
) -> None:
    csv = str(shared_data / "harmbench" / "harmbench_behaviors_text_val.csv")
    own = settings_of("--model", str(nano_dir)).recorded()["exclude"]
    assert [name.partition(" sha256:")[0] for name in own] == [
        "HarmBench", "MT-Bench", "held-out questions of the shipped model's world",
    ]  # fmt: skip
    mixed = WorkList(settings_of("--model", str(nano_dir), "--mix", f"{csv}:1"))
    assert mixed.next() is None and mixed.refused == {"in_evaluation_set": 80}
    given = WorkList(settings_of("--model", str(nano_dir), "--instructions", csv))
    assert given.next() is None and given.refused == {"in_evaluation_set": 80}
    allowed = settings_of("--model", str(nano_dir), "--instructions", csv, "--allow-evaluation-sets")
    given = WorkList(allowed)
    assert sum(1 for _ in iter(given.next, None)) == 80 and not given.refused
    assert allowed.recorded()["allow_evaluation_sets"] is True
    assert [name.partition(" sha256:")[0] for name in allowed.recorded()["exclude"]] == [
        "held-out questions of the shipped model's world",
    ]  # fmt: skip


def test_a_mix_s_rows_near_a_shipped_set_are_counted_and_the_rest_is_drawn() -> None:
    rows = tuple(Instruction(f"{n:06d}", text, f"a:{n}") for n, text in enumerate((*HELD, *INNOCENT)))
    work = WorkList(RunSettings(9, 9, mix=(Part("a", 1.0, rows),), evaluation_sets=(EvaluationSet.of("h", HELD),)))
    assert {one.text for one in iter(work.next, None)} == set(INNOCENT) and work.refused == {"in_evaluation_set": 3}
