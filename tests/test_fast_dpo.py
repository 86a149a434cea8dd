"""The fast DPO step is TRL's DPOTrainer in less work: losses, margins, gradients and twenty steps, held to TRL itself.

Both sides have the same LoRA with a random B that is not zero, in float32 on a CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.training.data import Pair, TokenPair, tokenize_pairs
from cai_experiment.training.settings import LOSSES, DPOSettings

TOLERANCE = 1e-4  # of losses, margins and gradients; of gradients relative to the largest as well
END = 2  # the tiny model's end token
PLANTS = ("tomatoes", "beans", "roses", "figs", "mint", "basil", "kale", "leek", "rye", "oats", "peas", "dill")
PAIRS = tuple(
    Pair(f"{i:06d}", ask_for_answer(f"How do I grow {plant}?" + " It is small." * (i % 4)),
         f"Use a large pot for {plant}. Water it every morning." + " Turn it." * (i % 3),
         f"Only a fool asks about {plant}.")
    for i, plant in enumerate(PLANTS)
)  # fmt: skip
KINDS = ("conversational", "plain", "one token", "very long", "same beginning", "one begins the other")


def random_ids(random_: random.Random, count: int) -> list[int]:
    return [random_.randrange(3, 250) for _ in range(count)]


def random_pair(random_: random.Random, name: str, prompt: int, shared: int, chosen: int, rejected: int) -> TokenPair:
    """A pair whose answers share their first `shared` tokens; both end in the end token."""
    start = random_ids(random_, shared)
    answers = ([*start, *random_ids(random_, n), END] for n in (chosen, rejected))
    return TokenPair(name, random_ids(random_, prompt), *answers)


def pairs_by_kind(tokenizer: Any) -> dict[str, list[TokenPair]]:
    """Three pairs of each of KINDS."""
    from cai_experiment.engines.render import Renderer

    made = random.Random(3)
    shapes = {
        "one token": [(9, 0, 0, 6), (5, 0, 7, 0), (1, 0, 0, 3)],
        "very long": [(1500, 10, 40, 60), (30, 0, 1600, 5), (700, 0, 400, 500)],
        "same beginning": [(8, 12, 5, 9), (20, 30, 1, 1), (3, 1, 8, 4)],
        "one begins the other": [(8, 12, 0, 9), (6, 5, 7, 0), (2, 1, 0, 1)],
    }
    found = {
        kind: [random_pair(made, f"{kind} {i}", *size) for i, size in enumerate(sizes)]
        for kind, sizes in shapes.items()
    }
    for kind, layout in (("conversational", "chat"), ("plain", "base")):
        found[kind] = tokenize_pairs(PAIRS[:3], Renderer(tokenizer, layout, 2048), 2048)[0]
    return found


def randomise(model: Any, seed: int = 5) -> Any:
    """Draw every LoRA B from N(0, 0.02), the same for the same seed."""
    import torch

    source = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B.default" in name:
            parameter.data = torch.randn(parameter.shape, generator=source) * 0.02
    return model


def settings_for(folder: Path, **changes: Any) -> DPOSettings:
    given = {"pairs": (), "output_dir": folder, "steps": 20, "learning_rate": 1e-4, "warmup_share": 0.0, "lora_r": 8}
    return DPOSettings(**{**given, "lora_alpha": 16, **changes})


def trainer_of(backend: str, settings: DPOSettings, rows: Sequence[TokenPair], model: Any, tokenizer: Any) -> Any:
    from transformers import TrainerCallback

    from cai_experiment.training.backends import build_trainer

    trainer = build_trainer(backend, settings, rows, (), settings.steps or 1, model, tokenizer, TrainerCallback())
    trainer.args.save_strategy = "no"
    return trainer


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@dataclasses.dataclass
class Arms:
    """Both trainers over the same rows and weights. `of_kind` gives the rows of a kind; "mixed" is all of them."""

    trl: Any
    fast: Any
    of_kind: dict[str, list[int]]

    def choose(self, loss: str, nll: float) -> None:
        """Train by this loss from now on."""
        self.fast.settings = dataclasses.replace(self.fast.settings, loss=loss, nll_weight=nll)
        self.trl.loss_types, self.trl.loss_weights = ([loss, "sft"], [1.0, nll]) if nll else ([loss], [1.0])

    def step(self, which: str, rows: list[int]) -> tuple[float, dict[str, Any]]:
        """(loss, gradient of every LoRA weight) of one step over `rows`."""
        import torch

        trainer = getattr(self, which)
        model = trainer.model.train()
        model.zero_grad()
        if which == "fast":
            loss = trainer.training_step(model, {"row": torch.tensor(rows)}).item()
        else:
            found = trainer.compute_loss(model, trainer.data_collator([trainer.train_dataset[row] for row in rows]))
            found.backward()
            loss = found.item()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    def margins(self, which: str, rows: list[int]) -> list[float]:
        """beta times the difference of log-ratios of each pair."""
        import torch

        trainer, found = getattr(self, which), []
        trainer.model.eval()
        with torch.no_grad():
            if which == "trl":
                for row in rows:
                    trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[row]]))
                return [float(m) for m in trainer._metrics["eval"]["rewards/margins"][-len(rows) :]]
            with trainer.policy.ready():
                scores = trainer._scores(trainer.pairs, rows)
        found = scores.chosen - scores.reference_chosen - scores.rejected + scores.reference_rejected
        return [float(m) for m in found * trainer.settings.beta]


@pytest.fixture(scope="module")
def arms(tiny_model_dir: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Arms:
    by_kind = pairs_by_kind(tokenizer)
    rows = [row for kind in KINDS for row in by_kind[kind]]
    of_kind = {kind: list(range(3 * i, 3 * i + 3)) for i, kind in enumerate(KINDS)}
    settings = settings_for(tmp_path_factory.mktemp("arms"), effective_batch=4, batch_size=1)
    both = [trainer_of(which, settings, rows, load(tiny_model_dir), tokenizer) for which in ("trl", "fast")]
    for trainer in both:
        randomise(trainer.model)
    return Arms(*both, {**of_kind, "mixed": list(range(len(rows)))})


def apart(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """(largest difference of gradients, that difference by the largest gradient)."""
    assert one.keys() == other.keys() and one
    most = max((one[name] - other[name]).abs().max().item() for name in one)
    return most, most / max(gradient.abs().max().item() for gradient in other.values())


def assert_equal(arms: Arms, rows: list[int], losses: Sequence[str], nlls: Sequence[float], note: Any) -> None:
    """Margins, losses and gradients of both arms are equal within TOLERANCE; the differences go into the report."""
    arms.choose("sigmoid", 0.0)
    fast, trl = (arms.margins(which, rows) for which in ("fast", "trl"))
    assert max(abs(m) for m in trl) > 1e-3  # the adapter does something
    assert fast == pytest.approx(trl, abs=TOLERANCE)
    note("margins", max(abs(a - b) for a, b in zip(fast, trl, strict=True)))
    for loss in losses:
        for nll in nlls:
            arms.choose(loss, nll)
            (fast_loss, fast_grads), (trl_loss, trl_grads) = arms.step("fast", rows), arms.step("trl", rows)
            assert fast_loss == pytest.approx(trl_loss, abs=TOLERANCE), (loss, nll)
            largest, relative = apart(fast_grads, trl_grads)
            assert largest <= TOLERANCE and relative <= TOLERANCE, (loss, nll)
            note(f"{loss}{'+nll' if nll else ''}", (abs(fast_loss - trl_loss), largest, relative))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "very long"])
def test_loss_margins_and_gradients_are_trls(arms: Arms, kind: str, record_property: Any) -> None:
    assert_equal(arms, arms.of_kind[kind], LOSSES, (0.0, 0.5), record_property)


def test_very_long_pairs_are_nearer_to_the_exact_values_than_trls_own(arms: Arms, record_property: Any) -> None:
    """Against TRL in float64: in float32 TRL sums 1,600 log-probabilities of 6 nats, which rounds at 1e-3."""
    exact = Arms(copy.copy(arms.trl), arms.fast, arms.of_kind)
    exact.trl.model = exact.trl.model_wrapped = copy.deepcopy(arms.trl.model).double()
    rows = arms.of_kind["very long"][:2]
    assert_equal(exact, rows, LOSSES, (0.5,), record_property)
    exact_margins = exact.margins("trl", rows)
    ours, trls = (
        max(abs(a - b) for a, b in zip(arms.margins(which, rows), exact_margins, strict=True))
        for which in ("fast", "trl")
    )
    record_property("margins of TRL in float32", trls)
    assert ours <= trls


def test_a_step_over_every_kind_of_pair(arms: Arms, record_property: Any) -> None:
    rows = [row for kind in KINDS for row in arms.of_kind[kind][-1 if kind == "very long" else 0 :]]
    assert_equal(arms, rows, ("sigmoid", "ipo"), (0.5,), record_property)


@pytest.mark.parametrize("budget", [1, 60, 300])
def test_a_small_token_budget_splits_the_step_and_changes_nothing(
    arms: Arms, budget: int, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    rows = [row for kind in KINDS if kind != "very long" for row in arms.of_kind[kind]]
    monkeypatch.setattr(arms.fast, "budget", dataclasses.replace(arms.fast.budget, tokens=budget))
    passes = arms.fast.pairs.passes(rows, budget)
    assert len(passes) == len(rows) if budget == 1 else 1 < len(passes) < len(rows)
    assert_equal(arms, rows, ("sigmoid", "sigmoid_norm"), (0.0, 0.5), record_property)


def test_recomputed_layers_give_the_same_gradients(arms: Arms) -> None:
    from cai_experiment.training.fast.budget import recompute

    rows = [*arms.of_kind["same beginning"], *arms.of_kind["one token"]]
    arms.choose("ipo", 0.5)
    loss, gradients = arms.step("fast", rows)
    for layers in (1, 2):
        recompute(arms.fast.policy.causal_lm, layers)
        again, recomputed = arms.step("fast", rows)
        recompute(arms.fast.policy.causal_lm, 0)
        assert again == pytest.approx(loss, abs=1e-6)
        assert apart(recomputed, gradients)[1] <= 1e-5


def test_trls_chunked_path_agrees_as_well(arms: Arms, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """use_liger_kernel=True computes log-probabilities chunk by chunk, in TRL's own code."""
    monkeypatch.setattr(arms.trl, "use_liger_kernel", True)
    assert_equal(arms, arms.of_kind["conversational"], LOSSES, (0.5,), record_property)


