"""What the Training tab shows of a run's files: its pairs as they come, loss and margin, the content log. Only what has
grown is read again."""

from __future__ import annotations

from pathlib import Path


class TrainingView:
    """Follows the files of one run. Not safe for threads: Trainings holds a lock around it."""

    def __init__(self, data: Path, checkpoints: Path) -> None:
        """`data` is DATA_DIR/RUN, `checkpoints` CHECKPOINT_DIR/RUN; neither need be there yet."""
        self.data, self.checkpoints = data, checkpoints

    def refresh(self) -> None:
        """Read what the files have grown by."""
        raise NotImplementedError

    def pairs_html(self) -> str:
        """The newest pairs: instruction, both answers as a word diff."""
        raise NotImplementedError

    def plot_html(self) -> str:
        """Loss and margin over steps as inline SVG; "" before the second step."""
        raise NotImplementedError

    def log_html(self, verbosity: int) -> str:
        """The newest entries of the content log that this verbosity shows."""
        raise NotImplementedError
