"""What can run, and what fits here: presets, machines, memory by arithmetic. Nothing is loaded or downloaded.

Run: python cai_experiment/scripts/models.py                       (all presets, and the one for this machine)
     python cai_experiment/scripts/models.py qwen2.5-7b             (one model: a preset, hub id or folder)
     python cai_experiment/scripts/models.py --fit                  (what generates and trains here, with which batch)
     python cai_experiment/scripts/models.py --fit --hardware colab_free_t4 --length 4096
     python cai_experiment/scripts/models.py --hardware             (the machines that --hardware knows)
     python cai_experiment/scripts/models.py --max-vram 15 --quantization 4bit --min-context 32000

Of a hub id that is no preset config.json alone is read. docs/ARCHITECTURE.md says where the arithmetic stands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_OK, BadInputError
from cai_experiment.models.choice import numbers_of, resolve_model
from cai_experiment.models.hardware import Hardware, detect, list_available_models, profile
from cai_experiment.models.preset import ModelPreset
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.profiles import machines
from cai_experiment.models.recommend import normal_quantization
from cai_experiment.models.tables import columns, hardware_table, preset_table, show
from cai_experiment.scripts import _models_tables as tables
from cai_experiment.scripts._common import plain_parser, positive, positive_int, run_main

LIST = ""  # --hardware without a name


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = plain_parser(__doc__)
    flags.add_argument("model", nargs="?", help="show this model alone: a preset, hub id or folder")
    flags.add_argument("--fit", action="store_true", help="what fits, for generation and for QLoRA DPO")
    flags.add_argument("--hardware", nargs="?", const=LIST, metavar="NAME",
                       help="instead of this machine; without a name: list the machines")  # fmt: skip
    flags.add_argument("--length", type=positive_int, metavar="N",
                       help=f"tokens of a row (default: {tables.ROW_TOKENS} to generate, {tables.TRAINED_TOKENS} to "
                            "train)")  # fmt: skip
    flags.add_argument("--max-vram", type=positive, metavar="GB", help="only what generates in this much")
    flags.add_argument("--quantization", help="4bit, 8bit, bf16 (fp16) or fp32 (default: the machine's)")
    flags.add_argument("--min-context", type=positive_int, metavar="N", help="only models of N tokens or more")
    flags.add_argument("--json", action="store_true", help="print JSON instead")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is asked for; gives the exit code."""
    args = parser().parse_args(argv)
    args.quantization = args.quantization and normal_quantization(args.quantization)
    hardware = profile(args.hardware) if args.hardware else detect()
    if args.model is not None:
        _one(args, described(args.model, hardware), hardware)
    elif args.hardware == LIST and not args.fit:
        _machines(args)
    else:
        _all(args, hardware)
    return EXIT_OK


def described(name: str, hardware: Hardware) -> ModelPreset:
    """The preset that `name` means, or a row like one of another model. Raises BadInputError, EngineError."""
    choice = resolve_model(name, hardware)
    if choice.preset is not None:
        return choice.preset
    from cai_experiment.models.configs import context_of

    numbers, context = numbers_of(choice), context_of(choice.path_or_id) or 0
    return ModelPreset(choice.name, choice.path_or_id, "by its template", numbers, context, "see its page",
                       "no preset: numbers by its config.json")  # fmt: skip


def chosen(args: argparse.Namespace) -> list[ModelPreset]:
    """The presets that pass --max-vram and --min-context. Raises BadInputError if none does."""
    if args.max_vram is None and args.min_context is None:
        return list(PRESETS.values())
    kept = args.quantization or "4bit"
    found = list_available_models(args.max_vram, kept, args.min_context)
    if not found:
        asked = [f"--max-vram {args.max_vram:g} in {kept}" if args.max_vram else "",
                 f"--min-context {args.min_context}" if args.min_context else ""]  # fmt: skip
        raise BadInputError(f"no preset passes {' and '.join(filter(None, asked))}", "models.py shows all")
    return found


def _one(args: argparse.Namespace, preset: ModelPreset, hardware: Hardware) -> None:
    if args.json:
        print(json.dumps(tables.facts(preset), indent=2))
        return
    print(*tables.details(preset), sep="\n")
    show(tables.memory_table(preset))
    show(tables.places_table(preset, [hardware] if args.hardware else [*machines(), hardware]))
    name = preset.key if preset.key in PRESETS else preset.hub_id
    where = f" --hardware {args.hardware}" if args.hardware else ""
    print(f"next: python cai_experiment/scripts/test_single.py --model {shlex.quote(name)} --plan{where}")


def _machines(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps([tables.machine_facts(one) for one in machines()], indent=2))
        return
    show(hardware_table(machines(), columns()))
    print("next: python cai_experiment/scripts/models.py --fit --hardware NAME")


def _all(args: argparse.Namespace, hardware: Hardware) -> None:
    """Presets, or with --fit what each comes to on a machine; then the recommendation."""
    presets = chosen(args)
    if args.json:
        rows = [tables.fit_facts(tables.fit(one, hardware, args.quantization, args.length)) if args.fit
                else tables.facts(one) for one in presets]  # fmt: skip
        print(json.dumps({"models": rows, "recommended": tables.recommended(hardware)}, indent=2))
        return
    if args.fit:
        found = [tables.fit(one, hardware, args.quantization, args.length) for one in presets]
        show(tables.fit_table(found, hardware, args.length))
    else:
        show(preset_table(presets, columns()))
    print(*tables.recommendation_lines(hardware, args.hardware), sep="\n")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
