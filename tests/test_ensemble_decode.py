"""Decoding: the plain loop against transformers, the accelerated one against the plain one, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cai_experiment.engines.sampling import uniforms
from cai_experiment.ensemble import arms, blocks
from cai_experiment.ensemble import decode as decoding
from cai_experiment.ensemble.arms import Asking
from cai_experiment.ensemble.blocks import Pace, _some, fixed_costs
from cai_experiment.ensemble.decode import MODES, DecodeSettings, Spoken, decode, prompt_log_probs
from cai_experiment.ensemble.experts import Expert, load_experts
from cai_experiment.ensemble.heads import ScalarHead
from cai_experiment.ensemble.lean import LeanPasses, weights_of
from cai_experiment.ensemble.linear import MANY, Fused
from cai_experiment.ensemble.model import MultiModelWithScalarHeads
from cai_experiment.ensemble.passes import HfPasses, open_passes
from cai_experiment.errors import BadInputError, EngineError

TEXTS = ("How do I grow tomatoes", "Principle: Give no advice", "x", "Reply with A or B. Does the last answer break")
NEW = 24


def related(folder: Path, count: int, scale: float) -> list[Expert]:
    """Experts made from one model by noise of `scale` standard deviations: mostly of one mind."""
    experts = load_experts([str(folder)] * count, precision="fp32", device="cpu")
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for expert in experts[1:]:
            for parameter in expert.model.parameters():
                if parameter.dim() == 2:
                    parameter.add_(torch.randn(parameter.shape, generator=chance) * parameter.std() * scale)
    return experts


def with_heads(experts: Sequence[Expert]) -> MultiModelWithScalarHeads:
    """Random heads, far enough from zero to have an opinion."""
    torch.manual_seed(5)
    heads = [ScalarHead(expert.hidden_size) for expert in experts]
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return MultiModelWithScalarHeads(experts, heads)


@pytest.fixture(scope="module")
def ensemble(tiny_model_dir: Path) -> MultiModelWithScalarHeads:
    """Three tiny experts that disagree now and then."""
    return with_heads(related(tiny_model_dir, 3, 0.15))


@pytest.fixture(scope="module")
def prompts(ensemble: MultiModelWithScalarHeads) -> list[list[int]]:
    """Of several lengths, one of a single token."""
    return [ensemble.encode(text) for text in TEXTS]


def said(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Spoken]:
    """What `decode` gives with NEW tokens."""
    keys = [f"key {index}" for index in range(len(prompts))]
    return decode(model, prompts, DecodeSettings(max_new_tokens=NEW, **settings), keys)[0]


# ---------------------------------------------------------------- the lean pass


def test_the_lean_pass_gives_a_token_the_same_bits_alone_in_blocks_and_in_batches(
    ensemble: MultiModelWithScalarHeads,
) -> None:
    weights = weights_of(ensemble.experts[0].model)
    assert weights is not None
    ids = np.random.default_rng(0).integers(0, ensemble.vocabulary, (5, 90))
    whole = LeanPasses(weights, ensemble.vocabulary, 5, 96)(range(5), ids, np.zeros(5, dtype=np.int64))
    for steps, rows in ((1, [0]), (1, [0, 2, 3]), (3, [1]), (7, [1, 2, 4]), (16, [0, 1, 2, 3, 4])):
        passes = LeanPasses(weights, ensemble.vocabulary, 5, 96)
        for start in range(0, 90, steps):
            part = ids[rows, start : start + steps]
            out = passes(rows, part, np.full(len(rows), start))
            assert torch.equal(out, whole[rows, start : start + steps]), (steps, rows, start)
            assert torch.equal(passes.logits(out[:, 0]), passes.logits(whole[:, start])[rows])


def test_rejected_tokens_are_forgotten(ensemble: MultiModelWithScalarHeads) -> None:
    expert, size = ensemble.experts[1], ensemble.vocabulary
    for passes in (open_passes(expert, size, 1, 64), HfPasses(expert, size, 1)):
        zero, four = np.array([0]), np.array([4])
        passes([0], np.array([[1, 2, 3, 4]]), zero)
        first = passes([0], np.array([[5, 6]]), four)
        passes([0], np.array([[7, 8, 9, 10, 11]]), four)
        assert torch.allclose(passes([0], np.array([[5, 6]]), four), first, atol=1e-5)
        assert torch.allclose(passes.quick(0, 5, 4), first[:, 0], atol=1e-4)


def test_other_architectures_go_through_their_own_pass(tmp_path: Path, tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    ).eval()
    assert weights_of(model) is None
    eos = frozenset({tokenizer.eos_token_id})
    other = Expert("gpt2", model.requires_grad_(False), tokenizer, 32, "fp32", "seed:0", "random", eos, 64)
    mixed = with_heads([other, *related(tiny_model_dir, 1, 0)])
    prompts = [mixed.encode(text) for text in TEXTS]
    plain = said(mixed, prompts, temperature=0.0, accelerate=False)
    fast = said(mixed, prompts, temperature=0.0, batch_size=2)
    assert [one.ids for one in fast] == [one.ids for one in plain]


def test_linear_layers_become_one_without_a_second_copy() -> None:
    layers = [torch.nn.Linear(32, size) for size in (16, 48)]
    x = torch.randn(3, 32)
    apart = torch.cat([layer(x) for layer in layers], dim=-1)
    fused = Fused(layers)
    assert torch.allclose(fused(x), apart, atol=1e-6)
    assert all(
        layer.weight.untyped_storage().data_ptr() == fused.weight.untyped_storage().data_ptr() for layer in layers
    )


@pytest.mark.parametrize("inputs", [64, 1536])
def test_packed_layers_give_a_row_the_same_bits_among_thousands(inputs: int) -> None:
    layer = Fused([torch.nn.Linear(inputs, 96)])
    if layer.pack():  # with 1,536 inputs oneDNN may add in another order for many rows: then it is not used
        rows = torch.randn(MANY, inputs)
        whole = layer(rows)
        assert all(torch.equal(layer(rows[at : at + 3]), whole[at : at + 3]) for at in (0, 5, 2000, MANY - 3))


# ---------------------------------------------------------------- the rule


def test_a_single_expert_speaks_as_transformers_does(
    ensemble: MultiModelWithScalarHeads, prompts: list[list[int]]
) -> None:
    for expert in (0, 2):
        model = ensemble.experts[expert].model
        ours = said(ensemble, prompts, mode="single", expert=expert, temperature=0.0)
        alone = said(with_heads([ensemble.experts[expert]]), prompts, temperature=0.0)
        assert [one.ids for one in ours] == [one.ids for one in alone]
        for prompt, spoken in zip(prompts, ours, strict=True):
            theirs = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :]
            assert list(spoken.ids) == theirs.tolist()
            assert set(spoken.experts) == {expert}


def by_hand(model: MultiModelWithScalarHeads, text: list[int], mode: str, temperature: float, number: float) -> int:
    """The next token from whole forward passes, by the definition."""
    out = model(torch.tensor([text]))
    pi = torch.softmax(out.scalars[0, -1].double(), dim=-1)
    log_p = torch.stack([logits[0, -1].double().log_softmax(-1) for logits in out.logits])
    if mode == "uniform":
        pi = torch.full_like(pi, 1 / len(pi))
    log_q = log_p[int(pi.argmax())] if mode == "select" else (pi @ log_p.exp()).log()
    if temperature == 0:
        return int(log_q.argmax())
    return int((torch.softmax(log_q / temperature, dim=-1).cumsum(0) <= number).sum())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("mode", ["select", "mixture", "uniform"])
def test_tokens_are_those_of_the_definition(
    ensemble: MultiModelWithScalarHeads, prompts: list[list[int]], mode: str, temperature: float
) -> None:
    spoken = said(ensemble, prompts[:1], mode=mode, temperature=temperature, accelerate=False)[0]
    numbers, text = uniforms(0, "key 0", NEW), list(prompts[0])
    with torch.no_grad():
        for token, number in zip(spoken.ids, numbers, strict=False):
            assert token == by_hand(ensemble, text, mode, temperature, number)
            text.append(token)
    assert np.allclose(np.sum(spoken.pi, axis=1), 1, atol=1e-6)
    assert len(spoken.ids) == len(spoken.experts) == len(spoken.pi)


def test_prompts_are_weighed_by_every_expert(
    ensemble: MultiModelWithScalarHeads, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "LOGITS", 5)  # a prompt's logits come in parts
    found = prompt_log_probs(ensemble, prompts, batch_size=3)
    assert found.shape == (4, 3)
    with torch.no_grad():
        for prompt, row in zip(prompts, found, strict=True):
            for expert, value in enumerate(row):
                logits = ensemble(torch.tensor([prompt])).logits[expert][0, :-1].double().log_softmax(-1)
                each = logits[range(len(prompt) - 1), prompt[1:]]
                assert value == pytest.approx(each.mean().item() if len(prompt) > 1 else 0.0, abs=1e-4)


# ---------------------------------------------------------------- accelerated: the same tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("mode", MODES)
def test_blocks_change_no_bit(
    ensemble: MultiModelWithScalarHeads, prompts: list[list[int]], mode: str, temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(blocks, "FULL", 99)  # a CPU's batches too, as on a GPU
    monkeypatch.setattr(Pace, "best", lambda pace, trusts: (pace.longest, float("inf")))  # whatever the clock says
    plain = said(ensemble, prompts, mode=mode, temperature=temperature, accelerate=False, batch_size=1)
    for batch, longest in ((1, 16), (3, 5)):
        fast = said(ensemble, prompts, mode=mode, temperature=temperature, batch_size=batch, max_block=longest)
        assert fast == plain, (batch, longest)  # tokens, experts and all weights


@pytest.fixture(scope="module")
def adapted(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tiny model, and two adapters for it over all projections of its attention."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    names = [str(tiny_model_dir)]
    for seed in (1, 2):
        torch.manual_seed(seed)
        where = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=4, target_modules=where, init_lora_weights=False, task_type="CAUSAL_LM")
        names.append(str(tmp_path_factory.mktemp("adapter")))
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).save_pretrained(names[-1])
    return names


@pytest.mark.parametrize("mode", ["select", "mixture"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "4bit", "8bit"])
def test_adapters_go_by_blocks_in_every_precision(
    adapted: list[str], precision: str, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Pace, "best", lambda pace, trusts: (pace.longest, float("inf")))
    model = with_heads(load_experts(adapted, precision=precision, device="cpu"))
    ids = np.random.default_rng(0).integers(0, model.vocabulary, (1, 12))
    for expert in model.experts:
        passes = open_passes(expert, model.vocabulary, 1, 64)
        assert isinstance(passes, LeanPasses) and passes.exact is (precision == "fp32")
        whole = passes([0], ids, np.zeros(1, dtype=np.int64))
        each = torch.cat([passes([0], ids[:, at : at + 1], np.array([at])) for at in range(12)], dim=1)
        tolerance = 0.0 if precision == "fp32" else 0.02 * float(whole.abs().max())
        assert torch.allclose(each, whole, rtol=0, atol=tolerance)
    prompts = [model.encode(text) for text in TEXTS[:2]]
    given = {"mode": mode, "temperature": 0.7, "batch_size": 1}
    plain, fast = said(model, prompts, accelerate=False, **given), said(model, prompts, max_block=6, **given)
    assert said(model, prompts, max_block=6, **given) == fast
    if precision == "fp32":
        assert fast == plain
    else:  # the same draws from the same distribution up to rounding: they may part where two tokens are nearly tied
        assert [one.ids[:2] for one in fast] == [one.ids[:2] for one in plain]
    assert "inputs will be cast" not in caplog.text


@pytest.mark.parametrize("batch", [1, 4])
def test_without_exactness_no_clock_decides(
    tiny_model_dir: Path, prompts: list[list[int]], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "FULL", 99)
    model = with_heads(load_experts([str(tiny_model_dir)] * 3, precision="bf16", device="cpu"))
    settings, found = DecodeSettings(max_new_tokens=NEW, batch_size=batch), []
    for seed in (0, 1):
        ticks = np.random.default_rng(seed).random(100_000).cumsum() * 1e-3  # another clock each time
        monkeypatch.setattr(blocks, "time", SimpleNamespace(perf_counter=iter(ticks).__next__))
        spoken, counts = decode(model, prompts, settings, list("abcd"))
        assert counts.block_passes > 0
        found.append((spoken, [(kind, number) for kind, (number, _) in counts.rounds.items()]))
    assert found[0] == found[1]


def test_counts_say_what_was_saved(ensemble: MultiModelWithScalarHeads, prompts: list[list[int]]) -> None:
    settings = DecodeSettings(temperature=0.0, max_new_tokens=NEW, batch_size=1, accelerate=False)
    plain = decode(ensemble, prompts, settings, ["k"] * 4)[1]
    assert plain.passes_per_token == 3.0 and plain.acceptance is None and plain.block_passes == 0
    fast = decode(ensemble, prompts, replace(settings, accelerate=True), ["k"] * 4)[1]
    assert fast.tokens == plain.tokens and fast.prompts == 4
    assert fast.acceptance is not None and 0 < fast.acceptance <= 1 and fast.drafted >= fast.accepted
    assert sum(fast.passes) == fast.row_passes  # one row at a time
    assert sum(number for number, _ in fast.rounds.values()) > 0


def test_a_text_does_not_depend_on_its_neighbours(
    ensemble: MultiModelWithScalarHeads, prompts: list[list[int]]
) -> None:
    keys = ["a", "b", "c", "d"]
    settings = DecodeSettings(mode="mixture", temperature=0.7, max_new_tokens=NEW)
    together = decode(ensemble, prompts, settings, keys)[0]
    alone = [decode(ensemble, [p], settings, [key])[0][0] for p, key in zip(prompts, keys, strict=True)]
    assert together == alone
    limited, _ = decode(ensemble, prompts, settings, keys, max_new=[1, 2, 3, 4])
    assert [one.ids for one in limited] == [one.ids[:n] for n, one in enumerate(together, start=1)]
    assert {one.finish for one in limited} == {"length"}


def test_tokens_are_told_as_they_are_fixed(ensemble: MultiModelWithScalarHeads, prompts: list[list[int]]) -> None:
    told: dict[int, list[tuple[int, int]]] = {}
    settings = DecodeSettings(temperature=0.7, max_new_tokens=NEW)
    spoken, _ = decode(
        ensemble, prompts, settings, list("abcd"),
        on_token=lambda index, token, expert: told.setdefault(index, []).append((token, expert)),
    )  # fmt: skip
    assert [told[i] for i in range(4)] == [list(zip(one.ids, one.experts, strict=True)) for one in spoken]


@pytest.mark.parametrize("accelerate", [False, True])
def test_end_tokens_and_stop_strings_end_a_text(
    ensemble: MultiModelWithScalarHeads, prompts: list[list[int]], accelerate: bool
) -> None:
    settings = DecodeSettings(temperature=0.9, max_new_tokens=NEW, accelerate=accelerate, seed=1)
    free, _ = decode(ensemble, prompts, settings, list("abcd"))
    stop = free[0].text[3:5]
    cut, _ = decode(ensemble, prompts, settings, list("abcd"), stop=[stop])
    assert cut[0].text == free[0].text[: free[0].text.find(stop)] and cut[0].finish == "stop"
    assert cut[0].ids == free[0].ids[: len(cut[0].ids)]
    ending = free[1].ids[5]
    ended, _ = decode(ensemble, prompts, replace(settings, ends=frozenset({ending})), list("abcd"))
    assert ended[1].ids == free[1].ids[: free[1].ids.index(ending) + 1] and ended[1].finish == "stop"


def test_heads_that_were_trained_on_are_read_anew(
    ensemble: MultiModelWithScalarHeads, prompts: list[list[int]]
) -> None:
    model = with_heads(ensemble.experts)
    before = said(model, prompts[:1], temperature=0.0)[0]
    with torch.no_grad():
        for head in model.heads:
            head.layers[-1].weight.neg_()  # type: ignore[union-attr, index, operator]
            head.layers[-1].bias.neg_()  # type: ignore[union-attr, index, operator]
    after = said(model, prompts[:1], temperature=0.0)[0]
    assert int(np.argmax(before.pi[0])) == int(np.argmin(after.pi[0]))


# ---------------------------------------------------------------- refusals, and the pace


def test_refusals(ensemble: MultiModelWithScalarHeads, prompts: list[list[int]]) -> None:
    for wrong, words in (({"mode": "vote"}, "use one of"), ({"mode": "single", "expert": 3}, "expert 3 of 3")):
        with pytest.raises(BadInputError, match=words):
            said(ensemble, prompts, **wrong)
    with pytest.raises(BadInputError, match="prompt 1 has no tokens"):
        said(ensemble, [prompts[0], []])
    with pytest.raises(BadInputError, match="prompt 0 has 2048 tokens"):
        said(ensemble, [[1] * 2048])
    assert len(said(ensemble, [[1] * 2040])[0].ids) <= 8  # what the context leaves


def test_numbers_that_are_none_are_an_error(tiny_model_dir: Path) -> None:
    broken = with_heads(related(tiny_model_dir, 2, 0.1))
    with torch.no_grad():
        for expert in broken.experts:
            expert.model.get_output_embeddings().weight[:] = float("nan")
    with pytest.raises(EngineError, match="not finite"):
        said(broken, [[1, 2, 3]])


def test_pace_follows_costs_and_acceptance() -> None:
    pace = Pace(16)
    assert pace.best([0.9]) == (8, float("inf"))  # a first block is measured
    for length in (4, 8, 4, 8):
        pace.add(length * 1.0, 3.0, length, length, length)
    assert pace.best([0.98])[0] > pace.best([0.7])[0] > 1
    assert pace.best([0.98])[1] == pytest.approx(0.7, abs=0.1)  # tokens a second: at most 16 in 19 seconds
    assert pace.best([0.9] * 3)[1] == pytest.approx(3 * pace.best([0.9])[1])
    before = pace.best([0.98])[1]
    pace.add(8.0, 3.0, 8, 2, 8.0)  # a text ended within
    assert pace.best([0.98])[1] < before


def test_pace_of_fixed_costs_follows_acceptance_alone() -> None:
    pace = Pace(16, fixed_costs(3, alone=True))
    pace.plain.add(1, 99.0)
    assert pace.plain.at(1) == 3.0
    lengths = [pace.best([trust])[0] for trust in (0.5, 0.9, 0.98)]
    assert lengths == sorted(set(lengths)) and pace.best([0.9])[1] > 1 / pace.plain.at(1) > pace.best([0.5])[1]
    before = pace.best([0.9])
    pace.add(99.0, 99.0, 6, 1, 5.0)
    assert pace.best([0.9])[1] < before[1]
    for _ in range(300):
        pace.forget()
    assert pace.best([0.9])[1] == pytest.approx(before[1], rel=0.01)


def test_a_router_without_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(arms, "prompt_log_probs", fail)
    monkeypatch.setattr(arms, "identities", lambda model: [])
    model: Any = SimpleNamespace(encode=lambda text: [1])
    known, rows = SimpleNamespace(answers={}), [SimpleNamespace(prompt="x")]
    with pytest.raises(EngineError, match="out of memory with 8 prompts at a time; use --batch_size 4"):
        arms._routed(model, rows, ["x"], Asking(batch_size=8), None, known)  # type: ignore[arg-type]


def test_numbers_beyond_the_end_repeat_the_last() -> None:
    assert _some(np.array([0.1, 0.2, 0.3]), 1, 4).tolist() == [0.2, 0.3, 0.3, 0.3]
