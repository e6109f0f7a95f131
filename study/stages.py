"""How a study starts the pipeline's stages: with the configs and folders of one size, each in a process of its own."""

import dataclasses
import os
import subprocess
import sys

from common.config import key, parse


@dataclasses.dataclass
class StudyConfig:
    """The keys that all studies have."""

    size: str = key("cpu", "which pipeline: the folders config/SIZE and out/SIZE")
    configs: str = key("", "the folder of the stages' configs; empty is config/SIZE")
    out_dir: str = key("", "the folder of that pipeline; empty is out/SIZE")

    def __post_init__(self):
        self.configs = self.configs or os.path.join("config", self.size)
        self.out_dir = self.out_dir or os.path.join("out", self.size)

    def stage(self, name):
        """The config file of a stage: "finetune" -> config/cpu/finetune.py."""
        return os.path.join(self.configs, f"{name}.py")

    def path(self, name):
        """Something in the pipeline's folder: "report" -> out/cpu/report."""
        return os.path.join(self.out_dir, name)


def parse_study(cls, name):
    """A study's config from the command line, on top of the config file given, or else config/SIZE/<name>.py."""
    flags = sys.argv[1:]
    if flags and not flags[0].startswith("-"):
        return parse(cls, flags)
    settings = parse(cls, flags).stage(name)
    return parse(cls, [settings, *flags] if os.path.exists(settings) else flags)


def finish(done):
    """An error of a stage, which has been shown already, ends the study too."""
    if done.returncode:
        raise SystemExit(done.returncode)


def run(script, *arguments):
    """Run one of our scripts ("train.py", or "-m study.btm"), with run.sh's FLAGS behind its arguments."""
    flags = os.environ.get("FLAGS", "").split()
    finish(subprocess.run([sys.executable, *script.split(), *arguments, *flags]))


def prepare(settings, folder, domains):
    """Prepare domains into a folder with the config file of the stage "data". No FLAGS: those are for training."""
    arguments = settings, f"--out_dir={folder}", f"--domains={','.join(domains)}"
    finish(subprocess.run([sys.executable, "-m", "data.prepare", *arguments]))
