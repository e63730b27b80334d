"""Early exit: each image leaves the network at the first exit that is confident enough of its class."""

from timm_selfdistill.early_exit.early_exit import EarlyExit as EarlyExit
from timm_selfdistill.early_exit.leaving import EarlyExitOutput as EarlyExitOutput
from timm_selfdistill.early_exit.leaving import exit_answers as exit_answers
from timm_selfdistill.early_exit.leaving import exit_confidence as exit_confidence
from timm_selfdistill.early_exit.leaving import first_confident as first_confident
from timm_selfdistill.early_exit.leaving import replay as replay
from timm_selfdistill.early_exit.leaving import running_ensembles as running_ensembles
from timm_selfdistill.early_exit.path_costs import PathCosts as PathCosts
from timm_selfdistill.early_exit.path_costs import measure_path_macs as measure_path_macs
from timm_selfdistill.early_exit.path_costs import measure_path_seconds as measure_path_seconds
from timm_selfdistill.early_exit.rules import FALLBACKS as FALLBACKS
from timm_selfdistill.early_exit.rules import EarlyExitConfig as EarlyExitConfig
from timm_selfdistill.early_exit.rules import Rule as Rule
from timm_selfdistill.early_exit.rules import RuleState as RuleState
from timm_selfdistill.early_exit.rules import get_rule as get_rule
from timm_selfdistill.early_exit.rules import list_rules as list_rules
from timm_selfdistill.early_exit.rules import register_rule as register_rule
from timm_selfdistill.early_exit.stage_costs import Line as Line
from timm_selfdistill.early_exit.stage_costs import StageCosts as StageCosts
from timm_selfdistill.early_exit.stage_costs import measure_stage_costs as measure_stage_costs
