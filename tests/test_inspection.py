"""Programs of others that look into a network, on the wrapped one and on one that was cut at an exit."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_selfdistill as sd


@pytest.fixture(params=["wrapped", "cut"])
def network(request: pytest.FixtureRequest, make_backbone: Callable[..., nn.Module]) -> nn.Module:
    model = sd.wrap(make_backbone("resnet18"), image_size=64).eval()
    return model if request.param == "wrapped" else sd.truncate(model, exit=1)


def macs(network: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return counter.get_total_flops() // 2


def test_torchinfo_lists_the_layers(network: nn.Module, images: Tensor) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    found = torchinfo.summary(network, input_data=images, verbose=0)
    assert found.total_params == sum(parameter.numel() for parameter in network.parameters())
    # It counts additions of biases and batch norms too.
    assert 1 <= found.total_mult_adds / macs(network, images) < 1.05


def test_fvcore_counts_what_runs(network: nn.Module, images: Tensor) -> None:
    counting = pytest.importorskip("fvcore.nn")
    analysis = counting.FlopCountAnalysis(network, images).unsupported_ops_warnings(False)
    analysis.uncalled_modules_warnings(False)
    counted = sum(analysis.by_operator()[kind] for kind in ("conv", "linear"))
    assert counted == macs(network, images)


def test_captum_attributes_an_answer_to_the_pixels(network: nn.Module, images: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    method = attr.IntegratedGradients(network)
    attributions, delta = method.attribute(images, target=2, n_steps=64, return_convergence_delta=True)
    change = (network(images) - network(torch.zeros_like(images)))[:, 2]
    torch.testing.assert_close(attributions.sum((1, 2, 3)).float(), change, rtol=0.1, atol=0.1)
    assert delta.abs().max() < 0.1
    maps = attr.LayerGradCam(network, network.backbone.layer1).attribute(images, target=2)
    assert maps.shape[:2] == (4, 1)


def test_pt2e_quantises_the_exported_graph(network: nn.Module, images: Tensor) -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    expected = network(images).detach()
    graph = torch.export.export(network, (images,)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(graph, quantizer)
    prepared(images)  # calibration
    quantised = pt2e.convert_pt2e(prepared)
    quantisations = [node for node in quantised.graph.nodes if "quantized_decomposed.quantize" in str(node.target)]
    convolutions = [node for node in quantised.graph.nodes if "conv2d" in str(node.target)]
    assert len(quantisations) >= len(convolutions) > 5
    with torch.no_grad():
        found = quantised(images)
    # Eight bits keep about two digits.
    assert 0 < (found - expected).norm() / expected.norm() < 0.1


def test_what_torchao_quantised_leaves_early_and_is_neither_saved_nor_exported(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    small = {"embed_dim": 48, "depth": 4, "num_heads": 3}
    model = sd.wrap("vit_tiny_patch16_224", num_classes=5, image_size=32, model_kwargs=small).eval()
    x = torch.randn(4, 3, 32, 32)
    fast = sd.EarlyExit(model, [math.inf, 0.0, 0.0])
    with torch.no_grad():
        before = fast(x)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        after = fast(x)
    assert (after.logits - before.logits).abs().max() < 0.05 * before.logits.abs().max()
    assert not torch.equal(after.logits, before.logits)
    assert after.exit_index.tolist() == [1] * 4
    message = r"weights of the model, such as .*, are no plain tensors but Int8Tensor: a quantised"
    with pytest.raises(ValueError, match=message):
        sd.save_pretrained(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        sd.export_model(model, 0, tmp_path / "net.pt2", format="torch-export", image_size=32)
    with pytest.raises(ValueError, match=message):
        sd.export_early_exit(fast, tmp_path / "stages", format="onnx-stages", image_size=32)
    assert not list(tmp_path.iterdir())
