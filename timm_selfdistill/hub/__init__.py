"""Save and load a wrapped model: a folder, or a repository on the Hugging Face Hub, that plain timm loads too."""

from timm_selfdistill.hub.build import check_weights as check_weights
from timm_selfdistill.hub.card import Training as Training
from timm_selfdistill.hub.card import model_card as model_card
from timm_selfdistill.hub.folder import BACKBONE as BACKBONE
from timm_selfdistill.hub.folder import CARD as CARD
from timm_selfdistill.hub.folder import EXITS as EXITS
from timm_selfdistill.hub.folder import is_exported as is_exported
from timm_selfdistill.hub.folder import load_exported as load_exported
from timm_selfdistill.hub.folder import read_early_exit as read_early_exit
from timm_selfdistill.hub.folder import read_run as read_run
from timm_selfdistill.hub.folder import save_early_exit as save_early_exit
from timm_selfdistill.hub.folder import save_exported as save_exported
from timm_selfdistill.hub.folder import save_pretrained as save_pretrained
from timm_selfdistill.hub.remote import HubError as HubError
from timm_selfdistill.hub.remote import fetch as fetch
from timm_selfdistill.hub.remote import from_pretrained as from_pretrained
from timm_selfdistill.hub.remote import load_early_exit as load_early_exit
from timm_selfdistill.hub.remote import load_with_early_exit as load_with_early_exit
from timm_selfdistill.hub.remote import make_repository as make_repository
from timm_selfdistill.hub.remote import push_folder as push_folder
from timm_selfdistill.hub.remote import push_to_hub as push_to_hub
from timm_selfdistill.hub.saved_config import CONFIG as CONFIG
from timm_selfdistill.hub.saved_config import KEY as KEY
from timm_selfdistill.hub.saved_config import class_names as class_names
from timm_selfdistill.hub.saved_config import complete_names as complete_names
from timm_selfdistill.hub.saved_config import read_json as read_json
