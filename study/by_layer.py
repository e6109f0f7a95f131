"""Score a model that does not fit in memory: one layer at a time, each read from disk once.

    python -m study.by_layer --model=out/llama2-7b/btx --data_dir=out/llama2-7b/data --out_dir=out/llama2-7b/report

What waits between two layers are the states of all windows, N T D numbers; of the weights one layer is there, or the
embedding, or the head. The numbers are those of eval.py on the same windows: bits per byte, and for a mixture the load
of its experts, in by_layer.json. Questions need the whole model at every step of an answer, so there are none.
Sizes: N windows, T tokens, D width, E experts.
"""

import dataclasses
import math
import os

import torch
from torch import nn
from tqdm import tqdm

from common.config import key, parse
from common.corpus import Corpus
from common.device import pick_device, shapes_alone
from common.errors import UserError, command, write_json
from common.hf import WeightFiles, local_folder, same_tokenizer
from common.ops import head_loss
from eval import ReadingConfig
from model import Layer, ModelConfig, RMSNorm, rotary_table


@dataclasses.dataclass
class ByLayerConfig(ReadingConfig):
    """Bits per byte of one checkpoint of any size."""

    model: str = key("", "the checkpoint, a folder or hf:OWNER/NAME")
    out_dir: str = key("out/cpu/report", "where by_layer.json goes")
    batch_size: int = key(16, "windows in one forward pass", within="[1, inf)")


def read_layer(files, config, number):
    """The Layer of that number, on the CPU in float32."""
    with shapes_alone():
        layer = Layer(config)
    layer.load_state_dict(files.read(layer, f"model.layers.{number}."), assign=True)
    return layer


@torch.no_grad()
def scores(files, config, windows, token_bytes, device, dtype, batch_size):
    """As eval.Validation.scores. windows: {domain: (inputs, targets)}, each (N, T)."""
    length = next(iter(windows.values()))[0].size(1)
    cos, sin = (table[:length].to(device, dtype) for table in rotary_table(config))
    embedding = files["model.embed_tokens.weight"]
    states = {name: nn.functional.embedding(ids, embedding).to(dtype) for name, (ids, _) in windows.items()}
    del embedding
    load = {name: [] for name in windows}
    for number in tqdm(range(config.num_hidden_layers), desc="layers", disable=None):
        layer = read_layer(files, config, number).to(device)
        for name, rows in states.items():
            used = 0
            for part in rows.split(batch_size):
                new, routing = layer(part.to(device), cos, sin)
                part.copy_(new)
                used = used + (routing[0] > 0).sum(dim=0) if routing else 0  # (E,)
            if config.num_local_experts:
                load[name].append([round(share, 4) for share in (used / used.sum()).tolist()])
        del layer  # before the next one comes
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.data.copy_(files["model.norm.weight"])
    tied = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    norm, head = norm.to(device), files[tied].float().to(device)
    bpb = {}
    for name, rows in states.items():
        targets = windows[name][1]
        pairs = zip(rows.split(batch_size), targets.split(batch_size), strict=True)
        nats = sum(head_loss(norm(x.to(device)).flatten(0, 1), head, y.to(device).flatten()).item() for x, y in pairs)
        bpb[name] = nats / (math.log(2) * token_bytes[targets].sum().item())
    bpb["avg"] = sum(bpb.values()) / len(bpb)
    return {"bpb": bpb, "load": load} if config.num_local_experts else {"bpb": bpb}


def main():
    config = parse(ByLayerConfig)
    if not config.model:
        raise UserError("nothing to score; give --model=DIR")
    folder, corpus = local_folder(config.model), Corpus(config.data_dir, config.domains)
    shape = ModelConfig.from_pretrained(folder)
    if shape.router == "sample" and shape.num_local_experts:
        raise UserError(f"{folder} has the router 'sample', whose first layer is another; score it with eval.py")
    same_tokenizer([config.data_dir, folder])
    if config.sequence_length > shape.max_position_embeddings:
        raise UserError(f"--sequence_length={config.sequence_length}: the model takes {shape.max_position_embeddings}")
    windows = {
        name: corpus.windows(name, config.split, config.sequence_length, config.eval_windows) for name in corpus.domains
    }
    device, dtype = pick_device(config.device, config.threads), getattr(torch, config.dtype)
    found = scores(WeightFiles(folder, shape), shape, windows, corpus.token_bytes, device, dtype, config.batch_size)
    os.makedirs(config.out_dir, exist_ok=True)
    write_json(os.path.join(config.out_dir, "by_layer.json"), {"config": dataclasses.asdict(config), **found})
    print("  ".join(f"{domain} bits per byte {value:.3f}" for domain, value in found["bpb"].items()))


if __name__ == "__main__":
    command(main)
