"""Frozen experts and their heads: one vocabulary, the loss by hand, whose gradient, heads on disk, every refusal."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, build_tiny_model
from hub_server import Hub

from cai_experiment.ensemble import experts as of_experts
from cai_experiment.ensemble.experts import (
    MODELS,
    SHIPPED,
    Expert,
    canonical,
    default_models,
    default_precision,
    load_experts,
)
from cai_experiment.ensemble.files import heads_file, read_info
from cai_experiment.ensemble.heads import ScalarHead
from cai_experiment.ensemble.loss import perfect_alignment_loss
from cai_experiment.ensemble.model import MultiModelWithScalarHeads, fresh_heads
from cai_experiment.ensemble.vocabulary import shared_vocabulary
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models.hardware import Hardware

HIDDEN = (64, 64, 32)
CPU = Hardware("this machine", "cpu", "", 0, "fp32", 16, 2)
CARD = Hardware("this machine", "cuda", "NVIDIA A100-SXM4-80GB", 80, "4bit", 117, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three random models of one vocabulary, one with a smaller hidden state."""
    place = tmp_path_factory.mktemp("experts")
    for number, hidden in enumerate(HIDDEN):
        build_tiny_model(place / f"expert{number}", seed=number, hidden=hidden)
    return [str(place / f"expert{number}") for number in range(3)]


@pytest.fixture(scope="module")
def experts(folders: list[str]) -> list[Expert]:
    return load_experts(folders, device="cpu")


@pytest.fixture
def model(experts: list[Expert]) -> MultiModelWithScalarHeads:
    return MultiModelWithScalarHeads(experts, fresh_heads(experts))


def refused(text: str, *arguments: Any, **named: Any) -> None:
    """Loading fails with one line that holds `text` and a next step."""
    with pytest.raises(BadInputError) as error:
        MultiModelWithScalarHeads.from_pretrained(*arguments, device="cpu", **named)
    assert text in str(error.value) and "\n" not in str(error.value) and ";" in str(error.value)


# ---------------------------------------------------------------- heads


def test_a_head_reads_single_tokens_in_any_type_and_writes_float32() -> None:
    head = ScalarHead(24, hidden_dim=16).train()
    assert head(torch.randn(1, 1, 24)).shape == (1, 1)
    out = head(torch.randn(24, dtype=torch.bfloat16))
    assert out.shape == () and out.dtype == torch.float32
    shapes = [tuple(p.shape) for p in ScalarHead(1536).parameters() if p.dim() == 2]
    assert shapes == [(256, 1536), (128, 256), (1, 128)]


def test_a_scalar_does_not_depend_on_its_neighbours_nor_on_the_scale_of_its_state() -> None:
    head, states = ScalarHead(24).eval(), torch.randn(5, 7, 24)
    assert torch.allclose(head(states)[2, 3], head(states[2, 3]), atol=1e-6)
    assert torch.allclose(head(states * 1000), head(states), atol=1e-4)


# ---------------------------------------------------------------- the loss


def test_the_loss_of_a_case_worked_out_by_hand() -> None:
    """pi = (1/4, 3/4); p = (0.5, 0.1) and (0.2, 0.8): mixtures 0.2 and 0.65."""
    scalars = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    log_p = torch.tensor([[[0.5, 0.1], [0.2, 0.8]]]).log()
    found = perfect_alignment_loss(scalars, log_p, torch.ones(1, 2), entropy_weight=0.1)
    alignment = -(math.log(0.2) + math.log(0.65)) / 2
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found.alignment.item() == pytest.approx(alignment, abs=1e-6)
    assert found.entropy.item() == pytest.approx(entropy, abs=1e-6)
    assert found.loss.item() == pytest.approx(alignment - 0.1 * entropy, abs=1e-6)


def test_entropy_lowers_the_loss_and_its_gradient_evens_the_weights_out() -> None:
    scalars = torch.tensor([[[2.0, 0.0, -1.0]]], requires_grad=True)
    log_p = torch.full((1, 1, 3), -1.5)  # all experts alike: alignment has no say
    found = perfect_alignment_loss(scalars, log_p, torch.ones(1, 1), entropy_weight=0.5)
    even = perfect_alignment_loss(torch.zeros(1, 1, 3), log_p, torch.ones(1, 1), entropy_weight=0.5)
    assert even.loss < found.loss and even.entropy.item() == pytest.approx(math.log(3))
    found.loss.backward()
    gradient = scalars.grad
    assert gradient is not None and gradient[0, 0, 0] > 0 > gradient[0, 0, 2]  # a step down lowers the largest


