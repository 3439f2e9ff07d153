"""The recipe: every number that training depends on, checked once, and its schedules."""

from dataclasses import asdict, dataclass

from vllm_dms.config import DMSConfig


@dataclass(frozen=True)
class Recipe:
    """Defaults follow NVIDIA Model-Optimizer where it has one (tau, scale, offset, betas, ramp)."""

    ratio: float = 8.0  # final compression target: 1 / (1 - share evicted)
    window: int = 512
    dialect: str = "adapter"  # or "borrowed"
    train: str = "decisions"  # or "all"
    steps: int = 1000
    batch: int = 8  # rows a step
    micro_batch: int = 1  # rows a forward
    length: int = 4096  # tokens a row
    lr: float = 3e-5
    start_ratio: float = 1.0  # where the target begins: that of --init, if one is given
    ramp: float = 0.9  # share of the run after which the final ratio is asked for
    penalty: float = 1.0  # weight of the share of tokens that should have been evicted and were not
    tau: float = 0.1
    bound: float = 0.0  # of logits while training; 0: none
    alpha_scale: float = 100.0
    alpha_offset: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "ratio": (self.ratio >= 1, "at least 1"),
            "start_ratio": (1 <= self.start_ratio <= self.ratio, "in [1, ratio]"),
            "window": (self.window >= 1, "at least 1 token"),
            "dialect": (self.dialect in ("adapter", "borrowed"), "adapter or borrowed"),
            "train": (self.train in ("decisions", "all"), "decisions or all"),
            "steps": (self.steps >= 0, "at least 0"),
            "batch": (self.batch >= 1, "at least 1"),
            "micro_batch": (
                self.micro_batch >= 1 and self.batch % self.micro_batch == 0,
                "a divisor of batch",
            ),
            "length": (
                self.length > self.window + 1,
                f"more than the window, {self.window} + 1 tokens",
            ),
            "lr": (self.lr > 0, "above 0"),
            "ramp": (0 < self.ramp <= 1, "in (0, 1]"),
            "penalty": (self.penalty > 0, "above 0"),
            "tau": (self.tau > 0, "above 0"),
            "bound": (self.bound >= 0, "above 0, or 0 for none"),
        }
        for name, (valid, requirement) in checks.items():
            if not valid:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, but it must be "
                    f"{requirement}."
                )

    def dms(self) -> DMSConfig:
        return DMSConfig(
            dialect="nvidia-adapter" if self.dialect == "adapter" else "nvidia-borrowed",
            window=self.window,
            alpha_scale=self.alpha_scale,
            alpha_offset=self.alpha_offset,
            shift=1,
            nominal_ratio=self.ratio,
        )

    def live_ratio(self, tokens: int) -> float:
        """Dense over live tokens after so many, the window included, if the target is met."""
        recent = min(tokens, self.window + 1)
        return tokens / (recent + (tokens - recent) / self.ratio)

    def target_ratio(self, progress: float) -> float:
        """Linear from where it starts to the final ratio over the ramp."""
        return self.start_ratio + (self.ratio - self.start_ratio) * min(progress / self.ramp, 1.0)

    def target_share(self, progress: float) -> float:
        """The share of tokens to evict."""
        return 1 - 1 / self.target_ratio(progress)

    def learning_rate(self, progress: float) -> float:
        """Constant while the target moves, then linear to a tenth."""
        settled = 0.0 if progress <= self.ramp else (progress - self.ramp) / (1 - self.ramp)
        return self.lr * (1 - 0.9 * min(settled, 1.0))

    def to_dict(self) -> dict:
        return asdict(self)
