"""The exits' networks: their registry, the published ones, and the default one in proportion to its backbone."""

from timm_selfdistill.heads.bodies import HEADS as HEADS
from timm_selfdistill.heads.bodies import PUBLISHED as PUBLISHED
from timm_selfdistill.heads.bodies import as_map as as_map
from timm_selfdistill.heads.bodies import as_tokens as as_tokens
from timm_selfdistill.heads.bodies import choose_head as choose_head
from timm_selfdistill.heads.bodies import list_heads as list_heads
from timm_selfdistill.heads.bodies import pooled as pooled
from timm_selfdistill.heads.bodies import register_head as register_head
from timm_selfdistill.heads.exit_head import ExitHead as ExitHead
from timm_selfdistill.heads.exit_head import each_head_kwargs as each_head_kwargs
from timm_selfdistill.heads.proportional import AUTO as AUTO
from timm_selfdistill.heads.proportional import PROPORTIONAL as PROPORTIONAL
from timm_selfdistill.heads.proportional import HeadBudget as HeadBudget
from timm_selfdistill.heads.proportional import default_kwargs as default_kwargs
from timm_selfdistill.heads.proportional import fit_heads as fit_heads
from timm_selfdistill.heads.proportional import resolve_budget as resolve_budget
