"""Generation: any model continues several prompts at once.

Sizes: B sequences, T tokens, G key-value heads, K head_dim.
"""

import math

import torch


def likeliest(logits):
    """The index of each row's largest logit, a list. On a CPU by numpy: torch's argmax takes a tenth of a step."""
    return (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop=(), temperature=0.0, top_k=0, generator=None):
    """Continue each prompt (a list of token ids) until one of the ids in `stop`; return the new ids, a list per prompt.

    All sequences advance together, one position per step, from the end of the shortest prompt; a longer prompt's own
    tokens take precedence over sampled ones, so no padding is needed. temperature 0 is greedy; top_k 0 is no limit.
    model: anything with `new_cache` and the forward pass of Transformer.
    """
    lengths = [len(prompt) for prompt in prompts]
    total = max(lengths) + max_new_tokens
    cache = model.new_cache(len(prompts), total)
    sequences = [list(prompt) for prompt in prompts]
    done = [False] * len(prompts)
    device = next(model.parameters()).device
    feed = torch.tensor([prompt[: min(lengths)] for prompt in prompts], device=device)  # (B, T)
    for position in range(min(lengths), total):
        logits = model(feed, cache=cache).logits[:, -1].float()  # (B, V)
        if temperature > 0:
            logits = logits / temperature
            if top_k:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
            sampled = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).flatten().tolist()
        else:
            sampled = likeliest(logits)
        for row, token in enumerate(sampled):
            if position >= lengths[row] and not done[row]:
                done[row] = token in stop or position >= lengths[row] + max_new_tokens
                if not done[row]:
                    sequences[row].append(token)
        if all(done):
            break
        column = [[sequence[min(position, len(sequence) - 1)]] for sequence in sequences]
        feed = torch.tensor(column, device=device)  # (B, 1)
    return [sequence[length:] for sequence, length in zip(sequences, lengths, strict=True)]
