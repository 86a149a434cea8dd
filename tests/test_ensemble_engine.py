"""The ensemble behind the pipeline's seam, `--model ensemble:FOLDER` in the scripts, and answer_generator.py."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from rich.console import Console

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.engines.load import LoadSettings, load_engine, make_plan
from cai_experiment.engines.pair import load_pair
from cai_experiment.ensemble import engine as of_engine
from cai_experiment.ensemble.engine import EnsembleEngine
from cai_experiment.ensemble.experts import MODELS, WEIGHTS, load_experts
from cai_experiment.ensemble.files import BEST, SUFFIX, HeadsInfo, write_heads
from cai_experiment.ensemble.model import MultiModelWithScalarHeads, fresh_heads
from cai_experiment.errors import BadInputError
from cai_experiment.models import ensembles
from cai_experiment.models.choice import members_of, numbers_of, resolve_model
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.scripts import _answers, answer_generator, generate_mvp, train_dpo
from cai_experiment.scripts import test_batch as batch_script
from cai_experiment.scripts._ensemble import make_ensemble
from cai_experiment.scripts._following import trainable

CARD = Hardware("this machine", "cuda", "NVIDIA A100-SXM4-80GB", 80, "4bit", 117, 16)
QUESTIONS = ("How do I grow tomatoes?", "Why?", "Use a large pot and water it in the morning.", "Lean far over.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random chat models of one vocabulary."""
    place = tmp_path_factory.mktemp("experts")
    for number in range(3):
        build_tiny_model(place / f"expert{number}", seed=number)
    return [place / f"expert{number}" for number in range(3)]


@pytest.fixture(scope="module")
def model(folders: list[Path]) -> MultiModelWithScalarHeads:
    """Heads that choose each expert somewhere."""
    experts = load_experts([str(folder) for folder in folders], device="cpu")
    found = MultiModelWithScalarHeads(experts, fresh_heads(experts, seed=3))
    with torch.no_grad():  # fresh heads say nearly the same everywhere
        for head in found.heads:
            for parameter in head.parameters():
                parameter.mul_(2.0)
    return found


