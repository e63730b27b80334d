"""`accelerate launch -m timm_selfdistill.train RECIPE [key=value ...]`."""

import sys

from timm_selfdistill.train.run import main

sys.exit(main())
