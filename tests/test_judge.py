"""The judge: letters where a server gives no log-probabilities, a server's faults, fitness by known answers."""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.engines.server import ServerEngine
from cai_experiment.engines.server_client import Retry
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.judging.fitness import (
    FIT,
    Fitness,
    fitness,
    judge_fitness,
    known_answers,
    preferred_kappa,
    world_comparisons,
)
from cai_experiment.judging.judge import BY_LOG_PROBABILITY, Judge, Verdict, preferred_prompts, tally
from cai_experiment.judging.letters import LETTER_TOKENS, THOUGHT_TOKENS, read_letter
from cai_experiment.judging.outage import Watched
from cai_experiment.judging.result import Result
from cai_experiment.scripts._judge import add_judge_flags, identity, is_url, load_judge
from tests.openai_server import Answer, Body, ModelBehind, Serving, chat, models

QUICK = Retry(first_wait=0.01, longest_wait=0.05)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------- reading a letter


@pytest.mark.parametrize(
    "reply",
    [
        "A", "A.", " a ", "(a)", "**A**", "__A__", '"A"', "A)", "Answer: A", "**Answer:** A", "The answer is (A).",
        "Answer A is better.", "The better answer is **A**.", "A: Yes", "A - it is honest", "A\n\nBecause it is kind.",
        "<think>B? No, it is rude.</think>\n\nA", "so it is kind, not B.</think>A",
        "<thinking>\nB\n</thinking> Answer: A",
    ],
)  # fmt: skip
def test_a_letter_is_read_where_it_plainly_is_one(reply: str) -> None:
    assert read_letter(reply) == "A"
    other = {"A": "B", "B": "A", "a": "b"}
    assert read_letter(re.sub(r"\b_*([ABa])_*\b", lambda m: m[0].replace(m[1], other[m[1]]), reply)) == "B"


@pytest.mark.parametrize(
    "reply",
    [
        "", "A or B", "A and B", "AB", "Both", "Neither A nor B", "A, not B", "Yes", "I cannot say", "As an AI",
        "A good one",
        "a better answer", "A better answer is B", "Answer:", "Answer", "C", "1", "<think>A", "<think>A is", "\u0391",
        "Based on what I read, A", "B" * 500,
    ],
)  # fmt: skip
def test_a_letter_is_never_guessed_at(reply: str) -> None:
    assert read_letter(reply) is None


# ---------------------------------------------------------------- a judge that gives letters


def comparison(id: str, good: str = "good", bad: str = "bad") -> Any:
    return preferred_prompts(id, f"question {id}", f"{good} {id}", f"{bad} {id}")


def right_letter(text: str) -> str:
    """What a judge says who likes "good"."""
    return "A" if "Answer A: good" in text else "B"


class Letters(ScriptedEngine):
    """An engine that gives no log-probabilities."""

    can_weigh = False


def letters(speak: Callable[[Prompt], str], finish: str = "stop") -> Judge:
    return Judge(Letters(speak=lambda p: Completion(p.id, speak(p), finish)), "scripted")


def test_letters_of_both_orders_make_a_verdict() -> None:
    seen: list[Prompt] = []

    def speak(prompt: Prompt) -> str:
        seen.append(prompt)
        text = prompt.turns[-1].text
        says = {"1": right_letter(text), "2": "AB".replace(right_letter(text), ""), "3": "A", "4": "Sorry."}
        return says[prompt.id.partition("/")[0]]

    judge = letters(speak)
    verdicts = judge.verdicts([comparison(id) for id in "1234"])
    assert verdicts == [Verdict(answer, 0.0) for answer in ("yes", "no", "undecided", "unparsed")]
    assert tally(verdicts) == {"yes": 1, "no": 1, "undecided": 1, "unparsed": 1}
    assert verdicts[3].why == "no single letter in 'Sorry.'" and tally([])["undecided"] == 0
    assert judge.method == "one letter per order at temperature 0: scripted gives no log-probabilities"
    assert {(p.options, p.sampling.temperature, p.sampling.max_tokens) for p in seen} == {((), 0.0, LETTER_TOKENS)}
    assert Judge(ScriptedEngine(), "it").method == BY_LOG_PROBABILITY


