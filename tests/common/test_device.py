"""The training step on a GPU that is not there: tensors on the `meta` device have shapes, dtypes and a device, but no
numbers, and stand for those on a GPU.

What a GPU would refuse (tensors on two devices, a dtype that a kernel does not take) is refused here, too, and every
place where the host would wait for the device is counted. (Fake CUDA tensors need a torch that is built for CUDA:
autograd has no engine for them in a CPU build.) What remains for a real GPU is in test_cuda.py.
"""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from common.fit import check_sizes
from helpers import SHORT
from test_routing import shape
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import parse
from common.device import compiled, send
from common.parallel import Processes
from common.run import load_state
from finetune import FinetuneConfig
from model import ROUTERS, Transformer
from train import Recorder, train_step

GPU = torch.device("meta")
CONFIG = parse(FinetuneConfig, [*SHORT, "--router_z_loss_coef=0.1"])


class Waits(TorchDispatchMode):
    """Counts copies from the device to the host, which wait for all work so far, and answers each with ones."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu" and args[0].is_meta:
            self.count += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        return func(*args, **(kwargs or {}))  # a number read in another way is an error of torch's


def plain_optimizer(model):
    """make_optimizer's in kind; its fused kernel knows no meta device."""
    return torch.optim.AdamW([{"params": list(model.parameters()), "scale": 1.0}])


def on_gpu(config):
    model = Transformer(config).to(GPU)
    model.compute_dtype = torch.bfloat16  # the only one in which a graph may hold grouped_mm
    return model, plain_optimizer(model)


def step_on_gpu(model, optimizer, step=0):
    ids = torch.zeros(CONFIG.micro_batch_size, CONFIG.sequence_length, dtype=torch.long)
    stop = SimpleNamespace(number=0)
    return train_step(CONFIG, step, model, optimizer, lambda *place: (ids, ids), Processes(GPU), stop)


SHAPES = {router: {"router": router} for router in ROUTERS}
SHAPES |= {"dense": {"num_local_experts": 0}, "tied": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_stays_on_the_device_and_waits_once(name):
    """Every router and a dense model, all with grouped-query attention and two micro-batches."""
    model, optimizer = on_gpu(shape(**SHAPES[name]))
    for step in range(2):
        with Waits() as waits:
            means, norm, stopped = step_on_gpu(model, optimizer, step)
        assert waits.count == 1
    assert (means["loss"], norm, stopped) == (1.0, 1.0, True)  # the ones of Waits
    assert len(means.get("balance_loss", [0] * 3)) == 3 and ("dropped" in means) == (name == "switch")


def test_waits_are_noticed():
    """The test above can fail: a tensor left on the host, a number read on the way."""
    model, optimizer = on_gpu(shape())
    model.cos = torch.ones(model.cos.shape)
    with Waits(), pytest.raises(RuntimeError, match="device"):
        step_on_gpu(model, optimizer)
    model, optimizer = on_gpu(shape())
    model.model.norm.register_forward_hook(lambda module, inputs, output: print(float(output.sum())))
    with Waits(), pytest.raises(RuntimeError, match="meta"):
        step_on_gpu(model, optimizer)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_mixture_resumes_on_the_device(router, tmp_path):
    """Off an evaluation step: state.pt holds sums on the host, whatever the device; a step more adds to them."""
    cpu = Transformer(shape(router))
    names = ["loss", "balance_loss"]
    state = {"step": 3, "seconds": 1.0, "log": "", "sums": {"loss": torch.tensor(1.0, dtype=torch.float64)}}
    state["sums"] |= {"balance_loss": torch.ones(3, dtype=torch.float64)}
    optimizer = plain_optimizer(cpu)
    torch.save({**state, "model": cpu.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    model, optimizer = on_gpu(shape(router))
    with pytest.warns(UserWarning, match="no-op"):  # weights cannot be copied to a device without numbers
        found = load_state(tmp_path, 12, model, optimizer)
    recorder = Recorder.__new__(Recorder)
    recorder.config, recorder.sums = CONFIG, found["sums"]
    recorder.bar, recorder.speed = SimpleNamespace(set_postfix_str=lambda *a, **b: 0, update=lambda: 0), str
    with Waits():
        means, norm, _ = step_on_gpu(model, optimizer, 5)
    recorder.record(5, means, norm)
    assert [recorder.sums[name].tolist() for name in names] == [2.0, [2.0] * 3]


def test_a_share_smaller_than_the_micro_batch_is_taken_at_once():
    """config/gpu on eight GPUs: 64 rows, 32 in a micro-batch, 8 for each process."""
    for world, size in ((1, 32), (2, 32), (4, 16), (8, 8)):
        ranks = [SimpleNamespace(rank=rank, world=world) for rank in range(world)]
        parts = [part for one in ranks for part in Processes.micro_batches(one, 64, 32)]
        assert parts == [(start, start + size) for start in range(0, 64, size)]
    corpus = SimpleNamespace(encoding=SimpleNamespace(n_vocab=80))
    sizes = SimpleNamespace(sequence_length=32, batch_size=64, micro_batch_size=32, shard_size=1, expert_parallel=1)
    check_sizes(sizes, corpus, Transformer(shape()), SimpleNamespace(world=8))


def test_batches_go_to_a_gpu_from_pinned_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *place, **how: calls.append((*place, how)))
    send(torch.zeros(3), torch.device("cuda", 1))
    send(torch.zeros(3), torch.device("cpu"))
    assert calls == ["pinned", (torch.device("cuda", 1), {"non_blocking": True}), (torch.device("cpu"), {})]


@pytest.mark.parametrize(
    ("choice", "device", "wanted"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("off", "cuda", False), ("on", "cpu", True)],
)
def test_what_is_compiled(choice, device, wanted, monkeypatch):
    """The whole model, but the layers of a mixture in float32, whose experts torch.compile does not take."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda part: calls.append(part) or part)
    for experts in (0, 4):
        for dtype in (torch.float32, torch.bfloat16):
            model = Transformer(shape(num_local_experts=experts))
            model.compute_dtype = dtype
            calls.clear()
            layers = [layer.forward for layer in model.model.layers]
            assert compiled(model, choice, torch.device(device)) is model
            parts = layers if experts and dtype == torch.float32 else [model]
            assert calls == (parts if wanted else [])


def test_a_mixture_in_float32_is_compiled_around_its_experts(monkeypatch):
    """All three layers share the few graphs before the experts and behind them; none for an evaluation; the same
    gradients."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    torch.manual_seed(1)
    plain = Transformer(shape(num_local_experts=4, num_hidden_layers=3))
    quick = copy.deepcopy(plain)
    run, ids = compiled(quick, "on", torch.device("cpu")), torch.randint(80, (2, 30))
    with torch.no_grad():
        assert run(ids, ids).loss == plain(ids, ids).loss and not graphs
    for step in range(2):
        losses = []
        for model in (run, plain):
            output = model(ids, ids, step=torch.tensor(step))
            (output.loss + output.aux_loss).backward()
            losses.append(output.loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert 2 <= len(graphs) <= 4
    for ours, theirs in zip(quick.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()
