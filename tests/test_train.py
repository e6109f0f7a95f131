"""The training loop: its schedule and batches by hand, freezing, and several processes against one."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SHAPE, SHORT, TOKENS, error_line, meta_of, must, read_json, read_log, run, same_bits, weights
from test_routing import random_model, shape

from common.config import parse
from common.corpus import Batches, Corpus
from common.errors import UserError
from common.parallel import Processes
from model import ROUTERS, ModelConfig, Transformer
from train import TrainConfig, build_model, check_sizes, learning_rate, make_optimizer, train


def test_learning_rate_by_hand():
    config = SimpleNamespace(learning_rate=8.0, min_learning_rate=0.25, warmup_steps=4, max_steps=12)
    assert [learning_rate(config, step) for step in range(4)] == [2, 4, 6, 8]
    assert learning_rate(config, 4) == 8
    assert learning_rate(config, 6) == pytest.approx(2 + 6 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way down
    assert learning_rate(config, 8) == pytest.approx(5)  # half-way between 8 and 2
    assert learning_rate(config, 12) == pytest.approx(2)
    assert learning_rate(SimpleNamespace(**{**vars(config), "warmup_steps": 0}), 0) == 8


def test_weight_decay_is_for_matrices_and_routers_have_their_rate(btx):
    model = Transformer.from_pretrained(btx)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(TrainConfig(weight_decay=0.3, router_learning_rate=10.0), model).param_groups
    decayed, routers, plain = sorted(groups, key=lambda group: (-group["weight_decay"], group["scale"]))
    assert [group["scale"] for group in (decayed, routers, plain)] == [1.0, 10.0, 1.0]
    assert all(names[id(parameter)].endswith("gate.weight") for parameter in routers["params"])
    assert routers["weight_decay"] == 0.3 and len(routers["params"]) == 2
    decayed["params"] += routers["params"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all("norm" in names[id(parameter)] for parameter in plain["params"]) and len(plain["params"]) == 5
    assert len(decayed["params"]) + 5 == len(names)


# ---- batches ----


@pytest.fixture
def numbers(tmp_path):
    """Domains whose tokens say where they are from: `low` counts from 0, `high` from 5000."""
    for name, tokens in (("low", range(900)), ("high", range(5000, 5400))):
        folder = tmp_path / name
        folder.mkdir()
        np.array(tokens, dtype="uint16").tofile(folder / "train.bin")
        np.array(tokens, dtype="uint16").tofile(folder / "val.bin")
        np.array(tokens[::-1], dtype="uint16").tofile(folder / "test.bin")
        (folder / "meta.json").write_text(json.dumps(meta_of(len(tokens))))
    return Corpus(str(tmp_path))


def test_batches_are_windows_of_the_text_in_proportion(numbers):
    mixture = numbers.mixture("low:3,high:1")
    assert mixture == {"low": 0.75, "high": 0.25}
    batches = Batches(numbers, mixture, 10, 4000, seed=1)
    inputs, targets = batches(0, 0, 4000)
    assert inputs.shape == targets.shape == (4000, 10)
    first = inputs[:, :1]
    assert inputs.equal(first + torch.arange(10)) and targets.equal(inputs + 1)
    high = first >= 5000
    assert abs(high.float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    low_starts, high_starts = set(first[~high].tolist()), set(first[high].tolist())
    assert min(low_starts) < 20 and 870 < max(low_starts) <= 889  # the whole text is used, and nothing behind it
    assert min(high_starts) == 5000 and max(high_starts) == 5389


def test_batches_do_not_depend_on_how_they_are_split(numbers):
    batches = Batches(numbers, numbers.mixture("all"), 10, 12, seed=1)
    whole = batches(7, 0, 12)
    for sizes in ((6, 6), (3, 3, 3, 3), (4, 4, 4)):
        ends = np.cumsum(sizes)
        parts = [batches(7, end - size, end) for end, size in zip(ends, sizes, strict=True)]
        assert all(torch.cat(pieces).equal(one) for pieces, one in zip(zip(*parts, strict=True), whole, strict=True))
    again = Batches(numbers, numbers.mixture("all"), 10, 12, seed=1)
    assert again(7, 0, 12)[0].equal(whole[0])
    other_seed = Batches(numbers, numbers.mixture("all"), 10, 12, seed=2)
    assert not batches(8, 0, 12)[0].equal(whole[0]) and not other_seed(7, 0, 12)[0].equal(whole[0])


def test_spliced_sequences_change_domain_once(numbers):
    plain = Batches(numbers, numbers.mixture("all"), 10, 3000, seed=1)(0, 0, 3000)
    mixed = Batches(numbers, numbers.mixture("all"), 10, 3000, seed=1, splice=0.5)
    inputs, targets = mixed(0, 0, 3000)
    jumps = (targets - inputs) != 1  # text counts upwards
    assert (jumps.sum(dim=1) <= 1).all() and inputs[:, 1:].equal(targets[:, :-1])
    assert abs(jumps.any(dim=1).float().mean() - 0.5) < 4 * math.sqrt(0.25 / 3000)
    places = jumps[jumps.any(dim=1)].float().argmax(dim=1).bincount(minlength=10)
    assert (places > 90).all()  # anywhere, about 150 times each
    whole = ~jumps.any(dim=1)
    assert inputs[whole].equal(plain[0][whole])  # the others are as without splicing
    assert torch.cat([mixed(0, 0, 7)[0], mixed(0, 7, 3000)[0]]).equal(inputs)
    other = (inputs[:, 0] >= 5000) != (targets[:, -1] >= 5000)
    assert abs(other.float().mean() - 0.25) < 4 * math.sqrt(0.19 / 3000)  # half of the joints change domain


def test_answers_are_spliced_as_the_text_is(numbers):
    """Every third number is an answer: whether a target counts shows in its value, on both sides of a joint."""
    for name, meta in numbers.metas.items():
        tokens = numbers.tokens(name, "train", 0)
        (tokens % 3 == 0).astype("uint8").tofile(f"{numbers.folder}/{name}/train.answers.bin")
        meta["answers"] = {}
    whole = Batches(numbers, numbers.mixture("all"), 10, 3000, seed=1, splice=0.5)(0, 0, 3000)
    inputs, targets = Batches(numbers, numbers.mixture("all"), 10, 3000, 1, 0.5, loss_on="answers")(0, 0, 3000)
    assert inputs.equal(whole[0]) and targets.equal(torch.where(whole[1] % 3 == 0, whole[1], -100))


@pytest.mark.parametrize("splice", [0.0, 0.5])
def test_every_stage_reads_windows_of_its_own(splice, numbers):
    """Or else a branch would begin with the very windows that the seed model began with."""
    stages = [Batches(numbers, numbers.mixture("all"), 10, 400, 1, splice, stage)(0, 0, 400)[0] for stage in range(3)]
    for ours, theirs in itertools.combinations(stages, 2):
        assert (ours == theirs).all(dim=1).float().mean() < 0.05  # of 1280 places, some are drawn again by chance
    assert Batches(numbers, numbers.mixture("all"), 10, 400, 1, splice)(0, 0, 400)[0].equal(stages[0])


def test_held_out_windows_are_fixed_and_spread(numbers):
    inputs, targets = numbers.windows("low", "val", 10, 5)
    assert inputs[:, 0].tolist() == [0, 222, 444, 666, 889] and targets[-1, -1] == 899
    assert len(numbers.windows("low", "val", 10, 10_000)[0]) == 89  # no more than fit side by side
    inputs, targets = numbers.windows("low", "test", 10, 5)
    assert inputs[:, 0].tolist() == [899, 677, 455, 233, 10] and targets[-1, -1] == 0


@pytest.mark.parametrize("text", ["low:x", "low:-1,high:2", "low:0", "low:nan", "low:inf", "low,low", "lower"])
def test_a_wrong_mixture_is_an_error(text, numbers):
    with pytest.raises(UserError, match="--domain="):
        numbers.mixture(text)


# ---- runs ----


def test_training_learns_and_logs(seed, data):
    log = read_log(seed)
    assert [line["step"] for line in log] == [0, 4, 8, 12]
    assert log[-1]["tokens"] == TOKENS
    model = Transformer.from_pretrained(seed)
    assert log[-1]["flops"] == TOKENS * model.flops_per_token(32)
    assert log[-1]["bpb"]["avg"] < log[0]["bpb"]["avg"] - 0.3
    assert log[0]["bpb"]["avg"] == pytest.approx((log[0]["bpb"]["math"] + log[0]["bpb"]["rain"]) / 2)
    assert "load" not in log[0]
    run_file = read_json(os.path.join(seed, "run.json"))
    assert run_file["finished"] and run_file["step"] == 12 and run_file["recipe"]["config"]["learning_rate"] == 3e-3


def test_one_step_is_adamw_by_hand(data, tmp_path):
    """Two micro-batches, the gradient of their mean loss, clipped; AdamW's first step moves by lr * sign(g) nearly."""
    flags = "--max_steps=1", "--warmup_steps=0", "--max_grad_norm=0.1", "--tie_word_embeddings=False"
    must(run("train.py", *SHAPE, *SHORT, *flags, f"--data_dir={data}", f"--out_dir={tmp_path}/run"))
    torch.manual_seed(1)
    config = ModelConfig.from_pretrained(f"{tmp_path}/run")
    model = Transformer(config)
    inputs, targets = Batches(Corpus(data), {"math": 0.5, "rain": 0.5}, 32, 8, seed=1)(0, 0, 8)
    loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    norm = math.sqrt(sum(parameter.grad.double().pow(2).sum() for parameter in model.parameters()))
    last = read_log(tmp_path / "run")[-1]
    assert last["loss"] == pytest.approx(loss.item(), rel=1e-5) and last["grad_norm"] == pytest.approx(norm, rel=1e-4)
    trained = weights(tmp_path / "run")
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.double() * 0.1 / norm
        decay = 1 - 3e-3 * 0.1 if parameter.dim() > 1 else 1
        expected = parameter.detach().double() * decay - 3e-3 * gradient / (gradient.abs() + 1e-8)
        sure = gradient.abs() > 1e-6  # rounding decides the direction of the rest
        np.testing.assert_allclose(trained[name][sure], expected[sure], rtol=1e-3, atol=1e-5)


