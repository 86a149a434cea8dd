"""Fetching other people's files: pinned, checked, once; against a real server on 127.0.0.1."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.benchmarks.fetch import LARGEST, Source, cache_folder, fetch
from tests.openai_server import Answer, Serving

CONTENT = b'id,text\r\n1,"two\nlines"\r\n'
SHA = hashlib.sha256(CONTENT).hexdigest()


def source(url: str, sha256: Any = SHA) -> Source:
    return Source("rows.csv", url, sha256, "MIT (c) somebody", "--rows FILE")


def test_fetched_once_checked_and_renamed_into_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(path: str, body: Any) -> Any:
        raise Answer(200, CONTENT)

    with Serving(answer) as server:
        path = fetch(source(f"{server.url}/rows.csv"), tmp_path / "new")
        assert path.read_bytes() == CONTENT and path.name == f"{SHA[:12]}-rows.csv"
        assert "rows.csv" in capsys.readouterr().err
        assert fetch(source(f"{server.url}/rows.csv"), tmp_path / "new") == path
        assert len(server.requests) == 1 and capsys.readouterr().err == ""
        path.write_bytes(CONTENT[:-3])  # damaged on disk: fetched again
        assert fetch(source(f"{server.url}/rows.csv"), tmp_path / "new").read_bytes() == CONTENT
        assert len(server.requests) == 2
    assert fetch(source(f"{server.url}/rows.csv"), tmp_path / "new") == path  # the server is gone


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    faults = [Answer(503), Answer(200, CONTENT, fault="cut", Content_Length=str(len(CONTENT))), Answer(429)]
    waited: list[float] = []

    def answer(path: str, body: Any) -> Any:
        raise faults.pop(0) if faults else Answer(200, CONTENT)

    with Serving(answer) as server:
        assert fetch(source(f"{server.url}/rows.csv"), tmp_path, (1, 2, 3), waited.append).read_bytes() == CONTENT
    assert waited == [1, 2, 3]


def test_a_redirect_is_followed_and_either_hash_will_do(tmp_path: Path) -> None:
    def answer(path: str, body: Any) -> Any:
        raise Answer(200, CONTENT) if path == "/there" else Answer(302, b"", Location="/v1/there")

    with Serving(answer) as server:
        assert fetch(source(f"{server.url}/rows.csv", ("0" * 64, SHA)), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Answer(200, CONTENT + b"more"), "sha256 is"),
        (Answer(404), "status 404"),
        (Answer(200, b"x" * (LARGEST + 1)), "is larger than"),
    ],
)
def test_a_wrong_file_is_named_in_one_line_and_never_kept(tmp_path: Path, fault: Answer, says: str) -> None:
    def answer(path: str, body: Any) -> Any:
        raise fault

    with Serving(answer) as server:
        url = f"{server.url}/rows.csv"
        with pytest.raises(EngineError) as caught:
            fetch(source(url), tmp_path, (), lambda _: None)
    line = str(caught.value)
    assert url in line and says in line and "--rows FILE" in line and "\n" not in line
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_line_with_what_to_give_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Serving(lambda path, body: {}) as server:
        url = f"{server.url}/rows.csv"
    with pytest.raises(EngineError, match=r"cannot fetch http://127.*\(3 attempts\).*--rows FILE"):
        fetch(source(url), tmp_path, (0, 0), lambda _: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EngineError, match=r"HF_HUB_OFFLINE is set.*--rows FILE"):
        fetch(source("https://example.org/rows.csv"), tmp_path)


def test_the_folder_is_hugging_faces_and_one_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "volume"))
    assert cache_folder().parent == tmp_path / "volume"
    (tmp_path / "volume").write_text("a file")

    def answer(path: str, body: Any) -> Any:
        raise Answer(200, CONTENT)

    with Serving(answer) as server, pytest.raises(BadInputError, match="cannot write"):
        fetch(source(f"{server.url}/rows.csv"))
