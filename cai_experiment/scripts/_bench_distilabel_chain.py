"""The same chain on distilabel, run by bench.py in distilabel's own environment:

    python cai_experiment/scripts/_bench_distilabel_chain.py settings.json

A distilabel Pipeline of one Task for the whole chain, or of one a half of it; each Task has its own process and its own
TransformersLLM, as distilabel does it. Its inner pipeline speaks for one row at a time as shipped; here it gets full
batches, so that distilabel is shown at its best. It gives no log-probabilities, so a verdict is one greedy token.
Its weights are loaded in the precision that it is told: left to itself it takes the checkpoint's own, float16, which a
CPU computes two to three times slower. Writes {"rows", "tokens", "seconds", "dtypes"}; loading and one small call to
warm up are excluded, and the dtypes are those of the weights as they were loaded.
"""

# no `from __future__ import annotations`: distilabel reads the annotations of `process`

import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from distilabel.models.llms import TransformersLLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts, StepInput
from distilabel.steps.tasks import Task
from distilabel.typing import StepOutput

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.scripts._bench_chain import batches, instructions_for, lockstep, stage_settings

FIRST_HALF = {"targeted": 5, "random": 4}  # stages: answer, verdicts (targeted: twice), critique, revision
BATCH = 16
ROWS_AT_ONCE = 4 * BATCH  # of two tasks, so that both have work; distilabel's own 50 leaves an inner batch of 2 over


class BatchedLLM(TransformersLLM):
    """distilabel's own LLM, with its inner transformers pipeline speaking for BATCH rows at a time."""

    def load(self) -> None:
        """Load as ever, raise the batch, and warm up."""
        super().load()
        self._pipeline._batch_size = BATCH
        self._pipeline.tokenizer.padding_side = "left"
        self.generate_outputs(inputs=[[{"role": "user", "content": "How are you?"}]] * BATCH, max_new_tokens=8)


class Part(Task):
    """Stages of the chain for a batch of rows; what earlier stages said travels along as JSON in "replies"."""

    stages: int | None = None  # how far, None: to the end
    seed: int = 0
    principles: str = "targeted"
    times: str = ""  # file for the begin and end of each batch, and the dtype of the weights

    @property
    def inputs(self) -> list[str]:
        """What a row needs."""
        return ["id", "instruction", "replies"]

    @property
    def outputs(self) -> list[str]:
        """What a row gets."""
        return ["replies"]

    def format_input(self, input: dict) -> list[dict[str, str]]:
        """A conversation in OpenAI's form."""
        return [{"role": turn.role, "content": turn.text} for turn in input["turns"]]

    def format_output(self, output: str | None, input: dict | None = None) -> dict[str, str | None]:
        """The text."""
        return {"generation": output}

    def process(self, inputs: StepInput) -> StepOutput:
        """All stages of this part for one batch."""
        began = time.time()
        known = [{one["id"]: Completion(**one) for one in json.loads(row["replies"])} for row in inputs]
        said = {id: completion for row in known for id, completion in row.items()}

        def complete(prompts: list[Prompt]) -> list[Completion]:
            missing = [prompt for prompt in prompts if prompt.id not in said]
            said.update({c.id: c for batch in batches(missing, len(missing)) for c in self._ask(batch)})
            return [said[prompt.id] for prompt in prompts]

        rows = [Instruction(row["id"], row["instruction"], "bench") for row in inputs]
        lockstep(rows, stage_settings(self.seed, self.principles), complete, self.stages)
        for row in inputs:
            mine = [c for id, c in said.items() if id.startswith(row["id"] + "/")]
            row["replies"] = json.dumps([{name: getattr(c, name) for name in Completion.__slots__} for c in mine])
        with open(self.times, "a", encoding="utf-8") as file:
            file.write(f"{began} {time.time()} {self.llm._pipeline.model.dtype}\n")
        yield inputs

    def _ask(self, batch: list[Prompt]) -> list[Completion]:
        sampling, weigh = batch[0].sampling, bool(batch[0].options)
        spoken = sampling.temperature > 0 and not weigh
        outputs = self.llm.generate_outputs(
            inputs=[self.format_input({"turns": prompt.turns}) for prompt in batch],
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature if spoken else 1.0,
            do_sample=spoken,
            repetition_penalty=1.0,
        )
        texts = [(output["generations"][0] or "").strip() for output in outputs]
        if weigh:
            return [_verdict(prompt, text) for prompt, text in zip(batch, texts, strict=True)]
        return [self._spoken(prompt, text) for prompt, text in zip(batch, texts, strict=True)]

    def _spoken(self, prompt: Prompt, text: str) -> Completion:
        size = len(self.llm._pipeline.tokenizer.encode(text, add_special_tokens=False)) + 1  # and the end token
        most = prompt.sampling.max_tokens
        return Completion(prompt.id, text, "stop" if size <= most else "length", completion_tokens=min(size, most))


def _verdict(prompt: Prompt, text: str) -> Completion:
    """Certain of the option that the text begins with; of none, if it begins with none."""
    logs = tuple(-0.1 if text.startswith(option) else -2.4 for option in prompt.options)
    return Completion(prompt.id, "", "stop", logprobs=logs)


def main() -> None:
    """Build the pipeline, run it, and write what it took."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = [{"id": row.id, "instruction": row.text, "replies": "[]"}
            for row in instructions_for(settings["rows"], settings["seed"])]  # fmt: skip
    at_once = ROWS_AT_ONCE if settings["processes"] == 2 else max(ROWS_AT_ONCE, len(rows))  # one task waits for nobody
    shared = {name: settings[name] for name in ("seed", "principles", "times")} | {"input_batch_size": at_once}
    with Pipeline(name="chain", cache_dir=settings["cache"]) as pipeline:
        step = LoadDataFromDicts(data=rows, batch_size=at_once)
        for stages in [FIRST_HALF[settings["principles"]]] * (settings["processes"] == 2) + [None]:
            name = "first_half" if stages else "to_the_end"
            llm = BatchedLLM(model=settings["model"], torch_dtype=settings["dtype"])
            part = Part(name=name, llm=llm, stages=stages, **shared)
            step >> part
            step = part
    done = pipeline.run(use_cache=False)["default"]["train"]
    replies = [reply for row in done for reply in json.loads(row["replies"])]
    result = {"rows": len(done), "tokens": sum(reply["completion_tokens"] for reply in replies)}
    result |= timing(Path(settings["times"]).read_text(encoding="utf-8"))
    Path(settings["result"]).write_text(json.dumps(result), encoding="utf-8")


def timing(times: str) -> dict:
    """Of all batches: "seconds" from the first begin to the last end, "dtypes" of the weights (such as "float32")."""
    began, ended, dtypes = zip(*(line.split() for line in times.splitlines()), strict=True)
    seconds = max(map(float, ended)) - min(map(float, began))
    return {"seconds": seconds, "dtypes": sorted({dtype.removeprefix("torch.") for dtype in dtypes})}


if __name__ == "__main__":
    main()
