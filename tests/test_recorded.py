"""Whether a training step can be recorded as a CUDA graph. No GPU is needed, but a torch built with CUDA.

A CUDA graph repeats what the GPU did, not what Python and the CPU did beside it. So a step may read no value
from the GPU, and use no tensor on the CPU. Here it runs on fake tensors: on a GPU that need not exist, with
shapes and types, but no values. The backward pass is left out: test_train.py watches it on the CPU.
"""
import pytest
import torch
from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                           FakeTensorMode)

import dukd
import train
from samples import Watch
from test_train import STUDENTS, place, settings  # noqa: F401 (place is a fixture of settings)

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch is built without CUDA")

METHODS = {method: [f"--method={method}"] for method in dukd.METHODS}
METHODS["everything"] = ["--augment-zoom-out", "--crops=2"]
METHODS["everything"] += [f"--lambda-{term.replace('_', '-')}=1" for term in dukd.TERMS]


@pytest.fixture(autouse=True)
def pretended_device(monkeypatch):
    """Autocast works as on a GPU, and `backward` does nothing. No test gets bicubic weights of another."""
    try:
        with FakeTensorMode():
            torch.ones(1, device="cuda:0")[0]
    except RuntimeError:
        pytest.skip("this torch needs a GPU to index even a fake tensor, as 2.9 for CUDA 12")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    dukd.bicubic_neighbours.cache_clear()
    yield
    dukd.bicubic_neighbours.cache_clear()


def watched(step, *inputs):
    """What the watch sees of the second call. AssertionError where a tensor is not on the GPU."""
    step(*inputs)  # what is made once and kept, as bicubic's weights, may come from the CPU
    with Watch() as watch:
        step(*inputs)
    elsewhere = [name for name, tensors in watch.seen if any(t.device.type != "cuda" for t in tensors)]
    assert not elsewhere, f"these operations have tensors on the CPU: {elsewhere}"
    return watch.seen


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", STUDENTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_no_value_and_stays_on_its_device(settings, method, family, precision):
    """And its convolutions compute in the precision that is asked for."""
    run = train.Run(settings("run", *METHODS[method], family=family, precision=precision))
    with FakeTensorMode():  # weights and buffers are replaced by fake ones, which need no gradients
        for module in [*run.student.modules(), *run.teacher.modules()]:
            for name, real in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cuda:0")
                delattr(module, name)
                setattr(module, name, fake)
        lr, hr = torch.rand(2, 3, 8, 8, device="cuda:0"), torch.rand(2, 3, 32, 32, device="cuda:0")
        seen = watched(train.forward_backward, run, lr, hr)
    convolved = {t.dtype for name, tensors in seen if "convolution" in name for t in tensors}
    assert convolved == {getattr(torch, precision)}


@pytest.mark.parametrize("step", [
    lambda x: x * x.sum().item(),
    lambda x: x.masked_select(x > 0),  # its size depends on values
    lambda x: x.cpu(),
    lambda x: x * torch.tensor(2.0, device=x.device),  # a constant that is copied from the CPU
    lambda x: x * torch.rand(2).to(x.device)])
def test_what_cannot_be_recorded_is_noticed(step):
    errors = AssertionError, DataDependentOutputException, DynamicOutputShapeException
    with FakeTensorMode(), pytest.raises(errors):
        watched(step, torch.rand(2, device="cuda:0"))
