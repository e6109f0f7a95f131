"""Finetune a mixed model on all domains, so that its routers learn which expert to ask (MoE-finetuning).

    python finetune.py config/cpu/finetune.py --init_from=out/cpu/mixed --out_dir=out/cpu/btx

The loop is train.py's. What is added here is the balancing loss' weight, the number of experts a token is
sent to, and the choice of what stays fixed. log.jsonl shows, per evaluation, each expert's share of the tokens
in every layer and domain ("load").
"""

import dataclasses

import train
from configurator import UserError, command, key, parse

FROZEN = {
    "none": lambda name: False,
    "experts": lambda name: ".experts." in name,
    "attention": lambda name: ".self_attn." in name,
    "all-but-router": lambda name: not name.endswith("block_sparse_moe.gate.weight"),
}


@dataclasses.dataclass
class FinetuneConfig(train.TrainConfig):
    """Finetune a mixed model (from mix.py). All keys of train.py, and:"""

    router_aux_loss_coef: float = key(0.01, "alpha, the weight of the balancing loss; 0 switches it off")
    num_experts_per_tok: int = key(2, "experts that each token is sent to")
    freeze: str = key("none", "what stays as it is", tuple(FROZEN))


def build_model(config):
    """The mixed model of --init_from with the configured routing, its frozen parameters marked."""
    if not config.init_from:
        raise UserError("--init_from is empty; name the folder that mix.py wrote")
    model = train.build_model(config)
    if not model.config.num_local_experts:
        raise UserError(f"{config.init_from} is a dense model; mix some first: python mix.py --experts=DIR,DIR")
    if not 1 <= config.num_experts_per_tok <= model.config.num_local_experts:
        raise UserError(
            f"--num_experts_per_tok must lie between 1 and the model's {model.config.num_local_experts} experts"
        )
    model.config.router_aux_loss_coef = config.router_aux_loss_coef
    model.config.num_experts_per_tok = config.num_experts_per_tok
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not FROZEN[config.freeze](name)
    return model


if __name__ == "__main__":
    command(lambda: train.train(parse(FinetuneConfig), build_model))
