"""The exits' networks: their registry, the published ones, and the default one in proportion to its backbone."""

from timm_selfdistill.heads.body import HEADS as HEADS
from timm_selfdistill.heads.body import as_map as as_map
from timm_selfdistill.heads.body import as_tokens as as_tokens
from timm_selfdistill.heads.body import list_heads as list_heads
from timm_selfdistill.heads.body import pooled as pooled
from timm_selfdistill.heads.body import register_head as register_head
from timm_selfdistill.heads.budget import AUTO as AUTO
from timm_selfdistill.heads.budget import PROPORTIONAL as PROPORTIONAL
from timm_selfdistill.heads.budget import HeadBudget as HeadBudget
from timm_selfdistill.heads.budget import fit_heads as fit_heads
from timm_selfdistill.heads.budget import resolve_budget as resolve_budget
from timm_selfdistill.heads.exit_head import ExitHead as ExitHead
from timm_selfdistill.heads.exit_head import each_head_kwargs as each_head_kwargs
from timm_selfdistill.heads.published import PUBLISHED as PUBLISHED
from timm_selfdistill.heads.published import choose_head as choose_head
