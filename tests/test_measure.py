import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_selfdistill.measure import MacCounter


@torch.no_grad()
def count(module, *inputs):
    with MacCounter() as counter:
        module(*inputs)
    return counter.macs


def test_equals_half_of_torchs_count_where_torch_can_count():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2).eval()
    x = torch.zeros(1, 3, 32, 32)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # not every torch counts the kernel of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert count(model, x) == counter.get_total_flops() / 2 > 0


def test_counts_cait_whose_modules_torchs_tracker_fails_on():
    width, tokens = 24, 4
    model = timm.create_model("cait_xxs24_224", img_size=32, embed_dim=width, depth=1, num_heads=2).eval()
    layers = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: layers.append(out.numel() * m.in_features))
        elif isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: layers.append(out.numel() * m.weight[0].numel()))
    macs = count(model, torch.zeros(1, 3, 32, 32))
    self_attention = 2 * tokens * tokens * width
    class_attention = 2 * (tokens + 1) * width
    assert macs == sum(layers) + self_attention + len(model.blocks_token_only) * class_attention


def test_counts_attention_with_gradients_and_without():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    x = torch.zeros(1, 3, 32, 32)
    with torch.enable_grad(), MacCounter() as counter:
        model(x)
    fused = count(model, x)
    assert fused == counter.macs
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert fused == count(model, x)


def test_counts_lstms():
    steps, batch, inputs, hidden = 7, 3, 4, 5
    lstm = nn.LSTM(inputs, hidden, num_layers=2, bidirectional=True).eval()
    first, second = 4 * hidden * (inputs + hidden), 4 * hidden * (2 * hidden + hidden)
    assert count(lstm, torch.zeros(steps, batch, inputs)) == steps * batch * 2 * (first + second)


def test_can_be_read_while_it_counts_and_starts_afresh():
    linear = nn.Linear(3, 5)
    counter = MacCounter()
    for _ in range(2):
        with counter, torch.no_grad():
            linear(torch.zeros(2, 3))
            assert counter.macs == 30
            linear(torch.zeros(2, 3))
        assert counter.macs == 60
