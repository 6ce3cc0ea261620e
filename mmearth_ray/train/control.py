"""The line between a training loop and whoever started it, as the loop sees it."""

from contextlib import AbstractContextManager
from typing import Any, Protocol


class Control(Protocol):
    """The line to whoever started the run."""

    def tell(self, progress: dict[str, Any]) -> None:
        """Show the latest progress.  Called by rank 0 whenever metrics were fetched; must not block."""

    def should_stop(self) -> bool:
        """Whether to save and end when metrics are fetched next.  Only rank 0's answer counts."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """A stretch in which data are waited for, and nothing is heard.  Entered and left at every step; must not block."""
        ...

    def warn(self, text: str) -> None:
        """Show a line that must not be missed.  Called in any thread of rank 0; must not block."""