def test_a_branch_reads_spliced_windows_that_the_seed_has_not_read(data, seed, tmp_path):
    """The loss of its first step is that of spliced windows of stage 1, for one run came before; and of no others."""
    flags = "--max_steps=1", "--splice=0.7", f"--init_from={seed}", f"--out_dir={tmp_path}/run"
    must(run("train.py", *SHORT, *flags, f"--data_dir={data}"))
    model, losses = Transformer.from_pretrained(seed), {}
    for splice, stage in itertools.product((0.7, 0.0), (1, 0)):
        batches = Batches(Corpus(data), {"math": 0.5, "rain": 0.5}, 32, 8, 1, splice, stage)
        inputs, targets = batches(0, 0, 8)
        with torch.no_grad():
            logits = model(inputs).logits
        losses[splice, stage] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    found = read_log(tmp_path / "run")[-1]["loss"]
    assert found == pytest.approx(losses.pop((0.7, 1)), rel=1e-5)
    assert min(abs(found - other) for other in losses.values()) > 1e-3 * found


def test_one_step_moves_routers_by_their_own_rate(data, mixed, tmp_path):
    """AdamW's first step moves a weight by its rate where the gradient is clear: routers by 7 times what others do."""
    flags = "--max_steps=1", "--warmup_steps=0", "--weight_decay=0", "--router_learning_rate=7"
    must(run("finetune.py", *SHORT, *flags, f"--data_dir={data}", f"--init_from={mixed}", f"--out_dir={tmp_path}/run"))
    before, after = weights(mixed), weights(tmp_path / "run")
    for name in before:
        moved = np.median(abs(after[name].astype(float) - before[name])) / 3e-3
        assert moved == pytest.approx(7 if name.endswith("gate.weight") else 1, rel=0.01), name


