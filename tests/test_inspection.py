"""Programs of others that look into a network, on the wrapped one and on one that was cut at an exit."""

from collections.abc import Callable

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
