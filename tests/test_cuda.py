"""Does everything run on a GPU?  Asked without one, of PyTorch's fake tensors.

A fake tensor has a shape, a type and a device, and no values; an operation that mixes devices
raises, as on a GPU.  So a `torch.zeros(n)` without a device is found, in a network, a cost, a loss
or in inference.  Made-up matches take the place of the Hungarian rule, which scipy solves on the
host.  Values are compared at the end, where there is a GPU.
"""
import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import assign
import checkpoints
import losses

pytestmark = pytest.mark.filterwarnings("ignore:.create_unbacked_symint")     # torchvision's own

SIDE, C = 64, 4                       # pixels; classes
B, G = 2, 3                           # images; objects of an image
DENSE = {"width": 32, "depth": 1, "extra_levels": 1}
QUERY = {"width": 32, "heads": 4, "layers": 2, "hidden": 48, "queries": 12}
OPTIONS = {
    "retinanet": DENSE,
    "centernet": {"neck_widths": (16, 16, 16)},
    "fcos": DENSE,
    "detr": {**QUERY, "stride": 16, "unused_ids": 2},
    "deformable-detr": {**QUERY, "levels": 3, "unused_ids": 2},
    "sparse-rcnn": {**QUERY, "dynamic": 8, "roi_size": 24},
}
ONE_TO_MANY = ("retinanet", "centernet", "fcos")


class MadeUp(TorchDispatchMode):
    """Answers what only values could tell: a number is 1; a length, such as nonzero's, is 4."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return tree_map(self.settle, function(*args, **(kwargs or {})))

    def settle(self, x):
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return 1
        if torch.is_tensor(x) and any(isinstance(side, torch.SymInt) for side in x.shape):
            shape = [4 if isinstance(side, torch.SymInt) else side for side in x.shape]
            return torch.empty(shape, dtype=x.dtype, device=x.device)
        return x


@contextlib.contextmanager
def fake_tensors():
    """Every tensor that is made here is a fake one."""
    with FakeTensorMode(shape_env=ShapeEnv()), MadeUp():
        yield


def build(detector, original=False):
    return checkpoints.build(detector, C, "tiny", original, **OPTIONS[detector])


def put(module, device):
    """Fake parameters and buffers on a device; tensors that are neither stay where they are."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            new = torch.empty(p.shape, dtype=p.dtype, device=device)
            setattr(part, name, torch.nn.Parameter(new, p.requires_grad))
        for name, b in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(b.shape, dtype=b.dtype, device=device))
    return module


@contextlib.contextmanager
def autocast(precision):
    """What torch.autocast("cuda", torch.bfloat16) does, which refuses where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", precision == "bf16")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def batch():
    images = torch.empty(B, 3, SIDE, SIDE, dtype=torch.uint8, device="cuda")
    mask = torch.empty(B, SIDE, SIDE, dtype=torch.bool, device="cuda")
    targets = [{"boxes": torch.empty(G, 4, device="cuda"), "image_id": n,
                "labels": torch.empty(G, dtype=torch.long, device="cuda"),
                "size": torch.empty(2, dtype=torch.long, device="cuda")} for n in range(B)]
    return images, mask, targets


def predict(model, precision="fp32"):
    """What a model says of a batch on the GPU, and the batch's targets."""
    images, mask, targets = batch()
    with autocast(precision):
        return put(model, "cuda")(images, mask), targets


def row(detector, original, **flags):
    """The row of Table 1 or 2 that flags ask for."""
    flags = {"lambda_cls": 2.0, "lambda_l1": 5.0, "lambda_iou": 2.0, "class_cost": 2.0, **flags}
    assign = "one-to-many" if original else "hungarian"
    return losses.row({"detector": detector, "assign": assign, **flags})


def cuda(*tensors):
    return all(t.device.type == "cuda" for t in tensors)


