"""Is this machine ready? Python, GPU, memory, disk, model, token, versions, and what to run next.

Run: python cai_experiment/scripts/doctor.py

Exit code 0: ready; 1: something marked FAIL must be mended first.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_FAILURE, EXIT_OK
from cai_experiment.models.choice import ModelChoice, qlora_need_gb, resolve_model
from cai_experiment.models.disk import checkpoints_gb, downloaded_gb, hf_home, hub_cache, room
from cai_experiment.models.hardware import Hardware, detect, driver_problem, on_pod
from cai_experiment.models.presets import NANO_DIR
from cai_experiment.models.serving import auto_engine, disk_refusal, missing_gb
from cai_experiment.scripts._common import ROOT, base_parser, run_main

OK, WARN, FAIL = "ok", "warn", "FAIL"
SMALL_OUTPUT_GB = 1.0  # journals, pairs and reports; all that the shipped model writes


class Row(NamedTuple):
    """One line of the table."""

    what: str
    value: str
    state: str = OK


def python_row() -> Row:
    """The interpreter; other versions than 3.11 and 3.12 fail."""
    good = sys.version_info[:2] in ((3, 11), (3, 12))
    version = ".".join(map(str, sys.version_info[:3]))
    return Row("Python", f"{version}  {sys.prefix}", OK if good else FAIL)


def gpu_row(hardware: Hardware) -> Row:
    """GPU, its memory, and whether the driver can run the pinned torch."""
    if hardware.kind != "cuda":
        return Row("GPU", hardware.gpu_name or "none: everything runs on the CPU with the shipped model")
    if problem := driver_problem():
        return Row("GPU", problem, FAIL)
    cuda = hardware.cuda_version or "unknown"
    return Row("GPU", f"{hardware.gpu_name}, {hardware.vram_gb:g} GB, driver serves CUDA {cuda}")


def model_rows(choice: ModelChoice, hardware: Hardware) -> Iterator[Row]:
    """The model that scripts will choose, and whether its weights and its training fit."""
    yield Row("model", f"{choice.name}: {choice.reason}")
    if choice.path_or_id == str(NANO_DIR) and not (NANO_DIR / "model.safetensors").is_file():
        yield Row("weights", f"{NANO_DIR} has no model.safetensors: git pull, or scripts/train_nano.py", FAIL)
    elif choice.preset is not None and hardware.kind == "cuda":
        need = qlora_need_gb(choice.preset)
        text = f"4-bit training takes about {need:.0f} GB of {hardware.vram_gb:g} GB"
        yield Row("weights", text, OK if need <= hardware.vram_gb else FAIL)


def disk_rows(data_dir: Path, choice: ModelChoice, hardware: Hardware) -> Iterator[Row]:
    """Room for outputs and for the weights still to be downloaded (GB = 10^9 bytes), for both ways of generating.

    M0 and M1 load 4-bit weights; M2 and M3 generate by vLLM from 16-bit ones where they fit, M3's guard follows, and
    training takes the 4-bit ones. Where the 16-bit ones do not fit, `--engine auto` does without: that is no failure.
    """
    if choice.preset is None or choice.preset.is_local:
        yield _room("disk", [(data_dir, SMALL_OUTPUT_GB)], {"outputs": SMALL_OUTPUT_GB}, FAIL)
        return
    from cai_experiment.engines.guard_models import LLAMA_GUARD

    whole, four_bit = missing_gb(choice, "bf16"), missing_gb(choice, "4bit")
    output = checkpoints_gb(choice.preset.architecture) + SMALL_OUTPUT_GB
    if hardware.kind != "cuda":
        needs = {"weights": whole, "checkpoints and data": output}
        yield _room("disk", [(hub_cache(), whole), (data_dir, output)], needs, FAIL)
        return
    # of a model that has no 4-bit files the 16-bit ones are quantised while loading
    outputs, quantised = {"checkpoints and data": output}, {"4-bit weights": four_bit} if choice.preset.four_bit else {}
    first = quantised or {"weights": whole}
    yield _room("disk M0-1", [(hub_cache(), sum(first.values())), (data_dir, output)], first | outputs, FAIL)
    guard = max(0.0, LLAMA_GUARD.download_gb - downloaded_gb(LLAMA_GUARD.hub_id))
    needs = {"bf16 weights for vLLM": whole, "M3's guard": guard, **quantised}
    row = _room("disk M2-3", [(hub_cache(), sum(needs.values())), (data_dir, output)], needs | outputs, WARN)
    refused = disk_refusal(choice, "bf16")
    way = "generation takes the 4-bit weights" if refused else "vLLM's fit alone: make room before guard and training"
    yield row if row.state == OK else row._replace(value=f"{row.value}; {way}")


def _room(name: str, disks: Sequence[tuple[Path, float]], needs: Mapping[str, float], otherwise: str) -> Row:
    """One line: what is needed, what is free, whether it fits; the state is `otherwise` if it does not."""
    rooms = room(disks)
    fits = all(free >= need for _, need, free in rooms)
    what = " + ".join(f"{gb:.0f} {name}" for name, gb in needs.items())
    free = ", ".join(f"{free:.0f} GB free at {place}" for place, _, free in rooms)
    return Row(name, f"{free}; {what}: {'fits' if fits else 'DOES NOT FIT'}", OK if fits else otherwise)


def engine_rows(choice: ModelChoice, hardware: Hardware) -> Iterator[Row]:
    """The engine that `--engine auto` takes, and why: for one load that trains as well, and for generation alone."""
    for what, trains_after in (("engine M0-1", True), ("engine M2-3", False)):
        found = auto_engine(choice, hardware, None, trains_after, False, lambda name: find_spec(name) is not None)
        yield Row(what, f"{found.engine}, {found.quantization}" + (f" ({found.why})" if found.why else ""))


def token_row() -> Row:
    """Whether a Hugging Face token is set; its value is never read into the output."""
    present = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or (
        (hf_home() / "token").is_file()
    )
    return Row("HF token", "present" if present else "absent (only gated models need one, such as Llama Guard)")


def pins(file: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of every pinned package of a requirements file, those of included files first."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if include := re.match(r"-r\s+(\S+)", line):
            yield from pins(file.parent / include.group(1))
        elif pin := re.match(r"([\w.-]+)==([\w.]+)", line):
            yield pin.group(1), pin.group(2)


def version_rows(hardware: Hardware) -> Iterator[Row]:
    """Installed versions against the pins: missing fails, another version warns."""
    file = ROOT / ("requirements.txt" if hardware.kind == "cuda" else "requirements-cpu.txt")
    pinned = list(pins(file))
    found = {name: _installed(name) for name, _ in pinned}
    missing = [name for name, version in found.items() if version is None]
    other = [f"{name} {found[name]} (pinned {pin})" for name, pin in pinned if found[name] not in (None, pin)]
    again = "rm -f .venv/.installed; bash setup_runpod.sh"  # the stamp says that all is installed
    if missing:
        yield Row("packages", f"missing: {', '.join(missing)}; {again}", FAIL)
    if other:
        yield Row("packages", f"other than pinned: {', '.join(other)}; {again}", WARN)
    if not missing and not other:
        yield Row("packages", f"all {len(pinned)} as pinned in {file.name}")


def _installed(name: str) -> str | None:
    """A package's version without its local part ("2.13.0+cpu" is 2.13.0), None if it is not installed."""
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def pod_rows() -> Iterator[Row]:
    """On a pod: everything that shall outlive it belongs under /workspace."""
    for what, place in (("checkout", ROOT), ("HF_HOME", hf_home())) if on_pod() else ():
        safe = place.resolve().is_relative_to("/workspace")
        yield Row(what, f"{place}" if safe else f"{place} is lost when the pod stops", OK if safe else WARN)


