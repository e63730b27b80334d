"""The model card of a saved model: how to load it, here and in plain timm."""

from timm_selfdistill.model import SelfDistillModel


def model_card(model: SelfDistillModel, repo_id: str | None = None) -> str:
    """Return a model card that tells how to load a model.

    Args:
        model: The wrapped model.
        repo_id: Where on the Hub it is, as "namespace/name"; by default it is in a folder, for which FOLDER stands.
    """
    architecture = model.pretrained_cfg.get("architecture", type(model.backbone).__name__)
    names = ", ".join(f"`{name}`" for name in model.exit_names)
    source = "FOLDER" if repo_id is None else f'"{repo_id}"'
    return (
        "---\nlibrary_name: timm\npipeline_tag: image-classification\n"
        "tags:\n- image-classification\n- timm\n- timm_selfdistill\n---\n\n"
        f"# {architecture}, self-distilled\n\n"
        f"A timm `{architecture}` with {model.num_classes} classes and exits at {names}, trained as its own teacher.\n"
        f"\nIn plain timm, without the exits:\n\n```python\n{_timm_snippet(model, repo_id)}```\n\n"
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
        fetch, weights = (
            "import huggingface_hub\n",
            f'huggingface_hub.hf_hub_download("{repo_id}", "model.safetensors")',
        )
    return (
        f"{fetch}import timm\nimport torch\n\n"
        f'model = timm.create_model("{source}", pretrained=False)\n'
        f"model.conv1 = torch.nn.Conv2d({stem.in_channels}, {stem.out_channels}, 3, padding=1, bias=False)\n"
        "model.maxpool = torch.nn.Identity()\n"
        f"timm.models.load_checkpoint(model, {weights})\n"
    )
