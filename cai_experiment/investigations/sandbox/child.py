"""Runs the model's code inside the sandbox: passed to the interpreter as text (-c), so it may import only the library.

argv: the descriptor of the job (JSON), then those on which it asks the parent and hears the answers.
"""

from __future__ import annotations

import builtins
import json
import linecache
import os
import resource
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

NAME = "<code>"


class IntrospectionError(Exception):
    """The parent refused a call, or the function called there failed."""


def limit(limits: dict[str, int]) -> None:
    """Soft and hard limits of this process and its children; a hard limit cannot be raised again."""
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        # SIGXCPU at the soft limit tells the parent why; a process that ignores it is killed a second later.
        later = value + 1 if name == "CPU" and hard == resource.RLIM_INFINITY else value
        resource.setrlimit(number, (value, later))


def introspection(functions: list[str], ask: int, hear: int, most: int) -> types.ModuleType:
    """The module whose functions ask the parent: one line of JSON there, one back."""
    lock = threading.Lock()

    def read_line() -> bytes:
        parts = []
        while True:
            part = os.read(hear, 65536)
            parts.append(part)
            if not part:
                raise IntrospectionError("the channel is closed")
            if part.endswith(b"\n"):
                return b"".join(parts)

    def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            line = json.dumps({"call": name, "args": args, "kwargs": kwargs}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise IntrospectionError(f"{name}: arguments must be plain JSON values: {error}") from None
        if len(line) > most:
            raise IntrospectionError(f"{name}: the arguments are larger than {most} bytes")
        with lock:
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(ask, rest) :]
                answer = json.loads(read_line())
            except OSError as error:
                raise IntrospectionError(f"the channel is closed ({error.strerror})") from None
        if "error" in answer:
            raise IntrospectionError(answer["error"])
        return answer["result"]

    def function(name: str) -> Callable[..., Any]:
        def ask_parent(*args: Any, **kwargs: Any) -> Any:
            return call(name, args, kwargs)

        ask_parent.__name__ = ask_parent.__qualname__ = name
        return ask_parent

    module = types.ModuleType("introspection", "Read-only access to the model: " + ", ".join(functions))
    vars(module)["IntrospectionError"] = IntrospectionError
    for name in functions:
        setattr(module, name, function(name))
    return module


def run(code: str) -> int:
    """Run the code as __main__; the exit code for the process."""
    main = types.ModuleType("__main__")
    vars(main)["introspection"] = sys.modules["introspection"]
    sys.modules["__main__"] = main
    linecache.cache[NAME] = (len(code), None, code.splitlines(True), NAME)
    try:
        exec(compile(code, NAME, "exec"), main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None  # without this file's frame
        traceback.print_exception(error)
        return 1
    return 0


def start() -> int:
    """Read the job, bind the process, run."""
    job_fd, ask, hear = map(int, sys.argv[1:4])
    os.write(ask, b"+")  # the sandbox stands
    with open(job_fd, encoding="utf-8") as stream:
        job = json.load(stream)
    sys.argv[:] = [NAME]
    sys.path.extend(["", *job["packages"]])
    sys.modules["introspection"] = introspection(job["functions"], ask, hear, job["most"])
    vars(builtins)["IntrospectionError"] = IntrospectionError
    limit(job["limits"])
    return run(job["code"])


sys.exit(start())
