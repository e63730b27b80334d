"""One small member of every model class in timm, through the checks that the coverage benchmark runs on all of them."""

import inspect
from dataclasses import replace

import backbone_checks as checks
import pytest
import timm
import torch
from backbone_checks import Subject, check_backbone
from timm_coverage import main as sweep

VIT = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
NATIVE_VIT = {"embed_dim": 48, "depth": 4, "num_heads": 3}
COAT = {"img_size": 64, "embed_dims": [24, 24, 24, 24], "serial_depths": [1, 1, 1, 1], "parallel_depth": 1}
FORMER = {"img_size": 128, "depths": (1, 1, 2, 2), "num_vit": 1}
LEVIT = {"embed_dim": (64, 96, 128), "num_heads": (2, 3, 4), "depth": (1, 2, 1)}
CSAT = {"depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}

# By class, shallow where timm lets us choose. Heads are linear where the default ones would be the bulk of the time.
MEMBERS = {
    "Beit": Subject("beit_base_patch16_224", model_kwargs=VIT),
    "ByobNet": Subject("test_byobnet", image_size=64),
    "CPUBone": Subject("cpubone_nano", image_size=64),
    "CSATv2": Subject("csatv2", image_size=64, model_kwargs=CSAT),
    "Cait": Subject("cait_xxs24_224", model_kwargs=VIT),
    "CoaT": Subject("coat_tiny", model_kwargs=COAT),
    "ConVit": Subject("convit_tiny", model_kwargs={**VIT, "local_up_to_layer": 2}),
    "ConvMixer": Subject("convmixer_768_32", image_size=64),
    "ConvNeXt": Subject("test_convnext", image_size=64),
    "CrossVit": Subject("crossvit_tiny_240", model_kwargs={"embed_dim": [24, 48], "depth": [[1, 1, 0]] * 3}),
    "CspNet": Subject("cs3darknet_focus_s", image_size=64),
    "CspNext": Subject("cspnext_tiny", image_size=64),
    "DLA": Subject("dla46x_c", image_size=64),
    "DPN": Subject("dpn48b", image_size=64, model_kwargs={"k_sec": (1, 1, 2, 1)}),
    "DaVit": Subject("davit_tiny", image_size=64),
    "DeepseekVitClassifier": Subject("deepseek_vit_412m", image_size=56, model_kwargs=NATIVE_VIT),
    "DeepseekVitEncoder": Subject("deepseek_vit_412m_enc", image_size=56, model_kwargs=NATIVE_VIT),
    "DenseNet": Subject("densenet121", image_size=64, model_kwargs={"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "EdgeNeXt": Subject("edgenext_xx_small", image_size=64),
    "EfficientFormer": Subject("efficientformer_l1"),
    "EfficientFormerV2": Subject("efficientformerv2_s0", model_kwargs=FORMER),
    "EfficientNet": Subject("test_efficientnet", image_size=64),
    "EfficientViM": Subject("efficientvim_m1", image_size=128, model_kwargs={"depths": (1, 1, 1)}),
    "EfficientViMDistilled": Subject("efficientvim_m1_dist", image_size=128, model_kwargs={"depths": (1, 1, 1)}),
    "EfficientVit": Subject("efficientvit_b0", image_size=64),
    "EfficientVitLarge": Subject("efficientvit_l1", image_size=64, head="linear"),
    "EfficientVitMsra": Subject("efficientvit_m0", model_kwargs={"depth": [1, 1, 2]}),
    "Eva": Subject("vit_tiny_patch16_dinov3_qkvb", model_kwargs=VIT),
    "FastVit": Subject("fastvit_t8", image_size=64, model_kwargs={"layers": (1, 1, 2, 1)}),
    "FasterNet": Subject("fasternet_t0", image_size=64, model_kwargs={"depths": (1, 1, 2, 1)}),
    "FocalNet": Subject("focalnet_tiny_srf", image_size=64),
    "Gemma4VitClassifier": Subject("gemma4_vit_167m", image_size=96, model_kwargs=NATIVE_VIT),
    "Gemma4VitEncoder": Subject("gemma4_vit_167m_enc", image_size=96, model_kwargs={"depth": 1}),
    "GhostNet": Subject("ghostnet_050", image_size=64),
    "GlobalContextVit": Subject("gcvit_xxtiny"),
    "Hiera": Subject("hiera_tiny_224", model_kwargs={"img_size": (64, 64), "embed_dim": 24, "stages": (1, 1, 2, 1)}),
    "HieraDet": Subject("sam2_hiera_tiny", image_size=64),
    "HighPerfGpuNet": Subject("hgnetv2_b0", image_size=64),
    "HighResolutionNet": Subject("hrnet_w18_small", image_size=64),
    "IFormer": Subject("iformer_t", image_size=64),
    "InceptionResnetV2": Subject("inception_resnet_v2", image_size=96, head="linear"),
    "InceptionV3": Subject("inception_v3", image_size=96, head="linear"),
    "InceptionV4": Subject("inception_v4", image_size=96, head="linear"),
    "LCNetV2": Subject("lcnetv2_small", image_size=64, model_kwargs={"depths": (1, 1, 2, 1)}),
    "Levit": Subject("levit_256d", model_kwargs=LEVIT),
    "LevitDistilled": Subject("levit_128s", model_kwargs={"depth": (1, 2, 1)}),
    "LowFormer": Subject("lowformer_b0", image_size=64, model_kwargs={"depth_list": [0, 1, 1, 1, 1]}),
    "MambaOut": Subject("test_mambaout", image_size=64),
    "MaxxVit": Subject("test_maxvit", model_kwargs={"img_size": 64}),
    "MetaFormer": Subject("poolformer_s12", image_size=64),
    "MetaNeXt": Subject("inception_next_atto", image_size=64, model_kwargs={"depths": (1, 1, 2, 1)}),
    "MlpMixer": Subject("gmlp_ti16_224", model_kwargs={"img_size": 64}),
    "MobileNetV3": Subject("mobilenetv3_small_050", image_size=64),
    "MobileNetV5": Subject("mobilenetv5_base", image_size=64, head="linear"),
    "MobileNetV5Encoder": Subject("mobilenetv5_300m_enc", image_size=64),
    "MultiScaleVit": Subject("mvitv2_tiny", model_kwargs={"img_size": 64}),
    "NASNetALarge": Subject("nasnetalarge", image_size=96, head="linear"),
    "NaFlexVit": Subject("naflexvit_base_patch16_gap", image_size=64, model_kwargs=NATIVE_VIT),
    "Nest": Subject("nest_tiny", model_kwargs={"img_size": 64}),
    "NextViT": Subject("nextvit_small", image_size=64),
    "NormFreeNet": Subject("test_nfnet", image_size=64),
    "PNASNet5Large": Subject("pnasnet5large", image_size=96, head="linear"),
    "PoolingVisionTransformer": Subject("pit_ti_distilled_224", model_kwargs={"depth": [1, 2, 1]}),
    "PyramidVisionTransformerV2": Subject("pvt_v2_b0", image_size=64, model_kwargs={"depths": (1, 1, 1, 1)}),
    "Qwen3VitClassifier": Subject("qwen3_vit_88m", image_size=64, model_kwargs=NATIVE_VIT),
    "Qwen3VitEncoder": Subject("qwen3_vit_88m_enc", image_size=64, model_kwargs={"depth": 1}),
    "RDNet": Subject("rdnet_tiny", image_size=64),
    "RegNet": Subject("regnetx_002", image_size=64),
    "RepGhostNet": Subject("repghostnet_050", image_size=64),
    "RepVit": Subject("repvit_m0_9", image_size=64, model_kwargs={"depth": (1, 1, 2, 1)}),
    "ResNet": Subject("test_resnet", image_size=64),
    "ResNetV2": Subject("resnetv2_18", image_size=64, model_kwargs={"layers": (1, 1, 1, 1)}),
    "RexNet": Subject("rexnet_100", image_size=64, model_kwargs={"depth_mult": 0.5}),
    "SENet": Subject("legacy_seresnet18", image_size=64, model_kwargs={"layers": (1, 1, 1, 1)}),
    "SHViT": Subject("shvit_s1", image_size=128),
    "SelecSls": Subject("selecsls42", image_size=128),
    "Sequencer2d": Subject("sequencer2d_s", model_kwargs={"img_size": 64}),
    "StarNet": Subject("starnet_s050", image_size=64),
    "SwiftFormer": Subject("swiftformer_xs"),
    "SwinTransformer": Subject("swin_tiny_patch4_window7_224", model_kwargs=SWIN),
    "SwinTransformerV2": Subject("swinv2_tiny_window8_256", model_kwargs=SWIN),
    "SwinTransformerV2Cr": Subject("swinv2_cr_tiny_224", model_kwargs=SWIN),
    "TNT": Subject("tnt_s_legacy_patch16_224", model_kwargs={"img_size": 64, "depth": 4}),
    "TResNet": Subject("tresnet_m", image_size=64),
    "TinyVit": Subject("tiny_vit_5m_224", image_size=64),
    "Twins": Subject("twins_svt_small", model_kwargs={"img_size": 64, "depths": [1, 1, 2, 1]}),
    "VGG": Subject("vgg11", image_size=64, head="linear"),
    "VOLO": Subject("volo_d1_224", model_kwargs={"img_size": 64}),
    "Visformer": Subject("visformer_tiny"),
    "VisionTransformer": Subject("test_vit"),
    "VisionTransformerDistilled": Subject("deit_tiny_distilled_patch16_224", model_kwargs=VIT),
    "VisionTransformerRelPos": Subject("test_vit_relpos"),
    "VisionTransformerSAM": Subject("samvit_base_patch16_224", model_kwargs=VIT),
    "VovNet": Subject("ese_vovnet19b_slim_dw", image_size=64),
    "Xception": Subject("legacy_xception", image_size=96, head="linear"),
    "XceptionAligned": Subject("xception41p", image_size=64, head="linear"),
    "Xcit": Subject("xcit_nano_12_p16_224", model_kwargs={"img_size": 64, "depth": 4}),
}
# A further member where a class has more than one form.
FORMS = {
    "CoaT without parallel blocks": Subject("coat_lite_tiny", model_kwargs={"img_size": 64, "serial_depths": [1] * 4}),
    "DeiT 3 with register tokens": Subject("vit_little_patch16_reg4_gap_256", model_kwargs=VIT),
    "LeViT on maps": Subject("levit_conv_128s", model_kwargs={"depth": (1, 2, 1)}),
    "MViTv2 with a class token": Subject("mvitv2_small_cls", model_kwargs={"img_size": 64}),
    "PiT without distillation": Subject("pit_ti_224", model_kwargs={"depth": [1, 2, 1]}),
    "ResNetV2 of BiT": Subject("resnetv2_50x1_bit", image_size=64, head="linear"),
    "Twins of PCPVT": Subject("twins_pcpvt_small", model_kwargs={"img_size": 64}),
}
# CSATv2's stem is made for three channels, as timm warns.
RGB_ONLY = {"CSATv2"}
ENCODERS = {name for name in MEMBERS if name.endswith("Encoder")}


# Large in their smallest form. Their layouts and kinds of classifier are those of others; the test of one input
# channel, on the meta device, has them too.
LARGE = {
    *("ConvMixer", "DaVit", "EfficientFormer", "EfficientVitLarge", "FocalNet", "GlobalContextVit", "HieraDet"),
    *("HighPerfGpuNet", "InceptionResnetV2", "InceptionV3", "InceptionV4", "MobileNetV5", "NASNetALarge", "NextViT"),
    *(
        "PNASNet5Large",
        "RDNet",
        "RepGhostNet",
        "SelecSls",
        "Sequencer2d",
        "SwiftFormer",
        "TResNet",
        "TinyVit",
        "VGG",
        "VOLO",
    ),
    *("Visformer", "Xception", "XceptionAligned", "MViTv2 with a class token", "ResNetV2 of BiT", "Twins of PCPVT"),
}


def slow_if_large(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in names]


@pytest.mark.parametrize("name", slow_if_large(MEMBERS))
def test_one_member_of_every_class(name):
    row = check_backbone(MEMBERS[name])
    assert row["class"] == name
    assert row["status"] == ("encoder" if name in ENCODERS else "supported")


@pytest.mark.parametrize("form", slow_if_large(FORMS))
def test_one_member_of_every_further_form(form):
    assert check_backbone(FORMS[form])["status"] == "supported"


@pytest.mark.parametrize("channels", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(set(MEMBERS) - ENCODERS - RGB_ONLY))
def test_every_class_takes_other_numbers_of_input_channels(name, channels):
    member = MEMBERS[name]
    subject = replace(member, device="meta", model_kwargs={**member.model_kwargs, "in_chans": channels})
    model = subject.wrap(subject.create())
    x = subject.images(model.backbone)
    assert x.shape[1] == channels
    assert model(x, return_exits=True).logits[0].shape == (len(x), checks.NUM_CLASSES)


def test_every_class_of_timm_has_a_member(monkeypatch):
    """Every entry point is called, and stopped where it would build its class."""

    class Asked(Exception):
        pass

    def build_model_with_cfg(model_cls, *args, **kwargs):
        raise Asked(model_cls)

    # Other tests register models of their own.
    names = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]
    assert len(names) > 1000
    for module in {inspect.getmodule(timm.model_entrypoint(name)) for name in names}:
        monkeypatch.setattr(module, "build_model_with_cfg", build_model_with_cfg)
    classes = set()
    for name in names:
        with pytest.raises(Asked) as asked:
            timm.model_entrypoint(name)()
        classes.add(asked.value.args[0].__name__)
    assert classes == set(MEMBERS)


@pytest.mark.slow
def test_every_model_of_timm(tmp_path):
    assert sweep(["--fresh", "--output", str(tmp_path / "models.jsonl"), "--report", str(tmp_path / "report.md")]) == 0


def test_meta_device_gives_the_same_result():
    subject = MEMBERS["SwinTransformer"]
    real, meta = (
        check_backbone(Subject(subject.name, device, model_kwargs=subject.model_kwargs)) for device in ("cpu", "meta")
    )
    only_real = {"taps_checked": None, "early_exit": None, "truncation": None}
    assert {**meta, **only_real} == {**real, **only_real}
    assert real["early_exit"] == [True] * 3
    assert meta["taps_checked"] == {"taps": 3, "same_shape": 3, "same_values": 0}


# The checks themselves would see a fault.


def test_checks_see_what_is_broken():
    subject = Subject("test_resnet", image_size=64)
    bare = subject.create()
    model = subject.wrap(subject.create())
    x = subject.images(bare)

    def fault(check, *args):
        with pytest.raises(checks.Broken) as error:
            check(*args)
        return str(error.value)

    assert fault(checks.check_that_an_encoder_is_refused, bare) == "a model without a classifier was wrapped"
    model.heads[1].body.embed.reduce.requires_grad_(False)
    assert "without a gradient: ['1.body.embed.reduce." in fault(checks.check_training_step, bare, model, x)
    with torch.no_grad():
        model.backbone.fc.bias.add_(1)
    assert fault(checks.check_same_answer, bare, model, x) == "model(x), training=True differs"
    wrong = replace(model.points[0].taps[0], layout="NHWC")
    model.taps = replace(model.taps, points=(replace(model.points[0], taps=(wrong,)), *model.points[1:]))
    assert fault(checks.check_outputs, model, x).startswith("layer1 was read as")


def test_checks_see_a_wrong_cut(monkeypatch):
    subject = Subject("test_resnet", image_size=64)
    model = subject.wrap(subject.create())
    x = subject.images(model.backbone)
    truncate = checks.sd.truncate

    def cut_too_early(model, exit):
        return truncate(model, 0)

    monkeypatch.setattr(checks.sd, "truncate", cut_too_early)
    with pytest.raises(checks.Broken, match="cut at layer2, training=True: the answer differs"):
        checks.check_truncation(model, x, True)

    def freeze_backbone(model, exit):
        small = truncate(model, exit)
        small.backbone.requires_grad_(False)
        return small

    monkeypatch.setattr(checks.sd, "truncate", freeze_backbone)
    with pytest.raises(checks.Broken, match=r"only one of two runs has a gradient of backbone\.conv1"):
        checks.check_truncation(model, x, True)


def test_checks_on_the_meta_device_see_another_operation():
    subject = Subject("test_resnet", "meta", image_size=64)
    bare, model = subject.create(), subject.wrap(subject.create())
    model.backbone.global_pool = torch.nn.Sequential(torch.nn.Tanh(), model.backbone.global_pool)
    with pytest.raises(checks.Broken, match=r"model\(x\), training=True runs other operations"):
        checks.check_same_answer(bare, model, subject.images(bare))
