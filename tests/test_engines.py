"""The engines on a tiny random model: texts that do not depend on the batch, kept keys, stops, errors, loading."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import math
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cai_experiment.constitution.principles import DEFAULT_CONSTITUTION, load_constitution
from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines import attention, load, loop
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.engines.cache import SlotCache, bucket, shared_prefix
from cai_experiment.engines.generate import GenerateEngine
from cai_experiment.engines.hf import HFEngine
from cai_experiment.engines.load import LoadSettings, load_engine, make_plan
from cai_experiment.engines.render import Renderer
from cai_experiment.engines.sampling import NO_TOKEN, draw, uniforms
from cai_experiment.engines.weights import loading_error
from cai_experiment.errors import BadInputError, EngineError, UserError
from cai_experiment.models.hardware import PROFILES
from cai_experiment.models.memory import Architecture
from cai_experiment.models.plan import FULL_BATCHES
from cai_experiment.models.presets import PRESETS, ModelPreset
from cai_experiment.models.workload import ANSWER_TOKENS, CRITIQUE_TOKENS
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.lanes import Lanes
from cai_experiment.pipeline.stages import ExampleStages, StageSettings, role_of

ENGINES = (HFEngine, GenerateEngine)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(model: Any, tokenizer: Any) -> HFEngine:
    return HFEngine(model, tokenizer, Renderer(tokenizer, "chat", 512), 32)


def ask(i: int, heat: float = 0.7, max_tokens: int = 12, options: tuple[str, ...] = (), words: int = 0) -> Prompt:
    turns = (Turn("instruction", f"How do I grow {'small ' * (words or i % 9)}tomatoes number {i}?"),)
    return Prompt(str(i), turns, "answer", Sampling(heat, max_tokens, 3, f"k{i}"), options)


def texts(completions: Iterator[Completion] | Sequence[Completion]) -> dict[str, tuple[Any, ...]]:
    return {c.id: (c.text, c.finish, c.completion_tokens, c.logprobs) for c in completions}


# ---------------------------------------------------------------- keyed sampling


def test_uniforms_are_keyed_by_seed_key_and_position() -> None:
    numbers = uniforms(0, "000012/answer/0", 1000)
    assert (uniforms(0, "000012/answer/0", 10) == numbers[:10]).all()
    assert not (uniforms(1, "000012/answer/0", 1000) == numbers).any()
    assert not (uniforms(0, "000012/answer/1", 1000) == numbers).any()
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.03
    # Fixed for good: other numbers would make a resumed run differ from the one it resumes.
    assert numbers[:2].tolist() == [0.08025557595884603, 0.342143136183903]


def test_draw_follows_the_softmax_and_its_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf]]).repeat(20_000, 1)
    for temperature in (0.5, 1.0):
        drawn = draw(logits, np.full(20_000, temperature, np.float32), uniforms(0, "x", 20_000))
        shares = np.bincount(drawn, minlength=4) / 20_000
        wanted = torch.softmax(logits[0] / temperature, -1).numpy()
        assert np.abs(shares - wanted).max() < 0.015 and shares[3] == 0


def test_draw_is_greedy_at_zero_and_reports_what_it_cannot_use() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [math.nan, 1.0, 2.0], [3.0, 2.0, 1.0], [0.0, -math.inf, 0.0]])
    heat = np.array([0, 0.7, 0.7, 0.7], np.float32)
    assert draw(logits, heat, np.array([0.99, 0.5, 0.0, 1 - 2**-53])).tolist() == [1, NO_TOKEN, 0, 2]


def test_draw_of_a_row_does_not_see_its_neighbours() -> None:
    logits = torch.randn(48, 601, generator=torch.Generator().manual_seed(0))
    heat, numbers = np.full(48, 0.7, np.float32), uniforms(0, "rows", 48)
    together = draw(logits, heat, numbers)
    assert together.tolist() == [draw(logits[i : i + 1], heat[:1], numbers[i : i + 1])[0] for i in range(48)]


# ---------------------------------------------------------------- the same text whatever is in the batch


def test_the_probe_finds_equal_bits(engine: HFEngine) -> None:
    assert engine.probe.bit_equal and engine.probe.shapes >= 7 and engine.probe.view_step == 64
    assert engine.describe()["probe"]["bit_equal"] and engine.describe()["engine"] == "hf"


def test_texts_do_not_depend_on_order_or_slots(model: Any, tokenizer: Any, engine: HFEngine) -> None:
    prompts = [ask(i, max_tokens=5 + i % 20) for i in range(50)]
    first = texts(engine.stream(prompts))
    assert len(first) == 50 and len({text for text, *_ in first.values()}) > 40
    assert texts(engine.stream(prompts[::-1])) == first
    assert texts(HFEngine(model, tokenizer, engine.renderer, 16).stream(prompts[7:] + prompts[:7])) == first
    assert texts(c for prompt in prompts[:6] for c in engine.stream([prompt])).items() <= first.items()


def converse(engine: HFEngine, rounds: int) -> list[tuple[float, ...]]:
    """A conversation whose every answer is read back, with a weighing between answers; gives all weights."""
    turns: tuple[Turn, ...] = (Turn("instruction", "How do I grow tomatoes on a balcony? " * 4),)
    weights: list[tuple[float, ...]] = []

    def feed() -> Iterator[Prompt | None]:
        nonlocal turns
        for i in range(rounds):
            yield Prompt(f"say {i}", turns, "answer", Sampling(0.7, 15, 0, f"say {i}"))
            while len(turns) == 1 + 2 * i:
                yield None
            yield Prompt(f"weigh {i}", turns, "verdict", options=("A", "B"))
            while len(weights) <= i:
                yield None

    for completion in engine.stream(feed()):
        if completion.logprobs:
            weights.append(completion.logprobs)
            assert completion.computed_tokens < 60 < completion.prompt_tokens
        else:
            turns += (Turn("answer", completion.text), Turn("critique_request", f"And after {completion.id}?"))
    return weights


def test_kept_keys_give_the_same_bits_as_computing_anew(engine: HFEngine) -> None:
    weights = converse(engine, 4)
    turns: tuple[Turn, ...] = (Turn("instruction", "How do I grow tomatoes on a balcony? " * 4),)
    for i in range(4):
        (said,) = engine.stream([Prompt("x", turns, "answer", Sampling(0.7, 15, 0, f"say {i}"))])
        turns += (Turn("answer", said.text), Turn("critique_request", f"And after say {i}?"))
        others = [ask(n, words=40) for n in range(9)]
        asked = Prompt("weigh", turns, "verdict", options=("A", "B"))
        (anew,) = (c for c in engine.stream([asked, *others]) if c.id == "weigh")
        assert anew.logprobs == weights[i] and anew.computed_tokens == anew.prompt_tokens
        (last,) = (c for c in engine.stream([*others, asked]) if c.id == "weigh")
        assert last.logprobs == weights[i]
        assert last.prompt_tokens - last.computed_tokens < 12  # the first words come from the others, in the same pass


def test_a_prefix_within_one_pass_is_inherited_along_a_chain_to_the_bit(engine: HFEngine) -> None:
    turns: tuple[Turn, ...] = ()
    prompts = []
    for i in range(4):  # each begins as the one before ends
        turns += (Turn("instruction", f"And how do I grow {i} figs on a balcony? " * 3), Turn("answer", f"Like {i}."))
        prompts.append(Prompt(f"weigh {i}", (*turns, Turn("instruction", "Why?")), "verdict", options=("A", "B")))
    alone = [next(iter(engine.stream([prompt]))) for prompt in prompts]
    together = {c.id: c for c in engine.stream(prompts)}
    assert [together[c.id].logprobs for c in alone] == [c.logprobs for c in alone]
    longest = max(c.prompt_tokens for c in alone)
    assert sum(c.computed_tokens for c in together.values()) < longest + 4 * 12 < sum(c.prompt_tokens for c in alone)


def test_shared_prefixes_are_computed_once(model: Any, tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, "base", 2048)  # 1,100 tokens of worked examples
    engine = HFEngine(model, tokenizer, renderer, 16)
    done = list(engine.stream([ask(i, max_tokens=3) for i in range(20)]))
    assert sum(c.computed_tokens for c in done) < 1.6 * done[0].prompt_tokens
    first = max(done, key=lambda c: c.computed_tokens)
    assert first.computed_tokens == first.prompt_tokens


@pytest.mark.parametrize("layout", ["chat", "base"])
def test_greedy_text_is_that_of_transformers(model: Any, tokenizer: Any, layout: str) -> None:
    renderer = Renderer(tokenizer, layout, 2048)
    prompts = [ask(i, 0, 20) for i in range(20)]
    found = texts(HFEngine(model, tokenizer, renderer).stream(prompts))
    for prompt in prompts[:5]:
        ids = torch.tensor([renderer.prompt_ids(prompt.turns, "answer", max_tokens=20)])
        out = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=list(renderer.stop_token_ids))
        assert found[prompt.id][0] == renderer.stops.text(out[0, ids.shape[1] :].tolist())[0]


def test_generate_engine_says_the_same(model: Any, tokenizer: Any, engine: HFEngine) -> None:
    prompts = [ask(i, 0.7 * (i % 3 > 0), 3 + i % 11, ("A", "B") if i % 5 == 0 else ()) for i in range(24)]
    ours = texts(engine.stream(prompts))
    plain = texts(GenerateEngine(model, tokenizer, engine.renderer, 7).stream(prompts))
    assert {k: v[:3] for k, v in ours.items()} == {k: v[:3] for k, v in plain.items()}
    for key in ours:
        assert ours[key][3] == pytest.approx(plain[key][3], abs=1e-4)


def test_options_are_weighed_as_by_a_forward_pass(model: Any, engine: HFEngine) -> None:
    prompts = [ask(i) for i in range(5)]
    ids = engine.renderer.option_ids(("A", "B"))
    for prompt, found in zip(prompts, engine.choose(prompts, ("A", "B")), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([engine.renderer.prompt_ids(prompt.turns, "answer")])).logits[0, -1]
        assert found == pytest.approx(torch.log_softmax(logits.double(), -1)[ids].tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Mistral", "GPT2", "Phi3", "Olmo2", "Cohere"])
def test_other_architectures_are_served_or_refused(tokenizer: Any, family: str) -> None:
    """Never silently wrong: greedy text equals `generate`'s, or the engine says what to use."""
    import transformers

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "GPT2" else {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), None) | {"pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **sizes, **ends)
    torch.manual_seed(0)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    renderer = Renderer(tokenizer, "chat", 256)
    found = texts(HFEngine(other, tokenizer, renderer).stream([ask(i, 0, 8) for i in range(5)]))
    ids = torch.tensor([renderer.prompt_ids(ask(1).turns, "answer")])
    out = other.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=list(renderer.stop_token_ids))
    assert found["1"][0] == renderer.stops.text(out[0, ids.shape[1] :].tolist())[0]


