"""Export a trained model: merged weights, an adapter for vLLM, or GGUF; checked against the adapter model.

python cai_experiment/scripts/export_model.py --run mvp --to merged
python cai_experiment/scripts/export_model.py --run mvp --to adapter
python cai_experiment/scripts/export_model.py --run mvp --to gguf --llama-cpp ~/llama.cpp
python cai_experiment/scripts/export_model.py --run mvp --to merged --push me/my-model --dry-run

Reads CHECKPOINT_DIR/NAME/final (after SFT alone sft/final; or --checkpoint), writes CHECKPOINT_DIR/NAME/merged, adapter
or gguf (or --out). The export's logits and greedy text on 20 prompts are held against base + adapter; if they differ,
nothing is published (exit code 1). --push uploads the export to the hub with its model card, private unless --public is
given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.models.presets import PRESETS
from cai_experiment.records.files import show
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._common import base_parser, run_main

TYPES = ("bf16", "fp16", "fp32", "q8_0")  # of training.gguf, which is heavy to import


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = base_parser(__doc__, "mvp", plans=False)
    group = parser.add_argument_group("export")
    group.add_argument("--to", choices=("merged", "adapter", "gguf"), required=True, help="what to make")
    group.add_argument("--checkpoint", metavar="NAME", help="a checkpoint-N of the run instead of final")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="write here (default: CHECKPOINT_DIR/NAME/TO)")
    group.add_argument("--dtype", choices=TYPES, help="default: that of the base's files; q8_0: GGUF only")
    group.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="a llama.cpp checkout (default: $LLAMA_CPP)")
    group.add_argument("--push", metavar="OWNER/NAME", help="upload the export to the hub (HF_TOKEN)")
    group.add_argument("--public", action="store_true", help="with --push: a public repository")
    group.add_argument("--dry-run", action="store_true", help="with --push: list what would be sent, send nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export, check, publish and, if asked, upload; gives the exit code."""
    args = make_parser().parse_args(argv)
    check_flags(args)
    from cai_experiment.training.export import hub
    from cai_experiment.training.export.source import find_source

    if args.push:
        hub.check_name(args.push)
    source = find_source(args.checkpoint_dir / args.run, args.checkpoint)
    folder = args.checkpoint_dir / args.run
    out = args.out or folder / f"{args.to}{source.suffix}"
    with RunFolder(folder):  # nobody trains into it, or moves it, meanwhile
        record = export(args, source, out)
    print(f"{args.to} in {show(out)}")
    if "serve" in record:
        print(f"serve it with: {record['serve']}")
    if args.push:
        print(*hub.listing(out), sep="\n")
        sent = "" if args.dry_run else hub.push(out, args.push, args.public)
        print(sent or f"nothing sent; the card is {show(out / 'README.md')}")
    return EXIT_OK


def check_flags(args: argparse.Namespace) -> None:
    """Raise BadInputError for flags that do not go together; nothing is imported or loaded for it."""
    if (args.public or args.dry_run) and not args.push:
        raise BadInputError(f"{'--public' if args.public else '--dry-run'} is for --push", "add --push OWNER/NAME")
    if args.dtype == "q8_0" and args.to != "gguf":
        raise BadInputError("--dtype q8_0 is a GGUF type", "use --to gguf, or another --dtype")
    if args.dtype and args.to == "adapter":
        raise BadInputError("--dtype does not change an adapter: its tensors stay as trained", "leave it out")
    if args.random_weights is not None and args.random_weights not in PRESETS:
        raise BadInputError(f"--random-weights {args.random_weights} is no preset", f"known: {', '.join(PRESETS)}")


def export(args: argparse.Namespace, source: Any, out: Path) -> dict[str, Any]:
    """Make the export at `out`, or with --push use the one that is there; gives its record."""
    from cai_experiment.training.export import answers as export_answers
    from cai_experiment.training.export import gguf, publish
    from cai_experiment.training.export import source as sources
    from cai_experiment.training.export.model_card import card_maker

    if args.random_weights:
        sources.check_random(source, args.random_weights)
    choice = None if args.random_weights else sources.choose_base(source, args.model)
    revision = None if choice is None else sources.revision_of(source, choice)
    seed = int(source.settings.get("seed", args.seed))
    if (found := whole_export(args, source, out, sources.facts_of(choice, seed, revision))) is not None:
        return found
    converter = gguf.converter_in(args.llama_cpp) if args.to == "gguf" else None
    run, data = args.checkpoint_dir / args.run, args.data_dir / args.run
    with sources.base_files(choice, args.random_weights, seed, run, args.to != "adapter", revision) as base:
        print(f"{show(source.folder)} on {base.name} ({base.place})", flush=True)
        layout = args.format if args.format != "auto" else source.model[2]
        prompts = export_answers.prompts_of(base, sources.instructions_of(data / "pairs.jsonl", seed), layout)
        job = publish.Job(source, base, prompts, card_maker(source, base.licence, data))
        if args.to == "adapter":
            return publish.export_adapter(job, out, args.quantization)
        if converter is None:
            return publish.export_merged(job, out, args.dtype)
        merged = gguf.merged_at(job, run / f"merged{source.suffix}")
        return gguf.export_gguf(job, merged, out, converter, args.dtype)


def whole_export(args: argparse.Namespace, source: Any, out: Path, base: dict[str, Any]) -> dict[str, Any] | None:
    """With --push the record of the export at `out`, if it is the one asked for; None if nothing stands there.

    --fresh moves away what does; else BadInputError. `base` holds the facts of the base's that are known.
    """
    from cai_experiment.training.export import publish

    if out.exists() and args.fresh:
        print(f"moved {show(out)} to {publish.move_aside(out).name}")
    if not out.exists():
        return None
    wanted = {"kind": args.to, **({"dtype": args.dtype} if args.dtype else {}), **base}
    if args.push and (found := publish.already(out, source.folder, wanted)) is not None:
        return found
    what = f"is there already{', and is not the export asked for' if args.push else ''}"
    raise BadInputError(f"{show(out)} {what}", "add --fresh to move it aside, or name another --out")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