@pytest.fixture(scope="module")
def heads(model: MultiModelWithScalarHeads, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their folder."""
    folder = tmp_path_factory.mktemp("heads")
    model.save_pretrained(folder)
    return folder


def settings_of(heads: Path, **changes: Any) -> LoadSettings:
    return LoadSettings(f"ensemble:{heads}", trains_after=False, ensemble=make_ensemble, device="cpu", **changes)


@pytest.fixture(scope="module")
def engine(heads: Path) -> Iterator[EnsembleEngine]:
    found = load_engine(settings_of(heads))
    assert isinstance(found, EnsembleEngine)
    yield found
    found.close()


def ask(number: int, key: str = "", temperature: float = 0.0, tokens: int = 12, text: str = "") -> Prompt:
    turns = (Turn("instruction", text or QUESTIONS[number % len(QUESTIONS)]),)
    return Prompt(f"p{number}", turns, "answer", Sampling(temperature, tokens, seed=1, key=key))


def texts(engine: Any, *prompts: Prompt) -> dict[str, Completion]:
    return {one.id: one for one in engine.stream(prompts)}


# ---------------------------------------------------------------- speaking


def test_it_speaks_as_the_model_itself(engine: EnsembleEngine, model: MultiModelWithScalarHeads) -> None:
    from cai_experiment.ensemble.decode import DecodeSettings, decode

    found = texts(engine, *(ask(number) for number in range(4)))
    for number in range(4):
        ids = engine.renderer.prompt_ids(ask(number).turns, "answer", max_tokens=12)
        spoken, _ = decode(model, [ids], DecodeSettings(temperature=0.0, max_new_tokens=12, seed=1), [f"p{number}"])
        one = found[f"p{number}"]
        assert (one.text, one.finish, one.completion_tokens) == (spoken[0].text, spoken[0].finish, len(spoken[0].ids))
        assert one.prompt_tokens == len(ids)


def test_one_expert_speaks_as_it_does_alone(folders: list[Path], tmp_path: Path) -> None:
    experts = load_experts([str(folders[0])], device="cpu")
    MultiModelWithScalarHeads(experts, fresh_heads(experts)).save_pretrained(tmp_path)
    ours = load_engine(settings_of(tmp_path))
    alone = load_engine(LoadSettings(str(folders[0]), engine="generate", device="cpu", trains_after=False))
    prompts = [ask(number, temperature=0.7 * (number % 2)) for number in range(4)]
    assert {key: one.text for key, one in texts(ours, *prompts).items()} == {
        key: one.text for key, one in texts(alone, *prompts).items()
    }
    theirs = alone.choose(prompts, ("A", "B"))
    for mine, other in zip(ours.choose(prompts, ("A", "B")), theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)


def test_a_text_depends_on_its_own_key_alone(engine: EnsembleEngine) -> None:
    first, others = ask(0, "k", 1.0), [ask(number, f"other{number}", 1.0, 5 + number) for number in range(1, 6)]
    alone = texts(engine, first)["p0"].text
    assert texts(engine, *others, first)["p0"].text == alone
    assert texts(engine, ask(0, "another", 1.0))["p0"].text != alone


def test_a_stream_takes_what_follows_on_its_own_completions(engine: EnsembleEngine) -> None:
    seen: list[Completion] = []

    def prompts() -> Iterator[Prompt | None]:
        yield ask(0)
        while not seen:
            yield None
        yield ask(1, tokens=6)

    for completion in engine.stream(prompts()):
        seen.append(completion)
    assert [one.id for one in seen] == ["p0", "p1"]


def test_a_prompt_at_fault_is_its_own_error(engine: EnsembleEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = of_engine.decode

    def decode(model: Any, prompts: Any, settings: Any, keys: Any, *more: Any) -> Any:
        if "bad" in keys:
            raise RuntimeError("this row\nbreaks the pass")
        return real(model, prompts, settings, keys, *more)

    monkeypatch.setattr(of_engine, "decode", decode)
    long = ask(3, text="tomatoes " * 3000)
    found = texts(engine, ask(0), ask(1, "bad"), long, ask(2, tokens=0), Prompt("p5", (), "nonsense"))
    assert found["p0"].finish in ("stop", "length") and found["p0"].text
    assert {key for key, one in found.items() if one.finish == "error"} == {"p1", "p2", "p3", "p5"}
    assert "breaks the pass" in found["p1"].error and "do not fit" in found["p3"].error
    assert all("\n" not in one.error for one in found.values())


def test_without_memory_fewer_are_asked_at_a_time(engine: EnsembleEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = of_engine.decode, list[int]()

    def decode(model: Any, prompts: Any, *more: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return real(model, prompts, *more)

    monkeypatch.setattr(of_engine, "decode", decode)
    monkeypatch.setattr(engine, "batch_size", 8)
    assert len(texts(engine, *(ask(number) for number in range(8)))) == 8
    assert sizes[:3] == [8, 4, 2]


def test_verdicts_are_weighed_by_the_same_rule(engine: EnsembleEngine, model: MultiModelWithScalarHeads) -> None:
    said = (Turn("instruction", "Why?"), Turn("answer", "Use a large pot. " * 12))
    prompts = [Prompt(f"v{n}", (*said, Turn("verdict_request", QUESTIONS[n])), "verdict") for n in range(4)]
    both = list(engine.choose(prompts, ("A", "B")))
    engine.mode = "mixture"
    mixed = engine.choose(prompts, ("A", "B"))
    engine.mode = "select"
    for prompt, selected, mixture in zip(prompts, both, mixed, strict=True):
        ids = torch.tensor([engine.renderer.prompt_ids(prompt.turns, "verdict", max_tokens=1)])
        out = model(ids)
        pi = out.scalars[0, -1].softmax(-1)
        each = torch.stack([logits[0, -1].softmax(-1) for logits in out.logits])[
            :, engine.renderer.option_ids(("A", "B"))
        ]
        assert selected == pytest.approx(each[pi.argmax()].log().tolist(), abs=1e-4)
        assert mixture == pytest.approx((pi @ each).log().tolist(), abs=1e-4)
    done = {
        one.id: one for one in engine.stream([Prompt(p.id, p.turns, p.speak_as, options=("A", "B")) for p in prompts])
    }
    assert done["v3"].computed_tokens < done["v3"].prompt_tokens  # what all have in common is read once


# ---------------------------------------------------------------- as a model


def test_what_the_manifest_records(engine: EnsembleEngine, heads: Path, folders: list[Path]) -> None:
    facts = engine.describe()
    assert facts["model"] == f"ensemble:{heads.name}" == resolve_model(f"ensemble:{heads}", detect(), "", True).name
    assert facts["experts"] == [str(folder) for folder in folders] and facts["engine"] == "ensemble"
    assert len(str(facts["weights_sha256"])) == 64 and json.dumps(facts)
    assert facts["accelerate"] is True and facts["device"] == "cpu"
    assert engine.ends == set(engine.renderer.stop_token_ids)
    assert engine.model.eos_ids == {i for expert in engine.model.experts for i in expert.eos_ids}, "as it was given"
    assert engine.first_line.startswith(f"model ensemble:{heads.name} | engine ensemble (experts expert0, ")
    with pytest.raises(BadInputError, match="frozen"):
        engine.release_for_training()


def test_generator_and_critic_may_be_an_ensemble_and_a_model(heads: Path, tiny_model_dir: Path) -> None:
    said: list[str] = []
    other = LoadSettings(str(tiny_model_dir), trains_after=False, ensemble=make_ensemble, device="cpu", said="--critic")
    generator, critic = load_pair(settings_of(heads), other, said.append)
    assert (generator.name, critic.name) == ("ensemble", "hf") and "critic: " in said[1]
    swapped = load_pair(other, settings_of(heads), said.append)
    assert [one.name for one in swapped] == ["hf", "ensemble"]
    for one in (generator, critic, *swapped):
        one.close()


@pytest.mark.parametrize(
    ("main", "flags", "said"),
    [
        (train_dpo.main, ["--milestone", "mvp"], "takes one; name one, e.g. its first expert: "),
        (batch_script.main, [], "takes one; name one"),
        (generate_mvp.main, ["--engine", "hf"], "--engine hf serves no ensemble"),
        (generate_mvp.main, ["--ray", "local", "--plan"], "--ray serves no ensemble"),
    ],
)
def test_who_serves_none_says_so_in_a_line(main: Any, flags: list[str], said: str, heads: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError) as error:
        main(["--model", f"ensemble:{heads}", "--data-dir", str(tmp_path), *flags])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_no_heads_there_is_one_line(tmp_path: Path, heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / ensembles.HEADS).write_bytes((heads / ensembles.HEADS).read_bytes()[:40])
    for place, said in (("nowhere", "no such folder"), ("", "no trained heads"), ("torn", "holds no heads")):
        with pytest.raises(BadInputError) as error:
            resolve_model(f"ensemble:{tmp_path / place}", detect(), ensembles=True)
        assert said in str(error.value) and "train_ensemble.py" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BadInputError, match="names no folder"):
        resolve_model("ensemble:", detect(), ensembles=True)
    monkeypatch.setenv("CAI_MODEL", f"ensemble:{heads}")
    with pytest.raises(BadInputError, match=r"CAI_MODEL=ensemble:.* takes one"):
        resolve_model(None, detect())
    assert make_plan(LoadSettings(trains_after=False, ensemble=make_ensemble), detect()).engine == "ensemble"


def test_the_plan_counts_all_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the pod: three of 1.5B parameters, one of them known by nothing but its size."""
    info = HeadsInfo(MODELS, (1536,) * 3, 256, 0.1, ("a", "b", "c"), MODELS, "bf16")
    write_heads(tmp_path, BEST, info, {"x": torch.zeros(1)})
    choice = resolve_model(f"ensemble:{tmp_path}", CARD, ensembles=True)
    assert numbers_of(choice).parameters == pytest.approx(3 * 1_543_714_304, rel=1e-4)
    assert [member.path_or_id for member in members_of(choice)] == list(MODELS)
    flags = ["--plan", "--hardware", "a100-80gb", "--data-dir", str(tmp_path / "data")]
    assert generate_mvp.main(["--model", f"ensemble:{tmp_path}", *flags]) == 0
    said = capsys.readouterr().out
    assert "ensemble, bf16: 9.3 GB of weights" in said and "9.3 generator" in said
    assert "about" in said.split("total")[1] and "or vllm" not in said
    assert generate_mvp.main(["--generator", f"ensemble:{tmp_path}", "--critic", "nano", *flags]) == 0
    assert "generator ensemble:" in capsys.readouterr().out
    assert trainable(f"ensemble:{tmp_path}") == "qwen2.5-1.5b-base"
    plan = make_plan(LoadSettings(f"ensemble:{tmp_path}", trains_after=False, ensemble=make_ensemble), CARD)
    assert (plan.quantization, plan.device) == ("bf16", "cuda")
    assert resolve_model("nano", CARD, ensembles=True).name == "nano"


def test_names_are_those_of_the_ensemble_itself() -> None:
    assert ensembles.HEADS == BEST + SUFFIX and ensembles.SHIPPED_DIR == WEIGHTS


@pytest.mark.slow
def test_a_milestone_by_an_ensemble(nano_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real pairs of the shipped model as its own ensemble; what follows trains an expert; again is the report."""
    experts = load_experts(["nano"], device="cpu")
    MultiModelWithScalarHeads(experts, fresh_heads(experts)).save_pretrained(tmp_path / "heads")
    (tmp_path / "ask.txt").write_text("How do I fix a wobbly chair?\nHow do I clean a tent?\n", encoding="utf-8")
    flags = ["--model", f"ensemble:{tmp_path / 'heads'}", "--instructions", str(tmp_path / "ask.txt"), "--rounds", "1",
             "--principles", "random", "--data-dir", str(tmp_path / "data"), "--quantization", "fp32"]  # fmt: skip
    assert generate_mvp.main(flags) in (0, 3)
    first = capsys.readouterr().out
    manifest = json.loads((tmp_path / "data" / "mvp" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["models"]["generator"]["experts"] == ["nano"] and "--model nano" in first
    journal = (tmp_path / "data" / "mvp" / "journal.jsonl").read_text(encoding="utf-8")
    assert journal.count('"finish": "error"') == 0 and generate_mvp.main(flags) in (0, 3)
    assert (tmp_path / "data" / "mvp" / "journal.jsonl").read_text(encoding="utf-8") == journal


# ---------------------------------------------------------------- answer_generator.py


def flags_of(heads: Path, *more: str) -> list[str]:
    return ["--model_weights", str(heads), "--max_new_tokens", "16", "--device", "cpu", *more]


@pytest.fixture
def loaded(model: MultiModelWithScalarHeads, monkeypatch: pytest.MonkeyPatch) -> MultiModelWithScalarHeads:
    """The script finds the experts loaded already."""
    monkeypatch.setattr(MultiModelWithScalarHeads, "from_pretrained", lambda *args, **named: model)
    return model


def test_a_question_is_answered(heads: Path, capsys: pytest.CaptureFixture[str], loaded: Any) -> None:
    assert answer_generator.main(["Why?", *flags_of(heads)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("experts ")
    wanted = loaded.generate("Question: Why?\nAnswer:", 16, 0.3, stop=("\nQuestion:",))
    assert "\x1b" not in said and _answers.escaped(wanted.strip()) in said


def test_json_says_who_spoke(heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loaded: Any) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"question": "Why?", "options": {"B": "No", "A": "Yes"}}\n\n{"prompt": "Question: How?\\nAnswer:"}\n'
    )
    assert answer_generator.main(["--questions", str(tmp_path / "q.jsonl"), "--json", *flags_of(heads)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in lines] == ["Why?\nA) Yes\nB) No", "Question: How?\nAnswer:"]
    for line in lines:
        assert "".join(piece["text"] for piece in line["pieces"]).strip() == line["answer"]
        assert math.isclose(sum(line["share"].values()), 1) and line["tokens"] <= 16
        assert list(line["share"]) == list(loaded.names) and line["finish"] in ("stop", "length")


def test_experts_have_letters_and_on_a_terminal_colours(heads: Path, loaded: Any) -> None:
    plain, bright = io.StringIO(), io.StringIO()
    args = answer_generator.parser().parse_args(["Why?", *flags_of(heads, "--show-experts")])
    for file, terminal in ((plain, False), (bright, True)):
        colours: Any = "standard" if terminal else None
        console = Console(file=file, force_terminal=terminal, width=200, highlight=False, color_system=colours)
        speaker = _answers.Speaker(args, console)
        for question in ("Why?", "How do I grow tomatoes?"):
            speaker.answer(question)
    assert "[A] expert0   [B] expert1   [C] expert2" in plain.getvalue() and "switch" in plain.getvalue()
    assert "\x1b[" not in plain.getvalue() and "\x1b[" in bright.getvalue()
    assert "".join(re.sub(r"\x1b\[[0-9;]*m", "", bright.getvalue()).split()) == "".join(plain.getvalue().split())


def test_a_prompt_loop_ends_with_its_input(
    heads: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loaded: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n\n" + "tomatoes " * 3000 + "\nHow?\n"))
    assert answer_generator.main(["--json", *flags_of(heads)]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["question"] for line in said.out.splitlines()] == ["Why?", "How?"]
    assert "the question has" in said.err and "shorten it" in said.err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", b" \n\n", "holds no question"),
        ("broken.txt", b"Why?\n\xff\n", ":2: byte 0xff is not UTF-8"),
        ("lacks.jsonl", b'{"question": "Why?"}\n{"answer": "So."}\n', ":2 has no question or prompt"),
        ("torn.jsonl", b'{"question": "Why?"}\n{"question"\n', ":2 "),
        ("other.pdf", b"x", "unknown kind of file"),
        ("gone.txt", None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_bad_file_of_questions_is_named_before_models_are_loaded(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError) as error:
        answer_generator.main(["--questions", str(tmp_path / name), "--model_weights", str(tmp_path)])
    assert said in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_what_to_ask_and_the_heads_are_checked(tmp_path: Path) -> None:
    for flags in (["Why?", "--questions", "x.txt"], ["  "]):
        with pytest.raises(BadInputError, match="question"):
            answer_generator.main(flags)
    with pytest.raises(BadInputError, match=r"train_ensemble\.py"):
        answer_generator.main(["Why?", "--model_weights", str(tmp_path / "none.safetensors")])


def test_what_may_still_be_cut_off_is_not_shown() -> None:
    assert _answers.settled("It is 4.\nQuestion: next") == "It is 4."
    assert _answers.settled("It is 4.\nQues") == "It is 4." and _answers.settled("It is 4\ufffd") == "It is 4"
    assert _answers.settled("It is 4.\nSo") == "It is 4.\nSo"