def test_the_gradient_is_weight_minus_share_in_the_mixture() -> None:
    scalars = torch.randn(2, 3, 4, dtype=torch.float32, requires_grad=True)
    log_p = torch.log_softmax(torch.randn(2, 3, 4), dim=-1)
    perfect_alignment_loss(scalars, log_p, torch.ones(2, 3), entropy_weight=0.0).loss.backward()
    pi = torch.softmax(scalars.detach(), dim=-1)
    share = torch.softmax(scalars.detach() + log_p, dim=-1)
    assert scalars.grad is not None and torch.allclose(scalars.grad, (pi - share) / 6, atol=1e-6)


def test_masked_tokens_and_tiny_probabilities_spoil_nothing() -> None:
    scalars = torch.randn(1, 3, 2, requires_grad=True)
    log_p = torch.tensor([[[-1.0, -2.0], [float("nan"), float("-inf")], [-900.0, -901.0]]])
    mask = torch.tensor([[1, 0, 1]])
    found = perfect_alignment_loss(scalars, log_p, mask)
    found.loss.backward()
    assert torch.isfinite(found.loss) and scalars.grad is not None and torch.isfinite(scalars.grad).all()
    assert scalars.grad[0, 1].abs().sum() == 0
    nothing = perfect_alignment_loss(scalars, log_p, torch.zeros(1, 3))
    assert (nothing.loss.item(), nothing.alignment.item(), nothing.entropy.item()) == (0, 0, 0)
    with pytest.raises(ValueError, match="shapes"):
        perfect_alignment_loss(scalars, log_p, torch.ones(3, 1))


def test_trained_scalars_reach_perfect_alignment_without_entropy_and_stay_softer_with_it() -> None:
    log_p = torch.tensor([[[-0.5, -1.0], [-1.2, -0.4]]])
    ends = []
    for weight in (0.0, 0.5):
        scalars = torch.zeros(1, 2, 2, requires_grad=True)
        optimiser = torch.optim.Adam([scalars], lr=0.5)
        for _ in range(60):
            optimiser.zero_grad()
            perfect_alignment_loss(scalars, log_p, torch.ones(1, 2), weight).loss.backward()
            optimiser.step()
        ends.append(perfect_alignment_loss(scalars, log_p, torch.ones(1, 2), weight))
    assert ends[0].alignment.item() == pytest.approx(0.45, abs=0.01)  # -log of the better expert's, on average
    assert ends[0].entropy < 0.05 < 0.2 < ends[1].entropy


# ---------------------------------------------------------------- one vocabulary


def with_tokens(expert: Expert, tokens: dict[str, int], added: set[int] | None = None) -> Expert:
    """The expert with another vocabulary, as a tokenizer would tell it."""
    told = SimpleNamespace(get_vocab=lambda: tokens, added_tokens_decoder=dict.fromkeys(added or set()))
    return replace(expert, tokenizer=told)


def test_a_shared_vocabulary_leaves_out_padding_rows(experts: list[Expert]) -> None:
    tokens = len(experts[0].tokenizer)
    assert shared_vocabulary(experts) == tokens
    wider = load_experts([experts[0].name], device="cpu")[0]
    wider.model.resize_token_embeddings(tokens + 37, mean_resizing=False)
    assert shared_vocabulary([wider, experts[1]]) == tokens


def test_the_first_differing_token_is_named_with_both_models(experts: list[Expert]) -> None:
    own = experts[1].tokenizer.get_vocab()
    at = {index: token for token, index in own.items()}
    swapped = {**own, at[300]: 301, at[301]: 300}
    with pytest.raises(BadInputError) as error:
        shared_vocabulary([experts[0], with_tokens(experts[1], swapped)])
    line = str(error.value)
    assert f"token 300 is {at[300]!r} in {experts[0].name} and {at[301]!r} in {experts[1].name}" in line


