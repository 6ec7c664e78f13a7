"""The model card of a shared run: README.md with the front matter that the Hugging Face hub reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.reports.read import Score
from meanflow.data import LatentsConfig
from meanflow.logs import duration
from meanflow.training.config import WEIGHTS, RunConfig
from meanflow.training.shared import LIBRARY, WEIGHTS_FILE, weights_file

PAPER = "https://arxiv.org/abs/2505.13447"
BIBTEX = """@article{geng2025meanflow,
  title   = {Mean Flows for One-step Generative Modeling},
  author  = {Geng, Zhengyang and Deng, Mingyang and Bai, Xingjian and Kolter, J. Zico and He, Kaiming},
  journal = {arXiv preprint arXiv:2505.13447},
  year    = {2025}
}"""


@dataclass(frozen=True)
class Card:
    """What a card tells. `emas`: the averages shared, the one meant first in front; `picture`: its caption or ""."""

    name: str  # as it is loaded: owner/name, or a folder's name
    license: str
    config: RunConfig
    meta: dict[str, Any]
    emas: tuple[str, ...]
    parameters: int
    scores: tuple[Score, ...]
    picture: str

    def text(self) -> str:
        """README.md."""
        parts = [front_matter(self), f"# {self.name}", self._lead()]
        if self.picture:
            parts.append(f"![samples](samples.png)\n\n{self.picture}")
        parts += ["## Use", self._use(), "## What it is", table(["", ""], self._facts())]
        parts += ["## Scores", scores_text(self.scores), "## Citation", f"```bibtex\n{BIBTEX}\n```"]
        return "\n\n".join(parts) + "\n"

    def _lead(self) -> str:
        channels, size, _ = self.config.image_shape
        kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
        by_class = " by class" if self.config.model.classes else ""
        words = " ".join(self.config.description.split()).rstrip(".")
        return (
            f"{words[:1].upper()}{words[1:]}. A network u(z, r, t) of average velocities that makes "
            f"{kind} images of {size}×{size} pixels{by_class} from noise in one evaluation, or better ones in a few "
            f"([Mean Flows for One-step Generative Modeling]({PAPER}))."
        )

    def _use(self) -> str:
        channels, size, _ = self.config.image_shape
        which = ", classes=0" if self.config.model.classes else ""
        return (
            "```python\nfrom meanflow import load\n"
            f'images = load("{self.name}").sample(16, steps=1, seed=0{which})'
            f"  # float32 (16, {channels}, {size}, {size}), about [−1, 1]\n```\n\n"
            f'`{LIBRARY}` is installed from a checkout of it: `pip install -e ".[hub]"`. Nothing here is code: weights '
            "are safetensors, settings JSON."
        )

    def _facts(self) -> list[list[str]]:
        config, meta = self.config, self.meta
        objective = (type(config.objective).__doc__ or "").strip().partition("\n")[0].partition(". ")[0]
        train = f"{meta['step']:,} of {config.train.steps:,} steps of {config.train.batch:,} images"
        train += f" ({meta['images']:,} in all), {config.train.precision}"
        if meta["seconds"]:
            where = meta.get("environment") or {}
            on = f" on {where['device']}, PyTorch {where['torch']}" if {"device", "torch"} <= where.keys() else ""
            train += f", {duration(meta['seconds'])}{on}"
        first, *others = self.emas
        weights = [
            f"{_average(first)}: `{WEIGHTS_FILE}`",
            *(f"{_average(x)}: `{weights_file(x, first)}`" for x in others),
        ]
        return [
            [
                "network",
                f"{type(config.model).__name__.removesuffix('Config')}, {self.parameters / 1e6:,.2f} M parameters",
            ],
            ["objective", f"`{config.objective.kind}`: {objective}"],
            ["guidance", "none" if config.guidance is None else "trained in (see `config.json`)"],
            ["data", data_text(config, meta["data"])],
            ["training", train],
            ["weights", "; ".join(weights)],
            ["settings", "all are in `config.json`"],
        ]


def front_matter(card: Card) -> str:
    """The YAML between two lines of three dashes."""
    tags = ["meanflow", "one-step-generation", "image-generation"]
    tags += ["class-conditional"] if card.config.model.classes else []
    content = {
        "license": card.license,
        "library_name": LIBRARY,
        "pipeline_tag": "unconditional-image-generation",  # the hub has none for classes
        "tags": tags,
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def data_text(config: RunConfig, facts: dict[str, Any]) -> str:
    """Which images, how many, of which classes; of a path its last part alone."""
    data = config.data
    path = data.images if isinstance(data, LatentsConfig) else data.path
    text = f"{Path(path).name if path else data.source}, {facts['images']:,} images"
    names = facts.get("classes") or []
    if names and config.model.classes:
        shown = ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:3])}, …, {names[-1]}"
        text += f", {len(names):,} classes: {shown}"
    return f"{text}; latents of `{data.vae}`" if isinstance(data, LatentsConfig) else text


def scores_text(scores: Sequence[Score]) -> str:
    """A table of the scores with their protocol, and the commands that measured them."""
    found = [score for score in scores if score.value is not None]
    if not found:
        return "None were measured before this was shared."
    header = ["metric", "value", "NFE", "weights", "samples", "features", "reference", "comparable with published"]
    rows = []
    for score in sorted(found, key=lambda s: (s.metric, s.ema, s.nfe)):
        value = f"{score.value:.4g}" + ("" if score.deviation is None else f" ± {score.deviation:.2g}")
        how = [str(score.nfe), _average(score.ema), f"{score.n:,}", score.extractor, Path(score.reference).name]
        rows.append([score.metric, value, *how, score.why or "yes"])
    commands = dict.fromkeys(_without_folders(score.command) for score in found if score.command)
    return "\n\n".join([table(header, rows), "Measured with:", "```\n" + "\n".join(commands) + "\n```"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in row)} |" for row in lines
    )


def _without_folders(command: str) -> str:
    """A command without the folders of the machine that it ran on."""
    return " ".join(Path(word).name if word.startswith(("/", "~")) else word for word in command.split())


def _average(ema: str) -> str:
    return "last weights" if ema == WEIGHTS else f"EMA {ema}"
