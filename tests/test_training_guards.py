"""What watches over a training: numbers that are not finite, alarms, held-out margins, early stop, sample answers."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_tools import BACKENDS, PAIRS, difference, load, renderer_of, settings_for, stop_after, train, weights

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.reporting.plots import training_plots
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.screen import batch_loss, epoch_loss
from cai_experiment.training import checkpoints, dpo
from cai_experiment.training.alarms import DISTINCT, SATURATED_MARGIN, Alarms
from cai_experiment.training.content import SAMPLE
from cai_experiment.training.settings import DPOSettings, TrainResult, check_flags

TRAINED, HELD_OUT = PAIRS[:7], PAIRS[7:]
WATCHED = {
    "pairs": TRAINED, "held_out": HELD_OUT, "steps": 8, "effective_batch": 4, "save_every": 3, "eval_every": 2,
    "sample_every": 4, "sample_prompts": tuple(pair.instruction for pair in HELD_OUT),
}  # fmt: skip
UNWATCHED = {"pairs": TRAINED, "steps": 8, "effective_batch": 4, "save_every": 3}


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_not_finite_stops_with_the_ids_and_never_reaches_a_checkpoint(
    tmp_path: Path, tiny_model_dir: Path, backend: str
) -> None:
    from safetensors.torch import load_file

    settings = settings_for(tmp_path, learning_rate=1e30, pairs=PAIRS[:2], save_every=1, backend=backend)
    with pytest.raises(EngineError, match=r"the (loss|gradient) is (nan|inf).*00000[01], 00000[01]"):
        train(settings, *load(tiny_model_dir))
    newest, skipped = checkpoints.newest_whole(tmp_path)
    assert not skipped
    if newest is not None:
        assert all(tensor.isfinite().all() for tensor in load_file(newest / "adapter_model.safetensors").values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_finite_stops_with_the_ids_of_the_whole_step(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    module = importlib.import_module("cai_experiment.training." + ("trl_dpo" if backend == "trl" else "trainer"))
    fresh = module.with_adapter

    def overflowing(settings: DPOSettings, plain: Any) -> Any:
        adapted = fresh(settings, plain)
        first = next(parameter for name, parameter in adapted.named_parameters() if "lora_B" in name)
        first.register_hook(lambda gradient: gradient * float("inf"))
        return adapted

    monkeypatch.setattr(module, "with_adapter", overflowing)
    settings = settings_for(tmp_path, pairs=PAIRS[:3], save_every=1, backend=backend)
    with pytest.raises(EngineError, match=r"the gradient is (nan|inf) after step 1, with the pairs") as caught:
        train(settings, *load(tiny_model_dir))
    assert all(pair.id in str(caught.value) for pair in PAIRS[:3])
    assert not list(tmp_path.glob("checkpoint-*"))


# ---------------------------------------------------------------- alarms


def rows(*values: dict[str, float]) -> list[dict[str, float]]:
    """Rows of metrics.jsonl that raise no alarm but for `values`."""
    return [{"step": n, "chosen_reward": 0.3, "margin": 1.0, "accuracy": 1.0, **row} for n, row in enumerate(values, 1)]


def looked(settings: DPOSettings, history: list[dict[str, float]], distinct_before: float | None = None) -> list[str]:
    alarms = Alarms(settings)
    alarms.distinct_before = distinct_before
    said = [text for row in history for text in alarms.look(row)]
    assert said == list(alarms.found.values())
    return said


def test_alarm_when_chosen_answers_lose_probability(tmp_path: Path) -> None:
    """A reward of -0.2 at beta 0.1 is 2 nats below the reference: one alarm after ten such steps, and only one."""
    settings = settings_for(tmp_path, beta=0.1)
    (said,) = looked(settings, rows(*[{}] * 5, *[{"chosen_reward": -0.2}] * 20))
    assert said.startswith("ALARM at step 14") and "1.05 nats" not in said
    result = TrainResult(tmp_path / "final", 1, [], [], 0.0, 0.7, None, before={"chosen_logp": -40.0, "loss": 0.7})
    after, told = {"chosen_logp": -43.5, "loss": 0.6}, list[str]()
    done = SimpleNamespace(
        measure=lambda: after, publish=lambda *_: None, settings=settings, take_best=lambda: 1, alarms=Alarms(settings)
    )
    dpo._finish(done, result, told.append)
    assert "fell by 3.5 nats (from -40.00 to -43.50)" in told[-1] and result.alarms == told[-1:] and result.loss_falls


def test_alarm_when_the_margin_explodes(tmp_path: Path) -> None:
    far = {"margin": SATURATED_MARGIN + 1}
    (said,) = looked(settings_for(tmp_path), rows(*[far] * 30))
    assert said.startswith("ALARM at step 10: over the last 10 steps every pair was right, with a mean margin of 11.0")
    assert not looked(settings_for(tmp_path), rows(*[far] * 9))
    assert not looked(settings_for(tmp_path), rows(*[far, {**far, "accuracy": 0.9}] * 10))
    assert not looked(settings_for(tmp_path, loss="sigmoid_norm"), rows(*[far] * 30))


def test_alarm_when_text_collapses_and_every_kind_once(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    worse = rows({}, {DISTINCT: 0.5}, {DISTINCT: 0.39}, {DISTINCT: 0.1})
    (said,) = looked(settings, worse, distinct_before=0.8)
    assert said.startswith("ALARM at step 3: sample answers collapse: 39% of their bigrams are distinct, 80% before")
    assert "an accuracy of 1.00" in said and "content_log.jsonl" in said
    assert not looked(settings, worse) and not looked(settings, worse, distinct_before=0.15)
    all_at_once = {"chosen_reward": -1.0, "margin": 12.0, DISTINCT: 0.0}
    assert len(looked(settings, rows(*[all_at_once] * 30), distinct_before=0.8)) == 3


# ---------------------------------------------------------------- sample answers


def test_distinct_bigrams_fall_with_repetition_sameness_and_silence() -> None:
    from cai_experiment.training.samples import distinct_bigrams

    assert distinct_bigrams([[1, 2, 3, 4], [5, 6, 7]]) == 1.0
    assert distinct_bigrams([[1, 2] * 32]) == pytest.approx(2 / 63)
    assert distinct_bigrams([[1, 2, 3, 4]] * 4) == 0.25
    assert distinct_bigrams([[], [7]]) == 0.0 == distinct_bigrams([])


@pytest.mark.parametrize("layout", ["chat", "base"])
def test_samples_are_the_greedy_answers_of_each_prompt_alone(tiny_model_dir: Path, layout: str) -> None:
    import torch

    from cai_experiment.training.samples import SAMPLE_TOKENS, SAMPLES, Sampler

    model, tokenizer = load(tiny_model_dir)
    renderer = renderer_of(tokenizer, layout)
    prompts = [f"{pair.instruction} {'It is small. ' * i}" for i, pair in enumerate(PAIRS[:5])]
    sampler = Sampler(["word " * 3000, *prompts], renderer)
    assert sampler.prompts == tuple(prompts[:SAMPLES])  # what does not fit into the context is passed over
    found, expected = sampler.answer(model), []
    for ids in sampler.ids:
        said: list[int] = []
        while len(said) < SAMPLE_TOKENS and not {*said[-1:]} & {*renderer.stop_token_ids}:
            with torch.no_grad():
                said.append(int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
        expected.append(renderer.stops.text(said)[0])
    assert list(found.answers) == expected and 0.0 < found.distinct <= 1.0


class FromUnsloth:
    """Gives a model the two switches that Unsloth sets on those it loads, as far as training can tell."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, list[str]()
        model.for_inference, model.for_training = self.for_inference, self.for_training

    def _switch(self, on: bool) -> None:
        for module in self.model.modules():
            module.training = on
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = on

    def for_inference(self) -> None:
        self.calls.append("for_inference")
        self._switch(False)

    def for_training(self) -> None:
        self.calls.append("for_training")
        self._switch(True)


