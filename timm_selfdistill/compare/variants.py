"""The losses that a comparison knows by name, as changes to a recipe."""

from collections.abc import Sequence
from typing import Final

from timm_selfdistill.losses import PRESETS, list_losses, list_presets
from timm_selfdistill.recipe import ExitsSection, LossSection, Recipe

LABEL_SMOOTHING: Final = "label-smoothing"
BASELINE: Final = "none"
OWN: Final = "recipe"
_SMOOTHED: Final = 0.1


def list_variants() -> list[str]:
    """Return the names of all losses that can be compared: presets, registered losses and two more.

    "label-smoothing" trains the backbone alone on smoothed labels, "recipe" is the recipe's own loss section.
    """
    ours = LossSection.model_fields["name"].default
    return sorted({*list_presets(), *list_losses(), LABEL_SMOOTHING, OWN} - {ours})


def with_loss(recipe: Recipe, name: str) -> Recipe:
    """Return a recipe with another loss and everything else as it is.

    The loss has its published settings: what the recipe's loss section changes belongs to the recipe's own loss. Hint
    adapters are left out where the loss has no hints that could train them.

    Args:
        recipe: The recipe.
        name: One of `list_variants()`.

    Raises:
        ValueError: If there is no such loss.
    """
    if name == OWN:
        return recipe
    known = list_variants()
    if name not in known:
        raise ValueError(f"Unknown loss {name!r}; a comparison knows {', '.join(known)}.")
    has_hints = name in PRESETS and PRESETS[name].hint_weight > 0
    if name == LABEL_SMOOTHING:
        loss = LossSection(preset=BASELINE, label_smoothing=_SMOOTHED)
    elif name in PRESETS:
        loss = LossSection(preset=name)
    else:
        loss = LossSection(name=name, preset=None)
    exits: ExitsSection = recipe.exits.model_copy(
        update={"hint_adapter": recipe.exits.hint_adapter and has_hints},
    )
    return recipe.model_copy(update={"loss": loss, "exits": exits})


def check_names(losses: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse an empty comparison, repeated entries and unknown losses."""
    for what, entries in (("losses", losses), ("seeds", seeds)):
        if not entries or len(set(entries)) < len(entries):
            raise ValueError(f"{what} must be one or more different entries, received {', '.join(map(str, entries))}.")
    unknown = sorted(set(losses) - set(list_variants()))
    if unknown:
        raise ValueError(f"Unknown losses {', '.join(unknown)}; a comparison knows {', '.join(list_variants())}.")
    if min(seeds) < 0:
        raise ValueError(f"seeds must be 0 or more, received {', '.join(map(str, seeds))}.")