@pytest.mark.parametrize(("family", "problem"), [("Mistral", "looks back 64 tokens"), ("Mamba", ""), ("Bloom", "")])
def test_what_the_loop_cannot_serve_is_refused(tokenizer: Any, family: str, problem: str) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "n_layer": 2, "n_head": 4, "num_attention_heads": 4}
    window = {"sliding_window": 64, "intermediate_size": 64, "num_key_value_heads": 2} if family == "Mistral" else {}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **sizes, **window)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(EngineError, match=f"{problem}.*use --engine generate"):
        HFEngine(other, tokenizer, Renderer(tokenizer, "chat", 256))


# ---------------------------------------------------------------- the stream


@pytest.mark.parametrize("kind", ENGINES)
def test_a_stream_takes_lazily_and_gives_before_it_takes_more(model: Any, tokenizer: Any, kind: Any) -> None:
    events: list[str] = []

    def feed() -> Iterator[Prompt | None]:
        for i in range(20):
            events.append("take")
            yield ask(i, max_tokens=4)
        while events.count("give") < 20:
            yield None
        yield ask(99)

    engine = kind(model, tokenizer, Renderer(tokenizer, "chat", 512), 16)
    for _ in engine.stream(feed()):
        events.append("give")
    assert events.index("give") == 16 and events.count("give") == 21