def examine(data_dir: Path, model: str | None) -> list[Row]:
    """All rows of the table."""
    hardware = detect()
    choice = resolve_model(model, hardware)
    memory = Row("memory", f"{hardware.ram_gb:g} GB RAM, {hardware.cores} cores")
    rows = [python_row(), gpu_row(hardware), memory, *model_rows(choice, hardware),
            *engine_rows(choice, hardware)]  # fmt: skip
    return [*rows, *disk_rows(data_dir, choice, hardware), token_row(), *pod_rows(), *version_rows(hardware)]


def show(rows: Sequence[Row]) -> None:
    """Print the table; plain text where rich is not installed yet."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        print("\n".join(f"{row.state:5} {row.what:10} {row.value}" for row in rows))
        return
    colours = {OK: "green", WARN: "yellow", FAIL: "bold red"}
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(Text(row.state, colours[row.state]), row.what, Text(row.value))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the flags, examine the machine, say what to do."""
    args = base_parser(__doc__, plans=False).parse_args(argv)
    rows = examine(args.data_dir, args.model)
    show(rows)
    failed = [row.what for row in rows if row.state == FAIL]
    if failed:
        print(f"not ready: mend {', '.join(failed)}")
        return EXIT_FAILURE
    print("ready. next: python cai_experiment/scripts/test_single.py (activate first: source .venv/bin/activate)")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_main(main))
