"""The child process of a training: generate_mvp.py, then train_dpo.py, as a user would type them.

Run: python -m cai_experiment.demo.chain DATA_DIR/RUN/demo.json

SIGTERM, SIGINT and SIGHUP go on to the script at work, which ends resumably; the same call resumes.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run both scripts, skip what is finished, write down how it went; gives the last script's exit code."""
    raise NotImplementedError


if __name__ == "__main__":
    raise SystemExit(main())
