"""What fast DPO is made of, part by part: packed trees, masks, head, adapter layers, other architectures."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_experiment.errors import EngineError
from cai_experiment.training.data import TokenPair
from cai_experiment.training.settings import DPOSettings

END = 2
token = st.integers(3, 9)  # few different ones: answers often begin alike
answer = st.lists(token, max_size=7).map(lambda ids: [*ids, END])
pairs = st.builds(TokenPair, st.just("x"), st.lists(token, min_size=1, max_size=6), answer, answer)
some_pairs = st.lists(pairs, min_size=1, max_size=6)


def rows_of(packed: Any, tree: Any, number: int) -> list[list[int]]:
    """The packed tokens, in order, of the chosen and of the rejected row of a pair; end tokens are never inputs."""
    first = int((packed.pair == number).nonzero()[0])
    trunk = list(range(first, first + len(tree.trunk)))
    chosen = list(range(first + len(trunk), first + len(trunk) + len(tree.chosen) - 1))
    after = first + len(trunk) + len(chosen)
    return [trunk + chosen, trunk + list(range(after, after + len(tree.rejected) - 1))]


@settings(max_examples=80, deadline=None)
@given(some_pairs, st.sampled_from([1, 16]))
def test_every_target_is_predicted_from_the_token_before_it_at_its_own_position(
    given_pairs: list[TokenPair], multiple: int
) -> None:
    from cai_experiment.training.fast.packing import CHOSEN, REJECTED, pack, tree_of

    trees = [tree_of(pair) for pair in given_pairs]
    packed = pack(trees, multiple)
    assert len(packed.input_ids) % multiple == 0 and packed.pairs == len(trees)
    tokens = sum(tree.tokens for tree in trees)
    assert tokens <= len(packed.input_ids) < tokens + multiple
    for number, (pair, tree) in enumerate(zip(given_pairs, trees, strict=True)):
        answers = (pair.chosen_ids, pair.rejected_ids)
        rows = rows_of(packed, tree, number)
        for ids, row, other in zip(answers, rows, (REJECTED, CHOSEN), strict=True):
            whole = [*pair.prompt_ids, *ids]
            assert packed.input_ids[row].tolist() == whole[:-1]
            assert packed.positions[row].tolist() == list(range(len(whole) - 1))
            mine = ((packed.target_pair == number) & (packed.target_branch != other)).nonzero()[:, 0]
            predicted = {int(packed.sources[m]): int(packed.targets[m]) for m in mine}
            assert len(mine) == len(predicted) == len(ids)  # every answer token once
            assert predicted == dict(zip(row[len(pair.prompt_ids) - 1 :], ids, strict=True))
        assert [int(packed.chosen_tokens[number]), int(packed.rejected_tokens[number])] == [len(ids) for ids in answers]


def attended(packed: Any) -> Any:
    """(T, T) of the groups' masks: who attends to whom."""
    import torch

    tokens = len(packed.input_ids)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for group in packed.groups:
        flat, longest = (group.start + group.spread).flatten(), group.spread.shape[1]
        assert flat[group.place].tolist() == list(range(group.start, group.stop))  # each token has one place
        for place in group.place.tolist():
            pair, row = divmod(place, longest)
            inside = {p - pair * longest for p in group.place.tolist() if p // longest == pair}
            columns = [c for c in group.mask[pair, 0, row].nonzero()[:, 0].tolist() if c <= row]
            assert group.mask[pair, 0, row].sum() == len(columns) and inside.issuperset(columns)
            seen[flat[place], flat[[pair * longest + c for c in columns]]] = True
    return seen


@settings(max_examples=40, deadline=None)
@given(some_pairs, st.sampled_from([1, 16]), st.sampled_from([None, 2, 4]))
def test_both_masks_are_that_of_two_rows_and_flex_attentions_is_the_same(
    given_pairs: list[TokenPair], multiple: int, window: int | None
) -> None:
    import torch

    from cai_experiment.training.fast.attention import _near, block_mask
    from cai_experiment.training.fast.packing import pack, tree_of

    trees = [tree_of(pair) for pair in given_pairs]
    packed = pack(trees, multiple)
    tokens, inside = len(packed.input_ids), sum(tree.tokens for tree in trees)
    expected = torch.zeros(tokens, tokens, dtype=torch.bool)
    for number, tree in enumerate(trees):
        for row in rows_of(packed, tree, number):
            for i, query in enumerate(row):
                expected[query, row[max(0, i - window + 1) if window else 0 : i + 1]] = True
    number = torch.arange(tokens)
    flex = block_mask(packed, window).mask_mod(0, 0, number[:, None], number[None, :])
    assert torch.equal(flex[:inside, :inside], expected[:inside, :inside])
    assert not flex[:inside, inside:].any() and flex.diagonal().all()  # no filling is seen; no row is empty
    assert bool(packed.groups) == (multiple == 1)  # a filled pass is FlexAttention's, which reads none
    whole = attended(packed)
    for group in packed.groups if window else ():
        near = _near(packed, group, window)
        for pair in range(len(group.spread)):
            at = group.start + group.spread[pair]
            assert torch.equal(near[pair, 0], packed.positions[at][:, None] - packed.positions[at] < window)
    causal = expected if window is None and packed.groups else None
    assert causal is None or torch.equal(whole[:inside, :inside], causal[:inside, :inside])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 120), st.integers(1, 25))
