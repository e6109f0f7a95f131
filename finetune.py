"""Finetune a mixed model on all domains, so that its routers learn which experts to use (MoE-finetuning).

    python finetune.py config/cpu/finetune.py --init_from=out/cpu/mixed --out_dir=out/cpu/btx
    python finetune.py config/cpu/finetune.py --router=switch --router_aux_loss_coef=0.01 --out_dir=out/cpu/btx-switch

The loop is train.py's. This script adds the choice of router and the routers' losses. At each evaluation, log.jsonl
gets each expert's share of the tokens in every layer and domain ("load") and, per layer, the routers' losses and,
with --router=switch, the share of (token, expert) pairs that were dropped.
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

    router: str = key("topk", "how tokens are routed to experts; see ROUTERS in model.py", tuple(ROUTERS))
    num_experts_per_tok: int = key(0, "experts per token; 0 follows the router and the checkpoint", within="[0, inf)")
    router_aux_loss_coef: float = key(0.01, "alpha, the weight of the balancing loss; 0 for none", within="[0, inf)")
    balance: str = key("gates", "what that loss balances: mean gate weights, or token counts", BALANCES)
    router_z_loss_coef: float = key(0.0, "weight of the router z-loss, which keeps logits small", within="[0, inf)")


def load_mixture(config, corpus):
    """The mixed model of --init_from with the configured routing."""
    if not config.init_from:
        raise UserError("--init_from is empty; name a folder that mix.py wrote")
    if not ModelConfig.from_pretrained(config.init_from).num_local_experts:
        raise UserError(f"{config.init_from} is a dense model; mix some first: python mix.py --experts=DIR,DIR")
    # this run decides how tokens are routed, not the checkpoint
    routing = {name: getattr(config, name) for name in ROUTING}
    if config.num_experts_per_tok:
        routing["num_experts_per_tok"] = config.num_experts_per_tok
    model = Transformer.from_pretrained(config.init_from, **routing)
    if config.router == "topk" and model.config.num_experts_per_tok == 1:
        print("with one expert per token, --router=topk has gate 1, so routers learn only from the balancing loss;")
        print("use --router=switch or --num_experts_per_tok=2, whose gates learn from the model's loss")
    return model


def main():
    train.train(parse(FinetuneConfig), load_mixture)


if __name__ == "__main__":
    command(main)
