"""A run's settings: which there are, of what type and range. conf/train.yaml says what each one means."""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
)

# Strict, or `no` would count as true, and 1.5 epochs as one.
STRICT = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
Node = dict[str, Any]  # a configuration group: the `_target_` that builds it, and its options
Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """The settings of one run. Groups are checked by `rst.training.parts.rehearse`."""

    model_config = STRICT | ConfigDict(extra="forbid")

    seed: NonNegativeInt
    epochs: PositiveInt
    evaluate_every: PositiveInt
    warmup_epochs: NonNegativeInt
    batch_size: PositiveInt
    rho: NonNegativeFloat
    l2: NonNegativeFloat
    grad_accumulation: PositiveInt
    clip_norm: PositiveFloat | None
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    channels_last: bool
    compile: bool
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    threads: Annotated[int, Field(ge=1, le=1024)] | None  # at some ten thousand PyTorch crashes
    outputs: Annotated[str, Field(min_length=1)]
    checkpoint: Node
    dataset: Node
    augment: Node
    model: Node
    optimizer: Node
    schedule: Node
    method: Node
    lr_schedule: Node
    tracker: Node


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Raises ValueError, in one line, for what is unknown, missing or not of its type or range."""
    return _validated(Settings, config, "")


def check_options(
    group: str, target: Callable[..., Any], options: Mapping[str, Any], given: Iterable[str] = ()
) -> None:
    """Refuse options that `target` does not have, misses, or annotates with another type.

    Args:
        given: the arguments that `target` gets from the run, which are no options.

    Raises:
        ValueError: naming the group and the option.
    """
    if taken := options.keys() & {*given}:
        raise ValueError(f"{group}.{taken.pop()} follows from the other settings: leave it out")
    parameters = inspect.signature(target).parameters.values()
    objects = {key for key, value in options.items() if isinstance(value, Mapping)}  # with a _target_ each
    fields: dict[str, Any] = {}
    for p in parameters:
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in objects.union(given):
            untyped = p.annotation is p.empty or isinstance(p.annotation, str)
            fields[p.name] = (Any if untyped else p.annotation, ... if p.default is p.empty else p.default)
    takes_more = objects or any(p.kind is p.VAR_KEYWORD for p in parameters)
    extra = ConfigDict(extra="allow" if takes_more else "forbid")
    model = create_model(group, __config__=STRICT | extra, **fields)
    plain = {key: value for key, value in options.items() if not key.startswith("_") and key not in objects}
    _validated(model, plain, f"{group}.")


def _validated(model: type[Model], values: Mapping[str, Any], prefix: str) -> Model:
    try:
        # As JSON, in which a list stands for a tuple, too.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for each in error.errors():
            key, value = str(each["loc"][0]), each["input"]
            if each["type"] == "extra_forbidden":
                names = difflib.get_close_matches(key, model.model_fields) or sorted(model.model_fields)
                problems[f"{prefix}{key}"] = [f"unknown, choose from {', '.join(names) or 'none'}"]
            elif each["type"] != "needs_python_object":  # a type that no YAML has, such as a tensor
                shown = "" if each["type"] == "missing" else f"={value}"
                problems.setdefault(f"{prefix}{key}{shown}", []).append(each["msg"])
        texts = [f"{name}: {' or '.join(messages)}" for name, messages in problems.items()]
        raise ValueError("; ".join(texts)) from None
