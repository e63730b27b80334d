import copy
import io
import math
import pickle
import random
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.model import ExitOutput
from timm_selfdistill.truncation import watch_usage

SIZE = 64
# Small members of families that can be fused, with the image size that they are run at.
FUSED = {"repvit_m0_9": 64, "levit_128s": 224, "mobileone_s0": 32, "fastvit_t8": 64, "repghostnet_050": 32}


@pytest.fixture
def model(make_backbone):
    """A small ResNet with three exits, in eval mode, whose logits differ between images."""
    torch.manual_seed(0)
    model = sd.wrap(make_backbone("resnet18"), image_size=SIZE)
    for _ in range(3):
        model(torch.randn(8, 3, SIZE, SIZE), return_exits=True)
    return model.eval()


@pytest.fixture
def impatient():
    """Threads that take turns far more often than by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def tensors(answer):
    """All tensors of an answer of any kind."""
    return [answer] if isinstance(answer, torch.Tensor) else [t for part in answer for t in tensors(part)]


def is_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def every_way(model):
    """The ways to ask a model, and networks made of it, by name."""
    with torch.no_grad():
        logits = model(torch.randn(64, 3, SIZE, SIZE), return_exits=True).logits[:-1]
    sure = [float(part.softmax(-1).amax(-1).median()) for part in logits]
    return {
        "plain": model,
        "exits": lambda x: model(x, return_exits=True),
        **{f"exit {exit}": lambda x, exit=exit: model.forward_exit(x, exit) for exit in range(4)},
        "early": sd.EarlyExit(model, sure),
        "patience": sd.EarlyExit(model, 1, rule="patience", fallback="ensemble"),
        "cut": sd.truncate(model, 1),
    }


def hook_functions(module):
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


# Threads.


def test_eight_threads_get_the_answers_that_one_gets(model, impatient):
    ways = every_way(model)
    inputs = [torch.randn(n, 3, size, size) for n in (1, 2, 3, 5) for size in (32, 48, SIZE)]
    requests = [(way, x) for way in ways.values() for x in inputs]
    with torch.no_grad():
        alone = [way(x) for way, x in requests]
    assert len({int(exit) for out in alone if isinstance(out, sd.EarlyExitOutput) for exit in out.exit_index}) > 2
    start = threading.Barrier(8)

    def serve(seed):
        order = random.Random(seed).choices(range(len(requests)), k=200)
        start.wait()
        with torch.no_grad():
            return [index for index in order if not is_equal(requests[index][0](requests[index][1]), alone[index])]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(serve, range(8))) == [[]] * 8


def test_threads_in_different_modes_of_torch_do_not_meet(model, impatient, images):
    ways = list(every_way(model).values())

    def under(context, repeats):
        with context():
            return [[way(images) for way in ways] for _ in range(repeats)]

    contexts = [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
    alone = [under(context, 1)[0] for context in contexts]
    with ThreadPoolExecutor(4) as pool:
        served = list(pool.map(lambda context: under(context, 6), contexts))
    for expected, rounds in zip(alone, served, strict=True):
        assert all(is_equal(answers, expected) for answers in rounds)
        kinds = [(t.dtype, t.requires_grad, t.is_inference()) for t in tensors(expected)]
        assert all([(t.dtype, t.requires_grad, t.is_inference()) for t in tensors(got)] == kinds for got in rounds)


def test_request_that_fails_harms_no_other(model, impatient, images):
    ways = list(every_way(model).values())
    with torch.no_grad():
        alone = [way(images) for way in ways]

    def serve(number):
        right = []
        for way, expected in zip(ways, alone, strict=True):
            if number % 2:
                with pytest.raises(RuntimeError, match="channels"):
                    way(images[:, :2])
            with torch.no_grad():
                right.append(is_equal(way(images), expected))
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(all(right) for right in pool.map(serve, range(12)))


def test_image_files_are_predicted_in_threads(model, impatient, make_image_folder, tmp_path):
    files = sorted(make_image_folder(tmp_path / "images", train=3, validation=1).rglob("*.png"))
    fast = every_way(model)["early"]
    asked = [(model, exit, size) for exit in (0, None) for size in (1, 3)] + [(fast, None, size) for size in (1, 3)]

    def predict(number):
        net, exit, size = asked[number % len(asked)]
        return list(sd.predict_images(net, files, exit=exit, top_k=3, batch_size=size, workers=0))

    alone = [predict(number) for number in range(len(asked))]
    assert all(len(predictions) == len(files) and not predictions[0].error for predictions in alone)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(predict, range(3 * len(asked)))) == alone * 3


def test_users_hooks_may_come_and_go_while_threads_are_served(model, impatient, images):
    modules = [model.backbone.get_submodule(path) for path in ("layer1", "layer2.1", "layer3", "fc")]
    with torch.no_grad():
        expected = model(images, return_exits=True)
    done = threading.Event()

    def serve(number):
        right = []
        while not done.is_set():
            with torch.no_grad():
                right.append(is_equal(model(images, return_exits=True), expected))
                right.append(is_equal(model.forward_exit(images, number), expected.logits[number]))
        return all(right)

    with ThreadPoolExecutor(3) as pool:
        served = [pool.submit(serve, number) for number in range(3)]
        try:
            for _ in range(100):
                handles = [module.register_forward_hook(lambda m, args, output: None) for module in modules]
                handles += [module.register_forward_pre_hook(lambda m, args: None) for module in modules]
                with torch.no_grad():
                    assert model.forward_exit(images[:1], 2).shape == (1, 5)
                for handle in handles:
                    handle.remove()
        finally:
            done.set()
        assert all(future.result() for future in served)


def test_compiled_model_serves_threads(model, images):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        alone = compiled(images, return_exits=True)
        assert is_equal(alone, model(images, return_exits=True))

        def serve(number):
            with torch.no_grad():
                return is_equal(compiled(images, return_exits=True), alone)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(serve, range(40)))
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exits_can_be_exported(model, images, strict):
    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            # Of a forward that ends at an exit, torch's tracer without `strict` loses count of the modules.
            return (*self.model(x, return_exits=True), self.model.forward_exit(x, 0) if strict else x)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Exits(), (images,), strict=strict).module()
        for got, expected in zip(tensors(program(images)), tensors(Exits()(images)), strict=True):
            torch.testing.assert_close(got, expected)


def test_replicas_as_data_parallel_makes_them_answer_each_for_itself(model, impatient, images):
    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
        return replica

    replicas = [replicate(model) for _ in range(4)]
    parts = [torch.randn(2, 3, SIZE, SIZE) for _ in replicas]
    with torch.no_grad():
        alone = [model(part, return_exits=True) for part in parts]

        def serve(number):
            with torch.no_grad():
                return is_equal(replicas[number % 4](parts[number % 4], return_exits=True), alone[number % 4])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(serve, range(80)))


def test_forwards_leave_the_state_of_the_process_alone(model, images, monkeypatch):
    ways = every_way(model)

    def touched(*args, **kwargs):
        raise AssertionError("a forward changed the state of the process")

    for owner, name in (
        (warnings.catch_warnings, "__enter__"),
        (warnings, "simplefilter"),
        (warnings, "filterwarnings"),
        (torch, "manual_seed"),
        (torch, "set_rng_state"),
        (torch.random, "fork_rng"),
        (torch, "set_num_threads"),
        (torch, "set_default_dtype"),
        (torch.backends.cudnn, "flags"),
    ):
        monkeypatch.setattr(owner, name, touched)
    before = torch.get_rng_state()
    for way in ways.values():
        way(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_cutting_looks_at_the_own_thread_only(model, images):
    with watch_usage(model) as usage, ThreadPoolExecutor(1) as pool:
        pool.submit(model, images).result()
    assert not usage.modules
    assert not usage.tensors


# Copies.


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved, lambda model: pickled(copy.deepcopy(model))])
def test_copies_answer_for_themselves(model, images, duplicate):
    with torch.no_grad():
        before = model(images, return_exits=True)
        small = sd.truncate(model, 1)
        twin, twin_small = duplicate(model), duplicate(small)
        assert is_equal(twin(images, return_exits=True), before)
        assert is_equal(twin_small(images), small(images))
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        out = twin(images, return_exits=True)
        assert not is_equal(out, before)
        assert is_equal([twin.forward_exit(images, exit) for exit in range(4)], out.logits)
        assert is_equal(model(images, return_exits=True), before)


def test_copied_classifier_beside_the_first_is_read(model, images):
    """As PEFT's `modules_to_save` does: a wrapper at the classifier's path runs a copy of it."""

    class Wrapper(nn.Module):
        def __init__(self, original):
            super().__init__()
            self.original_module = original
            self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})

        def forward(self, x):
            return self.modules_to_save["default"](x)

    with torch.no_grad():
        before = model(images, return_exits=True)
        model.backbone.fc = Wrapper(model.backbone.fc)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
        assert is_equal(compiled(images, return_exits=True), before)
        assert is_equal(model(images, return_exits=True), before)
        model.backbone.fc.modules_to_save["default"].bias.add_(1)
        torch.testing.assert_close(model(images, return_exits=True).logits[-1], before.logits[-1] + 1)
    torch._dynamo.reset()


def test_wrapper_that_changes_what_a_tapped_layer_returns_is_read(make_backbone, images):
    """As a LoRA layer does: at the tapped layer's path, it adds to what that layer returns."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return self.base_layer(x) + 1

    model = sd.wrap(make_backbone("resnet18"), exits=["layer2.0.conv2"], head="linear", image_size=SIZE).eval()
    model.backbone.layer2[0].conv2 = Adapted(model.backbone.layer2[0].conv2)
    seen = []
    model.backbone.layer2[0].conv2.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        out = model(images, return_exits=True)
        assert is_equal(out.logits[0], model.heads[0].classify(seen[0]))
        assert is_equal(model.forward_exit(images, 0), out.logits[0])


