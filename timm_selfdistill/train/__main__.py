"""`accelerate launch -m timm_selfdistill.train RECIPE [key=value ...]`."""

import sys

from timm_selfdistill.lazy import needs_extra

with needs_extra("timm_selfdistill.train"):
    from timm_selfdistill.train.run import main

sys.exit(main())
