"""The SL-CAI warm start: who learns which rows, the loss against a plain computation, SFT and DPO that resume."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_tools import BACKENDS, PAIRS, difference, load, renderer_of, settings_for, weights

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.errors import BadInputError
from cai_experiment.scripts import _sft, train_dpo
from cai_experiment.scripts._common import run_main
from cai_experiment.training import checkpoints, dpo, processes, sft
from cai_experiment.training.data import Pair, normalized, split_by_instruction, tokenize_pairs
from cai_experiment.training.helpful import choose_helpful, read_helpful
from cai_experiment.training.settings import DPOSettings, TrainResult


def pair(number: int, instruction: str, answer: str = "Good.") -> Pair:
    return Pair(f"{number:04d}", ask_for_answer(instruction), answer, "Bad.")


def instructions(pairs: Any) -> set[str]:
    return {normalized(pair.instruction) for pair in pairs}


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_sft_dpo_and_held_out_pairs_have_no_instruction_in_common(share: float) -> None:
    """Pairs of one instruction, written in several ways, stay together; a side does not depend on the order."""
    pairs = [pair(i, ("how do I grow {}?", "How do  I GROW {}?")[i % 2].format(i // 3)) for i in range(120)]
    training, held_out = split_by_instruction(pairs, seed=3)
    first, rest = sft.split_for_sft(training, 3, share)
    parts = [instructions(part) for part in (first, rest, held_out)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert len(first) + len(rest) + len(held_out) == 120 and len(parts[0]) == round(share * 32)
    helpful = [pair(i, f"How do I grow {i}?") for i in range(60)]  # the first 40 are pairs' own
    chosen = choose_helpful(helpful, len(first), 0.2, instructions(pairs), seed=3)
    assert chosen and not instructions(chosen) & instructions(pairs)
    assert len(chosen) == min(20, round(len(first) / 4))
    random.Random(0).shuffle(pairs)
    random.Random(1).shuffle(helpful)
    again, _ = sft.split_for_sft(split_by_instruction(pairs, seed=3)[0], 3, share)
    assert instructions(again) == parts[0]
    assert choose_helpful(helpful, len(first), 0.2, instructions(pairs), seed=3) == chosen


def test_a_share_of_1_leaves_dpo_nothing_and_one_instruction_cannot_be_shared() -> None:
    assert sft.split_for_sft(PAIRS, 0, 1.0) == (list(PAIRS), [])
    with pytest.raises(BadInputError, match="a single instruction cannot be shared"):
        sft.split_for_sft(PAIRS[:1], 0)


def test_rows_are_the_distinct_revisions_and_then_the_helpful_answers() -> None:
    twice = [pair(1, "How?"), pair(2, " how? "), pair(3, "How?", "Better.")]
    rows = sft.sft_rows(twice, [pair(4, "Why?", "So.")])
    assert [row.chosen for row in rows] == ["Good.", "Better.", "So."]
    assert all(row.rejected == row.chosen for row in rows[:2])


MESSAGES = {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"role": "assistant", "content": "So."}]}


OURS, TRLS = {"instruction": "Why?", "answer": "So."}, {"prompt": "Why?", "completion": "So."}


@pytest.mark.parametrize("row", [OURS, TRLS, MESSAGES])
def test_helpful_rows_of_every_shape(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "helpful.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,) = read_helpful(path)
    assert found.turns == ask_for_answer("Why?") and found.chosen == found.rejected == "So."
    path.write_text(json.dumps(row) + "\n" + json.dumps(TRLS if row == OURS else OURS) + "\n")
    with pytest.raises(BadInputError, match=r"helpful.jsonl:2 has .* one file holds one format") as caught:
        read_helpful(path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": "Why?"}, 'has no "answer"'),
        ({"answer": "So."}, 'has no "instruction"'),
        ({"prompt": "Why?", "completion": 3}, 'has a "completion" that is int, not text'),
        ({"prompt": MESSAGES["prompt"]}, 'has no "completion"'),
        ({"instruction": " ", "answer": "So."}, 'has an empty "instruction"'),
        (["Why?"], "is no JSON object"),
        ({"id": "\ud800", "instruction": "Why?", "answer": "So."}, 'has a "id" with half a surrogate pair'),
    ],
)
def test_a_bad_helpful_row_is_named(tmp_path: Path, row: object, says: str) -> None:
    path = tmp_path / "helpful.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInputError, match=f"helpful.jsonl:1 {says}"):
        read_helpful(path)


# ---------------------------------------------------------------- the loss

ROWS = sft.sft_rows(PAIRS)


def of_sft(folder: Path, **changes: Any) -> DPOSettings:
    """Settings of a fine-tuning on ROWS: 3 steps an epoch."""
    return sft.sft_settings(settings_for(folder, effective_batch=4, batch_size=2, **changes), ROWS, 2.0, 1e-3)


def plain_nll(model: Any, rows: Any) -> Any:
    """(sum of negative log-probabilities of all answer tokens, tokens), row by row, no padding, in float64."""
    import torch

    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.chosen_ids]])
        logps = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].double().log_softmax(-1)
        total = total - logps.gather(1, ids[0, len(row.prompt_ids) :, None]).sum()
        tokens += len(row.chosen_ids)
    return total, tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients_equal_a_plain_computation(tmp_path: Path, tiny_model_dir: Path, backend: str) -> None:
    """Token mean over a step's answers, end token included, prompt tokens not; with a random non-zero adapter."""
    import torch

    from cai_experiment.training.sft_trainer import SFTTraining

    model, tokenizer = load(tiny_model_dir)
    answers = ("Yes.", "Use a large pot, water it every morning and turn it once a week. " * 5, "It may.", "No.")
    rows = tuple(replace(row, chosen=text, rejected=text) for row, text in zip(ROWS, answers, strict=False))
    settings = replace(of_sft(tmp_path, backend=backend), pairs=rows)
    tokens, _ = tokenize_pairs(rows, renderer_of(tokenizer), 2048)
    assert all(row.chosen_ids[-1] == tokenizer.eos_token_id and row.chosen_ids == row.rejected_ids for row in tokens)
    trainer = SFTTraining(settings, tokens, 1, model, tokenizer, lambda line: None).trainer
    torch.manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    loss = trainer.training_step(trainer.model, {"row": torch.arange(4)}).item()
    ours = {name: parameter.grad.clone() for name, parameter in trained.items()}
    trainer.model.zero_grad()
    total, count = plain_nll(trainer.model.train(), tokens)
    (total / count).backward()
    assert loss == pytest.approx(total.item() / count, abs=1e-5)
    assert trainer.measure()["loss"] == pytest.approx(total.item() / count, abs=1e-5)
    largest = max(parameter.grad.abs().max().item() for parameter in trained.values())
    assert largest > 1e-3
    assert max((parameter.grad - ours[name]).abs().max().item() for name, parameter in trained.items()) < 1e-4 * largest


