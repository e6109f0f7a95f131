"""Makes the student's copy of the source, with the exercises' functions emptied.

    python -m exercises.strip student      # the copy that students work in
    python -m exercises.strip --solution student

The solution is the source itself: in the student's copy each function in EXERCISES keeps its signature and docstring,
and has the task in place of its body. Functions that the source does not have (a new router, another optimizer) are in
exercises/solution, and are emptied in the same way.
"""

import ast
import glob
import json
import os
import pathlib
import re
import shutil
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# the student's copy has these files, and those in OWN, moved to exercises/
COPIED = ("*.py", "pyproject.toml", "common/*.py", "data/*", "study/*", "config/*/*.py", "exercises/__init__.py")
OWN = "exercises/solution/"
HANDED_OUT = ("*.py", "predictions.json")  # from OWN; the rest of it is for staff

# {file, from the repository's root: {function or Class.method: "number of the exercise. Task"}}
EXERCISES = {
    "model.py": {
        "topk": "1. Pick the k largest logits of each row, and take the softmax over those alone.",
        "switch": "1. Why is the gate not the softmax over the single chosen logit? What would its gradient be?",
        "load_balancing_loss": "2. Follow the formulas above. Which factors carry a gradient, and to where?",
        "within_capacity": "3. First come, first served: count along the tokens.",
        "MoE.forward": """3. Start with the loop over experts in docs/lecture.md, step 3; the tests pass with it.
Then sort the S * k pairs by expert (argsort, stable), call self.experts once on all of them with the places
where each expert's rows end (int32), and undo the sort: the inverse of a permutation is its argsort.
The dict: balance_loss, z_loss and, in training with a limited capacity, `dropped`.""",
    },
    "mix.py": {
        "mix": """4. Four cases, told apart by the tensor's name: new, stacked (feed_forward, below), kept from the
last expert (config.keep names parts, see group_of), and averaged.""",
        "mean": "4. Mind the precision: the mean of N copies must be what was copied, bit for bit.",
        "redraw": """5. hidden_dim(name) is the dimension that counts hidden units. Two generators (see `generator`):
the choice of units depends only on the expert, the new values also on the matrix.""",
    },
    "study/btm.py": {
        "PosteriorEnsemble.log_weights": """6. The posterior after each token, as logarithms. Ensemble.log_weights
explains the arguments. Entry t of the result is log w_e,t+1, so token t itself counts. By prefix, go along the text:
the weights after a token come from those before it, and cache.evidence (B, 1, N), 0 at first, carries them over to
the next call. Normalize at each token to keep long texts finite. self.share is 0 unless somebody sets it.""",
        "expert_profiles": """7. idf = log(windows / (1 + windows that contain the token)), over all domains' windows.
Normalize each window before you take a domain's mean, and each expert's vector afterwards.""",
        "NearestEnsemble.log_weights": """7. k experts weigh 1 / k each, and log 0 is -inf. Ensemble.log_weights
explains the arguments; cache.add(evidence) sums (B, T, N) along the text.""",
    },
    OWN + "compute.py": {
        "training_flops": "8. 6 FLOPs per weight and token: where do they come from? Looking up a row is not a matmul.",
        "matched_steps": "8. Match all training after the seed: branches and finetuning.",
    },
    OWN + "routers.py": {
        "sigmoid": "9. If a token's gates did not sum to 1, N copies of one model would not equal that model.",
        "rows": "9. One entry for each of this file's two routers (expert_choice is exercise 10).",
        "expert_choice": "10. The softmax is over experts; then each expert picks tokens, along the other dimension.",
        "first_leak": "10. Change only the last token, and compare the logits of all positions before it.",
    },
    OWN + "muon.py": {
        "orthogonalize": "11. All products run over the last two dimensions, so a stack needs no loop.",
        "Muon.step": "11. The momentum buffer lives in self.state[parameter].",
        "split_parameters": "11. Norms, embeddings and the head are not for Muon; nor is the router.",
    },
}


def definitions(source):
    """{name: syntax-tree node} for a file's functions and classes; a method's name is Class.method."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}": one for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


def strip(source, tasks):
    """The source with some functions emptied: the task replaces the code after signature and docstring. A comment
    between signature and code counts as a docstring.

    tasks: one file's, from EXERCISES. KeyError for a function that does not exist."""
    found = definitions(source)
    lines = source.splitlines(keepends=True)
    for name in sorted(tasks, key=lambda name: found[name].lineno, reverse=True):  # line numbers above stay right
        stub = [f"# {line}" for line in f"Exercise {tasks[name]}".split("\n")]
        stub.append(f'raise NotImplementedError("exercise {tasks[name].partition(".")[0]}")')
        first = found[name].body[0]
        start = first.lineno - 1 if ast.get_docstring(found[name]) is None else first.end_lineno
        lines[start : found[name].end_lineno] = [f"{' ' * first.col_offset}{line}\n" for line in stub]
    return "".join(lines)


def copied_files():
    """All files of the student's copy as {its path: the path in this repository}."""
    paths = [path for pattern in COPIED for path in sorted(glob.glob(pattern, root_dir=ROOT))]
    files = {path: path for path in paths if os.path.isfile(os.path.join(ROOT, path))}
    own = [path for pattern in HANDED_OUT for path in glob.glob(OWN + pattern, root_dir=ROOT)]
    return files | {path.replace(OWN, "exercises/"): path for path in own}


def make_copy(folder, solution=False):
    """Write the student's copy, with functions emptied and predictions open; or the solution, with both filled in."""
    for target, path in copied_files().items():
        target = os.path.join(folder, target)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(os.path.join(ROOT, path), target)
        if solution or not (path in EXERCISES or path.endswith("predictions.json")):
            continue
        with open(target, encoding="utf-8") as file:
            text = file.read()
        with open(target, "w", encoding="utf-8") as file:
            file.write(strip(text, EXERCISES[path]) if path in EXERCISES else open_answers(text))
    shutil.copyfile(os.path.join(ROOT, "exercises", "AGENTS.md"), os.path.join(folder, "AGENTS.md"))


def cut_pages(folder):
    """Cut a copy's Markdown pages to what students need: no part for staff, and links to what the copy lacks become
    plain words."""
    for page in pathlib.Path(folder).rglob("*.md"):

        def kept(match, page=page):
            words, target = match[1], match[2].partition("#")[0]
            return match[0] if ":" in target or (page.parent / target).exists() else words

        text = page.read_text(encoding="utf-8").partition("\n## For staff")[0]
        text = re.sub(r"(?<!!)\[([^][]*)\]\(([^()\s]+)\)", kept, text)  # a link, but no picture
        page.write_text(f"{text.rstrip()}\n", encoding="utf-8")


def open_answers(text):
    """The solution's predictions.json with every answer removed."""
    return json.dumps(dict.fromkeys(json.loads(text), "?"), indent=2) + "\n"


if __name__ == "__main__":
    folder, solution = sys.argv[-1], "--solution" in sys.argv[1:]
    if len(sys.argv) != 2 + solution or folder.startswith("-"):
        raise SystemExit("usage: python -m exercises.strip [--solution] FOLDER")
    if os.path.exists(folder):
        raise SystemExit(f"error: {folder} already exists, perhaps with work in it; choose another folder")
    make_copy(folder, solution)
    print(f"{folder}: {sum(map(len, EXERCISES.values()))} functions to write")
