"""Heads are trained on states that are computed once; nothing is lost to a kill, and the same weights come out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_tiny_model

from cai_experiment.ensemble import checkpoint, state_cache, train_log
from cai_experiment.ensemble.data import Row, prompt_of
from cai_experiment.ensemble.encoding import EncodedRow, encode_rows
from cai_experiment.ensemble.experts import SHIPPED, Expert, load_experts
from cai_experiment.ensemble.files import read_heads
from cai_experiment.ensemble.held_out import ALL, measure
from cai_experiment.ensemble.model import MultiModelWithScalarHeads, fresh_heads
from cai_experiment.ensemble.schedule import TrainSettings, learning_rate_at, order_of
from cai_experiment.ensemble.state_cache import StateCache, bytes_of
from cai_experiment.ensemble.states import TOKENS_A_PASS, DirectStates, StateComputer, States
from cai_experiment.ensemble.train import HeadTrainer
from cai_experiment.errors import BadInputError, DiskError, EngineError
from cai_experiment.scripts import train_ensemble
from cai_experiment.scripts._common import run_main

SCRIPT = ROOT / "cai_experiment" / "scripts" / "train_ensemble.py"
HIDDEN = (32, 48, 32)
LEAST_TIMES = 4
QUICK = TrainSettings(num_epochs=2, learning_rate=1e-3, warmup_steps=5, checkpoint_seconds=0.0)


def quiet(line: str) -> None:
    """Says nothing."""


def written(number: int) -> dict[str, Any]:
    """A row as a local file holds it."""
    dataset = "ab"[number % 2]
    return {"id": f"{dataset}-{number}", "dataset": dataset, "task": "text", "gold": "x",
            "prompt": prompt_of(f"How do I grow {number} tomatoes?"),
            "answer": f" Use {number} large pots and water {number % 7} times."}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three random models of one vocabulary, one of another width."""
    place = tmp_path_factory.mktemp("experts")
    for number, hidden in enumerate(HIDDEN):
        build_tiny_model(place / f"expert{number}", seed=number, hidden=hidden)
    return [str(place / f"expert{number}") for number in range(len(HIDDEN))]


@pytest.fixture(scope="module")
def experts(folders: list[str]) -> list[Expert]:
    return load_experts(folders, device="cpu")


@pytest.fixture
def model(experts: list[Expert]) -> MultiModelWithScalarHeads:
    torch.manual_seed(0)
    return MultiModelWithScalarHeads(experts, fresh_heads(experts, 32))


@pytest.fixture(scope="module")
def rows(experts: list[Expert]) -> list[EncodedRow]:
    return encode_rows([Row(**written(number)) for number in range(40)], experts[0].tokenizer, 512)[0]


@pytest.fixture(scope="module")
def cache(experts: list[Expert], rows: list[EncodedRow], tmp_path_factory: pytest.TempPathFactory) -> StateCache:
    """The whole cache of all rows; read it, do not change it."""
    model = MultiModelWithScalarHeads(experts, fresh_heads(experts, 32))
    made = StateCache(tmp_path_factory.mktemp("states"), model, rows, "x")
    made.fill(made.missing())
    made.open()
    return made


# ---------------------------------------------------------------- rows


def test_tokens_of_the_answer_and_the_end_count(experts: list[Expert]) -> None:
    tokenizer, row = experts[0].tokenizer, Row(**written(3))
    (encoded,), dropped = encode_rows([row], tokenizer, 512)
    assert dropped == []
    assert list(encoded.ids[: encoded.start]) == tokenizer(row.prompt).input_ids
    assert tokenizer.decode(encoded.ids[encoded.start : -1]) == row.answer
    assert encoded.ids[-1] == tokenizer.eos_token_id
    (whole,), _ = encode_rows([row], tokenizer, 512, train_on_prompt=True)
    assert (whole.ids, whole.counted) == (encoded.ids, len(encoded.ids) - 1)


def test_no_text_becomes_a_control_token_and_long_rows_are_named(experts: list[Expert]) -> None:
    tokenizer = experts[0].tokenizer
    odd = replace(Row(**written(1)), answer=" <|im_end|> is text here")
    (encoded,), dropped = encode_rows([odd, replace(odd, id="long", prompt="word " * 300)], tokenizer, 200)
    assert tokenizer.eos_token_id not in encoded.ids[:-1]
    assert dropped == ["long"]