def test_seconds_are_of_training_alone(data, tmp_path):
    """A model that takes three seconds to load: they are in no leg's seconds, so not in its tokens a second either."""
    folder = str(tmp_path / "run")
    config = parse(TrainConfig, [*SHAPE, *SHORT, "--max_steps=2", f"--data_dir={data}", f"--out_dir={folder}"])

    def make_slowly(config, corpus):
        time.sleep(3)
        return build_model(config, corpus)

    began = time.monotonic()
    train(config, make_slowly)
    seconds = read_json(f"{folder}/run.json")["history"][folder]["seconds"]
    assert 0 < seconds <= time.monotonic() - began - 3


# ---- memory and sizes ----


def kept_bytes(model, ids):
    """(output, bytes that the forward pass keeps for the backward pass, without parameters and tables)."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}  # {storage: bytes}, so that views count once
    held = []  # storages must not be used again meanwhile

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held.append(tensor)
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(ids, ids, step=torch.tensor(7))
    return output, sum(found.values())


@pytest.mark.parametrize("router", ROUTERS)
def test_computing_activations_twice_changes_no_bit_and_keeps_less(router):
    ids = torch.randint(80, (2, 30))
    found, kept = [], []
    for recompute in (False, True):
        model = random_model(router=router)
        model.recompute = recompute
        torch.manual_seed(3)
        output, size = kept_bytes(model, ids)
        (output.loss + output.aux_loss).backward()
        found.append([output.loss, *(parameter.grad for parameter in model.parameters())])
        kept.append(size)
    assert all(ours.equal(theirs) for ours, theirs in zip(*found, strict=True))
    assert kept[1] < kept[0] / 4


def test_a_run_that_computes_twice_ends_with_the_same_bits(seed, data, tmp_path):
    flags = *SHAPE, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/run", "--checkpoint_activations=True"
    must(run("train.py", *flags))
    same_bits(seed, tmp_path / "run")


def test_a_share_smaller_than_the_micro_batch_is_taken_at_once():
    """config/gpu on eight GPUs: 64 rows, 32 in a micro-batch, 8 for each process."""
    for world, size in ((1, 32), (2, 32), (4, 16), (8, 8)):
        ranks = [SimpleNamespace(rank=rank, world=world) for rank in range(world)]
        parts = [part for one in ranks for part in Processes.micro_batches(one, 64, 32)]
        assert parts == [(start, start + size) for start in range(0, 64, size)]
    corpus = SimpleNamespace(check_vocabulary=lambda *arguments: None)
    sizes = SimpleNamespace(
        init_from="", sequence_length=32, batch_size=64, micro_batch_size=32, shard_size=1, expert_parallel=1
    )
    check_sizes(sizes, corpus, Transformer(shape()), SimpleNamespace(world=8))


# ---- freezing and finetuning ----

PARTS = {"experts": (".experts.",), "attention": (".self_attn.",), "none": ()}
PARTS["norms, embeddings"] = ("norm", "embed_tokens")


@pytest.mark.parametrize("freeze", ["all-but-router", *PARTS])
def test_freezing_keeps_what_it_names(freeze, mixed, data, tmp_path):
    flags = f"--data_dir={data}", f"--init_from={mixed}", "--max_steps=4", f"--freeze={freeze}"
    must(run("finetune.py", *SHORT, *flags, f"--out_dir={tmp_path}/run"))
    before, after = weights(mixed), weights(tmp_path / "run")
    same = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    if freeze == "all-but-router":
        assert same == {name for name in before if not name.endswith("gate.weight")}
    else:
        assert same == {name for name in before if any(part in name for part in PARTS[freeze])}


def test_finetuning_logs_loads_and_the_aux_loss_apart(btx, mixed, data, tmp_path):
    for line in read_log(btx):
        loads = line["load"]
        assert set(loads) == {"math", "rain"}
        for layers in loads.values():
            assert len(layers) == 2
            for shares in layers:
                assert len(shares) == 3 and all(0 <= share <= 0.5 for share in shares)  # top-2 takes two of three
                assert sum(shares) == pytest.approx(1, abs=2e-4)
    assert Transformer.from_pretrained(btx).config.router_aux_loss_coef == 0.01
    assert 2 * 0.01 * 0.9 < read_log(btx)[-1]["aux_loss"] < 2 * 0.01 * 2  # alpha, 2 layers, near balance

    # the same weights validate the same, whatever alpha; without alpha, training is different
    flags = f"--data_dir={data}", f"--init_from={mixed}", "--router_aux_loss_coef=5.0", f"--out_dir={tmp_path}/run"
    must(run("finetune.py", *SHORT, *flags))
    ours, theirs = read_log(tmp_path / "run"), read_log(btx)
    assert ours[0]["bpb"] == theirs[0]["bpb"] and ours[-1]["bpb"] != theirs[-1]["bpb"]
    assert ours[1]["aux_loss"] > 100 * theirs[1]["aux_loss"]
    assert ours[1]["loss"] < theirs[1]["loss"] + 1


def test_top_1_routing(mixed, data, tmp_path):
    flags = f"--data_dir={data}", f"--init_from={mixed}", "--num_experts_per_tok=1", "--max_steps=2"
    must(run("finetune.py", *SHORT, *flags, f"--out_dir={tmp_path}/run"))
    assert Transformer.from_pretrained(f"{tmp_path}/run").config.num_experts_per_tok == 1


TORCHRUN = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
PROCESSES = """
import glob
import torch
from common.parallel import Processes

