"""The child of engines.vllm: holds vLLM's engine, takes requests on stdin, gives completions on stdout as JSON lines.

    in   {"engine": {EngineArgs}, "parent": pid}, then {"n": 7, "ids": [...], "params": {...}} and {"drop": [7, ...]}
    out  {"ready": {...}}, then {"n": 7, "tokens": [...], "finish": "stop", "cached": 96, "logprobs": {"32": -0.1}},
         or {"n": 7, "error": "..."} for a request that cannot be served; {"fatal": "..."} and the end

Read against the source of vllm 0.32.0. Started with VLLM_ENABLE_V1_MULTIPROCESSING=0, so the engine runs in this very
process (its steps still overlap with the GPU's work: its scheduling is asynchronous), a fault of loading arrives as the
exception that it is, and no further process holds the GPU.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any, BinaryIO, Callable

END_SECONDS = 4.0  # for vLLM to end in good order once the parent has closed the pipe, or has died

Message = dict[str, Any]
Say = Callable[[Message], None]


def main() -> int:
    """Serve until the parent closes the pipe (0) or vLLM fails (1)."""
    say = _speaker()
    settings: Message = json.loads(sys.stdin.buffer.readline())
    inbox: queue.Queue[Message | None] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, inbox), daemon=True).start()
    threading.Thread(target=_watch, args=(settings["parent"], inbox), daemon=True).start()
    try:
        engine = build(settings["engine"])
        say({"ready": facts(engine)})
        serve(engine, inbox, say)
        engine.engine_core.shutdown()
    except Exception as error:
        traceback.print_exc()
        say({"fatal": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _speaker() -> Say:
    """Keeps stdout for messages: whatever else prints (vLLM logs there) goes to stderr from now on."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def say(message: Message) -> None:
        try:
            out.write(json.dumps(message).encode() + b"\n")
            out.flush()
        except BrokenPipeError:  # the parent has gone; `_watch` and `_read` know
            pass

    return say


# ---------------------------------------------------------------- the parent


def _read(stream: BinaryIO, inbox: queue.Queue[Message | None]) -> None:
    for line in stream:
        try:
            inbox.put(json.loads(line))
        except ValueError:  # torn: the parent was interrupted while it wrote, and will close
            break
    _leave(inbox)


def _watch(parent: int, inbox: queue.Queue[Message | None]) -> None:
    """The pipe does not close with the parent if a process that it forked (a data loader's, say) holds it open."""
    while os.getppid() == parent:
        time.sleep(1)
    _leave(inbox)


def _leave(inbox: queue.Queue[Message | None]) -> None:
    """Ask the main thread to end; if it does not (it may be loading), end this process and its workers by force."""
    inbox.put(None)
    time.sleep(END_SECONDS)
    end_group(1)


def end_group(code: int) -> None:
    """End this process and every worker of its group at once, orphans or not: they hold the GPU's memory."""
    if os.getpgid(0) == os.getpid():  # else somebody runs this by hand, and the group is their shell's
        os.killpg(0, signal.SIGKILL)
    os._exit(code)


# ---------------------------------------------------------------- vLLM


def build(arguments: Message) -> Any:
    """vLLM's engine over `arguments` of EngineArgs."""
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    # LLM_CLASS: the batch sizes that vLLM holds best for work without a waiting user
    return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)


def facts(engine: Any) -> Message:
    """What the manifest records of the loaded engine; `kv_tokens` are the tokens whose keys and values fit."""
    import vllm

    cache = engine.vllm_config.cache_config
    return {
        "vllm": vllm.__version__,
        "dtype": str(engine.model_config.dtype).removeprefix("torch."),
        "max_length": engine.model_config.max_model_len,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "prefix_caching": bool(cache.enable_prefix_caching),
    }


def serve(engine: Any, inbox: queue.Queue[Message | None], say: Say) -> None:
    """Take requests whenever they come, step while there is work, say what has finished; ends when told to."""
    while True:
        while not inbox.empty() or not engine.has_unfinished_requests():
            message = inbox.get()
            if message is None:
                return
            take(engine, message, say)
        for output in engine.step():
            if output.finished:
                say(result(output))


def take(engine: Any, message: Message, say: Say) -> None:
    """Give a request to vLLM, or drop some; one that vLLM refuses is answered with its fault and stops no other."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    if "drop" in message:
        engine.abort_request([str(number) for number in message["drop"]])
        return
    try:
        params = SamplingParams(**message["params"], output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(str(message["n"]), tokens_input(message["ids"]), params)
    except Exception as error:
        say({"n": message["n"], "error": f"{type(error).__name__}: {error}"})


def result(output: Any) -> Message:
    """The message for a finished RequestOutput."""
    spoken = output.outputs[0]
    found: Message = {
        "n": int(output.request_id),
        "tokens": list(spoken.token_ids),
        "finish": str(spoken.finish_reason),
        "cached": output.num_cached_tokens or 0,
    }
    if spoken.logprobs:
        found["logprobs"] = {str(token): entry.logprob for token, entry in spoken.logprobs[0].items()}
    return found


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    if code == 0:
        end_group(code)  # told to: nobody else may be left to do it
    os._exit(code)  # CUDA's own clean-up at exit may hang, and the parent waits for our end
