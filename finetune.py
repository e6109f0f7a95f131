"""Finetune a mixed model on all domains, so that its routers learn which expert to ask (MoE-finetuning).

    python finetune.py config/cpu/finetune.py --init_from=out/cpu/mixed --out_dir=out/cpu/btx
    python finetune.py config/cpu/finetune.py --router=switch --balance=tokens --out_dir=out/cpu/btx-switch

The loop is train.py's. What is added here is how tokens are routed, the losses that keep routers in shape, and the
choice of what stays fixed. log.jsonl shows, per evaluation, each expert's share of the tokens in every layer and
domain ("load"), and per layer the routers' losses and, with --router=switch, the share of tokens dropped.
"""

import dataclasses

import train
from common import checkpoint
from common.config import UserError, command, key, parse
from model import BALANCES, ROUTERS

FROZEN = {
    "none": lambda name: False,
    "experts": lambda name: ".experts." in name,
    "attention": lambda name: ".self_attn." in name,
    "all-but-router": lambda name: not name.endswith("block_sparse_moe.gate.weight"),
}
ROUTING = ("router", "num_experts_per_tok", "router_aux_loss_coef", "balance", "router_z_loss_coef")


@dataclasses.dataclass
class FinetuneConfig(train.TrainConfig):
    """Finetune a mixed model (from mix.py). All keys of train.py, and:"""

    router: str = key("topk", "how tokens find their experts, see moe.py", ROUTERS)
    num_experts_per_tok: int = key(2, "experts that topk sends each token to")
    router_aux_loss_coef: float = key(0.01, "alpha, the weight of the balancing loss; 0 switches it off")
    balance: str = key("gates", "what that loss evens out: mean gate weights, or counts of tokens", BALANCES)
    router_z_loss_coef: float = key(0.0, "weight of the router z-loss, which keeps logits small")
    freeze: str = key("none", "what stays as it is", tuple(FROZEN))


def build_model(config):
    """The mixed model of --init_from with the configured routing, its frozen parameters marked."""
    if not config.init_from:
        raise UserError("--init_from is empty; name the folder that mix.py wrote")
    if not checkpoint.read_model_config(config.init_from).num_local_experts:
        raise UserError(f"{config.init_from} is a dense model; mix some first: python mix.py --experts=DIR,DIR")
    checkpoint.same_tokenizer([config.init_from, config.data_dir])
    model = checkpoint.load_model(config.init_from, **{name: getattr(config, name) for name in ROUTING})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not FROZEN[config.freeze](name)
    return model


if __name__ == "__main__":
    command(lambda: train.train(parse(FinetuneConfig), build_model))
