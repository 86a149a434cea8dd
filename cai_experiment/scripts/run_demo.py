"""The demo in the browser: evaluate a text, train, and see base and trained answers beside each other.

python cai_experiment/scripts/run_demo.py
python cai_experiment/scripts/run_demo.py --model qwen2-1.5b-instruct --port 7861

It is served on 127.0.0.1 alone and needs no network; the shipped model is there from the start. Ctrl-C ends it. A
training is a process of its own and goes on; the demo, started again, shows it. On a pod: `ssh -L 7860:127.0.0.1:7860`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Sequence

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_CTRL_C, EXIT_OK, EngineError
from cai_experiment.milestones import CHECKPOINT_DIR, DATA_DIR
from cai_experiment.scripts._common import ROOT, plain_parser, positive_int, run_main

HOST = "127.0.0.1"
PORT = 7860
SECONDS_TO_CLOSE = 3.0  # a model that is being loaded or speaks is not waited for


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = plain_parser(__doc__)
    parser.add_argument("--port", type=positive_int, default=PORT, help="(default: %(default)s)")
    parser.add_argument("--share", action="store_true",
                        help="open a public link through Gradio's servers: anyone who has it can use this machine's "
                             "models and start trainings; needs the internet (default: off)")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="where runs are kept: DATA_DIR/NAME")
    parser.add_argument("--checkpoint-dir", type=Path, default=CHECKPOINT_DIR, help="adapters: CHECKPOINT_DIR/NAME")
    parser.add_argument("--constitution", type=Path, default=ROOT / "constitution.yaml", metavar="FILE")
    parser.add_argument("--model", help="the first model: preset, hub id or folder (default: the shipped one)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check_port(port: int) -> None:
    """Raises EngineError, one line with the next command, where the port is taken or not allowed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            other = port + 1 if port < 65535 else PORT + 1
            raise EngineError(f"port {port} of {HOST}: {why}", f"try --port {other}") from error


def where(port: int) -> str:
    """The line that says where the demo is, and on a pod how to reach it."""
    from cai_experiment.models.hardware import on_pod

    line = f"demo on http://{HOST}:{port} (Ctrl-C ends it)"
    if not on_pod():
        return line
    there = os.environ.get("RUNPOD_PUBLIC_IP", "POD_IP")
    ssh = f"ssh -L {port}:{HOST}:{port} -p {os.environ.get('RUNPOD_TCP_PORT_22', 'SSH_PORT')} root@{there}"
    return f"{line}; from your own machine first: {ssh}"


def serve(args: argparse.Namespace) -> None:
    """Serve until a signal raises KeyboardInterrupt."""
    from cai_experiment.demo import app
    from cai_experiment.demo.actions import Actions
    from cai_experiment.demo.settings import EXPORTS, DemoSettings

    settings = DemoSettings(
        args.data_dir, args.checkpoint_dir, args.constitution, args.model, args.seed, args.verbosity,
        exports=args.data_dir / EXPORTS.name,
    )  # fmt: skip
    actions = Actions(settings, say=lambda line: print(line, flush=True))
    try:
        address = app.launch(app.build(actions), args.port, args.share, settings.exports)
        print(where(args.port), flush=True)
        if args.share:
            print(f"public link, open to anyone who has it: {address}", flush=True)
        actions.start()  # after the page, which comes first
        threading.Event().wait()
    finally:
        closing = threading.Thread(target=actions.close, daemon=True)
        closing.start()
        closing.join(SECONDS_TO_CLOSE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    args = make_parser().parse_args(argv)
    check_port(args.port)
    if args.share:
        print("--share opens a public link: anyone who has it can use this demo; it needs the internet", flush=True)
    offered = tempfile.mkdtemp(prefix=f"cai-demo-{os.getpid()}-")  # copies of exports, and uploads until they are read
    os.environ |= {"GRADIO_TEMP_DIR": offered, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    code = EXIT_OK
    try:
        serve(args)
    except KeyboardInterrupt as stop:
        print("demo ended; a running training goes on: start the demo again to see it", flush=True)
        code = int(getattr(stop, "exit_code", EXIT_CTRL_C))
    finally:
        shutil.rmtree(offered, ignore_errors=True)
    os._exit(code)  # a thread that loads or speaks would be waited for; all logs are whole at any instant


if __name__ == "__main__":
    sys.exit(run_main(main))
