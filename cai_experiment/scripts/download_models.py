"""Fetch models into the standard Hugging Face cache, see what lies there, check that it is whole.

Run: python cai_experiment/scripts/download_models.py                    Qwen2-1.5B-Instruct and Phi-2
     python cai_experiment/scripts/download_models.py qwen2.5-32b        presets or hub ids
     python cai_experiment/scripts/download_models.py qwen2.5-32b --quantization 4bit    the files that 4 bit loads
     python cai_experiment/scripts/download_models.py --roles conservative
     python cai_experiment/scripts/download_models.py --list             presets, their size, what is here
     python cai_experiment/scripts/download_models.py --verify           every byte against the hub's hashes

The same command goes on where one stopped: whole files are kept, a large one continues where it broke off.
Without a network what is whole here is said to be so.
Exit code 0: all is there and whole; 1: something is missing, damaged or out of reach; 2: a name that means nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_FAILURE, EXIT_OK, BadInputError, UserError
from cai_experiment.scripts._common import QUANTIZATIONS, plain_parser, run_main

if TYPE_CHECKING:
    from cai_experiment.scripts._download import Wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, list or verify; gives the exit code."""
    parser = plain_parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="presets or hub ids")
    parser.add_argument("--roles", metavar="NAME", help="both models of a configuration: single, dual, conservative")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="fetch the files that this precision loads")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show presets, sizes, and what is downloaded")
    what.add_argument("--verify", action="store_true", help="check what is downloaded (default: every known model)")
    what.add_argument("--repair", action="store_true", help="check what is here by its hashes, fetch what is damaged")
    args = parser.parse_args(argv)
    from cai_experiment.scripts import _download, _downloaded

    if args.roles and args.models:
        raise BadInputError("--roles names both models already", "leave out the names or --roles")
    names = _download.names_of(args.models, args.roles)
    if args.list:
        _downloaded.print_list(names)
        return EXIT_OK
    if args.verify:
        return EXIT_OK if _downloaded.verify(names, args.quantization) else EXIT_FAILURE
    names = names or list(_download.DOWNLOADED)
    wanted = [one for name in names for one in _download.wanted(name, args.quantization)]
    if line := _downloaded.which_files(names, args.quantization):
        print(line, flush=True)
    codes = [_try(one, args.repair) for one in wanted]  # every name meant something before the first is fetched
    return next((code for code in codes if code), EXIT_OK)


def _try(one: Wanted, repair: bool) -> int:
    """Fetch one model; a failure is its own line, and the next model is still tried."""
    from cai_experiment.scripts import _download

    try:
        _download.fetch(one, repair)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run_main(main))