@pytest.mark.parametrize(("by_unsloth", "to_generate"), [(False, True), (True, True), (True, False)])
def test_a_model_in_training_is_left_as_it_was(tiny_model_dir: Path, by_unsloth: bool, to_generate: bool) -> None:
    import numpy as np
    import torch

    from cai_experiment.training.samples import undisturbed

    model, _ = load(tiny_model_dir)
    unsloth = FromUnsloth(model) if by_unsloth else None
    model.gradient_checkpointing_enable()
    layers = list(model.model.layers)
    layers[1].gradient_checkpointing = False  # as fast recomputes in some layers only
    model.train()
    model.model.norm.eval()
    model.config.use_cache = False

    def state() -> list[Any]:
        modes = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
        numbers = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        return [modes, numbers, model.config.use_cache]

    before = state()
    with pytest.raises(ZeroDivisionError), undisturbed(model, to_generate):
        assert not model.training
        random.random(), torch.rand(3), np.random.rand()
        model.config.use_cache = True
        raise ZeroDivisionError
    assert state() == before
    assert unsloth is None or unsloth.calls == (["for_inference", "for_training"] if to_generate else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_watched_training_ends_at_the_weights_of_an_unwatched_one(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    plain = train(settings_for(tmp_path / "plain", **UNWATCHED, backend=backend), *load(tiny_model_dir))
    said: list[str] = []
    watched = train(settings_for(tmp_path / "watched", **WATCHED, backend=backend), *load(tiny_model_dir), said)
    assert difference(weights(tmp_path / "plain"), weights(tmp_path / "watched")) == 0.0
    assert [row["loss"] for row in plain.history] == [row["loss"] for row in watched.history]
    assert plain.held_out == {} and plain.best_step == watched.best_step == 8 and not watched.early
    measured = [row["step"] for row in watched.history if "held_out_margin" in row]
    assert measured == [2, 4, 6, 8] and sum("held out: margin" in line for line in said) == 4
    last = watched.history[-1]
    assert watched.held_out["margin"] == last["held_out_margin"] and set(watched.held_out) >= {"accuracy", "loss"}
    assert [row["step"] for row in watched.history if DISTINCT in row] == [4, 8]
    assert any(line.startswith("held-out pairs: margin +") for line in dpo.summary(watched))
    assert len(training_plots(watched.history)) == 3
    entries = [json.loads(line) for line in (tmp_path / "watched" / "content_log.jsonl").read_text().splitlines()]
    others = [SAMPLE] * (len(HELD_OUT) - 1)
    assert [entry["stage"] for entry in entries] == [
        "EPOCH-0-BATCH-0", *others, "EPOCH-1-BATCH-1", "EPOCH-1-COMPLETE", "EPOCH-2-BATCH-2", *others,
        "EPOCH-2-COMPLETE", "EPOCH-3-COMPLETE", "EPOCH-4-BATCH-2", *others, "EPOCH-4-COMPLETE",
    ]  # fmt: skip
    told = {entry["stage"]: entry for entry in entries}
    first = f'Before training\nSample generation ("{HELD_OUT[0].instruction}"):\n→ "'
    assert told["EPOCH-0-BATCH-0"]["content"].startswith(first)
    losses = [row["loss"] for row in watched.history]
    assert told["EPOCH-1-BATCH-1"]["content"] == f"Loss: {losses[0]:.3f}"
    then = told["EPOCH-2-BATCH-2"]["content"].splitlines()
    assert then[0] == batch_loss(losses[3], losses[0]) and then[1] == "Sample generation (same prompt):"
    assert told["EPOCH-2-BATCH-2"]["metadata"]["step"] == 4
    complete = told["EPOCH-4-COMPLETE"]["content"].splitlines()
    assert complete[0] == epoch_loss(sum(losses[4:6]) / 2, sum(losses[6:]) / 2)
    assert complete[1].startswith("Validation: margin +")
    # the watched one, stopped and resumed, comes to the same end, rows of measurements included
    stop_after(monkeypatch, 2, 5)
    settings = settings_for(tmp_path / "broken", **WATCHED, backend=backend)
    assert [train(settings, *load(tiny_model_dir)).steps for _ in range(2)] == [2, 5]
    again = train(settings, *load(tiny_model_dir))
    assert difference(weights(tmp_path / "broken"), weights(tmp_path / "plain")) == 0.0
    for one, other in zip(again.history, watched.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_samples_that_fail_are_said_once_and_training_goes_on(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.training.samples import Sampler

    calls: list[int] = []

    def fails(self: Sampler, model: Any) -> None:
        calls.append(1)
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Sampler, "answer", fails)
    said: list[str] = []
    result = train(settings_for(tmp_path, **WATCHED), *load(tiny_model_dir), said)
    assert result.steps == 8 and calls == [1]
    assert [line for line in said if "sample" in line] == [
        "no sample answers from step 0 on: RuntimeError: CUDA out of memory."
    ]


def test_collapsing_samples_raise_an_alarm_that_a_resumed_run_knows(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.training.samples import Sampler, Samples

    def answers(self: Sampler, model: Any) -> Samples:
        moved = any(float(p.detach().abs().max()) > 0 for name, p in model.named_parameters() if "lora_B" in name)
        return Samples(("no",) * len(self.prompts), 0.1 if moved else 0.9)

    monkeypatch.setattr(Sampler, "answer", answers)
    content, said = ContentLogger(0), list[str]()
    settings = settings_for(tmp_path, **{**WATCHED, "sample_every": 1})
    stopped = dpo.train(
        settings_for(tmp_path, **{**WATCHED, "sample_every": 1, "max_hours": 0.0}), *load(tiny_model_dir),
        renderer_of(load(tiny_model_dir)[1]), said.append, content,
    )  # fmt: skip
    assert stopped.stopped and content.get_summary()["stages"] == {"EPOCH-BATCH": 2, SAMPLE: 2 * (len(HELD_OUT) - 1)}
    (alarm,) = stopped.alarms
    assert alarm in said and "10% of their bigrams are distinct, 90% before training" in alarm
    assert not (tmp_path / "content_log.jsonl").exists()
    assert alarm in train(settings, *load(tiny_model_dir), said).alarms and said.count(alarm) == 1


def test_sft_samples_too_and_raises_this_alarm_alone(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.training import sft
    from cai_experiment.training.samples import Sampler, Samples

    shares = iter((0.9, 0.5, 0.2, 0.1, 0.9, 0.1))
    monkeypatch.setattr(Sampler, "answer", lambda self, model: Samples(("no",) * len(self.prompts), next(shares)))
    settings = settings_for(tmp_path, **{**WATCHED, "sample_every": 1})
    first = sft.sft_settings(settings, sft.sft_rows(PAIRS), 1.0, 1e-3)
    assert first.save_every == settings.save_every and first.sample_prompts == settings.sample_prompts
    model, tokenizer = load(tiny_model_dir)
    content, said = ContentLogger(0), list[str]()
    result = sft.train(first, model, tokenizer, renderer_of(tokenizer), said.append, content)
    assert [row[DISTINCT] for row in result.history] == [0.5, 0.2, 0.1][: result.steps]
    (alarm,) = result.alarms
    assert alarm in said and alarm.startswith("ALARM at step 2: sample answers collapse: 20% of their bigrams")
    assert "90% before training; read them" in alarm and "EPOCH-SFT-BATCH" in str(content.get_summary())


def test_a_line_after_the_first_step_every_tenth_and_every_two_minutes() -> None:
    from cai_experiment.training.watch import Pace

    pace, clock, due = Pace(), 0.0, []
    for step in range(1, 101):
        seconds = 50.0 if step <= 20 else 1.0
        clock += seconds
        due += [step] if pace.is_due(step, 100, seconds, clock) else []
    assert due[:8] == [1, 4, 7, 10, 13, 16, 19, 20] and due[8:] == [30, 40, 50, 60, 70, 80, 90, 100]
    assert pace.left(5400) == "90 min" and pace.left(9000) == "2.5 hours"
    pace.is_due(101, 200, 11.0, clock)  # the mean of the last ten: 2 seconds
    assert pace.left(60) == "2 min"


# ---------------------------------------------------------------- held-out margins and the early stop


MARGINS = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.5, 5: 0.4, 6: 0.45, 7: 0.49, 8: 0.9}  # by step


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out measurements give MARGINS."""
    from cai_experiment.training.run import Training

    measure = Training.measure

    def measured(self: Any, of_held_out: bool = False) -> dict[str, float]:
        found = measure(self, of_held_out)
        return {**found, "margin": MARGINS[self.step]} if of_held_out else found

    monkeypatch.setattr(Training, "measure", measured)


EARLY = {**WATCHED, "eval_every": 1, "early_stop": 3, "sample_prompts": ()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_early_stop_ends_with_the_best_adapter_and_a_resumed_run_decides_the_same(
    tmp_path: Path, tiny_model_dir: Path, margins: None, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    from safetensors.torch import load_file

    said: list[str] = []
    whole = train(settings_for(tmp_path / "whole", **EARLY, backend=backend), *load(tiny_model_dir), said)
    assert (whole.steps, whole.best_step, whole.total_steps, whole.stopped) == (7, 4, 8, "")
    assert whole.early == "no better held-out margin in 3 measurements" and whole.held_out["margin"] == 0.5
    names = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert names == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]  # two newest, and the best
    best = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    assert difference(weights(tmp_path / "whole"), best) == 0.0
    lines = dpo.summary(whole)
    assert "ended early: no better held-out margin in 3 measurements" in lines
    assert "the final adapter is that of step 4, with the best held-out margin" in lines
    folder = tmp_path / "broken"
    stop_after(monkeypatch, 3, 6, 7)
    for step in (3, 6, 7):
        result = train(settings_for(folder, **EARLY, backend=backend), *load(tiny_model_dir))
        assert result.steps == step and bool(result.stopped) == (step < 7)
    assert (result.early, result.best_step, result.held_out) == (whole.early, 4, whole.held_out)
    assert difference(weights(folder), weights(tmp_path / "whole")) == 0.0
    # killed between the last checkpoint and the final adapter: nothing more is trained
    shutil.rmtree(folder / "final")
    result = train(settings_for(folder, **EARLY, backend=backend), *load(tiny_model_dir))
    assert (result.steps, result.resumed_from, result.best_step, result.early) == (7, 7, 4, whole.early)
    assert difference(weights(folder), weights(tmp_path / "whole")) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_held_out_means_are_over_pairs_and_not_over_batches(tmp_path: Path, tiny_model_dir: Path, backend: str) -> None:
    """Ten pairs of unequal length in batches of four: the last batch has two."""
    import torch

    from cai_experiment.training.data import tokenize_pairs
    from cai_experiment.training.run import Training

    model, tokenizer = load(tiny_model_dir)
    longer = [replace(pair, chosen=pair.chosen + " Turn it." * i) for i, pair in enumerate(PAIRS)]
    rows = tokenize_pairs(longer, renderer_of(tokenizer), 2048)[0]
    settings = settings_for(tmp_path, effective_batch=4, batch_size=4, backend=backend)
    training = Training(settings, rows[:8], 3, model, tokenizer, print, rows)
    torch.manual_seed(0)
    for name, parameter in training.trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.05

    def gap(row: Any) -> float:
        """The answers' log-probabilities, chosen less rejected, in plain passes."""
        sums = []
        for answer in (row.chosen_ids, row.rejected_ids):
            ids = torch.tensor([[*row.prompt_ids, *answer]])
            with torch.no_grad():
                logps = training.trainer.model(ids).logits[0, len(row.prompt_ids) - 1 : -1].double().log_softmax(-1)
            sums.append(float(logps.gather(1, ids[0, len(row.prompt_ids) :, None]).sum()))
        return sums[0] - sums[1]

    policy = [gap(row) for row in rows]
    with training.trainer.model.disable_adapter():
        margins = [settings.beta * (mine - gap(row)) for mine, row in zip(policy, rows, strict=True)]
    assert training.measure(of_held_out=True)["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


def test_a_best_checkpoint_that_is_damaged_is_said_and_the_last_adapter_stays(
    tmp_path: Path, tiny_model_dir: Path, margins: None
) -> None:
    train(settings_for(tmp_path, **EARLY), *load(tiny_model_dir))
    shutil.rmtree(tmp_path / "final")
    (tmp_path / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"gone")
    result = train(settings_for(tmp_path, **EARLY), *load(tiny_model_dir))
    assert (result.steps, result.best_step) == (7, 7)
    assert "checkpoint-4, which has the best held-out margin, is damaged (adapter_model.safetensors" in result.alarms[0]


def test_without_the_flag_the_best_is_kept_and_the_last_is_final(
    tmp_path: Path, tiny_model_dir: Path, margins: None
) -> None:
    settings = {**EARLY, "early_stop": None, "keep": 1, "steps": 7}
    result = train(settings_for(tmp_path, **settings), *load(tiny_model_dir))
    assert (result.steps, result.best_step, result.early) == (7, 7, "")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-7"]
    state = json.loads((tmp_path / "checkpoint-7" / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"], state["best_model_checkpoint"]) == (0.5, 4, None)


def test_held_out_pairs_that_cannot_be_measured(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(BadInputError, match="--early-stop needs held-out pairs"):
        check_flags(settings_for(tmp_path, early_stop=2))
    long = [type(HELD_OUT[0])("long", HELD_OUT[0].turns, "word " * 3000, "No.")]
    said: list[str] = []
    result = train(settings_for(tmp_path / "a", held_out=tuple(long), steps=1), *load(tiny_model_dir), said)
    assert result.held_out == {} and any("1 of 1 held-out pairs are longer" in line for line in said)
    with pytest.raises(BadInputError, match="no held-out pair to measure"):
        train(settings_for(tmp_path / "b", held_out=tuple(long), steps=1, early_stop=1), *load(tiny_model_dir))
