"""Load the teacher from outside that a recipe names."""

import os

from timm_selfdistill.hub import BACKBONE, CONFIG, KEY, fetch, from_pretrained, read_json
from timm_selfdistill.losses import OutsideTeacher
from timm_selfdistill.recipe import REPO_ID, Recipe, TeacherSection
from timm_selfdistill.recipe.training_sections import LOCAL_MODEL


def build_teacher(recipe: Recipe) -> OutsideTeacher | None:
    """Load the recipe's teacher from outside, or return None where it has none.

    Nothing that was fetched is unpickled or executed: a model of this library is checked as `from_pretrained` does it,
    and timm loads weights only.

    Raises:
        ValueError: If there is no such model, it has another number of classes than `model.num_classes`, or it would
            teach what does not run or train.
        HubError: If its repository cannot be read.
    """
    section = recipe.teacher
    if section is None:
        return None
    if recipe.schedule.regime == "frozen" and section.teaches != "exits":
        raise ValueError("teacher.teaches: must be exits where the backbone is frozen, by schedule.regime=frozen.")
    try:
        teacher = _load(section)
        if recipe.model.num_classes is not None:
            teacher.check_classes(recipe.model.num_classes)
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from error
    return teacher


def _load(section: TeacherSection) -> OutsideTeacher:
    name, kwargs = section.name, dict(section.kwargs)
    if not os.path.isdir(name) and not REPO_ID.fullmatch(name):
        return OutsideTeacher(name, section.config, model_kwargs=kwargs)
    folder = fetch(name)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if isinstance(config, dict) and KEY in config:
        if kwargs:
            raise ValueError(f"kwargs are arguments of timm.create_model, but {name} is a model of this library.")
        return OutsideTeacher(from_pretrained(folder), section.config)
    # A repository may have its weights in a file that `fetch` leaves out.
    is_whole = os.path.isdir(name) or (folder / BACKBONE).is_file()
    return OutsideTeacher(
        f"{LOCAL_MODEL}{folder}" if is_whole else f"hf-hub:{name}", section.config, model_kwargs=kwargs
    )