class Kinds(GenerateEngine):
    """Speaks without a model, `length` tokens a prompt; notes its batches."""

    def __init__(self) -> None:
        renderer: Any = SimpleNamespace(
            prompt_ids=lambda *_, **__: [1, 2], option_ids=lambda options: [3, 4], encode=lambda *_: []
        )
        super().__init__(None, None, renderer, 16)
        self.batches: list[list[Prompt]] = []

    def length(self, prompt: Prompt) -> int:
        """Log-normal, of a mean that models.workload takes for half of what the spec allows."""
        mean = CRITIQUE_TOKENS if prompt.speak_as == "critique" else ANSWER_TOKENS
        drawn = random.Random(prompt.id).lognormvariate(math.log(mean) - 0.125, 0.5)
        return max(1, min(int(drawn), prompt.sampling.max_tokens))

    def _speak(self, batch: list[Any]) -> list[Completion]:
        self.batches.append([request.prompt for request in batch])
        return [self._said(request.prompt) for request in batch]

    def _said(self, prompt: Prompt) -> Completion:
        if not prompt.options:
            return Completion(prompt.id, f"So {prompt.id}.", "stop", completion_tokens=self.length(prompt))
        yes = random.Random(prompt.id).random()
        return Completion(prompt.id, "", "stop", logprobs=(math.log(yes), math.log(1 - yes)))


