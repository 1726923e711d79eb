"""What to save, and when: SaveConfig, ReductionConfig, CollectionConfig and the defaults of the known collections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smdbg.errors import near
from smdbg.store.dtypes import CASTS
from smdbg.store.format import COMPRESSIONS, MODES, valid_collection

EXTRA_STATISTICS = ("zeros", "l1", "abs_mean")


@dataclass(frozen=True)
class SaveConfig:
    """When to save, in steps of one mode (counted from 0 for each mode).

    A step is saved if it is in `save_steps`, or if start_step <= step < end_step and step % save_interval == 0.
    `end_step=None` never ends; `end_step=0` saves nothing but `save_steps`.
    """

    save_interval: int = 1
    start_step: int = 0
    end_step: int | None = None
    save_steps: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Check the numbers. Raises TypeError, ValueError."""
        _whole("save_interval", self.save_interval, 1)
        _whole("start_step", self.start_step, 0)
        if self.end_step is not None:
            _whole("end_step", self.end_step, 0)
        for step in self.save_steps:
            _whole("save_steps", step, 0)
        object.__setattr__(self, "save_steps", frozenset(int(s) for s in self.save_steps))

    def due(self, mode_step: int) -> bool:
        """Tell whether this step of a mode is to be saved."""
        if mode_step in self.save_steps:
            return True
        before_end = self.end_step is None or mode_step < self.end_step
        return self.start_step <= mode_step and before_end and mode_step % self.save_interval == 0


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value.__index__() < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")


ModeConfig = SaveConfig | Mapping[str, SaveConfig]

NEVER = SaveConfig(end_step=0)
# 0, 512, 1,024, 2,048, ... and the step after each: two in a row show an update whole.
DOUBLING = SaveConfig(end_step=0, save_steps=[0, 1, *(s for k in range(9, 48) for s in (1 << k, (1 << k) + 1))])


@dataclass(frozen=True)
class ReductionConfig:
    """What to keep of a saved tensor.

    save_raw_tensor: its full value, always, never, or on a schedule of its own (whose steps are saved in addition).
    statistics: those kept beside the ten that always are (any of zeros, l1, abs_mean).
    hash: two 32-bit halves of a sum over the bits, equal for equal tensors; None: for weights where there are several
    workers.
    quantiles, histogram, exponent_histogram: kept as further statistics. features: per-feature statistics of inputs
    and outputs; None: wherever the feature axis is known.
    """

    save_raw_tensor: bool | SaveConfig = False
    statistics: Sequence[str] = EXTRA_STATISTICS
    hash: bool | None = None
    quantiles: bool = False
    histogram: bool = False
    exponent_histogram: bool = False
    features: bool | None = None

    def __post_init__(self) -> None:
        """Check the names. Raises TypeError, ValueError."""
        if not isinstance(self.save_raw_tensor, bool | SaveConfig):
            raise TypeError(f"save_raw_tensor must be True, False or a SaveConfig, not {self.save_raw_tensor!r}")
        object.__setattr__(self, "statistics", tuple(self.statistics))
        for name in self.statistics:
            if name not in EXTRA_STATISTICS:
                raise ValueError(
                    f"statistics: {name!r} cannot be switched: choose among {', '.join(EXTRA_STATISTICS)}; "
                    f"the others have options of their own, or are always kept.{near(name, EXTRA_STATISTICS)}"
                )

    def raw(self) -> SaveConfig:
        """Return the schedule of full values."""
        if isinstance(self.save_raw_tensor, SaveConfig):
            return self.save_raw_tensor
        return SaveConfig() if self.save_raw_tensor else NEVER