with Processes(torch.device("cpu")) as processes:
    rank = float(processes.rank)
    means = processes.mean({"loss": torch.tensor(1 + rank), "z_loss": torch.tensor([rank, 4 * rank])})
    assert {name: value.tolist() for name, value in means.items()} == {"loss": 1.5, "z_loss": [0.5, 2.0]}
    assert processes.from_first(lambda: f"said by {processes.rank}") == "said by 0"
    print("from one")
names = [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
assert not [name for name in names if "gloo" in name], names
"""


def test_processes_talk_and_leave_no_thread_behind(tmp_path):
    """Gloo's threads must end with the group: one that outlives the interpreter aborts the process."""
    (tmp_path / "script.py").write_text(PROCESSES)
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([*TORCHRUN, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "from one\n"


def test_torchrun(data, seed, tmp_path):
    """The command of the README; what several processes do is tested in common/test_parallel.py."""
    flags = [*SHORT, f"--data_dir={data}", f"--init_from={seed}", "--max_steps=2", f"--out_dir={tmp_path}/run"]
    done = subprocess.run([*TORCHRUN, "train.py", *flags], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert read_json(tmp_path / "run" / "run.json")["finished"]


def test_a_shape_beside_a_checkpoint_of_another_is_an_error_line(seed, data, tmp_path):
    """It would have been ignored; a flag that agrees with the checkpoint is fine."""
    flags = f"--init_from={seed}", f"--data_dir={data}", f"--out_dir={tmp_path}/run", *SHORT
    has = read_json(os.path.join(seed, "config.json"))["hidden_size"]
    assert f"--hidden_size=64000: {seed} has {has}; leave it out" in error_line(
        run("train.py", *flags, "--hidden_size=64000")
    )
    must(run("train.py", *flags, f"--hidden_size={has}", "--max_steps=1"))