def test_a_batch_of_generate_is_of_one_kind_and_the_shortest_goes_first_when_nothing_else_comes() -> None:
    engine = Kinds()
    said = [ask(i, max_tokens=500) for i in range(20)]
    criticised = [ask(100 + i, max_tokens=300) for i in range(3)]
    weighed = [ask(200 + i, options=("A", "B")) for i in range(18)]
    mixed = [*said[:9], *weighed[:9], *criticised, *said[9:12], *weighed[9:], *said[12:]]
    assert len(list(engine.stream(mixed))) == len(mixed)
    found = [(len(batch), *{0 if p.options else p.sampling.max_tokens for p in batch}) for batch in engine.batches]
    assert found == [(16, 0), (16, 500), (2, 0), (3, 300), (4, 500)]


def test_the_batches_of_generate_are_as_full_as_a_plan_reckons() -> None:
    engine = Kinds()
    lanes = Lanes(dict.fromkeys(("generator", "critic"), engine))
    principles = load_constitution(DEFAULT_CONSTITUTION).principles
    asked: dict[str, tuple[Any, dict[str, Completion | None]]] = {}

    def put(rank: int, steps: Any, prompts: Sequence[Prompt]) -> None:
        got: dict[str, Completion | None] = dict.fromkeys(prompt.id for prompt in prompts)
        for prompt in prompts:
            asked[prompt.id] = steps, got
            lanes.put(role_of(prompt), rank, prompt)

    for i in range(64):
        steps = ExampleStages(Instruction(f"{i:06d}", f"Why {i}?", "x"), principles, StageSettings(rounds=2)).steps()
        put(i, steps, next(steps))
    while lanes.busy:
        completion = lanes.next()
        steps, got = asked.pop(completion.id)
        got[completion.id] = completion
        if None not in got.values():
            with contextlib.suppress(StopIteration):
                put(int(completion.id[:6]), steps, steps.send(got))
    spoken = [[engine.length(prompt) for prompt in batch] for batch in engine.batches if not batch[0].options]
    assert sum(map(len, spoken)) == 64 * 5
    assert sum(len(batch) == 16 for batch in spoken) >= 0.8 * len(spoken), "all but those at the end"
    share = sum(map(sum, spoken)) / sum(16 * max(batch) for batch in spoken)
    assert share == pytest.approx(FULL_BATCHES, abs=0.07)


@pytest.mark.parametrize("kind", ENGINES)
def test_waiting_for_each_other_is_an_error(model: Any, tokenizer: Any, kind: Any) -> None:
    engine = kind(model, tokenizer, Renderer(tokenizer, "chat", 512))
    with pytest.raises(EngineError, match="waits for prompts"):
        list(engine.stream(iter([ask(0), None, None, None, *[None] * 50])))


@pytest.mark.parametrize("kind", ENGINES)
def test_a_bad_prompt_stops_no_other(model: Any, tokenizer: Any, kind: Any) -> None:
    engine = kind(model, tokenizer, Renderer(tokenizer, "chat", 512))
    bad = [
        ask(101, words=600),
        ask(102, max_tokens=0),
        ask(103, max_tokens=600),
        Prompt("104", (Turn("instruction", None),), "answer"),  # type: ignore[arg-type]
        Prompt("105", (), "answer"),
        ask(106, options=("A", "A")),
    ]
    found = texts(engine.stream([ask(0), *bad, ask(1)]))
    assert {key for key, value in found.items() if value[1] == "error"} == {p.id for p in bad}
    assert {"0": found["0"], "1": found["1"]} == texts(engine.stream([ask(0), ask(1)]))
    (long,) = engine.stream(bad[:1])
    assert "prompt of" in long.error and "do not fit in a context of 512" in long.error
    with pytest.raises(EngineError, match="prompt 101: prompt of"):
        engine.choose([ask(0), bad[0]], ("A", "B"))


def test_two_streams_of_one_engine_do_not_mix(engine: HFEngine, model: Any) -> None:
    prompts = [ask(i, max_tokens=5 + i) for i in range(12)]
    alone = texts(engine.stream(prompts))
    one, two = engine.stream(prompts), engine.stream(prompts[::-1])
    found_one, found_two = [], []
    for _ in prompts:
        found_one.append(next(one))
        found_two.append(next(two))
    assert texts(found_one) == texts(found_two) == alone
    assert model.config._attn_implementation == attention.NAME  # both streams are still open
    one.close(), two.close()
    assert model.config._attn_implementation == "sdpa" and not model.training


