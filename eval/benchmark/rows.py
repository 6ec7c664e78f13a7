"""What the benchmark measures of one recipe: the steps, and ratios between them."""

import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eval.benchmark import FLOW_MATCHING, PLAIN
from eval.benchmark.clock import Spread, matrix_work, ratio, take_turns
from eval.benchmark.latents import write_random_latents
from eval.benchmark.steps import Setting, Step, peak_memory
from meanflow.data import Dataset, Latents, LatentsConfig
from meanflow.data.latents import verify
from meanflow.logs import log
from meanflow.objectives import Loss, Objective
from meanflow.objectives.base import by_rows
from meanflow.training.batches import BatchStream
from meanflow.training.config import WEIGHTS, RunConfig, load_config
from meanflow.training.costs import forward_multiply_adds
from meanflow.training.metrics import MetricsLog, StepSums
from meanflow.training.model import Model, generate, to_uint8
from meanflow.training.processes import DistributedContext
from meanflow.training.state import TrainState, count_parameters

IMAGES = 256  # random ones that stand for the data set


@dataclass(frozen=True)
class Row:
    name: str
    figure: Spread


@dataclass(frozen=True)
class StepResult:
    name: str
    rounds: list[float]  # seconds
    seconds: Spread
    images_per_s: float
    flops: int
    tflops_per_s: float
    of_matrix_rate: float
    memory_mb: float | None  # peak, of a separate process; None if not asked for


@dataclass(frozen=True)
class Report:
    recipe: str
    objective: str
    parameters: int
    batch: int
    share: float  # of r ≠ t
    matrix_rates: dict[str, float]  # FLOP/s by precision
    steps: list[StepResult]
    rows: list[Row]


@dataclass(frozen=True)
class Plan:
    """What to measure of one recipe."""

    recipe: Path
    overrides: tuple[str, ...]
    batch: int
    rounds: int
    precisions: tuple[str, ...]
    jvps: tuple[str, ...]
    modes: tuple[str, ...]  # of torch.compile, for compiled steps besides the eager ones
    rows: tuple[str, ...]
    device: torch.device
    against: Path | None = None  # a recipe whose eager steps are measured beside these

    def setting(self, way: str, precision: str, compile: str | None = None) -> Setting:
        return Setting(self.recipe, self.overrides, self.batch, way, precision, compile)

    @property
    def plain(self) -> Setting:
        """The baseline: eager float32 on a CPU; TF32 on a GPU, compiled if anything is."""
        cuda = self.device.type == "cuda"
        return self.setting(PLAIN, "tf32" if cuda else "fp32", self.modes[0] if cuda and self.modes else None)

    @property
    def objective(self) -> Objective:
        return load_config(self.recipe, self.overrides).objective

    @property
    def compares_plain(self) -> bool:
        return "plain" in self.rows and self.objective.plain is not None

    def settings(self) -> list[Setting]:
        chosen = []
        for precision in self.precisions:
            chosen += [self.setting(way, precision) for way in (FLOW_MATCHING, *self.jvps)]
            for mode in self.modes:
                chosen += [self.setting(way, precision, mode) for way in (FLOW_MATCHING, self.jvps[0])]
        return chosen + ([self.plain] if self.compares_plain else []) + self.others()

    def others(self) -> list[Setting]:
        """The steps of the recipe `against`, in the first precision: Flow Matching and its own."""
        if self.against is None:
            return []
        how = {"recipe": self.against, "overrides": (), "label": f"{self.against.stem}: "}
        return [replace(self.setting(way, self.precisions[0]), **how) for way in (FLOW_MATCHING, self.jvps[0])]


def measure(plan: Plan) -> Report:
    """Run everything that `plan` names. Raises ConfigError."""
    settings, device = plan.settings(), plan.device
    if "plain" in plan.rows and not plan.compares_plain:
        log.info(f"{plan.recipe.stem}: objective {plan.objective.kind} has no plain form to compare with")
    memory: dict[str, float] = {}
    if "memory" in plan.rows:  # first, while this process is small
        for setting in settings:
            log.info(f"{plan.recipe.stem}: peak memory of {setting.name}")
            memory[setting.name] = peak_memory(setting, device)
    log.info(f"{plan.recipe.stem}: {len(settings)} steps, {plan.rounds} rounds")
    steps, states = {}, {}
    for setting in settings:  # all of a recipe share its network but the plain one
        step = Step(setting, device, None if setting.way == PLAIN else states.get(setting.recipe))
        if setting.way != PLAIN:
            states[setting.recipe] = step.state
        steps[setting.name] = step
    work = {s.precision: matrix_work(steps[s.name].config.train, device) for s in settings}
    products = {(precision, kind): call for precision in work for kind, (call, _) in work[precision].items()}
    seconds = take_turns({**steps, **products}, plan.rounds, device)
    ours = steps[plan.setting(plan.jvps[0], plan.precisions[0]).name]
    rates = {
        precision: max(flops / min(seconds[precision, kind]) for kind, (_, flops) in work[precision].items())
        for precision in work
    }
    config = plan.setting(plan.jvps[0], plan.precisions[0]).config()
    results = [_step_result(steps[s.name], seconds[s.name], rates[s.precision], memory.get(s.name)) for s in settings]
    parameters = count_parameters(ours.state.network)
    share = float((ours.batch.r != ours.batch.t).float().mean())
    rows = _rows(plan, share, seconds, memory)
    rows += _against_another(plan, {result.name: result for result in results}, config)
    if "outside" in plan.rows:
        rows.append(_outside(config, states[plan.recipe], Spread.of(seconds[settings[1].name]).median, device))
    if "sampling" in plan.rows:
        rows.append(_sampling(config, states[plan.recipe], plan))
    return Report(plan.recipe.stem, _name(plan), parameters, plan.batch, share, rates, results, rows)