def test_added_tokens_at_the_end_are_cut_off_but_words_are_not(experts: list[Expert]) -> None:
    own = experts[1].tokenizer.get_vocab()
    size = len(own)
    more = with_tokens(experts[1], {**own, "<|pad|>": size}, added={size})
    assert shared_vocabulary([more, experts[0]]) == shared_vocabulary([experts[0], more]) == size
    with pytest.raises(BadInputError, match=rf"token {size} is 'word' in .*expert1 and nothing in .*expert0"):
        shared_vocabulary([experts[0], with_tokens(experts[1], {**own, "word": size})])
    with pytest.raises(BadInputError, match=rf"ends its texts with token {size}"):
        shared_vocabulary([replace(more, eos_ids=frozenset({size})), experts[0]])


def test_qwen2s_real_vocabulary(shared_data: Path, experts: list[Expert]) -> None:
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(shared_data / "qwen2_tokenizer")
    rows = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=torch.empty(151_936, 1)))
    qwen = replace(experts[0], tokenizer=real, model=rows, eos_ids=frozenset({real.eos_token_id}), name="Qwen")
    assert shared_vocabulary([qwen, replace(qwen, name="other")]) == len(real) == 151_646
    with pytest.raises(BadInputError, match="token 0 is '!' in Qwen and '<|endoftext|>' in".replace("|", r"\|")):
        shared_vocabulary([qwen, experts[0]])


# ---------------------------------------------------------------- which experts


def test_default_experts_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(of_experts.VARIABLE, raising=False)
    for hardware, device, names, word in (
        (CPU, None, tuple(SHIPPED), "no GPU"),
        (CARD, None, MODELS, "A100"),
        (CARD, "cpu", tuple(SHIPPED), "--device cpu"),
        (replace(CPU, kind="mps", gpu_name="Apple silicon", ram_gb=8), "auto", tuple(SHIPPED), "little memory"),
    ):
        monkeypatch.setattr(of_experts, "detect", lambda hardware=hardware: hardware)
        found, why = default_models(device)
        assert found == names and word in why
    monkeypatch.setenv(of_experts.VARIABLE, "a/b, c/d")
    assert default_models() == (("a/b", "c/d"), "CAI_ENSEMBLE_MODELS=a/b, c/d")


def test_precision_is_what_the_card_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    three = [MODELS[0], "qwen2.5-1.5b", MODELS[2]]
    for memory, precision in ((80, "bf16"), (16, "bf16"), (8, "4bit")):
        monkeypatch.setattr(of_experts, "detect", lambda memory=memory: replace(CARD, vram_gb=memory))
        assert default_precision(three) == precision
    assert default_precision(three, "cpu") == "fp32"


def test_one_model_has_one_name(folders: list[str]) -> None:
    assert canonical("qwen2.5-1.5b-base") == canonical("qwen/qwen2.5-1.5B") == MODELS[0]
    assert canonical(MODELS[1]) == MODELS[1] and canonical("nano-medical") == "nano-medical"
    assert canonical(os.path.relpath(folders[0])) == folders[0]


def test_experts_are_frozen_and_a_name_given_twice_is_loaded_twice(folders: list[str]) -> None:
    one, other = load_experts([folders[0], folders[0]], device="auto", precision="bf16")
    assert one.model is not other.model and one.weights == other.weights
    assert not one.model.training and not any(p.requires_grad for p in one.model.parameters())
    assert one.model.dtype == torch.bfloat16 and one.precision == "bf16" and one.context == 2048


def test_random_experts_of_one_architecture_differ() -> None:
    one, other = load_experts(["random:nano", "random:nano"], device="cpu")
    assert (one.weights, other.weights) == ("seed:0", "seed:1")
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))


