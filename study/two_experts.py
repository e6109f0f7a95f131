"""Questions that need two experts at once (data/two_experts.py), asked of a finished comparison. Exploratory.

    python -m study.two_experts --size=cpu --seeds=1,2,3,4,5

A mixture has a token's experts work in one pass, an ensemble averages what each of them says alone; "Collective model
intelligence requires compatible specialization" (Pari et al. 2024) asks whether either knows more than its best expert.
Writes report/two_experts.json and .md: the share of right choices among four, and of right answers written greedily.
"""

import dataclasses
import functools
import os

from tqdm import tqdm

from common.config import key, split_list
from common.corpus import Corpus
from common.device import pick_device, place
from common.errors import command, read_json, write_atomically, write_json
from common.run import versions
from data.math_problems import MARKER
from data.two_experts import two_expert_questions
from eval import choose, written_answers
from model import Transformer
from study import tables
from study.btm import ENSEMBLES
from study.chain import StudyConfig, parse_study
from study.compare import chain_with

ROWS = ("seed", "compare/dense-cm", "compare/upcycle-cm", "btx", "compare/btx-even", "compare/btx-paper")


@dataclasses.dataclass
class TwoExpertsConfig(StudyConfig):
    """Ask all rows of a finished comparison what needs two experts."""

    seeds: str = key("1,2,3", "the random seeds, as in the comparison")
    questions: int = key(200, "of each kind", within="[1, inf)")


def models_of(chain, device):
    """{row: a function that loads it}: checkpoints, single experts, and ensembles of the experts of both kinds."""
    config = chain.scoring()
    corpus = Corpus(chain.data, ",".join(chain.domains))
    folders = {os.path.basename(name): chain.config.path(name) for name in ROWS}
    found = {name: functools.partial(Transformer.from_pretrained, folder) for name, folder in folders.items()}
    for suffix, start in {"": "expert-", "-cm": "compare/longer/expert-"}.items():
        experts = {domain: chain.config.path(f"{start}{domain}") for domain in chain.branched}
        for domain, folder in experts.items():
            found[f"expert-{domain}{suffix}"] = functools.partial(Transformer.from_pretrained, folder)
        members = [*experts.values(), chain.seed_folder]
        for name, make in ENSEMBLES.items():
            options = members, corpus, config.sequence_length, device, {}, config.eval_windows
            found[f"{name}{suffix}"] = functools.partial(make, *options)
    return found


def marks_of(model, encoding, questions):
    """{"choice": {kind: [1 or 0 of each question]}, "written": the same}."""
    marks = {"choice": {}, "written": {}}
    for kind, rows in questions.items():
        marks["choice"][kind] = choose(model, encoding, rows, [[]] * len(rows))
        marker = MARKER if kind == "math + wiki" else ""
        answers = written_answers(model, encoding, rows, marker, max_new_tokens=48)
        marks["written"][kind] = [int(answer == row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    return marks


def measure(config, number, device):
    """The rows of one random seed: {"name", "choice", "written", "marks"}."""
    chain = chain_with(config, number)
    encoding = Corpus(chain.data).encoding
    questions = two_expert_questions(config.questions)
    rows = []
    for name, load in tqdm(models_of(chain, device).items(), desc=f"random seed {number}", unit="model"):
        marks = marks_of(place(load(), device, "float32"), encoding, questions)
        row = {"name": name, "marks": marks}
        for metric, found in marks.items():
            means = {kind: sum(some) / len(some) for kind, some in found.items()}
            row[metric] = {**means, "avg": sum(means.values()) / len(means)}
        rows.append(row)
    return rows


def page(chains):
    """The table of two_experts.md: means over random seeds, and how far BTX is ahead on average."""
    kinds = list(chains[0][0]["choice"])
    header = ["model", *(f"{kind}: {metric}" for metric in ("choice", "written") for kind in kinds)]
    body = []
    for same in zip(*chains, strict=True):
        means = [
            sum(row[metric][kind] for row in same) / len(same) for metric in ("choice", "written") for kind in kinds
        ]
        name = same[0]["name"]
        ahead, half = tables.difference(chains, name, "choice", "avg")
        lead = "" if name == "btx" else f"{100 * ahead:+.1f} ± {100 * half:.1f}"
        body.append([name, *(f"{mean:.1%}" for mean in means), lead])
    return tables.markdown_table([*header, "btx ahead on choices, points"], body)


def main():
    config = parse_study(TwoExpertsConfig, "two_experts")
    device = pick_device("auto")
    path = config.path("report/two_experts.json")
    chains = {}
    if os.path.exists(path):
        before = read_json(path, "remove it")
        if before["questions"] == config.questions:
            chains = before["chains"]
    for number in split_list(config.seeds):
        if number not in chains:
            chains[number] = measure(config, number, device)
            write_json(path, {"chains": chains, "questions": config.questions, "versions": versions()})
    text = ["# Questions that need two experts\n", page(list(chains.values())), "\nGuessing gets 25 % of the choices."]
    write_atomically(config.path("report/two_experts.md"), "\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    command(main)