def pay(loss, prediction, targets):
    """A loss's terms, for made-up matches.  What it remembers is on the host, as in training."""
    if isinstance(loss, torch.nn.Module):
        put(loss, "cpu")
    pairs = torch.empty(G, dtype=torch.long, device="cuda")
    matches = [[assign.Match(pairs, pairs, pairs[:1]) for _ in targets]
               for _ in [prediction, *prediction.aux]]
    return loss(prediction, targets, matches, torch.empty((), device="cuda"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("detector, original", [
    *((name, False) for name in OPTIONS), *((name, True) for name in ONE_TO_MANY)])
def test_networks_costs_losses_and_inference_run_on_a_gpu(detector, original, precision):
    """Every detector and form, with the location costs of Table 2, and as the coco recipe."""
    model, rows = build(detector, original), [row(detector, original, data="coco")]
    if detector in ONE_TO_MANY:
        rows.append(row(detector, original, location_cost="predefined"))

    with fake_tensors():
        prediction, targets = predict(model, precision)
        for layer in [prediction, *prediction.aux]:
            assert cuda(layer.logits, layer.boxes)
            assert layer.logits.dtype == layer.boxes.dtype == torch.float32
        for cost, _, loss in rows:
            costs = assign.price(cost, prediction.image(1), targets[1], progress=0.5)
            assert cuda(costs) and costs.shape == (prediction.logits.shape[1], G)
            assert cuda(*pay(loss, prediction, targets).values())

        with torch.no_grad():
            found = model.detections(prediction.image(0), 10)
        assert {"plain", "nms"} <= found.keys()
        assert all(cuda(*parts) for parts in found.values())


@pytest.mark.parametrize("name", [name for name in assign.ASSIGNERS if name != "hungarian"])
def test_strategies_run_on_a_gpu(name):
    with fake_tensors():
        assert cuda(*assign.ASSIGNERS[name](torch.empty(20, G, device="cuda")))


# ------------------------------------------------------------------------------------------------
# values, where there is a GPU
# ------------------------------------------------------------------------------------------------

def step(detector, original, device, matches=None):
    """Positives, losses and gradients' norms of one training step without dropout, in float32.

    matches: positives found before, since a network with random weights has near ties
    """
    torch.manual_seed(0)
    without_dropout = {"dropout": 0.0} if detector in ("detr", "deformable-detr") else {}
    options = {**OPTIONS[detector], **without_dropout}
    model = checkpoints.build(detector, C, "tiny", original, **options)
    with torch.no_grad():
        for p in model.parameters():         # off the kinks where sampling points start
            p.add_(0.01 * torch.randn(p.shape))
    model.to(device).train()

    r = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (B, 3, SIDE, SIDE), dtype=torch.uint8, generator=r).to(device)
    corners = torch.rand(B, G, 2, generator=r) * SIDE / 2
    boxes = torch.cat([corners, corners + 8 + torch.rand(B, G, 2, generator=r) * 20], 2)
    targets = [{"boxes": boxes[n].to(device), "labels": torch.arange(G, device=device),
                "size": torch.tensor([SIDE, SIDE], device=device), "image_id": n}
               for n in range(B)]

    cost, strategy, loss = row(detector, original)
    mask = torch.zeros(B, SIDE, SIDE, dtype=torch.bool, device=device)
    prediction = model(images, mask)
    matches = matches or assign.match(prediction, targets, cost, strategy)
    matches = [[assign.Match(*(part.to(device) for part in m)) for m in layer] for layer in matches]
    terms = loss(prediction, targets, matches, torch.tensor(float(B * G), device=device))
    sum(terms.values()).backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    return matches, {name: value.item() for name, value in terms.items()}, norms


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("detector, original", [
    *((name, False) for name in OPTIONS), *((name, True) for name in ONE_TO_MANY)])
def test_a_gpu_computes_what_a_cpu_computes(detector, original, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    matches, terms, norms = step(detector, original, "cpu")
    _, on_gpu, gpu_norms = step(detector, original, "cuda", matches)
    assert on_gpu == pytest.approx(terms, rel=1e-4)
    assert gpu_norms == pytest.approx(norms, rel=0.02, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", assign.ASSIGNERS)
def test_a_strategy_chooses_the_same_on_a_gpu(name):
    cost = torch.rand(500, 6, generator=torch.Generator().manual_seed(0))
    host, gpu = assign.ASSIGNERS[name](cost), assign.ASSIGNERS[name](cost.cuda())
    assert [part.tolist() for part in gpu] == [part.tolist() for part in host]


# ------------------------------------------------------------------------------------------------
# the test itself: what it must find
# ------------------------------------------------------------------------------------------------

# PyTorch's words, and those of 2.11
TWO_DEVICES = "same device|different devices"


def careless_focal_loss(logits, index, labels, matches):
    return (logits - torch.zeros(logits.shape[2])).sum()


def careless_centreness(points, gt):
    return torch.zeros(len(gt))


@pytest.mark.parametrize("original, function, careless", [
    (False, "focal_loss", careless_focal_loss),
    (True, "focal_loss", careless_focal_loss),
    (True, "centreness_target", careless_centreness),
])
def test_a_tensor_without_a_device_in_a_loss_is_found(monkeypatch, original, function, careless):
    model, loss = build("fcos", original), row("fcos", original).loss
    with fake_tensors():
        prediction, targets = predict(model)
        pay(loss, prediction, targets)
        monkeypatch.setattr(losses, function, careless)
        with pytest.raises(RuntimeError, match=TWO_DEVICES):
            pay(loss, prediction, targets)


def test_a_constant_that_is_no_buffer_is_found():
    """It stays on the host when the network goes to the GPU."""
    model = build("retinanet")
    with fake_tensors():
        predict(model)
        del model.delta_weights
        model.delta_weights = torch.ones(4)
        with pytest.raises(RuntimeError, match=TWO_DEVICES):
            predict(model)


def test_autocast_is_on():
    """Else the bfloat16 tests would test nothing."""
    with fake_tensors():
        x = torch.empty(4, 4, device="cuda")
        with autocast("bf16"):
            assert (x @ x).dtype == torch.bfloat16
        assert (x @ x).dtype == torch.float32