# ---------------------------------------------------------------- states


def test_states_are_those_of_a_forward_pass(model: MultiModelWithScalarHeads, rows: list[EncodedRow]) -> None:
    some = [rows[0], rows[25], rows[7]]  # of different lengths: padded together, and one by one
    found = StateComputer(model).states(some)
    at = 0
    for row in some:
        whole = model(torch.tensor([row.ids]))
        here = slice(row.start - 1, len(row.ids) - 1)
        for number in range(3):
            mine = found.hidden[number][at : at + row.counted]
            assert mine.dtype == torch.float16
            torch.testing.assert_close(mine.float(), whole.hidden[number][0, here], rtol=2e-3, atol=2e-3)
            wanted = whole.logits[number][0, here].log_softmax(-1)
            wanted = wanted[torch.arange(row.counted), torch.tensor(row.ids[row.start :])]
            torch.testing.assert_close(found.log_p[at : at + row.counted, number], wanted, rtol=1e-4, atol=1e-4)
        at += row.counted


def test_an_expert_that_gives_no_number_is_named_with_the_row(
    model: MultiModelWithScalarHeads, rows: list[EncodedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Expert.logits
    monkeypatch.setattr(Expert, "logits", lambda self, hidden: plain(self, hidden) / (self is not model.experts[1]))
    with pytest.raises(EngineError, match=r"expert1 gives log-probabilities .* at row a-4 of a"):
        StateComputer(model).states([rows[4], rows[5]])


def test_a_cache_gives_what_the_experts_give(cache: StateCache, rows: list[EncodedRow],
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    wanted = [31, 0, 12]
    monkeypatch.setitem(TOKENS_A_PASS, "cpu", 2 * len(rows[0].ids))  # more than one pass
    kept, fresh = cache.states(wanted), DirectStates(cache.model, rows).states(wanted)
    assert kept.places == fresh.places
    torch.testing.assert_close(kept.log_p, fresh.log_p, rtol=1e-4, atol=1e-4)
    for one, other in zip(kept.hidden, fresh.hidden, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=5e-3, atol=5e-3)


def test_a_killed_cache_goes_on_after_its_last_whole_shard(cache: StateCache, rows: list[EncodedRow],
                                                          tmp_path: Path) -> None:  # fmt: skip
    again = StateCache(tmp_path, cache.model, rows, "x")
    again.fill(again.missing()[:3])
    (again.folder / "shard-0003.safetensors.tmp").write_bytes(b"half a shard")
    again.shards[1].path.write_bytes(again.shards[1].path.read_bytes()[:-10])
    heard: list[str] = []
    missing = again.missing(heard.append)
    assert missing == [1, *range(3, len(again.shards))]
    assert len(heard) == 1 and "shard-0001" in heard[0] and "computed again" in heard[0]
    added: list[int] = []
    again.fill(missing, lambda rows, tokens: added.append(rows))
    assert sum(added) == sum(len(again.shards[number].rows) for number in missing)
    assert [s.path.read_bytes() for s in again.shards] == [s.path.read_bytes() for s in cache.shards]


def test_other_rows_weights_or_lengths_are_other_states(cache: StateCache, rows: list[EncodedRow]) -> None:
    def key(some: Sequence[EncodedRow], identity: str = "x") -> str:
        return StateCache(cache.folder.parent, cache.model, some, identity).key

    assert key(rows) == cache.key
    other = {key(rows[1:]), key(rows, "y"), key([replace(rows[0], start=1), *rows[1:]])}
    assert len(other | {cache.key}) == 4


def test_a_disk_that_is_too_small_is_named_before_anything_is_computed(
    cache: StateCache, rows: list[EncodedRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = StateCache(tmp_path / "states", cache.model, rows, "x")
    assert small.bytes == bytes_of(sum(row.counted for row in rows), HIDDEN)
    monkeypatch.setattr(state_cache, "free_gb", lambda place: 0.1)
    with pytest.raises(DiskError, match=r"need 0\.00 GB more, 0\.10 GB are free.*--cache_dir.*--no_cache"):
        small.check_room(small.missing())
    assert not small.folder.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: the full disk is not tried")
def test_a_disk_that_fills_up_keeps_whole_shards(cache: StateCache, rows: list[EncodedRow], tmp_path: Path) -> None:
    full = StateCache(tmp_path, cache.model, rows, "x")
    full.folder.mkdir()
    own = f"shard-0002.safetensors.{os.uname().nodename}-{os.getpid()}.tmp"
    (full.folder / own).symlink_to("/dev/full")
    with pytest.raises(DiskError, match="shard-0002"):
        full.fill(full.missing())
    assert full.missing() == list(range(2, len(full.shards)))


def test_what_killed_processes_left_goes_and_what_others_write_stays(cache: StateCache, rows: list[EncodedRow],
                                                                    tmp_path: Path) -> None:  # fmt: skip
    again = StateCache(tmp_path, cache.model, rows, "x")
    again.folder.mkdir()
    left, now = (again.folder / f"shard-0001.safetensors.elsewhere-{pid}.tmp" for pid in (1, 2))
    for file in (left, now):
        file.write_bytes(b"half a shard")
    os.utime(left, (0, 0))
    again.fill([1])
    assert not left.exists() and now.read_bytes() == b"half a shard"
    names = sorted(file.name for file in again.folder.iterdir())
    assert names == ["about.json", "shard-0001.safetensors", now.name]


# ---------------------------------------------------------------- training


def trainer(cache: Any, model: MultiModelWithScalarHeads, folder: Path, settings: TrainSettings = QUICK,
            identity: dict[str, Any] | None = None, say: Callable[[str], None] = quiet) -> HeadTrainer:  # fmt: skip
    """A training of 34 rows, 6 held out, in `folder`."""
    folder.mkdir(exist_ok=True)
    return HeadTrainer(model, cache, cache.rows, 34, folder, settings, identity or {"seed": settings.seed}, say)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log's rows without what a clock says."""
    rows = [json.loads(line) for line in (folder / train_log.TRAIN_LOG).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]


@pytest.fixture
def unbroken(cache: StateCache, experts: list[Expert], tmp_path: Path) -> Path:
    """The folder of a training that nothing interrupted."""
    trainer(cache, start(experts), tmp_path / "unbroken").run()
    return tmp_path / "unbroken"


def start(experts: list[Expert]) -> MultiModelWithScalarHeads:
    """The same heads each time."""
    torch.manual_seed(0)
    return MultiModelWithScalarHeads(experts, fresh_heads(experts, 32))


def same(one: Path, other: Path) -> None:
    """Heads bit for bit, and every row of the log."""
    assert log_of(one) == log_of(other)
    left, right = (read_heads(folder)[1] for folder in (one, other))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Breaking:
    """A source that is interrupted, as by Ctrl-C, when it is asked for the n-th time."""

    def __init__(self, cache: StateCache, after: int) -> None:
        self.cache, self.rows, self.left = cache, cache.rows, after

    def states(self, rows: Sequence[int]) -> States:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.cache.states(rows)


def test_the_gradient_reaches_the_heads_and_nothing_else(cache: StateCache, model: MultiModelWithScalarHeads,
                                                        tmp_path: Path) -> None:  # fmt: skip
    heads = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    weights = [{name: p.clone() for name, p in expert.model.named_parameters()} for expert in model.experts]
    result = trainer(cache, model, tmp_path / "out").run()
    assert result.steps == 2 * 9
    assert not [name for name, tensor in model.heads.state_dict().items() if torch.equal(tensor, heads[name])]
    for expert, before in zip(model.experts, weights, strict=True):
        for name, parameter in expert.model.named_parameters():
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
    losses = [row["held_out"][ALL]["loss"] for row in result.history]
    assert min(losses[1:]) < losses[0] and result.best_epoch > 0


@pytest.mark.parametrize("asked", [3, 11, 14], ids=["first epoch", "second epoch", "third call for the second"])
def test_an_interrupted_training_ends_as_an_unbroken_one(
    cache: StateCache, experts: list[Expert], unbroken: Path, tmp_path: Path, asked: int
) -> None:
    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        trainer(Breaking(cache, asked), start(experts), folder).run()
    heard: list[str] = []
    result = trainer(cache, start(experts), folder, say=heard.append).run()
    assert result.resumed_from > 0 and heard[0].startswith(f"resumed at step {result.resumed_from} of 18")
    same(folder, unbroken)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    cache: StateCache, experts: list[Expert], unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        trainer(Breaking(cache, 8), start(experts), folder).run()
    newest = folder / checkpoint.NEWEST
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    heard: list[str] = []
    trainer(cache, start(experts), folder, say=heard.append).run()
    assert "its sha256 differs" in heard[0]
    same(folder, unbroken)


def test_a_full_disk_keeps_the_older_checkpoint(cache: StateCache, experts: list[Expert], unbroken: Path,
                                                tmp_path: Path) -> None:  # fmt: skip
    folder = tmp_path / "full"
    with pytest.raises(KeyboardInterrupt):
        trainer(Breaking(cache, 5), start(experts), folder).run()
    (folder / f"{checkpoint.NEWEST}.new.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="make room and run the same command again"):
        trainer(cache, start(experts), folder).run()
    assert trainer(cache, start(experts), folder).run().resumed_from == 4
    same(folder, unbroken)


@pytest.mark.parametrize("lost", ["gone", "damaged", "of another training"])
def test_best_heads_that_are_lost_come_back_from_the_checkpoint(
    cache: StateCache, experts: list[Expert], unbroken: Path, tmp_path: Path, lost: str
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(unbroken, folder)
    heads = folder / "best_model_heads.safetensors"
    if lost == "gone":
        heads.unlink()
    elif lost == "damaged":
        heads.write_bytes(heads.read_bytes()[:-1] + b"?")
    else:
        MultiModelWithScalarHeads(experts, fresh_heads(experts, 32, seed=5)).save_pretrained(folder)
    heard: list[str] = []
    result = trainer(cache, start(experts), folder, say=heard.append).run()
    assert result.saved == heads and result.resumed_from == result.steps and "written again" in heard[1]
    same(folder, unbroken)
    assert read_heads(heads)[0] == read_heads(unbroken)[0]


def test_another_training_in_the_folder_is_refused(cache: StateCache, experts: list[Expert], unbroken: Path) -> None:
    with pytest.raises(BadInputError, match=r"seed 42 -> 43.*--fresh"):
        trainer(cache, start(experts), unbroken, identity={"seed": 43})


def test_training_without_a_cache_is_the_same_but_for_rounding(cache: StateCache, experts: list[Expert],
                                                              unbroken: Path, tmp_path: Path) -> None:  # fmt: skip
    direct = DirectStates(cache.model, cache.rows)
    direct_out = tmp_path / "direct"
    trainer(direct, start(experts), direct_out).run()
    steps, other = ([row["loss"] for row in log_of(folder) if "loss" in row] for folder in (direct_out, unbroken))
    assert steps == pytest.approx(other, abs=1e-3)


def test_orders_differ_by_epoch_and_seed_and_are_whole() -> None:
    assert order_of(1, 50, 42) == order_of(1, 50, 42)
    assert len({tuple(order_of(epoch, 50, seed)) for epoch in (1, 2) for seed in (1, 2)}) == 4
    assert sorted(order_of(3, 50, 7)) == list(range(50))


def test_the_learning_rate_rises_then_falls() -> None:
    settings = TrainSettings(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate_at(step, 12, settings) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:6] == [1.0, 0.875] and rates[-1] == 0.125
    assert learning_rate_at(0, 3, TrainSettings(warmup_steps=0)) == 1e-4


def test_a_warm_up_is_half_of_a_short_training_at_most(cache: StateCache, experts: list[Expert],
                                                      tmp_path: Path) -> None:  # fmt: skip
    settings = TrainSettings(learning_rate=1.0, warmup_steps=50)
    rates = [learning_rate_at(step, 6, settings) for step in range(6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3])
    assert learning_rate_at(0, 1, settings) == 1.0
    heard: list[str] = []
    trainer(cache, start(experts), tmp_path / "out", replace(QUICK, warmup_steps=50), say=heard.append)
    assert heard == ["warm-up: 9 of 18 steps; --warmup_steps 50 is over half"]


def test_equal_scalars_measure_as_the_uniform_mixture(cache: StateCache, experts: list[Expert]) -> None:
    model = start(experts)
    for head in model.heads:
        torch.nn.init.zeros_(list(head.parameters())[-2])
        torch.nn.init.zeros_(list(head.parameters())[-1])
    numbers, places = range(len(cache.rows)), [row.counted for row in cache.rows]
    found = measure(model, cache, numbers, [row.dataset for row in cache.rows], places, 0.1)
    assert list(found) == ["a", "b", ALL]
    whole = found[ALL]
    log_p = cache.states(numbers).log_p.double()
    assert whole.tokens == len(log_p) == found["a"].tokens + found["b"].tokens
    assert whole.mixture == pytest.approx(whole.uniform) == pytest.approx(-log_p.exp().mean(-1).log().mean().item())
    assert whole.entropy == pytest.approx(torch.tensor(3.0).log().item())
    assert whole.loss == pytest.approx(whole.mixture - 0.1 * whole.entropy)
    assert whole.experts == pytest.approx((-log_p.mean(0)).tolist())
    assert whole.best_expert == pytest.approx(-log_p.max(-1).values.mean().item())


def test_weights_that_are_no_numbers_end_the_training(cache: StateCache, experts: list[Expert], tmp_path: Path) -> None:
    model = start(experts)
    list(model.heads[0].parameters())[-1].data.fill_(float("nan"))
    with pytest.raises(EngineError, match=r"step 0: the held-out loss is nan.*--learning_rate"):
        trainer(cache, model, tmp_path / "out").run()


@pytest.mark.parametrize(("every", "line"), [(1, "step 3: the loss is nan"), (1000, "step 9: the loss is nan")])
def test_heads_that_are_no_numbers_never_become_the_best(
    cache: StateCache, experts: list[Expert], tmp_path: Path, every: int, line: str
) -> None:
    model = start(experts)

    class Spoiling(Breaking):
        """The third step meets heads that are no numbers; dropout off or on, the loss is none either."""

        def states(self, rows: Sequence[int]) -> States:
            self.left -= 1
            if self.left == 0:
                list(model.heads[0].parameters())[-1].data.fill_(float("nan"))
            return self.cache.states(rows)

    folder = tmp_path / "out"
    with pytest.raises(EngineError, match=rf"{line}.*--fresh$"):
        trainer(Spoiling(cache, 4), model, folder, replace(QUICK, log_every_n_steps=every)).run()
    assert not list(folder.glob("best_model_heads*")) and len([row for row in log_of(folder) if "held_out" in row]) == 1


# ---------------------------------------------------------------- the script


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two local data sets of 30 and 24 rows."""
    for name, numbers in (("a", range(0, 60, 2)), ("b", range(1, 49, 2))):
        lines = [json.dumps(written(number)) for number in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def flags(folders: list[str], files: list[str], out: Path, *more: str) -> list[str]:
    return ["--models", *folders, "--datasets", *files, "--output_dir", str(out), "--num_epochs", "2",
            "--head_hidden_dim", "32", "--device", "cpu", *more]  # fmt: skip


def run(*arguments: str) -> int:
    return run_main(train_ensemble.main, arguments)


def test_the_seeds_flags_and_defaults() -> None:
    args = train_ensemble.parser().parse_args([])
    defaults = {"output_dir": Path("model_outputs"), "num_epochs": 5, "batch_size": 4, "learning_rate": 1e-4,
                "warmup_steps": 50, "entropy_weight": 0.1, "head_hidden_dim": 256, "head_dropout": 0.1, "seed": 42,
                "device": None, "log_every_n_steps": 5}  # fmt: skip
    assert {name: getattr(args, name) for name in defaults} == defaults


def test_the_script_trains_ends_with_the_next_command_and_shows_a_finished_run_again(
    folders: list[str], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    asked = flags(folders, files, out, "--report_to", "tensorboard")
    assert run(*asked, "--plan") == 0
    assert "MB of states" in capsys.readouterr().out and not out.exists()
    assert run(*asked) == 0
    said = capsys.readouterr().out
    assert said.startswith("experts: A ") and "24 of 30 rows are used" in said
    assert "rows: 44 to train on, 4 held out" in said and "epoch 2/2" in said
    heads = out / "best_model_heads.safetensors"
    assert f"eval_ensemble.py --model_weights {heads}" in said.splitlines()[-1]
    assert list((out / "tensorboard").glob("events*")) and read_heads(heads)[0].facts["rows"] == 44
    with monkeypatch.context() as no_model:
        no_model.setattr(MultiModelWithScalarHeads, "from_pretrained", None)  # a finished run loads no model
        assert run(*asked, "--precision", "fp32") == 0  # what it is without the flag
        assert "is finished" in capsys.readouterr().out
    heads.unlink()
    assert run(*asked) == 0
    assert "written again" in capsys.readouterr().out and read_heads(heads)[0].facts["rows"] == 44
    assert run(*asked, "--learning_rate", "1e-3") == 2
    assert "learning_rate 0.0001 -> 0.001" in capsys.readouterr().err
    out.rename(tmp_path / "out.20260101-000000")  # as a --fresh that was killed before it took the states back
    assert run(*asked, "--learning_rate", "1e-3", "--fresh") == 0
    assert "all there" in capsys.readouterr().out, "the states of a folder that was left half moved stay in use"
    assert len(list(tmp_path.glob("out.*"))) == 1 and not list(tmp_path.glob("out.*/states"))
    assert run(*asked, "--fresh") == 0
    assert "all there" in capsys.readouterr().out, "the states of the moved folder stay in use"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--datasets", "{tmp}/none.jsonl"), "none.jsonl"),
        (("--datasets", "{tmp}/empty.jsonl"), "empty.jsonl"),
        (("--max_length", "5"), "no row is left to train on"),
        (("--report_to", "wandb"), "the package wandb is not installed"),
        (("--validation_share", "1"), "not between 0 and 1"),
        (("--head_hidden_dim", "1"), "1 is not 2 or more"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(folders: list[str], files: list[str], tmp_path: Path, more: tuple[str],
                                               line: str, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "empty.jsonl").write_text("")
    try:
        code = run(*flags(folders, files, tmp_path / "out"), *(word.format(tmp=tmp_path) for word in more))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr().err
    if "wandb" in line and code == 0:
        pytest.skip("wandb is installed")
    assert code == 2 and line in said and said.count("\n") == 1


@pytest.mark.slow
def test_kill_9_while_states_are_computed_and_while_heads_are_trained(folders: list[str], files: list[str],
                                                                     tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *flags(folders, files, out, "--num_epochs", "40")]
    log = out / train_log.TRAIN_LOG

    def shards() -> int:
        return len(list(out.glob("states/*/shard-*.safetensors")))

    def kill_when(reached: Callable[[], bool]) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
        while not reached():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()

    kill_when(lambda: shards() > 2)
    kill_when(lambda: log.exists() and log.read_text().count('"event": "epoch"') > 10)
    assert run(*command[2:]) == 0
    assert run(*flags(folders, files, tmp_path / "whole", "--num_epochs", "40")) == 0
    same(out, tmp_path / "whole")


@pytest.mark.slow
def test_the_second_epoch_is_several_times_faster(tmp_path: Path) -> None:
    """Seconds by the clock on the shipped experts, the first epoch with the states it needs.

    Experts of 1.8M parameters cost little more than the heads over them: 5 to 8 times is what was measured with one
    thread, so 4 is asked for. Reading grows with the experts and a step hardly does: larger ones gain more.
    """
    if not all((folder / "model.safetensors").is_file() for folder in SHIPPED.values()):
        pytest.skip("the shipped experts are not there")
    assert run("--models", *SHIPPED, "--output_dir", str(tmp_path), "--num_epochs", "3", "--max_rows", "200") == 0
    history = json.loads((tmp_path / "summary.json").read_text())["history"]
    first = history[1]["seconds"] + history[1]["states_seconds"]
    assert first > LEAST_TIMES * history[2]["seconds"], os.linesep.join(map(str, history))