# A user's own hooks.


@pytest.mark.parametrize("path", ["layer2", "layer2.1"])
@pytest.mark.parametrize("way", ["plain", "exits", "exit 1", "exit 2", "exit 3", "early", "cut"])
def test_users_hook_on_a_tapped_module_fires_as_on_the_plain_backbone(make_backbone, images, way, path):
    plain, backbone = make_backbone("resnet18").eval(), make_backbone("resnet18")
    fired = {True: [], False: []}

    def add_hooks(net):
        module = net.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args: fired[net is plain].append(("in", args[0])))
        module.register_forward_hook(lambda m, args, output: fired[net is plain].append(("out", output)))
        module.register_forward_hook(lambda m, args, kwargs, output: output + 1, with_kwargs=True)
        module.register_forward_hook(lambda m, args, output: fired[net is plain].append(("then", output)))

    model = sd.wrap(backbone, image_size=SIZE).eval()
    with torch.no_grad():
        add_hooks(plain)
        expected = plain(images)
        if way == "cut":
            # A function of a hook is copied with the module.
            add_hooks(backbone)
            run = sd.truncate(model, 1)
            fired[False].clear()
        else:
            run = every_way(model)[way] if way != "early" else sd.EarlyExit(model, [math.inf, 0.0, 0.0])
            add_hooks(backbone)
        answer = run(images)
        assert [name for name, _ in fired[False]] == ["in", "out", "then"]
        assert is_equal([value for _, value in fired[False]], [value for _, value in fired[True]])
        if way in ("exits", "plain", "exit 3"):
            assert is_equal(answer.logits[-1] if isinstance(answer, ExitOutput) else answer, expected)
        # The exit reads what its module returns, after all hooks.
        at_exit = {"exits": lambda: answer.logits[1], "early": lambda: answer.logits}.get(way, lambda: answer)
        if way in ("exits", "exit 1", "early", "cut"):
            assert is_equal(at_exit(), model.heads[1].classify(fired[False][-1][1]))


