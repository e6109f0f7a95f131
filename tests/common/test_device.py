"""The training step on a GPU that is not there: tensors on the `meta` device have shapes, dtypes and a device, but no
numbers, and stand for those on a GPU.

What a GPU would refuse (tensors on two devices, a dtype that a kernel does not take) is refused here, too, and every
place where the host would wait for the device is counted. (Fake CUDA tensors need a torch that is built for CUDA:
autograd has no engine for them in a CPU build.) What remains for a real GPU is in test_cuda.py.
"""

import copy
import functools
import itertools
import signal

import pytest
import torch
from helpers import SHAPE, SHORT, error_line, must, read_log, run, run_process
from test_routing import shape
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
import train
from common import device as device_file
from common.config import parse
from common.device import compiled, gpu_count, pick_device, pick_dtype, send, widest_float
from common.errors import UserError
from common.parallel import Processes
from finetune import FinetuneConfig
from model import ROUTERS, Experts, Transformer, generate
from train import train_step

GPU = torch.device("meta")
CONFIG = parse(FinetuneConfig, [*SHORT, "--router_z_loss_coef=0.1"])


class Waits(TorchDispatchMode):
    """Counts copies from the device to the host, which wait for all work so far, and answers each with zeros."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu" and args[0].is_meta:
            self.count += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
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
    return train_step(CONFIG, step, model, optimizer, lambda *place: (ids, ids), Processes(GPU))


SHAPES = {router: {"router": router} for router in ROUTERS}
SHAPES |= {"dense": {"num_local_experts": 0}, "tied": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_stays_on_the_device_and_waits_for_nothing(name):
    """Every router and a dense model, all with grouped-query attention and two micro-batches."""
    model, optimizer = on_gpu(shape(**SHAPES[name]))
    for step in range(2):
        with Waits() as waits:
            metrics = step_on_gpu(model, optimizer, step)
        assert waits.count == 0
    assert {value.device for value in metrics.values()} == {GPU}
    assert {"loss", "aux_loss", "grad_norm"} <= metrics.keys() and ("dropped" in metrics) == (name == "switch")
    assert len(metrics.get("balance_loss", [0] * 3)) == 3


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
    model, optimizer = on_gpu(shape())
    model.model.norm.register_forward_hook(lambda module, inputs, output: print(output.sum().tolist()))
    with Waits() as waits:
        step_on_gpu(model, optimizer)
    assert waits.count == 2  # one in each micro-batch


LOOP = "--dtype=bfloat16", "--max_steps=6", "--micro_batch_size=8"  # slow: Python looks at each operation


@pytest.fixture
def train_on_gpu(data, tmp_path, monkeypatch):
    """Function(router) that runs finetune.py's loop in tmp_path / "run" on a device without numbers, where losses read
    as zero; returns how often the host had waited before each step, and at the end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(train, "pick_device", lambda *arguments: GPU)
    monkeypatch.setattr(train, "make_optimizer", lambda config, model: plain_optimizer(model))
    monkeypatch.setattr(train, "validation_scores", lambda *arguments: {"bpb": {"avg": 1.0}, "bits": {}})
    monkeypatch.setattr(train.Run, "save", lambda *arguments, **options: None)  # copies all there is

    def run(router):
        counts, step = [], train_step

        def counted(*arguments):
            counts.append(waits.count)
            return step(*arguments)

        monkeypatch.setattr(train, "train_step", counted)
        config = parse(FinetuneConfig, [*SHORT, *LOOP, f"--data_dir={data}", f"--out_dir={tmp_path}/run"])
        with Waits() as waits:
            train.train(config, lambda *arguments: Transformer(shape(router, vocab_size=320)))
        return [*counts, waits.count]

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("router", ["topk", "switch"])
def test_the_loop_waits_once_a_step(router, train_on_gpu, tmp_path):
    """And at a line of the log once for each mean, which are read then."""
    counts = train_on_gpu(router)
    metrics = {"loss", "aux_loss", "balance_loss", "z_loss", "grad_norm"} | (
        {"dropped"} if router == "switch" else set()
    )
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 4, 6] and metrics <= lines[-1].keys()
    waits = [after - before for before, after in itertools.pairwise(counts)]
    # steps 0 to 5, with what comes before the next; behind the steps 3 and 5 there is a line
    assert waits == [1 + (len(metrics) if step in (3, 5) else 0) for step in range(6)] and counts[0] == 0


