"""What a server asks of a network with early exit, whatever runs it; it needs neither torch nor numpy."""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

Give = Callable[[Sequence[int], Sequence[Any], int], None]
"""Takes the places in the batch of images that have their answer, the logits [num_classes] of each, and the exit."""

NO_TIMES: Final = "A deadline needs the times of the network's parts: call measure(batch_size) on it first."


class Servable(Protocol):
    """A network that `Batcher` can run: `EarlyExit`, `OnnxEarlyExit`, or one of your own."""

    @property
    def num_exits(self) -> int:
        """Number K of added exits; the fallback has index K."""

    def answer_images(self, images: Sequence[Any], limits: Sequence[int], give: Give) -> None:
        """Answer a batch.

        Args:
            images: Images [C, H, W] of one shape and type.
            limits: For each, the exit that answers at the latest.
            give: Called as soon as images have their answer, once for each image.
        """

    def seconds_to(self, exit: int, rows: int) -> float:
        """Return what a batch of `rows` images takes of which none leaves before an exit.

        Raises:
            ValueError: If that was not measured.
        """