def test_a_judge_that_is_cut_while_it_thinks_is_asked_again_with_room() -> None:
    asked: Counter[str] = Counter()

    def speak(prompt: Prompt) -> Completion:
        asked[prompt.id] += 1
        letter, room = right_letter(prompt.turns[-1].text), prompt.sampling.max_tokens == THOUGHT_TOKENS
        if prompt.id.startswith("open"):
            return Completion(
                prompt.id, f"<think>hm</think>{letter}" if room else "<think>hm", "stop" if room else "length"
            )
        if prompt.id.startswith("hidden"):  # a server that keeps the thought to itself
            return Completion(prompt.id, letter if room else "", "stop" if room else "length")
        return Completion(prompt.id, "A long story", "length")

    verdicts = Judge(Letters(speak=speak), "it").verdicts([comparison(id) for id in ("open", "hidden", "long")])
    assert [v.answer for v in verdicts] == ["yes", "yes", "unparsed"]
    assert {id.partition("/")[0]: count for id, count in asked.items()} == {"open": 2, "hidden": 2, "long": 1}


def test_a_model_that_thinks_first_is_asked_for_letters() -> None:
    """Its next token is a thought's beginning, so that neither letter is among the likeliest."""

    def speak(prompt: Prompt) -> Completion:
        text = "" if prompt.options else f"<think>hm</think>{right_letter(prompt.turns[-1].text)}"
        return Completion(prompt.id, text, "stop")

    judge = Judge(ScriptedEngine(speak=speak), "thinker")
    assert [v.answer for v in judge.verdicts([comparison("1"), comparison("2")])] == ["yes", "yes"]
    assert judge.method.endswith("thinker never has A or B among its likeliest next tokens")
    assert [v.answer for v in judge.verdicts([])] == []
    failing = Judge(ScriptedEngine(speak=lambda p: Completion(p.id, "", "error", error="boom")), "it")
    (verdict,) = failing.verdicts([comparison("1")])
    assert (verdict.answer, verdict.why, failing.method) == ("unparsed", "boom", BY_LOG_PROBABILITY)


# ---------------------------------------------------------------- a judge on a server


def likes_good(path: str, body: Body | None) -> Body:
    """A chat server that refuses `logprobs` and names the answer that holds "good"."""
    if body is None:
        return models("judge")
    if "logprobs" in body:
        raise Answer(400, {"error": {"message": "logprobs is not supported"}})
    return chat(right_letter(body["messages"][-1]["content"]))


def judge_over(server: Serving) -> Judge:
    return Judge(ServerEngine(server.url, None, concurrency=8, deadline=120.0, retry=QUICK), "judge")


def test_a_failing_server_is_asked_again_and_then_counts_as_failed() -> None:
    """In the second part every answer fails for ever, so that the short deadline costs no sound one."""
    silent, nonsense = Answer(fault="silent"), Answer(200, b"<html>")
    plans: dict[str, list[Any]] = {
        "429 often": [*[Answer(429)] * 5, None], "500 twice": [Answer(500), Answer(500), None],
        "nonsense once": [nonsense, None], "always 500": [Answer(500)], "always nonsense": [nonsense],
        "speaks nonsense": [Answer(200, chat("B A B A"))], "always silent": [silent], "always 429": [Answer(429)],
    }  # fmt: skip
    names = [*plans, *(f"sound {i}" for i in range(8))]
    attempts: Counter[str] = Counter()

    def answer(path: str, body: Body | None) -> Body:
        text = "" if body is None else str(body["messages"][-1]["content"])
        name = next((name for name in plans if f"question {name}\n" in text), None)
        if name is not None:
            fault = plans[name][min(attempts[text], len(plans[name]) - 1)]
            attempts[text] += 1
            if fault is not None:
                raise fault
        return likes_good(path, body)

    for_ever = ["always silent", "always 429"]
    with Serving(answer) as server:
        judge = judge_over(server)
        passing = [name for name in names if name not in for_ever]
        verdicts = dict(zip(passing, judge.verdicts([comparison(name) for name in passing]), strict=True))
        judge.engine.client.deadline = 0.4  # type: ignore[attr-defined]
        verdicts |= zip(for_ever, judge.verdicts([comparison(name) for name in for_ever]), strict=True)
        judge.engine.close()
    failed = {name for name, verdict in verdicts.items() if verdict.answer == "unparsed"}
    assert failed == {name for name in plans if name.startswith(("always", "speaks"))}
    assert tally(verdicts.values()) == {"yes": len(names) - len(failed), "no": 0, "undecided": 0, "unparsed": 5}
    assert all(verdicts[name].why for name in failed) and "500" in verdicts["always 500"].why
    tries = {re.findall(r"question (.*)\n", text)[0]: count for text, count in attempts.items()}
    assert tries["always 500"] == tries["always nonsense"] == 3 and tries["speaks nonsense"] == 1
    assert tries["always 429"] > 1
    assert judge.method == f"one letter per order at temperature 0: {server.url} gives no log-probabilities"


