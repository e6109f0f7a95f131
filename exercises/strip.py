"""Makes the student's copy of the source, with the exercises' functions emptied, and fills it again.

    python -m exercises.strip student      # the copy that students work in
    python -m exercises.strip --solution student

The solution is the source itself: `strip` takes the body of each function in EXERCISES out and leaves its signature,
its docstring and the task; `fill` puts the bodies back. What the source lacks (a new router, another optimizer) is in
exercises/solution, and is emptied by the same two functions.
"""

import ast
import glob
import os
import shutil
import sys
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# the student's copy has files with these names, and those in OWN moved to exercises/
COPIED = ("*.py", "pyproject.toml", "common/*.py", "data/*", "study/*", "config/*/*.py")
COPIED += ("exercises/__init__.py",)
OWN = "exercises/solution/"
HANDED_OUT = ("*.py", "predictions.json")  # the rest of it is for staff


class Exercise(NamedTuple):
    """file: where the functions are, from the repository's root. functions: {name: task}, methods as Class.method."""

    title: str
    file: str
    functions: dict


EXERCISES = {
    1: Exercise(
        "gates",
        "model.py",
        {
            "topk": "Pick the k largest logits of each row, and take the softmax over those alone.",
            "switch": "Why is the gate not the softmax over the one chosen logit? What would its gradient be?",
        },
    ),
    2: Exercise(
        "the balancing loss",
        "model.py",
        {"load_balancing_loss": "Follow the formulas above. Which of the factors carry a gradient, and where to?"},
    ),
    3: Exercise(
        "dispatch",
        "model.py",
        {
            "within_capacity": "First come, first served: count along the tokens.",
            "MoE.forward": """Start with the loop over experts in docs/lecture.md, step 3; the tests pass with it.
Then sort the S * k pairs by expert (argsort, stable), call self.experts once on all of them with the place
where each expert's rows end (int32), and undo the sort: the inverse of a permutation is its argsort.
The last result: balance_loss, z_loss, and in training with a limited capacity `dropped`.""",
        },
    ),
    4: Exercise(
        "mix",
        "mix.py",
        {
            "mix": """Four cases, told apart by the tensor's name: new, stacked (feed_forward, below), kept as the
last expert has it (config.keep names parts, see group_of), and averaged.""",
            "mean": "Mind the precision: N copies have to give back what was copied, to the bit.",
        },
    ),
    5: Exercise(
        "Drop-Upcycling",
        "mix.py",
        {
            "redraw": """hidden_dim(name) is the dimension that counts hidden units. Two generators (see `generator`):
the choice of units depends on the expert alone, the new values on the matrix as well.""",
        },
    ),
    6: Exercise(
        "Branch-Train-Merge's posterior",
        "study/btm.py",
        {
            "PosteriorEnsemble.log_weights": """The posterior after each token, as logarithms. Ensemble.log_weights
says what the arguments are; cache.add(evidence) adds (B, T, N) up along the text, over several calls.
Entry t of the result is log w_e,t+1, so token t itself counts. Long texts: keep sums small.""",
        },
    ),
    7: Exercise(
        "tf-idf routing",
        "study/btm.py",
        {
            "expert_profiles": """idf = log(windows / (1 + windows that hold the token)), over all domains' windows.
Normalize each window before you take a domain's mean, and each expert's vector after.""",
            "NearestEnsemble.log_weights": """k experts weigh 1 / k each, and log 0 is -inf. Ensemble.log_weights says
what the arguments are; cache.add(evidence) adds (B, T, N) up along the text.""",
        },
    ),
    8: Exercise(
        "equal compute",
        OWN + "compute.py",
        {
            "training_flops": "6 FLOPs a weight and token: where do they come from? To look up a row is no matmul.",
            "matched_steps": "What is matched is all training after the seed: branches and finetuning.",
        },
    ),
    9: Exercise(
        "a new router: sigmoid gates",
        OWN + "routers.py",
        {
            "sigmoid": "If gates did not sum to 1 over the chosen, N copies of one model would not be that model.",
            "rows": "One line for each of this file's two routers (expert_choice is exercise 10).",
        },
    ),
    10: Exercise(
        "expert choice, and its leak",
        OWN + "routers.py",
        {
            "expert_choice": "The softmax is over experts; then each expert picks tokens, along the other dimension.",
            "first_leak": "Change the last token only, and compare the logits of all positions before it.",
        },
    ),
    11: Exercise(
        "Muon for stacks of experts",
        OWN + "muon.py",
        {
            "orthogonalize": "All products are over the last two dimensions, so a stack needs no loop.",
            "Muon.step": "The momentum buffer lives in self.state[parameter].",
            "split_parameters": "Norms, embeddings and the head are not for Muon; nor is the router.",
        },
    ),
}


