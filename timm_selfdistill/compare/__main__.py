"""`accelerate launch -m timm_selfdistill.compare RECIPE [key=value ...] --losses A,B --seeds 0,1`."""

import sys

from timm_selfdistill.compare.command import main

sys.exit(main())