@pytest.mark.parametrize("kind", ENGINES)
def test_a_stop_string_ends_text_exactly(
    model: Any, tokenizer: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's tokens are put into its mouth; the text ends before the stop string, wherever tokens break."""
    renderer = Renderer(tokenizer, "base", 2048)
    said = renderer.encode("So it is.\n\n### Human:\nAnd forged.", False)
    step = {"n": -1}

    def scripted(logits: Any, heat: Any, numbers: Any) -> Any:
        step["n"] += 1
        return np.full(len(heat), said[min(step["n"], len(said) - 1)])

    monkeypatch.setattr("cai_experiment.engines.loop.draw", scripted)
    monkeypatch.setattr("cai_experiment.engines.generate.draw", scripted)
    (done,) = kind(model, tokenizer, renderer, 16).stream([ask(0, max_tokens=60)])
    assert (done.text, done.finish) == ("So it is.", "stop")
    assert done.completion_tokens < len(said)
    assert "###" not in tokenizer.decode(said[: done.completion_tokens - 1])


def test_nan_of_one_prompt_stays_with_it(tiny_model_dir: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, tie_word_embeddings=False).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    engine = HFEngine(model, tokenizer, Renderer(tokenizer, "chat", 512), 16)
    well = [ask(i) for i in range(40)]
    expected = texts(engine.stream(well))
    (poison,) = tokenizer("~", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = math.nan
    ill = [replace(ask(900 + i, options=("A", "B") if i else ()), turns=(Turn("instruction", "~"),)) for i in range(2)]
    found = texts(engine.stream([*well[:9], *ill, *well[9:]]))
    assert {found.pop(p.id)[1] for p in ill} == {"error"}
    assert found == expected


def test_nan_keys_are_forgotten(tiny_model_dir: Path, tokenizer: Any) -> None:
    """A long ill prompt leaves its slot clean: for a shorter successor, and for itself when it is asked again."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, tie_word_embeddings=False).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    engine = HFEngine(model, tokenizer, Renderer(tokenizer, "chat", 512), 16)
    ill, well = ask(900, words=90), [ask(i, words=3) for i in range(16)]
    ill = replace(ill, turns=(Turn("instruction", ill.turns[0].text + " ~"),))
    expected = texts(engine.stream(well))
    (poison,) = tokenizer("~", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = math.nan

    def feed() -> Iterator[Prompt | None]:
        yield replace(ill, id="first")
        while "first" not in found:
            yield None
        yield from (*well, replace(ill, id="again"))

    found: dict[str, Any] = {}
    for completion in engine.stream(feed()):
        found |= {completion.id: completion}
    assert found["first"].finish == found["again"].finish == "error"
    assert found["again"].computed_tokens > 90  # nothing of the first was taken up
    assert texts(found[p.id] for p in well) == expected


def test_verdicts_of_a_conversation_are_read_together(engine: HFEngine) -> None:
    """Though no slot is free: what follows a branch is looked at before the next pass."""
    passes = []
    turns = (Turn("instruction", "How do I grow tomatoes on a balcony? " * 4), Turn("answer", "So."))
    asked = [
        Prompt(f"v{i}", (*turns, Turn("question", f"Is it so? {i}")), "verdict", options=("A", "B")) for i in range(15)
    ]
    talk = [ask(i, max_tokens=200) for i in range(engine.slots - 1)]
    for completion in engine.stream([*talk, *asked]):
        passes.append(completion.id)
    assert {*passes[:15]} == {p.id for p in asked}


# ---------------------------------------------------------------- memory


def test_out_of_memory_halves_the_slots_and_changes_no_text(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [ask(i, max_tokens=9, options=("A", "B") if i % 4 == 0 else ()) for i in range(80)]
    renderer = Renderer(tokenizer, "chat", 512)
    expected = texts(HFEngine(model, tokenizer, renderer, 64).stream(prompts))
    engine = HFEngine(model, tokenizer, renderer, 64)
    passes, real = {"n": 0}, loop.Forward.__call__

    def failing(self: Any, *args: Any) -> Any:
        passes["n"] += 1
        if passes["n"] in (3, 6) or passes["n"] > 999:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args)

    monkeypatch.setattr(loop.Forward, "__call__", failing)
    assert texts(engine.stream(prompts)) == expected
    assert (engine.slots, engine.halved) == (16, 2)
    passes["n"] = 999
    with pytest.raises(EngineError, match="out of memory with 16 prompts at a time"):
        list(engine.stream(prompts))


# ---------------------------------------------------------------- rows that make their pass fail


@pytest.fixture
def poison(model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """While "raises" holds an exception, every pass raises it in which the token "~" is read, or any if "all"."""
    (token,) = tokenizer("~", add_special_tokens=False).input_ids
    found: dict[str, Any] = {"raises": None, "all": False, "passes": 0}

    def before(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        found["passes"] += 1
        if found["raises"] is not None and (found["all"] or (given[0] == token).any()):
            raise found["raises"]

    hook = model.get_input_embeddings().register_forward_pre_hook(before)
    yield found
    hook.remove()


BROKEN = (
    RuntimeError("cuBLAS failed\nin a kernel"), ValueError("no shape"), torch.OutOfMemoryError("CUDA out of memory"),
)  # fmt: skip


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ENGINES)
def test_a_row_that_breaks_its_pass_is_found_and_stops_no_other(
    model: Any, tokenizer: Any, poison: dict[str, Any], kind: Any, error: Exception
) -> None:
    prompts = [ask(i, max_tokens=6, options=("A", "B") if i % 5 == 0 else ()) for i in range(40)]
    ill = [replace(ask(900 + i, options=("A", "B") if i else ()), turns=(Turn("instruction", "~"),)) for i in range(2)]
    engine = kind(model, tokenizer, Renderer(tokenizer, "chat", 512), 16)
    expected = texts(engine.stream(prompts))
    poison["raises"] = error
    given = [*prompts[:9], *ill, *prompts[9:]]
    done = list(engine.stream(given))
    found = {c.id: c for c in done}
    assert len(done) == len(given), "each row once"
    for row in ill:
        assert (found[row.id].finish, found[row.id].final) == ("error", "")
        assert found.pop(row.id).error == f"{type(error).__name__}: {' '.join(str(error).split())}"
    others = texts(list(found.values()))
    if kind is GenerateEngine:  # the last bits of its numbers depend on the batch's shape
        assert all(others[id][3] == pytest.approx(row[3], abs=1e-5) for id, row in expected.items())
        others, expected = ({id: row[:3] for id, row in rows.items()} for rows in (others, expected))
    assert others == expected
    assert getattr(engine, "slots", 16) == 16 and getattr(engine, "batch_size", 16) == 16


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_that_fails_on_every_row_says_so_once_and_at_once(
    model: Any, tokenizer: Any, poison: dict[str, Any], kind: Any
) -> None:
    engine = kind(model, tokenizer, Renderer(tokenizer, "chat", 512), 16)
    poison.update(raises=RuntimeError("CUDA error: an illegal memory access was encountered"), all=True, passes=0)
    with pytest.raises(EngineError, match=r"fails on every prompt: RuntimeError: CUDA error: .*; the same command"):
        list(engine.stream([ask(i) for i in range(40)]))
    assert poison["passes"] == 2, "the first pass, and a harmless prompt"
    poison["raises"] = None
    assert len(list(engine.stream([ask(i) for i in range(40)]))) == 40


def test_a_closed_engine_frees_a_model_that_holds_itself(tiny_model_dir: Path, tokenizer: Any) -> None:
    """Unsloth does that: `model.for_inference` is a partial of a function with the model."""
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    own.for_inference = functools.partial(print, own)
    alive = weakref.ref(own)
    engine = GenerateEngine(own, tokenizer, Renderer(tokenizer, "chat", 512), 8)
    del own
    gc.disable()
    try:
        engine.close()
    finally:
        gc.enable()
    assert alive() is None


def test_generate_engine_halves_its_batch(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GenerateEngine(model, tokenizer, Renderer(tokenizer, "chat", 512), 8)
    prompts = [ask(i, max_tokens=4) for i in range(10)]
    expected = texts(engine.stream(prompts))
    real = model.generate

    def small_only(input_ids: Any, **kwargs: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", small_only)
    assert texts(engine.stream(prompts)) == expected and engine.batch_size == 2


def test_the_slot_cache_grows_and_copies() -> None:
    assert [bucket(n, 2048) for n in (1, 256, 257, 1500)] == [256, 256, 512, 2048] and bucket(9000, 9024) == 9024
    cache = SlotCache(4, 1024)
    cache.reserve(10)
    new = torch.arange(6.0).view(1, 2, 3, 1)  # two heads, three tokens
    cache.aim(torch.tensor([1, 1, 3]), torch.tensor([4, 5, cache.dump]))
    keys, _ = cache.update(new, new, 0)
    assert keys[1, :, 4:6, 0].tolist() == [[0, 1], [3, 4]] and keys[3, :, :256].abs().sum() == 0
    cache.copy(1, 2, 5)
    cache.reserve(300)
    assert cache.layers[0].shape == (2, 4, 2, 513, 1)
    assert cache.layers[0][1, 2, :, 4:6, 0].tolist() == [[0, 0], [3, 0]] and cache.layers[0][:, 3].abs().sum() == 0
    tokens = np.array([[5, 6, 7, 8], [5, 6, 9, 8], [1, 6, 7, 8]])
    assert shared_prefix(tokens, np.array([4, 4, 4]), np.array([5, 6, 7])).tolist() == [3, 2, 0]
    assert shared_prefix(tokens, np.array([1, 4, 0]), np.array([5, 6, 9])).tolist() == [1, 3, 0]


# ---------------------------------------------------------------- one load for speaking and training


def test_adapters_act_and_training_gets_its_model_back(tiny_model_dir: Path, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    renderer = Renderer(tokenizer, "chat", 512)
    prompts = [ask(i) for i in range(8)]
    engine = HFEngine.from_model(plain, tokenizer, renderer)
    before = texts(engine.stream(prompts))
    model, same = engine.release_for_training()
    assert model is plain and same is tokenizer and model.config._attn_implementation == "sdpa"
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])).train()
    after_engine = HFEngine.from_model(tuned, tokenizer, renderer)
    after = texts(after_engine.stream(prompts))
    assert after != before and tuned.training and model.config._attn_implementation == "sdpa"
    with tuned.disable_adapter():
        assert texts(after_engine.stream(prompts)) == before
    assert texts(GenerateEngine.from_model(tuned.eval(), tokenizer, renderer).stream(prompts)) == after


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_a_model_trained_in_4_bit_is_held_against_itself_at_the_precision_it_computes_in(
    tiny_model_dir: Path, tokenizer: Any, compute: torch.dtype
) -> None:
    """After PEFT's preparation its own dtype is float32, whatever its quantised layers compute in."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from cai_experiment.engines.probe import computes_in_float32
    from cai_experiment.engines.weights import keep_trainable

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=compute, quantization_config=config, device_map="cpu"
    )
    keep_trainable(model)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).eval()
    assert prepared.dtype == torch.float32 and computes_in_float32(prepared) is (compute == torch.float32)
    engine = HFEngine.from_model(prepared, tokenizer, Renderer(tokenizer, "chat", 512))
    assert texts(engine.stream([ask(0, max_tokens=5)]))["0"][1] in ("stop", "length")
    prepared.is_loaded_in_4bit, prepared.is_loaded_in_8bit = False, True
    assert not computes_in_float32(prepared)


