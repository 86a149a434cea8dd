"""The demo's trainings: real runs of the shipped model in child processes, stopped, killed, adopted, resumed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cai_experiment.demo import chain as chain_module
from cai_experiment.demo.chain import Chain
from cai_experiment.demo.settings import DemoSettings
from cai_experiment.demo.training_job import JOB, Job, is_alive, last_holder, start_time, take_lock
from cai_experiment.demo.training_view import Growing, TrainingView
from cai_experiment.demo.trainings import Trainings, TrainingState, label
from cai_experiment.errors import BadInputError

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = 3
SLOWEST = 240.0  # seconds to wait for what takes some 15


class Models:
    """Stands for demo.models.Models, of which a training asks nothing but room."""

    def __init__(self) -> None:
        self.made_room = self.came_back = 0

    def make_room(self) -> None:
        self.made_room += 1

    def come_back(self) -> None:
        self.came_back += 1


@pytest.fixture
def settings(tmp_path: Path) -> DemoSettings:
    return DemoSettings(data_dir=tmp_path / "data", checkpoint_dir=tmp_path / "adapters", exports=tmp_path / "exports")


@pytest.fixture
def trainings(settings: DemoSettings) -> Trainings:
    return Trainings(settings, Models())


def until(what: Callable[[TrainingState], bool], trainings: Trainings) -> TrainingState:
    """The first state for which `what` is true."""
    end = time.monotonic() + SLOWEST
    while not what(state := trainings.state()):
        assert time.monotonic() < end, state
        time.sleep(0.05)
    return state


def job_of(settings: DemoSettings, run: str) -> Job:
    return Job.read(settings.data_dir.absolute() / run / JOB)


def script_of(settings: DemoSettings, run: str) -> tuple[int, str]:
    """(id, start time) of the script at work, once there is one."""
    end = time.monotonic() + SLOWEST
    while (script := job_of(settings, run).script) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return script


def journal_lines(settings: DemoSettings, run: str) -> int:
    journal = settings.data_dir / run / "journal.jsonl"
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


def start_and_vanish(settings: DemoSettings) -> str:
    """Start a training from a server that ends at once; gives what it said."""
    code = (
        "from pathlib import Path; from types import SimpleNamespace as N; import os, sys\n"
        "from cai_experiment.demo.settings import DemoSettings; from cai_experiment.demo.trainings import Trainings\n"
        "settings = DemoSettings(data_dir=Path(sys.argv[1]), checkpoint_dir=Path(sys.argv[2]))\n"
        "models = N(make_room=lambda: None, come_back=lambda: None)\n"
        f"print(Trainings(settings, models).start({EXAMPLES}, 1), flush=True); os._exit(0)\n"
    )
    command = [sys.executable, "-c", code, str(settings.data_dir), str(settings.checkpoint_dir)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def begin_unbroken(settings: DemoSettings, tmp_path: Path) -> subprocess.Popen[bytes]:
    """The generation of the same pairs by the script alone, beside."""
    command = [sys.executable, "cai_experiment/scripts/generate_mvp.py", "--run", "unbroken", "--model", "nano",
               "--count", str(EXAMPLES), "--data-dir", str(tmp_path / "unbroken"), "-v", "0"]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_a_training_survives_its_server_is_stopped_and_resumes_to_the_same_pairs(
    settings: DemoSettings, trainings: Trainings, tmp_path: Path, nano_dir: Path
) -> None:
    unbroken = begin_unbroken(settings, tmp_path)
    assert start_and_vanish(settings).startswith(f"demo-custom has begun: {EXAMPLES} examples, 1 epoch, about")
    state = trainings.state()  # another server over the same folder: adopts it
    assert (state.run, state.stage, state.can_stop, state.can_resume) == ("demo-custom", "generating", True, False)
    assert trainings.running() == "demo-custom"
    with pytest.raises(BadInputError, match=r"a training is running on this machine: demo-custom, since \d{4}-"):
        trainings.start(1, 1)
    with pytest.raises(BadInputError, match="demo-custom, since"):
        trainings.resume("demo-custom")
    assert [path.name for path in settings.data_dir.iterdir() if path.is_dir()] == ["demo-custom"]  # no trace of it

    until(lambda state: journal_lines(settings, "demo-custom") > 30, trainings)
    holder, script = last_holder(settings.data_dir)[0], script_of(settings, "demo-custom")
    assert holder is not None and trainings.stop().startswith("demo-custom is stopping")
    state = until(lambda state: state.stage == "stopped", trainings)
    assert not is_alive(*script)
    until(lambda state: not is_alive(holder.pid, holder.started), trainings)
    assert state.can_resume and not state.can_stop and 0 < state.fraction < 1
    command = f"python cai_experiment/scripts/generate_mvp.py --run demo-custom --count {EXAMPLES} --model nano"
    assert command in state.line and trainings.runs_to_resume() == ["demo-custom"]

    done = journal_lines(settings, "demo-custom")
    assert "goes on: making pairs" in trainings.resume("demo-custom")
    state = until(lambda state: state.stage == "training", trainings)
    pairs = settings.data_dir / "demo-custom" / "pairs.jsonl"
    kept = pairs.read_bytes()
    assert unbroken.wait() in (0, 3) and kept == (tmp_path / "unbroken/unbroken/pairs.jsonl").read_bytes()
    assert journal_lines(settings, "demo-custom") > done
    seen = [until(lambda state: state.stage not in ("generating", "training") or state.done > 0, trainings)]
    seen.append(until(lambda state: state.stage not in ("generating", "training"), trainings))
    check_finished(settings, trainings, seen[-1])
    assert [one.fraction for one in seen] == sorted(one.fraction for one in seen) and pairs.read_bytes() == kept


def check_finished(settings: DemoSettings, trainings: Trainings, state: TrainingState) -> None:
    """What a finished training leaves and says."""
    assert (state.stage, state.fraction, state.can_stop, state.can_resume) == ("finished", 1.0, False, False), state
    assert "loss 0.6931 -> 0." in state.line and (settings.checkpoint_dir / state.run / "final").is_dir()
    assert state.total == state.done == 1 and not trainings.runs_to_resume()
    assert f"{EXAMPLES} pairs." in state.pairs_html and "cai-diff" in state.pairs_html
    assert "[TRAINING-EXAMPLE" in trainings.state(3).log_html and "Metadata:" in trainings.state(3).log_html
    assert "Metadata:" not in trainings.state(2).log_html and "[TRAINING" not in trainings.state(0).log_html
    assert "Quick Demo (2 epochs, 20 examples, ~" in trainings.label("quick")  # by this run's speed now
    with pytest.raises(BadInputError, match="demo-custom is finished"):
        trainings.resume("demo-custom")


# ---------------------------------------------------------------- how a training ends otherwise


def test_a_killed_child_takes_its_script_along_and_is_seen(settings: DemoSettings, trainings: Trainings) -> None:
    assert trainings.models.made_room == 0  # type: ignore[attr-defined]
    trainings.start(EXAMPLES, 1, "quick")
    assert trainings.models.made_room == 1  # type: ignore[attr-defined]
    script, (holder, _) = script_of(settings, "demo-quick"), last_holder(settings.data_dir)
    assert holder is not None and is_alive(*script)
    os.kill(holder.pid, signal.SIGKILL)
    state = until(lambda state: state.stage == "stopped", trainings)
    assert "its process is gone" in state.line and state.can_resume and not is_alive(*script)
    assert trainings.running() == ""
    with pytest.raises(BadInputError, match="no training is running"):
        trainings.stop()


def test_a_killed_script_is_a_failure_that_can_be_resumed(settings: DemoSettings, trainings: Trainings) -> None:
    trainings.start(EXAMPLES, 1, "quick")
    os.kill(script_of(settings, "demo-quick")[0], signal.SIGKILL)
    state = until(lambda state: state.stage == "failed", trainings)
    assert "generate_mvp.py: it was killed" in state.line and trainings.runs_to_resume() == ["demo-quick"]
    trainings.resume("demo-quick")
    script_of(settings, "demo-quick")
    trainings.stop()
    until(lambda state: state.stage == "stopped", trainings)
    assert trainings.start(EXAMPLES, 1, "quick").startswith("demo-quick-2 has begun")  # and the other one is kept
    script_of(settings, "demo-quick-2")
    trainings.stop()
    until(lambda state: state.stage == "stopped" and state.run == "demo-quick-2", trainings)
    assert trainings.runs_to_resume() == ["demo-quick-2", "demo-quick"]


def test_a_failure_is_told_by_the_script_s_last_line(settings: DemoSettings, trainings: Trainings) -> None:
    assert "about" not in trainings.start(5, 2, generator="no-such-model")  # nothing is known of its speed
    state = until(lambda state: state.stage == "failed", trainings)
    assert "generate_mvp.py: --model no-such-model: unknown preset" in state.line and state.can_resume
    command = shlex.split(state.line.partition("in a terminal: ")[2])
    assert command[:6] == ["python", "cai_experiment/scripts/generate_mvp.py", "--run", "demo-custom", "--count", "5"]
    assert subprocess.run([sys.executable, *command[1:], "--plan"], cwd=ROOT, capture_output=True).returncode == 2


@pytest.mark.parametrize(
    ("examples", "epochs", "said"),
    [
        (0, 1, "examples: 0 is not a whole number from 1 to 5,000"), (5001, 1, "examples: 5001"),
        (2.5, 1, "examples: 2.5"), (1, 21, "epochs: 21 is not a whole number from 1 to 20"), (1, None, "epochs: None"),
        (float("nan"), 1, "nan"),
    ],
)  # fmt: skip
def test_numbers_out_of_bounds_start_nothing(trainings: Trainings, examples: int, epochs: int, said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        trainings.start(examples, epochs)
    assert trainings.state().stage == "none" and not trainings.settings.data_dir.exists()


def test_names_lead_nowhere_else(trainings: Trainings) -> None:
    for name in ("../x", "", "a/b", "A b"):
        with pytest.raises(BadInputError, match="small letters"):
            trainings.start(1, 1, name)
    with pytest.raises(BadInputError, match="is no training of the demo"):
        trainings.resume("../demo-quick")


# ---------------------------------------------------------------- the parts


def chain_over(tmp_path: Path, body: str) -> tuple[Chain, str]:
    """A chain, and a stand-in for a script: what `body` does."""
    job = Job("demo-x", "custom", 1, 1, "nano", "nano", str(tmp_path), str(tmp_path), "constitution.yaml")
    job.folder.mkdir()
    lock = take_lock(tmp_path)
    assert lock is not None
    script = tmp_path / "script.py"
    script.write_text(f"import os, signal, subprocess, sys, time\nfolder = {str(tmp_path)!r}\n{body}\n")
    return Chain(job, lock), str(script)


def test_what_a_killed_script_leaves_behind_is_ended(tmp_path: Path) -> None:
    body = (
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "open(folder + '/left', 'w').write(str(left.pid)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    chain, script = chain_over(tmp_path, body)
    assert chain._run([script]) == -signal.SIGKILL
    left = int((tmp_path / "left").read_text())
    end = time.monotonic() + SLOWEST
    while start_time(left):
        assert time.monotonic() < end


def test_a_script_that_hears_no_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "STOP_SECONDS", 0.3)
    chain, script = chain_over(
        tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(folder + '/deaf', 'w'); time.sleep(1000)"
    )

    def stop_when_deaf() -> None:
        while not (tmp_path / "deaf").exists():
            time.sleep(0.01)
        chain.note(signal.SIGTERM, None)

    threading.Thread(target=stop_when_deaf).start()
    assert chain._run([script]) == -signal.SIGKILL
    assert chain.job.stopping and chain.sent == 1


def test_a_stop_between_the_parts_starts_nothing_more(tmp_path: Path) -> None:
    chain, _ = chain_over(tmp_path, "")
    chain.note(signal.SIGTERM, None)
    chain.job.generated = True
    assert chain.work() == 143
    assert (chain.job.stage, chain.job.calls) == ("stopped", {})


def test_the_lock_is_one_and_goes_with_its_process(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    assert lock is not None and take_lock(tmp_path) is None and last_holder(tmp_path) == (None, True)
    os.close(lock)
    assert last_holder(tmp_path) == (None, False)


def test_a_process_is_known_by_its_start_not_by_its_id() -> None:
    mine = start_time(os.getpid())
    assert mine and is_alive(os.getpid(), mine) and not is_alive(os.getpid(), mine + "0") and not is_alive(0, "")
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) == ""  # it has ended, and waits to be reaped
    child.wait()


def test_labels_say_about_how_long() -> None:
    assert label("quick", 41) == "Quick Demo (2 epochs, 20 examples, ~1 min)"
    assert label("standard", 1230) == "Standard (5 epochs, 50 examples, ~20 min)"
    assert label("standard", 3 * 3600) == "Standard (5 epochs, 50 examples, ~3 hours)"
    assert label("standard") == "Standard (5 epochs, 50 examples)"


def test_two_models_are_both_named(trainings: Trainings, settings: DemoSettings, tmp_path: Path) -> None:
    job = Job("demo-x", "custom", 3, 2, "phi-2", "qwen2-1.5b-instruct", "d", "c", str(settings.constitution), 7)
    assert " ".join(job.generate()[5:9]) == "--generator phi-2 --critic qwen2-1.5b-instruct"
    assert "--model phi-2" in " ".join(job.train()) and job.train()[-2:] == ["--seed", "7"]
    assert "--model phi-2" in " ".join(replace(job, critic="phi-2").generate())
    assert "train_dpo.py" in replace(job, generated=True).command() and "generate_mvp.py" in job.command()


def test_a_growing_file_is_read_once_and_a_line_that_is_being_written_not_yet(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    growing, last = Growing(path), Growing(path, last=6)
    assert growing.look() == ([], False)
    path.write_bytes(b"one\ntwo\nthr")
    assert growing.look() == ([b"one", b"two"], False) and last.look() == ([], False)
    path.write_bytes(b"one\ntwo\nthree\n")
    assert growing.look() == last.look() == ([b"three"], False) and growing.look() == ([], False)
    path.write_bytes(b"new\n")
    assert growing.look() == ([b"new"], True)


def test_a_view_shows_hostile_texts_as_text_and_draws_both_measures(tmp_path: Path) -> None:
    data, adapters = tmp_path / "data", tmp_path / "adapters"
    data.mkdir()
    adapters.mkdir()
    view = TrainingView(data, adapters)
    view.refresh()
    assert view.plot_html() == "" and "No pair yet" in view.pairs_html() and "cai-note" in view.log_html(2)
    evil = "<script>alert(1)</script> \x1b[31m \u202e [x](http://x) " + "long " * 20_000
    pair = {"instruction": evil, "principle": evil, "preference_pair": {"chosen": evil, "rejected": "no"}}
    (data / "pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    entry = {"stage": "EVAL-INPUT", "content": evil, "metadata": {"x": evil}, "timestamp": 0}
    (data / "content_log.jsonl").write_text(json.dumps(entry) + "\nno JSON\n[]\n", encoding="utf-8")
    rows = [{"step": n, "loss": 0.7 - n / 100, "margin": n / 10, "tokens": 9, "seconds": 1.0} for n in range(1, 4)]
    (adapters / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.monotonic()
    view.refresh()
    shown = view.pairs_html() + view.log_html(3)
    assert time.monotonic() - began < 2 and len(shown) < 200_000
    assert "<script" not in shown and "&lt;script&gt;" in shown and "\x1b" not in shown and "\u202e" not in shown
    plot = view.plot_html(wait=True)
    assert plot.count("<svg") == 2 and 'aria-label="Loss over 3 steps"' in plot and "currentColor" in plot
    assert view.plot_html() is plot  # drawn once


@pytest.mark.slow
def test_training_killed_between_its_steps_goes_on_where_it_was(
    settings: DemoSettings, trainings: Trainings, nano_dir: Path
) -> None:
    trainings.start(12, 6)
    state = until(lambda state: state.stage == "training" and state.done >= 3, trainings)
    holder = last_holder(settings.data_dir)[0]
    assert holder is not None and state.total == 12
    os.kill(holder.pid, signal.SIGKILL)
    before = until(lambda state: state.stage == "stopped", trainings)
    assert before.done >= 3
    assert "goes on: training" in trainings.resume("demo-custom")
    script = script_of(settings, "demo-custom")
    until(lambda state: state.done > before.done, trainings)
    os.kill(script[0], signal.SIGKILL)
    assert "train_dpo.py: it was killed" in until(lambda state: state.stage == "failed", trainings).line
    trainings.resume("demo-custom")
    state = until(lambda state: state.stage not in ("generating", "training"), trainings)
    assert (state.stage, state.done, state.total) == ("finished", 12, 12) and state.plot_html.count("<svg") == 2
    steps = [json.loads(line)["step"] for line in (settings.checkpoint_dir / state.run / "metrics.jsonl").open()]
    assert steps == list(range(1, 13))
    shutil.rmtree(settings.data_dir / state.run)
    assert trainings.state().stage == "none"
