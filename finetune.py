"""Finetune a mixed model on all domains, so that its routers learn which expert to ask (MoE-finetuning).

    python finetune.py config/cpu/finetune.py --init_from=out/cpu/mixed --out_dir=out/cpu/btx
    python finetune.py config/cpu/finetune.py --router=switch --router_aux_loss_coef=0.01 --out_dir=out/cpu/btx-switch

The loop is train.py's. What is added here is how tokens are routed, and the losses that keep routers in shape.
log.jsonl shows, per evaluation, each expert's share of the tokens in every layer and domain ("load"), and per layer
the routers' losses and, with --router=switch, the share of (token, expert) pairs that were dropped.
"""

import dataclasses

import train
from common.config import key, parse
from common.errors import UserError, command
from model import BALANCES, ROUTERS, ModelConfig, Transformer

ROUTING = ("router", "router_aux_loss_coef", "balance", "router_z_loss_coef")


@dataclasses.dataclass
class FinetuneConfig(train.TrainConfig):
    """Finetune a mixed model (from mix.py). All keys of train.py, and:"""

    router: str = key("topk", "how tokens find their experts: ROUTERS in model.py", tuple(ROUTERS))
    num_experts_per_tok: int = key(0, "experts per token; 0 is what router and checkpoint say", within="[0, inf)")
    router_aux_loss_coef: float = key(0.01, "alpha, the weight of the balancing loss; 0 is off", within="[0, inf)")
    balance: str = key("gates", "what that loss evens out: mean gate weights, or counts of tokens", BALANCES)
    router_z_loss_coef: float = key(0.0, "weight of the router z-loss, which keeps logits small", within="[0, inf)")


def load_mixture(config, corpus):
    """The mixed model of --init_from with the configured routing."""
    if not config.init_from:
        raise UserError("--init_from is empty; name the folder that mix.py wrote")
    if not ModelConfig.from_pretrained(config.init_from).num_local_experts:
        raise UserError(f"{config.init_from} is a dense model; mix some first: python mix.py --experts=DIR,DIR")
    # how tokens are routed is this run's choice, not the checkpoint's
    routing = {name: getattr(config, name) for name in ROUTING}
    if config.num_experts_per_tok:
        routing["num_experts_per_tok"] = config.num_experts_per_tok
    model = Transformer.from_pretrained(config.init_from, **routing)
    if config.router == "topk" and model.config.num_experts_per_tok == 1:
        print("one expert a token has gate 1 with --router=topk, so routers learn from the balancing loss alone;")
        print("--router=switch has a gate that learns, and so has --num_experts_per_tok=2")
    return model


def main():
    train.train(parse(FinetuneConfig), load_mixture)


if __name__ == "__main__":
    command(main)