# ---------------------------------------------------------------- loading


def test_a_folder_becomes_an_engine(tiny_model_dir: Path) -> None:
    engine = load_engine(LoadSettings(model=str(tiny_model_dir), batch_size=20, max_length=300))
    facts = engine.describe()
    assert engine.first_line.startswith(f"model {tiny_model_dir.name} | engine hf | float32 on cpu | ")
    assert (facts["layout"], facts["max_length"], facts["slots"], facts["dtype"]) == ("chat", 300, 32, "float32")
    assert len(str(facts["weights_sha256"])) == 64 and str(tiny_model_dir) not in repr(facts)
    assert load_engine(LoadSettings(model=str(tiny_model_dir), layout="base", engine="generate")).name == "generate"
    engine.close()


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("config.json", lambda data: None, "holds no config.json"),
        ("config.json", lambda data: b"{", "is not JSON"),
        ("model.safetensors", lambda data: None, "holds no .safetensors"),
        ("model.safetensors", lambda data: data[:-10], "a download that did not finish"),
        ("model.safetensors", lambda data: data[:1000], "is cut off"),
        ("model.safetensors", lambda data: data[:8] + b"!" + data[9:], "has a damaged header"),
        ("model.safetensors.index.json", lambda data: b'{"weight_map": {"a": "x.safetensors"}}', "is missing"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(tiny_model_dir: Path, tmp_path: Path, name: str, change: Any, problem: str) -> None:
    import shutil

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    data = change((folder / name).read_bytes() if (folder / name).exists() else b"")
    (folder / name).unlink(missing_ok=True) if data is None else (folder / name).write_bytes(data)
    with pytest.raises(BadInputError, match=problem) as error:
        load_engine(LoadSettings(model=str(folder)))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_model_that_is_not_at_hand_is_one_line() -> None:
    with pytest.raises(EngineError, match="not in the download cache, and the hub cannot be reached; connect"):
        load_engine(LoadSettings(model="nobody/no-such-model"))


def test_hub_errors_become_one_line_each() -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def wrapped(kind: type[Exception]) -> Exception:
        cause = kind.__new__(kind)  # its constructor wants an HTTP response
        outer = OSError("You are trying to access a gated repo.\nMake sure ...")
        outer.__cause__ = cause
        return outer

    found: list[UserError] = [loading_error("a/b", wrapped(kind)) for kind in (GatedRepoError, RepositoryNotFoundError)]
    found.append(loading_error("a/b", ValueError("first\nsecond")))
    expected = ("gated.*HF_TOKEN", "no such model", "cannot be loaded: ValueError: first; .*doctor.py")
    for error, words in zip(found, expected, strict=True):
        assert isinstance(error, UserError) and "\n" not in str(error)
        with pytest.raises(UserError, match=words):
            raise error


def test_the_pod_gets_unsloth_in_4bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pod = PROFILES["runpod_a100_80gb"]
    installed = {"unsloth": True}
    monkeypatch.setattr(load, "find_spec", lambda name: installed[name] or None)
    plan = make_plan(LoadSettings(), pod)
    assert (plan.choice.path_or_id, plan.engine, plan.quantization) == ("Qwen/Qwen2.5-32B", "unsloth", "4bit")
    assert plan.first_line.startswith("model qwen2.5-32b (base) | engine unsloth (4-bit on CUDA) | 4-bit NF4 on cuda |")
    assert make_plan(LoadSettings(quantization="bf16"), pod).engine == "hf"
    assert make_plan(LoadSettings(engine="hf"), pod).engine == "hf"
    assert make_plan(LoadSettings(random_weights="qwen2.5-32b"), pod).engine == "hf"
    installed["unsloth"] = False
    assert "unsloth is not installed" in make_plan(LoadSettings(), pod).first_line
    with pytest.raises(EngineError, match="unsloth is not installed; bash"):
        make_plan(LoadSettings(engine="unsloth"), pod)


@pytest.mark.parametrize("settings", [
    LoadSettings(engine="vllm8"), LoadSettings(quantization="3bit"), LoadSettings(random_weights="gpt5"),
])  # fmt: skip
def test_unknown_settings_are_bad_input(settings: LoadSettings) -> None:
    with pytest.raises(BadInputError):
        make_plan(settings, PROFILES["cpu"])


@pytest.mark.parametrize("quantization", ["fp32", "4bit"])
def test_random_weights_run_a_presets_architecture(monkeypatch: pytest.MonkeyPatch, quantization: str) -> None:
    numbers = Architecture(2, 128, 4, 2, 32, 256, 700, tied=False)
    toy = ModelPreset("toy", "nobody/toy", "base", numbers, 2048, "none", "tests")
    monkeypatch.setitem(PRESETS, "toy", toy)
    engine: Any = load_engine(LoadSettings(random_weights="toy", quantization=quantization, device="cpu", seed=5))
    layer = engine.model.model.layers[0]
    assert type(layer.mlp.up_proj).__name__ == ("Linear4bit" if quantization == "4bit" else "Linear")
    assert not any(parameter.is_meta for parameter in engine.model.parameters())
    assert engine.model.model.rotary_emb.inv_freq[1] == pytest.approx(1e6 ** (-1 / 16))
    assert type(engine.model.lm_head).__name__ == "Linear"
    if quantization == "4bit":  # what Trainer, PEFT and TRL ask for
        assert engine.model.is_quantized and engine.model.is_loaded_in_4bit and engine.model.hf_quantizer.is_trainable
    if quantization == "fp32":
        assert sum(p.numel() for p in engine.model.parameters()) == numbers.parameters
    assert texts(engine.stream([ask(0, max_tokens=5)]))["0"][1] == "length"
    again: Any = load_engine(LoadSettings(random_weights="toy", quantization=quantization, device="cpu", seed=5))
    assert texts(again.stream([ask(0, max_tokens=5)])) == texts(engine.stream([ask(0, max_tokens=5)]))


# ---------------------------------------------------------------- the libraries' signatures that we lean on


def test_signatures_of_transformers() -> None:
    from transformers import AttentionInterface, BitsAndBytesConfig, Qwen2ForCausalLM
    from transformers.quantizers import AutoHfQuantizer, HfQuantizer

    forward = inspect.signature(Qwen2ForCausalLM.forward).parameters
    assert {"input_ids", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "kwargs"} <= set(forward)
    assert list(inspect.signature(AttentionInterface.register).parameters)[:2] == ["key", "value"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    assert config.quantization_method() == "nf4"
    assert "quantization_config" in inspect.signature(AutoHfQuantizer.from_config).parameters
    assert "model" in inspect.signature(HfQuantizer.preprocess_model).parameters
    assert {"device_map", "kwargs"} & set(inspect.signature(HfQuantizer.preprocess_model).parameters)
    assert list(inspect.signature(HfQuantizer.postprocess_model).parameters)[:2] == ["self", "model"]
