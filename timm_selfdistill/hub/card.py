"""The model card of a saved model: what it is, how to load it here and in plain timm, and how good each exit is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from timm_selfdistill.model import SelfDistillModel

# Where a run's picture is, seen from the model's folder; a repository has both in one place.
_PICTURE = "../report.png"


@dataclass(frozen=True)
class Evaluation:
    """What a training run tells a model card.

    Args:
        report: What `report.json` holds.
        table: The report as a section of markdown.
        dataset: Name of the data set on the Hub, or its path.
        recipe: The recipe, as YAML.
    """

    report: Mapping[str, Any]
    table: str
    dataset: str
    recipe: str


def model_card(model: SelfDistillModel, evaluation: Evaluation | None = None) -> str:
    """Return the model card of a model that is saved in a folder, for which FOLDER stands.

    Args:
        model: The wrapped model.
        evaluation: What its training run found; a card without results by default.
    """
    names = ", ".join(f"`{name}`" for name in model.exit_names)
    text = (
        f"---\n{_metadata(model, evaluation)}\n---\n\n"
        f"# {_architecture(model)}, self-distilled\n\n"
        f"A timm `{_architecture(model)}` with {model.num_classes} classes and exits at {names}, trained as its own "
        f"teacher.\n\n{_usage(model, None)}"
    )
    if evaluation is None:
        return text
    return (
        f"{text}\n{evaluation.table}\n![Accuracy of every exit over its compute]({_PICTURE})\n\n"
        f"## Recipe\n\n```yaml\n{evaluation.recipe.rstrip()}\n```\n"
    )


def card_for_repository(card: str, model: SelfDistillModel, repo_id: str) -> str:
    """Return a model card that tells how to load the model from the Hub instead of a folder; the rest stays.

    Args:
        card: The text of the card of a saved model, perhaps edited.
        model: The model.
        repo_id: The repository, as "namespace/name".
    """
    return card.replace(_usage(model, None), _usage(model, repo_id)).replace(f"]({_PICTURE})", "](report.png)")


def _metadata(model: SelfDistillModel, evaluation: Evaluation | None) -> str:
    """Return the card's metadata as YAML, the results in the Hub's form of a model index."""
    results = [] if evaluation is None else _results(evaluation)
    metadata = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "timm_selfdistill"],
        model_name=f"{_architecture(model)}, self-distilled" if results else None,
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
    )
    return str(metadata.to_yaml()).strip()


def _results(evaluation: Evaluation) -> list[EvalResult]:
    report = evaluation.report
    rows = [(f"exit {row['index']}, {row['name']}", row["top1"]) for row in report["exits"]]
    rows.append(("ensemble", report["ensemble"]["top1"]))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=re.sub(r"[^\w./-]+", "-", evaluation.dataset),
            dataset_name=report["dataset"],
            metric_type="accuracy",
            metric_name=f"top-1 accuracy in percent ({name})",
            metric_value=round(top1, 2),
        )
        for name, top1 in rows
        if top1 is not None
    ]


def _usage(model: SelfDistillModel, repo_id: str | None) -> str:
    """Return the section that loads the model: from a repository, or from a folder."""
    source = "FOLDER" if repo_id is None else f'"{repo_id}"'
    return (
        f"In plain timm, without the exits:\n\n```python\n{_timm_snippet(model, repo_id)}```\n\n"
        "With the exits:\n\n```python\nimport timm_selfdistill as sd\n\n"
        f"model = sd.from_pretrained({source})\nout = model(x, return_exits=True)  # out.logits: shallow to deep\n```\n"
    )


def _timm_snippet(model: SelfDistillModel, repo_id: str | None) -> str:
    """Return the lines that load the backbone without this package."""
    source = "local-dir:FOLDER" if repo_id is None else f"hf-hub:{repo_id}"
    if not model.config.small_stem:
        return f'import timm\n\nmodel = timm.create_model("{source}", pretrained=True)\n'
    stem = model.backbone.conv1
    if repo_id is None:
        fetch, weights = "", '"FOLDER/model.safetensors"'
    else:
        fetch = "from huggingface_hub import hf_hub_download\n"
        weights = f'hf_hub_download("{repo_id}", "model.safetensors")'
    return (
        f"{fetch}import timm\nimport torch\n\n"
        f'model = timm.create_model("{source}", pretrained=False)\n'
        f"model.conv1 = torch.nn.Conv2d({stem.in_channels}, {stem.out_channels}, 3, padding=1, bias=False)\n"
        "model.maxpool = torch.nn.Identity()\n"
        f"timm.models.load_checkpoint(model, {weights})\n"
    )


def _architecture(model: SelfDistillModel) -> str:
    return str(model.pretrained_cfg.get("architecture", type(model.backbone).__name__))