@dataclass(frozen=True)
class CollectionConfig:
    """A collection: its name, which tensors belong to it (globs, or `re:` patterns), and how to save them.

    `save_config` may be a mapping mode -> SaveConfig (modes left out are not saved). None takes the hook's, or the
    default of the collection.
    compression: of full values, "none", "lz4" or "zstd". lz4 is the faster one, zstd makes less of it; both pay where
    values are sparse or repeat.
    dtype: full values that are wider floats are cast to it for storing: "float32", "float16" or "bfloat16". Statistics
    are of the value before.
    """

    name: str
    include: Sequence[str] = ()
    save_config: ModeConfig | None = None
    reduction_config: ReductionConfig | None = None
    compression: str = "none"
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Check name and types. Raises TypeError, ValueError."""
        if not isinstance(self.name, str) or not valid_collection(self.name):
            raise ValueError(f"{self.name!r} cannot name a collection: use 1 to 64 of A-Z a-z 0-9 _ -, and not 'steps'")
        include = (self.include,) if isinstance(self.include, str) else tuple(self.include)
        object.__setattr__(self, "include", include)
        check_mode_config(self.save_config)
        if self.reduction_config is not None and not isinstance(self.reduction_config, ReductionConfig):
            raise TypeError(f"reduction_config must be a ReductionConfig, not {self.reduction_config!r}")
        _one_of("compression", self.compression, ("none", *COMPRESSIONS))
        if self.dtype is not None:
            _one_of("dtype", self.dtype, CASTS)


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}.{near(value, known)}")


def check_mode_config(config: object) -> None:
    """Raise TypeError or ValueError if `config` is neither None, a SaveConfig nor a mapping mode -> SaveConfig."""
    if config is None or isinstance(config, SaveConfig):
        return
    if not isinstance(config, Mapping):
        raise TypeError(f"save_config must be a SaveConfig or a mapping of modes to them, not {config!r}")
    for mode, one in config.items():
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: modes are {', '.join(MODES)}.{near(str(mode), MODES)}")
        if not isinstance(one, SaveConfig):
            raise TypeError(f"save_config of mode {mode!r} must be a SaveConfig, not {one!r}")


@dataclass(frozen=True)
class _Default:
    role: str
    interval: int
    raw: SaveConfig
    training_only: bool = False
    patterns: tuple[str, ...] = ()


ALWAYS = SaveConfig()

KNOWN: Mapping[str, _Default] = {
    "losses": _Default("loss", 1, ALWAYS, patterns=("re:(^|[/_.])[Ll]oss",)),
    "metrics": _Default("metric", 1, ALWAYS),
    "gradients": _Default("gradient", 10, DOUBLING, True, ("gradient/*", "gradients/*")),
    "updates": _Default("update", 10, NEVER, True, ("update/*", "updates/*")),
    "weights": _Default("weight", 10, DOUBLING, True, ("*.weight", "weight/*", "weights/*", "*/kernel")),
    "biases": _Default("bias", 10, NEVER, True, ("*.bias", "bias/*", "biases/*", "*/bias")),
    "inputs": _Default("input", 10, NEVER),
    "outputs": _Default("output", 10, NEVER),
    "optimizer_state": _Default("", 10, NEVER),
    "labels": _Default("label", 10, ALWAYS),
    "predictions": _Default("prediction", 10, ALWAYS),
    "hyperparameters": _Default("", 1, ALWAYS),
}
BY_DEFAULT = ("losses", "metrics", "weights", "biases", "gradients", "updates")
_CUSTOM = _Default("", 1, ALWAYS)


@dataclass(frozen=True)
class Plan:
    """When one collection is saved, and what is kept of it, everything resolved."""

    name: str
    role: str
    save: Mapping[str, SaveConfig]
    raw: SaveConfig
    raw_adds_steps: bool
    reduction: ReductionConfig
    budgeted: bool  # full values are saved by default only, so they stay within the raw budget
    include: tuple[str, ...] = field(default=())
    compression: str = ""  # of full values, one of COMPRESSIONS
    cast: str = ""  # dtype that wider floats are stored as

    def due(self, mode: str, mode_step: int) -> bool:
        """Tell whether the collection is saved at this step of this mode."""
        config = self.save.get(mode)
        if config is None:
            return False
        return config.due(mode_step) or (self.raw_adds_steps and self.raw.due(mode_step))

    def raw_due(self, mode_step: int) -> bool:
        """Tell whether full values are kept at a step that is due."""
        return self.raw.due(mode_step)

    @property
    def always_raw(self) -> bool:
        """Tell whether the full value is kept at every saved step."""
        return self.raw == ALWAYS


def plan(name: str, own: CollectionConfig | None, save: ModeConfig | None, reduction: ReductionConfig | None) -> Plan:
    """Resolve one collection: its own configuration, else the hook's, else the default."""
    default = KNOWN.get(name, _CUSTOM)
    chosen = own.save_config if own is not None and own.save_config is not None else save
    kept = own.reduction_config if own is not None and own.reduction_config is not None else reduction
    modes = ("global", "train") if default.training_only else MODES
    if chosen is None:
        per_mode = dict.fromkeys(modes, SaveConfig(default.interval))
    else:
        per_mode = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(modes, chosen)
    raw = default.raw if kept is None else kept.raw()
    scheduled = isinstance(kept.save_raw_tensor, SaveConfig) if kept is not None else chosen is None and raw is DOUBLING
    return Plan(
        name,
        default.role,
        per_mode,
        raw,
        scheduled,
        kept or ReductionConfig(),
        kept is None and raw is DOUBLING,
        tuple(own.include) if own is not None else (),
        own.compression if own is not None and own.compression != "none" else "",
        (own.dtype or "") if own is not None else "",
    )


def check_choices(**given: str) -> None:
    """Raise ValueError if one of the hook's options is not among its choices."""
    choices = {"workers": ("auto", "all", "one"), "on_error": ("raise", "off"), "when_full": ("drop", "block")}
    for name, value in given.items():
        if value not in choices[name]:
            raise ValueError(f"{name} must be one of {', '.join(choices[name])}, not {value!r}")


def check_reduction(config: object) -> None:
    """Raise TypeError if `config` is neither None nor a ReductionConfig."""
    if config is not None and not isinstance(config, ReductionConfig):
        raise TypeError(f"reduction_config must be a ReductionConfig, not {config!r}")


def own_configs(collections: Sequence[str | CollectionConfig] | None) -> dict[str, CollectionConfig]:
    """Return what the user configured, by name. Raises TypeError, ValueError."""
    out: dict[str, CollectionConfig] = {}
    for given in collections or ():
        config = CollectionConfig(given) if isinstance(given, str) else given
        if not isinstance(config, CollectionConfig):
            raise TypeError(f"collections holds names and CollectionConfigs, not {given!r}")
        if config.name in out:
            raise ValueError(f"collection {config.name!r} is configured twice")
        out[config.name] = config
    return out


def natural(name: str, value: Any) -> int:
    """Return a whole number from 0. Raises ValueError."""
    number = value.__index__() if hasattr(value, "__index__") and not isinstance(value, bool) else -1
    if number < 0:
        raise ValueError(f"{name} must be a whole number from 0, not {value!r}")
    return int(number)