def test_a_refused_key_stops_the_judge() -> None:
    def answer(path: str, body: Body | None) -> Body:
        if body is not None and "question" in str(body["messages"][-1]["content"]).lower():
            raise Answer(401)
        return likes_good(path, body)

    with Serving(answer) as server:
        judge = judge_over(server)
        with pytest.raises(EngineError, match="CAI_API_KEY"):
            judge.verdicts([comparison("1")])
        judge.engine.close()


def failing(*finals: str) -> ScriptedEngine:
    """Completions in turn: "" came, "attempts" and "prompt" are errors."""
    left = iter(finals)

    def speak(prompt: Prompt) -> Completion:
        final = next(left)
        return Completion(prompt.id, "", "error" if final else "stop", error=f"no: {final}", final=final)

    return ScriptedEngine(speak=speak)


def test_a_judge_that_answers_nothing_any_more_is_not_asked_for_hours() -> None:
    """A row of failures as long as what is under way at a time ends it; a refusal shows that somebody is there."""
    prompts = [prompt for i in range(200) for prompt in comparison(str(i))]
    gone = Watched(failing(*[""] * 10, *["attempts"] * 300), "--judge http://host/v1")
    came: list[Completion] = []
    with pytest.raises(EngineError, match=r"^--judge http://host/v1 answers nothing any more \(no: attempts\); what"):
        for completion in gone.stream(prompts):
            came.append(completion)
    assert len(came) == 10 + gone.patience == 18
    patchy = Watched(failing(*(["attempts"] * 7 + ["prompt"] + ["attempts"] * 7 + [""]) * 25), "it")
    assert len(list(patchy.stream(prompts))) == 400
    refused = Watched(failing(*["prompt"] * 400), "it")
    assert len(list(refused.stream(prompts))) == 400, "each its own question's fault"


def test_a_server_that_dies_under_a_judge_ends_in_its_flags_words() -> None:
    known = [pair for pair, _ in known_answers()]
    answers = Counter[str]()

    def answer(path: str, body: Body | None) -> Body:
        if body is not None:
            answers["all"] += 1
            if answers["all"] > 20:
                raise Answer(404 if answers["gone"] else 500)
        return likes_good(path, body)

    with Serving(answer) as server:
        judge = load_judge(flags("--judge", server.url, "--judge-format", "chat", "--judge-concurrency", "4"))
        judge.engine.client.retry = QUICK  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match=rf"^--judge {server.url} answers nothing any more \(server: 500"):
            judge.verdicts(known)
        tried = answers["all"]
        answers["gone"] = 1
        with pytest.raises(EngineError, match=rf"^--judge {server.url} serves judge no longer"):
            judge.verdicts(known)
        judge.engine.close()
    assert tried < 80, "and not three attempts for each of the 84"


def test_a_judge_is_known_by_its_weights_and_its_prompts_not_by_its_slots(nano_dir: Path) -> None:
    """What is remembered of it serves the next call, whose memory leaves it other slots."""

    def who(batch: int, length: int | None = None, layout: str = "chat") -> str:
        args = flags("--judge", str(nano_dir), "--judge-format", layout, "--judge-engine", "hf")
        args.batch_size = batch
        judge = load_judge(args, length)
        slots.append(judge.engine.describe()["slots"])
        found = identity(judge.engine)
        judge.engine.close()
        return found

    slots: list[Any] = []
    usual = who(16)
    assert usual == who(32) and slots == [16, 32] and "weights_sha256" in usual
    assert len({usual, who(16, 1024), who(16, None, "base")}) == 3


@pytest.fixture(scope="module")
def nano(nano_dir: Path) -> Engine:
    from cai_experiment.engines.load import LoadSettings, load_engine

    return load_engine(LoadSettings(model="nano", device="cpu"))