def test_passes_hold_every_pair_once_within_the_budget(costs: list[int], budget: int, least: int) -> None:
    from cai_experiment.training.fast.packing import into_passes

    passes = into_passes(costs, budget, least)
    assert sorted(number for part in passes for number in part) == list(range(len(costs)))
    assert all(len(part) == 1 or sum(costs[n] for n in part) <= budget for part in passes)
    assert len(passes) >= min(least, len(costs))
    if least == 1:
        full = sum(1 for part in passes if 2 * sum(costs[n] for n in part) <= budget)
        assert full <= 1  # two passes that are at most half full would have been one


@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, None, True), (1.0, 3.0, False)])
def test_the_chunked_head_is_log_softmax_and_so_is_its_gradient(
    scale: float, softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from cai_experiment.training.fast import head

    torch.manual_seed(1)
    hidden, weight, shift = torch.randn(37, 16), torch.randn(50, 16), torch.randn(50) if bias else None
    targets, by = torch.randint(0, 50, (37,)), torch.randn(37)
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 50 * 8)  # 8 rows a chunk, the last one is short
    gradients, found = [], []
    for ours in (True, False):
        x = hidden.clone().requires_grad_()
        if ours:
            logps = head.target_logps(x, weight, shift, targets, scale, softcap)
        else:
            logits = torch.nn.functional.linear(x, weight, shift) * scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (logps * by).sum().backward()
        found.append(logps.detach())
        gradients.append(x.grad)
    assert torch.allclose(*found, atol=1e-5) and torch.allclose(*gradients, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(head.target_logps(hidden, weight, shift, targets, scale, softcap), found[0], atol=1e-5)


# ---------------------------------------------------------------- other architectures


def small(**more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip


# model_type -> its settings; None where the start check must refuse the model
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": small(),
    "llama, bias": {**small(attention_bias=True, mlp_bias=True), "type": "llama"},
    "mistral": small(sliding_window=12, head_dim=8),
    "qwen2": small(use_sliding_window=True, sliding_window=10, max_window_layers=1),
    "qwen3": small(head_dim=8),
    "gemma": small(head_dim=8),
    "gemma2": small(head_dim=8, sliding_window=10, query_pre_attn_scalar=8, attn_logit_softcapping=5.0,
                    final_logit_softcapping=10.0),
    "gemma3_text": small(head_dim=8, sliding_window=10, query_pre_attn_scalar=8),
    "phi3": small(sliding_window=12),
    "cohere": small(logit_scale=0.25),
    "granite": small(logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.2),
    "olmo2": small(),
    "gpt2": dict(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2),
    "gpt_oss": small(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=10),
    "mixtral": small(num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
REFUSED = {"granite", "gpt_oss", "mixtral", "gemma2", "gpt2"}


def random_rows(lengths: Sequence[tuple[int, int, int]], seed: int = 1) -> list[TokenPair]:
    made = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [made.randrange(3, 250) for _ in range(count)]

    return [TokenPair(str(i), ids(p), [*ids(c), END], [*ids(r), END]) for i, (p, c, r) in enumerate(lengths)]


def random_model(name: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(ARCHITECTURES[name])
    torch.manual_seed(0)
    config = AutoConfig.for_model(given.pop("type", name), **given)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    for parameter in model.parameters():  # a fresh model's tokens score nearly alike: make what is wrong show
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def fast_trainer(folder: Path, model: Any, rows: Sequence[TokenPair], **changes: Any) -> Any:
    from transformers import TrainerCallback

    from cai_experiment.training.fast_dpo import build_fast_trainer

    given = {"pairs": (), "output_dir": folder / "run", "steps": 2, "effective_batch": 2, "lora_r": 4, **changes}
    return build_fast_trainer(DPOSettings(**given), rows, (), 2, model, None, TrainerCallback())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_score_as_plain_forward_passes_or_are_refused(
    tmp_path: Path, name: str, record_property: Any
) -> None:
    """Rows of 8 to 60 tokens, longer than any window here. Never silently wrong: refused by one line, or equal."""
    import torch

    from cai_experiment.training.fast.start_check import _plain

    rows = random_rows([(5, 3, 4), (30, 25, 20), (20, 40, 3), (8, 1, 9)])
    try:
        trainer = fast_trainer(tmp_path, random_model(name), rows)
        trainer.check_start()
    except EngineError as error:
        assert "\n" not in str(error) and "--backend trl" in str(error)
        assert name in REFUSED, str(error)
        return
    assert name not in REFUSED
    for parameter_name, parameter in trainer.model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer.model.eval()
    with torch.no_grad(), trainer.policy.ready():
        scores = trainer._scores(trainer.pairs, range(len(rows)))
    plain = [[_plain(trainer.policy, row, ids) for ids in (row.chosen_ids, row.rejected_ids)] for row in rows]
    apart = (torch.stack([scores.chosen, scores.rejected], 1) - torch.tensor(plain, dtype=torch.float64)).abs().max()
    record_property("nats", apart.item())
    assert apart <= 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled here: no compiler")
def test_flex_attention_itself_scores_as_the_spread_rows_do() -> None:
    """The real kernel's forward pass, compiled for a CPU: six heads over two, passes of several shapes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from cai_experiment.training.fast import attention
    from cai_experiment.training.fast.packing import pack, tree_of
    from cai_experiment.training.fast.policy import Policy

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=100, hidden_size=96, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2)  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(Qwen2ForCausalLM(config), lora).eval()
    source = random.Random(0)

    def ids(count: int) -> list[int]:
        return [source.randrange(3, 100) for _ in range(count)]

    pairs = []
    for number in range(4):
        begin = ids(10)
        answers = [[*begin, first, *ids(source.randint(5, 30))] for first in (1, 2)]
        pairs.append(TokenPair(str(number), ids(20), *answers))
    trees = sorted(map(tree_of, pairs), key=lambda tree: tree.tokens)
    spread, flex = Policy(model), Policy(model, attention.FLEX)
    with torch.no_grad(), spread.ready():
        expected = torch.stack(spread.answer_logps(pack(trees)))
    for count in (4, 3, 2):
        with torch.no_grad(), flex.ready():
            found = torch.stack(flex.answer_logps(pack(trees[:count], flex.fill)))
        torch.testing.assert_close(found, expected[:, :count], atol=1e-5, rtol=0)