@pytest.mark.parametrize(
    ("names", "named", "says"),
    [
        ([], {}, "--models names no model"),
        (["nowhere"], {}, "--models nowhere: unknown preset"),
        (["random:nowhere"], {}, "--models random:nowhere: nowhere is no preset"),
        (["nano"], {"precision": "int3"}, "--precision int3 is unknown"),
        (["nano"], {"device": "tpu"}, "--device tpu is unknown"),
    ],
)
def test_wrong_names_are_one_line(names: list[str], named: dict[str, str], says: str) -> None:
    with pytest.raises(BadInputError) as error:
        load_experts(names, **named)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_four_bit_experts_have_heads_in_float32_and_no_gradient(nano_dir: Path) -> None:
    model = MultiModelWithScalarHeads.from_pretrained([str(nano_dir)] * 2, precision="4bit", device="cpu")
    out = model(torch.tensor([[5, 6, 7]]))
    assert out.scalars.dtype == torch.float32 and out.scalars.requires_grad
    assert any("4bit" in type(module).__name__ for module in model.experts[0].model.modules())


# ---------------------------------------------------------------- adapters


def adapter_on(base: str, folder: Path) -> None:
    """A LoRA adapter for `base`, none of whose matrices is zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def test_an_adapter_is_an_expert_whose_model_it_names(
    folders: list[str], experts: list[Expert], tmp_path: Path
) -> None:
    adapter_on(folders[0], tmp_path / "medical")
    found = load_experts([str(tmp_path / "medical")], device="cpu")[0]
    assert type(found.model).__name__ == "Qwen2ForCausalLM" and not any(
        "lora" in name or p.requires_grad for name, p in found.model.named_parameters()
    )
    assert found.name == str(tmp_path / "medical") and found.weights.startswith(experts[0].weights + "+")
    ids = torch.tensor([[4, 5, 6, 7]])
    assert not torch.allclose(found.hidden(ids), experts[0].hidden(ids), atol=1e-3)
    config = tmp_path / "medical" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": folders[2]}))
    with pytest.raises(EngineError, match="the adapter does not fit"):
        load_experts([str(tmp_path / "medical")], device="cpu")
    (tmp_path / "medical" / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInputError, match="is missing"):
        load_experts([str(tmp_path / "medical")], device="cpu")


class WholeHub(Hub):
    """transformers also asks for a model's page without a revision, and for a folder of chat templates."""

    def serve(self, handler: Any) -> None:
        path = handler.path.split("?")[0]
        if path.count("/") == 4 and path.startswith("/api/models/"):
            handler.path = f"{path}/revision/main"
        elif path.endswith("/additional_chat_templates"):
            handler.path = "/org/base/resolve/main/none"
        super().serve(handler)