# ---------------------------------------------------------------- SFT, then DPO


def train_both(folder: Path, model_dir: Path, said: list[str] | None = None, **changes: Any) -> TrainResult:
    """SFT on ROWS, then DPO on PAIRS from its adapter, as the script does it; ends where a limit ends it."""
    say = (said if said is not None else []).append
    model, tokenizer = load(model_dir)
    settings = settings_for(folder, effective_batch=4, batch_size=2, save_every=1, **changes)
    first = sft.train(replace(of_sft(folder, **changes), save_every=1), model, tokenizer, renderer_of(tokenizer), say)
    if first.stopped:
        return first
    settings = replace(settings, start_adapter=first.adapter_dir)
    return dpo.train(settings, sft.plain(first.model or model), tokenizer, renderer_of(tokenizer), say)


@pytest.fixture(scope="module")
def unbroken(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train_both(tmp_path_factory.mktemp("unbroken"), tiny_model_dir)


def test_sft_learns_its_rows_and_dpo_goes_on_from_there(unbroken: TrainResult, tiny_model_dir: Path) -> None:
    folder = unbroken.adapter_dir.parent
    first = dpo.finished(folder / sft.FOLDER)
    assert first.loss_falls and first.steps == first.total_steps == 6 and first.pairs == 10
    assert [row["step"] for row in first.history] == [1, 2, 3, 4, 5, 6]
    names = {"step", "loss", "learning_rate", "grad_norm", "tokens", "seconds"}
    assert all(row.keys() == names for row in first.history)
    checkpoints.verify(first.adapter_dir, (*checkpoints.ADAPTER_FILES, dpo.RECORD))
    assert unbroken.step0_margin == 0.0 and unbroken.loss_falls
    assert unbroken.before["chosen_logp"] > -first.loss_before * 30  # DPO starts from what SFT has learned
    change = difference(weights(folder), weights(folder / sft.FOLDER))
    assert 0 < change < difference(weights(folder), weights_of_zero(weights(folder)))
    assert json.loads((folder / "final" / "adapter_config.json").read_text())["r"] == 32
    line = sft.summary(first, helpful=2)
    assert line.startswith("SFT: 6 of 6 steps on 10 rows, 20% of them helpful; loss falls: ")


def weights_of_zero(of: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor * 0 for name, tensor in of.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_of_dpo_and_of_evaluation_is_the_sft_model(
    tmp_path: Path, tiny_model_dir: Path, backend: str
) -> None:
    """Evaluation's implicit rewards are those of training; against the base model they would be others."""
    from cai_experiment.evaluation.preference import score_pairs

    result = train_both(tmp_path, tiny_model_dir, backend=backend)
    assert result.step0_margin == 0.0 and result.loss_before == pytest.approx(0.693147, abs=1e-6)
    renderer = renderer_of(load(tiny_model_dir)[1])
    generate = result.model.active_adapter
    scores = score_pairs(result.model, renderer, PAIRS, reference=tmp_path / sft.FOLDER / "final")
    assert sum(s.margin for s in scores) / 10 * 0.1 == pytest.approx(result.after["margin"], abs=1e-5)
    assert result.model.active_adapter == generate and next(iter(result.model.peft_config)) == "default"
    of_base = score_pairs(result.model, renderer, PAIRS)
    assert abs(sum(s.chosen for s in of_base) - sum(s.chosen for s in scores)) > 1.0
    assert not (result.adapter_dir / "ref").exists() and not (result.adapter_dir / "reference").exists()


def test_stopped_after_every_step_of_both_and_resumed_equals_unbroken(
    tmp_path: Path, tiny_model_dir: Path, unbroken: TrainResult
) -> None:
    said: list[str] = []
    steps = []
    for _ in range(8):
        result = train_both(tmp_path, tiny_model_dir, said, max_hours=1.0, started=time.monotonic() - 4000)
        steps.append(result.steps)
    assert steps == [1, 2, 3, 4, 5, 1, 2, 3] and sum("resuming from" in line for line in said) == 7
    result = train_both(tmp_path, tiny_model_dir, said)
    assert difference(weights(tmp_path), weights(unbroken.adapter_dir.parent)) == 0.0
    assert [row["loss"] for row in result.history] == [row["loss"] for row in unbroken.history]


def killed(model_dir: str, folder: str, moment: int) -> None:
    """Child process: SFT and DPO, with kill -9 at the `moment`-th flush, hash, rename or step (0: never)."""
    import torch

    from cai_experiment.training.watch import Watch

    torch.set_num_threads(1)
    calls = 0

    def counted(work: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **kwargs)

        return run

    checkpoints._fsync, checkpoints._sha256 = counted(checkpoints._fsync), counted(checkpoints._sha256)
    os.rename = counted(os.rename)
    Watch.on_step_begin = counted(Watch.on_step_begin)  # type: ignore[method-assign]
    train_both(Path(folder), Path(model_dir))


@pytest.mark.slow
def test_kill_9_in_either_part_then_resumed_equals_unbroken(
    tmp_path: Path, tiny_model_dir: Path, unbroken: TrainResult
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cai_experiment.training.sft_trainer", "peft"])
    for moment in (30, 150, 90):  # in SFT, at its end, in DPO after that
        child = context.Process(target=killed, args=(str(tiny_model_dir), str(tmp_path), moment))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    train_both(tmp_path, tiny_model_dir)
    assert difference(weights(tmp_path), weights(unbroken.adapter_dir.parent)) == 0.0
    assert difference(weights(tmp_path / sft.FOLDER), weights(unbroken.adapter_dir.parent / sft.FOLDER)) == 0.0


def test_changed_settings_and_a_changed_flag_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    model, tokenizer = load(tiny_model_dir)
    settings = replace(of_sft(tmp_path, max_hours=1.0, started=time.monotonic() - 4000), save_every=1)
    assert sft.train(settings, model, tokenizer, renderer_of(tokenizer), lambda line: None).stopped
    with pytest.raises(BadInputError, match=r"sft was trained with other settings: epochs 2.0 -> 3.0"):
        sft.train(replace(settings, epochs=3.0), *load(tiny_model_dir), renderer_of(tokenizer))
    with pytest.raises(BadInputError, match="was begun with --sft-first"):
        sft.check_first(tmp_path, sft_first=False)
    sft.check_first(tmp_path, sft_first=True)
    (tmp_path / "other" / "final").mkdir(parents=True)
    with pytest.raises(BadInputError, match="was begun without --sft-first"):
        sft.check_first(tmp_path / "other", sft_first=True)
    assert of_sft(tmp_path, beta=0.5).identity() == of_sft(tmp_path).identity()  # DPO's alone


def test_overlong_rows_are_dropped_as_a_whole_and_counted(tmp_path: Path, tiny_model_dir: Path) -> None:
    model, tokenizer = load(tiny_model_dir)
    long = replace(ROWS[0], id="long", chosen="word " * 300, rejected="word " * 300)
    settings = replace(of_sft(tmp_path), pairs=(*ROWS, long), max_length=200, epochs=1.0)
    said: list[str] = []
    result = sft.train(settings, model, tokenizer, renderer_of(tokenizer), said.append)
    assert result.dropped == ["long"] and result.pairs == 10 and result.total_steps == 3
    assert said[0] == "SFT: 1 of 11 rows exceed 200 tokens and were dropped, not cut"
    line = sft.summary(result, helpful=2)
    assert "SFT: 3 of 3 steps on 11 rows, 18% of them helpful (1 of them overlong and dropped)" in line


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sft-share", "0.3"], "--sft-share speaks of SFT"),
        (["--sft-first", "--helpful-share", "0.3"], "--helpful-share needs helpful rows"),
        (["--sft-first", "--helpful", "none.jsonl"], "name a file of instructions and answers with --helpful"),
        (["--sft-first", "--sft-share", "1", "--steps", "5"], "--steps speaks of DPO, for which --sft-share 1 leaves"),
        (["--sft-first", "--sft-share", "1", "--nll-weight", "0.1"], "--nll-weight speaks of DPO"),
    ],
)
def test_flags_that_cannot_be_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "chosen": "a", "rejected": "b"}) + "\n" for i in range(9)))
    places = ["--data-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "checkpoints")]
    assert run_main(train_dpo.main, ["--pairs", str(path), "--model", "nano", *places, *flags]) == 2
    assert says in capsys.readouterr().err


def test_sft_alone_speaks_of_no_dpo(tmp_path: Path, nano_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(25)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own" / "final").mkdir(parents=True)  # begun without --sft-first: the plan may ask what it would take
    flags = ["--pairs", str(path), "--model", "nano", "--checkpoint-dir", str(tmp_path), "--sft-first"]
    assert run_main(train_dpo.main, [*flags, "--sft-share", "1", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "SFT first: 20 rows; 9 steps at" in said and "\n5 held out\n" in said
    assert "learning rate" not in said and "training pairs" not in said
    assert run_main(train_dpo.main, flags) == 2 and "was begun without --sft-first" in capsys.readouterr().err
    warm = _sft.WarmStart(of_sft(tmp_path), PAIRS, 2, alone=True)
    described = warm.described()
    assert described["pairs"].startswith("10 with") and described["loss"] == "sft" and described["sft_helpful"] == 2
    assert described["steps"] is None and described["epochs"] == 2.0 and "beta" not in described


def test_several_processes_cannot_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    args = train_dpo.parser().parse_args(["--milestone", "mvp", "--sft-first"])
    with pytest.raises(BadInputError, match="--sft-first runs in one process"):
        _sft.check_flags(args)


def test_one_command_warms_up_trains_resumes_and_reports(
    tmp_path: Path, nano_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.evaluation import answers, measure
    from cai_experiment.nano.world import held_out_questions

    monkeypatch.setattr(measure, "HELD_OUT", 4)
    monkeypatch.setattr(answers, "arithmetic_questions", lambda count, seed: [("What is 1 + 1?", "2")])
    drawn = held_out_questions(4, 0)
    pairs, helpful = tmp_path / "own.jsonl", tmp_path / "helpful.jsonl"
    things = ("chair", "fence", "coat", "kettle", "gate", "shoe", "lamp", "sack", "bowl", "tent", "kite", "bag")
    rows = [{"prompt": f"How do I mend a {thing}?", "chosen": f"Mend the {thing} with care.", "rejected": "No."}
            for thing in things]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    helpful.write_text("".join(json.dumps({"instruction": text, "answer": "In time."}) + "\n" for text in drawn[:2]))
    places = ["--data-dir", str(tmp_path / "data"), "--checkpoint-dir", str(tmp_path / "checkpoints")]
    flags = ["--pairs", str(pairs), "--model", "nano", "--steps", "2", "--sft-first", "--sft-epochs", "2",
             "--helpful", str(helpful), *places]  # fmt: skip
    assert run_main(train_dpo.main, [*flags, "--max-hours", "1e-9"]) == 0
    assert "SFT first: 6 rows, 1 of them helpful; 2 steps at" in (said := capsys.readouterr().out)
    assert "stopped by --max-hours 1e-09" in said and "5 training pairs, 2 held out" in said
    folder = tmp_path / "checkpoints" / "own"
    assert (folder / "sft" / "checkpoint-1").exists() and not (folder / "checkpoint-1").exists()
    assert run_main(train_dpo.main, flags) in (0, 3)
    said = capsys.readouterr().out
    assert "resuming from" in said and "SFT: 2 of 2 steps on 6 rows, 17% of them helpful; loss" in said
    report = json.loads((tmp_path / "data" / "own" / "report.json").read_text())
    assert any(note.startswith("SFT: 2 of 2 steps") for note in report["notes"])
    assert "against the SFT model that DPO started from" in report["notes"][0]
    assert report["metrics"]["sft_loss_after"]["value"] < report["metrics"]["sft_loss_before"]["value"]
    settings = report["settings"]["training"]
    assert settings["start_adapter"] and settings["sft_helpful"] == 1 and settings["sft_epochs"] == 2.0
    learned = {row["instruction"] for row in report["answers"]}
    assert len(learned & set(drawn[:2])) == 1  # the one that was a helpful row is not asked
    assert run_main(train_dpo.main, flags) in (0, 3) and "step 1/" not in capsys.readouterr().out
    assert run_main(train_dpo.main, [*flags, "--sft-epochs", "3"]) == 2
    assert "epochs 2.0 -> 3.0" in capsys.readouterr().err