def _name(plan: Plan) -> str:
    return type(plan.objective).__name__


def _step_result(step: Step, seconds: list[float], rate: float, memory: float | None) -> StepResult:
    spread, flops = Spread.of(seconds), step.flops()
    achieved, images = flops / spread.median, step.setting.batch / spread.median
    return StepResult(step.setting.name, seconds, spread, images, flops, achieved / 1e12, achieved / rate, memory)


def _rows(plan: Plan, share: float, seconds: dict[str, list[float]], memory: dict[str, float]) -> list[Row]:
    """The ratios of steps. The first of `plan.precisions` counts where a row names none."""
    flow_matching, ours = (plan.setting(way, plan.precisions[0]).name for way in (FLOW_MATCHING, plan.jvps[0]))
    rows = []
    if "step" in plan.rows:
        name = f"{_name(plan)} / Flow Matching step, r≠t {share:.0%}"
        rows.append(Row(name, ratio(seconds[ours], seconds[flow_matching])))
    if "memory" in plan.rows:
        figure = Spread.of([memory[ours] / memory[flow_matching]])
        rows.append(Row(f"peak memory, {_name(plan)} / Flow Matching step", figure))
    if plan.compares_plain:
        rows += [_against_plain(plan, seconds, precision) for precision in plan.precisions]
    return rows


def _against_another(plan: Plan, steps: dict[str, StepResult], config: RunConfig) -> list[Row]:
    """Our step over each of the other recipe's: counted operations, and seconds round by round."""
    if plan.against is None:
        return []
    ours = steps[plan.setting(plan.jvps[0], plan.precisions[0]).name]
    forward = 2 * forward_multiply_adds(config) * plan.batch
    rows = [Row(f"{plan.recipe.stem} step, counted in forward passes of u", Spread.of([ours.flops / forward]))]
    for setting in plan.others():
        other = steps[setting.name]
        name = f"{plan.recipe.stem} / {plan.against.stem} {'Flow Matching ' * (setting.way == FLOW_MATCHING)}step"
        rows.append(Row(f"{name}, counted operations", Spread.of([ours.flops / other.flops])))
        rows.append(Row(f"{name}, seconds", ratio(ours.rounds, other.rounds)))
    return rows


def _against_plain(plan: Plan, seconds: dict, precision: str) -> Row:
    """Images/s of the fastest of our steps in `precision` over the plain one's."""
    ours = [plan.setting(plan.jvps[0], precision, mode).name for mode in (None, *plan.modes)]
    fastest = min((seconds[name] for name in ours), key=lambda values: Spread.of(values).median)
    name = f"images/s in {precision} against the {plan.plain.name} step"
    return Row(name, ratio(seconds[plan.plain.name], fastest))


def _outside(config: RunConfig, state: TrainState, step_seconds: float, device: torch.device) -> Row:
    """What the training loop does besides forward, backward and optimiser, each part timed alone: an upper bound,
    since on a GPU much of it overlaps with the step."""
    alone, batch = DistributedContext(0, 1, device), config.train.batch
    numbers = torch.rand(batch, device=device)
    logged = Loss(numbers, by_rows(numbers, torch.zeros(batch), torch.arange(batch) % 2))
    steps = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        stream = BatchStream(_random_data(config, Path(folder)), config, alone)
        written = MetricsLog(Path(folder) / "metrics.jsonl", alone, config.logging.flush_every, 0.0)

        def metrics() -> None:
            for k in range(config.logging.flush_every):
                sums = StepSums()
                sums.add(logged)
                written.record(k + 1, batch, 0.0, sums, numbers[0])
                if written.due:
                    written.flush()

        every = {"data": 1, "ema": config.ema.every, "metrics": config.logging.flush_every}
        work = {
            "data": lambda: list(stream.micro_batches(next(steps))),
            "ema": lambda: state.ema.update(config.ema.every),
            "metrics": metrics,
        }
        seconds = take_turns(work, 5, device)
    shares = [sum(seconds[part][k] / every[part] for part in work) / step_seconds for k in range(5)]
    return Row("share of the step for data, augmentation, EMA and metrics", Spread.of(shares))


def _random_data(config: RunConfig, folder: Path) -> Dataset | Latents:
    shape, classes = config.z_shape, config.model.classes
    if isinstance(config.data, LatentsConfig):
        write_random_latents(folder, IMAGES, shape=shape, classes=classes or 1)
        return verify(folder)
    images = torch.randint(0, 256, (IMAGES, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(IMAGES) % classes if classes else None
    return Dataset(images, labels, tuple(map(str, range(classes))))


def _sampling(config: RunConfig, state: TrainState, plan: Plan) -> Row:
    """Rate of noise → network → uint8 on the host, as a share of the bare forward pass's."""
    network, device = state.network.eval(), plan.device
    model = Model(network, config, plan.recipe, WEIGHTS, {}, None)
    labels = torch.arange(plan.batch) % config.model.classes if config.model.classes else None
    z = torch.randn(plan.batch, *config.z_shape, device=device).contiguous(memory_format=torch.channels_last)
    cond = {} if labels is None else {"class_labels": labels.to(device)}
    t, r = torch.ones(plan.batch, device=device), torch.zeros(plan.batch, device=device)

    @torch.no_grad()
    def forward() -> None:
        network(z, r, t, **cond)

    def sampling() -> None:
        to_uint8(generate(model, 0, plan.batch, 1, 0, labels), config.sample.uint8).cpu()

    seconds = take_turns({"forward": forward, "sampling": sampling}, plan.rounds, device)
    name = "one-step sampling rate / forward pass rate"
    return Row(name, ratio(seconds["forward"], seconds["sampling"]))