def test_a_mixture_resumes_on_the_device(train_on_gpu, tmp_path):
    """Off an evaluation step: state.pt holds sums on the host, whatever the device; a step more adds to them."""
    train_on_gpu("topk")
    cpu = Transformer(shape("topk", vocab_size=320))
    optimizer = plain_optimizer(cpu)
    one = torch.ones((), dtype=torch.float64)
    sums = {"loss": one, "aux_loss": one, "grad_norm": one, "balance_loss": one.expand(3), "z_loss": one.expand(3)}
    state = {"step": 2, "seconds": 1.0, "log": "", "sums": sums, "shards": ""}
    torch.save({**state, "model": cpu.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run" / "state.pt")
    with pytest.warns(UserWarning, match="no-op"):  # weights cannot be copied to a device without numbers
        counts = train_on_gpu("topk")
    assert len(counts) == 4 + 1  # steps 2 to 5, and the end
    assert [line["step"] for line in read_log(tmp_path / "run")] == [4, 6]


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
    monkeypatch.setattr(device_file, "compiler_error", lambda device: "")
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

    monkeypatch.setattr(device_file, "compiler_error", lambda device: "")
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


def test_a_compiler_that_is_not_there_is_one_line(data, tmp_path):
    """With --compile=on, where a process finds no g++; the run it leaves goes on with --compile=off."""
    flags = *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/run"
    hook = f"import os; os.environ['PATH'] = {str(tmp_path)!r}; os.environ.pop('CXX', None)"
    message = error_line(run_process("train.py", *flags, "--compile=on", hook=hook))
    assert "No working C++ compiler" in message and "install them or use --compile=off" in message
    assert len(message) < 300
    must(run("train.py", *flags, "--compile=off"))


def test_where_nobody_asked_a_run_goes_on_uncompiled(monkeypatch, capsys):
    monkeypatch.setattr(device_file, "compiler_error", lambda device: "TritonMissing: no triton")
    model = Transformer(shape())
    assert compiled(model, "auto", torch.device("cuda")) is model
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "TritonMissing" in said and "training without it" in said
    with pytest.raises(UserError, match=r"no triton.*use --compile=off"):
        compiled(model, "on", torch.device("cuda"))


# ---- a Mac's GPU, which is not there either: no float64, no grouped_mm ----


@pytest.mark.parametrize(
    ("cuda", "mps", "world", "wanted"),
    [(1, 1, 1, "cuda:0"), (0, 1, 1, "mps"), (0, 0, 1, "cpu"), (0, 1, 2, "cpu"), (1, 0, 2, "cuda:0")],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(cuda, mps, world, wanted, monkeypatch):
    """torchrun's processes cannot share a Mac's GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert str(pick_device("auto")) == wanted
    assert gpu_count() == max(cuda, mps)
    assert pick_device("cpu").type == "cpu"
    if mps and world == 1:
        assert pick_device("mps").type == "mps"
    else:
        with pytest.raises(UserError, match=r"--device=mps, but .*; use --device=cpu"):
            pick_device("mps")


def test_mps_computes_in_float32():
    mps = torch.device("mps")
    assert pick_dtype("auto", mps, shape(hidden_size=512)) == torch.float32
    assert pick_dtype("bfloat16", mps, shape()) == torch.bfloat16
    assert widest_float(mps) == torch.float32 and widest_float(torch.device("cpu")) == torch.float64


class NoFloat64(Waits):
    """A device as in Waits that has no float64, as a Mac's GPU; or a CPU that has none."""

    def __init__(self, kind="meta"):
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and (tensor.device.type, tensor.dtype) == (self.kind, torch.float64):
                raise TypeError(f"{func} makes float64, which MPS does not have")
        return found


@pytest.fixture
def like_mps(monkeypatch):
    """The device without numbers counts as a Mac's GPU."""
    monkeypatch.setattr(train, "widest_float", lambda device: torch.float32 if device.type == "meta" else torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_training_and_evaluation_need_no_float64_on_the_device(name, like_mps):
    model, optimizer = on_gpu(shape(**SHAPES[name]))
    ids = torch.zeros(3, 32, dtype=torch.long)
    with NoFloat64():
        step_on_gpu(model, optimizer)
        scores = train.validation_scores(model, {"math": (ids, ids)}, torch.ones(80, dtype=torch.long))
    with NoFloat64("cpu"):
        generate(Transformer(shape(**SHAPES[name])), [[1, 2], [3]], 4, {5}, 1.0, 3, unknown=[7])
    assert scores["bits"] == {"math": [0.0] * 3}  # numbers are there again on the host


def test_float64_is_noticed():
    model, optimizer = on_gpu(shape())
    with NoFloat64(), pytest.raises(TypeError, match="MPS"):
        step_on_gpu(model, optimizer)


def test_experts_in_turn_are_what_grouped_mm_is(monkeypatch):
    """Outputs and gradients, in both precisions, also of an expert without a row."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        experts = Experts(shape(num_local_experts=4))
        for weight in experts.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        x = torch.randn(20, shape().hidden_size)
        ends = torch.tensor([7, 7, 19, 20], dtype=torch.int32)
        found = []
        for kinds in ((), ("cpu",)):
            monkeypatch.setattr(model_file, "LOOP_ON", kinds)
            own = x.clone().to(dtype).requires_grad_()
            experts.zero_grad()
            y = experts(own, ends)
            (y.float() * torch.arange(20.0)[:, None]).sum().backward()
            found.append([y, own.grad, *(weight.grad.clone() for weight in experts.parameters())])
        for loop, grouped in zip(*found, strict=True):
            torch.testing.assert_close(loop, grouped)
        assert all(weight.grad[1].eq(0).all() for weight in experts.parameters())
