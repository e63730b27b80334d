"""Compiled stages: one graph for each part and batch size, none while serving, and the answers of the eager network."""

import copy
import math
import shutil

import pytest
import torch

import timm_selfdistill as sd

K = 2


@pytest.fixture
def fast(tiny_net):
    torch.manual_seed(0)
    model = sd.wrap(tiny_net(), exits=["stage0", "stage1"], image_size=32, head="linear").eval()
    with torch.no_grad():
        every = model(torch.randn(16, 3, 32, 32), return_exits=True).logits[:K]
    thresholds = [float(logits.softmax(-1).amax(-1).quantile(0.6)) for logits in every]
    return sd.EarlyExit(model, thresholds, buckets=[1, 4])


def test_nothing_is_compiled_while_it_serves(fast):
    eager, graphs = copy.deepcopy(fast), []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    fast.compile_stages(backend=backend)
    assert len(graphs) == 2 * (2 * K + 1)  # stages and heads, for each bucket
    generator, found = torch.Generator().manual_seed(1), set()
    with torch.no_grad():
        for count in (*range(1, 10), 17):
            images = torch.randn(count, 3, 32, 32, generator=generator)
            expected, out = eager(images), fast(images)
            assert torch.equal(out.exit_index, expected.exit_index)
            torch.testing.assert_close(out.logits, expected.logits)
            assert (fast(images, max_exit=0).exit_index == 0).all()
            found |= set(out.exit_index.tolist())
    assert found == {0, 1, 2}
    assert len(graphs) == 2 * (2 * K + 1)
    with pytest.raises(ValueError, match=r"compiled are images of \[3, 32, 32\] in batches of 1, 4"):
        fast(torch.randn(1, 3, 16, 16))
    with torch.no_grad():
        fast.model.backbone.fc.bias.fill_(7)  # the weights are the model's
        never = sd.EarlyExit(fast.model, math.inf)(images).logits
        fast.config = sd.EarlyExitConfig((math.inf,) * K)
        torch.testing.assert_close(fast(images).logits, never)
    assert len(graphs) == 2 * (2 * K + 1)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_all_before_it_serves(tiny_net):
    torch.manual_seed(0)
    model = sd.wrap(tiny_net(), exits=["stage1"], image_size=32, head="linear").eval()
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        confidence = model(images, return_exits=True).logits[0].softmax(-1).amax(-1).sort().values
    fast = sd.EarlyExit(model, float(confidence[4:6].mean()), buckets=[1, 4])
    eager = copy.deepcopy(fast)
    fast.compile_stages()
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for count in range(1, 10):
            out, expected = fast(images[:count]), eager(images[:count])
            assert torch.equal(out.exit_index, expected.exit_index)
            torch.testing.assert_close(out.logits, expected.logits)
    assert set(out.exit_index.tolist()) == {0, 1}


def test_stages_need_buckets(fast):
    with pytest.raises(ValueError, match="give buckets"):
        sd.EarlyExit(fast.model, 0.5).compile_stages()


def test_a_network_that_cannot_be_traced_is_named(fast, monkeypatch):
    forward = type(fast.model.backbone).forward

    def depends_on_pixels(self, x):
        return forward(self, x if float(x.mean()) > 9 else x + 0)

    monkeypatch.setattr(type(fast.model.backbone), "forward", depends_on_pixels)
    with pytest.raises(ValueError, match="TinyNet cannot be traced by"):
        fast.compile_stages(backend="eager")
