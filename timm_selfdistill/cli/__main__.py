"""`python -m timm_selfdistill.cli`: the command `timm-selfdistill`."""

import sys

from timm_selfdistill.cli.main import main

sys.exit(main())