# ---- one file ----


def bodies(source, names):
    """{name: (first line, last line, indent)} of the functions' code after signature and docstring, lines from 0, last
    one excluded. names: "function" or "Class.method". KeyError for a name that is not there."""
    found, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        named = [
            (node, getattr(node, "name", "")),
            *((one, f"{node.name}.{getattr(one, 'name', '')}") for one in inner),
        ]
        for function, name in named:
            if name not in names or not isinstance(function, ast.FunctionDef):
                continue
            first = function.body[0]
            start = function.lineno
            while not lines[start - 1].endswith(":"):  # of a signature over several lines
                start += 1
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                start = first.end_lineno
            found[name] = start, function.end_lineno, first.col_offset
    return {name: found[name] for name in names}


def replace(source, names, text_of):
    """Replace the body of each named function with text_of(name, old body, indent)."""
    lines = source.splitlines(keepends=True)
    for name, (start, end, indent) in sorted(bodies(source, names).items(), key=lambda item: -item[1][0]):
        lines[start:end] = [text_of(name, "".join(lines[start:end]), indent)]
    return "".join(lines)


def strip(source, exercises):
    """(the source with the exercises' functions emptied, {name: what was taken out}). exercises: {number: Exercise}."""
    number = {name: i for i, exercise in exercises.items() for name in exercise.functions}
    taken = {}

    def stub(name, body, indent):
        taken[name] = body
        task = f"Exercise {number[name]}. {exercises[number[name]].functions[name]}"
        lines = [f"# {line}" for line in task.split("\n")] + [f'raise NotImplementedError("exercise {number[name]}")']
        return "".join(f"{' ' * indent}{line}\n" for line in lines)

    return replace(source, list(number), stub), taken


def fill(source, taken):
    """Put the bodies back that `strip` has taken out."""
    return replace(source, list(taken), lambda name, body, indent: taken[name])


# ---- the tree ----


def by_file():
    """{file: {number: Exercise}}"""
    files = {}
    for number, exercise in EXERCISES.items():
        files.setdefault(exercise.file, {})[number] = exercise
    return files


def copied_files():
    """All files of the student's copy as {its path: the path in this repository}."""
    paths = [path for pattern in COPIED for path in sorted(glob.glob(pattern, root_dir=ROOT))]
    files = {path: path for path in paths if os.path.isfile(os.path.join(ROOT, path))}
    own = [path for pattern in HANDED_OUT for path in glob.glob(OWN + pattern, root_dir=ROOT)]
    return files | {path.replace(OWN, "exercises/"): path for path in own}


def make_copy(folder, solution=False):
    """Write the student's copy: emptied functions and open predictions; or with both filled in again."""
    exercises = by_file()
    for target, path in copied_files().items():
        os.makedirs(os.path.dirname(os.path.join(folder, target)), exist_ok=True)
        if path not in exercises and not path.endswith("predictions.json"):
            shutil.copyfile(os.path.join(ROOT, path), os.path.join(folder, target))
            continue
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            source = file.read()
        if path in exercises:
            text, taken = strip(source, exercises[path])
            text = fill(text, taken) if solution else text
        else:
            text = source if solution else open_answers(source)
        with open(os.path.join(folder, target), "w", encoding="utf-8") as file:
            file.write(text)


def open_answers(text):
    """The solution's predictions.json with every answer taken out."""
    lines = [line.partition(":")[0] + ': "?",' if ":" in line else line for line in text.splitlines()]
    return "\n".join(lines).replace(",\n}", "\n}") + "\n"


if __name__ == "__main__":
    folder, solution = sys.argv[-1], "--solution" in sys.argv[1:]
    if len(sys.argv) != 2 + solution or folder.startswith("-"):
        raise SystemExit("usage: python -m exercises.strip [--solution] FOLDER")
    if os.path.exists(folder):
        raise SystemExit(f"error: {folder} is there already, with work in it perhaps; choose another folder")
    make_copy(folder, solution)
    print(f"{folder}: {sum(len(exercise.functions) for exercise in EXERCISES.values())} functions to write")