@pytest.mark.slow
def test_models_and_adapters_of_the_hub(folders: list[str], tmp_path: Path) -> None:
    """From a server that speaks the hub's API, in a process whose cache is empty; then from that cache alone."""
    adapter_on(folders[0], tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/base"}))
    repositories = {
        name: {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}
        for name, folder in (("org/base", Path(folders[0])), ("org/adapter", tmp_path / "adapter"))
    }
    code = (
        "from cai_experiment.ensemble.experts import load_experts\n"
        "for one in load_experts(['org/base', 'org/adapter'], device='cpu'): print(one.name, one.source, one.weights)"
    )
    with WholeHub(repositories) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"),
                       "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}  # fmt: skip
        said = []
        for offline in ("0", "1"):
            done = subprocess.run(
                [sys.executable, "-c", code], env={**environment, "HF_HUB_OFFLINE": offline},
                capture_output=True, text=True, timeout=900, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
    base, adapter = (line.split() for line in said[0].splitlines())
    assert base[:2] == ["org/base", "org/base"] and base[2].startswith("sha256:")
    assert adapter[:2] == ["org/adapter", "org/base+org/adapter"] and adapter[2].startswith(base[2] + "+")
    assert said[1] == said[0]


PLAN = """
import sys
from cai_experiment.ensemble.experts import architecture, load_experts, whole_model
from cai_experiment.errors import UserError
print(whole_model('org/adapter'), architecture('org/adapter').hidden)
for name in sys.argv[1:]:
    try:
        load_experts([name], device='cpu')
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_plan_downloads_configs_alone_and_refusals_of_the_hub_are_said(folders: list[str], tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    adapter = {"adapter_config.json": json.dumps(config).encode()}
    base = {"config.json": (Path(folders[0]) / "config.json").read_bytes(), "model.safetensors": b"x" * 100}
    hub = Hub({"org/adapter": {**adapter, "adapter_model.safetensors": b"x" * 100}, "org/base": base,
               "org/empty": adapter}, gated=("org/gated",))  # fmt: skip
    with hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"),
                       "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}  # fmt: skip
        names = ["org/gated", "org/empty", "org/none"]
        done = subprocess.run([sys.executable, "-c", PLAN, *names], env=environment, capture_output=True, text=True,
                              timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan, gated, empty, none = done.stdout.splitlines()
    assert plan == f"org/base {HIDDEN[0]}" and not [path for _, path, _ in hub.requests if "/org/base/resolve" in path
                                                    and path.endswith(".safetensors")]  # fmt: skip
    assert not [path for _, path, _ in hub.requests if path.startswith("/org/adapter/") and "adapter_model" in path]
    assert "org/gated is gated" in gated and "adapter_model.safetensors is missing" in empty
    assert "the hub has no such model" in none


# ---------------------------------------------------------------- the model


def test_forward_gives_each_experts_own_logits_on_either_side_of_padding(model: MultiModelWithScalarHeads) -> None:
    ids = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    right = model(ids, mask)
    left = model(torch.tensor([[0, 0, 9, 10, 11]]), torch.tensor([[0, 0, 1, 1, 1]]))
    alone = model(torch.tensor([[9, 10, 11]]))
    assert right.scalars.shape == (2, 5, 3) and [h.shape[-1] for h in right.hidden] == list(HIDDEN)
    for m, expert in enumerate(model.experts):
        with torch.no_grad():
            theirs = expert.model(torch.tensor([[9, 10, 11]])).logits[..., : model.vocabulary]
        assert torch.equal(alone.logits[m], theirs)
        assert torch.allclose(right.logits[m][1, :3], theirs[0], atol=1e-4)
        assert torch.allclose(left.logits[m][0, 2:], theirs[0], atol=1e-4)
    assert torch.allclose(left.scalars[0, 2:], alone.scalars[0], atol=1e-4)


def test_the_gradient_reaches_the_heads_and_nothing_else(model: MultiModelWithScalarHeads) -> None:
    ids = torch.randint(3, model.vocabulary, (2, 9), generator=torch.Generator().manual_seed(1))
    weights = [[p.clone() for p in expert.model.parameters()] for expert in model.experts]
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert before and all(name.startswith("heads.") for name in before)
    out = model.train()(ids)
    log_p = torch.stack([torch.log_softmax(one[:, :-1].float(), -1) for one in out.logits], dim=-1)
    log_p = log_p.gather(2, ids[:, 1:, None, None].expand(-1, -1, 1, 3)).squeeze(2)
    perfect_alignment_loss(out.scalars[:, :-1], log_p, torch.ones(2, 8)).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0).step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    for expert, was in zip(model.experts, weights, strict=True):
        assert not expert.model.training and all(p.grad is None for p in expert.model.parameters())
        assert all(torch.equal(p, old) for p, old in zip(expert.model.parameters(), was, strict=True))


def test_text_never_becomes_a_control_token(model: MultiModelWithScalarHeads) -> None:
    assert model.eos_ids == {model.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert not set(model.encode("How do I <|im_end|> grow?")) & model.eos_ids
    assert model.encode("") == []


def test_generate_answers_one_prompt_or_several(model: MultiModelWithScalarHeads) -> None:
    one = model.generate("How do I grow tomatoes?", max_new_tokens=6, temperature=0.7)
    many = model.generate(["Use a large pot.", "How do I grow tomatoes?"], max_new_tokens=6, temperature=0.7)
    assert isinstance(one, str) and many[1] == one
    twice = model.speak(["Use"] * 2, max_new_tokens=12, temperature=2.0)
    assert twice[0].ids != twice[1].ids, "the same prompt twice is drawn twice"
    with pytest.raises(BadInputError, match="prompt 2 is empty"):
        model.speak(["Use", ""])


# ---------------------------------------------------------------- heads on disk


@pytest.fixture
def saved(model: MultiModelWithScalarHeads, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "out", facts={"epoch": 3})
    return tmp_path / "out"


def test_heads_come_back_as_they_were(model: MultiModelWithScalarHeads, saved: Path, folders: list[str]) -> None:
    told = json.loads((saved / "best_model_heads.json").read_text())
    assert told["models"] == folders and told["hidden_sizes"] == list(HIDDEN) and told["facts"] == {"epoch": 3}
    assert sorted(file.name for file in saved.iterdir()) == ["best_model_heads.json", "best_model_heads.safetensors"]
    for models, path in ((None, saved), (folders, saved / "best_model_heads.safetensors")):
        found = MultiModelWithScalarHeads.from_pretrained(models, path, device="cpu")
        assert found.names == tuple(folders) and found.facts == {"epoch": 3} and found.trained
        own = model.heads.state_dict()
        assert all(torch.equal(own[name], value) for name, value in found.heads.state_dict().items())
    assert read_info(saved) == model.info({"epoch": 3})


def test_fresh_heads_are_drawn_by_the_seed_alone(experts: list[Expert]) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (fresh_heads(experts, seed=seed)[1].layers[1].weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_heads_name_the_command_that_makes_them(saved: Path, folders: list[str], tmp_path: Path) -> None:
    refused("train_ensemble.py --output_dir", folders, tmp_path / "nothing")
    refused("neither models nor heads are named", None)
    found = MultiModelWithScalarHeads.from_pretrained(folders, saved / "best_model_heads.pt", device="cpu")
    assert found.trained and len(found.notes) == 1 and "best_model_heads.pt" in found.notes[0]
    refused("no such heads", folders, saved / "none.pt")
    (saved / "pickle.pt").write_bytes(b"")
    refused("pickled heads are not loaded", folders, saved / "pickle.pt")
    (saved / "best_model_heads.safetensors").rename(saved / "other.safetensors")
    refused("holds no best_model_heads.safetensors; give one of its files", folders, saved)
    assert heads_file(saved / "other.safetensors").name == "other.safetensors"


def test_heads_of_another_list_name_both(saved: Path, folders: list[str], experts: list[Expert]) -> None:
    listed, turned = ", ".join(folders), ", ".join(folders[::-1])
    refused(f"holds heads for {listed}, not for {turned}", folders[::-1], saved)
    refused(f"holds heads for {listed}, not for {', '.join(folders[:2])}", folders[:2], saved)
    refused(f"holds heads for {listed}, not for {', '.join(MODELS)}", MODELS, saved)  # before any download
    with pytest.raises(BadInputError, match=r"the head of .*expert0 reads 32 numbers, the model has 64"):
        MultiModelWithScalarHeads(experts, fresh_heads(experts[::-1]))


def test_heads_over_other_weights_or_of_other_sizes_are_refused(tmp_path: Path, experts: list[Expert]) -> None:
    places = [str(tmp_path / f"copy{number}") for number in range(3)]
    for place, expert in zip(places, experts, strict=True):
        shutil.copytree(expert.name, place)
    model = MultiModelWithScalarHeads.from_pretrained(places, device="cpu", head_hidden_dim=32)
    out = model.save_pretrained(tmp_path / "out")
    moved = MultiModelWithScalarHeads.from_pretrained([e.name for e in experts], out, device="cpu")
    assert moved.info().head_hidden_dim == 32, "folders may move: their weights tell"
    refused("with --head_hidden_dim 32, not 256", places, out, head_hidden_dim=256)
    build_tiny_model(Path(places[1]), seed=9)
    refused(f"trained over other weights of {places[1]}", places, out)
    build_tiny_model(Path(places[1]), seed=9, hidden=32)
    refused(f"heads that read 64 numbers, {places[1]} has 32", places, out)


def test_heads_meet_experts_in_another_precision_with_a_note(saved: Path) -> None:
    found = MultiModelWithScalarHeads.from_pretrained(None, saved, device="cpu", precision="bf16")
    assert "trained over experts in float32, and these are in bfloat16" in found.notes[0]
    assert found.first_line("a reason").endswith("bfloat16 on cpu | trained heads | a reason")


def test_damaged_heads_are_refused(saved: Path, folders: list[str]) -> None:
    file = saved / "best_model_heads.safetensors"
    whole = file.read_bytes()
    for bytes_, says in (
        (whole[:-10], "a download that did not finish"),
        (whole[:4], "is cut off"),
        (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], "is damaged"),
        ((Path(folders[0]) / "model.safetensors").read_bytes(), "holds no heads of an ensemble"),
    ):
        file.write_bytes(bytes_)
        refused(says, folders, saved)


# ---------------------------------------------------------------- the true size

# As train_ensemble.py does it: states by StateComputer, in shards, a step of HeadTrainer; then decoding.
TRUE_SIZE = """
import json, resource, sys, time
from pathlib import Path
from cai_experiment.ensemble.encoding import EncodedRow
from cai_experiment.ensemble.files import read_heads
from cai_experiment.ensemble.model import MultiModelWithScalarHeads
from cai_experiment.ensemble.schedule import TrainSettings
from cai_experiment.ensemble.state_cache import StateCache
from cai_experiment.ensemble.train import HeadTrainer

folder, tokenizer, names = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3:]
marks = [time.time()]
model = MultiModelWithScalarHeads.from_pretrained(names, precision="bf16", device="cpu", tokenizer=tokenizer)
marks.append(time.time())
prompt = model.encode("Question: Five apples and two more apples are how many?\\nAnswer:")
answers = [model.encode(text) for text in (" 5 + 2 = 7\\n#### 7", " 7")]
end = model.tokenizer.eos_token_id
rows = [EncodedRow(str(n), "sums", (*prompt, *ids, end), len(prompt)) for n, ids in enumerate(answers)]
cache = StateCache(folder, model, rows, "true size")
cache.fill(cache.missing())
cache.open()
found = cache.states([0, 1])
before = [p.detach().clone() for p in model.parameters()]
trainer = HeadTrainer(model, cache, rows, 1, folder, TrainSettings(num_epochs=1, warmup_steps=0), {}, lambda line: None)
result = trainer.run()
moved = [bool((p != old).any()) for p, old in zip(model.parameters(), before)]
frozen = not any(p.requires_grad or p.grad is not None for one in model.experts for p in one.model.parameters())
marks.append(time.time())
spoken = model.eval().speak("Question: Is water wet?\\nAnswer:", max_new_tokens=20, temperature=0.0)[0]
marks.append(time.time())
print(json.dumps({
    "vocabulary": model.vocabulary, "loss": result.history[1]["train_loss"], "moved": all(moved), "frozen": frozen,
    "held_out": result.history[1]["held_out"]["all rows"]["loss"], "steps": result.steps, "tokens": len(spoken.ids),
    "types": sorted({str(one.dtype) for one in found.hidden}), "saved": len(read_heads(result.saved)[1]),
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "shards": len(cache.shards),
    "seconds": [round(b - a, 1) for a, b in zip(marks, marks[1:])], "read": sum(len(row.ids) for row in rows),
}))
"""


def trained_a_step(found: dict[str, Any]) -> None:
    """What TRUE_SIZE prints is what it must be, whatever the experts' size."""
    assert found["moved"] and found["frozen"] and found["types"] == ["torch.bfloat16"] and found["steps"] == 1
    assert math.isfinite(found["loss"]) and math.isfinite(found["held_out"])
    assert 0 < found["tokens"] <= 20 and found["shards"] >= 1 and found["saved"] > 0


def test_small_experts_in_bfloat16_take_the_same_step(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "", *folders])
    exec(compile(TRUE_SIZE, "TRUE_SIZE", "exec"), {})
    trained_a_step(json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.slow
def test_three_experts_of_the_true_size_take_a_step_and_speak_within_24_gb(
    shared_data: Path, tmp_path: Path
) -> None:
    """Random weights in bfloat16 on this CPU; the real Qwen2 vocabulary. Needs 12 GB of memory and some minutes."""
    names = ["random:qwen2.5-1.5b-base", "random:qwen2.5-1.5b", "random:qwen2.5-math-1.5b"]
    done = subprocess.run(
        [sys.executable, "-c", TRUE_SIZE, str(tmp_path), str(shared_data / "qwen2_tokenizer"), *names],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["vocabulary"] == 151_646 and found["peak_gb"] < 24
    trained_a_step(found)
