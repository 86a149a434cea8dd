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
from cai_experiment.models.recommend import LENGTHS, ROW_TOKENS, normal_quantization
from cai_experiment.models.tables import broken, columns, hardware_table, preset_table, show
from cai_experiment.scripts import _models_fit as fits
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
                       help=f"tokens of a row, with --fit or a model (default: {ROW_TOKENS} to generate, to train what "
                            f"fits, up to {LENGTHS[0]})")  # fmt: skip
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
    check(args)
    if args.model is not None:
        preset = described(args.model, hardware)
        if args.length and preset.context and args.length > preset.context:
            raise BadInputError(f"--length {args.length}: the context of {preset.key} is {preset.context:,} tokens")
        _one(args, preset, hardware)
    elif args.hardware == LIST and not args.fit:
        _machines(args)
    else:
        _all(args, hardware)
    return EXIT_OK


def check(args: argparse.Namespace) -> None:
    """Raises BadInputError for flags that would change nothing."""
    if args.model is not None:
        filters = [f for f, v in (("--max-vram", args.max_vram), ("--min-context", args.min_context)) if v is not None]
        if filters:
            raise BadInputError(f"{filters[0]} chooses from the list of presets", "leave it out, or the model")
    elif args.length and not args.fit:
        raise BadInputError("--length changes what fits", "give it with --fit or a model")
    elif args.quantization and not args.fit and args.max_vram is None:
        raise BadInputError("--quantization changes what fits", "give it with --fit, --max-vram or a model")


def described(name: str, hardware: Hardware) -> ModelPreset:
    """The preset that `name` means, or a row like one of another model. Raises BadInputError, EngineError."""
    if not name.strip():
        raise BadInputError("the model's name is empty", "give a preset, a hub id or a folder")
    choice = resolve_model(name, hardware, "")
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
    """One model: with --fit the machine's line alone, else all that is known of it and where it fits."""
    if args.fit:
        _fit(args, [preset], hardware)
    elif args.json:
        print(json.dumps(fits.facts(preset), indent=2))
    else:
        print(*(broken(line, columns(), tables.NAMES) for line in tables.details(preset)), sep="\n")
        show(tables.memory_table(preset, args.length))
        where = [hardware] if args.hardware else [*machines(), hardware]
        found = [(one, fits.fit(preset, one, args.quantization, args.length)) for one in where]
        show(tables.places_table(preset, found, args.length))
    if not args.json:
        name = preset.key if preset.key in PRESETS else preset.hub_id
        at = f" --hardware {args.hardware}" if args.hardware else ""
        print(f"next: python cai_experiment/scripts/test_single.py --model {shlex.quote(name)} --plan{at}")


def _fit(args: argparse.Namespace, presets: Sequence[ModelPreset], hardware: Hardware) -> None:
    """What each comes to on a machine."""
    found = [fits.fit(one, hardware, args.quantization, args.length) for one in presets]
    if args.json:
        rows = [fits.fit_facts(one) for one in found]
        print(json.dumps({"models": rows, "recommended": fits.recommended(hardware)}, indent=2))
    else:
        show(tables.fit_table(found, hardware, args.length))


def _machines(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps([fits.machine_facts(one) for one in machines()], indent=2))
        return
    show(hardware_table(machines(), columns()))
    print("next: python cai_experiment/scripts/models.py --fit --hardware NAME")


def _all(args: argparse.Namespace, hardware: Hardware) -> None:
    """Presets, or with --fit what each comes to on a machine; then the recommendation."""
    presets = chosen(args)
    if args.fit:
        _fit(args, presets, hardware)
    elif args.json:
        rows = [fits.facts(one) for one in presets]
        print(json.dumps({"models": rows, "recommended": fits.recommended(hardware)}, indent=2))
    else:
        show(preset_table(presets, columns()))
    if not args.json:
        print(*tables.recommendation_lines(hardware, args.hardware), sep="\n")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
