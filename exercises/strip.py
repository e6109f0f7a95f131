"""Makes the student's copy of the source, with the exercises' functions emptied.

    python -m exercises.strip student      # the copy that students work in
    python -m exercises.strip --solution student

The solution is the source itself: the student's copy lacks the body of each function in EXERCISES, and has its
signature, its docstring and the task. What the source lacks (a new router, another optimizer) is in exercises/solution,
and is emptied in the same way.
"""

import ast
import glob
import json
import os
import shutil
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# the student's copy has files with these names, and those in OWN moved to exercises/
COPIED = ("*.py", "pyproject.toml", "common/*.py", "data/*", "study/*", "config/*/*.py", "exercises/__init__.py")
OWN = "exercises/solution/"
HANDED_OUT = ("*.py", "predictions.json")  # the rest of it is for staff

# {file from the repository's root: {function, methods as Class.method: "number of the exercise. Task"}}
EXERCISES = {
    "model.py": {
        "topk": "1. Pick the k largest logits of each row, and take the softmax over those alone.",
        "switch": "1. Why is the gate not the softmax over the one chosen logit? What would its gradient be?",
        "load_balancing_loss": "2. Follow the formulas above. Which of the factors carry a gradient, and where to?",
        "within_capacity": "3. First come, first served: count along the tokens.",
        "MoE.forward": """3. Start with the loop over experts in docs/lecture.md, step 3; the tests pass with it.
Then sort the S * k pairs by expert (argsort, stable), call self.experts once on all of them with the place
where each expert's rows end (int32), and undo the sort: the inverse of a permutation is its argsort.
The last result: balance_loss, z_loss, and in training with a limited capacity `dropped`.""",
    },
    "mix.py": {
        "mix": """4. Four cases, told apart by the tensor's name: new, stacked (feed_forward, below), kept as the
last expert has it (config.keep names parts, see group_of), and averaged.""",
        "mean": "4. Mind the precision: N copies have to give back what was copied, to the bit.",
        "redraw": """5. hidden_dim(name) is the dimension that counts hidden units. Two generators (see `generator`):
the choice of units depends on the expert alone, the new values on the matrix as well.""",
    },
    "study/btm.py": {
        "PosteriorEnsemble.log_weights": """6. The posterior after each token, as logarithms. Ensemble.log_weights
says what the arguments are. Entry t of the result is log w_e,t+1, so token t itself counts. By prefix, go along the
text: the weights after a token come from those before it, and cache.evidence (B, 1, N), 0 at first, carries them to
the next call. Normalize at each token, and long texts stay finite. self.share is 0 unless somebody gives one.""",
        "expert_profiles": """7. idf = log(windows / (1 + windows that hold the token)), over all domains' windows.
Normalize each window before you take a domain's mean, and each expert's vector after.""",
        "NearestEnsemble.log_weights": """7. k experts weigh 1 / k each, and log 0 is -inf. Ensemble.log_weights says
what the arguments are; cache.add(evidence) adds (B, T, N) up along the text.""",
    },
    OWN + "compute.py": {
        "training_flops": "8. 6 FLOPs a weight and token: where do they come from? To look up a row is no matmul.",
        "matched_steps": "8. What is matched is all training after the seed: branches and finetuning.",
    },
    OWN + "routers.py": {
        "sigmoid": "9. If gates did not sum to 1 over the chosen, N copies of one model would not be that model.",
        "rows": "9. One line for each of this file's two routers (expert_choice is exercise 10).",
        "expert_choice": "10. The softmax is over experts; then each expert picks tokens, along the other dimension.",
        "first_leak": "10. Change the last token only, and compare the logits of all positions before it.",
    },
    OWN + "muon.py": {
        "orthogonalize": "11. All products are over the last two dimensions, so a stack needs no loop.",
        "Muon.step": "11. The momentum buffer lives in self.state[parameter].",
        "split_parameters": "11. Norms, embeddings and the head are not for Muon; nor is the router.",
    },
}


def definitions(source):
    """{name: node of the syntax tree} of a file's functions and classes; a method's name is Class.method."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}": one for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


def strip(source, tasks):
    """The source with some functions emptied: after signature and docstring comes the task, in place of the code. A
    comment between signature and code counts as a docstring.

    tasks: one file's in EXERCISES. KeyError for a function that is not there."""
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
    """Write the student's copy: emptied functions and open predictions; or the solution, which has both filled in."""
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


def open_answers(text):
    """The solution's predictions.json with every answer taken out."""
    return json.dumps(dict.fromkeys(json.loads(text), "?"), indent=2) + "\n"


if __name__ == "__main__":
    folder, solution = sys.argv[-1], "--solution" in sys.argv[1:]
    if len(sys.argv) != 2 + solution or folder.startswith("-"):
        raise SystemExit("usage: python -m exercises.strip [--solution] FOLDER")
    if os.path.exists(folder):
        raise SystemExit(f"error: {folder} is there already, with work in it perhaps; choose another folder")
    make_copy(folder, solution)
    print(f"{folder}: {sum(map(len, EXERCISES.values()))} functions to write")