def test_hook_before_the_classifier_changes_the_teachers_feature(model, images):
    model.backbone.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with torch.no_grad():
        out = model(images, return_exits=True)
        assert is_equal(model.backbone.fc.forward(out.features[-1]), out.logits[-1])


def test_hook_may_call_the_model_again(model, images):
    with torch.no_grad():
        expected, others = model(images, return_exits=True), [model.forward_exit(images[:1], 0), model(images[1:3])]
        all_of_it = model(images[:2], return_exits=True)
        inner = []

        def ask(module, args, output):
            if not inner:
                inner.append(None)
                inner.extend([model.forward_exit(images[:1], 0), model(images[1:3])])
                inner.append(model(images[:2], return_exits=True))

        handle = model.backbone.layer3.register_forward_hook(ask)
        assert is_equal(model(images, return_exits=True), expected)
        assert is_equal(inner[1:], [*others, all_of_it])
        inner.clear()
        assert is_equal(model.forward_exit(images, 2), expected.logits[2])
        assert is_equal(inner[1:], [*others, all_of_it])
        handle.remove()


# Modules that are replaced after wrapping.


def fuse_children(model):
    fused = copy.deepcopy(model)
    reparameterize_model(fused.backbone, inplace=True)
    return fused


@pytest.mark.parametrize("fuse", [reparameterize_model, fuse_children])
@pytest.mark.parametrize("name", FUSED)
def test_backbone_that_is_fused_after_wrapping_answers_as_before(name, fuse):
    torch.manual_seed(0)
    model = sd.wrap(timm.create_model(name, num_classes=5), image_size=FUSED[name], head="linear")
    x = torch.randn(4, 3, FUSED[name], FUSED[name])
    with torch.no_grad():
        model(x, return_exits=True)  # in train mode: the statistics, which fusing takes up, move
        model.eval()
        expected = model(x, return_exits=True)
        fused = fuse(model)
        assert len(list(fused.backbone.parameters())) < len(list(model.backbone.parameters()))
        for net in (fused, copy.deepcopy(fused)):
            out = net(x, return_exits=True)
            for got, want in zip(tensors(out), tensors(expected), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
            for exit in range(model.num_exits + 1):
                torch.testing.assert_close(net.forward_exit(x, exit), out.logits[exit])
        torch.testing.assert_close(sd.truncate(fused, 0)(x), out.logits[0])
        assert is_equal(sd.EarlyExit(fused, 0.0)(x).logits, out.logits[0])
        fused.reset_classifier(3)
        assert [z.shape for z in fused(x, return_exits=True).logits] == [(4, 3)] * len(out.logits)


@pytest.mark.parametrize("fused_first", [True, False])
def test_fused_network_is_not_saved_as_one_that_cannot_be_loaded(tmp_path, fused_first):
    backbone = timm.create_model("repghostnet_050", num_classes=5).eval()
    if fused_first:
        model = sd.wrap(reparameterize_model(backbone), image_size=64)
    else:
        model = reparameterize_model(sd.wrap(backbone, image_size=64))
    assert model(torch.randn(2, 3, 64, 64), return_exits=True)
    with pytest.raises(ValueError, match=r"RepGhostNet could not be loaded again.* fused or changed"):
        sd.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    sd.save_pretrained(sd.wrap(backbone, image_size=64), tmp_path)
    sd.from_pretrained(tmp_path)


def test_hooks_of_a_replaced_module_are_put_back_once(model, images):
    for _ in range(2):
        model.backbone.layer1[1] = copy.deepcopy(model.backbone.layer1[1])
        model.backbone.fc = copy.deepcopy(model.backbone.fc)
        model(images, return_exits=True)
    counts = [len(hook_functions(model.backbone.get_submodule(path))) for path in ("layer1", "layer1.1", "fc")]
    assert counts == [2, 2, 1]


@pytest.mark.filterwarnings("ignore:ResNet cannot run on with a part of its batch")
@pytest.mark.parametrize("way", ["exits", "exit 0", "early", "cut"])
def test_tapped_module_that_is_gone_is_named(make_backbone, images, way):
    model = sd.wrap(make_backbone("resnet18"), exits=["layer1.0.conv2"], head="linear", image_size=SIZE).eval()
    ways = {
        "exits": lambda x: model(x, return_exits=True),
        "exit 0": lambda x: model.forward_exit(x, 0),
        "early": sd.EarlyExit(model, 0.5),
        "cut": sd.truncate(model, 0),
    }
    net = ways["cut"].backbone if way == "cut" else model.backbone
    net.layer1[0] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"no longer runs its module 'layer1\.0\.conv2'.* Fuse .* first, then wrap"):
        ways[way](images)


def test_tapped_module_that_does_not_run_any_more_is_named(make_backbone, images):
    model = sd.wrap(make_backbone("resnet18"), exits=["layer1.1.conv2"], head="linear", image_size=SIZE).eval()
    model.backbone.layer1[1].forward = lambda x: x
    for ask in (lambda: model(images, return_exits=True), lambda: model.forward_exit(images, 0)):
        with pytest.raises(RuntimeError, match=r"no longer runs its module 'layer1\.1\.conv2'"):
            ask()


def test_classifier_of_another_size_is_refused(model, images):
    model.backbone.fc = nn.Linear(model.backbone.fc.in_features, 9)
    with pytest.raises(RuntimeError, match=r"replace it by model\.reset_classifier"):
        model(images, return_exits=True)