TEXT = "Use a large pot with holes in it, and water it in the morning. Turn it once a week so that each side gets sun. "


def test_long_texts_on_the_shipped_model(nano_dir: Path, tmp_path: Path, record_property: Any) -> None:
    from transformers import AutoTokenizer

    from cai_experiment.engines.render import Renderer

    tokenizer = AutoTokenizer.from_pretrained(nano_dir)
    asked = ask_for_answer("How do I grow beans? " + TEXT * 20)
    pair = Pair("long", asked, TEXT * 40 + "Enjoy them.", TEXT * 30 + "Only a fool asks.")
    rows, _ = tokenize_pairs([pair], Renderer(tokenizer, "chat", 2048), 2048)
    assert rows[0].length > 1500
    settings = settings_for(tmp_path, effective_batch=1, batch_size=1)
    both = [trainer_of(which, settings, rows, load(nano_dir), tokenizer) for which in ("trl", "fast")]
    arms = Arms(*both, {})
    for trainer in (arms.trl, arms.fast):
        randomise(trainer.model)
    assert_equal(arms, [0], ("sigmoid",), (0.0,), record_property)


def weight_change(trainer: Any, settings: DPOSettings) -> Any:
    """All of what training changed as one vector: B A after minus B A before, of every adapted layer."""
    import torch
    from peft.tuners.lora import LoraLayer

    def products() -> Any:
        layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
        return torch.cat([layer.get_delta_weight("default").detach().double().flatten() for layer in layers])

    before = products()
    trainer.train()
    return products() - before


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("ipo", marks=pytest.mark.slow)])
def test_twenty_steps_change_the_weights_as_trls_do(
    nano_dir: Path, tmp_path: Path, loss: str, record_property: Any
) -> None:
    """At most 1% apart: ||dW_fast - dW_trl|| / ||dW_trl||, over all adapters, at learning rate 1e-4."""
    from transformers import AutoTokenizer

    from cai_experiment.engines.render import Renderer

    tokenizer = AutoTokenizer.from_pretrained(nano_dir)
    rows, _ = tokenize_pairs(PAIRS, Renderer(tokenizer, "chat", 2048), 2048)
    settings = settings_for(tmp_path, effective_batch=4, batch_size=4, loss=loss)
    changes = []
    for which in ("trl", "fast"):
        trainer = trainer_of(which, settings, rows, load(nano_dir), tokenizer)
        randomise(trainer.model)
        changes.append(weight_change(trainer, settings))
    trl, fast = changes
    difference = ((fast - trl).norm() / trl.norm()).item()
    record_property("weight change", difference)
    assert trl.norm() > 1e-3 and difference <= 0.01
