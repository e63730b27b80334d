"""The colours of all pictures."""

from typing import Final

BLUE: Final = "#1f5fa8"
ORANGE: Final = "#d1662a"
GREEN: Final = "#2b8a57"
GREY: Final = "#5f6670"
INK: Final = "#22262b"
GRID: Final = "#e4e7eb"