def flags(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_judge_flags(parser)
    parser.set_defaults(seed=0, batch_size=None)
    return parser.parse_args(given)


@pytest.mark.parametrize("weighs", [True, False])
def test_the_shipped_model_on_a_server_gives_its_own_verdicts(
    nano: Engine, nano_dir: Path, weighs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelBehind(nano_dir, "chat")

    def answer(path: str, body: Body | None) -> Body:
        if not weighs and body is not None and "logprobs" in body:
            raise Answer(400, {"error": {"message": "unknown field logprobs"}})
        return model(path, body)

    asked = [pair for pair, _ in world_comparisons(16)]
    here = Judge(nano, "nano").verdicts(asked)
    with Serving(answer) as server:
        judge = load_judge(flags("--judge", server.url, "--judge-model", "nano"))
        there = judge.verdicts(asked)
        judge.engine.close()
    model.close()
    assert [v.answer for v in there] == [v.answer for v in here] and {"yes", "no"} <= {v.answer for v in here}
    assert judge.weighs is weighs and judge.name == "nano"
    if weighs:
        assert judge.method == BY_LOG_PROBABILITY
        assert all(v.logit * w.logit > 0 for v, w in zip(there, here, strict=True) if w.answer != "undecided")
    assert judge.method in capsys.readouterr().out


@pytest.fixture
def transformers_serve(nano_dir: Path, tmp_path: Path) -> Iterator[str]:
    """The address of `transformers serve` over the shipped model's folder."""
    for package in ("fastapi", "uvicorn") if "CI" not in os.environ else ():  # there a missing part fails
        pytest.importorskip(package, reason="transformers serve needs fastapi and uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "hub").mkdir()  # it lists what is there, and fails without the folder
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(nano_dir), "--device", "cpu",
               "--host", "127.0.0.1", "--port", port]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_the_shipped_model_behind_transformers_serve(transformers_serve: str, nano: Engine, nano_dir: Path) -> None:
    """It takes no token ids and gives no log-probabilities: messages go there, and letters come back."""
    known = world_comparisons(40)
    judge = load_judge(flags("--judge", transformers_serve, "--judge-model", str(nano_dir)))
    there = judge.verdicts([pair for pair, _ in known])
    judge.engine.close()
    assert judge.method.startswith("one letter per order") and judge.name == nano_dir.name
    assert [v.answer for v in there] == [v.answer for v in Judge(nano, "nano").verdicts([pair for pair, _ in known])]
    assert fitness(there, [right for _, right in known]).is_fit


# ---------------------------------------------------------------- fitness


def weighing(odds: Callable[[Prompt], float]) -> Judge:
    """A judge whose log-odds for the letter A come from a function."""

    def speak(prompt: Prompt) -> Completion:
        return Completion(prompt.id, "", "stop", logprobs=(odds(prompt) / 2, -odds(prompt) / 2))

    return Judge(ScriptedEngine(speak=speak), "scripted")


def answers_in(prompt: Prompt) -> tuple[str, str]:
    first, second = (
        prompt.turns[-1].text.rsplit("\n\nReply with", 1)[0].split("\n\nAnswer A: ")[1].split("\n\nAnswer B: ")
    )
    return first, second


def truthful(known: Any) -> Callable[[Prompt], float]:
    right = {p.id: (1.0 if yes == (place == 0) else -1.0) for pair, yes in known for place, p in enumerate(pair)}
    return lambda prompt: right[prompt.id]


def test_a_judge_that_is_wrong_on_purpose_is_never_fit() -> None:
    """One that guesses, errs, takes the longer answer, says one letter, or cannot be read; and one that is right."""
    for known in (known_answers(), world_comparisons(200)):
        right = truthful(known)
        perfect = judge_fitness(weighing(right), known)
        assert perfect.is_fit and perfect.kappa.value == 1.0 and perfect.undecided.value == 0.0
        assert perfect.kappa.interval is not None and 0.8 < perfect.kappa.interval[0] < 1.0, "not certain"
        assert perfect.line.startswith("fit: kappa 1.00 (0.")
        found = {
            "errs": judge_fitness(weighing(lambda p, right=right: -right(p)), known),
            "longer": judge_fitness(weighing(lambda p: len(answers_in(p)[0]) - len(answers_in(p)[1])), known),
            "shorter": judge_fitness(weighing(lambda p: len(answers_in(p)[1]) - len(answers_in(p)[0])), known),
            "first letter": judge_fitness(weighing(lambda p: 1.0), known),
            "says nothing": judge_fitness(letters(lambda p: "Well."), known),
            "first answer": judge_fitness(weighing(lambda p: 1.0 if p.id.endswith("yes_first") else -1.0), known),
        }
        assert not any(one.is_fit for one in found.values()), found
        assert found["errs"].kappa.value == -1.0 and found["first letter"].undecided.value == 1.0
        assert found["says nothing"].kappa.value is None and found["says nothing"].kappa.unparsed == len(known)
        assert all(one.line.startswith("not fit: ") for one in found.values())


def test_a_judge_that_guesses_has_a_kappa_near_0() -> None:
    known = known_answers()
    kappas = []
    for seed in range(200):
        chance = random.Random(seed)
        guess = judge_fitness(weighing(lambda p, chance=chance: chance.gauss(0.0, 1.0)), known)
        assert not guess.is_fit and guess.kappa.value is not None
        kappas.append(guess.kappa.value)
    assert abs(sum(kappas) / len(kappas)) < 0.02 and max(kappas) < FIT


def test_a_judge_that_is_mostly_unread_or_little_tried_is_not_fit() -> None:
    known = known_answers()
    yes, unread = Verdict("yes", 1.0), Verdict("unparsed", 0.0)
    said = [(yes if right else Verdict("no", -1.0)) if i < 20 else unread for i, (_, right) in enumerate(known)]
    right = [right for _, right in known]
    assert not fitness(said, right).is_fit and fitness(said, right).kappa.unparsed == 22
    assert "22 more could not be read" in fitness(said, right).line
    assert fitness(said[:20], right[:20]).is_fit and not fitness(said[:3], right[:3]).is_fit
    assert not Fitness(Result(None, 0, None), Result(None, 0, None)).is_fit


def test_known_answers_do_not_depend_on_length_or_order() -> None:
    known = known_answers()
    assert len(known) == 42 and sum(right for _, right in known) == 21
    longer = []
    for (first, second), right in known:
        better, worse = answers_in(first) if right else answers_in(first)[::-1]
        assert answers_in(second) == answers_in(first)[::-1] and better != worse
        assert 0.8 < len(better) / len(worse) < 1.25, better
        longer.append(len(better) > len(worse))
    assert 0.4 <= sum(longer) / len(longer) <= 0.6
    assert len({p.id for pair, _ in known for p in pair}) == 2 * len(known)


def test_the_shipped_model_is_fit_to_judge_its_world_and_nothing_else(nano: Engine) -> None:
    judge = Judge(nano, "nano")
    own = judge_fitness(judge, world_comparisons(60))
    assert own.is_fit and own.kappa.value is not None and own.kappa.value > 0.7, own.line
    assert not judge_fitness(judge, known_answers()).is_fit


def test_preferences_against_the_worlds_truth() -> None:
    from cai_experiment.nano import world

    chance = random.Random(0)
    texts, truths = [], []
    for _ in range(40):
        question = world.compose_question(chance)
        flawed = world.compose_answer(chance, question, flaws=1)
        mended = world.compose_revision(chance, flawed, flawed.flaws()[0].principle, question.noun)
        texts.append((mended.text, flawed.text))
        truths.append(Verdict("yes", 1.0))
    assert preferred_kappa(truths, texts).value == 1.0, "though every right answer is yes"
    assert preferred_kappa([Verdict("no", -1.0)] * 40, texts).value == -1.0
    assert preferred_kappa([Verdict("undecided", 0.0)] * 40, texts).value == 0.0
    mixed = preferred_kappa([*truths[:38], Verdict("unparsed", 0.0), truths[0]], [*texts[:39], (texts[0][0],) * 2])
    assert (mixed.value, mixed.n, mixed.unparsed) == (1.0, 38, 1), "a tie by the truth is left out"


# ---------------------------------------------------------------- the flags


def test_flags_that_name_no_judge_are_one_line_each() -> None:
    for given, said in (
        (["--judge", "nanoo"], "--judge nanoo: unknown preset; nearest: nano"),
        (["--judge", "nano", "--judge-model", "x"], "--judge-model names a model of an endpoint; give --judge http"),
        (["--judge", "http://"], "--judge http:// is not the address of an API"),
    ):
        with pytest.raises(BadInputError) as caught:
            load_judge(flags(*given))
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(EngineError, match=r"^--judge http.* cannot be reached"):
            load_judge(flags("--judge", f"http://127.0.0.1:{free.getsockname()[1]}"))
    with Serving(lambda path, body: models("a", "b")) as server, pytest.raises(BadInputError, match="--judge-model"):
        load_judge(flags("--judge", server.url))
    assert is_url("HTTPS://host/v1") and not is_url("org/name") and not is_url(None)


def test_a_verdict_says_why_it_is_unparsed_and_equals_another_all_the_same() -> None:
    assert replace(Verdict("unparsed", 0.0), why="500") == Verdict("unparsed", 0.0)
