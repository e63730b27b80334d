"""The model card of a saved model: what it is, how to load it here and in plain timm, and how good each exit is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_selfdistill.backbones import default_cfgs
from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.escape import markdown_block, markdown_code, markdown_link, markdown_text, printable
from timm_selfdistill.model import SelfDistillModel

# Where a run's picture is, seen from the model's folder; a repository has both in one place.
_PICTURE = "../report.png"


@dataclass(frozen=True)
class Training:
    """What a training run tells a model card."""

    dataset: str
    """Name of the data set on the Hub, or its path."""
    on_hub: bool
    base_model: str | None
    """Name on the Hub of the pretrained weights that training started from."""
    recipe: str
    """As YAML."""
    report: Mapping[str, Any] | None = None
    """What `report.json` holds, or None before the end."""
    table: str = ""
    """The report as a section of markdown."""


def model_card(
    model: SelfDistillModel,
    training: Training | None = None,
    *,
    license: str | None = None,
    early_exit: EarlyExitConfig | None = None,
) -> str:
    """Return the model card of a model that is saved in a folder, which the card calls FOLDER."""
    names = ", ".join(map(markdown_code, model.exit_names))
    text = (
        f"---\n{_metadata(model, training, license)}\n---\n\n"
        f"# {markdown_text(_architecture(model))}, self-distilled\n\n"
        f"A timm {markdown_code(_architecture(model))} with {model.num_classes} classes and exits at {names}, "
        f"trained as its own teacher{_origin(training)}. {_licence(license)}\n\n{_usage(model, None, early_exit)}"
    )
    if training is None:
        return text
    if training.report is not None:
        text += f"\n{training.table}\n![Accuracy of every exit over its compute]({_PICTURE})\n"
    return f"{text}\n## Recipe\n\n{markdown_block(training.recipe, 'yaml')}"


def card_with_early_exit(card: str, model: SelfDistillModel, early_exit: EarlyExitConfig) -> str:
    """Return a model card that loads the early-exit settings saved with the model; the rest, perhaps edited, stays."""
    return card.replace(_usage(model, None, None), _usage(model, None, early_exit))


def card_for_repository(
    card: str,
    model: SelfDistillModel,
    repo_id: str,
    license: str | None = None,
    early_exit: EarlyExitConfig | None = None,
) -> str:
    """Return a model card that tells how to load the model from the Hub instead of a folder; the rest stays.

    `license` is stated instead of the one in the card; `early_exit` are the settings that are saved with the model.
    """
    card = card.replace(_usage(model, None, early_exit), _usage(model, repo_id, early_exit))
    card = card.replace(f"]({_PICTURE})", "](report.png)")
    if license is None:
        return card
    parsed = ModelCard(card)
    before = _licence(parsed.data.get("license"))
    parsed.data["license"] = license
    return str(parsed).replace(before, _licence(license), 1)


def _metadata(model: SelfDistillModel, training: Training | None, license: str | None) -> str:
    """Return the card's metadata as YAML, the results in the Hub's form of a model index."""
    results = [] if training is None or training.report is None else _results(training, training.report)
    metadata = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "timm_selfdistill"],
        datasets=[training.dataset] if training is not None and training.on_hub else None,
        base_model=training.base_model if training is not None else None,
        model_name=f"{printable(_architecture(model))}, self-distilled" if results else None,
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
    )
    return str(metadata.to_yaml()).strip()


def _origin(training: Training | None) -> str:
    """Return on what the model was trained, and from which weights, as the end of a sentence."""
    if training is None:
        return ""
    name = training.dataset
    text = markdown_link(name, f"https://huggingface.co/datasets/{name}") if training.on_hub else markdown_code(name)
    if base := training.base_model:
        text += f", from the weights of {markdown_link(base, f'https://huggingface.co/{base}')}"
    return f" on {text}"


def _licence(license: str | None) -> str:
    return "Licence: not stated." if license is None else f"Licence: {markdown_text(license)}."


def _results(training: Training, report: Mapping[str, Any]) -> list[EvalResult]:
    rows = [(f"exit {row['index']}, {row['name']}", row["top1"]) for row in report["exits"]]
    rows.append(("ensemble", report["ensemble"]["top1"]))
    if fitted := report.get("fitted_ensemble"):  # older reports have no such key
        rows.append(("fitted ensemble", fitted["top1"]))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=re.sub(r"[^\w./-]+", "-", training.dataset),
            dataset_name=printable(report["dataset"]),
            metric_type="accuracy",
            metric_name=f"top-1 accuracy in percent ({printable(name)})",
            metric_value=round(top1, 2),
        )
        for name, top1 in rows
        if top1 is not None
    ]


def _usage(model: SelfDistillModel, repo_id: str | None, early_exit: EarlyExitConfig | None) -> str:
    """Return the section that loads the model: from a repository, or from a folder."""
    source = "FOLDER" if repo_id is None else f'"{repo_id}"'
    fast = "fast = sd.EarlyExit(model, 0.9)  # how sure an exit must be; higher is slower and more accurate\n"
    if early_exit is not None:
        fast = f"fast = sd.load_early_exit({source})  # with the thresholds that are saved with the model\n"
    return (
        f"In plain timm, without the exits:\n\n```python\n{_timm_snippet(model, repo_id)}```\n\n"
        "With the exits:\n\n```python\nimport timm_selfdistill as sd\n\n"
        f"model = sd.from_pretrained({source})\n"
        "out = model(x, return_exits=True)  # out.logits: shallow to deep\n```\n\n"
        f"Each image at the first exit that is sure of it:\n\n```python\n{fast}"
        "out = fast(x)  # out.logits, and out.exit_index: who answered\n```\n"
    )


def _timm_snippet(model: SelfDistillModel, repo_id: str | None) -> str:
    """Return the lines that load the backbone without this package."""
    source = "local-dir:FOLDER" if repo_id is None else f"hf-hub:{repo_id}"
    if _architecture(model) in default_cfgs:
        return (
            "import timm\nimport timm_selfdistill  # timm does not have this network; the import registers it\n\n"
            f'model = timm.create_model("{source}", pretrained=True)\n'
        )
    if not model.wrap_config.small_stem:
        return f'import timm\n\nmodel = timm.create_model("{source}", pretrained=True)\n'
    stem = model.backbone.conv1
    fetch, weights = "", '"FOLDER/model.safetensors"'
    if repo_id is not None:
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
