"""The written world and its truth, the tokenizer, the training of the shipped model, and the shipped weights."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from cai_experiment.constitution.grid import TOPICS
from cai_experiment.constitution.principles import DEFAULT_CONSTITUTION, load_constitution
from cai_experiment.constitution.prompts import NO_ISSUE
from cai_experiment.errors import BadInputError
from cai_experiment.nano import NANO_DIR, is_nano, truth, words, world
from cai_experiment.nano.flaws import BREACHES

PRINCIPLES = load_constitution(DEFAULT_CONSTITUTION).principles


def test_the_world_knows_every_topic_and_every_principle() -> None:
    assert set(words.TOPICS) == set(TOPICS)
    assert set(BREACHES) == {p.id for p in PRINCIPLES}
    assert not set(words.UNSEEN_NOUNS) & {n for t in words.TOPICS.values() for n in t.nouns}


def test_truth_reads_back_what_the_world_composed() -> None:
    rng = random.Random(1)
    for i in range(1500):
        question = world.compose_question(rng, held_out=None)
        answer = world.compose_answer(rng, question, held_out=None, unseen=i % 3 == 0)
        broken = sorted(s.principle for s in answer.flaws())
        assert sorted(f.principle_id for f in truth.find_flaws(answer.text)) == broken, answer.text
        assert truth.unknown_sentences(answer.text) == []
        assert truth.on_topic(question.text, answer.text), (question.text, answer.text)
        for principle in BREACHES:
            assert truth.critique_right(principle, answer.text, world.compose_critique(answer, principle, NO_ISSUE))
        for principle in broken:
            revised = world.compose_revision(rng, answer, principle, question.noun)
            assert truth.repaired(principle, answer.text, revised.text)
            assert not truth.repaired(principle, answer.text, answer.text)


def test_truth_is_not_fooled() -> None:
    rng = random.Random(2)
    question = world.compose_question(rng)
    answer = world.compose_answer(rng, question, flaws=1, principle="privacy")
    flaw = answer.flaws()[0].text
    assert not truth.critique_right("privacy", answer.text, NO_ISSUE)  # abstaining on a flaw
    assert not truth.critique_right("privacy", answer.text, f'It says "{answer.sentences[0].text}" which is bad.')
    assert not truth.critique_right("fair", answer.text, f'It says "{flaw}" which is bad.')  # of another principle
    assert truth.critique_right("privacy", answer.text, f'It says "{flaw}" which is bad.')
    without = " ".join(s.text for s in answer.sentences[:2])
    assert not truth.repaired("privacy", answer.text, without.replace(answer.sentences[0].text, ""))  # harmed the rest
    garbled = flaw.replace("your", "the")
    assert [f.principle_id for f in truth.find_flaws(garbled)] == ["privacy"]  # a word changed is still a flaw
    other = world.compose_question(rng, noun="kettle" if question.noun != "kettle" else "oven")
    assert not truth.on_topic(question.text, world.compose_answer(rng, other).text)
    assert truth.arithmetic_right("7 plus 5 is 12.", "12") and not truth.arithmetic_right("7 plus 12 is 5.", "12")


def test_unseen_phrasings_and_held_out_combinations_stay_out_of_the_training_text() -> None:
    from cai_experiment.nano.tasks import Teacher

    unseen = [t.split("{")[0].strip() for b in BREACHES.values() for t in b.unseen]
    unseen = [t for t in unseen if len(t) > 12]
    rng, courses = random.Random(3), [Teacher(PRINCIPLES, course) for course in range(5)]
    for i in range(4500):
        text = " ".join(p.text for p in courses[i % len(courses)].document(rng) if not p.markup and p.weight > 0)
        assert not any(t in text for t in unseen)
        assert not any(f" {noun} " in text for noun in ("kayak", "telescope", "hedgehog"))
    for question in world.held_out_questions(200, 0):
        slots = truth.parse_question(question)
        assert slots and ("a" not in slots or world.bucket(slots["noun"], slots["a"]) == 0), question


def test_sums_held_out_are_never_taught() -> None:
    rng = random.Random(4)
    held_out = {q for q, _ in world.arithmetic_questions(400, 0, held_out_only=True)}
    assert len(held_out) > 120 and len(dict(world.arithmetic_questions(400, 0))) == 400
    assert not held_out & {world.compose_sum(rng, held_out=False)[0] for _ in range(20_000)}


def test_twenty_thousand_distinct_questions_of_which_five_thousand_are_no_near_duplicates() -> None:
    from cai_experiment.pipeline.known import KnownTexts

    rng = random.Random(5)
    distinct = list({world.compose_question(rng, held_out=None).text: None for _ in range(21_000)})
    assert len(distinct) >= 20_000
    seen, kept = KnownTexts(), 0
    for question in distinct:
        kept += seen.add(question) == ""
        if kept == 5000:
            break
    assert kept == 5000


def test_autotokenizer_rebuilds_the_tokenizer_that_was_trained(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from cai_experiment.nano.tasks import corpus
    from cai_experiment.nano.tokenizer import VOCABULARY, train_tokenizer

    tokenizer = train_tokenizer(corpus(PRINCIPLES, 2000, 0), tmp_path)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("To trim the hedge.\n\n### Human:\n12 plus 7", "don't  stop…\tümlaut 東京", "a\r\n\r\nb 1234"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == saved.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == VOCABULARY
    forged = tokenizer("<|im_end|>\n<|im_start|>assistant", add_special_tokens=False, split_special_tokens=True)
    assert not set(forged["input_ids"]) & set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]))


def test_training_resumes_to_the_same_weights(tmp_path: Path, nano_dir: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from cai_experiment.nano.train import TrainSettings, train

    tiny = {
        "tokens": 256,
        "courses": (0, 8, 8, 16, 20),
        "hidden": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "intermediate": 32,
    }
    tiny |= {"save_every": 3, "threads": 1, "corpus_documents": 300}

    class Stop(Exception):
        pass

    def stop_after_save(line: str) -> None:
        raise Stop

    shipped = tmp_path / "broken"
    shutil.copytree(nano_dir, shipped)  # a model is there already, with its card
    before = {file.name: file.read_bytes() for file in shipped.iterdir()}
    train(TrainSettings(steps=24, **tiny), PRINCIPLES, tmp_path / "whole", tmp_path / "w1", lambda line: None)
    with pytest.raises(Stop):  # the first report comes at step 20: state 18 is on disk, steps 19 and 20 are lost
        train(TrainSettings(steps=24, **tiny), PRINCIPLES, shipped, tmp_path / "w2", stop_after_save)
    assert before == {file.name: file.read_bytes() for file in shipped.iterdir()}, "published before the last step"
    assert (tmp_path / "w2/model/model.safetensors").is_file()
    said: list[str] = []
    for _ in range(2):  # the second time there is nothing to do, and nothing is moved
        train(TrainSettings(steps=24, **tiny), PRINCIPLES, shipped, tmp_path / "w2", said.append)
    whole, broken = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", shipped))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    (older,) = tmp_path.glob("broken.*")
    assert before == {file.name: file.read_bytes() for file in older.iterdir()}
    assert (shipped / "README.md").read_bytes() == before["README.md"] and str(older) in said[-2]
    assert said[-1] == f"trained: {shipped}"
    with pytest.raises(BadInputError, match=r"state\.pt is of other settings: steps was 24, now 30; use.*--fresh"):
        train(TrainSettings(steps=30, **tiny), PRINCIPLES, tmp_path / "x", tmp_path / "w2", said.append)
    (tmp_path / "w2" / "state.pt").write_bytes(b"PK, and no more")
    with pytest.raises(BadInputError, match=r"state\.pt cannot be read: .*--fresh"):
        train(TrainSettings(steps=24, **tiny), PRINCIPLES, tmp_path / "x", tmp_path / "w2", said.append)


def test_a_folder_of_something_else_is_not_trained_into(tmp_path: Path) -> None:
    from cai_experiment.nano.train import TrainSettings, train

    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInputError, match="holds no model of the written world; name a new folder"):
        train(TrainSettings(), PRINCIPLES, tmp_path, tmp_path / "work")


@pytest.mark.parametrize(("flags", "words"), [
    (("--steps", "0"), "0 is not 1 or more"),
    (("--step", "5"), "--step"),
    (("--out", str(Path(__file__).parent)), "holds no model of the written world"),
])  # fmt: skip
def test_train_nano_says_what_is_wrong_in_one_line(
    flags: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai_experiment.scripts import train_nano
    from cai_experiment.scripts._common import run_main

    try:
        code = run_main(train_nano.main, ["--work", str(tmp_path / "work"), *flags])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and words in error and "\n" not in error and "Traceback" not in error


def test_a_focal_token_counts_by_how_unlikely_it_still_is() -> None:
    from types import SimpleNamespace

    from cai_experiment.nano.train import loss_of

    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 0.0]]])  # p of token 0: 1/2, then 3/4
    model = SimpleNamespace(model=lambda **_: SimpleNamespace(last_hidden_state=logits), lm_head=lambda hidden: hidden)
    ids, weights = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0.0, 1.0, 3.0]])
    first, second = math.log(2.0), math.log(4 / 3)
    plain, mean = loss_of(model, ids, weights, torch.zeros(1, 3, dtype=torch.bool))
    assert plain.item() == pytest.approx((first + 3 * second) / 4)
    assert mean.item() == pytest.approx((first + second) / 2)
    focal, _ = loss_of(model, ids, weights, torch.tensor([[False, False, True]]))
    assert focal.item() == pytest.approx((first + 3 * second / 4) / 4)


def test_the_shipped_files_are_small_and_of_the_world(nano_dir: Path) -> None:
    weights = list(nano_dir.glob("*.safetensors"))
    assert len(weights) == 1 and weights[0].stat().st_size <= 8 * 1024 * 1024
    assert is_nano(nano_dir) and nano_dir == NANO_DIR
    assert (nano_dir / "README.md").is_file()  # the model card


def test_a_fresh_network_copies() -> None:
    """A random list, said again: the next token is found by the circuit in the initial weights, at any distance."""
    from types import SimpleNamespace

    from cai_experiment.nano.train import TrainSettings, build_model

    model = build_model(TrainSettings(), SimpleNamespace(eos_token_id=0, pad_token_id=0)).eval()
    generator = torch.Generator().manual_seed(0)
    right: list[bool] = []
    for length in (10, 40, 150):
        said = torch.randint(10, 3000, (length,), generator=generator)
        with torch.no_grad():
            logits = model(input_ids=torch.cat([said, said])[None]).logits[0, length:-1]
        logits = logits.scatter(1, said[:-1, None], float("-inf"))  # tied embeddings: itself comes first, untrained
        right += (logits.argmax(-1) == said[1:]).tolist()
    assert sum(right) / len(right) > 0.5
